"""benchmark_bilevel's own solvers on a problem of ours, for `benchmarks.convex_jax`.

Run as a module, it answers the requests of `benchmarks.measuring.worker`: every run of a competitor is
so many more steps of its run. Solvers and losses are those of a checkout of benchmark_bilevel, which
needs benchopt; nothing of them is here.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measuring.worker import Arrays, Run, serve


def objective(arrays: Arrays) -> dict[str, Any]:
    """The losses as their data set makes them of matrices, and where the variables begin."""
    function = importlib.import_module("datasets.simulated").get_function
    found: dict[str, Any] = {}
    for theirs, ours in (("inner", "lower"), ("outer", "upper")):
        names = ("hessian", "upper_hessian", "cross", "lower_linear", "upper_linear")
        given = [jnp.asarray(arrays[f"{ours} {name}"]) for name in names]
        found[f"f_{theirs}"] = function(*given)
        found[f"n_{theirs}_samples"] = len(given[0])
    y, x = arrays["y"], arrays["x"]
    return {**found, "inner_var0": jnp.asarray(y), "outer_var0": jnp.asarray(x)}


def chunks(name: str, solver: Any, steps: int) -> Iterator[list[jax.Array]]:
    """A run in pieces of so many steps, as their `run` makes it; y and x after each."""
    state, taken = solver.init(), 0
    while True:
        if name == "SABA":
            memory, carry = state
            state = solver.one_epoch(carry, memory, steps)
            carry = state[1]
        elif name == "SRBA":
            carry = state = solver.one_epoch(state, steps, taken)
        else:
            carry = state = solver.one_epoch(state, steps)
        taken += steps
        yield jax.block_until_ready([carry["inner_var"], carry["outer_var"]])


def build(arrays: Arrays, settings: Mapping[str, Any]) -> dict[str, Run]:
    """The solvers asked for; each begins afresh."""
    if settings["folder"] not in sys.path:
        sys.path.insert(0, settings["folder"])
    runs: dict[str, Run] = {}
    for name, given in settings["solvers"].items():
        kind = importlib.import_module(f"solvers.{name.lower()}").Solver
        solver = kind.get_instance(eval_freq=settings["steps"], **given)
        solver.set_objective(**objective(arrays))
        runs[name] = chunks(name, solver, settings["steps"]).__next__
    return runs


if __name__ == "__main__":
    serve(build, {name: version(name) for name in ("jax", "jaxlib", "benchopt")})
