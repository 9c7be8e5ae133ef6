"""`Turn`: one turn of the training loop - the lower steps and the upper step, eager or compiled."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bilevel.compile.compiled import Compiled
from bilevel.compile.tracing import tracing
from bilevel.distributed import rank, world_size
from bilevel.hooks import accumulated, first_hook, hooked
from bilevel.oracles import Oracles, usable_precision
from bilevel.problem import Level
from bilevel.purity import examine, refuse_shared_upper
from bilevel.references import refuse_graphs
from bilevel.remarks import remark
from bilevel.solvers import Alternating, Hypergradient, Solver
from bilevel.state import State
from bilevel.tree import Tree, norm
from bilevel.twins import RunningTwin, clip
from bilevel.wiring import Wiring


class Term(NamedTuple):
    """A number that is watched in training: its name, and whether a loss logged it."""

    name: str
    logged: bool = False


class LowerOutcome(NamedTuple):
    """What a lower step found: the loss before it, the norm of its gradient, what it logged."""

    loss: Tensor
    residual: Tensor | None
    logs: dict[str, Tensor]


@dataclass
class Turn:
    """What the loop repeats: draw a batch, move the lower variables, move the upper ones.

    Attributes:
        lower_loss: the lower loss before the last lower step.
        lower_residual: the norm of its gradient.
        logs: what it logged.
    """

    state: State
    solver: Solver
    lower_steps: int
    upper_first: bool
    clip_upper: float | None
    clip_lower: float | None
    throw: bool
    compile: bool = False
    precision: torch.dtype | None = None
    lower_loss: Tensor | None = None
    lower_residual: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usable_precision(self.precision)
        self._one_source = "upper_data" not in self.state.sources
        self._wiring = Wiring(self.state.problem)
        self._remarked = False
        self._move_lower, self._move_upper = self._lower_step, self._upper_step
        self._move_both = self._both_steps
        self._fused = all(o.defaults.get("fused") for o in self.state.optimizers["upper"])
        if self.compile:
            said: set[str] = set()
            self._move_lower = Compiled(self._lower_step, self.state, said)
            self._move_upper = Compiled(self._upper_step, self.state, said)
            self._move_both = Compiled(self._both_steps, self.state, said)

    @property
    def _sharing(self) -> bool:
        """Whether the two losses can have computations in common in this turn."""
        first_order = isinstance(self.solver, Alternating) and self.upper_first
        possible = self.state.problem.shares and self._one_source and first_order
        return possible and self.lower_steps > 0 and self._first_is_the_turns

    @cached_property
    def _first_is_the_turns(self) -> bool:
        """Whether the first lower step sees the batch of the turn itself; asked once."""
        problem, generator = self.state.problem, self.state.generator
        if not problem.draws_every_lower_step:
            return True
        return problem.draw_lower(self._batch, generator.clone_state(), 0) is self._batch

    def begin(self, seed: int) -> None:
        """Draw this turn's upper batch and seeds."""
        self._seeds = itertools.count(seed, 2**10)
        self._batch = self._draw("data" if self._one_source else "upper_data")
        self._ahead: list[Any] = []

    def rehearse(self) -> None:
        """Evaluate the losses before anything has moved, so that a bad one is refused."""
        uses_lower = self.solver.num_lower_batches() > 0
        if not self._one_source and (self.lower_steps or uses_lower):
            self._ahead.append(self._draw("data"))
        lower_batch = self._batch if self._one_source else (self._ahead or [None])[0]
        generator, problem = self.state.generator.clone_state(), self.state.problem
        drawn = problem.draw_lower(lower_batch, generator, 0)
        name = type(problem).__name__
        for batch, by in ((self._batch, "draw"), (lower_batch, "draw"), (drawn, "draw_lower")):
            refuse_graphs(problem, batch, f"what `{name}.{by}` returns")
        batches = self._own(self._batch), [self._own(drawn)]
        oracles = Oracles(problem, *batches, precision=self.precision)
        levels: list[Level] = ["upper", "lower"] if self.lower_steps or uses_lower else ["upper"]
        examined = examine(oracles, levels, whole=uses_lower)
        for level in levels:
            if level not in examined:
                oracles.evaluate(level, oracles.upper, oracles.lower)
        if self._sharing:
            refuse_shared_upper(oracles)

    def run(self) -> Hypergradient:
        """Take the turn."""
        if self._sharing:
            hypergradient = self._both()
        elif self.upper_first:
            hypergradient = self._upper()
            self._lower()
        else:
            self._lower()
            hypergradient = self._upper()
        if not self._remarked:
            remark(hypergradient, self.solver, stacklevel=4)  # the caller of `next`
            self._remarked = True
        for schedulers in self.state.schedulers.values():
            for scheduler in schedulers:
                scheduler.step()
        self.state.follow()
        return hypergradient

    def terms(self, hypergradient: Hypergradient) -> list[tuple[Term, Tensor]]:
        """The numbers whose finiteness says that training is well, in the order of computation."""
        stats = hypergradient.stats
        lower = [(Term(name, logged=True), value) for name, value in self.logs.items()]
        if self.lower_loss is not None:
            lower.append((Term("lower loss"), self.lower_loss))
        if self.lower_residual is not None:
            lower.append((Term("norm of the lower gradient"), self.lower_residual))
        upper = [(Term(name, logged=True), value) for name, value in hypergradient.logs.items()]
        upper += [
            (Term("upper loss"), hypergradient.value),
            (Term("norm of the hypergradient's direct term"), stats.direct_norm),
            (Term("norm of the hypergradient's response term"), stats.response_norm),
        ]
        return upper + lower if self.upper_first else lower + upper

    # ------------------------------------------------------------------ batches

    def _draw(self, source: str) -> Any:
        batch = next(self.state.sources[source])
        return self.state.problem.draw(batch, self.state.generator)

    def _lower_batch(self, step: int) -> Any:
        batch = self._batch if self._one_source else self._next_lower()
        return self.state.problem.draw_lower(batch, self.state.generator, step)

    def _next_lower(self) -> Any:
        return self._ahead.pop() if self._ahead else self._draw("data")

    def _solver_batches(self) -> list[Any]:
        one_for_all = self._one_source and self._first_is_the_turns
        count = 1 if one_for_all else self.solver.num_lower_batches()
        return [self._lower_batch(0) for _ in range(count)] or [None]

    def _own(self, batch: Any) -> Any:
        """This rank's share of a batch."""
        count = world_size()
        return batch if count == 1 else self.state.problem.shard(batch, rank(), count)

    # ------------------------------------------------------------------ steps

    def _lower(self, first: int = 0) -> None:
        for step in range(first, self.lower_steps):
            batch = self._own(self._lower_batch(step))
            self._note(self._move_lower(batch, self._watched(step)))

    def _watched(self, step: int) -> bool:
        """Whether a lower step computes the residual; in a graph that is free."""
        return self.compile or step == self.lower_steps - 1

    def _note(self, out: LowerOutcome) -> None:
        self.lower_loss, self.lower_residual, self.logs = out

    def _upper(self) -> Hypergradient:
        batches = [self._own(batch) for batch in self._solver_batches()]
        solver_state = self.state.solver_state
        hypergradient = self._move_upper(self._own(self._batch), batches, solver_state)
        self.state.solver_state = hypergradient.state
        return hypergradient

    def _both(self) -> Hypergradient:
        hypergradient, out = self._move_both(self._own(self._batch), self._watched(0))
        self._note(out)
        self._lower(first=1)
        return hypergradient

    def _both_steps(self, batch: Any, watched: bool) -> tuple[Hypergradient, LowerOutcome]:
        """The upper step and the first lower step; what both losses compute alike, once."""
        oracles = self._oracles(batch, [])
        lower = oracles.lower
        with torch.enable_grad():
            common, buffers = oracles.share(oracles.upper, lower)
        self._wiring.commit(buffers)
        constant = optree.tree_map(_detached, common)
        hypergradient = self._upper_step(constant, [None], None)
        return hypergradient, self._lower_step(common, watched, lower)

    def _lower_step(self, batch: Any, watched: bool, lower: Tree | None = None) -> LowerOutcome:
        """A step from `lower`, leaves that the batch may depend on (the current ones by default)."""
        oracles = self._oracles(None, [batch])
        lower = oracles.lower if lower is None else lower
        constants = {name: x.detach() for name, x in oracles.upper.items()}
        with torch.enable_grad():  # the caller may iterate under `torch.no_grad()`
            evaluation, grads = oracles.lower_gradient(constants, lower)
        residual = norm([g for g in grads.values() if g is not None]) if watched else None
        self._apply("lower", grads, self.clip_lower)
        self._wiring.commit(evaluation.buffers)
        return LowerOutcome(evaluation.loss.detach(), residual, evaluation.logs)

    def _upper_step(self, batch: Any, lower_batches: list[Any], solver_state: Any) -> Hypergradient:
        hypergradient = self.solver.solve(
            self._oracles(batch, lower_batches),
            state=solver_state,
            lower_optimizer=self.state.optimizers["lower"] or None,
            throw=self.throw,
        )
        grads = hypergradient.grad
        if self.clip_upper is not None or not self._fused:
            # copies: clipping and some optimizers write into the gradients, the record is the caller's
            grads = {name: g.clone() for name, g in grads.items()}
        self._apply("upper", grads, self.clip_upper)
        self._wiring.commit(hypergradient.buffers)
        return hypergradient

    def _oracles(self, upper_batch: Any, lower_batches: list[Any]) -> Oracles:
        seed = 0 if tracing() else next(self._seeds)  # a graph holds no random numbers
        return Oracles(
            self.state.problem,
            upper_batch,
            lower_batches,
            seed=seed,
            wiring=self._wiring,
            precision=self.precision,
        )

    def _apply(self, level: Level, grads: Mapping[str, Tensor | None], most: float | None) -> None:
        parameters = self._wiring.variables(level)
        if tracing():
            _apply_traced(self.state.optimizers[level], parameters, grads, most)
            return
        for name, parameter in parameters.items():
            parameter.grad = _laid_out(hooked(parameter, grads[name]), parameter)
            accumulated(parameter)
        if most is not None:
            clip_grad_norm_(parameters.values(), most)
        for optimizer in self.state.optimizers[level]:
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
