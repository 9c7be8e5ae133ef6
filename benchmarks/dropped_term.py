"""What the dropped best-response term is worth: the same problems under every solver.

    python -m benchmarks.dropped_term [--only NAME ...] [--solvers NAME ...] [--quick]

Every model's likelihood is a finite sum, so the judge is exact. Three seeds each. A problem is compiled
once and its seeds follow one another in one loop, from fresh variables and fresh optimizer states; the
tables are small enough to be trained side by side. Seconds are those of the processor, of one thread,
without compiling, judging and probing.

At about 15 steps a probe measures the response term on a fixed batch, whatever solver trains: its
norm relative to the kept term and the angle between them; and how far the kept term, and both
together, point along the exact gradient of what the upper level is to descend (for BiDVL the negative
log-likelihood, for BiSM the denoising loss on the free energy).

Records go to `benchmarks/results/dropped_term.jsonl`, one line per problem and solver;
`python -m benchmarks.dropped_page` draws the figures, `python -m benchmarks.table` prints the table.
"""

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.dropped import cases
from benchmarks.cases.dropped_case import SEEDS, Case
from benchmarks.measuring.records import append, command
from bilevel import Alternating, Batches, DivergenceError, Problem, Result, Solver, Step, train
from bilevel.tree import Tree

REFERENCE = "no lower level"
LOOKS = 15


def looks(steps: int) -> list[int]:
    """About 15 steps, evenly spread on a logarithmic scale, from 1 to the last."""
    return sorted({round(steps ** (i / (LOOKS - 1))) for i in range(LOOKS)})


def flat(tree: Tree, seed: int, blocks: int) -> Tensor:
    """The share of one of the seeds that are trained side by side."""
    return torch.cat([g.chunk(blocks)[seed].flatten() for g in tree.values()]).double()


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Of the angle between two vectors; `None` if one is 0 or not finite."""
    value = float(a @ b / (a.norm() * b.norm()))
    return value if math.isfinite(value) else None


def probe(case: Case, problem: Problem) -> list[dict[str, Any]]:
    """The response term at the problem's variables, for each seed they hold."""
    looked_at = case.probe(problem)
    upper_batch, lower_batch = case.probe_batch(looked_at)
    kept = Alternating().hypergradient(looked_at, upper_batch, [lower_batch]).grad
    whole = case.solver.hypergradient(looked_at, upper_batch, [lower_batch], throw=False)
    target = case.target(looked_at, upper_batch)
    blocks = SEEDS if case.together else 1
    found = []
    for seed in range(blocks):
        direct, total = flat(kept, seed, blocks), flat(whole.grad, seed, blocks)
        truth = flat({name: target[name] for name in kept}, seed, blocks)
        response = total - direct
        norms, angle = (direct.norm(), response.norm()), cosine(direct, response)
        if case.ahead:  # its direct term is at the end of the unrolled steps
            norms = (whole.stats.direct_norm.double(), whole.stats.response_norm.double())
            angle = between(norms[0], norms[1], total.norm())
        ratio = float(norms[1] / norms[0])
        found.append(
            {
                "ratio": ratio if math.isfinite(ratio) else None,
                "angle_cosine": angle,
                "kept_along": cosine(direct, truth),
                "whole_along": cosine(total, truth),
            }
        )
        if case.shares:
            shares = {n: float((g - kept[n]).norm() / g.norm()) for n, g in whole.grad.items()}
            found[-1]["shares"] = shares
    return found


def between(a: Tensor, b: Tensor, total: Tensor) -> float | None:
    """The cosine of the angle between two vectors from the norms of them and of their sum."""
    value = float((total**2 - a**2 - b**2) / (2 * a * b))
    return value if math.isfinite(value) else None


def restart(problem: Problem, fresh: Problem, step: Step) -> None:
    """Put the variables and the optimizers where a new run begins, in place."""
    problem.load_state_dict(fresh.state_dict())
    for optimizers in step.state.optimizers.values():
        for optimizer in optimizers:
            for held in optimizer.state.values():
                for value in held.values():
                    value.zero_()


def measured(loop: Iterator[Step]) -> tuple[Step, float]:
    """A step and the processor time it took."""
    start = time.process_time()
    step = next(loop)
    return step, time.process_time() - start


def run(case: Case, name: str, solver: Solver, steps: int) -> dict[str, Any]:
    """All seeds under one solver."""
    make = case.reference if name == REFERENCE and case.reference else case.make
    problem, data = make(0), case.data(0)
    lower = list(problem.lower.parameters())
    runs = 1 if case.together else SEEDS
    loop = train(
        problem,
        Batches(data, case.batch_size),
        upper_optimizer=torch.optim.Adam(problem.upper.parameters(), case.rate, case.betas),
        lower_optimizer=torch.optim.Adam(lower, case.rate, case.betas) if lower else None,
        num_steps=1 + runs * steps,
        solver=solver,
        lower_steps=case.lower_steps if lower else 0,
        throw=False,
        compile=case.compile,
    )
    step, preparation = measured(loop)  # compiles
    entry: dict[str, Any] = {"solver": name, "settings": repr(solver), "preparation": preparation}
    entry["runs"], entry["diverged"], failures = [], None, 0
    at = set(looks(steps))
    for seed in range(runs):
        restart(problem, make(seed), step)
        data.copy_(case.data(seed))
        points, seconds = [], 0.0
        for number in range(1, steps + 1):
            try:
                step, taken = measured(loop)
            except DivergenceError as error:
                entry["diverged"] = {"seed": seed, "step": number, "error": str(error)}
                break
            seconds += taken
            failures += step.hypergradient.result is not Result.SUCCESS
            if number in at:
                points.append({"step": number, "seconds": seconds, **look(case, name, problem)})
        entry["runs"].append(points)
        if entry["diverged"]:
            break
    entry["unsolved"] = failures / (runs * steps)  # share of linear systems without solution
    return entry


def look(case: Case, name: str, problem: Problem) -> dict[str, Any]:
    """Likelihoods and probes of the seeds at the current variables."""
    with torch.no_grad():
        likelihoods = case.judge(problem)
    probes = probe(case, problem) if name != REFERENCE else []
    return {"log_likelihood": likelihoods, "probe": probes}


def solvers_of(case: Case) -> dict[str, Solver]:
    """All that are compared, the problem without a lower level included."""
    return case.solvers if case.reference is None else {**case.solvers, REFERENCE: Alternating()}


def measure(case: Case, options: argparse.Namespace) -> None:
    """One problem under the solvers that were asked for."""
    steps = max(10, case.steps // 10) if options.quick else case.steps
    solvers = solvers_of(case)
    about = {
        "case": case.name,
        "title": case.title,
        "steps": steps,
        "lower_steps": case.lower_steps,
        "rate": case.rate,
        "ceiling": case.ceiling,
        "together": case.together,
    }
    for name in options.solvers or solvers:
        start = time.process_time()
        entry = run(case, name, solvers[name], steps)
        last = [points[-1] for points in entry["runs"] if points]
        summary = [[round(x, 4) for x in point["log_likelihood"]] for point in last]
        print(f"{case.name}, {name}: {summary}, {time.process_time() - start:.0f} s", flush=True)
        if not options.quick:
            append(options.output, {**about, **entry})


def main() -> None:
    parser = command("dropped_term", __doc__)
    parser.add_argument("--only", nargs="+", help="names of problems")
    parser.add_argument("--solvers", nargs="+", help="names of solvers")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the steps, nothing written"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = cases()
    for name in options.only or known:
        measure(known[name], options)


if __name__ == "__main__":
    main()
