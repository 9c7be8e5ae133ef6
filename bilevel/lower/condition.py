r"""`Condition`: the derivatives, of any order, of a lower solution that somebody else has found.

The map $x \mapsto y^*(x)$ with $\partial_y G(x, y^*) = 0$ has, whoever found $y^*$, the derivative

$$ \Big(\frac{dy^*}{dx}\Big)^{\!\top} v = - \partial^2_{xy} G(x, y^*)\, w, \qquad
   \partial^2_{yy} G(x, y^*)\, w = v, $$

one linear system and one product for each backward pass. The backward pass is made of two functions
that have derivatives themselves: the product above, which autograd differentiates in $x$, $y^*$ and $w$,
and the solution of a linear system $w = H^{-\top} v$, whose derivatives are

$$ \bar v = H^{-1} \bar w, \qquad
   (\bar x, \bar y) = - \partial_{(x, y)} \big( \bar v^\top H(x, y)\, w \big)
   \;\text{at fixed}\; \bar v, w. $$

So gradients of gradients are right to any order: with $y$ held fixed in the Hessian they would lack the
terms with third derivatives of $G$.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.errors import HypergradientError, Result
from bilevel.linear import LinearSolver
from bilevel.linearization import Hessian, Linearization, refuse_asymmetric
from bilevel.losses.substitution import attentive
from bilevel.oracles import Oracles
from bilevel.tree import Layout, Tree, norm

_NAME = "best_response"


@final
@dataclass(frozen=True)
class Point:
    """The lower gradient at a point, with its graph."""

    gradient: list[Tensor]
    lower: list[Tensor]
    inputs: list[Tensor]
    layout: Layout
    symmetric: bool = True
    separate: int = 1

    @property
    def hessian(self) -> Hessian:
        return Hessian(
            self.gradient, self.lower, self.layout, self.separate, symmetric=self.symmetric
        )

    def pull(
        self, vector: Tensor, wrt: Sequence[Tensor], *, create_graph: bool = False
    ) -> list[Tensor | None]:
        """The vector times the derivative of the gradient."""
        found = [
            (g, c)
            for g, c in zip(self.gradient, self.layout.unravel(vector), strict=True)
            if g.requires_grad
        ]
        if not found or not wrt:
            return [None for _ in wrt]
        outputs, cotangents = zip(*found, strict=True)
        return list(
            torch.autograd.grad(
                outputs,
                list(wrt),
                cotangents,
                create_graph=create_graph,
                retain_graph=True,  # of tensors that the loss closes over
                allow_unused=True,
            )
        )


@final
class Condition:
    """The condition dG/dy = 0 as a function of everything in it that requires grad."""

    def __init__(self, oracles: Oracles, solver: LinearSolver, given: Tree) -> None:
        self._oracles = oracles
        self._solver = self._prepared = solver
        self._upper = given
        self._names = [name for name, x in given.items() if x.requires_grad]
        self._lower = list(oracles.lower)
        self.layout = Layout(list(oracles.lower.values()))
        parts, self._tree = optree.tree_flatten(oracles.lower_batches[0])
        self._batch: list[Any] = list(parts)
        self._places = [i for i, t in enumerate(parts) if isinstance(t, Tensor) and t.requires_grad]
        self._others = 0
        self.inputs = [given[name] for name in self._names] + [parts[i] for i in self._places]

    def begin(self, vector: Tensor) -> Point:
        """The point at which the solution was found; tensors that the loss closes over are noted."""
        point = self.point(vector, self.inputs)
        known = {id(t) for t in (*point.lower, *point.inputs)}
        others = [t for t in _leaves(point.gradient) if id(t) not in known]
        self._others = len(others)
        self.inputs += others
        if self._solver.needs_symmetry and not point.symmetric:
            field = self.layout.ravel([g.detach() for g in point.gradient])
            linear = Linearization(field, point.hessian, lambda v: {}, self.layout, norm([field]))
            name = type(self._oracles.problem).__name__
            refuse_asymmetric(linear, type(self._solver).__name__, name)
        lower = dict(zip(self._lower, self.layout.unravel(vector), strict=True))
        with torch.enable_grad():
            self._prepared = self._solver.prepared(self._oracles.at(self._upper, lower))
        return point

    def point(self, vector: Tensor, inputs: Sequence[Tensor], *, graph: bool = False) -> Point:
        """The lower gradient at y and these inputs.

        Args:
            vector: y.
            inputs: in the order of `self.inputs`.
            graph: let the result belong to the graphs of y and of the inputs.
        """
        split = len(inputs) - self._others
        replaced, others = [_apart(t, graph) for t in inputs[:split]], list(inputs[split:])
        upper = self._upper | dict(zip(self._names, replaced, strict=False))
        batch = list(self._batch)
        for i, tensor in zip(self._places, replaced[len(self._names) :], strict=True):
            batch[i] = tensor
        parts = [_apart(y, graph) for y in self.layout.unravel(vector)]
        lower = dict(zip(self._lower, parts, strict=True))
        here = self._oracles.on(None, [optree.tree_unflatten(self._tree, batch)])
        with attentive, here.differentiated_twice(_NAME), torch.enable_grad():
            grads = here.lower_gradient(upper, lower, create_graph=True)[1]
        gradient = fill(list(grads.values()), parts)
        problem = here.problem
        symmetric = not (problem.gives_lower_condition or problem.constrains_lower)
        inputs = replaced + others
        return Point(gradient, parts, inputs, self.layout, symmetric, problem.separate)

    def solve(self, point: Point, vector: Tensor, *, forward: bool = False) -> Tensor:
        """The solution w of H^T w = v, or of H w = v, which is the same for a loss."""
        matrix = point.hessian.transposed if forward else point.hessian
        solution = self._prepared.solve(matrix, vector.detach())
        if solution.result is not Result.SUCCESS:
            residual = solution.residual
            number = "" if residual is None else f" (relative residual {float(residual):.2e})"
            raise HypergradientError(
                f"`{self._solver}` did not succeed in the backward pass of `{_NAME}`{number}: "
                f"{solution.result.value}",
                solution,
            )
        return solution.value


def _apart(tensor: Tensor, graph: bool) -> Tensor:
    """The same numbers at another node: a derivative in it is a partial one."""
    if graph:
        with torch.enable_grad():
            return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _leaves(roots: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad in the graphs of tensors."""
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen, found = set(stack), []
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    return found


