"""One unrolling of `Unrolled`: the steps of a twin, and their products in each mode."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel.autodiff import vector_jacobian_product
from bilevel.compile import Stage
from bilevel.distributed import mean_over_ranks
from bilevel.losses.initial import initial_lower
from bilevel.oracles import Oracles
from bilevel.solvers.base import AtOnce, Response, ResponseProduct
from bilevel.solvers.segments import checkpointed
from bilevel.solvers.tangents import tangent_product
from bilevel.tree import Tree, leaves, norm
from bilevel.twins import (
    Gradients,
    RunningTwin,
    TransformationTwin,
    Twin,
    as_transformation,
    clip,
    made_at,
    makes_transformation,
)
from bilevel.twins.moments import count_tensors, live, map_moments, moments_of

if TYPE_CHECKING:
    from bilevel.solvers.unrolled import Unrolled


@final
class Unrolling:
    """One unrolling: the iterates of a twin at the oracles' upper variables."""

    def __init__(
        self,
        settings: "Unrolled",
        oracles: Oracles,
        running: list[torch.optim.Optimizer],
        lower: Tree | None = None,
    ) -> None:
        self.settings = settings
        self.oracles = oracles
        self.running = running
        self.upper = oracles.upper
        self.first = settings.num_steps - (settings.truncate or settings.num_steps)
        made = initial_lower(oracles, self.upper) if lower is None else {}
        self.made = {} if self.first else made  # before a truncation nothing is differentiated
        self.lower = leaves({**oracles.lower, **made, **(lower or {})})
        self.compiled = oracles.units.compiled
        self.one_batch = len(oracles.lower_batches) == 1
        self._ready: tuple[Any, Any] | None = None
        self.used: set[str] = (
            set()
        )  # variables that the lower loss uses; the optimizer skips others

    def run(self) -> Response:
        """Take the steps; the answer and its vector-Jacobian product."""
        if self.settings.mode in ("checkpoint", "mixed"):
            return checkpointed(self)
        if self.made and self.settings.mode == "reverse" and not self.compiled:
            return checkpointed(self, once=True)
        return self._unit_by_unit() if self.compiled else self._in_one_go()

    def _in_one_go(self, begun: tuple[Twin, Any] | None = None) -> Response:
        """The same; from a twin and its state, if they are known already."""
        steps, reverse = self.settings.num_steps, self.settings.mode == "reverse"
        first = self.first
        lower = self.lower
        grads = self.gradients(self.upper, lower, 0, create_graph=reverse and first == 0)
        self.twin = self._make_twin(lower) if begun is None else begun[0]
        self._held = self.twin.held()
        points = self.twin.pack(lower)
        state = self.twin.start(points) if begun is None else begun[1]
        saved = []
        for t in range(steps):
            graph = reverse and t >= first
            if t <= first or not reverse:
                points = [p.detach().requires_grad_() for p in points]
                state = map_moments(Tensor.detach, state)
            if t == first or (t > first and self.settings.mode == "recompute"):
                saved.append((t, points, state))
            if t > 0:
                at = self.twin.unpack(points)
                grads = self.gradients(self.upper, at, t, create_graph=graph)
            with torch.set_grad_enabled(graph):
                points, state = self.moved(points, state, grads)
        residual = norm([g.detach() for g in grads.values() if g is not None])
        if reverse:
            vjp = self._reverse(points)
        elif self.settings.mode == "recompute":
            vjp = self._recompute(saved)
        else:
            vjp = tangent_product(self, saved[0])
        return Response(self.twin.unpack(points), vjp, residual)

    def _unit_by_unit(self) -> Response:
        """The same with every step a unit; reverse mode keeps what a step's adjoint needs of it."""
        mode, first = self.settings.mode, self.first
        points, state = self.prepared()
        if not self.staged and mode == "reverse":
            mode = "recompute"
        saved: list[tuple[int, list[Tensor], Any]] = []
        stages: list[Stage] = []
        for t in range(self.settings.num_steps):
            if t == first or (t > first and mode == "recompute"):
                saved.append((t, points, state))
            if mode != "reverse" or t < first:
                points, state, residual = self.unit("step", Unrolling.plain, t, points, state)
            elif stages and self.one_batch:
                stages.append(stages[-1].follow())
            elif stages:
                stages.append(self.stage(t, *stages[-1].early[:2]))
            else:
                stages.append(self.stage(t, points, state))
        if stages:
            points, _, residual = stages[-1].early
        answer = self.twin.unpack(points)
        if stages:
            return Response(answer, lambda v: self.product(*self._staged(stages, v)), residual)
        vjp = self._recompute(saved) if mode == "recompute" else tangent_product(self, saved[0])
        return Response(answer, vjp, residual)

    def prepared(self) -> tuple[list[Tensor], Any]:
        """Make the twin; the points and the state before the first step, without a graph."""
        units, lower = self.oracles.units, self.lower
        self.used = units.once(
            "used", lambda: self._used(lower), units.ready(self.oracles.lower_batches[0])
        )
        self.twin = self._make_twin(lower)
        held, points = self.twin.held(), [p.detach() for p in self.twin.pack(lower)]
        whole = self.twin.whole(points)
        # a stage has to know what comes after it
        self.staged = self.compiled and whole is not None
        if not self.compiled:
            self._held = held
            return points, map_moments(Tensor.detach, self.twin.start(points))
        self._held = live(held)
        return points, count_tensors(self.twin.start(points) if whole is None else whole)

    def at_once(self) -> AtOnce:
        """All steps and the way back as one piece of work."""
        _, state = self.prepared()

        def respond(oracles: Oracles, given: Any, sure: list[Tensor]) -> Response:
            held, state = given
            other = Unrolling(self.settings, oracles, [])
            other.used = self.used
            return other._in_one_go((self.twin.holding(held), state))

        return AtOnce(self._key(), (self._held, state), respond)

    def afresh(self) -> "Unrolling":
        """The same with a graph of its own where settings are learned."""
        other = copy.copy(self)
        other.twin = self.twin.reading(self.upper)
        return other

    def _used(self, lower: Tree) -> set[str]:
        _, grads = self.oracles.lower_gradient(self.upper, lower, 0)
        return {name for name, g in grads.items() if g is not None}

    def _make_twin(self, lower: Tree) -> Twin:
        given, slots = self.settings.optimizer, self.oracles.slots
        if given is None:
            levels = slots.variables("lower"), slots.variables("upper")
            twin = RunningTwin(self.running, levels[0], lower, self.used, levels[1])
            return twin.reading(self.upper)
        make = given if makes_transformation(given) else None
        now = made_at(make, self.upper) if make else as_transformation(given)
        return TransformationTwin(now, lower, self.used, make)

    def gradients(self, upper: Tree, lower: Tree, t: int, *, create_graph: bool) -> Gradients:
        """The lower gradient at step t, `None` for variables that the loss does not use."""
        index = 0 if self.one_batch else t
        # variables that no optimizer moves are constants, yet must be differentiable like the rest;
        # each step at a leaf of its own: earlier steps' gradients depend on theirs
        lower = {n: y if y.requires_grad else y.detach().requires_grad_() for n, y in lower.items()}
        _, grads = self.oracles.lower_gradient(upper, lower, index, create_graph=create_graph)
        self.used = self.used or {name for name, g in grads.items() if g is not None}
        if late := [name for name, g in grads.items() if g is not None and name not in self.used]:
            raise ValueError(
                f"`Unrolled`: the lower loss uses `{min(late)}` in a later unrolled step but not in the "
                "first; make the loss use the same variables in every step"
            )
        return grads

    def step(
        self, upper: Tree, points: list[Tensor], state: Any, t: int, *, create_graph: bool
    ) -> tuple[list[Tensor], Any]:
        """A step that is differentiated in reverse (`create_graph`) or carries tangents."""
        grads = self.gradients(upper, self.twin.unpack(points), t, create_graph=create_graph)
        return self.moved(points, state, grads, upper)

    def taken(
        self, points: list[Tensor], state: Any, t: int
    ) -> tuple[list[Tensor], Any, Gradients]:
        """A step that is differentiated in reverse, and the gradient it was given."""
        grads = self.gradients(self.upper, self.twin.unpack(points), t, create_graph=True)
        return *self.moved(points, state, grads), grads

    def moved(
        self, points: list[Tensor], state: Any, gradients: Gradients, upper: Tree | None = None
    ) -> tuple[list[Tensor], Any]:
        """What the optimizer makes of a gradient, put back into the constraints if there are any."""
        twin = self.twin if upper is None else self.twin.reading(upper)
        points, state = twin.step(points, self._clipped(gradients), state)
        if self.oracles.problem.constrains_lower:
            lower = twin.unpack(points)
            constraints = self.oracles.constraints(self.upper if upper is None else upper, lower)
            points = twin.pack({**lower, **constraints.projected(lower)})
        return points, state

    def _clipped(self, gradients: Gradients) -> Gradients:
        most = self.settings.max_grad_norm
        return gradients if most is None else clip(gradients, most)

    def _reverse(self, points: list[Tensor]) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            upper, target = list(self.upper.values()), self.twin.pack(cotangent)
            product = vector_jacobian_product(points, upper, target)
            return self.product(product)

        return vjp

    def _recompute(
        self, saved: list[tuple[int, list[Tensor], Any]]
    ) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            return self.product(*self.adjoint(saved, self.twin.pack(cotangent)))

        return vjp

    def adjoint(
        self, saved: Sequence[tuple[int, list[Tensor], Any]], adjoint: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The products of the saved steps' transposed Jacobian, in x and in the first points."""
        total = [torch.zeros_like(x) for x in self.upper.values()]
        moments: list[Tensor] | None = None  # after the last step nothing depends on the state
        for t, points, state in reversed(saved):
            given = points, state, adjoint, moments, total
            adjoint, moments, total = self.unit("adjoint", Unrolling.pull_back, t, *given)
        return total, adjoint

    def pull_back(
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
            moments = [torch.zeros_like(s) for s in moments_of(after)]
        back: tuple[list[Tensor], list[Tensor], list[Tensor]] = rest(adjoint, moments, total)
        return back

    def _differentiable(
        self, points: list[Tensor], state: Any
    ) -> tuple[tuple[list[Tensor], Any, Tensor], Callable[..., Any]]:
        """A step and its adjoint; the step's graph ends with the call of it."""
        points = [p.detach().requires_grad_() for p in points]
        state = map_moments(lambda s: s.detach().requires_grad_(), state)
        upper = list(self.upper.values())
        after, next_state, grads = self.taken(points, state, 0)
        outputs = [*after, *moments_of(next_state)]
        inputs = [*upper, *points, *moments_of(state)]

        def rest(adjoint: list[Tensor], moments: list[Tensor], total: list[Tensor]) -> Any:
            found = vector_jacobian_product(outputs, inputs, [*adjoint, *moments])
            of_x, of_y = found[: len(upper)], found[len(upper) : len(upper) + len(points)]
            total = [a + g for a, g in zip(total, of_x, strict=True)]
            return of_y, found[len(upper) + len(points) :], total

        residual = norm([g.detach() for g in grads.values() if g is not None])
        early = [p.detach() for p in after], map_moments(Tensor.detach, next_state), residual
        return early, rest

    def plain(self, points: list[Tensor], state: Any) -> tuple[list[Tensor], Any, Tensor]:
        """A step that is not differentiated."""
        return self.felt(points, state)[:3]

    def felt(self, points: list[Tensor], state: Any) -> tuple[list[Tensor], Any, Tensor, Gradients]:
        """The same, with the gradient it was given."""
        points = [p.detach().requires_grad_() for p in points]
        grads = self.gradients(self.upper, self.twin.unpack(points), 0, create_graph=False)
        with torch.no_grad():
            after, state = self.moved(points, state, grads)
        return after, state, norm([g for g in grads.values() if g is not None]), grads

    def _staged(self, stages: list[Stage], cotangent: Tree) -> tuple[list[Tensor], list[Tensor]]:
        """The products of all steps' transposed Jacobian, in x and in the first points."""
        total = [torch.zeros_like(x) for x in self.upper.values()]
        adjoint = self.twin.pack(cotangent)
        moments = [torch.zeros_like(s) for s in moments_of(stages[-1].early[1])]
        for stage in reversed(stages):
            adjoint, moments, total = stage(adjoint, moments, total)
        return total, adjoint

    # ------------------------------------------------------------------ units

    def unit(self, name: str, piece: Callable[..., Any], t: int, *arguments: Any) -> Any:
        """`piece(self, *arguments)` at step t, as the units run it."""

        def function(batch: Any, upper: Tree, held: Any, *given: Any) -> Any:
            return piece(self._at(t, batch, upper, held), *given)

        key = name, *self._key()
        more = map(self.oracles.units.ready, arguments)
        return self.oracles.units.call(key, function, *self._fixed(t), *more)

    def stage(self, t: int, points: list[Tensor], state: Any) -> Stage:
        """A step of which the adjoint is the rest."""

        def function(batch: Any, upper: Tree, held: Any, *given: Any) -> Any:
            return self._at(t, batch, upper, held)._differentiable(*given)

        ready = self.oracles.units.ready
        fixed = *self._fixed(t), ready(points), ready(state)
        like = points, moments_of(state), list(self.upper.values())
        return self.oracles.units.stage(("stage", *self._key()), function, fixed, like)

    def _key(self) -> tuple[Any, ...]:
        # the transformation by itself, too: what its functions close over is compared
        return self.settings, self.settings.optimizer, self.twin.key(), self.oracles.precision

    def _fixed(self, t: int) -> tuple[Any, Any, Any]:
        """What a step reads besides points and state: its batch, x, and what the twin holds."""
        if self._ready is None:
            ready = self.oracles.units.ready
            self._ready = ready(self.upper), ready(self._held)
            self._batches = [ready(batch) for batch in self.oracles.lower_batches]
        return self._batches[0 if self.one_batch else t], *self._ready

    def _at(self, t: int, batch: Any, upper: Tree, held: Any) -> "Unrolling":
        """The same at step t, with these tensors in the places of its own."""
        other = copy.copy(self)
        other.oracles = self.oracles.on(None, [batch], 0 if self.one_batch else t)
        other.upper, other.one_batch = leaves(upper), True
        other.twin = self.twin.holding(held).reading(other.upper)
        other._ready = None
        return other

    def path(self) -> list[tuple[int, list[Tensor], Any]]:
        """The points and states before every step and after the last, none differentiated."""
        found = [(0, *self.prepared())]
        self.residuals: list[Tensor] = []  # norms of the lower gradient before every step
        for t in range(self.settings.num_steps):
            _, points, state = found[-1]
            after, state, residual = self.unit("step", Unrolling.plain, t, points, state)
            found.append((t + 1, after, state))
            self.residuals.append(residual)
        return found

    def through_start(self, product: list[Tensor], adjoint: list[Tensor]) -> list[Tensor]:
        """The product with what comes through initial values that are made of the upper variables.

        Raises:
            ValueError: if one of them is never moved.
        """
        if not self.made:
            return product
        if still := sorted(self.made.keys() - set(self.twin.moves())):
            raise ValueError(
                f"`initial_lower` gives `{still[0]}`, which the lower steps do not move (the lower loss "
                "does not use it, or no optimizer holds it); what never moves belongs to the upper level"
            )
        slopes = self.twin.unpack(adjoint)
        more = vector_jacobian_product(
            list(self.made.values()), list(self.upper.values()), [slopes[n] for n in self.made]
        )
        return [a + b for a, b in zip(product, more, strict=True)]

    def product(
        self,
        product: list[Tensor],
        adjoint: list[Tensor] | None = None,
        steps: int | None = None,
    ) -> ResponseProduct:
        """The record of a product through so many steps, averaged over the ranks."""
        product = product if adjoint is None else self.through_start(product, adjoint)
        steps = steps or self.settings.truncate or self.settings.num_steps
        # the cotangents that the ranks sent back differ, their average is the adjoint
        product = mean_over_ranks(product)
        return ResponseProduct(dict(zip(self.upper, product, strict=True)), num_products=steps)
