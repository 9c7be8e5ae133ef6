"""One unrolling of `Unrolled`: the steps of a twin, and their products in each mode."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.autodiff import vector_jacobian_product
from bilevel.compile import Stage
from bilevel.distributed import mean_over_ranks
from bilevel.oracles import Oracles, leaves
from bilevel.problem import Problem
from bilevel.solvers.base import Response, ResponseProduct
from bilevel.tree import Tree, norm
from bilevel.twins import (
    Gradients,
    RunningTwin,
    TransformationTwin,
    Twin,
    as_transformation,
    clip,
)

if TYPE_CHECKING:
    from bilevel.solvers.unrolled import Unrolled

_VERIFIED_STEPS = 3
# settings whose forward mode was compared with reverse mode, for each problem
_VERIFIED: WeakKeyDictionary[Problem, set[tuple[str, int]]] = WeakKeyDictionary()


@final
class Unrolling:
    """One unrolling: the iterates of a twin at the oracles' upper variables."""

    def __init__(
        self, settings: "Unrolled", oracles: Oracles, running: list[torch.optim.Optimizer]
    ) -> None:
        self.settings = settings
        self.oracles = oracles
        self.running = running
        self.upper = oracles.upper
        self.one_batch = len(oracles.lower_batches) == 1
        self.used: set[str] = (
            set()
        )  # variables that the lower loss uses; the optimizer skips others

    def run(self) -> Response:
        """Take the steps; the answer and its vector-Jacobian product."""
        if self.oracles.units.compiled:
            return self._unit_by_unit()
        steps, reverse = self.settings.num_steps, self.settings.mode == "reverse"
        first = steps - (self.settings.truncate or steps)
        lower = self.oracles.lower
        grads = self._gradients(self.upper, lower, 0, create_graph=reverse and first == 0)
        self.twin = self._make_twin(lower)
        self._held = self.twin.held()
        points = self.twin.pack(lower)
        state = self.twin.start(points)
        saved = []
        for t in range(steps):
            graph = reverse and t >= first
            if t <= first or not reverse:
                points = [p.detach().requires_grad_() for p in points]
                state = _map_moments(Tensor.detach, state)
            if t == first or (t > first and self.settings.mode == "recompute"):
                saved.append((t, points, state))
            if t > 0:
                at = self.twin.unpack(points)
                grads = self._gradients(self.upper, at, t, create_graph=graph)
            with torch.set_grad_enabled(graph):
                points, state = self.twin.step(points, self._clipped(grads), state)
        residual = norm([g.detach() for g in grads.values() if g is not None])
        if reverse:
            vjp = self._reverse(points)
        else:
            vjp = (self._recompute if self.settings.mode == "recompute" else self._forward)(saved)
        return Response(self.twin.unpack(points), vjp, residual)

    def _unit_by_unit(self) -> Response:
        """The same with every step a unit; reverse mode keeps what a step's adjoint needs of it."""
        units, mode = self.oracles.units, self.settings.mode
        first = self.settings.num_steps - (self.settings.truncate or self.settings.num_steps)
        lower = self.oracles.lower
        self.used = units.once("used", lambda: self._used(lower))
        self.twin = self._make_twin(lower)
        self._held = _live(self.twin.held())
        points = [p.detach() for p in self.twin.pack(lower)]
        state = _counted(self.twin.whole(points))
        saved: list[tuple[int, list[Tensor], Any]] = []
        stages: list[Stage] = []
        for t in range(self.settings.num_steps):
            if t == first or (t > first and mode == "recompute"):
                saved.append((t, points, state))
            if mode == "reverse" and t >= first:
                stages.append(self._stage(t, points, state))
                points, state, residual = stages[-1].early
            else:
                points, state, residual = self._unit("step", Unrolling._plain, t, points, state)
        answer = self.twin.unpack(points)
        if mode == "reverse":
            return Response(answer, lambda v: self._product(self._staged(stages, v)), residual)
        vjp = self._recompute if mode == "recompute" else self._forward
        return Response(answer, vjp(saved), residual)

    def _used(self, lower: Tree) -> set[str]:
        _, grads = self.oracles.lower_gradient(self.upper, lower, 0)
        return {name for name, g in grads.items() if g is not None}

    def _make_twin(self, lower: Tree) -> Twin:
        if self.settings.optimizer is not None:
            return TransformationTwin(as_transformation(self.settings.optimizer), lower, self.used)
        return RunningTwin(self.running, self.oracles.slots.variables("lower"), lower, self.used)

    def _gradients(self, upper: Tree, lower: Tree, t: int, *, create_graph: bool) -> Gradients:
        index = 0 if self.one_batch else t
        # variables that no optimizer moves are constants, yet must be differentiable like the rest;
        # each step at a leaf of its own: earlier steps' gradients depend on theirs
        lower = {n: y if y.requires_grad else y.detach().requires_grad_() for n, y in lower.items()}
        _, grads = self.oracles.lower_gradient(upper, lower, index, create_graph=create_graph)
        found = {name for name, g in grads.items() if g is not None}
        self.used = self.used or found
        if late := sorted(found - self.used):
            raise ValueError(
                f"`Unrolled`: the lower loss uses `{late[0]}` in a later unrolled step but not in the "
                "first; make the loss use the same variables in every step"
            )
        return grads

    def _step(
        self, upper: Tree, points: list[Tensor], state: Any, t: int, *, create_graph: bool
    ) -> tuple[list[Tensor], Any]:
        """A step that is differentiated in reverse (`create_graph`) or carries tangents."""
        grads = self._gradients(upper, self.twin.unpack(points), t, create_graph=create_graph)
        return self.twin.step(points, self._clipped(grads), state)

    def _clipped(self, gradients: Gradients) -> Gradients:
        most = self.settings.max_grad_norm
        return gradients if most is None else clip(gradients, most)

    def _reverse(self, points: list[Tensor]) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            upper, target = list(self.upper.values()), self.twin.pack(cotangent)
            product = vector_jacobian_product(points, upper, target)
            return self._product(product)

        return vjp

    def _recompute(
        self, saved: list[tuple[int, list[Tensor], Any]]
    ) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            return self._product(self._adjoint(saved, self.twin.pack(cotangent)))

        return vjp

    def _adjoint(
        self, saved: list[tuple[int, list[Tensor], Any]], adjoint: list[Tensor]
    ) -> list[Tensor]:
        """The product of the saved steps' transposed Jacobian in x with a vector of points."""
        total = [torch.zeros_like(x) for x in self.upper.values()]
        moments: list[Tensor] | None = None  # after the last step nothing depends on the state
        for t, points, state in reversed(saved):
            given = points, state, adjoint, moments, total
            adjoint, moments, total = self._unit("adjoint", Unrolling._pull_back, t, *given)
        return total

    def _pull_back(
        self,
        points: list[Tensor],
        state: Any,
        adjoint: list[Tensor],
        moments: list[Tensor] | None,
        total: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The adjoint of a step in (y, s), and in x added to those of later steps."""
        (_, after, _), rest = self._differentiable(points, state)
        if moments is None:
            moments = [torch.zeros_like(s) for s in _moments(after)]
        return rest(adjoint, moments, total)

    def _differentiable(
        self, points: list[Tensor], state: Any
    ) -> tuple[tuple[list[Tensor], Any, Tensor], Callable[..., Any]]:
        """A step and its adjoint; the step's graph ends with the call of it."""
        points = [p.detach().requires_grad_() for p in points]
        state = _map_moments(lambda s: s.detach().requires_grad_(), state)
        upper = list(self.upper.values())
        grads = self._gradients(self.upper, self.twin.unpack(points), 0, create_graph=True)
        after, next_state = self.twin.step(points, self._clipped(grads), state)
        outputs = [*after, *_moments(next_state)]
        inputs = [*upper, *points, *_moments(state)]

        def rest(adjoint: list[Tensor], moments: list[Tensor], total: list[Tensor]) -> Any:
            found = vector_jacobian_product(outputs, inputs, [*adjoint, *moments])
            of_x, of_y = found[: len(upper)], found[len(upper) : len(upper) + len(points)]
            total = [a + g for a, g in zip(total, of_x, strict=True)]
            return of_y, found[len(upper) + len(points) :], total

        residual = norm([g.detach() for g in grads.values() if g is not None])
        early = [p.detach() for p in after], _map_moments(Tensor.detach, next_state), residual
        return early, rest

    def _plain(self, points: list[Tensor], state: Any) -> tuple[list[Tensor], Any, Tensor]:
        """A step that is not differentiated."""
        points = [p.detach().requires_grad_() for p in points]
        grads = self._gradients(self.upper, self.twin.unpack(points), 0, create_graph=False)
        with torch.no_grad():
            after, state = self.twin.step(points, self._clipped(grads), state)
        return after, state, norm([g for g in grads.values() if g is not None])

    def _staged(self, stages: list[Stage], cotangent: Tree) -> list[Tensor]:
        """The product of all steps' transposed Jacobian in x with a cotangent."""
        total = [torch.zeros_like(x) for x in self.upper.values()]
        adjoint = self.twin.pack(cotangent)
        moments = [torch.zeros_like(s) for s in _moments(stages[-1].early[1])]
        for stage in reversed(stages):
            adjoint, moments, total = stage(adjoint, moments, total)
        return total

    # ------------------------------------------------------------------ units

    def _unit(self, name: str, piece: Callable[..., Any], t: int, *arguments: Any) -> Any:
        """`piece(self, *arguments)` at step t."""

        def function(batch: Any, upper: Tree, held: Any, *given: Any) -> Any:
            return piece(self._at(t, batch, upper, held), *given)

        key = name, *self._key()
        fixed = self._batch(t), self.upper, self._held
        return self.oracles.units.call(key, function, *fixed, *arguments)

    def _stage(self, t: int, points: list[Tensor], state: Any) -> Stage:
        """A step of which the adjoint is the rest."""

        def function(batch: Any, upper: Tree, held: Any, *given: Any) -> Any:
            return self._at(t, batch, upper, held)._differentiable(*given)

        fixed = self._batch(t), self.upper, self._held, points, state
        like = points, _moments(state), list(self.upper.values())
        return self.oracles.units.stage(("stage", *self._key()), function, fixed, like)

    def _key(self) -> tuple[Any, ...]:
        return self.settings, self.twin.key(), self.oracles.precision

    def _batch(self, t: int) -> Any:
        return self.oracles.lower_batches[0 if self.one_batch else t]

    def _at(self, t: int, batch: Any, upper: Tree, held: Any) -> "Unrolling":
        """The same at step t, with these tensors in the places of its own."""
        other = copy.copy(self)
        other.oracles = self.oracles.on(None, [batch], 0 if self.one_batch else t)
        other.upper, other.twin, other.one_batch = leaves(upper), self.twin.holding(held), True
        return other

    def _forward(
        self, saved: list[tuple[int, list[Tensor], Any]]
    ) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            target, last = self.twin.pack(cotangent), self.settings.num_steps
            # flat: `zeros_like` would take over the strides of a transposed variable
            product = {name: x.new_zeros(x.numel()) for name, x in self.upper.items()}
            self._verify(saved[0])
            for name, x in self.upper.items():
                for i in range(x.numel()):
                    direction = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
                    direction[i] = 1
                    tangents = self._tangents(saved[0], {name: direction.view(x.shape)}, last)
                    product[name][i] = _inner(tangents, target)
            return self._product([product[n].view(x.shape) for n, x in self.upper.items()])

        return vjp

    def _verify(self, saved: tuple[int, list[Tensor], Any]) -> None:
        """Compare forward mode with reverse mode, <v, J d> = <J^T v, d>, once per problem.

        torch has operations (and scripted and compiled modules have more) whose backward pass ignores
        tangents without a word. A few steps show that: in the first, x moves, in the next y and the
        optimizer's state.
        """
        done = _VERIFIED.setdefault(self.oracles.problem, set())
        key = repr(self.settings), len(self.upper)
        if key in done:
            return
        first, points, state = saved
        last = min(first + _VERIFIED_STEPS, self.settings.num_steps)
        generator = torch.Generator().manual_seed(0)
        target = [_random(p, generator) for p in points]
        steps = [saved]
        for t in range(first, last):
            points = [p.detach().requires_grad_() for p in points]
            after, state = self._step(self.upper, points, state, t, create_graph=False)
            points, state = [p.detach() for p in after], _map_moments(Tensor.detach, state)
            steps.append((t + 1, points, state))
        try:
            product = mean_over_ranks(self._adjoint(steps[:-1], target))  # as `_product` does
        except (NotImplementedError, RuntimeError):  # no second derivative in reverse mode
            return
        for (name, x), reverse in zip(self.upper.items(), product, strict=True):
            direction = _random(x, generator)
            tangents = mean_over_ranks(self._tangents(saved, {name: direction}, last))
            one, other = _inner(tangents, target), _inner([reverse], [direction])
            size = _inner([t.abs() for t in tangents], [v.abs() for v in target])
            size = size + _inner([reverse.abs()], [direction.abs()])
            if bool((one - other).abs() > size * self._precision() ** 0.4):
                raise ValueError(
                    f"`{self.settings}`: torch's forward mode gives another derivative of this lower "
                    f"loss in `{name}` than its reverse mode ({float(one):.3g} and {float(other):.3g} "
                    'along one direction); use `mode="recompute"`'
                )
        done.add(key)

    def _precision(self) -> float:
        dtypes = [v.dtype for v in (*self.upper.values(), *self.oracles.lower.values())]
        dtypes += [self.oracles.precision] if self.oracles.precision else []
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _tangents(
        self, saved: tuple[int, list[Tensor], Any], directions: Tree, last: int
    ) -> list[Tensor]:
        """d(points before step `last`) along directions of upper variables."""
        try:
            return self._push_forward(saved, directions, last)
        except (NotImplementedError, RuntimeError) as error:  # e.g. `F.mse_loss`
            raise RuntimeError(
                "torch cannot differentiate this lower loss in forward mode "
                f"({str(error).splitlines()[0]}); use `mode='recompute'`"
            ) from error

    def _push_forward(
        self, saved: tuple[int, list[Tensor], Any], directions: Tree, last: int
    ) -> list[Tensor]:
        first, points, state = saved
        tangents: list[Tensor | None] = [None] * (len(points) + len(_moments(state)))
        for t in range(first, last):
            given = points, state, tangents, directions
            points, state, tangents = self._unit("tangent", Unrolling._pushed, t, *given)
        final = zip(tangents, points, strict=False)
        return [torch.zeros_like(p) if d is None else d for d, p in final]

    def _pushed(
        self, points: list[Tensor], state: Any, tangents: list[Tensor | None], directions: Tree
    ) -> tuple[list[Tensor], Any, list[Tensor | None]]:
        """A step that carries tangents."""
        with forward_ad.dual_level():  # a level keeps its tangents, so one for each step
            upper = {
                n: _dual(x.detach().requires_grad_(), directions.get(n))
                for n, x in self.upper.items()
            }
            carried = iter(tangents)
            points = [_dual(p.detach().requires_grad_(), next(carried)) for p in points]
            duals = [_dual(s, next(carried)) for s in _moments(state)]
            state = _replace_moments(state, duals)
            # with its graph: torch's backward of a determinant (or a solve, a product) uses what
            # the forward pass saved, without tangents, unless it is to be differentiated itself
            points, state = self._step(upper, points, state, 0, create_graph=True)
            pairs = [forward_ad.unpack_dual(d) for d in (*points, *_moments(state))]
            tangents = [None if d is None else d.detach() for _, d in pairs]
            points = [p.detach() for p, _ in pairs[: len(points)]]
            state = _replace_moments(state, [p.detach() for p, _ in pairs[len(points) :]])
        return points, state, tangents

    def _product(self, product: list[Tensor]) -> ResponseProduct:
        steps = self.settings.truncate or self.settings.num_steps
        # the cotangents that the ranks sent back differ, their average is the adjoint
        product = mean_over_ranks(product)
        return ResponseProduct(dict(zip(self.upper, product, strict=True)), num_products=steps)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _dual(tensor: Tensor, tangent: Tensor | None) -> Tensor:
    dual: Tensor = tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
    return dual


def _is_moment(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _moments(state: Any) -> list[Tensor]:
    """The floating-point tensors of an optimizer state, in a fixed order."""
    leaves: list[Any] = optree.tree_leaves(state)
    return [leaf for leaf in leaves if _is_moment(leaf)]


def _map_moments(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return optree.tree_map(lambda s: function(s) if _is_moment(s) else s, state)


def _replace_moments(state: Any, moments: list[Tensor]) -> Any:
    new = iter(moments)
    return _map_moments(lambda _: next(new), state)


def _live(held: Any) -> Any:
    """Numbers that are not 0 as tensors: a graph reads them, so that they may move."""
    return optree.tree_map(
        lambda v: (
            torch.tensor(float(v), dtype=torch.double) if isinstance(v, (int, float)) and v else v
        ),
        held,
    )


def _counted(state: Any) -> Any:
    """Counts of steps as tensors."""
    return optree.tree_map(lambda v: torch.tensor(int(v)) if isinstance(v, float) else v, state)