@final
class _Response(torch.autograd.Function):
    """y*, found already, as a function of the inputs."""

    @staticmethod
    def forward(ctx: Any, system: Condition, y: Tensor, *inputs: Tensor) -> Tensor:
        answer = y.clone()
        ctx.system = system
        ctx.save_for_backward(answer, *inputs)
        return answer

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        y, *inputs = ctx.saved_tensors
        system, graph = ctx.system, torch.is_grad_enabled()
        point = system.point(y, inputs, graph=graph)
        w = _solved(system, y, cotangent, inputs) if graph else system.solve(point, cotangent)
        return None, None, *point.pull(-w, point.inputs, create_graph=graph)


@final
class _Solve(torch.autograd.Function):
    """w = H(x, y)^-T v, a function of all three; with `forward`, H^-1 v."""

    @staticmethod
    def forward(
        ctx: Any, system: Condition, forward: bool, y: Tensor, v: Tensor, *inputs: Tensor
    ) -> Tensor:
        w = system.solve(system.point(y, inputs), v, forward=forward)
        ctx.system, ctx.forward_ = system, forward
        ctx.save_for_backward(y, w, *inputs)
        return w

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        y, w, *inputs = ctx.saved_tensors
        system, graph = ctx.system, torch.is_grad_enabled()
        s = _solved(system, y, cotangent, inputs, forward=not ctx.forward_)
        left, right = (s, w) if ctx.forward_ else (w, s)  # left^T H right is to be differentiated
        point = system.point(y, inputs, graph=graph)
        with torch.enable_grad():
            stretched = fill(point.pull(left, point.lower, create_graph=True), point.lower)
            total = (system.layout.ravel(stretched) * -right).sum()
        wrt = [*point.lower, *point.inputs]
        if not total.requires_grad:
            return None, None, None, s, *(None for _ in inputs)
        grads = torch.autograd.grad(
            total, wrt, create_graph=graph, retain_graph=True, allow_unused=True
        )
        here = system.layout.ravel(fill(grads[: len(point.lower)], point.lower))
        return None, None, here, s, *grads[len(point.lower) :]


def _solved(
    system: Condition, y: Tensor, v: Tensor, inputs: Sequence[Tensor], *, forward: bool = False
) -> Tensor:
    w: Tensor = _Solve.apply(system, forward, y, v, *inputs)  # type: ignore[no-untyped-call]
    return w


def responding(condition: Condition, y: Tensor) -> Tensor:
    """The solution y*, found already, as a function of the inputs."""
    answer: Tensor = _Response.apply(condition, y, *condition.inputs)  # type: ignore[no-untyped-call]
    return answer
