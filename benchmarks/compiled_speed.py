"""Compiled hypergradients beside JAX, jaxopt, optimistix, torchopt, higher and a loop by hand.

    python -m benchmarks.compiled_speed [--only PROBLEM ...] [--dtype NAME ...] [--quick]

Three problems: the small MLP of `benchmarks.peers`, a middle MLP (784-256-256-10, batches of 128), a
logistic regression with a weight decay per feature (500 x 50). Two hypergradients: through 20 steps of
SGD with momentum, and implicit with conjugate gradients. JAX lives in an environment of its own, which
`make jax` builds, and in a process of its own; both processes share one core and take turns.

Before anything is timed, every answer has to agree with the loop by hand in float64: to 1e-10 in
float64 and to 1e-5 in float32, in the norm. Then come rounds in which everyone has a turn. Times are
seconds of the processor, so that a busy machine slows them little; those on the clock are in the
records. Last, this library is compiled in fresh processes without any cache.

Records go to `benchmarks/results/compiled_speed.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch

from benchmarks.cases.compiled import MAKERS, Setting, setting
from benchmarks.competitors.compiled import OURS, REFERENCE, competitors, settings_of
from benchmarks.measuring.records import Record, append, command, environment
from benchmarks.measuring.worker import ROOT, Taken, Worker, take
from benchmarks.pages.compiled import compiled_text

Taker: TypeAlias = Callable[[int], Taken]
KINDS = ("unrolled", "implicit")
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
COLD = (("implicit", 20), ("unrolled", 10), ("unrolled", 100), ("unrolled", 1000))
JAX = ROOT / ".venv-jax" / "bin" / "python"
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}


def one_core() -> None:
    """Keep this process and those it starts on one core, with one thread."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def jax_worker(python: Path, dtype: str) -> Worker:
    """The process that computes in JAX."""
    module = "benchmarks.in_jax.hypergradients"
    precision = {"JAX_ENABLE_X64": str(int(dtype == "float64"))}
    return Worker([str(python), "-m", module], {**ONE_THREAD, **precision})


def vector(answer: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in answer])


def agree(
    answers: Mapping[str, np.ndarray], truth: np.ndarray, tolerance: float
) -> dict[str, float]:
    """How far each answer is from the truth, relative to its norm.

    Raises:
        RuntimeError: if one is farther than the tolerance: it computes something else.
    """
    apart = {
        name: float(np.linalg.norm(answer - truth) / np.linalg.norm(truth))
        for name, answer in answers.items()
    }
    wrong = [f"{name}: {d:.1e}" for name, d in apart.items() if not d <= tolerance]
    if wrong:
        raise RuntimeError(
            f"nothing was timed: answers differ from `{REFERENCE}` in float64 by more than "
            f"{tolerance:.0e}, relative to its norm: {'; '.join(wrong)}"
        )
    return apart


def in_rounds(takers: Mapping[str, Taker], rounds: int, seconds: float) -> dict[str, list[Taken]]:
    """Everyone's times, one turn of about so many seconds per round, in another order every round."""
    counts = {}
    for name, taker in takers.items():
        taker(1)
        counts[name] = max(1, round(seconds / taker(2).processor))
    taken: dict[str, list[Taken]] = {name: [] for name in takers}
    order = list(takers)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            taken[name].append(takers[name](counts[name]))
    return taken


def compare(s: Setting, kind: str, dtype: str, worker: Worker, rounds: int) -> Record:
    """Check everyone's answer to one problem, then take the time."""
    settings = settings_of(s.name, kind)
    made = worker.prepare(s.arrays(), settings)
    torch_side = competitors(s.name, kind)
    runs = {name: make(s) for name, make in torch_side.items()}
    answers = {name: vector([g.detach() for g in run()]) for name, run in runs.items()}
    firsts: dict[str, float] = {}
    for name in made["names"]:
        taken, answer = worker.first(name)
        firsts[name], answers[name] = taken.processor, vector(answer)
    truth = vector([g.detach() for g in torch_side[REFERENCE](s.to(torch.float64))()])
    apart = agree(answers, truth, TOLERANCES[dtype])
    here: dict[str, Taker] = {
        name: lambda repeats, run=run: take(run, repeats)  # type: ignore[misc]
        for name, run in runs.items()
    }
    there: dict[str, Taker] = {
        name: lambda repeats, name=name: worker.run(name, repeats)  # type: ignore[misc]
        for name in made["names"]
    }
    times = in_rounds({**here, **there}, rounds, 0.02)
    numbers = [
        {
            "name": name,
            "ms": 1e3 * median(one.processor for one in found),
            "wall_ms": 1e3 * median(one.wall for one in found),
            "ratio": median(
                a.processor / b.processor for a, b in zip(found, times[OURS], strict=True)
            ),
            "first_seconds": firsts.get(name),
            "difference": apart[name],
        }
        for name, found in times.items()
    ]
    about = {"dtype": dtype, "rounds": rounds, "load": os.getloadavg()[0]}
    return {**settings, **about, "jax_versions": made["versions"], "numbers": numbers}


def cold(kind: str, steps: int, dtype: str) -> Record:
    """What compiling costs this library in a fresh process, for the small problem."""
    program = [sys.executable, "-m", "benchmarks.competitors.compiled", kind, str(steps), dtype]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(program[1:])} failed:\n{done.stderr.strip()[-2000:]}")
    about = {"problem": "small", "kind": kind, "dtype": dtype, "load": os.getloadavg()[0]}
    return {**about, "cold_steps": steps, **json.loads(done.stdout.splitlines()[-1])}


def said(record: Record) -> str:
    """A record in some lines, while the others are still at work."""
    head = f"{record['problem']}, {record['kind']}, {record['dtype']}"
    if "cold_steps" in record:
        return f"{head}: first of {record['cold_steps']} steps, {record['first']:.1f} s"
    lines = [f"  {n['name']:<28} {n['ms']:9.3f} ms {n['ratio']:8.2f}" for n in record["numbers"]]
    return "\n".join([f"{head} (ours, compiled = 1)", *lines])


def measure(options: argparse.Namespace) -> list[Record]:
    """All records of a run, each written as soon as it is there."""
    records: list[Record] = []

    def keep(content: Record) -> None:
        print(said(content), flush=True)
        records.append({**content, **environment()})
        if not options.quick:
            append(options.output, content)

    for dtype in options.dtype:
        with jax_worker(options.jax, dtype) as worker:
            for name in options.only:
                s = setting(name, getattr(torch, dtype))
                rounds = 5 if options.quick or name == "middle" else 15
                for kind in KINDS:
                    keep(compare(s, kind, dtype, worker, rounds))
    if "small" in options.only:
        for kind, steps in COLD:
            keep(cold(kind, steps, "float32"))
    return records


def main() -> None:
    parser = command("compiled_speed", __doc__)
    parser.add_argument("--only", nargs="+", choices=MAKERS, help="problems (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCES, help="precisions (default: both)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, nothing written; by default without the middle MLP and float64",
    )
    parser.add_argument("--jax", type=Path, default=JAX, metavar="PYTHON", help="JAX's interpreter")
    options = parser.parse_args()
    if not options.jax.exists():
        raise SystemExit(f"JAX is missing, there is no `{options.jax}`; run `make jax` first")
    options.only = options.only or [n for n in MAKERS if n != "middle" or not options.quick]
    options.dtype = options.dtype or ["float32"] + ["float64"] * (not options.quick)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    one_core()
    print(compiled_text(measure(options)))


if __name__ == "__main__":
    main()
