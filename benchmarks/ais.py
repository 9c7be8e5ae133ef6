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
from collections.abc import Callable
from math import hypot
from statistics import median

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.competitors.annealing import Answer, Weights, numpy_loop
from benchmarks.measuring.records import append, command
from benchmarks.measuring.turns import in_turns
from bilevel.methods import RBM
from bilevel.methods.likelihood import annealed_importance_sampling, salakhutdinov_schedule

VISIBLE, LATENT, CHAINS = 64, 50, 100
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def competitors(betas: torch.Tensor) -> dict[str, Callable[[], Answer]]:
    """By name and dtype."""
    found: dict[str, Callable[[], Answer]] = {}
    for name, dtype in DTYPES.items():
        model = RBM(VISIBLE, LATENT).to(dtype)
        found[f"bilevel, {name}"] = ours(model, betas)
        found[f"NumPy, {name}"] = by_hand(model, betas)
    return found


def ours(model: RBM, betas: torch.Tensor) -> Callable[[], Answer]:
    generator = torch.Generator().manual_seed(0)

    def run() -> Answer:
        found = annealed_importance_sampling(
            model, temperatures=betas, num_chains=CHAINS, generator=generator
        )
        return Answer(found.value, found.standard_error)

    return run


def by_hand(model: RBM, betas: torch.Tensor) -> Callable[[], Answer]:
    parts = (model.visible_bias, model.latent_bias, model.weight)
    weights = Weights(*(p.detach().numpy() for p in parts))
    rng = np.random.default_rng(0)
    return lambda: numpy_loop(weights, betas.tolist(), CHAINS, rng)


def check(answers: dict[str, Answer]) -> None:
    """Every two answers are within four standard errors of their difference."""
    for name, one in answers.items():
        print(f"{name}: log Z = {one.log_z:.3f} +- {one.standard_error:.3f}")
        for other in answers.values():
            error = hypot(one.standard_error, other.standard_error)
            assert abs(one.log_z - other.log_z) < 4 * error, f"{name} computes something else"


def measure(options: argparse.Namespace) -> None:
    betas = salakhutdinov_schedule()[:: 10 if options.quick else 1]
    runs = competitors(betas)
    answers = {name: run() for name, run in runs.items()}
    check(answers)
    taken = in_turns(runs, options.rounds)
    steps = CHAINS * (len(betas) - 1)
    numbers = []
    for name, seconds in taken.items():
        loop = taken[name.replace("bilevel", "NumPy")]
        n = {
            "name": name,
            "seconds": median(seconds),
            "chain_steps_per_second": steps / median(seconds),
            "times_numpy": median(a / b for a, b in zip(loop, seconds, strict=True)),
            **answers[name]._asdict(),
        }
        numbers.append(n)
        print(
            f"{name}: {n['seconds']:.2f} s, {n['chain_steps_per_second']:,.0f} chain-steps per "
            f"second, {n['times_numpy']:.2f} times as fast as NumPy"
        )
    if options.record:
        config = {"visible": VISIBLE, "latent": LATENT, "chains": CHAINS, "steps": len(betas) - 1}
        content = {"config": {**config, "rounds": options.rounds}, "numbers": numbers}
        append(options.output, content, also=["numpy"])


def main() -> None:
    parser = command("ais", __doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the temperatures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):  # NumPy's
        measure(options)


if __name__ == "__main__":
    main()
