"""`TurnSteps`: the lower step, the upper step, and both at once, eager or compiled."""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar, final

import optree
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bilevel.choices import How, how_made
from bilevel.compile import CompiledStep
from bilevel.compile.cuda_graph import Capture, Recorder
from bilevel.distributed import rank, world_size
from bilevel.loop.beginning import begin_anew
from bilevel.loop.settings import TurnSettings
from bilevel.losses.hooks import accumulated, first_hook, hooked
from bilevel.losses.slots import Slots
from bilevel.lower.level import LowerLevel
from bilevel.lower_field import hold
from bilevel.optimizers import LevelUpdate
from bilevel.oracles import Oracles
from bilevel.problem import Level
from bilevel.solvers import Compiled, Hypergradient, Solver
from bilevel.state import State
from bilevel.tree import Tree, leaves, norm
from bilevel.twins import clip, move

_APART = 2**10  # seeds between two evaluations: one for each unrolled step

P = ParamSpec("P")
R = TypeVar("R")


@final
class LowerOutcome(NamedTuple):
    """What a lower step found: the loss before it, the norm of its gradient, what it logged."""

    loss: Tensor
    residual: Tensor | None
    logs: dict[str, Tensor]


@final
class TurnSteps:
    """The steps of a run: each reads its arguments and the run's state, and writes the state.

    Args:
        state: the run's state.
        solver: how the hypergradient is computed.
        settings: how the turns go.
        capture: records the steps, whatever the settings say; for a device without CUDA graphs.

    Attributes:
        lower: `(batch, watched) -> LowerOutcome`; `watched` asks for the norm of the gradient.
        upper: `(batch, lower_batches, solver_state) -> Hypergradient`.
        drawn: `(begun, solver_state)`: the end of a draw and the upper step, where there is one level.
        both: `(batch, watched)`: the upper step and the first lower step, where the losses share a
            computation.
    """

    def __init__(
        self,
        state: State,
        solver: Solver,
        settings: TurnSettings,
        *,
        capture: Capture | None = None,
    ) -> None:
        self._state = state
        self._settings = settings
        self._slots = Slots(state.problem)
        self._eager = _Eager(state, self._slots)
        how, self._capture = self._chosen(capture)
        self._makes = how is not None
        graph = _Graph(state, self._slots)
        made = graph if self._capture is None else _Recorded(state, self._slots)
        at_once = solver.drops_response or how is None
        compiled = Compiled(solver, how, capture=self._capture)
        self._said = compiled.said
        self._solver = solver if at_once else compiled
        self.lower = self._ready(partial(self._lower, self._eager), partial(self._lower, made))
        self.both = self._ready(
            partial(self._both, self._eager), partial(self._both, made), seeds=3
        )
        if at_once:
            self.upper = self._ready(partial(self._upper, self._eager), partial(self._upper, made))
            self.drawn = self._ready(partial(self._drawn, self._eager), partial(self._drawn, made))
        else:
            self._moved = self._ready(self._eager.move, made.move, seeds=0)
            self.upper = self._unit_by_unit

    def _chosen(self, capture: Capture | None) -> tuple[How | None, Capture | None]:
        """How the steps are made into graphs, and what records them."""
        device = self._state.problem.device
        how = how_made(self._settings.compile, device)
        if capture is None and how != "record":
            return how, None
        if world_size() == 1:
            return "record", capture or Recorder(device)
        if rank() == 0:
            warnings.warn(
                "the steps are not recorded and run as without `compile`: a CUDA graph holds no "
                'exchange between processes; `compile="inductor"` compiles them',
                RuntimeWarning,
                stacklevel=5,  # the caller of `train`
            )
        return None, None

    def _ready(
        self, step: Callable[P, R], traced: Callable[P, R], *, seeds: int = 1
    ) -> Callable[P, R]:
        """The step itself, recorded or compiled; `seeds` is how many it takes where it is neither."""
        if not self._makes:
            return step
        optimizers = [o for update in self._state.updates.values() for o in update.optimizers]
        made = CompiledStep(
            step,
            traced,
            self._state.problem,
            optimizers,
            cuda_graph=world_size() == 1,  # it holds no exchange between ranks
            said=self._said,
            capture=self._capture,
        )

        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._eager.using(seeds):
                return made(*args, **kwargs)

        return counted

    def begin(self, seed: int) -> None:
        """Seed what the losses of a turn draw."""
        self._eager.begin(seed)

    @property
    def coming_seed(self) -> int:
        """The seed of the next evaluation; in a compiled step nothing is drawn."""
        return self._eager.coming

    def _both(
        self, writes: "_Writes", batch: Any, watched: bool
    ) -> tuple[Hypergradient, LowerOutcome]:
        """The upper step and the first lower step; what both losses compute alike, once."""
        oracles = self._oracles(writes, batch, [])
        lower = oracles.lower
        with torch.enable_grad():
            common, buffers = oracles.share(oracles.upper, lower)
        self._slots.commit(buffers)
        constant = optree.tree_map(_detached, common)
        hypergradient = self._upper(writes, constant, [None], None)
        return hypergradient, self._lower(writes, common, watched, lower)

    def _lower(
        self, writes: "_Writes", batch: Any, watched: bool, lower: Tree | None = None
    ) -> LowerOutcome:
        """A step from `lower`, leaves that the batch may depend on (the current ones by default)."""
        oracles = self._oracles(writes, None, [batch])
        lower = oracles.lower if lower is None else lower
        constants = {name: x.detach() for name, x in oracles.upper.items()}
        with torch.enable_grad():  # the caller may iterate under `torch.no_grad()`
            evaluation, grads = oracles.lower_gradient(constants, lower)
        residual = norm([g for g in grads.values() if g is not None]) if watched else None
        writes.move_lower(grads)
        self._slots.commit(evaluation.buffers)
        return LowerOutcome(evaluation.loss.detach(), residual, evaluation.logs)

    def begin_anew(self) -> None:
        """Put the lower variables where a turn begins, if it is not where the last one ended."""
        begin_anew(self._state, self._slots)

    def solve_lower(self, batch: Any) -> LowerOutcome:
        """Put the answer of the lower solver into the lower variables."""
        oracles = self._oracles(self._eager, None, [batch])
        level = LowerLevel(oracles)
        solve = self._settings.lower_solver
        with torch.enable_grad():
            solution = level.tree(solve(level) if solve is not None else level.start)
            constants = {name: x.detach() for name, x in oracles.upper.items()}
            evaluation, grads = oracles.lower_gradient(constants, leaves(solution))
        with torch.no_grad():
            for name, y in self._slots.variables("lower").items():
                y.copy_(solution[name])
        self._slots.commit(evaluation.buffers)
        residual = norm([g for g in grads.values() if g is not None])
        return LowerOutcome(evaluation.loss.detach(), residual, evaluation.logs)

    def _upper(
        self, writes: "_Writes", batch: Any, lower_batches: list[Any], solver_state: Any
    ) -> Hypergradient:
        hypergradient = self._solved(writes, batch, lower_batches, solver_state)
        writes.move(hypergradient.grad, hypergradient.lower_grad, hypergradient.buffers)
        return hypergradient

    def _drawn(self, writes: "_Writes", begun: Any, solver_state: Any) -> Hypergradient:
        with torch.no_grad():
            batch = self._state.problem.finish_draw(begun)
        return self._upper(writes, batch, [None], solver_state)

    def rehearsed(self, begun: Any) -> Any:
        """The batch of a draw, finished without a trace."""
        before = {name: buffer.clone() for name, buffer in self._slots.buffers().items()}
        with torch.no_grad():
            batch = self._state.problem.finish_draw(begun)
        self._slots.commit(before)
        return batch

    def _unit_by_unit(
        self, batch: Any, lower_batches: list[Any], solver_state: Any
    ) -> Hypergradient:
        """An upper step whose solver repeats compiled pieces of work in a loop of its own."""
        hypergradient = self._solved(self._eager, batch, lower_batches, solver_state)
        self._moved(hypergradient.grad, hypergradient.lower_grad, hypergradient.buffers)
        return hypergradient

    def _solved(
        self, writes: "_Writes", batch: Any, lower_batches: list[Any], solver_state: Any
    ) -> Hypergradient:
        return self._solver.solve(
            self._oracles(writes, batch, lower_batches),
            state=solver_state,
            lower_optimizer=self._state.updates["lower"].optimizers or None,
            throw=self._settings.throw,
        )

    def _oracles(self, writes: "_Writes", upper_batch: Any, lower_batches: list[Any]) -> Oracles:
        return Oracles(
            self._state.problem,
            upper_batch,
            lower_batches,
            seed=writes.seed(),
            slots=self._slots,
            precision=self._settings.precision,
        )


