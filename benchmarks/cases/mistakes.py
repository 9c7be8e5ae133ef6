"""Mistakes for `benchmarks.check_seeds`, planted in problems and solvers that are right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torchopt
from torch import Tensor, nn

from benchmarks.cases.right_answers import (
    Fit,
    Trial,
    initialised,
    mlp,
    normal,
    quadratic,
    regression,
)
from bilevel import (
    Alternating,
    Cholesky,
    Implicit,
    LinearSolver,
    Problem,
    Response,
    ResponseProduct,
    Result,
    Solver,
    Unrolled,
)
from bilevel.linear import LinearSolution
from bilevel.oracles import Oracles


@final
@dataclass(frozen=True)
class Spoiled(Solver):
    """A right solver whose response is spoiled on the way."""

    right: Solver
    spoil: Callable[[Tensor], Tensor]

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        response = self.right.respond(oracles, state, lower_optimizer)

        def vjp(v: Any) -> ResponseProduct:
            assert response.vjp is not None
            product = response.vjp(v)
            return product._replace(product={n: self.spoil(g) for n, g in product.product.items()})

        return response._replace(vjp=vjp)


@final
@dataclass(frozen=True)
class Posing(Solver):
    """Says it is implicit, drops the response."""

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        def vjp(v: Any) -> ResponseProduct:
            return ResponseProduct({n: torch.zeros_like(x) for n, x in oracles.upper.items()})

        return Response(oracles.lower, vjp)


@final
@dataclass(frozen=True)
class Stale(LinearSolver):
    """Answers with what it has."""

    old: Tensor

    def solve(self, operator: Any, rhs: Tensor, *, guess: Tensor | None = None) -> LinearSolution:
        return LinearSolution(self.old, Result.SUCCESS, None, 0)


def answering_as(solver: Unrolled, answers: Unrolled) -> Unrolled:
    """A solver that says it is the first and answers as the second: a mistake in its steps."""
    object.__setattr__(solver, "respond", answers.respond)  # it is frozen, and rightly so
    return solver


def one_step_more(steps: int) -> Solver:
    """Unrolls a step more than it says."""
    sgd = torchopt.sgd(0.1)
    return answering_as(Unrolled(steps, sgd), Unrolled(steps + 1, sgd))


def other_clip(steps: int, norm: float) -> Solver:
    """Clips by another factor than it says."""
    sgd = torchopt.sgd(0.1)
    clipped = (Unrolled(steps, sgd, max_grad_norm=size) for size in (norm, 1.01 * norm))
    return answering_as(*clipped)


def spoiled(change: Callable[[Tensor], Tensor]) -> Callable[[int], Trial]:
    return lambda seed: Trial(quadratic(seed), Spoiled(Implicit(Cholesky()), change))


def stale(seed: int) -> Trial:
    """A linear solver that returns the solution of another right-hand side and says it is right."""
    return Trial(quadratic(seed), Implicit(Stale(normal(4, seed=seed + 77))))


def small_block(seed: int) -> Trial:
    """A variable without response beside one that counts 1e8 times as much."""

    def lower(x: Any, y: Any, _: Any) -> Tensor:
        small = (y["v"] - x["small"].detach()).cosh().sum()
        return (y["u"] - x["big"]).cosh().sum() + small

    problem = Problem.from_functions(
        lambda x, y, _: (1e4 * y["u"]).square().sum() + (y["v"] - 1).square().sum(),
        lower,
        {"big": normal(2, seed=seed), "small": normal(2, seed=seed + 1)},
        {"u": torch.zeros(2, dtype=torch.float64), "v": torch.zeros(2, dtype=torch.float64)},
    )
    return Trial(problem, Implicit(Cholesky()))


def net_mistake(mistake: str, solver: Solver) -> Callable[[int], Trial]:
    def trial(seed: int) -> Trial:
        problem = Fit(initialised(mlp(nn.ReLU if seed % 2 else nn.Tanh), seed), seed, mistake)
        return Trial(problem, solver, regression(seed + 1000), regression(seed + 2000))

    return trial


MISTAKES: dict[str, Callable[[int], Trial]] = {
    "response dropped": lambda seed: Trial(quadratic(seed), Alternating()),
    "response dropped, posing as implicit": lambda seed: Trial(quadratic(seed), Posing()),
    "response detached in a block of size 1e-4": lambda seed: Trial(
        quadratic(seed, stop=True), Implicit(Cholesky())
    ),
    "response missing beside one 1e8 larger": small_block,
    "wrong sign": spoiled(lambda g: -g),
    "factor 2": spoiled(lambda g: 2 * g),
    "off by a thousandth": spoiled(lambda g: 1.001 * g),
    "one entry missing": spoiled(lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])])),
    "solution of another system": stale,
    "weights detached": net_mistake("detach", Unrolled(3, torchopt.sgd(0.1))),
    "penalty through `float`": net_mistake("float", Unrolled(3, torchopt.sgd(0.1))),
    "one step more": net_mistake("", one_step_more(3)),
    "wrong clip factor": net_mistake("", other_clip(3, 0.1)),
    "the last step only": net_mistake("", Unrolled(3, torchopt.sgd(0.1), truncate=1)),
}
