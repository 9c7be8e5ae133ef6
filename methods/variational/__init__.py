"""Variational distributions as differentiable draws: sampled by reparameterisation, or enumerated.

An expectation is a weighted sum over `Draws`. A sampled distribution gives one draw per row with equal
weights, a tabular one every state with its probability: the same loss is then a stochastic estimate
or the exact number.
"""

from bilevel.methods.variational.base import Draws, VariationalJoint, VariationalPosterior
from bilevel.methods.variational.bernoulli import BernoulliPosterior
from bilevel.methods.variational.gaussian import GaussianJoint, GaussianPosterior
from bilevel.methods.variational.hierarchical import Ancestral, HierarchicalJoint
from bilevel.methods.variational.tabular import (
    DecoupledEnergy,
    TabularEnergy,
    TabularJoint,
    TabularPosterior,
    enumerated,
)

__all__ = [
    "Ancestral",
    "BernoulliPosterior",
    "DecoupledEnergy",
    "Draws",
    "GaussianJoint",
    "GaussianPosterior",
    "HierarchicalJoint",
    "TabularEnergy",
    "TabularJoint",
    "TabularPosterior",
    "VariationalJoint",
    "VariationalPosterior",
    "enumerated",
]
