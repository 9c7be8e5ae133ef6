"""Boltzmann machines: energies, exact sums, Gibbs sampling, annealing; learners are elsewhere."""

from typing import Any

from bilevel.methods.machines.base import LatentVariableModel
from bilevel.methods.machines.dbm import DBM, GaussianDBM
from bilevel.methods.machines.enumeration import MAX_UNITS
from bilevel.methods.machines.rbm import RBM, GaussianRBM

__all__ = [
    "DBM",
    "MAX_UNITS",
    "RBM",
    "GaussianDBM",
    "GaussianRBM",
    "LatentVariableModel",
    "from_recipe",
]


def from_recipe(recipe: dict[str, Any]) -> LatentVariableModel:
    """Build the model that a `recipe` describes, with its initial weights.

    Raises:
        ValueError: if there is no model of that kind.

    Example:
        >>> from_recipe(RBM(6, 3).recipe).latent_dims
        (3,)
    """
    kinds = {"RBM": RBM, "GaussianRBM": GaussianRBM, "DBM": DBM, "GaussianDBM": GaussianDBM}
    arguments = dict(recipe)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"there is no model of kind {kind!r}; choose one of {', '.join(kinds)}")
    model: LatentVariableModel = kinds[kind](**arguments)
    return model