class _Writes(ABC):
    """How a step moves the variables.

    Args:
        state: the run's state.
        slots: where the modules hold the variables.
    """

    def __init__(self, state: State, slots: Slots) -> None:
        self._updates = state.updates
        self._slots = slots
        self._problem = state.problem

    @abstractmethod
    def seed(self) -> int | None:
        """The seed of what the next losses draw."""

    @abstractmethod
    def apply(self, level: Level, grads: Mapping[str, Tensor | None]) -> None:
        """Let a level's optimizers step with these gradients."""

    @abstractmethod
    def own(self, level: Level, grads: Tree) -> Tree:
        """Gradients of a record of the caller's, as `apply` may be given them."""

    @final
    def move_lower(self, grads: Mapping[str, Tensor | None]) -> None:
        """A lower step, which ends where the constraints allow."""
        self.apply("lower", grads)
        if self._problem.constrains_lower:
            hold(Oracles(self._problem, None, [None], seed=None, slots=self._slots))

    @final
    def move(self, upper: Tree, lower: Tree | None, buffers: Tree) -> None:
        """An upper step, and a lower one if there is a direction, with gradients of a record."""
        if lower is not None:
            moved = self.own("lower", lower)
            self.move_lower({name: moved.get(name) for name in self._slots.variables("lower")})
        self.apply("upper", self.own("upper", upper))
        self._slots.commit(buffers)


