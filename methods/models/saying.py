"""What a learner says of itself: the lines that its text adds to those of a problem."""

from collections.abc import Mapping
from typing import Any

from bilevel.cards import plural, settings
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.models.model import LatentModel

_SAID_ELSEWHERE = {
    "latent_dim",
    "shape",
    "standardised",
    "statistics",
    "stops_lower_gradient",
    "training",
    "visible_dim",
}


def lines_of(model: LatentModel | None, values: Mapping[str, Any]) -> str:
    """A line for each thing there is to know about a learner, `name: value`.

    Args:
        model: what it can do; `None` while its constructor is at work.
        values: attributes and arguments of the learner; the plain ones are its settings.
    """
    if model is None:
        return ""
    mine = {n: v for n, v in values.items() if not n.startswith("_") and n not in _SAID_ELSEWHERE}
    rows = {"settings": settings(mine), "visibles": _visibles(model.visibles)}
    if model.machine is not None:
        rows["machine"] = repr(model.machine)
    rows["latent"] = _latent(model)
    slow = {"sample": "sample (by Langevin dynamics)"} if model.draws_by_chains else {}
    can = [slow.get(ability, ability) for ability in model.abilities()]
    if "energy" in can and model.visibles.real:
        can.insert(1, "score")
    rows["can"] = ", ".join(can)
    return "\n".join(f"{name}: {value}" for name, value in rows.items() if value)


def _visibles(taken: Visibles) -> str:
    if taken.table is not None:
        return f"numbers of rows, from 0 to {taken.table - 1}"
    shape = "of any shape" if taken.shape is None else str(taken.shape)
    if taken.binary:
        return f"{shape}, each 0 or 1"
    if taken.range is None:
        return f"{shape}, real numbers"
    return "{} in [{:g}, {:g}]".format(shape, *taken.range)


def _latent(model: LatentModel) -> str:
    if "posterior" not in model.abilities():
        return "none"
    if model.dim is None:
        return "its dimension is found from the first data"
    return plural(model.dim, "unit" if model.machine is not None else "number")
