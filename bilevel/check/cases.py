"""Problems whose truth is known, by name: what solvers are compared on.

Drawn from a seed, mostly small and in float64. Some take arguments after colons:
`quadratic:1000:1e4` has 1,000 lower variables and a condition number of 10,000.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from bilevel.check.problems.case import Case
from bilevel.check.problems.cleaning import cleaning
from bilevel.check.problems.penalties import breast_cancer, drawn_rows, even_digits, libsvm
from bilevel.check.problems.quadratic import quadratic
from bilevel.check.problems.toy import toy

N = TypeVar("N", int, float)
__all__ = ["CASES", "MORE_CASES", "Case", "case_named"]

CASES: Mapping[str, Callable[[int], Case]] = {
    "quadratic": quadratic,
    "ridge": partial(drawn_rows, logistic=False),
    "logistic": partial(drawn_rows, logistic=True),
}
"""Cases by name, each a function of the seed."""


def _number(text: str, kind: type[N]) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"it takes numbers, got `{text}`") from None


def _sized(seed: int, size: str, condition: str = "8") -> Case:
    return quadratic(seed, _number(size, int), _number(condition, float))


def _toys(seed: int, starts: str = "1") -> Case:
    return toy(seed, _number(starts, int))


def _mlp(seed: int, path: str | None = None) -> Case:
    return cleaning(seed, path, network="mlp")


MORE_CASES: Mapping[str, tuple[str, Callable[..., Case]]] = {
    "quadratic": ("[:SIZE[:CONDITION]]", _sized),
    "breast-cancer": ("", breast_cancer),
    "digits": ("", even_digits),
    "libsvm": (":FILE[:UPPER_FILE]", libsvm),
    "cleaning": ("[:FILE.npz]", cleaning),
    "cleaning-mlp": ("[:FILE.npz]", _mlp),
    "toy": ("[:STARTS]", _toys),
}
"""Cases that take a while, or arguments: how these are written, and the function of seed and strings."""


def case_named(name: str, seed: int) -> Case | None:
    """The case of a name on the command line; `None` if there is none.

    Args:
        name: of the case, and its arguments after colons.
        seed: what it is drawn from.

    Raises:
        ValueError: if its arguments make no sense.

    Example:
        >>> case = case_named("quadratic:50:100", seed=0)
        >>> case.problem.lower["y"].shape
        torch.Size([50])
        >>> case_named("quadratics", seed=0) is None
        True
    """
    kind, *arguments = name.split(":")
    if not arguments and kind in CASES:
        return CASES[kind](seed)
    if kind not in MORE_CASES:
        return None
    about, make = MORE_CASES[kind]
    try:
        inspect.signature(make).bind(seed, *arguments)
    except TypeError:
        taken = f"is written `{kind}{about}`" if about else "takes no arguments"
        raise ValueError(f"`{kind}` {taken}, got `{name}`") from None
    try:
        return make(seed, *arguments)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
