"""`Turn`: one turn of the training loop - the lower steps and the upper step, eager or compiled."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bilevel.compiled import Compiled
from bilevel.oracles import Oracles
from bilevel.problem import Level
from bilevel.solvers import Hypergradient, Solver
from bilevel.state import State
from bilevel.tracing import tracing
from bilevel.tree import Tree, norm
from bilevel.twins import RunningTwin, clip
from bilevel.wiring import Wiring


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
    lower_loss: Tensor | None = None
    lower_residual: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shared = "upper_data" not in self.state.sources
        self._wiring = Wiring(self.state.problem)
        self._move_lower, self._move_upper = self._lower_step, self._upper_step
        if self.compile:
            self._move_lower = Compiled(self._lower_step, self.state)
            self._move_upper = Compiled(self._upper_step, self.state)

    def begin(self, seed: int) -> None:
        """Draw this turn's upper batch and seeds."""
        self._seeds = itertools.count(seed, 2**10)
        self._batch = self._draw("data" if self._shared else "upper_data")
        self._ahead: list[Any] = []

    def rehearse(self) -> None:
        """Evaluate both losses once, so that a bad one is refused before anything has moved."""
        if not self._shared and (self.lower_steps or self.solver.num_lower_batches()):
            self._ahead.append(self._draw("data"))
        lower_batch = self._batch if self._shared else (self._ahead or [None])[0]
        generator = self.state.generator.clone_state()
        lower_batch = self.state.problem.draw_lower(lower_batch, generator, 0)
        oracles = Oracles(self.state.problem, self._batch, [lower_batch])
        with torch.no_grad():
            oracles.evaluate("upper", oracles.upper, oracles.lower)
        if self.lower_steps:
            with torch.enable_grad():
                oracles.lower_gradient(oracles.upper, oracles.lower)

    def run(self) -> Hypergradient:
        """Take the turn."""
        if self.upper_first:
            hypergradient = self._upper()
            self._lower()
        else:
            self._lower()
            hypergradient = self._upper()
        for schedulers in self.state.schedulers.values():
            for scheduler in schedulers:
                scheduler.step()
        return hypergradient

    def terms(self, hypergradient: Hypergradient) -> list[tuple[str, Tensor]]:
        """The numbers whose finiteness says that training is well, in the order of computation."""
        lower = [*self.logs.items()]
        if self.lower_loss is not None:
            lower.append(("lower loss", self.lower_loss))
        if self.lower_residual is not None:
            lower.append(("norm of the lower gradient", self.lower_residual))
        upper = [*hypergradient.logs.items(), ("upper loss", hypergradient.value)]
        upper += [
            ("norm of the hypergradient's direct term", hypergradient.stats.direct_norm),
            ("norm of the hypergradient's response term", hypergradient.stats.response_norm),
        ]
        return upper + lower if self.upper_first else lower + upper

    # ------------------------------------------------------------------ batches

    def _draw(self, source: str) -> Any:
        batch = next(self.state.sources[source])
        return self.state.problem.draw(batch, self.state.generator)

    def _lower_batch(self, step: int) -> Any:
        batch = self._batch if self._shared else self._next_lower()
        return self.state.problem.draw_lower(batch, self.state.generator, step)

    def _next_lower(self) -> Any:
        return self._ahead.pop() if self._ahead else self._draw("data")

    def _solver_batches(self) -> list[Any]:
        one_for_all = self._shared and not self.state.problem.draws_every_lower_step
        count = 1 if one_for_all else self.solver.num_lower_batches()
        return [self._lower_batch(0) for _ in range(count)] or [None]

    # ------------------------------------------------------------------ steps

    def _lower(self) -> None:
        for step in range(self.lower_steps):
            out = self._move_lower(self._lower_batch(step))
            self.lower_loss, self.lower_residual, self.logs = out

    def _upper(self) -> Hypergradient:
        state = self.state
        hypergradient = self._move_upper(self._batch, self._solver_batches(), state.solver_state)
        state.solver_state = hypergradient.state
        return hypergradient

    def _lower_step(self, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The lower loss before the step, the norm of its gradient and what it logged."""
        oracles = self._oracles(None, [batch])
        constants = {name: x.detach() for name, x in oracles.upper.items()}
        with torch.enable_grad():  # the caller may iterate under `torch.no_grad()`
            evaluation, grads = oracles.lower_gradient(constants, oracles.lower)
        residual = norm([g for g in grads.values() if g is not None])
        self._apply("lower", grads, self.clip_lower)
        self._wiring.commit(evaluation.buffers)
        return evaluation.loss.detach(), residual, evaluation.logs

    def _upper_step(self, batch: Any, lower_batches: list[Any], solver_state: Any) -> Hypergradient:
        hypergradient = self.solver.solve(
            self._oracles(batch, lower_batches),
            state=solver_state,
            lower_optimizer=self.state.optimizers["lower"] or None,
            throw=self.throw,
        )
        # copies: clipping and some optimizers write into the gradients, the record is the caller's
        grads = {name: g.clone() for name, g in hypergradient.grad.items()}
        self._apply("upper", grads, self.clip_upper)
        self._wiring.commit(hypergradient.buffers)
        return hypergradient

    def _oracles(self, upper_batch: Any, lower_batches: list[Any]) -> Oracles:
        seed = 0 if tracing() else next(self._seeds)  # a graph holds no random numbers
        wiring = self._wiring
        return Oracles(self.state.problem, upper_batch, lower_batches, seed=seed, wiring=wiring)

    def _apply(self, level: Level, grads: Mapping[str, Tensor | None], most: float | None) -> None:
        parameters = self._wiring.variables(level)
        if tracing():
            _apply_traced(self.state.optimizers[level], parameters, grads, most)
            return
        for name, parameter in parameters.items():
            parameter.grad = _laid_out(grads[name], parameter)
        if most is not None:
            clip_grad_norm_(parameters.values(), most)
        for optimizer in self.state.optimizers[level]:
            optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None


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
    gradients = clip(grads, max_norm) if max_norm is not None else dict(grads)
    used = {name for name, g in grads.items() if g is not None}
    tree = {name: p.detach() for name, p in parameters.items()}
    twin = RunningTwin(list(optimizers), parameters, tree, used)
    points = twin.pack(tree)
    with torch.no_grad():
        twin.write(*twin.step(points, gradients, twin.start(points)))
