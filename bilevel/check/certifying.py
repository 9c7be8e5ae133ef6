"""`certify`: a hypergradient against the truth of the whole procedure, from a few directions."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.arguments import explained
from bilevel.check.certificate import Certificate
from bilevel.check.lower_solution import UnsolvedError
from bilevel.check.trial import Trial, not_measured
from bilevel.check.witness import Truth, Witness
from bilevel.global_random import reseeded
from bilevel.optimizers import Optimizers, optimizers_of
from bilevel.oracles import Oracles
from bilevel.problem import Problem, refuse_no_problem
from bilevel.refusals import SEEDS, shown, whole
from bilevel.solvers import Hypergradient, Solver
from bilevel.solvers.given import given_solver
from bilevel.tree import Tree


@explained
def certify(
    problem: Problem,
    solver: Solver | None = None,
    upper_batch: Any = None,
    lower_batches: Sequence[Any] = (None,),
    *,
    hypergradient: Hypergradient | Mapping[str, Tensor] | None = None,
    against: Literal["procedure", "solution"] | None = None,
    lower_steps: int | None = None,
    clip_lower: float | None = None,
    lower_optimizer: Optimizers | None = None,
    num_directions: int = 8,
    tolerance: float = 0.1,
    confidence: float = 0.95,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> Certificate:
    r"""Cosine and norm ratio between a hypergradient and the truth, with an interval.

    The truth is the derivative of what happens when the upper variables are moved and the lower level
    answers: the same lower steps on the same batches, run again, or the lower solution found again. It
    is measured in float64 on a copy of the problem, whatever type the hypergradient was computed in,
    along the hypergradient itself and a few random directions across it; `bilevel.check.interval`
    has the equations. The interval covers the chance of the random directions, at `confidence`, and
    the uncertainty of the differences; it needs no assumption about the problem but that the upper
    loss can be differentiated there.

    The problem and its optimizers are left as they were. A certificate costs about thirty evaluations
    of the truth without gradients through them; it says how long it took.

    Args:
        problem: the problem at the point to look at, in any type.
        solver: what the hypergradient comes from, `Alternating()` by default.
        upper_batch: batch of the upper loss.
        lower_batches: batches of the lower loss.
        hypergradient: one that was computed already, as a record or by the names of the upper
            variables; by default `solver` is asked for it.
        against: "procedure" - lower steps from the current lower variables, in a plain loop in which
            buffers advance (default for `Unrolled`, or with `lower_steps`); "solution" - the lower
            solution, by `problem.best_response` or L-BFGS and Newton steps (default of all others).
            The hypergradient is taken where the lower variables are: far from the solution, it is
            wrong and said to be.
        lower_steps: how many steps of `lower_optimizer` to replay instead of the solver's own.
        clip_lower: the norm to which the gradient is clipped in those.
        lower_optimizer: running optimizer(s) of the lower level.
        num_directions: random directions; more make the interval narrower.
        tolerance: largest relative error, |hypergradient - truth| / |truth|, that is certified.
        confidence: of the intervals.
        seed: seed of the directions and of dropout.
        precision: compute the hypergradient in this dtype where that is safe, as `train` does.

    Returns:
        Cosine, norm ratio and relative error with their intervals, and a verdict: "certified",
        "suspect", with the likely cause, or "inconclusive".

    Raises:
        ValueError: if a setting is out of range, or there is nothing to replay.
        TypeError: for a hypergradient that is none.

    Example:
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3).square().sum(),
        ...     lambda x, y, _: (y["y"] - x["x"].sin()).square().sum(),
        ...     {"x": torch.ones(20)}, {"y": torch.ones(20).sin()},
        ... )
        >>> from bilevel import Alternating, Implicit
        >>> certify(problem, Implicit()).outcome
        'certified'
        >>> certify(problem, Alternating()).cause
        '`Alternating` drops the response term'
    """
    refuse_no_problem(problem)
    solver = given_solver(solver)
    seed = whole("seed", seed, *SEEDS)
    truth = Truth(against, lower_steps, clip_lower, num_directions, tolerance, confidence)
    optimizers = optimizers_of("lower_optimizer", lower_optimizer)
    oracles = Oracles(problem, upper_batch, lower_batches, seed=seed, precision=precision)
    witness = Witness(oracles, solver, optimizers, truth)
    given = None if hypergradient is None else _given(hypergradient, oracles)
    begun = time.perf_counter()
    running = optimizers or None
    if precision is None:
        answer = solver.hypergradient(
            problem, upper_batch, lower_batches, lower_optimizer=running, seed=seed, throw=False
        )
    else:
        answer = solver.solve(oracles, lower_optimizer=running, throw=False)
    took = time.perf_counter() - begun
    if given is not None:
        return certificate_of(witness, *given, seed=seed, again=answer.grad)
    return certificate_of(witness, answer.grad, answer, seed=seed, took=took)


def certificate_of(
    witness: Witness,
    grad: Tree,
    record: Hypergradient | None,
    *,
    seed: int,
    again: Tree | None = None,
    took: float | None = None,
) -> Certificate:
    """The certificate of a hypergradient, by a copy of the problem from before it was used.

    Args:
        witness: the copy.
        grad: the hypergradient.
        record: the record it came in, if it did.
        seed: of the directions.
        again: what the solver gives at this point, where the hypergradient may be another.
        took: the seconds it took.
    """
    begun = time.perf_counter()
    with reseeded(seed):
        try:
            with witness.opened() as stand:
                made = Trial(witness, stand, grad, record, seed, again).certificate()
        except UnsolvedError as error:
            made = not_measured(witness, f"inconclusive: {error}")
    seconds = witness.seconds + time.perf_counter() - begun
    return replace(made, seconds=seconds, hypergradient_seconds=took)


def _given(hypergradient: Any, oracles: Oracles) -> tuple[Tree, Hypergradient | None]:
    """A hypergradient that was given and the record it came in, if it is one of these variables."""
    bare = isinstance(hypergradient, Mapping)
    parts = hypergradient if bare else getattr(hypergradient, "grad", None)
    if not isinstance(parts, Mapping) or not all(isinstance(g, Tensor) for g in parts.values()):
        raise TypeError(
            "`hypergradient` must be what `solver.hypergradient` returns, or tensors by the names of "
            f"the upper variables, got {shown(hypergradient)}"
        )
    shapes = {n: tuple(x.shape) for n, x in oracles.slots.variables("upper").items()}
    got = {n: tuple(g.shape) for n, g in parts.items()}
    if got != shapes:
        raise ValueError(
            f"`hypergradient` must have the names and shapes of the upper variables, {shapes}, got {got}"
        )
    return dict(parts), None if bare else hypergradient
