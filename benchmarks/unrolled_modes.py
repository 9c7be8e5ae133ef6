"""Time and memory of the modes of `Unrolled`, in one run in which they take turns.

    python -m benchmarks.unrolled_modes [--rounds N]

The problem is the middle MLP of `benchmarks.compiled_speed` (784-256-256-10, batches of 128), unrolled
through SGD with momentum, in float32 on one thread. First every mode has to agree with reverse mode.
Memory is the most that torch's allocator holds during a hypergradient, iterates and graphs alike. Times
are seconds of the processor; ratios are medians over the rounds. How memory of forward mode grows is
measured on a problem with one upper variable: it takes a pass for each.

Records go to `benchmarks/results/unrolled_modes.jsonl`; `python -m benchmarks.table` prints them.
"""

import os
import time
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.autograd import forward_ad

from benchmarks.cases.compiled import Setting, setting
from benchmarks.measuring.records import Record, append, command
from benchmarks.measuring.turns import in_turns
from benchmarks.pages.unrolled_modes import unrolled_modes_table
from bilevel import Problem, Unrolled
from bilevel.check.costs import measure

MODES: tuple[Any, ...] = ("reverse", "recompute", "checkpoint", "mixed")
STEPS = (25, 100)
CPU = torch.device("cpu")


def peak(run: Any) -> int | None:
    costs, _ = measure({"run": run}, 1, CPU)
    return costs["run"].peak_bytes


def compare(s: Setting, steps: int, rounds: int) -> Record:
    """Time and memory of every mode at so many steps."""
    optimizer = torch.optim.SGD(s.problem.lower.parameters(), lr=0.05, momentum=0.9)
    runs = {
        mode: partial(
            Unrolled(steps, mode=mode).hypergradient,
            s.problem,
            s.batch,
            [s.batch],
            lower_optimizer=optimizer,
        )
        for mode in MODES
    }
    answers = {mode: run().grad for mode, run in runs.items()}
    for mode in MODES:
        torch.testing.assert_close(answers[mode], answers["reverse"], rtol=1e-3, atol=1e-6)
    seconds = in_turns(runs, rounds, warm_up=1, shuffle=True, clock=time.process_time)
    numbers = [
        {
            "name": mode,
            "ms": 1e3 * median(seconds[mode]) / steps,
            "ratio": median(a / b for a, b in zip(seconds[mode], seconds["reverse"], strict=True)),
            "peak_bytes": peak(runs[mode]),
        }
        for mode in MODES
    ]
    return {"steps": steps, "rounds": rounds, "load": os.getloadavg()[0], "numbers": numbers}


def products(s: Setting, rounds: int) -> Record:
    """One product with both second derivatives: reverse over reverse, and forward over reverse."""
    x, y = s.leaves()
    v = [torch.randn_like(p) for p in y]

    def gradient() -> Any:
        return torch.autograd.grad(s.lower_loss([p.detach() for p in x], y), y)

    def reverse() -> Any:
        grads = torch.autograd.grad(s.lower_loss(x, y), y, create_graph=True)
        return torch.autograd.grad(grads, [*x, *y], v)

    def forward() -> Any:
        with forward_ad.dual_level():
            pairs = zip(y, v, strict=True)
            duals = [forward_ad.make_dual(p.detach().requires_grad_(), t) for p, t in pairs]
            grads = torch.autograd.grad(s.lower_loss(x, duals), [*x, *duals])
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    runs = {
        "a gradient": gradient,
        "reverse over reverse": reverse,
        "forward over reverse": forward,
    }
    seconds = in_turns(runs, rounds, warm_up=1, repeats=5, shuffle=True, clock=time.process_time)
    numbers = [{"name": name, "ms": 1e3 * median(found)} for name, found in seconds.items()]
    return {"steps": 0, "rounds": rounds, "load": os.getloadavg()[0], "numbers": numbers}


def forward_memory(steps: int) -> Record:
    """The memory of forward mode with one upper variable and a network of 65,536 weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 256, generator=generator)
    weights = torch.randn(256, 256, generator=generator) / 16

    problem = Problem.from_functions(
        lambda x, y, _: (inputs @ y["w"]).tanh().square().mean(),
        lambda x, y, _: (
            (inputs @ y["w"] - 1).square().mean() + x["log_decay"].exp() * y["w"].square().sum()
        ),
        {"log_decay": torch.tensor(-5.0)},
        {"w": weights},
    )
    optimizer = torch.optim.SGD(problem.lower.parameters(), lr=0.05, momentum=0.9)
    solver = Unrolled(steps, mode="forward")
    found = peak(lambda: solver.hypergradient(problem, lower_optimizer=optimizer))
    numbers = [{"name": "forward", "peak_bytes": found}]
    return {"steps": steps, "forward": True, "load": os.getloadavg()[0], "numbers": numbers}


def main() -> None:
    parser = command("unrolled_modes", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    s = setting("middle", torch.float32)
    for record in (
        products(s, options.rounds),
        *(compare(s, steps, options.rounds) for steps in STEPS),
        *(forward_memory(steps) for steps in STEPS),
    ):
        append(options.output, record)
    print(unrolled_modes_table(options.output))


if __name__ == "__main__":
    main()
