"""Checks of arguments: each refuses a bad value with what was wanted, what was got, what to do."""

import difflib
import math
import operator
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SEEDS = -(2**63), 2**63 - 1  # what torch's generators take


def positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse a setting that is not a finite positive number (with `zero`, one of zero or more).

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range.
    """
    wanted = "zero or more" if zero else "positive"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be {wanted}: a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        raise ValueError(f"`{name}` must be {wanted} and finite, got {shown(value)}") from None
    if not (number >= 0 if zero else number > 0):
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be {wanted} and finite, got {value!r}")


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """The setting as a Python integer, if it is a whole number in its range.

    NumPy's integers are taken, truth values and floats are not.

    Args:
        name: name of the setting.
        value: what was given.
        least: the least that is allowed.
        most: the most that is allowed.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is out of range.

    Example:
        >>> whole("num_steps", 2.5)
        Traceback (most recent call last):
            ...
        TypeError: `num_steps` must be a whole number, got 2.5
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a whole number, got {shown(value)}")
    number = operator.index(value)
    if most is not None and not least <= number <= most:
        raise ValueError(f"`{name}` must lie between {least} and {most}, got {number}")
    if number < least:
        wanted = {0: "zero or more", 1: "positive"}.get(least, f"at least {least}")
        raise ValueError(f"`{name}` must be {wanted}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """The setting as `True` or `False`, if it is one of them.

    Raises:
        TypeError: if it is something else: the truth value of a string or a number would mislead.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be `True` or `False`, got {shown(value)}")
    return bool(value)


def one_of(setting: str, value: Any, options: Iterable[str]) -> None:
    """Refuse a value that is not among the options.

    Raises:
        ValueError: with the nearest valid value.
    """
    options = list(options)
    if value not in options:
        raise ValueError(f"`{setting}` cannot be {value!r}; {nearest(str(value), options)}")


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint at the valid name closest to `name`, or at all of them.

    Example:
        >>> nearest("ofset", ["offset", "complete", "without"])
        'did you mean `offset`?'
    """
    options = list(options)
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return "choose one of " + ", ".join(f"`{option}`" for option in options)


def callable_or_none(name: str, value: Any, called: str) -> None:
    """Refuse what is neither a function nor `None`.

    Args:
        name: name of the argument.
        value: what was given.
        called: how it will be called, such as "(step)".

    Raises:
        TypeError: for anything else, a class included.
    """
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise TypeError(f"`{name}` must be a function, called as `{called}`; got {shown(value)}")


def path_of(name: str, value: Any) -> Path:
    """The path that was given.

    Raises:
        TypeError: if it is no path.

    Example:
        >>> path_of("folder", 3)
        Traceback (most recent call last):
            ...
        TypeError: `folder` must be a path (`str` or `Path`), got 3
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"`{name}` must be a path (`str` or `Path`), got {shown(value)}")
    return Path(value)


def a_generator(name: str, value: Any) -> None:
    """Refuse what is neither a torch generator nor `None`, such as a seed.

    Raises:
        TypeError: with how to make one.

    Example:
        >>> a_generator("generator", 3)
        Traceback (most recent call last):
            ...
        TypeError: `generator` must be a `torch.Generator`, got 3; write `Generator().manual_seed(3)`
    """
    if value is None or isinstance(value, torch.Generator):
        return
    whole_number = isinstance(value, Integral) and not isinstance(value, bool)
    raise TypeError(
        f"`{name}` must be a `torch.Generator`, got {shown(value)}; write "
        f"`Generator().manual_seed({value if whole_number else 0})`"
    )


def a_module(name: str, value: Any, what: str = "") -> None:
    """Refuse what is no network.

    Args:
        name: name of the argument.
        value: what was given.
        what: what it is called with and returns, for the message.

    Raises:
        TypeError: for a class, a function or anything else that is no `nn.Module`.
    """
    if isinstance(value, nn.Module):
        return
    made = f"; give an instance, `{value.__name__}(...)`" if isinstance(value, type) else ""
    raise TypeError(f"`{name}` must be an `nn.Module`{what}, got {shown(value)}{made}")


def a_tensor(name: str, value: Any) -> None:
    """Refuse what is no tensor, where nothing is converted because losses come by.

    Raises:
        TypeError: for arrays and lists.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, got {shown(value)}; convert it with `torch.as_tensor`"
        )


def modules_or_none(**given: Any) -> None:
    """`a_module` for each argument that is not `None`."""
    for name, value in given.items():
        if value is not None:
            a_module(name, value)


def outside_inference_mode() -> None:
    """Refuse to differentiate where torch records nothing, `enable_grad` or not.

    Raises:
        RuntimeError: inside `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inside `torch.inference_mode()` nothing can be differentiated; leave it, or use "
            "`torch.no_grad()`, which does no harm here"
        )


def shown(value: Any) -> str:
    """What was given, in words short enough for a sentence.

    Example:
        >>> shown("3"), shown(dict), shown(list(range(100)))
        ("'3'", 'the class `dict`', 'a `list`')
    """
    if isinstance(value, type):
        return f"the class `{value.__name__}`"
    if value is None or isinstance(value, (bool, int, float, complex, np.generic)):
        return repr(value)
    if isinstance(value, str) and len(value) <= 60:
        return repr(value)
    return f"a `{type(value).__name__}`"
