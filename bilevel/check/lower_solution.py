"""The lower minimum to machine precision, for the check of solvers that claim its derivative."""

from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.linear import GMRES, ConjugateGradient
from bilevel.linear.base import dense
from bilevel.linearization import Linearization
from bilevel.oracles import Oracles
from bilevel.pieces import pieces_of
from bilevel.tree import Layout, Tree

_DENSE = 1000  # most variables for which the Hessian is made as a matrix
_ROUNDS = 12  # of Newton steps; they converge in four or five, or not at all
_HALVINGS = 10  # of a Newton step that does not help
_SOLVED = 1e-3  # of the gradient may be left; what is left enters the check's noise


class UnsolvedError(ValueError):
    """The lower level has no minimum near the current variables, or none that could be found."""


def solve_lower(oracles: Oracles, steps: int = 500) -> Tree:
    """The lower minimum nearest to the current lower variables, to about machine precision.

    In closed form where the problem has one, else by L-BFGS and Newton steps (with a dense Hessian
    up to 1000 variables, by conjugate gradients above).

    Args:
        oracles: the problem at the upper variables to solve for.
        steps: most steps of L-BFGS.

    Returns:
        The lower variables, detached.

    Raises:
        ValueError: if the lower level could not be solved: its gradient does not vanish.
    """
    return solve_closely(oracles, steps)[0]


def solve_closely(oracles: Oracles, steps: int = 500, *, near: bool = False) -> tuple[Tree, Tree]:
    """`solve_lower`, and the last Newton step: about how far the answer is off.

    Args:
        oracles: the problem at the upper variables to solve for.
        steps: most steps of L-BFGS.
        near: whether the current lower variables are nearly a solution, so that Newton steps find it.

    Raises:
        ValueError: as `solve_lower`.
    """
    batches = oracles.lower_batches
    several = len(batches) > 1 or pieces_of(batches[0])  # then the lower loss is their mean
    closed = None if several else _closed_form(oracles)
    if closed is not None:
        solution = {name: y.detach() for name, y in closed.items()}
        return solution, {name: torch.zeros_like(y) for name, y in solution.items()}
    with oracles.differentiated_twice("check_hypergradient"):
        level = _Level(oracles)
        point = level.layout.ravel([y.detach() for y in oracles.lower.values()])
        start = level.gradient(point).norm()
        if not near:
            point = level.descend(point, steps) if level.has_loss else level.follow(point, steps)
        point, step, scale = level.polish(point)
        if near and not level.solved(point, torch.maximum(start, scale)):
            return solve_closely(oracles, steps)
        if not level.solved(point, torch.maximum(start, scale)):
            raise UnsolvedError(level.unsolved(point, start, steps))
    return level.tree(point), level.tree(step)


def _closed_form(oracles: Oracles) -> Tree | None:
    """What the problem says of its own lower solution at the current variables, if anything."""
    places, lower = oracles.slots.variables, oracles.lower
    upper = {name: x for name, x in places("upper").items() if name not in oracles.shared}
    pairs = (upper, oracles.upper), (places("lower"), lower)
    with oracles.slots.substitute(*pairs).in_place():
        return oracles.problem.best_response(oracles.lower_batches[0])


