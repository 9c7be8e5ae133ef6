"""`Certifier`: certifies every so many hypergradients of a run, and leaves the run as it was."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from bilevel.check.certificate import Certificate
from bilevel.check.certifying import certificate_of
from bilevel.check.trial import not_measured
from bilevel.check.witness import FAILS, Truth, Witness
from bilevel.distributed import is_main
from bilevel.loop.settings import TurnSettings
from bilevel.oracles import Oracles
from bilevel.refusals import whole
from bilevel.solvers import Hypergradient, Solver
from bilevel.state import State


@final
class Certifier:
    """Looks at the hypergradients of a run.

    Args:
        state: the run's state.
        solver: how the hypergradient is computed.
        settings: how the turns go.
        every: steps between two certificates.
        lower_steps: how many lower steps to replay, `None` for the solver's own or the lower solution.

    Attributes:
        certificate: of the hypergradient of this step, `None` if it was not looked at.
        seconds: spent so far.

    Raises:
        ValueError: where nothing could be compared with.
    """

    def __init__(
        self,
        state: State,
        solver: Solver,
        settings: TurnSettings,
        every: int,
        lower_steps: int | None,
    ) -> None:
        self._state = state
        self._solver = solver
        self._settings = settings
        self._every = whole("certify_every", every)
        steps = None if lower_steps is None else whole("certify_steps", lower_steps)
        lower = state.updates["lower"]
        self._truth = Truth(lower_steps=steps, clip_lower=lower.max_norm)
        self._optimizers = list(lower.optimizers)
        replays = self._truth.steps(solver, self._optimizers)
        stops = state.problem.stops_lower_gradient
        if replays is None and stops is not None:
            raise ValueError(
                "`certify_every` would differentiate the lower solution, but the lower gradient of "
                f"`{type(state.problem).__name__}` is not that of any function: {stops}, or give "
                "`certify_steps`, how many lower steps to replay instead"
            )
        hooked = (
            o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in self._optimizers
        )
        if replays is not None and replays.optimizer is None and any(hooked):
            raise ValueError(
                "`certify_every` replays steps of the lower optimizer on a copy, but it has step hooks, "
                "which may write into the problem itself; remove them"
            )
        self._warned = False
        self.certificate: Certificate | None = None
        self.seconds = 0.0

    def due(self) -> bool:
        """Whether the hypergradient that comes is looked at."""
        self.certificate = None
        return (self._state.step + 1) % self._every == 0

    def witness(self, upper_batch: Any, lower_batches: Sequence[Any], seed: int) -> Witness:
        """A copy of the problem as it is before the upper step."""
        begun = time.perf_counter()
        precision = self._settings.precision
        problem = self._state.problem
        oracles = Oracles(problem, upper_batch, lower_batches, seed=seed, precision=precision)
        witness = Witness(oracles, self._solver, self._optimizers, self._truth)
        self.seconds += time.perf_counter() - begun
        return witness

    def look(self, witness: Witness, hypergradient: Hypergradient) -> None:
        """Judge the hypergradient of this step; warn once if it is suspect."""
        begun = time.perf_counter()
        step = self._state.step + 1
        try:
            made = certificate_of(witness, hypergradient.grad, hypergradient, seed=step)
        except FAILS as error:  # a certificate must not end a run
            made = not_measured(witness, f"inconclusive: {str(error).splitlines()[0]}")
        self.seconds += time.perf_counter() - begun
        self.certificate = made
        if made.outcome == "suspect" and not self._warned and is_main():
            self._warned = True
            warnings.warn(
                f"the hypergradient of step {step} is {made.verdict}", RuntimeWarning, stacklevel=5
            )

    def taken(self, seconds: float) -> Certificate | None:
        """The certificate of this step, with the share of all seconds so far."""
        if self.certificate is None:
            return None
        return replace(self.certificate, share=min(self.seconds / seconds, 1.0))
