"""`bilevel features`: train the network by whose features samples are judged."""

import time
from pathlib import Path

from bilevel.cli.options import Parser, UsageError, integer
from bilevel.cli.placing import add_device, device_of
from bilevel.cli.progress import stages
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.features import (
    FeatureNetwork,
    classifier,
    inception,
    load_classifier,
    save_classifier,
)

SUMMARY = "train a classifier whose features samples are judged by"
WHICH = "what to judge samples by: a file of `bilevel features`, inception, or its weights (.pth)"
_EXAMPLES = """  bilevel features mnist.npz --side 32 --out mnist.safetensors
  bilevel features cifar10 --steps 10000 --width 64 --out cifar10.safetensors
  bilevel evaluate runs/mnist --features mnist.safetensors
"""
_STEPS, _WIDTH = 3000, 32


def command(arguments: list[str]) -> int:
    """Read the arguments, train, print the accuracy and save."""
    parser = Parser("features", SUMMARY, "DATA --out FILE [options]", _EXAMPLES)
    parser.add_argument("data", metavar="DATA", help="images with classes: a name or a path")
    parser.add_argument("--out", metavar="FILE", help="where to write")
    parser.add_argument(
        "--steps", type=integer, metavar="N", help=f"of training (default: {_STEPS})"
    )
    parser.add_argument(
        "--width",
        type=integer,
        metavar="N",
        help=f"channels of the first layer (default: {_WIDTH})",
    )
    parser.add_argument("--side", type=integer, metavar="N", help="bring the images to this side")
    parser.add_argument(
        "--channels", type=integer, metavar="1|3", help="make them grey or coloured"
    )
    parser.add_argument("--seed", type=integer, metavar="N", help="(default: 0)")
    add_device(parser, "cuda if there is one")
    args = parser.read(arguments)
    if "out" not in args:
        raise UsageError("--out FILE is missing: `bilevel features DATA --out FILE`")
    for name in ("steps", "width"):
        if getattr(args, name, 1) < 1:
            raise UsageError(f"`--{name}` must be positive, got {getattr(args, name)}")
    device = device_of(getattr(args, "device", None))
    given = {name: getattr(args, name) for name in ("side", "channels") if name in args}
    with stages() as stage:
        images = load_images(args.data, **given, report=stage)
    print(f"{images.name}: {len(images.train):,} training images, {images.note}")
    began, steps = time.monotonic(), getattr(args, "steps", _STEPS)

    def progress(step: int, loss: float) -> None:
        if step % max(1, steps // 10) < max(1, steps // 50):
            print(f"step {step:>6}/{steps}  loss {loss:.3f}  {time.monotonic() - began:.0f} s")

    with stages() as stage:
        network = classifier(
            images,
            num_steps=steps,
            width=getattr(args, "width", _WIDTH),
            seed=getattr(args, "seed", 0),
            device=device,
            progress=progress,
            report=stage,
        )
    save_classifier(network, args.out)
    print(f"{args.out}: {network.label}")
    print(f"use it: bilevel evaluate RUN --features {args.out}")
    return 0


def feature_network(name: str) -> FeatureNetwork:
    """A feature network by what it is called on the command line.

    Args:
        name: "inception", the path of Inception weights, or of a file that `bilevel features` wrote.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is something else.
        ImportError: if Inception's packages are missing.
    """
    if name.lower() == "inception":
        return inception()
    return inception(name) if Path(name).suffix == ".pth" else load_classifier(name)
