"""`TurnSteps`: the lower step, the upper step, and both at once, eager or compiled."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar, final

import optree
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bilevel.compile import Compiled, is_tracing
from bilevel.distributed import world_size
from bilevel.loop.settings import TurnSettings
from bilevel.losses.hooks import accumulated, first_hook, hooked
from bilevel.losses.slots import Slots
from bilevel.oracles import Oracles
from bilevel.problem import Level
from bilevel.solvers import Hypergradient, Solver
from bilevel.state import State
from bilevel.tree import Tree, norm
from bilevel.twins import RunningTwin, clip

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

    Attributes:
        lower: `(batch, watched) -> LowerOutcome`; `watched` asks for the norm of the gradient.
        upper: `(batch, lower_batches, solver_state) -> Hypergradient`.
        both: `(batch, watched)`: the upper step and the first lower step, where the losses share a
            computation.
    """

    def __init__(self, state: State, solver: Solver, settings: TurnSettings) -> None:
        self._state = state
        self._solver = solver
        self._settings = settings
        self._slots = Slots(state.problem)
        self._fused = all(o.defaults.get("fused") for o in state.updates["upper"].optimizers)
        self._said: set[str] = set()
        self.lower = self._ready(self._lower)
        self.upper = self._ready(self._upper)
        self.both = self._ready(self._both)

    def _ready(self, step: Callable[P, R]) -> Callable[P, R]:
        """The step itself, or compiled."""
        if not self._settings.compile:
            return step
        optimizers = [o for update in self._state.updates.values() for o in update.optimizers]
        alone = world_size() == 1  # a CUDA graph holds no exchange between ranks
        return Compiled(step, self._state.problem, optimizers, cuda_graph=alone, said=self._said)

    def begin(self, seed: int) -> None:
        """Seed what the losses of a turn draw."""
        self._seeds = itertools.count(seed, 2**10)

    def _both(self, batch: Any, watched: bool) -> tuple[Hypergradient, LowerOutcome]:
        """The upper step and the first lower step; what both losses compute alike, once."""
        oracles = self._oracles(batch, [])
        lower = oracles.lower
        with torch.enable_grad():
            common, buffers = oracles.share(oracles.upper, lower)
        self._slots.commit(buffers)
        constant = optree.tree_map(_detached, common)
        hypergradient = self._upper(constant, [None], None)
        return hypergradient, self._lower(common, watched, lower)

    def _lower(self, batch: Any, watched: bool, lower: Tree | None = None) -> LowerOutcome:
        """A step from `lower`, leaves that the batch may depend on (the current ones by default)."""
        oracles = self._oracles(None, [batch])
        lower = oracles.lower if lower is None else lower
        constants = {name: x.detach() for name, x in oracles.upper.items()}
        with torch.enable_grad():  # the caller may iterate under `torch.no_grad()`
            evaluation, grads = oracles.lower_gradient(constants, lower)
        residual = norm([g for g in grads.values() if g is not None]) if watched else None
        self._apply("lower", grads)
        self._slots.commit(evaluation.buffers)
        return LowerOutcome(evaluation.loss.detach(), residual, evaluation.logs)

    def _upper(self, batch: Any, lower_batches: list[Any], solver_state: Any) -> Hypergradient:
        hypergradient = self._solver.solve(
            self._oracles(batch, lower_batches),
            state=solver_state,
            lower_optimizer=self._state.updates["lower"].optimizers or None,
            throw=self._settings.throw,
        )
        grads = hypergradient.grad
        if self._state.updates["upper"].max_norm is not None or not self._fused:
            # copies: clipping and some optimizers write into the gradients, the record is the caller's
            grads = {name: g.clone() for name, g in grads.items()}
        self._apply("upper", grads)
        self._slots.commit(hypergradient.buffers)
        return hypergradient

    def _oracles(self, upper_batch: Any, lower_batches: list[Any]) -> Oracles:
        seed = 0 if is_tracing() else next(self._seeds)  # a graph holds no random numbers
        return Oracles(
            self._state.problem,
            upper_batch,
            lower_batches,
            seed=seed,
            slots=self._slots,
            precision=self._settings.precision,
        )

    def _apply(self, level: Level, grads: Mapping[str, Tensor | None]) -> None:
        """Let a level's optimizers step with these gradients."""
        update, parameters = self._state.updates[level], self._slots.variables(level)
        if is_tracing():
            _apply_traced(update.optimizers, parameters, grads, update.max_norm)
            return
        for name, parameter in parameters.items():
            parameter.grad = _laid_out(hooked(parameter, grads[name]), parameter)
            accumulated(parameter)
        if update.max_norm is not None:
            clip_grad_norm_(parameters.values(), update.max_norm)
        for optimizer in update.optimizers:
            optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None


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


def _apply_traced(
    optimizers: Iterable[torch.optim.Optimizer],
    parameters: Tree,
    grads: Mapping[str, Tensor | None],
    max_norm: float | None,
) -> None:
    """What `_apply` does, by the optimizers' twins: a graph cannot call `optimizer.step()`."""
    if (found := first_hook(parameters)) is not None:
        raise TypeError(f"`{found[0]}` has a hook (`{found[1]}`), which a graph cannot call")
    gradients = clip(grads, max_norm) if max_norm is not None else dict(grads)
    used = {name for name, g in grads.items() if g is not None}
    tree = {name: p.detach() for name, p in parameters.items()}
    twin = RunningTwin(list(optimizers), parameters, tree, used)
    points = twin.pack(tree)
    with torch.no_grad():
        twin.write(*twin.step(points, gradients, twin.start(points)))