@final
class _Eager(_Writes):
    """By the optimizers themselves."""

    coming = 0  # the seed that is given next

    def begin(self, seed: int) -> None:
        """Seed what the losses of a turn draw."""
        self.coming = seed

    def seed(self) -> int:
        given, self.coming = self.coming, self.coming + _APART
        return given

    @contextlib.contextmanager
    def using(self, seeds: int) -> Iterator[None]:
        """Use so many seeds inside, also where a graph draws nothing: others draw as ever."""
        after = self.coming + seeds * _APART
        yield
        self.coming = after

    def apply(self, level: Level, grads: Mapping[str, Tensor | None]) -> None:
        _step(self._updates[level], self._slots.variables(level), grads)

    def own(self, level: Level, grads: Tree) -> Tree:
        update = self._updates[level]
        fused = all(o.defaults.get("fused") for o in update.optimizers)
        if update.max_norm is not None or not fused:  # clipping and some optimizers write into them
            grads = {name: g.clone() for name, g in grads.items()}
        return grads


@final
class _Graph(_Writes):
    """By the optimizers' twins: a graph cannot call `optimizer.step()`, and draws nothing."""

    def seed(self) -> int:
        return 0

    def apply(self, level: Level, grads: Mapping[str, Tensor | None]) -> None:
        update, parameters = self._updates[level], self._slots.variables(level)
        _refuse_hooks(parameters)
        gradients = grads if update.max_norm is None else clip(grads, update.max_norm)
        with torch.no_grad():
            move(update.optimizers, parameters, gradients)

    def own(self, level: Level, grads: Tree) -> Tree:
        return grads


@final
class _Recorded(_Writes):
    """By the optimizers themselves, where a CUDA graph is recorded."""

    def seed(self) -> None:
        return None

    def apply(self, level: Level, grads: Mapping[str, Tensor | None]) -> None:
        parameters = self._slots.variables(level)
        _refuse_hooks(parameters)
        _step(self._updates[level], parameters, grads)

    def own(self, level: Level, grads: Tree) -> Tree:
        return {name: g.clone() for name, g in grads.items()}


def _step(update: LevelUpdate, parameters: Tree, grads: Mapping[str, Tensor | None]) -> None:
    """Let a level's optimizers step with these gradients."""
    for name, parameter in parameters.items():
        parameter.grad = _laid_out(hooked(parameter, grads[name]), parameter)
        accumulated(parameter)
    if update.max_norm is not None:
        clip_grad_norm_(parameters.values(), update.max_norm)
    for optimizer in update.optimizers:
        optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None


def _refuse_hooks(parameters: Tree) -> None:
    if (found := first_hook(parameters)) is not None:
        raise TypeError(f"`{found[0]}` has a hook (`{found[1]}`), which a graph cannot call")


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient in its parameter's memory format.

    `.backward()` sees to that, `autograd.grad` does not, and fused optimizers pair the numbers of
    the two tensors as they lie in memory.
    """
    if gradient is None or gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)
