r"""`ConditionProblem`: a lower level that is an equation, and not the minimum of a loss."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from bilevel.lower_field import field, half_square
from bilevel.problem import Problem


class ConditionProblem(Problem):
    r"""A bilevel problem whose lower level is an equation: $y^*(x)$ solves $c(x, y) = 0$.

    A subclass defines `upper_loss` and `lower_condition`, no lower loss. Gradients of a loss are one
    kind of condition; equilibria, the zero of a residual, the first-order conditions of a constrained
    or a zero-sum lower level are others. `Implicit` solves with the Jacobian of $c$, which need not be
    symmetric: `GMRES()`, or `Cholesky()` (by LU) where it is small. `Unrolled` and the lower steps of
    `train` go along $-c$, so its sign counts for them: near the answer, steps $y - \eta\, c$ must
    contract.

    **Fixed points.** An answer given as $y = \Phi(x, y)$ is the condition $y - \Phi(x, y)$, and
    $y \leftarrow \Phi(x, y)$ are steps of `torch.optim.SGD` with learning rate 1. Which map may be
    used where:

    - `Implicit` needs the fixed point only: any map with the right one gives the same, exact
      hypergradient, however fast or slowly it contracts. It must be differentiable there.
    - `Unrolled` and `train` need a map that contracts, and their answer is that of this map's
      iterates.
    - A step of an optimizer, $\Phi(x, y) = y - \eta\, \partial_y G$, is a map too, but says no more
      than the loss G: then give that. A map with a state (momentum) has more unknowns than y.

    Example:
        >>> import torch
        >>> class Root(ConditionProblem):  # y is the cube root of x
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.upper = torch.nn.ParameterDict({"x": torch.tensor(8.0)})
        ...         self.lower = torch.nn.ParameterDict({"y": torch.tensor(2.0)})
        ...     def upper_loss(self, batch):
        ...         return self.lower["y"]
        ...     def lower_condition(self, batch):
        ...         return {"y": self.lower["y"] ** 3 - self.upper["x"]}
        >>> from bilevel import GMRES, Implicit
        >>> Implicit(GMRES()).hypergradient(Root()).grad["x"]  # 1 / (3 y^2)
        tensor(0.0833)

    References:
        Efficient and Modular Implicit Differentiation (Blondel, Berthet, Cuturi, Frostig, Hoyer,
        Llinares-Lopez, Pedregosa, Vert, 2022), https://arxiv.org/abs/2105.15183
    """

    @abstractmethod
    def lower_condition(self, batch: Any) -> Mapping[str, Tensor]:
        """The equation c(x, y) = 0: a tensor for each lower variable, under its name, in its shape."""

    @final
    def lower_loss(self, batch: Any) -> Tensor:
        return half_square(field(self.lower_condition(batch), self, self.variables("lower")))
