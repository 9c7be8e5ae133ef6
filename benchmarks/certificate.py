"""Does a certificate flag every mistake and no right answer, and is its cosine the true one?

    python -m benchmarks.certificate [--seeds 200] [--minutes 60] [--only mistakes|table|transformer]

Mistakes: `benchmarks/cases/certified.py`, each at every seed; all must be called suspect. Right answers:
the problems of the tests' contract table by every solver of it, at drawn variables; a certificate is a
false alarm if it says "suspect" where the exact derivative of the same procedure in float64 is within
the tolerance, and a miss if it says "certified" where it is not. The transformer: a million parameters,
hypergradients in bfloat16, the cosine that a certificate gives beside that to the hypergradient in
float64.

Records go to `benchmarks/results/certificate.jsonl`; `python -m benchmarks.table` prints them. Run it
from a checkout: the contract table belongs to the tests.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any, final

import torch
import torchopt

from benchmarks.cases.certified import FLAWS
from benchmarks.cases.contract import trials
from benchmarks.cases.transformer import Pretraining, text
from benchmarks.measuring.records import append, command
from bilevel import Oracles, Unrolled, certify

LENGTHS: tuple[tuple[int, float], ...] = ((5, 1e-2), (10, 3e-3), (10, 1e-2))
"""Steps of Adam on the transformer, and their size."""


@final
@dataclass(frozen=True)
class Said:
    """One certificate: what it said, whether that was right, what it took."""

    name: str
    outcome: str
    right: bool
    cause: bool
    seconds: float


def of_mistakes(seed: int) -> Iterator[Said]:
    """The certificates of all mistakes of a seed."""
    for name, make in FLAWS.items():
        flaw = make(seed)
        begun = time.process_time()
        found = flaw.certificate(seed)
        seconds = time.process_time() - begun
        named = flaw.says in found.cause
        yield Said(name, found.outcome, found.outcome == "suspect", named, seconds)


def of_the_table(seed: int) -> Iterator[Said]:
    """The certificates of a part of the contract table: over the seeds, all of it."""
    for trial in trials(seed):
        begun = time.process_time()
        found = trial.certificate(seed)
        seconds = time.process_time() - begun
        error = trial.error()
        wrong = error is not None and (
            (found.outcome == "suspect" and error <= 0.1)
            or (found.outcome == "certified" and error > 0.1)
        )
        yield Said(trial.solver_name, found.outcome, not wrong, True, seconds)


def many(look: Callable[[int], Iterator[Said]], seeds: int, until: float) -> dict[str, Any]:
    """All certificates of as many seeds as there is time for, counted by name."""
    said: list[Said] = []
    done = 0
    while done < seeds and time.time() < until:
        found = list(look(done))
        said += found
        done += 1
        for one in found:
            if not one.right:
                print(done - 1, one, flush=True)
    names = dict.fromkeys(one.name for one in said)
    return {"seeds": done, "rows": [_counted(name, said) for name in names]}


def _counted(name: str, said: list[Said]) -> dict[str, Any]:
    mine = [one for one in said if one.name == name]
    words = Counter(one.outcome for one in mine)
    return {
        "name": name,
        "trials": len(mine),
        **{word: words[word] for word in ("certified", "suspect", "inconclusive")},
        "wrong": sum(not one.right for one in mine),
        "named": sum(one.cause for one in mine),
        "seconds": mean(one.seconds for one in mine),
    }


def of_the_transformer(steps: int, rate: float) -> dict[str, Any]:
    """A certificate at a million parameters beside the hypergradient in float64."""
    problem, batches = Pretraining(0), (text(1, rows=2), [text(2, rows=2)])
    solver = Unrolled(steps, torchopt.adam(rate, eps_root=1e-8), mode="recompute")
    begun = time.perf_counter()
    low = solver.solve(Oracles(problem, *batches, precision=torch.bfloat16))
    took = time.perf_counter() - begun
    found = certify(problem, solver, *batches, precision=torch.bfloat16)
    exact = solver.hypergradient(problem.double(), *batches)
    mine, true = (
        torch.cat([g.double().reshape(-1) for g in grads.values()])
        for grads in (low.grad, exact.grad)
    )
    return {
        "name": f"{steps} steps of Adam, rate {rate:g}",
        "parameters": sum(p.numel() for p in problem.lower.parameters()),
        "cosine": found.cosine,
        "low": found.interval[0],
        "high": found.interval[1],
        "true": float(mine @ true / mine.norm() / true.norm()),
        "norm_ratio": found.norm_ratio,
        "true_ratio": float(mine.norm() / true.norm()),
        "outcome": found.outcome,
        "seconds": found.seconds,
        "hypergradient": took,
    }


def main() -> None:
    parser = command("certificate", __doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", choices=("mistakes", "table", "transformer"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    until = time.time() + 60 * options.minutes
    for kind, look in (("mistakes", of_mistakes), ("table", of_the_table)):
        if options.only in (None, kind):
            append(options.output, {"kind": kind, **many(look, options.seeds, until)})
    if options.only in (None, "transformer"):
        rows = [of_the_transformer(*length) for length in LENGTHS]
        append(options.output, {"kind": "transformer", "rows": rows})


if __name__ == "__main__":
    main()
