"""Our stochastic solvers beside benchmark_bilevel's own, in JAX, on the same quadratic in one run.

    python -m benchmarks.convex_jax PYTHON FOLDER [--solvers SABA SRBA] [--compile]

FOLDER is a checkout of https://github.com/benchopt/benchmark_bilevel, PYTHON the interpreter of an
environment with jax and benchopt. Both sides have the same samples, as matrices, the same start, step
sizes and batches, single precision and one thread of the same core, and take turns of 64 steps. First,
on all samples, their iterates must be the same. Minibatches are each side's own.

Records go to `benchmarks/results/convex_jax.jsonl`; `python -m benchmarks.table` prints them.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases.quadratics import Quadratics
from benchmarks.compiled_speed import ONE_THREAD, one_core
from benchmarks.convex import BATCH, ENTRIES
from benchmarks.measuring.records import append, command
from benchmarks.measuring.worker import Worker
from bilevel import SABA, SRBA, Solver, train

CHUNK, GOAL = 64, 1e-9
AGREE = 1e-3  # single precision, after some steps on all samples
MAKE: dict[str, Callable[[int], Solver]] = {"SABA": SABA, "SRBA": SRBA}
SETTINGS = {  # step size of y at the start, its ratio to that of x, steps at most
    "SABA": (0.3, 1.0, 1600),
    "SRBA": (0.3, 1.0, 1600),
    "SOBA": (1.0, 1.0, 1024),
    "AmIGO": (0.3, 0.3, 320),
}


@final
class Ours:
    """A run of ours in pieces.

    Args:
        name: the solver.
        batch: rows of a minibatch.
        compile: whether `train` makes graphs.
    """

    def __init__(self, name: str, batch: int, *, compile: bool) -> None:
        step, ratio, _ = SETTINGS[name]
        entry, problem = ENTRIES[name], Quadratics(1, "matrices")
        lower = torch.optim.SGD(problem.lower.parameters(), step)
        upper = torch.optim.SGD(problem.upper.parameters(), step / ratio)
        schedulers = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda t, power=power: (t + 1) ** -power)
            for o, power in zip((upper, lower), reversed(entry.powers), strict=True)
        ]
        of_upper, of_lower = problem.data()
        self.problem = problem
        self.steps, self.seconds = 0, 0.0
        self._turns = train(
            problem,
            of_lower,
            upper_data=of_upper,
            solver=MAKE[name](batch) if entry.all_rows else entry.make(step, 0),
            lower_optimizer=lower,
            upper_optimizer=upper,
            upper_scheduler=schedulers[0] if any(entry.powers) else None,
            lower_scheduler=schedulers[1] if any(entry.powers) else None,
            lower_steps=entry.lower_steps,
            batch_size=None if entry.all_rows else batch,
            num_steps=10**6,
            compile=compile,
        )

    def run(self, steps: int) -> Tensor:
        """So many more steps; x after them."""
        begun = time.process_time()
        for _ in range(steps):
            next(self._turns)
        self.seconds += time.process_time() - begun
        self.steps += steps
        return self.problem.upper["x"].detach()


def difference(name: str, worker: Worker, arrays: dict[str, Any], folder: Path) -> float:
    """How far the two sides are apart after 8 steps on all samples, relatively."""
    step, ratio, _ = SETTINGS[name]
    rows = len(arrays["lower cross"])
    theirs = {"step_size": step, "outer_ratio": ratio, "batch_size": rows}
    worker.prepare(arrays, {"folder": str(folder), "steps": 8, "solvers": {name: theirs}})
    found = worker.first(name)[1][1]
    x = Ours(name, rows, compile=False).run(8).numpy()
    return float(np.linalg.norm(x - found) / np.linalg.norm(x))


def compared(
    name: str, worker: Worker, arrays: dict[str, Any], folder: Path, *, compile: bool
) -> dict[str, Any]:
    """Both runs, in turns, until both errors are below the goal."""
    apart = difference(name, worker, arrays, folder)
    if not apart < AGREE:
        raise SystemExit(f"{name}: the two sides differ by {apart:.1e} on all samples")
    step, ratio, most = SETTINGS[name]
    given = {"step_size": step, "outer_ratio": ratio, "batch_size": BATCH}
    made = worker.prepare(arrays, {"folder": str(folder), "steps": CHUNK, "solvers": {name: given}})
    ours = Ours(name, BATCH, compile=compile)
    ours.run(2)  # what is made once; their first chunk is compiled before, too
    ours.seconds = 0.0
    curves: dict[str, list[Any]] = {"ours": [], "theirs": []}
    seconds, truth, steps = 0.0, ours.problem.truth, 0
    while steps < most:
        steps += CHUNK
        x = ours.run(CHUNK)
        curves["ours"].append((ours.steps, ours.seconds, truth.error(x)))
        taken, found = worker.first(name)
        seconds += taken.processor
        curves["theirs"].append((steps, seconds, truth.error(torch.as_tensor(found[1]))))
        if all(curve[-1][2] < GOAL for curve in curves.values()):
            break
    return {
        "solver": name,
        "compile": compile,
        "step_size": step,
        "ratio": ratio,
        "goal": GOAL,
        "difference": apart,
        "curves": curves,
        "jax_versions": made["versions"],
    }


def main() -> None:
    parser = command("convex_jax", __doc__)
    parser.add_argument("python", type=Path, help="interpreter of the environment with JAX")
    parser.add_argument("folder", type=Path, help="checkout of benchmark_bilevel")
    parser.add_argument("--solvers", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--compile", action="store_true", help="our steps as graphs")
    options = parser.parse_args()
    one_core()
    warnings.simplefilter("ignore")
    problem = Quadratics(1, "matrices")
    arrays = {"y": problem.lower["y"].detach().numpy(), "x": problem.upper["x"].detach().numpy()}
    for level, rows in zip(("lower", "upper"), problem.rows, strict=True):
        arrays |= {f"{level} {name}": t.numpy() for name, t in rows.items()}
    worker = [str(options.python), "-m", "benchmarks.in_jax.single_loop"]
    with Worker(worker, ONE_THREAD) as started:
        for name in options.solvers:
            found = compared(name, started, arrays, options.folder, compile=options.compile)
            append(options.output, found)
            print(name, *(curve[-1] for curve in found["curves"].values()), flush=True)


if __name__ == "__main__":
    main()
