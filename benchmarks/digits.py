"""BiDVL on digits: what the demo's preset reaches, seed by seed, and how fast a step is.

    python -m benchmarks.digits [--seeds 0 1 2] [--speed-only]

Speed: this library, the plain loop of `benchmarks.transcription` on the same networks, and the plain
loop on networks of the published width (64 / 48 channels), in turns, in one run. The machine should have
nothing else to do. The settings of the preset were chosen on another split of the same digits.

Records go to `benchmarks/results/digits.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.peers import RESULTS, environment
from benchmarks.table import digits_table
from benchmarks.transcription import PlainBiDVL
from bilevel.methods import BiDVL
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.presets import DIGITS

PUBLISHED_WIDTH = 64


def model(seed: int = 0, **options: Any) -> BiDVL:
    """The preset's model."""
    return BiDVL.for_images((1, 8, 8), seed=seed, **{**DIGITS.model, **options})


def quality(seed: int) -> dict[str, Any]:
    """Train with the preset (its time limit included) and evaluate."""
    images = load_images(DIGITS.data)
    trained = model(seed)
    history = trained.fit(images.train, **{**DIGITS.training, "seed": seed})
    numbers = evaluate(trained, images, seed=seed)
    return {
        "seed": seed,
        "steps": history.steps,
        "seconds": history.seconds,
        "steps_per_second": history.steps_per_second,
        **numbers,
    }


def plain(width: float) -> PlainBiDVL:
    """The plain loop on the preset's kind of networks."""
    made = model(width=width).train()
    return PlainBiDVL(
        made.network("energy"),
        made.network("posterior"),
        made.network("generator"),
        torch.optim.Adam(made.upper.parameters(), 1e-3, (0.0, 0.9)),
        torch.optim.Adam(made.lower.parameters(), 1e-3, (0.0, 0.9)),
        made.ratio,
        made.latent_weight,
    )


def speed(steps: int, rounds: int) -> dict[str, float]:
    """Median steps per second over rounds in which the competitors take turns."""
    images = load_images(DIGITS.data).train
    latent_dim = DIGITS.model["latent_dim"]

    def library() -> None:
        model().fit(images, **{**DIGITS.training, "num_steps": steps, "log_every": 10 * steps})

    def loop(width: float) -> Callable[[], None]:
        made = plain(width)

        def run() -> None:
            for _ in range(steps):
                rows = torch.randint(len(images), (100,))
                made.step(images[rows], torch.randn(100, latent_dim), torch.randn(100, latent_dim))

        return run

    competitors = {
        "this library": library,
        "plain loop, same networks": loop(DIGITS.model["width"]),
        "plain loop, published width": loop(PUBLISHED_WIDTH),
    }
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            taken[name].append(steps / (time.perf_counter() - start))
    return {name: median(rates[1:]) for name, rates in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--speed-only", action="store_true")
    options = parser.parse_args()
    record: dict[str, Any] = {"preset": {"model": DIGITS.model, "training": DIGITS.training}}
    record.update(environment())
    record["steps_per_second"] = speed(steps=60, rounds=6)
    record["runs"] = [] if options.speed_only else [quality(seed) for seed in options.seeds]
    path = RESULTS.with_name("digits.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(digits_table(path))


if __name__ == "__main__":
    main()
