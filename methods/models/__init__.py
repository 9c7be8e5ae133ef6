"""What a trained model can do, whatever trained it; the Boltzmann machines are in `machines`."""

from bilevel.methods.machines import (
    DBM,
    MAX_UNITS,
    RBM,
    GaussianDBM,
    GaussianRBM,
    LatentVariableModel,
    from_recipe,
)

__all__ = [
    "DBM",
    "MAX_UNITS",
    "RBM",
    "GaussianDBM",
    "GaussianRBM",
    "LatentVariableModel",
    "from_recipe",
]
