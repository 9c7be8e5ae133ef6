"""`bilevel evaluate`: measure a trained model again, or on other images."""

from bilevel.cli.options import Parser, choice, whole
from bilevel.cli.outcome import draw, report, show
from bilevel.cli.runs import existing, images_of, load_model
from bilevel.methods.evaluation import evaluate
from bilevel.methods.report import save_results

SUMMARY = "measure a trained model: samples, reconstructions, outliers"
_EXAMPLES = """  bilevel evaluate runs/demo-1
  bilevel evaluate runs/demo-1 --statistics batch
  bilevel evaluate runs/mnist --data fashion.npz
"""


def command(arguments: list[str]) -> int:
    """Read the arguments, measure, and keep the numbers if they are about the run's own data."""
    parser = Parser("evaluate", SUMMARY, "RUN [options]", _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--data", metavar="NAME|PATH", help="other images (default: those it was trained on)"
    )
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="(default: 0)")
    parser.add_argument(
        "--statistics",
        type=choice(["running", "batch"]),
        metavar="running|batch",
        help="batch-norm statistics: averages of the training, or those of the images at hand",
    )
    args = parser.read(arguments)
    run = existing(args.run)
    images = images_of(run, getattr(args, "data", None))
    model = load_model(run)
    model.statistics = getattr(args, "statistics", model.statistics)
    results = evaluate(model, images, args.seed)
    show(results)
    own = run.config().get("notes", {}).get("data")
    if own in (None, images.source):
        how = {"data": images.source, "seed": args.seed, "statistics": model.statistics}
        save_results(run, results, **how)
        draw(run, model, images, args.seed)
        print(f"\nreport: {report(run)}")
    return 0
