"""Checks of arguments: each refuses a bad value with what was wanted, what was got, what to do."""

import difflib
import math
import operator
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

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
    number = float(value)
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
