"""The inverse of a network's curvature in Kronecker factors."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.linear.kronecker import Kronecker


@final
@explained_settings
@dataclass(frozen=True)
class KFAC(Kronecker):
    r"""$(A \otimes B + \rho I)^{-1} b$ layer by layer: an approximate inverse without any iteration.

    For lower levels that are networks of `nn.Linear` and `nn.Conv2d` layers. In place of the Hessian
    stands its Gauss-Newton matrix, whose curvature is that of the loss in the last layer's output; of it
    the blocks of single layers, each with bias; and of each block the product of the mean over inputs
    and the mean over gradients. So it is never negative, and right to the last digit for one linear
    layer and a quadratic loss. Penalties on the weights are no part of it: let the damping be theirs.

    It costs an evaluation and as many gradients as the network has outputs, and one eigendecomposition
    for each factor. Layers are seen as they are called (`torch.nn.functional.linear` and `conv2d` with
    one group). Variables of no such layer are divided by the damping. Rows of a batch must not depend on
    each other (batch norm in training mode mixes them: the factors are then rough).

    The residual that is reported is that against the Hessian itself, plus damping.

    Args:
        damping: the number rho, added to all eigenvalues.

    Raises:
        ValueError: if the damping is not positive, or the lower loss calls no such layer.
        TypeError: in `solve`: it needs the problem, so it works in `Implicit` only.

    Example:
        >>> from bilevel import Implicit
        >>> Implicit(KFAC(damping=0.1)).linear_solver.damping
        0.1

    References:
        Optimizing Neural Networks with Kronecker-factored Approximate Curvature (Martens, Grosse, 2015),
        https://arxiv.org/abs/1503.05671, and A Kronecker-factored Approximate Fisher Matrix for
        Convolution Layers (Grosse, Martens, 2016), https://arxiv.org/abs/1602.01407.
        Differs from the papers in: the output curvature is exact and not sampled, both factors are of
        this batch alone, and the damping is added to the eigenvalues of the product, not to the factors.
    """

    def eigenvalues(self, mine: Tensor, theirs: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        return mine[:, None] * theirs
