"""What the first hidden layer of a machine touches, as plain tensors: all that annealing it needs."""

from typing import NamedTuple, final

from torch import Tensor


@final
class Neighbours(NamedTuple):
    r"""The units next to the first hidden layer $h_1$, with $n_1$ units, and how they touch it.

    At inverse temperature beta, given $h_1$: a binary neighbour has logits
    `binary_base` + beta (`binary_bias` - `binary_base` + h1 `binary_weight`), and a Gaussian one, in
    units of its standard deviation and less its bias, has mean beta h1 `gaussian_weight`. Each kind may
    be missing: then its tensors have no columns.

    Attributes:
        bias: of h1, the pull of the Gaussian neighbours' biases included, shape (n1,).
        binary_weight: shape (n1, m).
        binary_bias: at beta = 1, shape (m,).
        binary_base: at beta = 0, shape (m,).
        gaussian_weight: shape (n1, d).
    """

    bias: Tensor
    binary_weight: Tensor
    binary_bias: Tensor
    binary_base: Tensor
    gaussian_weight: Tensor
