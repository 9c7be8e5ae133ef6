"""The toy of penalty methods from a thousand starts: steps until it stands still, and where.

    python -m benchmarks.toy_starts [--starts 1000] [--most 5000] [--only NAME ...]

The protocol of the authors' code: x from U[0, 3.5] and y from U[-5, 8.5], penalty 10, steps of size
0.1 / penalty in both levels, x put back into [0, 3], an end where the projected gradient is below 1e-5.
All starts are one problem of as many separate variables (`bilevel.check.problems.toy`), each with its
own count of steps. The released derivative of F in x divides by 1 + exp(2 - 4x)^2 where the true one has
(1 + exp(2 - 4x))^2; each solver is run with both, by a correction of its direction. That code also knows
the lower minimum, 0; here it is found by steps of an auxiliary variable: 1 or 20 at a time.

Records go to `benchmarks/results/toy_starts.jsonl`; `python -m benchmarks.table` prints them.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.records import append, command
from bilevel import GPBGD, VPBGD, Solver
from bilevel.check.problems.toy import PenaltyToy

PENALTY, RATE, TOLERANCE = 10.0, 0.1, 1e-5
SOLVERS: dict[str, Solver] = {
    "V-PBGD, 1 step": VPBGD(PENALTY, num_steps=1, step_size=0.1),
    "V-PBGD, 20 steps": VPBGD(PENALTY, num_steps=20, step_size=0.1),
    "G-PBGD": GPBGD(PENALTY),
}


def starts(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points drawn as the authors draw them."""
    x, y = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3.5 * x, 13.5 * y - 5


def slip(x: Tensor, y: Tensor) -> Tensor:
    """The released derivative of F in x, less the true one."""
    e = (2 - 4 * x).exp()
    return 4 * e * (4 * y + 2).cos() * (1 / (1 + e.square()) - 1 / (1 + e).square())


def run(solver: Solver, count: int, most: int, released: bool) -> dict[str, Any]:
    """All starts under one solver, until each stands still."""
    problem, rate, state = PenaltyToy(*starts(count)), RATE / PENALTY, None
    x, y = problem.upper["x"], problem.lower["y"]
    steps = torch.full((count,), -1)
    ends = torch.full((2, count), torch.nan, dtype=torch.float64)
    begun = time.process_time()
    for number in range(most + 1):
        answer = solver.hypergradient(problem, state=state)
        state, lower = answer.state, answer.lower_grad or {}
        of_x = answer.grad["x"] + (slip(x.detach(), y.detach()) if released else 0)
        with torch.no_grad():
            next_x, next_y = (x - rate * of_x).clamp(*problem.box), y - rate * lower["y"]
            left = torch.hypot(x - next_x, y - next_y) / rate
            new = (left <= TOLERANCE) & (steps < 0)
            steps[new], ends[0, new], ends[1, new] = number, x[new], y[new]
            if (steps >= 0).all():
                break
            x.copy_(next_x)
            y.copy_(next_y)
    return summary(steps, ends) | {"seconds": time.process_time() - begun}


def summary(steps: Tensor, ends: Tensor) -> dict[str, Any]:
    """Mean steps, mean distance to the lower solution, and where the starts end."""
    there = steps >= 0
    counts, (x, y) = steps[there].double(), ends[:, there]
    values, numbers = (x / 0.01).round().unique(return_counts=True)
    common = numbers.argsort(descending=True)[:4]
    return {
        "stopped": int(there.sum()),
        "steps": float(counts.mean()),
        "most": int(counts.max()),
        "residual": float((x + y).abs().mean()),
        "ends": {f"{float(values[i]) / 100:.2f}": int(numbers[i]) for i in common},
    }


def main() -> None:
    parser = command("toy_starts", __doc__)
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--most", type=int, default=5000, help="steps of a start, at most")
    parser.add_argument("--only", nargs="*", default=list(SOLVERS), choices=SOLVERS, metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        for released in (True, False):
            found = run(SOLVERS[name], options.starts, options.most, released)
            case = {"solver": name, "settings": repr(SOLVERS[name]), "released": released}
            append(options.output, {**case, "starts": options.starts, **found})
            print(case, found, flush=True)


if __name__ == "__main__":
    main()
