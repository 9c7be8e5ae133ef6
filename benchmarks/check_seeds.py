"""Does `check_hypergradient` ever call a right answer wrong, or miss a mistake? Many seeds tell.

    python -m benchmarks.check_seeds [--seeds 200] [--workers 2] [--minutes 60]

Right answers: the problems of `benchmarks/cases/right_answers.py`, each with its solvers in turn from
seed to seed. Mistakes: the same kinds of problem with a response that is stopped, scaled, reversed,
stale or taken elsewhere; all of them change a variable's hypergradient by a thousandth or more, and
each must be called wrong. Three directions, everything else as by default. Seeds that are not begun
when the minutes are over are left out, and the record says how many there were.

Records go to `benchmarks/results/check_seeds.jsonl`; `python -m benchmarks.table` prints them.
"""

import math
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from statistics import mean
from typing import Any, final

import torch

from benchmarks.cases.mistakes import MISTAKES
from benchmarks.cases.right_answers import RIGHT
from benchmarks.measuring.records import append, command
from bilevel import check_hypergradient


@final
@dataclass(frozen=True)
class Outcome:
    """What the check said in one trial."""

    name: str
    right: bool
    seed: int
    verdict: str
    error: float
    seconds: float

    @property
    def word(self) -> str:
        return self.verdict.partition(":")[0]


def attempt(name: str, right: bool, seed: int) -> Outcome:
    trial = (RIGHT if right else MISTAKES)[name](seed)
    start = time.process_time()
    check = check_hypergradient(
        trial.problem,
        trial.solver,
        trial.upper_batch,
        [trial.lower_batch],
        lower_optimizer=trial.optimizer,
        num_directions=3,
    )
    seconds = time.process_time() - start
    return Outcome(name, right, seed, check.verdict, check.relative_error, seconds)


def attempts(seed: int, until: float = math.inf) -> list[Outcome]:
    """All trials of one seed; none if it is too late."""
    if time.time() > until:
        return []
    torch.set_num_threads(1)
    return [
        attempt(name, right, seed)
        for right, table in ((True, RIGHT), (False, MISTAKES))
        for name in table
    ]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the check said of one kind of trial."""
    right = outcomes[0].right
    wanted = ("agrees", "inconclusive") if right else ("disagrees",)
    return {
        "name": outcomes[0].name,
        "right": right,
        **Counter(outcome.word for outcome in outcomes),
        "extreme": (max if right else min)(outcome.error for outcome in outcomes),
        "seconds": mean(outcome.seconds for outcome in outcomes),
        "wrong": [f"seed {o.seed}: {o.verdict}" for o in outcomes if o.word not in wanted],
    }


def main() -> None:
    parser = command("check_seeds", __doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    found: dict[tuple[str, bool], list[Outcome]] = defaultdict(list)
    task = partial(attempts, until=time.time() + 60 * options.minutes)
    done = 0
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for outcomes in pool.map(task, range(options.seeds)):
            done += bool(outcomes)
            for outcome in outcomes:
                found[outcome.name, outcome.right].append(outcome)
                if outcome.right == (outcome.word == "disagrees"):
                    print(outcome, flush=True)
            print(f"{done} seeds", flush=True)
    trials = [summary(outcomes) for outcomes in found.values()]
    append(options.output, {"seeds": done, "trials": trials})


if __name__ == "__main__":
    main()
