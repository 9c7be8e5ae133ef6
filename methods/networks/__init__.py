"""The networks of the papers by image shape: convolutional, residual, deep energies, perceptrons."""

from bilevel.methods.networks.convolutional import (
    Energy,
    Generator,
    JointEnergy,
    Networks,
    Posterior,
    channels_of,
    conv_networks,
    parameter_count,
)
from bilevel.methods.networks.residual import residual_networks

__all__ = [
    "Energy",
    "Generator",
    "JointEnergy",
    "Networks",
    "Posterior",
    "channels_of",
    "conv_networks",
    "parameter_count",
    "residual_networks",
]
