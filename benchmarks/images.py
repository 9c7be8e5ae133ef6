r"""Image models by preset: trained, looked at, measured, side by side.

    python -m benchmarks.images mnist vae-mnist advil-mnist bism-mnist-small \
        --data mnist.npz --outside fashion=fashion_mnist.npz --features mnist_classifier
    python -m benchmarks.images cifar10 --data cifar10_train.zip --device cuda --compile \
        --precision bfloat16 --curve 20000

Every preset gets the seconds that it states (`--seconds` for another budget), on this machine, one
after the other; steps it did not reach are not taken. All are judged in one feature space, whose name
stands in the record: by default a classifier trained on the data set on the spot. With `--curve N` the
model is judged every N steps as well, on a copy, while the clock of training stands still.

Records go to `benchmarks/results/images.jsonl`, pictures to the folder of that name beside it,
`benchmarks/results/images/`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.records import append, command
from benchmarks.pages.images import images_table
from bilevel import DivergenceError, Step
from bilevel.choices import HOWS
from bilevel.methods import EBLVM, History
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork, default_features, load_classifier
from bilevel.methods.presets import PRESETS
from bilevel.methods.report.pictures import save_grid, save_reconstructions


def trained(
    name: str, images: Images, seen: FeatureNetwork, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one preset, evaluate it and draw it; the content of its record."""
    preset = PRESETS[name]
    model = preset.build(seed=options.seed).to(options.device)
    chosen = {"seed": options.seed, "max_seconds": options.seconds, "num_steps": options.steps}
    chosen |= {"precision": options.precision, "compile": options.compile}
    chosen |= {"evaluate_every": options.curve}
    given = {key: value for key, value in chosen.items() if value is not None}
    settings = preset.settings(**given)
    curve = {"evaluate": lambda copy: quick(copy, images, seen)} if options.curve else {}
    numbers, diverged, history = {}, None, History()
    try:
        history = model.fit(images.train, callbacks=[_shown], **settings.model_dump(), **curve)
        outside = {key: load(path, preset).test for key, path in options.outside}
        looked_at = {"features": seen, "outside": outside, "samples": options.samples}
        numbers = evaluate(model, images, options.seed, **looked_at)
        draw(model, images, options.output.with_suffix("") / name, options.seed)
    except DivergenceError as error:
        print(f"  {error}")
        diverged = error.step
    return {
        "preset": name,
        "method": type(model).__name__,
        "data": images.name,
        "features": seen.label,
        "statistics": model.statistics,
        "samples": options.samples,
        "steps": history.steps,
        "seconds": history.seconds,
        "steps_per_second": history.steps_per_second,
        "batch_size": settings.batch_size,
        "curve": history.evaluations,
        "seed": options.seed,
        "diverged": diverged,
        "results": numbers,
    }


def quick(model: EBLVM, images: Images, seen: FeatureNetwork) -> dict[str, float]:
    """A look at a model in training."""
    return evaluate(model, images, features=seen, samples=2000)


def draw(model: EBLVM, images: Images, stem: Path, seed: int) -> None:
    """Samples and reconstructions, in files that begin with the stem."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(model.device).manual_seed(seed)
    save_grid(model.sample(80, generator), stem.with_name(f"{stem.name}.png"), columns=16, scale=1)
    some = images.test[:16]
    try:
        copies: Tensor = model.reconstruct(some)
    except NotImplementedError:
        return
    save_reconstructions(some, copies, stem.with_name(f"{stem.name}_reconstructions.png"), scale=1)


def load(path: str, preset: Any) -> Images:
    """Images as the preset loads its own."""
    return load_images(path, **preset.loading)


def _shown(step: Step) -> None:
    if step.number % 200 == 0:
        losses = f"upper {float(step.upper_loss):.3f}"
        losses += "" if step.lower_loss is None else f" lower {float(step.lower_loss):.3f}"
        print(f"  step {step.number}, {step.seconds:.0f} s: {losses}", flush=True)


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def main() -> None:
    parser = command("images", __doc__)
    parser.add_argument("presets", nargs="+", choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--data", help="instead of the preset's own source")
    parser.add_argument("--outside", type=_named, nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--features", type=Path, help="a classifier that `bilevel features` wrote")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, help="and images of each set, at most")
    parser.add_argument("--curve", type=int, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--compile", nargs="?", const=True, choices=HOWS)
    options = parser.parse_args()
    first = PRESETS[options.presets[0]]
    images = load(options.data or first.data, first)
    seen = load_classifier(options.features) if options.features else default_features(images)
    print(f"{images.name}: {len(images.train):,} images; judged by {seen.label}")
    for name in options.presets:
        print(name)
        append(options.output, trained(name, images, seen, options), device=options.device)
    print(images_table(options.output))


if __name__ == "__main__":
    main()
