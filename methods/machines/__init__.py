"""Boltzmann machines: energies, exact sums, Gibbs sampling, annealing; learners are elsewhere."""

from collections.abc import Mapping
from typing import Any

from bilevel.methods.machines.base import BoltzmannMachine, as_machine
from bilevel.methods.machines.dbm import DBM, GaussianDBM
from bilevel.methods.machines.enumeration import MAX_UNITS
from bilevel.methods.machines.rbm import RBM, GaussianRBM

__all__ = [
    "DBM",
    "MACHINES",
    "MAX_UNITS",
    "RBM",
    "BoltzmannMachine",
    "GaussianDBM",
    "GaussianRBM",
    "as_machine",
    "from_recipe",
]

MACHINES: Mapping[str, type[BoltzmannMachine]] = {
    kind.__name__: kind for kind in (RBM, GaussianRBM, DBM, GaussianDBM)
}
"""Boltzmann machines by the name of the class: what a recipe calls them."""


def from_recipe(recipe: dict[str, Any]) -> BoltzmannMachine:
    """Build the model that a `recipe` describes, with its initial weights.

    Raises:
        ValueError: if there is no model of that kind.

    Example:
        >>> from_recipe(RBM(6, 3).recipe).latent_dims
        (3,)
    """
    arguments = dict(recipe)
    kind = arguments.pop("kind", None)
    if kind not in MACHINES:
        raise ValueError(f"there is no model of kind {kind!r}; choose one of {', '.join(MACHINES)}")
    return MACHINES[kind](**arguments)
