"""`train`: the loop, a generator that yields after every upper step."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from bilevel.arguments import explaining
from bilevel.batches import sources_of
from bilevel.choices import Choice
from bilevel.distributed import agree
from bilevel.errors import HypergradientError
from bilevel.loop.beginning import refuse_resets
from bilevel.loop.certifier import Certifier
from bilevel.loop.settings import TurnSettings
from bilevel.loop.step import Step, merged
from bilevel.loop.turn import Turn
from bilevel.loop.watch import Watch
from bilevel.lower.level import LowerSolver
from bilevel.optimizers import (
    LevelUpdate,
    Optimizers,
    Schedulers,
    check_optimizers,
    optimizers_of,
    schedulers_of,
    settings_of,
)
from bilevel.oracles import Oracles
from bilevel.problem import Level, Problem, refuse_no_problem
from bilevel.refusals import SEEDS, outside_inference_mode, positive, shown, whole
from bilevel.solvers import Solver
from bilevel.solvers.given import given_solver
from bilevel.state import State

_TRAIN = {  # what others give to a training loop
    "lr": "the learning rates are the optimizers': `torch.optim.Adam(problem.upper.parameters(), 1e-3)`",
    "weight_decay": "it belongs to an optimizer: `torch.optim.AdamW(..., weight_decay=...)`",
    "epochs": "give `num_steps`: an epoch of n rows has n // batch_size of them",
    "optimizer": "each level has one: `upper_optimizer` and `lower_optimizer`",
    "scheduler": "each level has one: `upper_scheduler` and `lower_scheduler`",
    "callbacks": "the loop is yours: `for step in train(...): ...`",
    "loss": "the losses are the problem's `upper_loss` and `lower_loss`",
    "device": "move the problem there, `problem.to(...)`",
}


@explaining(**_TRAIN, learning_rate=_TRAIN["lr"], num_epochs=_TRAIN["epochs"])
def train(
    problem: Problem,
    data: Any = None,
    *,
    upper_optimizer: Optimizers,
    lower_optimizer: Optimizers | None = None,
    num_steps: int,
    solver: Solver | None = None,
    lower_steps: int | None = None,
    lower_solver: LowerSolver | None = None,
    accumulate: int = 1,
    reset_lower: bool = False,
    upper_data: Any = None,
    batch_size: int | None = None,
    order: Literal["lower_first", "upper_first"] = "lower_first",
    upper_scheduler: Schedulers | None = None,
    lower_scheduler: Schedulers | None = None,
    clip_upper: float | None = None,
    clip_lower: float | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    check_every: int = 20,
    certify_every: int | None = None,
    certify_steps: int | None = None,
    throw: bool = True,
    compile: Choice = False,
    precision: torch.dtype | None = None,
    ema: float | None = None,
    move_batches: bool = True,
) -> Iterator[Step]:
    """Train a bilevel problem: lower steps, a hypergradient, an upper step, and again.

    With `data` alone, both levels and all lower steps of a turn see the same batch. With
    `upper_data` too, the upper level reads that, and every lower step and every unrolled step gets a
    fresh batch of `data`.

    Args:
        problem: the problem; trained in place, in the mode (train or eval) its modules are in.
        data: a pytree of tensors, a `DataLoader` or another iterable of batches, a source with
            `state_dict`, or `None` if the problem needs none. Moved to the problem's device, then
            passed through `problem.draw`.
        upper_optimizer: `torch.optim` optimizer(s) of the upper variables, used as given.
        lower_optimizer: those of the lower variables; may be left out if `lower_steps` is 0.
        num_steps: upper steps in total, those before a resume included.
        solver: how the hypergradient is computed; `Alternating()` by default.
        lower_steps: lower steps per upper step; 1 by default. A solver that moves both levels at once
            (`Solver.moves_lower`) takes none.
        lower_solver: solves the lower level in every turn, instead of lower steps: a function of a
            `LowerLevel`, at the current lower variables, that returns y. `LowerLevel.solution` is one.
        accumulate: evaluate every batch in so many pieces of its rows (`Pieces`), with the memory of
            one; the answer is the same for losses that are means over rows.
        reset_lower: begin every turn with the lower variables of the start of the run and with fresh
            lower optimizers, instead of where the turn before ended. Initial values that are learned
            are the problem's: `Problem.initial_lower`.
        upper_data: data of the upper level, if different.
        batch_size: rows per batch where data are tensors; all rows by default.
        order: whether a turn begins with the lower or with the upper step.
        upper_scheduler: learning-rate scheduler(s), stepped once per upper step.
        lower_scheduler: those of the lower level, also stepped once per upper step.
        clip_upper: largest norm of the hypergradient.
        clip_lower: largest norm of the lower gradient.
        seed: seed of batch order, noise and dropout.
        resume: checkpoint to continue from; the run then equals the uninterrupted one to the bit.
        check_every: steps between two looks for NaN. Each look waits for the device once; the step
            and term it names are exact.
        certify_every: steps between two certificates (`bilevel.certify`): `step.certificate` then says
            how far the hypergradient is from the truth. It changes nothing in the run and takes some
            thirty evaluations of the truth, a stated share of the time; a warning is given when one is
            suspect for the first time. `None` for never.
        certify_steps: lower steps whose replay is the truth of a certificate; by default those that
            `Unrolled` takes, and the lower solution for other solvers.
        throw: raise when a hypergradient does not succeed; otherwise read it from the step.
        compile: make graphs of the lower and the upper step, optimizers included: several times
            faster where Python and not arithmetic takes the time (small models). `True` is
            "record" on one CUDA device and "inductor" elsewhere. "record" keeps the kernels of a step
            as a CUDA graph, within a second or two. "inductor" traces the step and compiles it,
            which takes some seconds to a minute and needs a C++ compiler. Both need Adam, AdamW or
            SGD; whatever cannot be made a graph runs as it is, with a warning.
        precision: compute the losses in this dtype where that is safe (`torch.bfloat16`, by
            `torch.autocast`); variables, gradients and optimizers keep theirs.
        ema: keep an exponential moving average of the weights with this decay, `step.state.average`.
        move_batches: move each batch to the problem's device: tensors, however nested, and what has a
            method `to`. From pinned memory the copy is queued. `False` leaves batches where they are.

    With several processes (`torch.distributed` is initialised) every rank calls `train` with the same
    arguments, sees the same batches and evaluates its own rows of them; see `Problem.shard`.

    Yields:
        A `Step` after every upper step. The clock stands still while the caller has control.

    Raises:
        ValueError: at the call, for a setting out of range or an optimizer of other variables.
        DivergenceError: when a loss becomes NaN or infinite, with step and term. (One
            warning is given if a loss or the variables stay finite but become 1e8 times as large
            as at first.)
        CheckpointError: at the call, if `resume` cannot be used.

    Example:
        >>> from bilevel import Implicit
        >>> x, y = {"x": torch.zeros(())}, {"y": torch.zeros(())}
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3) ** 2, lambda x, y, _: (y["y"] - x["x"]) ** 2, x, y
        ... )
        >>> for step in train(
        ...     problem, num_steps=100, solver=Implicit(), lower_steps=10,
        ...     upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        ...     lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.4),
        ... ): pass
        >>> problem.upper.x.detach().round(decimals=4)
        tensor(3.)
    """
    outside_inference_mode()
    solver = given_solver(solver)
    lower_steps = _lower_steps(lower_steps, lower_solver, solver)
    num_steps = whole("num_steps", num_steps)
    check_every, seed = whole("check_every", check_every), whole("seed", seed, *SEEDS)
    _check(order, clip_upper, clip_lower, ema)
    how = compile, precision, move_batches, lower_solver, accumulate, reset_lower
    turns = TurnSettings(lower_steps, order == "upper_first", throw, *how)
    optimizers = _owned(problem, solver, turns, upper_optimizer, lower_optimizer)
    schedulers = {"upper": upper_scheduler, "lower": lower_scheduler}
    updates = _updates(optimizers, schedulers, {"upper": clip_upper, "lower": clip_lower})
    state = State(
        problem,
        updates,
        sources_of(data, upper_data, batch_size, seed),
        torch.Generator(problem.device).manual_seed(seed),
        _configuration(
            problem,
            solver,
            updates,
            **{"clipping": {n: u.max_norm for n, u in updates.items()}, "reset_lower": reset_lower},
            **{"order": order, "lower_steps": lower_steps, "batch_size": str(batch_size)},
            **{"seed": seed, "compile": compile, "precision": precision, "ema": ema},
            **{"lower_solver": _named(lower_solver), "accumulate": accumulate > 1 and accumulate},
        ),
        ema,
    )
    _begin(state, resume, num_steps, turns)
    certifier = _certifier(state, solver, turns, certify_every, certify_steps)
    return _loop(Turn(state, solver, turns, certifier), num_steps, check_every, seed)


def _named(function: Any) -> str | None:
    """A function by its name, which is the same in the next run."""
    return (
        None
        if function is None
        else str(getattr(function, "__qualname__", type(function).__name__))
    )


def _certifier(
    state: State, solver: Solver, turns: TurnSettings, every: int | None, steps: int | None
) -> Certifier | None:
    """What looks at the hypergradients, if any is to be looked at."""
    if every is not None:
        return Certifier(state, solver, turns, every, steps)
    if steps is not None:
        raise ValueError("`certify_steps` does nothing without `certify_every`; give that, too")
    return None


def _lower_steps(given: int | None, lower_solver: Any, solver: Solver) -> int:
    """The lower steps of a turn, the usual number where none was given."""
    usual = 0 if solver.moves_lower or lower_solver is not None else 1
    steps = whole("lower_steps", usual if given is None else given, 0)
    if lower_solver is not None and (steps or solver.moves_lower):
        by = f"`lower_steps={steps}`" if steps else f"`{type(solver).__name__}`, which moves them"
        raise ValueError(
            f"the lower variables are moved by `lower_solver`, and by {by}; leave one of the two out"
        )
    if steps and solver.moves_lower:
        raise ValueError(
            f"`{type(solver).__name__}` moves the lower variables together with the upper ones, so "
            f"there are no lower steps besides, got `lower_steps={steps}`; leave it out"
        )
    return steps


def _owned(
    problem: Problem, solver: Solver, turns: TurnSettings, upper: Any, lower: Any
) -> dict[Level, list[torch.optim.Optimizer]]:
    """The optimizers of both levels, if they suit the solver and the problem."""
    refuse_no_problem(problem)
    optimizers: dict[Level, list[torch.optim.Optimizer]] = {
        "upper": optimizers_of("upper_optimizer", upper),
        "lower": optimizers_of("lower_optimizer", lower),
    }
    if turns.lower_steps and not optimizers["lower"]:
        raise ValueError(
            f"`lower_steps` is {turns.lower_steps} but there is no `lower_optimizer`; give one, or set "
            "`lower_steps=0` to leave the lower variables where they are"
        )
    if solver.moves_lower and not optimizers["lower"]:
        raise ValueError(
            f"`{type(solver).__name__}` moves the lower variables by the `lower_optimizer`, and there "
            "is none; give one, for example `torch.optim.SGD(problem.lower.parameters(), 0.1)`"
        )
    if any(p.is_meta for p in problem.parameters()):
        raise ValueError(
            f"`{type(problem).__name__}` is on the meta device, which holds no numbers; give it some, "
            '`problem.to_empty(device="cpu")` and an initialisation'
        )
    solver.check(Oracles(problem, None, [None]), optimizers["lower"])
    if not optimizers["upper"]:
        raise ValueError(
            "there is no `upper_optimizer`, so the upper variables would not move; give one, for "
            "example `torch.optim.Adam(problem.upper.parameters(), 1e-3)`"
        )
    for level, group in optimizers.items():
        check_optimizers(problem, level, group)
    refuse_resets(problem, solver, turns)
    return optimizers


def _updates(
    optimizers: Mapping[Level, list[torch.optim.Optimizer]],
    schedulers: Mapping[str, Schedulers | None],
    max_norms: Mapping[str, float | None],
) -> dict[Level, LevelUpdate]:
    """How each level is moved."""
    return {
        level: LevelUpdate(
            group, schedulers_of(f"{level}_scheduler", schedulers[level], group), max_norms[level]
        )
        for level, group in optimizers.items()
    }


def _begin(state: State, resume: Any, num_steps: int, turns: TurnSettings) -> None:
    """Let all processes hold the same, and take up a run that is resumed."""
    agree(state.problem)
    if turns.reset_lower:
        state.keep_lower_start()
    if resume is None:
        return
    if not isinstance(resume, (str, os.PathLike)):
        raise TypeError(
            f"`resume` must be the path of a checkpoint that `state.save` wrote, got {shown(resume)}"
        )
    state.load(resume)
    if state.step > num_steps:
        raise ValueError(
            f"the checkpoint was written after {state.step} steps, but `num_steps`, the steps in "
            f"total, is {num_steps}"
        )


def _configuration(
    problem: Problem,
    solver: Solver,
    updates: Mapping[Level, LevelUpdate],
    **settings: Any,
) -> dict[str, str]:
    """What must be the same when a run is resumed; settings that are off are not mentioned."""
    return {
        "problem": type(problem).__name__,
        "variables": repr({n: tuple(p.shape) for n, p in problem.named_parameters()}),
        "solver": re.sub(r" at 0x[0-9a-f]+", "", repr(solver)),  # functions print their address
        "optimizers": repr(
            {n: [type(o).__name__ for o in update.optimizers] for n, update in updates.items()}
        ),
        **settings_of(updates),
        **{n: str(v) for n, v in settings.items() if v is not None and v is not False},
    }


def _loop(turn: Turn, num_steps: int, check_every: int, seed: int) -> Iterator[Step]:
    state = turn.state
    watch = Watch(state.problem.parameters())
    seconds = 0.0
    for optimizer in (o for group in state.optimizers.values() for o in group):
        optimizer.zero_grad()  # a gradient that a frozen parameter kept would move it in every step
    while state.step < num_steps:
        outside_inference_mode()
        start = time.perf_counter()
        turn.begin(hash((seed, state.step)) % 2**62)  # of integers: the same on every machine
        if not seconds:
            turn.rehearse()
        try:
            hypergradient = turn.run()
        except HypergradientError as error:
            # a NaN on the way here, in this turn or before, is the better explanation
            watch.add(state.step + 1, turn.terms(error.hypergradient))
            watch.look()
            error.add_note(f"at step {state.step + 1}")
            raise
        state.step += 1
        watch.add(state.step, turn.terms(hypergradient))
        if state.step % check_every == 0 or state.step == num_steps:
            watch.look()
        if state.step == num_steps:
            watch.end()
        seconds += time.perf_counter() - start
        yield Step(
            number=state.step,
            upper_loss=hypergradient.value,
            lower_loss=turn.lower_loss,
            lower_residual=turn.lower_residual,
            logs=merged(turn.logs, hypergradient.logs),
            hypergradient=hypergradient,
            seconds=seconds,
            state=state,
            certificate=turn.certifier.taken(seconds) if turn.certifier is not None else None,
        )


def _check(order: Any, clip_upper: Any, clip_lower: Any, ema: Any) -> None:
    if order not in ("lower_first", "upper_first"):
        raise ValueError(f'`order` must be "lower_first" or "upper_first", got {order!r}')
    for name, most in (("clip_upper", clip_upper), ("clip_lower", clip_lower), ("ema", ema)):
        if most is not None:
            positive(name, most)
