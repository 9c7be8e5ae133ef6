"""Other libraries as solvers of `bilevel bench solvers`: on its problems, judged by its truth.

    bilevel bench solvers --solvers unrolled-5 benchmarks.competitors.solvers:higher_5

from a checkout. What one of them answers is compared with finite differences like any other answer, and
an error it raises is the sentence in its row. Only libraries that are installed with the development
extra are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel import Oracles, Response, ResponseProduct, Solver
from bilevel.tree import Tree

RATE = 0.1  # of plain gradient descent, as the comparison's own lower optimizer


def _response(oracles: Oracles, upper: Tree, points: Sequence[Tensor]) -> Response:
    """Lower variables that hold a graph back to the upper ones."""
    lower = dict(zip(oracles.lower, points, strict=True))

    def vjp(cotangent: Tree) -> ResponseProduct:
        inputs, given = list(upper.values()), [cotangent[name] for name in lower]
        found = torch.autograd.grad(list(lower.values()), inputs, given, allow_unused=True)
        pairs = zip(upper.items(), found, strict=True)
        return ResponseProduct({n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs})

    return Response({name: y.detach().requires_grad_() for name, y in lower.items()}, vjp)


@final
@dataclass(frozen=True)
class HigherUnrolled(Solver):
    """`higher.get_diff_optim`: steps of gradient descent that keep their graph."""

    num_steps: int

    def num_lower_batches(self) -> int:
        return 1

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        import higher

        upper = oracles.upper
        points = [y.clone() for y in oracles.lower.values()]
        leaves = [y.detach().clone().requires_grad_() for y in points]
        optimizer = higher.get_diff_optim(torch.optim.SGD(leaves, RATE), leaves)
        for _ in range(self.num_steps):
            lower = dict(zip(oracles.lower, points, strict=True))
            loss = oracles.evaluate("lower", upper, lower).loss
            points = list(optimizer.step(loss, params=points))
        return _response(oracles, upper, points)


@final
@dataclass(frozen=True)
class TorchoptUnrolled(Solver):
    """`torchopt.sgd`, functional: the same steps."""

    num_steps: int

    def num_lower_batches(self) -> int:
        return 1

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        import torchopt

        upper, points = oracles.upper, tuple(y.clone() for y in oracles.lower.values())
        optimizer = torchopt.sgd(RATE)
        memory = optimizer.init(points)
        for _ in range(self.num_steps):
            lower = dict(zip(oracles.lower, points, strict=True))
            loss = oracles.evaluate("lower", upper, lower).loss
            grads = torch.autograd.grad(loss, points, create_graph=True)
            updates, memory = optimizer.update(grads, memory, inplace=False)
            points = torchopt.apply_updates(points, updates, inplace=False)
        return _response(oracles, upper, points)


@final
@dataclass(frozen=True)
class TorchoptImplicit(Solver):
    """`torchopt.diff.implicit.custom_root` at the current lower variables, with conjugate gradients."""

    max_steps: int

    def num_lower_batches(self) -> int:
        return 1

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Any) -> Response:
        import torchopt

        names, upper = list(oracles.lower), oracles.upper

        def gradient(points: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            def loss(points: tuple[Tensor, ...]) -> Tensor:
                values = {f"lower.{n}": y for n, y in zip(names, points, strict=True)}
                values |= {f"upper.{n}": x for n, x in zip(upper, sources, strict=True)}
                given = "lower", oracles.lower_batches[0]
                value: Tensor = torch.func.functional_call(oracles.problem, values, given)
                return value

            found: tuple[Tensor, ...] = torch.func.grad(loss)(points)
            return found

        cg = torchopt.linear_solve.solve_cg(maxiter=self.max_steps, atol=0, rtol=1e-12)

        @torchopt.diff.implicit.custom_root(gradient, argnums=1, solve=cg)  # type: ignore[untyped-decorator]
        def solve(points: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return points

        start = tuple(y.detach().clone() for y in oracles.lower.values())
        return _response(oracles, upper, solve(start, tuple(upper.values())))


higher_5 = HigherUnrolled(5)
torchopt_5 = TorchoptUnrolled(5)
torchopt_cg = TorchoptImplicit(100)
