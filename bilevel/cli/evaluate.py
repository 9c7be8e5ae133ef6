"""`bilevel evaluate`: measure a trained model again, in another way or on other images."""

from pathlib import Path

from torch import Tensor

from bilevel.cli.features import WHICH, feature_network
from bilevel.cli.options import Parser, UsageError, choice, integer
from bilevel.cli.outcome import draw, measured, print_results, report
from bilevel.cli.progress import stages
from bilevel.cli.runs import add_model_option, existing, images_of, load_model
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.evaluation.features import default_features
from bilevel.methods.report.saved import save_results
from bilevel.reporting import Report

SUMMARY = "measure a trained model: samples, reconstructions, outliers"
_EXAMPLES = """  bilevel evaluate runs/demo-1
  bilevel evaluate runs/demo-1 --statistics batch
  bilevel evaluate runs/mnist --data fashion.npz
  bilevel evaluate runs/mnist --features mnist.safetensors
  bilevel evaluate runs/mnist --ood fashion.npz photos/
  bilevel evaluate runs/cifar10 --features inception --samples 50000 --ood svhn
"""
_STRANGERS = 10_000  # images of another set that are looked at, at most


def command(arguments: list[str]) -> int:
    """Read the arguments, measure, and keep the numbers if they are about the run's own data."""
    args = _parser().read(arguments)
    if args.seed < 0:
        raise UsageError(f"`--seed` must not be negative, got {args.seed}")
    if getattr(args, "samples", 2) < 2:
        raise UsageError(f"`--samples` must be at least 2, got {args.samples}")
    run = existing(args.run)
    features = feature_network(args.features) if "features" in args else None
    more = {"samples": args.samples} if "samples" in args else {}
    with stages() as stage:
        model = load_model(run, getattr(args, "model", None))
        images = images_of(run, getattr(args, "data", None), stage)
        model.statistics = getattr(args, "statistics", model.statistics)
        strangers = _strangers(args.ood, images, getattr(args, "samples", _STRANGERS), stage)
        seen = default_features(images, stage) if features is None else features
        about = {"features": seen, "outside": strangers, "report": stage, **more}
        results = measured(model, images, args.seed, **about)
    print_results(results, seen.label)
    if (stopped := run.stopped()) is not None:
        print(f"The training: {stopped}.")
    own = run.config().get("notes", {}).get("data")
    if own in (None, images.source):
        how = {
            "data": images.source,
            "seed": args.seed,
            "statistics": model.statistics,
            "features": seen.label,
            **more,
        }
        save_results(run, results, **how)
        with stages() as stage:
            draw(run, model, images, args.seed, seen, stage)
            stage("writing the report", 0, 0)
            page = report(run)
        print(f"\nreport: {page}")
    return 0


def _parser() -> Parser:
    parser = Parser("evaluate", SUMMARY, "RUN [options]", _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    add_model_option(parser)
    parser.add_argument(
        "--data", metavar="NAME|PATH", help="other images (default: those it was trained on)"
    )
    parser.add_argument("--seed", type=integer, metavar="N", default=0, help="(default: 0)")
    parser.add_argument(
        "--statistics",
        type=choice(["running", "batch"]),
        metavar="running|batch",
        help="batch-norm statistics: averages of the training, or those of the images at hand",
    )
    parser.add_argument(
        "--features",
        metavar="FILE|inception",
        help=f"{WHICH} (default: a small classifier trained on the spot)",
    )
    parser.add_argument(
        "--samples",
        type=integer,
        metavar="N",
        help="samples drawn, and images of each set looked at (default: at most 10000)",
    )
    parser.add_argument(
        "--ood",
        metavar="NAME|PATH",
        nargs="+",
        default=[],
        help="images that the energy should tell from the data",
    )
    return parser


def _strangers(sources: list[str], images: Images, most: int, stage: Report) -> dict[str, Tensor]:
    """Test images of other sets by name, in the shape of these."""
    channels, side, _ = images.shape
    found: dict[str, Tensor] = {}
    for source in sources:
        other = load_images(source, side=side, channels=channels, limit=most, report=stage)
        name = other.name if other.name not in found else str(Path(source))
        found[name] = other.test
    return found
