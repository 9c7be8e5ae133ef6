"""The competitors of `benchmarks.compiled_speed` that are written in PyTorch, and what each computes.

Run as a module with the arguments KIND STEPS DTYPE, it compiles this library's hypergradient of the
small problem, without any cache, and prints the seconds of the first call and of a later one.
"""

import json
import os
import sys
import time
from typing import Any

import torch
import torch._inductor.config
import torchopt

from benchmarks.cases.compiled import setting
from benchmarks.competitors.hypergradients import (
    SGD,
    Competitor,
    by_hand_cg,
    by_hand_sgd,
    by_higher,
    ours,
    torchopt_functional,
    torchopt_implicit,
    torchopt_meta,
)
from benchmarks.measuring.worker import take
from bilevel import Compiled, ConjugateGradient, Implicit, Solver, Unrolled

OURS = "ours, compiled"
REFERENCE = "by hand, eager"


def steps_of(problem: str, kind: str) -> int:
    """Lower steps or steps of conjugate gradients."""
    return 10 if (problem, kind) == ("logistic", "implicit") else 20


def damping_of(problem: str) -> float:
    """The Hessian of an MLP is indefinite; that of the logistic regression needs no help."""
    return 0.0 if problem == "logistic" else 1.0


def settings_of(problem: str, kind: str) -> dict[str, Any]:
    """Everything that the competitors have to agree on."""
    numbers = {"steps": steps_of(problem, kind), "damping": damping_of(problem)}
    return {"problem": problem, "kind": kind, **numbers, **SGD}


def solver_of(kind: str, steps: int, damping: float) -> Solver:
    """This library's solver."""
    if kind == "unrolled":
        return Unrolled(steps)
    return Implicit(ConjugateGradient(max_steps=steps, rtol=None, damping=damping))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD)


def competitors(problem: str, kind: str) -> dict[str, Competitor]:
    """All in PyTorch, by name; what stands before the comma is the rival's name."""
    steps, damping = steps_of(problem, kind), damping_of(problem)
    solver = solver_of(kind, steps, damping)
    running = _sgd if kind == "unrolled" else None
    found = {OURS: ours(Compiled(solver), running), "ours, eager": ours(solver, running)}
    if kind == "implicit":
        return {
            **found,
            REFERENCE: by_hand_cg(steps, damping),
            "torchopt, custom_root": torchopt_implicit(steps, damping),
        }

    def rule() -> Any:
        return torchopt.sgd(**SGD, moment_requires_grad=True)

    return {
        **found,
        REFERENCE: by_hand_sgd,
        "torchopt, functional": torchopt_functional(rule, steps),
        "torchopt, MetaSGD": torchopt_meta(lambda net: torchopt.MetaSGD(net, **SGD), steps),
        "higher, innerloop_ctx": by_higher(_sgd, steps),
    }


def processor() -> float:
    """Seconds of the processor, those of the C++ compiler's processes included."""
    return sum(os.times()[:4])


def main() -> None:
    kind, steps, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # or processes of its own, which no clock counts
    solver = Compiled(solver_of(kind, int(steps), damping_of("small")))
    run = ours(solver, _sgd if kind == "unrolled" else None)(
        setting("small", getattr(torch, dtype))
    )
    wall, first = time.perf_counter(), processor()
    run()
    first, wall = processor() - first, time.perf_counter() - wall
    print(json.dumps({"first": first, "wall": wall, "later": take(run, 1).processor}))


if __name__ == "__main__":
    main()
