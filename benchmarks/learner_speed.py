"""Steps per second of every learner: a plain PyTorch loop, this library eager, this library compiled.

    python -m benchmarks.learner_speed [--only NAME ...] [--quick]

Before anything is timed, three steps with the same noise must give the plain loop and the compiled
library the same parameters. Then the three take turns, and the rate is the median over the turns, in
seconds of the processor, so that a busy machine slows all of them little and alike. The library's
steps are those of `fit`: batches, noise, schedulers, the watch for NaN. Compiling is not in the rates
but in the records. One thread, float32, batches of 100.

Records go to `benchmarks/results/learner_speed.jsonl`, one line per learner;
`python -m benchmarks.table` prints them.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.cases.learners import ENTRIES, Entry
from benchmarks.competitors.plain import Plain
from benchmarks.measuring.records import append, command
from benchmarks.measuring.turns import in_turns
from bilevel import Batches, Step, train
from bilevel.methods import EBLVM, Training

ROWS = 100


def loop(entry: Entry, learner: EBLVM, data: Tensor, *, compiled: bool) -> Iterator[Step]:
    """The steps of `learner.fit`, as an iterator."""
    given = {"upper_lr": entry.rate, "lower_lr": entry.rate}
    if entry.lower_steps is not None:
        given["lower_steps"] = entry.lower_steps
    settings = Training(**{**learner.training_defaults, **given})
    upper, lower = learner.optimizers(settings)
    two_levels = bool(learner.variables("lower"))

    def constant(optimizers: Any) -> list[LambdaLR]:
        single = isinstance(optimizers, torch.optim.Optimizer)
        return [LambdaLR(o, lambda _: 1.0) for o in ([optimizers] if single else optimizers)]

    return train(
        learner.train(),
        Batches(data, ROWS),
        upper_optimizer=upper,
        lower_optimizer=lower if two_levels else None,
        num_steps=10**9,
        solver=entry.solver,
        lower_steps=settings.lower_steps if two_levels else 0,
        order=settings.order,
        upper_scheduler=constant(upper),
        lower_scheduler=constant(lower) if two_levels else (),
        check_every=1,
        throw=False,
        compile=compiled,
    )


def processor() -> float:
    """Seconds of the processor, those of the C++ compiler's processes included."""
    return sum(os.times()[:4])


def same(
    entry: Entry, plain: Plain, learner: Any, running: Iterator[Step], *, compiled: bool
) -> float:
    """Largest difference of a parameter between the plain loop and the library, in three steps."""
    for name, module in plain.modules().items():
        module.load_state_dict(learner.get_submodule(name).state_dict())
    upper: list[tuple[Any, Any]] = []
    lower: list[tuple[Any, Any]] = []

    def recorded(function: Callable[..., Any], kept: list[tuple[Any, Any]]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            kept.append((arguments[-1], function(*arguments)))
            return kept[-1][1]

        return call

    learner.draw_lower = recorded(learner.draw_lower, lower)

    def begin_draw(data: Tensor, generator: torch.Generator) -> Any:
        begun = type(learner).begin_draw(learner, data, generator)
        upper.append((generator, copy.deepcopy(learner).finish_draw(begun)))
        return begun

    if compiled and learner.draws_in_parts:  # the graph finishes the draw
        learner.begin_draw = begin_draw
    else:
        learner.draw = recorded(learner.draw, upper)  # lower draws may call it: the turn's is first
    for _ in range(3):
        upper.clear()
        lower.clear()
        next(running)
        plain.step(upper[0][1], *of_turn(lower, plain.lower_steps, plain.unrolled))
    for name in ("draw", "begin_draw", "draw_lower"):
        vars(learner).pop(name, None)
    apart = [
        (p - learner.get_submodule(name).state_dict()[key]).abs().max()
        for name, module in plain.modules().items()
        for key, p in module.state_dict().items()
    ]
    return float(torch.stack(apart).max())


def of_turn(drawn: list[tuple[Any, Any]], count: int, ahead: int) -> tuple[list[Any], list[Any]]:
    """The batches of a turn's lower steps and of the steps it looks ahead with.

    The first turn draws some more, to rehearse and to examine the losses: steps count from 0, so the
    turn's own batches are those with the numbers 0, 1, ... in a row, and those ahead are the last.

    Args:
        drawn: all lower batches of a turn, each with the number of its step.
        count: lower steps.
        ahead: steps ahead.
    """
    numbers = [number for number, _ in drawn]
    wanted = list(range(count))
    start = next(i for i in range(len(drawn) + 1) if numbers[i : i + count] == wanted)
    batches = [batch for _, batch in drawn]
    return batches[start : start + count], batches[len(batches) - ahead :]


def rates(entry: Entry, rounds: int, seconds: float) -> dict[str, Any]:
    """Median steps per second of the three, in turns; the difference; the cost of compiling."""
    data, plain, learner = entry.data(), entry.plain(), entry.learner()
    compiled = loop(entry, learner, data, compiled=True)
    eager = loop(entry, entry.learner(), data, compiled=False)
    start = processor()
    difference = same(entry, plain, learner, compiled, compiled=True)
    preparation = processor() - start
    if not difference < 1e-5:
        raise RuntimeError(f"{entry.name}: the plain loop computes something else: {difference}")
    competitors: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.turn(data),
        "eager": lambda: next(eager),
        "compiled": lambda: next(compiled),
    }
    counts = {}
    for name, step in competitors.items():
        step()
        start = time.process_time()
        for _ in range(3):
            step()
        counts[name] = max(1, round(3 * seconds / (time.process_time() - start)))
    taken = in_turns(competitors, rounds, repeats=counts, clock=time.process_time)
    found = {name: 1 / median(values) for name, values in taken.items()}
    return {**found, "compile_seconds": preparation, "difference": difference}


def measure(options: argparse.Namespace) -> None:
    rounds, seconds = (3, 0.1) if options.quick else (9, 0.4)
    for entry in ENTRIES:
        if options.only and entry.name not in options.only:
            continue
        about = {"name": entry.name, "rounds": rounds, "load": os.getloadavg()[0]}
        content = {**about, **rates(entry, rounds, seconds)}
        print(content, flush=True)
        if not options.quick:
            append(options.output, content)


def main() -> None:
    parser = command("learner_speed", __doc__)
    parser.add_argument("--only", nargs="+", help="names of learners")
    parser.add_argument("--quick", action="store_true", help="short turns, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # compiling costs what it costs
    measure(options)


if __name__ == "__main__":
    main()
