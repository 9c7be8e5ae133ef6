"""`Turn`: one turn of the training loop - batches are drawn, lower steps taken, an upper step taken."""

from functools import cached_property
from typing import Any, NamedTuple, final

from torch import Tensor

from bilevel.check.witness import Witness
from bilevel.devices import brought
from bilevel.distributed import rank, world_size
from bilevel.loop.certifier import Certifier
from bilevel.loop.remarks import remark
from bilevel.loop.settings import TurnSettings
from bilevel.loop.steps import LowerOutcome, TurnSteps
from bilevel.losses.notes import RAW, note_on_call
from bilevel.losses.purity import examine, refuse_shared_upper
from bilevel.losses.references import refuse_graphs
from bilevel.losses.substitution import attentive
from bilevel.oracles import Oracles
from bilevel.pieces import cut
from bilevel.problem import Level
from bilevel.solvers import Hypergradient, Solver
from bilevel.state import State


@final
class Term(NamedTuple):
    """A number that is watched in training: its name, and whether a loss logged it."""

    name: str
    logged: bool = False


@final
class Turn:
    """What the loop repeats: draw a batch, move the lower variables, move the upper ones.

    Args:
        state: the run's state.
        solver: how the hypergradient is computed.
        settings: how the turns go.
        certifier: looks at hypergradients before they are used, if there is one.

    Attributes:
        lower_loss: the lower loss before the last lower step.
        lower_residual: the norm of its gradient.
        logs: what it logged.
    """

    def __init__(
        self,
        state: State,
        solver: Solver,
        settings: TurnSettings,
        certifier: Certifier | None = None,
    ) -> None:
        self.state = state
        self.certifier = certifier
        self.lower_loss: Tensor | None = None
        self.lower_residual: Tensor | None = None
        self.logs: dict[str, Tensor] = {}
        self._solver = solver
        self._settings = settings
        self._steps = TurnSteps(state, solver, settings)
        self._one_source = "upper_data" not in state.sources
        self._remarked = False
        self._moved_on: Any = None  # the newest lower batch
        self._device = state.problem.device

    @property
    def _sharing(self) -> bool:
        """Whether the two losses can have computations in common in this turn."""
        at_once = self._solver.drops_response and self._settings.upper_first
        possible = self.state.problem.shares and self._one_source and at_once
        possible = possible and self._settings.accumulate == 1
        return possible and self._settings.lower_steps > 0 and self._first_is_the_turns

    @property
    def _in_parts(self) -> bool:
        """Whether the end of a draw belongs to the upper step, in one graph with it."""
        alone = self._one_source and not self._settings.lower_moves and world_size() == 1
        alone = alone and self._settings.accumulate == 1
        at_once = self._solver.drops_response and not self._solver.num_lower_batches()
        in_graph = bool(self._settings.compile) and self.state.problem.draws_in_parts
        return in_graph and alone and at_once and self.certifier is None

    @cached_property
    def _first_is_the_turns(self) -> bool:
        """Whether the first lower step sees the batch of the turn itself; asked once."""
        problem, generator = self.state.problem, self.state.generator
        if not problem.draws_every_lower_step:
            return True
        return problem.draw_lower(self._batch, generator.clone_state(), 0) is self._batch

    def begin(self, seed: int) -> None:
        """Draw this turn's upper batch and seeds."""
        self._steps.begin(seed)
        self._begun: Any = None
        self._batch = self._draw("data" if self._one_source else "upper_data")
        self._ahead: list[Any] = []

    def rehearse(self) -> None:
        """Evaluate the losses before anything has moved, so that a bad one is refused."""
        if self._begun is not None:
            self._batch = self._steps.rehearsed(self._begun)
        uses_lower = self._solver.num_lower_batches() > 0
        lower_moves = self._settings.lower_moves
        if not self._one_source and (lower_moves or uses_lower):
            self._ahead.append(self._draw("data"))
        lower_batch = self._batch if self._one_source else (self._ahead or [None])[0]
        generator, problem = self.state.generator.clone_state(), self.state.problem
        try:
            drawn = problem.draw_lower(lower_batch, generator, 0)
        except RAW as error:
            note_on_call(error, problem, "draw_lower(batch, generator, step)", lower_batch)
            raise
        name = type(problem).__name__
        for batch, by in ((self._batch, "draw"), (lower_batch, "draw"), (drawn, "draw_lower")):
            refuse_graphs(problem, batch, f"what `{name}.{by}` returns")
        batches = self._own(self._batch), [self._own(drawn)]
        oracles = Oracles(problem, *batches, precision=self._settings.precision)
        levels: list[Level] = ["upper", "lower"] if lower_moves or uses_lower else ["upper"]
        examined = examine(oracles, levels, whole=uses_lower)
        for level in levels:
            if level not in examined:
                oracles.evaluate(level, oracles.upper, oracles.lower)
        if self._sharing:
            refuse_shared_upper(oracles)
        self._solver.rehearse(oracles)

    def run(self) -> Hypergradient:
        """Take the turn."""
        self._steps.begin_anew()
        with attentive:  # once for all evaluations of the turn
            if self._sharing:
                hypergradient = self._both()
            elif self._settings.upper_first:
                hypergradient = self._upper()
                self._lower()
            else:
                self._lower()
                hypergradient = self._upper()
        if not self._remarked:
            levels = 2 if self.state.problem.variables("lower") else 1
            remark(hypergradient, self._solver, levels=levels, stacklevel=4)  # the caller of `next`
            self._remarked = True
        for update in self.state.updates.values():
            for scheduler in update.schedulers:
                scheduler.step()
        self.state.follow()
        return hypergradient

    def terms(self, hypergradient: Hypergradient) -> list[tuple[Term, Tensor]]:
        """The numbers that must stay finite, in the order of computation."""
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
        return upper + lower if self._settings.upper_first else lower + upper

    # ------------------------------------------------------------------ batches

    def _draw(self, source: str) -> Any:
        batch = next(self.state.sources[source])
        if self._settings.move_batches:
            batch = brought(batch, self._device)
        try:
            if self._in_parts:
                self._begun = self.state.problem.begin_draw(batch, self.state.generator)
                if self._begun is not None:
                    return None
            return self.state.problem.draw(batch, self.state.generator)
        except RAW as error:
            note_on_call(error, self.state.problem, "draw(data, generator)", batch)
            raise

    def _lower_batch(self, step: int) -> Any:
        batch = self._batch if self._one_source else self._next_lower()
        self._moved_on = self.state.problem.draw_lower(batch, self.state.generator, step)
        return self._moved_on

    def _next_lower(self) -> Any:
        return self._ahead.pop() if self._ahead else self._draw("data")

    def _solver_batches(self) -> list[Any]:
        if self._settings.lower_solver is not None and not self._settings.upper_first:
            return [self._moved_on]  # where the lower variables are a solution
        one_for_all = self._one_source and self._first_is_the_turns
        count = 1 if one_for_all else self._solver.num_lower_batches()
        return [self._lower_batch(0) for _ in range(count)] or [None]

    def _own(self, batch: Any) -> Any:
        """This rank's share of a batch."""
        count = world_size()
        return batch if count == 1 else self.state.problem.shard(batch, rank(), count)

    def _cut(self, batch: Any) -> Any:
        """A batch in the pieces in which it is evaluated."""
        count = self._settings.accumulate
        return batch if count == 1 else cut(batch, count)

    # ------------------------------------------------------------------ steps

    def _lower(self, first: int = 0) -> None:
        if self._settings.lower_solver is not None:
            self._note(self._steps.solve_lower(self._cut(self._lower_batch(0))))
        for step in range(first, self._settings.lower_steps):
            batch = self._cut(self._own(self._lower_batch(step)))
            self._note(self._steps.lower(batch, self._watched(step)))

    def _watched(self, step: int) -> bool:
        """Whether a lower step computes the residual; in a graph that costs nothing."""
        return bool(self._settings.compile) or step == self._settings.lower_steps - 1

    def _note(self, out: LowerOutcome) -> None:
        self.lower_loss, self.lower_residual, self.logs = out

    def _upper(self) -> Hypergradient:
        if self._begun is not None:
            hypergradient = self._steps.drawn(self._begun, self.state.solver_state)
        else:
            hypergradient = self._upper_of_batches()
        self.state.solver_state = hypergradient.state
        if self._solver.moves_lower:
            self.lower_residual = hypergradient.stats.lower_residual
        return hypergradient

    def _upper_of_batches(self) -> Hypergradient:
        batches = [self._own(batch) for batch in self._solver_batches()]
        batch, solver_state = self._own(self._batch), self.state.solver_state
        witness = self._witness(batch, batches)
        batch, batches = self._cut(batch), [self._cut(b) for b in batches]
        hypergradient = self._steps.upper(batch, batches, solver_state)
        self._certify(witness, hypergradient)
        return hypergradient

    def _both(self) -> Hypergradient:
        batch = self._own(self._batch)
        witness = self._witness(batch, [])
        hypergradient, out = self._steps.both(batch, self._watched(0))
        self._certify(witness, hypergradient)
        self._note(out)
        self._lower(first=1)
        return hypergradient

    # ------------------------------------------------------------------ certificates

    def _witness(self, batch: Any, lower_batches: list[Any]) -> Witness | None:
        """The problem as it is now, if the hypergradient that comes is looked at."""
        if self.certifier is None or not self.certifier.due():
            return None
        if not self._solver.num_lower_batches():
            lower_batches = [self._own(self._aside())]
        return self.certifier.witness(batch, lower_batches, self._steps.coming_seed)

    def _aside(self) -> Any:
        """A lower batch of this turn that nothing notices: for a certificate of a solver without."""
        if not self._one_source:
            return self._moved_on
        problem, generator = self.state.problem, self.state.generator.clone_state()
        return problem.draw_lower(self._batch, generator, 0)

    def _certify(self, witness: Witness | None, hypergradient: Hypergradient) -> None:
        if self.certifier is not None and witness is not None:
            self.certifier.look(witness, hypergradient)