@final
class _Level:
    """The lower loss as a function of one vector."""

    def __init__(self, oracles: Oracles) -> None:
        self.oracles = oracles
        self.upper = {name: x.detach() for name, x in oracles.upper.items()}
        problem, lower = oracles.problem, oracles.lower
        self.has_loss = not problem.gives_lower_condition and not problem.constrains_lower
        self.names = list(lower)
        self.layout = Layout(list(lower.values()))

    def tree(self, point: Tensor) -> Tree:
        parts = self.layout.unravel(point.detach())
        return dict(zip(self.names, parts, strict=True))

    def leaves(self, point: Tensor) -> Tree:
        return {name: y.clone().requires_grad_() for name, y in self.tree(point).items()}

    def gradient(self, point: Tensor) -> Tensor:
        return self.evaluate(point)[1]

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The lower loss and its gradient, the means over the lower batches."""
        leaves = self.leaves(point)
        losses, gradients = [], []
        for index in range(len(self.oracles.lower_batches)):
            evaluation, grads = self.oracles.lower_gradient(self.upper, leaves, index)
            filled = fill(list(grads.values()), list(leaves.values()))
            losses.append(evaluation.loss.detach())
            gradients.append(self.layout.ravel([g.detach() for g in filled]))
        return torch.stack(losses).mean(), torch.stack(gradients).mean(dim=0)

    def descend(self, start: Tensor, steps: int) -> Tensor:
        """L-BFGS. On one contiguous vector: torch's implementation takes `.view(-1)` of each tensor."""
        vector = start.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS(
            [vector],
            max_iter=steps,
            tolerance_grad=1e-13,
            tolerance_change=0.0,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, vector.grad = self.evaluate(vector)
            return loss

        lbfgs.step(closure)
        end = vector.detach()
        return end if bool(self.gradient(end).isfinite().all()) else start

    def follow(self, point: Tensor, steps: int) -> Tensor:
        """Newton steps to a zero of a field that is no gradient, each halved until it helps.

        With constraints these are the steps of an active-set method. Where one leads to the wrong face,
        a proximal step, the plain one of rate s, finds a better one.
        """
        here = self.gradient(point)
        rate = float(self.oracles.problem.proximal_step)
        for _ in range(steps):
            step = _newton_step(self.oracles.linearize_lower(self.upper, self.leaves(point)))
            halves = (step / 2**half for half in range(1, _HALVINGS))
            for move in (step, rate * here, *halves):
                after = self.gradient(point - move)
                if bool(after.norm() < 0.9999 * here.norm()):
                    break
            else:
                break
            point, here = point - move, after
        return point

    def polish(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Newton steps as long as they help: the point, the step not taken, the gradient's scale."""
        step, scale = torch.zeros_like(point), point.new_zeros(())
        size = torch.full_like(scale, torch.inf)
        for _ in range(_ROUNDS):
            linear = self.oracles.linearize_lower(self.upper, self.leaves(point))
            if not bool(linear.gradient.isfinite().all()):
                break
            step = _newton_step(linear)
            scale = linear.hessian(point / point.norm().clamp_min(1e-300)).norm() * point.norm()
            candidate = point - step
            after = self.gradient(candidate).norm()
            size = linear.gradient.norm()
            if not bool(after < size):
                break
            point = candidate
            if bool(after > 0.5 * size):  # no longer quadratic: rounding, or a kink
                break
        return point, step, scale

    def solved(self, point: Tensor, scale: Tensor) -> bool:
        return bool(self.gradient(point).norm() <= _SOLVED * scale)

    def unsolved(self, point: Tensor, start: Tensor, steps: int) -> str:
        left = float(self.gradient(point).norm())
        if not self.has_loss:
            return (
                f"the lower level of `{type(self.oracles.problem).__name__}` could not be solved: "
                f"Newton steps end where the norm of its field is {left:.1e} ({float(start):.1e} at the "
                "start); start nearer to the answer, or compare with `against='procedure'`"
            )
        return (
            f"the lower level of `{type(self.oracles.problem).__name__}` could not be solved: after "
            f"{steps} steps of L-BFGS and Newton's the norm of its gradient is {left:.1e} "
            f"({float(start):.1e} at the start); if it has no minimum (a loss linear in a variable), "
            "add a penalty, if it is hard, start nearer to the minimum, or compare with "
            "`against='procedure'`"
        )


def _newton_step(linear: Linearization) -> Tensor:
    """The step that makes the linearized gradient 0, the shortest one if there are several."""
    if linear.layout.size > _DENSE:
        matrix = linear.hessian.transposed  # the product is with the transpose
        if matrix is linear.hessian:
            return ConjugateGradient(300, rtol=1e-12).solve(matrix, linear.gradient).value
        return GMRES(300, rtol=1e-12).solve(matrix, linear.gradient).value
    hessian = dense(linear.hessian, linear.gradient).mT
    if not bool(hessian.isfinite().all()):
        return torch.zeros_like(linear.gradient)
    # on the processor, for its driver that takes singular matrices
    right = linear.gradient[:, None].cpu()
    step: Tensor = torch.linalg.lstsq(hessian.cpu(), right, driver="gelsd").solution
    return step[:, 0].to(linear.gradient)
