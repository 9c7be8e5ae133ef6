"""What a trained model can do, whatever trained it; Boltzmann machines themselves are in `machines`."""

from bilevel.methods.machines import (
    DBM,
    MAX_UNITS,
    RBM,
    BoltzmannMachine,
    GaussianDBM,
    GaussianRBM,
    from_recipe,
)

LatentVariableModel = BoltzmannMachine  # its earlier name

__all__ = [
    "DBM",
    "MAX_UNITS",
    "RBM",
    "BoltzmannMachine",
    "GaussianDBM",
    "GaussianRBM",
    "LatentVariableModel",
    "from_recipe",
]
