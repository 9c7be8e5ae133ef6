"""Annealed importance sampling here and in a straightforward NumPy loop, in one run on one thread.

    python -m benchmarks.ais [--quick] [--record]

100 chains, 15,000 steps of temperature, a restricted Boltzmann machine of 64 x 50 at its initial
weights. The loop is what one writes in NumPy with some care: all chains at once, one product of matrices
for both log-weights and the visibles, the faster of the two safe formulas for log(1 + exp x), random
numbers in the dtype that is needed. First all answers must agree within their standard errors; then
the competitors take turns, so that a busy machine slows all of them alike.

Records go to `benchmarks/results/ais.jsonl`.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from math import hypot, log, sqrt
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.peers import environment
from bilevel.methods.likelihood import annealed_importance_sampling, salakhutdinov_schedule
from bilevel.methods.models import RBM

RESULTS = Path(__file__).resolve().parent / "results" / "ais.jsonl"
VISIBLE, LATENT, CHAINS = 64, 50, 100
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Array = NDArray[Any]


class Answer(NamedTuple):
    log_z: float
    standard_error: float


class Weights(NamedTuple):
    """b, c and W as arrays."""

    b: Array
    c: Array
    w: Array


def softplus(x: Array) -> Array:
    """log(1 + exp x), faster than np.logaddexp(0, x): by a third in float32, a tenth in float64."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def numpy_loop(weights: Weights, betas: list[float], chains: int, seed: int) -> Answer:
    """From uniform bits up to the model."""
    b, c, w = weights
    rng = np.random.default_rng(seed)
    dtype = w.dtype

    def coins(p: Array) -> Array:
        return (rng.random(p.shape, dtype=dtype) < p).astype(dtype)

    h = coins(np.full((chains, len(c)), 0.5, dtype))
    log_w = np.zeros(chains)
    for start, end in pairwise(betas):
        field = b + h @ w.T
        log_w += (softplus(end * field) - softplus(start * field)).sum(1) + (end - start) * (h @ c)
        v = coins(sigmoid(end * field))
        h = coins(sigmoid(end * (c + v @ w)))
    top = log_w.max()
    ratios = np.exp(log_w - top)
    log_base = (len(b) + len(c)) * log(2)
    error = float(ratios.std(ddof=1) / ratios.mean()) / sqrt(chains)
    return Answer(float(top + log(ratios.mean())) + log_base, error)


def competitors(betas: torch.Tensor) -> dict[str, Callable[[int], Answer]]:
    """By name and dtype: a function of the seed."""
    found: dict[str, Callable[[int], Answer]] = {}
    for name, dtype in DTYPES.items():
        model = RBM(VISIBLE, LATENT).to(dtype)
        parts = (model.visible_bias, model.latent_bias, model.weight)
        weights = Weights(*(p.detach().numpy() for p in parts))

        def ours(seed: int, model: RBM = model) -> Answer:
            generator = torch.Generator().manual_seed(seed)
            found = annealed_importance_sampling(
                model, temperatures=betas, num_chains=CHAINS, generator=generator
            )
            return Answer(found.value, found.standard_error)

        def loop(seed: int, weights: Weights = weights) -> Answer:
            return numpy_loop(weights, betas.tolist(), CHAINS, seed)

        found[f"bilevel, {name}"] = ours
        found[f"NumPy, {name}"] = loop
    return found


def check(answers: dict[str, Answer]) -> None:
    """Every two answers are within four standard errors of their difference."""
    for name, one in answers.items():
        print(f"{name}: log Z = {one.log_z:.3f} +- {one.standard_error:.3f}")
        for other in answers.values():
            error = hypot(one.standard_error, other.standard_error)
            assert abs(one.log_z - other.log_z) < 4 * error, f"{name} computes something else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the temperatures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):  # NumPy's
        measure(options)


def measure(options: argparse.Namespace) -> None:
    betas = salakhutdinov_schedule()[:: 10 if options.quick else 1]
    runs = competitors(betas)
    answers = {name: run(0) for name, run in runs.items()}
    check(answers)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(seed)
            taken[name].append(time.perf_counter() - start)
    steps = CHAINS * (len(betas) - 1)
    numbers = []
    for name, seconds in taken.items():
        loop = taken[name.replace("bilevel", "NumPy")]
        numbers.append(
            {
                "name": name,
                "seconds": median(seconds),
                "chain_steps_per_second": steps / median(seconds),
                "times_numpy": median(a / b for a, b in zip(loop, seconds, strict=True)),
                **answers[name]._asdict(),
            }
        )
    for n in numbers:
        print(
            f"{n['name']}: {n['seconds']:.2f} s, {n['chain_steps_per_second']:,.0f} chain-steps per "
            f"second, {n['times_numpy']:.2f} times as fast as NumPy"
        )
    if options.record:
        config = {"visible": VISIBLE, "latent": LATENT, "chains": CHAINS, "steps": len(betas) - 1}
        where = environment()
        where["versions"]["numpy"] = version("numpy")
        record = {"config": {**config, "rounds": options.rounds}, **where, "numbers": numbers}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
