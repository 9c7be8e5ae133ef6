"""`bilevel sample`: draw images from a trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.cli.options import Parser, UsageError, integer
from bilevel.cli.progress import stages
from bilevel.cli.runs import add_model_option, existing, load_model
from bilevel.files import replacing
from bilevel.methods import EBLVM
from bilevel.methods.report.pictures import save_grid

SUMMARY = "draw images from a trained model"
_EXAMPLES = """  bilevel sample runs/demo-1
  bilevel sample runs/demo-1 -n 1000 --out samples.npz --seed 1
  bilevel sample runs/mine --model mine.networks:make
"""


def command(arguments: list[str]) -> int:
    """Read the arguments, draw and write."""
    parser = Parser("sample", SUMMARY, "RUN [options]", _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-n", dest="n", type=integer, metavar="N", default=64, help="how many (default: 64)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="a .png picture, or an .npz file with an array `images` in [-1, 1], of tables `rows` "
        "(default: RUN/drawn.png, of tables RUN/drawn.npz)",
    )
    add_model_option(parser)
    parser.add_argument("--seed", type=integer, metavar="N", default=0, help="(default: 0)")
    args = parser.read(arguments)
    run = existing(args.run)
    target = Path(args.out) if "out" in args else run.folder / "drawn.png"
    if target.suffix.lower() not in (".png", ".npz"):
        raise UsageError(f"`--out` takes a file that ends in .png or .npz, got `{target}`")
    if args.n < 1:
        raise UsageError(f"`-n` must be positive, got {args.n}")
    if args.seed < 0:
        raise UsageError(f"`--seed` must not be negative, got {args.seed}")
    model = load_model(run, getattr(args, "model", None))
    with stages() as stage:
        stage(f"drawing {args.n:,} samples", 0, 0)
        samples = _drawn(model, args.n, args.seed)
        if samples.dim() != 4:
            target = _of_rows(target, samples, given="out" in args)
        stage(f"writing {target}", 0, 0)
        _write(samples, target)
    print(target)
    return 0


def _drawn(model: EBLVM, n: int, seed: int) -> Tensor:
    """N samples.

    Raises:
        UsageError: if the model cannot be sampled.
    """
    try:
        return model.sample(n, torch.Generator().manual_seed(seed))
    except NotImplementedError as error:
        raise UsageError(f"this `{type(model).__name__}` cannot be sampled: {error}") from None


def _of_rows(target: Path, samples: Tensor, *, given: bool) -> Path:
    """Where samples that are no images go.

    Raises:
        UsageError: if a picture of them was asked for.
    """
    if given and target.suffix.lower() == ".png":
        raise UsageError(
            f"this model draws rows of shape {tuple(samples.shape[1:])}, which make no picture; give an "
            "`.npz` file to `--out`"
        )
    return target.with_suffix(".npz")


def _write(samples: Tensor, target: Path) -> None:
    if target.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {"images" if samples.dim() == 4 else "rows": samples.numpy()}
        with replacing(target) as file:
            np.savez_compressed(file.raw, **arrays)
    else:
        save_grid(samples, target)
