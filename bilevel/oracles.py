"""`Oracles`: the losses of a problem and their derivatives as pure functions of the variables.

A solver touches nothing else. What every solver must do in the same way is done here, once:

- variables and buffers are substituted (`bilevel.losses.substitution`), never written: batch-norm
  statistics and power iterations advance on copies, and `train` commits them once a step;
- a loss is always evaluated as in training: with gradients enabled, at variables that require grad;
- random numbers inside a loss (dropout) come from a fixed seed, so that every product of one
  hypergradient sees the same masks, also where several threads evaluate;
- where second derivatives are taken, attention uses its differentiable kernel, cuDNN is off for
  recurrent layers, power iterations stand still, and layers whose second derivative torch gets
  silently wrong are refused;
- with several ranks every derivative is averaged over them, so that all hold the same variables;
- NaN is never replaced. A missing gradient (a variable the loss does not use) is a zero.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import fill, gradients
from bilevel.batches import refuse_no_list
from bilevel.compile import EagerUnits, UnitRunner, is_tracing
from bilevel.devices import elsewhere, global_generators, usable_precision
from bilevel.distributed import mean_over_ranks, rank, world_size
from bilevel.linearization import CompiledHessian, Linearization, linearize
from bilevel.losses.answers import scalar
from bilevel.losses.in_training import AsInTraining
from bilevel.losses.notes import METHODS, RAW, note_on_call
from bilevel.losses.slots import Slots
from bilevel.losses.substitution import Substitution, undisturbed
from bilevel.losses.true_gradient import refuse_no_lower_loss, refuse_untrue, unused_by
from bilevel.lower_field import Constraints, field, half_square
from bilevel.pieces import evaluate_parts, lower_parts, partial_parts, pieces_of, upper_parts
from bilevel.problem import Level, Problem, Question, refuse_no_problem
from bilevel.refusals import SEEDS, outside_inference_mode, whole
from bilevel.second_order import differentiable_twice, second_order_context
from bilevel.tree import Layout, Tree, leaves

_EAGER = EagerUnits()
_SEEDS_APART = 2**40  # between two ranks: dropout masks differ on their shares of a batch


@final
@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a loss: its value, what it logged and the buffers it left behind."""

    loss: Tensor
    logs: dict[str, Tensor]
    buffers: Tree


