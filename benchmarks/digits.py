"""BiDVL on digits: what the demo's preset reaches, seed by seed, and how fast a step is.

    python -m benchmarks.digits [--seeds 0 1 2] [--speed-only]

Speed: this library, the plain loop of `benchmarks/competitors/transcription.py` on the same networks,
and the plain loop on networks of the published width (64 / 48 channels), in turns, in one run. The
machine should have nothing else to do. The settings of the preset were chosen on another split of the
same digits.

Records go to `benchmarks/results/digits.jsonl`; `python -m benchmarks.table` prints them.
"""

from statistics import median
from typing import Any

import torch

from benchmarks.competitors.plain_bidvl import same_networks
from benchmarks.measuring.records import append, command
from benchmarks.measuring.turns import Run, in_turns
from benchmarks.pages.digits import digits_table
from bilevel.methods import BiDVL, Training
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.presets import DIGITS

PUBLISHED_WIDTH = 64
PLAIN = Training(upper_lr=1e-3, lower_lr=1e-3, betas=(0.0, 0.9), lower_weight_decay=0.0)


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


def speed(steps: int, rounds: int) -> dict[str, float]:
    """Median steps per second over rounds in which the competitors take turns."""
    images = load_images(DIGITS.data).train
    latent_dim = DIGITS.model["latent_dim"]
    training = {**DIGITS.training, "num_steps": steps, "log_every": 10 * steps}

    def library() -> None:
        model().fit(images, **training)

    def loop(width: float) -> Run:
        plain = same_networks(model(width=width).train(), PLAIN)

        def run() -> None:
            for _ in range(steps):
                rows = torch.randint(len(images), (100,))
                plain.step(images[rows], torch.randn(100, latent_dim), torch.randn(100, latent_dim))

        return run

    competitors = {
        "this library": library,
        "plain loop, same networks": loop(DIGITS.model["width"]),
        "plain loop, published width": loop(PUBLISHED_WIDTH),
    }
    taken = in_turns(competitors, rounds, warm_up=1)
    return {name: steps / median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = command("digits", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--speed-only", action="store_true")
    options = parser.parse_args()
    content = {
        "preset": {"model": DIGITS.model, "training": DIGITS.training},
        "steps_per_second": speed(steps=60, rounds=5),
        "runs": [] if options.speed_only else [quality(seed) for seed in options.seeds],
    }
    append(options.output, content)
    print(digits_table(options.output))


if __name__ == "__main__":
    main()
