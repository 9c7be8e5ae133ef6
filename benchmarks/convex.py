"""Stochastic solvers on benchmark_bilevel's simulated quadratics, by their protocol, in closed form.

    python -m benchmarks.convex [--solvers SABA SOBA] [--seeds 10] [--calls 400000]

1,024 + 1,024 samples, 100 lower and 10 upper entries, mu = 0.1, batches of 64, y from 0 and x from -2.
The error is the squared norm of the exact hypergradient. As they do: step sizes fall with the powers
of their code; a small grid (step size of y and v, its ratio to that of x), here on one seed and a
quarter of the calls, then the best setting on all seeds; calls to oracles are those of their table, a
gradient or a product on one sample each. The clock is that of the processor and stands still while
the error is taken.

Records go to `benchmarks/results/convex.jsonl`, and a run that is there already is not taken again;
`python -m benchmarks.table` prints them, `python -m benchmarks.convex --draw` draws the figure.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import inf, isfinite
from pathlib import Path
from typing import Any, final

import torch

from benchmarks.cases.quadratics import Quadratics
from benchmarks.measuring.records import Record, append, command, read
from benchmarks.pages.convex_figure import draw
from bilevel import (
    F2SA,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    AmIGO,
    DivergenceError,
    Problem,
    Solver,
    StocBiO,
    train,
)

BATCH = 64
STEP_SIZES, RATIOS = (0.1, 0.3, 1.0), (0.3, 1.0)
POINTS = 50  # of a curve


@final
@dataclass(frozen=True)
class Entry:
    """A solver of the comparison.

    Attributes:
        make: the solver, from the step size of y at the start and the seed.
        calls: oracle calls on a sample of the lower and of the upper loss in a step, by their table.
        powers: the step sizes of y and of x fall with these powers of the step.
        all_rows: whether it cuts its minibatches itself.
        lower_steps: besides, if it has any.
    """

    make: Callable[[float, int], Solver]
    calls: tuple[int, int]
    powers: tuple[float, float] = (0.0, 0.0)
    all_rows: bool = False
    lower_steps: int | None = None


ENTRIES: dict[str, Entry] = {
    "SABA": Entry(lambda _, seed: SABA(BATCH, seed=seed), (3, 2), all_rows=True),
    "SRBA": Entry(lambda _, seed: SRBA(BATCH, seed=seed), (3, 2), all_rows=True),
    "AmIGO": Entry(lambda *_: AmIGO(10), (21, 2), lower_steps=10),
    "SOBA": Entry(lambda *_: SOBA(), (3, 2), (0.5, 0.5)),
    "MASOBA": Entry(lambda *_: MASOBA(0.3), (3, 2), (0.5, 0.5)),
    "FSLA": Entry(lambda *_: FSLA(), (4, 3), (0.5, 0.5)),
    "StocBiO": Entry(lambda *_: StocBiO(10), (21, 2), lower_steps=10),
    "SUSTAIN": Entry(lambda step, seed: SUSTAIN(10, step, seed=seed), (24, 4), (1 / 3, 1 / 3)),
    "MRBO": Entry(lambda step, _: MRBO(10, step), (24, 4), (1 / 3, 1 / 3)),
    "TTSA": Entry(lambda step, seed: TTSA(10, step, seed=seed), (11, 2), (0.4, 0.6), lower_steps=1),
    # their penalty begins at 1, where the penalised problem is another one; 22 + 11 as their code calls
    "F2SA": Entry(
        lambda *_: F2SA(10.0, growth=0.1, num_steps=10), (22, 11), (4 / 7, 4 / 7), lower_steps=10
    ),
}


@final
@dataclass(frozen=True)
class Run:
    """One run: what tells it from others."""

    solver: str
    seed: int
    step_size: float
    ratio: float
    calls: int

    def steps(self) -> int:
        """How many steps these oracle calls are."""
        return max(1, self.calls // (sum(ENTRIES[self.solver].calls) * BATCH))

    def settings(self) -> dict[str, Any]:
        """The arguments of `train` besides data and the number of steps."""
        entry, rates = ENTRIES[self.solver], (self.step_size, self.step_size / self.ratio)
        problem = Quadratics(self.seed)
        optimizers, schedulers = [], []
        for level, rate, power in zip(
            (problem.lower, problem.upper), rates, entry.powers, strict=True
        ):
            optimizers.append(torch.optim.SGD(level.parameters(), rate))
            schedulers.append(
                torch.optim.lr_scheduler.LambdaLR(
                    optimizers[-1], lambda t, power=power: (t + 1) ** -power
                )
            )
        upper, lower = problem.data()
        return {
            "problem": problem,
            "data": lower,
            "upper_data": upper,
            "solver": entry.make(self.step_size, self.seed),
            "lower_optimizer": optimizers[0],
            "upper_optimizer": optimizers[1],
            "lower_scheduler": schedulers[0],
            "upper_scheduler": schedulers[1],
            "lower_steps": entry.lower_steps,
            "batch_size": None if entry.all_rows else BATCH,
            "seed": self.seed,
        }

    def curve(self) -> Iterator[tuple[int, int, float, float]]:
        """Steps, oracle calls, processor seconds and the error, some points of the run."""
        settings, steps = self.settings(), self.steps()
        problem: Problem = settings["problem"]
        every, seconds = max(1, steps // POINTS), 0.0
        calls = sum(ENTRIES[self.solver].calls) * BATCH
        turns = train(**settings, num_steps=steps)
        for step in range(1, steps + 1):
            begun = time.process_time()
            next(turns)
            seconds += time.process_time() - begun
            if step % every == 0 or step == steps:
                yield step, step * calls, seconds, problem.error()

    def taken(self) -> Record:
        """The record of the run; the points of one that diverges end before."""
        points = []
        with warnings.catch_warnings(), contextlib.suppress(DivergenceError):
            warnings.simplefilter("ignore")
            for point in self.curve():
                points.append(point)
        return {**vars(self), "points": points, "floor": Quadratics(self.seed).truth.floor()}


def key(record: Record) -> tuple[Any, ...]:
    """What tells a run's record from others."""
    return tuple(record[name] for name in ("solver", "seed", "step_size", "ratio", "calls"))


def main() -> None:
    parser = command("convex", __doc__)
    parser.add_argument("--solvers", nargs="*", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=400_000)
    parser.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="draw the figure there, and end"
    )
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.output, options.draw / "convex.png")
        return
    torch.set_num_threads(1)
    path: Path = options.output
    done = {key(r): r for r in read(path)} if path.exists() else {}

    def look(run: Run) -> float:
        if (name := tuple(vars(run).values())) not in done:
            done[name] = run.taken()
            append(path, done[name])
            print(*name, *done[name]["points"][-1:], flush=True)
        points = done[name]["points"]
        whole = bool(points) and points[-1][0] == run.steps() and isfinite(points[-1][3])
        return float(points[-1][3]) if whole else inf

    best: dict[str, Run] = {}
    for solver in options.solvers:
        grid = [Run(solver, 0, s, r, options.calls // 4) for s, r in product(STEP_SIZES, RATIOS)]
        errors = [look(run) for run in grid]
        best[solver] = grid[min(range(len(grid)), key=errors.__getitem__)]
    for seed, run in product(range(1, 1 + options.seeds), best.values()):
        look(replace(run, seed=seed, calls=options.calls))


if __name__ == "__main__":
    main()
