r"""`F2SAp`: a finite difference of order p in the weight of the upper loss.

Let $\ell_\nu(x) = \min_y \nu F(x, y) + G(x, y)$, taken at $y_\nu$. Then
$\partial_\nu \nabla \ell_\nu(x)$ at $\nu = 0$ is the hypergradient, and by the envelope theorem
$\nabla \ell_\nu = \nu \partial_x F(x, y_\nu) + \partial_x G(x, y_\nu)$ needs first derivatives only. A
difference quotient with $p + 1$ nodes,

$$ \frac{1}{\nu} \sum_j c_j \nabla \ell_{j \nu}(x), \qquad
   j = -\lfloor p/2 \rfloor, \dots, \lceil p/2 \rceil, \qquad \nu = 1 / \lambda, $$

has an error of $O(\lambda^{-p})$. With p = 1 it is `F2SA` with a constant penalty.
"""

from dataclasses import dataclass
from typing import Any, final

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.refusals import positive, whole
from bilevel.solvers.answers import Response, ResponseProduct
from bilevel.solvers.first_order.advice import secant_curvature, warn_if_small
from bilevel.solvers.first_order.base import FirstOrder
from bilevel.solvers.first_order.differences import difference_weights
from bilevel.solvers.first_order.runs import check_run, fresh_copy, last_batch, lower_run
from bilevel.tree import Tree, norm


@final
@explained_settings
@dataclass(frozen=True)
class F2SAp(FirstOrder):
    """Fully first-order with a finite difference of order p: error O(penalty^-p).

    The problem's own lower variables, moved by the lower steps of `train`, solve the lower level; a
    copy of them for every other node of the difference is the solver's state. For even p these are p
    copies, half of which are pulled away from the upper loss's minimum.

    Args:
        order: the order p.
        penalty: 1 / nu; the theory asks for at least p L / mu (L the largest curvature of the upper
            loss in the lower variables, mu the smallest of the lower loss).
        num_steps: steps of each copy at each call.
        step_size: of the copies, in units of the lower loss; `None` for the learning rate that the
            lower optimizer has now.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> F2SAp(order=2, penalty=20.0).order
        2

    References:
        Faster Gradient Methods for Highly-Smooth Stochastic Bilevel Optimization (Chen, Li, Chayti,
        Zhang, 2026), https://arxiv.org/abs/2509.02937. Differs from the paper in: the steps of x and
        y are the optimizers' (there, x takes normalised steps), and those of the copies are not
        averaged over batches.
    """

    order: int = 2
    penalty: float = 10.0
    num_steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        whole("order", self.order, 1, 10)
        positive("penalty", self.penalty)
        check_run(self.num_steps, self.step_size)

    def num_lower_batches(self) -> int:
        return self.num_steps

    def begin(self, oracles: Oracles) -> dict[str, Any]:
        nodes = [j for j in difference_weights(self.order) if j]
        return {"calls": 0, "copies": {str(j): fresh_copy(oracles) for j in nodes}}

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        name, batch, upper = type(self).__name__, last_batch(oracles), oracles.upper
        weights, lower, pull = difference_weights(self.order), oracles.lower, 1 / self.penalty
        step_sizes = self.rates(oracles, lower_optimizer)
        _, here, residual = oracles.partials("lower", upper, lower, batch)

        def vjp(cotangent: Tree) -> ResponseProduct:
            # of the difference quotient, what is not the upper loss's gradient at the answer
            _, total, _ = oracles.partials("upper", upper, lower)
            total = {n: -g for n, g in total.items()}
            if 0 in weights:
                total = _plus(total, here, self.penalty * weights[0])
            copies = {}
            for j in filter(None, weights):
                start = state["copies"][str(j)]
                end, pulled = lower_run(oracles, start, step_sizes, self.num_steps, pull=j * pull)
                _, of_f, last = oracles.partials("upper", upper, end)
                _, of_g, grads = oracles.partials("lower", upper, end, batch)
                total = _plus(total, of_f, weights[j] * j)
                total = _plus(total, of_g, weights[j] * self.penalty)
                copies[str(j)] = end
                if j == 1 and not state["calls"]:  # the copy began at the lower variables
                    bends = secant_curvature(start, end, pulled, last)
                    bears = secant_curvature(start, end, residual, grads)
                    warn_if_small(name, self.penalty, bends, bears, times=max(self.order, 2))
            return ResponseProduct(total, state={"calls": state["calls"] + 1, "copies": copies})

        return Response(lower, vjp, lower_residual=norm(residual))


def _plus(total: Tree, other: Tree, scale: float) -> Tree:
    """The sum, where the other has an entry."""
    return {n: t + scale * other[n] if n in other else t for n, t in total.items()}
