"""The lower variables that a turn begins with, where the problem makes them of the upper ones."""

from collections.abc import Mapping
from typing import Any

from bilevel.oracles import Oracles
from bilevel.refusals import nearest, shown
from bilevel.tree import Tree


def initial_lower(oracles: Oracles, upper: Tree) -> Tree:
    """What `Problem.initial_lower` gives at these upper variables, with its graph; else nothing.

    Raises:
        ValueError: if a name or a shape is not that of a lower variable.
        TypeError: if it gives no dict.
    """
    problem, slots = oracles.problem, oracles.slots
    if not problem.gives_initial_lower:
        return {}
    own = {n: p for n, p in slots.variables("upper").items() if n not in oracles.shared}
    made, _ = oracles.run(slots.substitute((own, upper)), "initial_lower", None)
    return _checked(made, slots.variables("lower"), type(problem).__name__)


def _checked(made: Any, lower: Tree, name: str) -> Tree:
    """The dict, if it is one of lower variables."""
    if made is None:
        return {}
    if not isinstance(made, Mapping):
        raise TypeError(
            f"`{name}.initial_lower` must return a dict of tensors by the names of lower variables, or "
            f"`None`; got {shown(made)}"
        )
    for key, value in made.items():
        if key not in lower:
            raise ValueError(
                f"`{name}.initial_lower` returns `{key}`, which is no lower variable; "
                f"{nearest(str(key), lower)}"
            )
        if value.shape != lower[key].shape:
            raise ValueError(
                f"`{name}.initial_lower` returns `{key}` of shape {tuple(value.shape)}, the lower "
                f"variable has {tuple(lower[key].shape)}"
            )
    return dict(made)