@final
class Oracles:
    """A problem bound to one upper batch and to the lower batches of one hypergradient.

    Args:
        problem: the problem; its modules are never modified.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss, in the order in which they are used.
        seed: seed of the random numbers drawn inside the losses; `None` leaves the generators alone,
            for losses that draw nothing.
        slots: where the problem's modules hold its tensors, if the caller has found that already.
        precision: lower-precision dtype the losses are computed in where that is safe
            (`torch.autocast`); variables, gradients and optimizers keep theirs.

    Attributes:
        names: names of the upper variables.
        shared: upper name -> lower name of the variables that belong to both levels. The lower
            level decides their value; their upper gradient is the partial derivative of F.
        units: how a solver's pieces of work run, as they are or compiled.

    Raises:
        TypeError: if `problem` is not a problem, or the lower batches are not a list.
        ValueError: if the upper level has no variables, one of either level is complex, or for a
            precision that would go wrong.
        RuntimeError: inside `torch.inference_mode()`.
    """

    def __init__(
        self,
        problem: Problem,
        upper_batch: Any,
        lower_batches: Sequence[Any],
        *,
        seed: int | None = 0,
        slots: Slots | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        outside_inference_mode()
        refuse_no_problem(problem)
        refuse_no_list(lower_batches)
        self.problem = problem
        self.upper_batch = upper_batch
        self.lower_batches = lower_batches
        self.seed = 0 if seed is None else whole("seed", seed, *SEEDS)
        self.precision = usable_precision(precision)
        self.units: UnitRunner = _EAGER
        with undisturbed():
            self.slots = Slots(problem) if slots is None else slots
            self.names = list(self.slots.variables("upper"))
            self._lower = self._variables("lower")
            there = {id(p): name for name, p in self._lower.items()}
            upper = self._variables("upper")
            self.shared = {name: there[id(p)] for name, p in upper.items() if id(p) in there}
            self._upper = {name: p for name, p in upper.items() if name not in self.shared}
            self._buffers = self.slots.buffers()
        self._here: tuple[Tree, Tree] = self._upper, self._lower
        self._generators = [] if seed is None else global_generators(problem.device)

    def _variables(self, level: Level) -> Tree:
        variables = self.slots.variables(level)
        name = type(self.problem).__name__
        if not variables and level == "upper":
            raise ValueError(
                f"the {level} level of `{name}` has no trainable variables; "
                f"put them in `self.{level}` and leave `requires_grad` on"
            )
        if found := next((n for n, p in variables.items() if p.is_complex()), None):
            raise ValueError(
                f"the {level} variable `{found}` of `{name}` is complex; keep it as pairs of reals "
                "(`torch.view_as_real`) and make it complex in the losses (`torch.view_as_complex`)"
            )
        return variables

    @property
    def upper(self) -> Tree:
        """The current upper variables, detached leaves that share memory with the module's.

        Without those that belong to the lower level too (`shared`): they are lower variables here.
        """
        return leaves(self._here[0])

    @property
    def lower(self) -> Tree:
        """The current lower variables, detached leaves that share memory with the module's."""
        return leaves(self._here[1])

    def at(self, upper: Tree, lower: Tree) -> "Oracles":
        """The same losses, with these as the current variables instead of the module's."""
        (other := copy.copy(self))._here = upper, lower
        return other

    def evaluate(self, level: Level, upper: Tree, lower: Tree, index: int = 0) -> Evaluation:
        """The loss of one level at (upper, lower), on this rank's share of the batch.

        A caller under `torch.no_grad()` gets the same number, without its graph.

        Raises:
            TypeError: if the loss is neither a scalar nor a pair of a scalar and a dict.
        """
        batch = self.upper_batch if level == "upper" else self.lower_batches[index]
        if parts := pieces_of(batch):
            return evaluate_parts(self, parts, level, upper, lower, index)
        out, buffers = self._call(level, batch, upper, lower, index)
        loss, logs = scalar(out, level, self.problem)
        return Evaluation(loss if torch.is_grad_enabled() else loss.detach(), logs, buffers)

    def share(self, upper: Tree, lower: Tree) -> tuple[Any, Tree]:
        """The upper batch with what both losses compute alike, and the buffers this left behind."""
        return self._call("share", self.upper_batch, upper, lower, 0)

    def _call(
        self, what: Question, batch: Any, upper: Tree, lower: Tree, index: int
    ) -> tuple[Any, Tree]:
        """What the problem answers at (upper, lower), and the buffers that this left behind."""
        values = self.slots.substitute((self._upper, upper), (self._lower, lower))
        return self.run(values, what, batch, index)

    def run(
        self, values: Substitution, what: Question, batch: Any, index: int = 0
    ) -> tuple[Any, Tree]:
        """What the problem answers with these values in their places, and the buffers it left."""
        seed = self.seed + index + rank() * _SEEDS_APART
        with values.in_place(), AsInTraining(seed, self._generators):
            if self.precision is None:
                out = self._answer(what, batch)
            else:
                with torch.autocast(self.problem.device.type, self.precision):
                    out = self._answer(what, batch)
        return out, dict(zip(self._buffers, values.buffers, strict=True))

    def _answer(self, what: Question, batch: Any) -> Any:
        try:
            return self.problem(what, batch)
        except RAW as error:  # torch says which kernel, Python which line, but not which batch
            if is_tracing():
                raise
            if isinstance(error, (RuntimeError, TypeError)):
                said = elsewhere(self.problem, batch)
                if said is not None:
                    raise ValueError(said) from error
            note_on_call(error, self.problem, METHODS[what], batch)
            raise

    def gradient(
        self, loss: Tensor, variables: Tree, *, create_graph: bool = False
    ) -> dict[str, Tensor | None]:
        """The gradient of a loss on this rank, `None` for variables it does not use."""
        grads = gradients(loss, list(variables.values()), create_graph=create_graph)
        return dict(zip(variables, grads, strict=True))

    def mean_over_ranks(
        self, evaluation: Evaluation, grads: Sequence[Tensor | None]
    ) -> tuple[Evaluation, list[Tensor | None]]:
        """Loss, logs and gradients averaged over all ranks, in one exchange."""
        if world_size() == 1:
            return evaluation, list(grads)
        logs, used = evaluation.logs, [g for g in grads if g is not None]
        value = evaluation.loss.detach()
        logged = [v.to(value.device) for v in logs.values()]  # a Python number is on the processor
        means = iter(mean_over_ranks([value, *logged, *used]))
        loss, logs = next(means), {name: next(means) for name in logs}
        mean_grads = [None if g is None else next(means) for g in grads]
        return Evaluation(loss, logs, evaluation.buffers), mean_grads

    def lower_gradient(
        self, upper: Tree, lower: Tree, index: int = 0, *, create_graph: bool = False
    ) -> tuple[Evaluation, dict[str, Tensor | None]]:
        """The lower loss and its gradient dG/dy; `None` marks variables the loss does not use.

        Where the lower level is no plain loss, the field whose zero is its answer
        (`bilevel.lower_field`), with half the square of a condition for the loss.

        Raises:
            ValueError: if the lower loss uses none of the lower variables.
        """
        if not create_graph and (parts := pieces_of(self.lower_batches[index])):
            return lower_parts(self, parts, upper, lower, index)
        evaluation, found = self._own_lower_gradient(upper, lower, index, create_graph)
        if world_size() > 1:
            evaluation, grads = self.mean_over_ranks(evaluation, list(found.values()))
            found = dict(zip(found, grads, strict=True))
        if self.problem.constrains_lower:
            with torch.set_grad_enabled(create_graph):
                found = self.constraints(upper, lower).condition(lower, found)
        return evaluation, found

    def constraints(self, upper: Tree, lower: Tree) -> Constraints:
        """The constraints on the lower variables, differentiable in the upper ones."""
        records, _ = self._call("constraints", None, upper, lower, 0)
        return Constraints(records, self.problem, lower)

    def _own_lower_gradient(
        self, upper: Tree, lower: Tree, index: int, create_graph: bool
    ) -> tuple[Evaluation, dict[str, Tensor | None]]:
        if self.problem.gives_lower_condition:
            batch = self.lower_batches[index]
            out, buffers = self._call("condition", batch, upper, lower, index)
            parts = field(out, self.problem, lower)
            found = {n: c if create_graph else c.detach() for n, c in parts.items()}
            return Evaluation(half_square(parts).detach(), {}, buffers), {**found}
        evaluation = self.evaluate("lower", upper, lower, index)
        grads = self.gradient(evaluation.loss, lower, create_graph=create_graph)
        self.refuse_unused(grads.values())
        return evaluation, grads

    def refuse_unused(self, grads: Iterable[Tensor | None]) -> None:
        """Refuse a lower loss whose gradient is missing in all lower variables (`ValueError`)."""
        if all(g is None for g in grads):
            raise ValueError(unused_by(type(self.problem).__name__, len(self._lower)))

    def on(self, upper_batch: Any, lower_batches: Sequence[Any], index: int = 0) -> "Oracles":
        """The same losses on other batches, drawn for the evaluation with this number."""
        other = copy.copy(self)
        other.upper_batch, other.lower_batches = upper_batch, lower_batches
        other.seed = self.seed + index
        return other

    def upper_gradient(
        self, upper: Tree, lower: Tree, wanted: Sequence[str]
    ) -> tuple[Evaluation, list[Tensor | None]]:
        """The upper loss and its gradient in the upper variables and in lower ones; no graph is left.

        Args:
            upper: the upper variables.
            lower: the lower variables.
            wanted: names of the lower variables that count.
        """
        if parts := pieces_of(self.upper_batch):
            return upper_parts(self, parts, upper, lower, wanted)

        def piece(batch: Any, upper: Tree, lower: Tree) -> tuple[Any, ...]:
            upper, lower = leaves(upper), leaves(lower)
            here = self.on(batch, [None])
            evaluation = here.evaluate("upper", upper, lower)
            inputs = [*upper.values(), *(lower[name] for name in wanted)]
            grads = gradients(evaluation.loss, inputs)
            evaluation, grads = here.mean_over_ranks(evaluation, grads)
            return evaluation.loss.detach(), evaluation.logs, evaluation.buffers, grads

        key = "upper", tuple(wanted), self.precision
        given = map(self.units.ready, (self.upper_batch, upper, lower))
        loss, logs, buffers, grads = self.units.call(key, piece, *given)
        return Evaluation(loss, logs, buffers), grads

    def partials(
        self, level: Level, upper: Tree, lower: Tree, index: int = 0
    ) -> tuple[Evaluation, Tree, Tree]:
        """A loss and its gradient in the variables of both levels, zeros where it uses none; no graph.

        Args:
            level: whose loss.
            upper: the upper variables.
            lower: the lower variables.
            index: which of the lower batches.

        Returns:
            The evaluation, the gradient in the upper and that in the lower variables. Variables that
            belong to both levels are lower ones; the upper loss's gradient in them is in both trees.

        Raises:
            ValueError: if the lower loss uses none of the lower variables.
        """

        def piece(batch: Any, upper: Tree, lower: Tree) -> tuple[Any, ...]:
            upper, lower = leaves(upper), leaves(lower)
            here = self.on(batch, [batch], index)
            evaluation = here.evaluate(level, upper, lower)
            inputs = [*upper.values(), *lower.values()]
            found = gradients(evaluation.loss, inputs)
            if level == "lower":
                here.refuse_unused(found[len(upper) :])
            evaluation, found = here.mean_over_ranks(evaluation, fill(found, inputs))
            grads = fill(found, inputs)
            of_y = dict(zip(lower, grads[len(upper) :], strict=True))
            of_x = dict(zip(upper, grads[: len(upper)], strict=True))
            if level == "upper":
                of_x = {
                    n: of_y[self.shared[n]] if n in self.shared else of_x[n] for n in self.names
                }
            return evaluation.loss.detach(), evaluation.logs, evaluation.buffers, of_x, of_y

        if level == "lower":
            refuse_no_lower_loss(self.problem, "a solver of first order")
        batch = self.upper_batch if level == "upper" else self.lower_batches[index]
        if parts := pieces_of(batch):
            return partial_parts(self, parts, level, upper, lower, index)
        key, given = ("partials", level, self.precision), (batch, upper, lower)  # no graph draws
        *found, of_x, of_y = self.units.call(key, piece, *map(self.units.ready, given))
        return Evaluation(*found), of_x, of_y

    def linearize_lower(self, upper: Tree, lower: Tree) -> Linearization:
        """The lower gradient at (upper, lower) and products with its two derivatives.

        Of several lower batches, the mean.
        """
        if not self.units.compiled or any(map(pieces_of, self.lower_batches)):
            return linearize(self, upper, lower)
        layout = Layout(list(lower.values()))

        def piece(batches: list[Any], upper: Tree, lower: Tree) -> tuple[Any, Any]:
            found = linearize(self.on(None, batches), leaves(upper), leaves(lower))
            early = found.gradient, found.residual
            return early, lambda vector: (found.hessian(vector), found.cross(vector))

        like = layout.ravel([y.detach() for y in lower.values()]).contiguous()
        fixed = [*map(self.units.ready, (list(self.lower_batches), upper, lower))]
        stage = self.units.stage(("lower", self.precision), piece, fixed, [like])
        gradient, residual = stage.early
        symmetric = not self.problem.gives_lower_condition
        hessian = CompiledHessian(stage, gradient, symmetric=symmetric)
        return Linearization(gradient, hessian, hessian.cross, layout, residual)

    def mean_lower_gradient(
        self, upper: Tree, lower: Tree, *, create_graph: bool = False
    ) -> list[Tensor]:
        """The gradient of this rank's own lower loss, the mean over the lower batches, zeros filled in.

        Constraints are left aside.
        """
        count = len(self.lower_batches)
        own = [self._own_lower_gradient(upper, lower, i, create_graph)[1] for i in range(count)]
        parts = [fill(list(grads.values()), list(lower.values())) for grads in own]
        if count == 1:
            return parts[0]
        return [torch.stack(part).mean(dim=0) for part in zip(*parts, strict=True)]

    def differentiated_twice(self, solver: str) -> contextlib.AbstractContextManager[None]:
        """The context in which a solver takes second derivatives of the lower loss.

        Raises:
            ValueError: if the problem has no lower level or stops its gradient, has hooks on lower
                variables, or holds a layer whose second derivative is wrong in this torch.
        """
        return self.units.prepared(partial(self._twice, solver))

    @contextlib.contextmanager
    def _twice(self, solver: str) -> Iterator[None]:
        refuse_untrue(self.problem, self._lower, solver)
        differentiable_twice(self.problem.lower, solver)
        with second_order_context(self.problem):
            yield
