"""A few turns of a run on a copy, to see how far each level moves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.check.differences import sizes
from bilevel.check.explaining.scene import Scene, long_vector
from bilevel.check.procedures import shift, stepper
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.solvers import UnrolledSteps
from bilevel.tree import Tree

TURNS = 50  # at most
_APART = 0.1  # of the lower variables' size: how far they are moved to see whether steps contract
_LOWER_STEPS = 40


@final
@dataclass(frozen=True)
class Rehearsal:
    """What a few turns did.

    Attributes:
        turns: turns taken.
        path: the upper variables before each turn and after the last, shape (turns + 1, m).
        slopes: the hypergradients, shape (turns, m).
        values: the upper losses.
        residuals: norm of the lower gradient after the lower steps of each turn.
        broken: the turn in which something was not finite, `None` if all was.
        end: the variables of both levels after the last turn.
    """

    turns: int
    path: Tensor
    slopes: Tensor
    values: list[float]
    residuals: list[float]
    broken: int | None
    end: tuple[Tree, Tree]


def rehearse(scene: Scene, turns: int) -> Rehearsal:
    """Lower steps, a hypergradient, an upper step, and again, on a copy in the problem's precision."""
    copied, uppers, lowers = scene.copied()
    path, slopes, values, residuals = [_own(copied)], [], [], []
    broken = None
    for turn in range(turns):
        for step in range(scene.rates.lower_steps):
            residual = _lower_step(scene, copied, lowers, step)
        answer = scene.eager.hypergradient(
            copied,
            scene.upper_batch,
            scene.lower_batches,
            lower_optimizer=lowers or None,
            seed=scene.seed,
            throw=False,
        )
        slopes.append(long_vector(answer.grad))
        values.append(float(answer.value))
        residuals.append(residual)
        _step(uppers, copied.variables("upper"), answer.grad)
        path.append(_own(copied))
        if not (math.isfinite(values[-1]) and bool(path[-1].isfinite().all())):
            broken = turn + 1
            break
    trees = [
        {n: p.detach().clone() for n, p in copied.variables(level).items()}
        for level in ("upper", "lower")
    ]
    return Rehearsal(
        len(slopes),
        torch.stack(path),
        torch.stack(slopes),
        values,
        residuals,
        broken,
        (trees[0], trees[1]),
    )


def _own(problem: Problem) -> Tensor:
    return long_vector({n: p.detach() for n, p in problem.variables("upper").items()})


def _lower_step(
    scene: Scene, problem: Problem, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> float:
    """One lower step; the norm of the gradient before it."""
    batches = [scene.lower_batches[step % len(scene.lower_batches)]]
    oracles = Oracles(
        problem, scene.upper_batch, batches, seed=scene.seed, precision=scene.precision
    )
    _, grads = oracles.lower_gradient(oracles.upper, oracles.lower)
    _step(optimizers, problem.variables("lower"), grads)
    return float(long_vector({n: g for n, g in grads.items() if g is not None}).norm())


def _step(
    optimizers: Sequence[torch.optim.Optimizer],
    variables: Tree,
    grads: "dict[str, Tensor | None] | Tree",
) -> None:
    for name, parameter in variables.items():
        grad = grads[name]
        parameter.grad = None if grad is None else torch.empty_like(parameter).copy_(grad)
    for optimizer in optimizers:
        optimizer.step()
    for parameter in variables.values():
        parameter.grad = None


def growth(scene: Scene) -> float | None:
    """By what factor 40 lower steps change the lower gradient, from a point moved by a tenth.

    Below 1 the steps contract. Measured with the steps that the solver unrolls, or with the running
    lower optimizers; `None` where there are neither.
    """
    steps: UnrolledSteps | None = scene.solver.unrolled_steps()
    if steps is None and not scene.lower_optimizers:
        return None
    if steps is None:
        steps = UnrolledSteps(_LOWER_STEPS)
    if steps.optimizer is None and not scene.lower_optimizers:
        return None
    oracles = scene.oracles
    generator = torch.Generator().manual_seed(scene.seed)
    offset = {n: y.detach() + _APART * _sized(y, generator) for n, y in oracles.lower.items()}
    with scene.at(offset), scene.twice():
        move = stepper(oracles, steps, scene.lower_optimizers or None)
        first = last = _gradients(oracles)
        start = float(long_vector(fill_tree(first, oracles)).norm())
        for _ in range(_LOWER_STEPS):
            move(last)
            last = _gradients(oracles)
            end = float(long_vector(fill_tree(last, oracles)).norm())
            if not math.isfinite(end):
                return math.inf
    return end / start if start > 0 else 0.0


def _gradients(oracles: Oracles) -> dict[str, Tensor | None]:
    """The lower gradient where the copy stands, the mean over the lower batches."""
    found = [
        oracles.lower_gradient(oracles.upper, oracles.lower, i)[1]
        for i in range(len(oracles.lower_batches))
    ]
    means: dict[str, Tensor | None] = {}
    for name in found[0]:
        parts = [g for grads in found if (g := grads[name]) is not None]
        means[name] = torch.stack(parts).mean(dim=0).detach() if parts else None
    return means


def fill_tree(grads: dict[str, Tensor | None], oracles: Oracles) -> Tree:
    """Gradients with zeros where one is missing."""
    leaves = list(oracles.lower.values())
    return dict(zip(grads, fill(list(grads.values()), leaves), strict=True))


def _sized(point: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
    size: Tensor = sizes(point.detach().reshape(-1)).view(point.shape)
    return drawn * size


def reach(scene: Scene) -> Tree:
    """How far each upper variable may have to go: its own size, or 1 where it is 0."""
    return {
        n: sizes(x.detach().double().reshape(-1)).view(x.shape)
        for n, x in scene.copy.variables("upper").items()
    }


def bend(scene: Scene, direction: Tree) -> float | None:
    """Curvature of the upper objective, the lower level following, along a direction.

    Args:
        scene: the scene.
        direction: offsets of the upper variables.

    Returns:
        d^T H d / d^T d by a difference of hypergradients; `None` where there is no lower minimum.
    """
    if scene.there is None or scene.solution is None:
        return None
    length = float(long_vector(direction).norm())
    if length == 0:
        return None
    with scene.at(scene.solution):
        shift(scene.copy.variables("upper"), direction)
        scene.follow(3)
        moved = scene.reference().grad
    difference = long_vector(moved) - long_vector(scene.there.grad)
    found = float(difference @ long_vector(direction)) / length**2
    return found if math.isfinite(found) else None


def rates_of(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """The optimizers and their rates in words."""
    rated = [o for o in optimizers if all("lr" in g for g in o.param_groups)]
    said = [
        f"{type(o).__name__} at " + ", ".join(f"{float(g['lr']):g}" for g in o.param_groups)
        for o in rated
    ]
    return " and ".join(said) or "its optimizer"


def rate(optimizers: Sequence[torch.optim.Optimizer]) -> float | None:
    """The one rate of all groups, `None` if there are several."""
    found: set[Any] = {float(g["lr"]) for o in optimizers for g in o.param_groups if "lr" in g}
    return found.pop() if len(found) == 1 else None
