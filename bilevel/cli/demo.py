"""`bilevel demo`: a first look, in about two minutes."""

from bilevel import Alternating
from bilevel.cli.options import Parser, check_training, integer, number
from bilevel.cli.placing import device_of
from bilevel.cli.running import Plan, carry_out
from bilevel.cli.runs import fresh, spelled
from bilevel.methods import BiDVL
from bilevel.methods.data.images import load_images
from bilevel.methods.presets import DIGITS
from bilevel.methods.training.run import Run

SUMMARY = "train a small model on handwritten digits and show what it learned"
_EXAMPLES = """  bilevel demo
  bilevel demo --seed 1 --run runs/second
"""
_ABOUT = """\
BiDVL learns three networks at once: an energy that is low on images like the data (upper level), and
a generator and a posterior that follow it (lower level). The data: {n:,} handwritten digits of 8x8
pixels; {held} more are held out to judge by."""


def command(arguments: list[str]) -> int:
    """Read the arguments, train the demo's model and show it."""
    parser = Parser("demo", SUMMARY, "[options]", _EXAMPLES)
    parser.add_argument(
        "--run", metavar="FOLDER", help="where to write (default: runs/demo-NUMBER)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    parser.add_argument(
        "--seed", type=integer, metavar="N", help="seed of everything random (default: 0)"
    )
    steps, seconds = DIGITS.training["num_steps"], DIGITS.training["max_seconds"]
    parser.add_argument("--num-steps", type=integer, metavar="N", help=f"(default: {steps})")
    parser.add_argument(
        "--max-seconds", type=number, metavar="X", help=f"time for training (default: {seconds:g})"
    )
    args = parser.read(arguments)
    names = ("seed", "num_steps", "max_seconds")
    given = {name: getattr(args, name) for name in names if name in args}
    settings = {**DIGITS.training, **given}
    check_training(settings)
    images = load_images(DIGITS.data)
    print(_ABOUT.format(n=len(images.train), held=len(images.test)))
    device = device_of("cpu")  # so small a model is no faster anywhere else
    model = BiDVL.for_images(images.shape, seed=settings.get("seed", 0), **DIGITS.model)
    folder = args.run if "run" in args else fresh("demo")
    overwrite = "overwrite" in args
    plan = Plan(
        model,
        images,
        Run(folder),
        settings,
        Alternating(),
        device=device,
        overwrite=overwrite,
        command=spelled("demo", arguments),
    )
    return carry_out(plan, closing=lambda done: _closing(plan, done))


def _closing(plan: Plan, done: int) -> str:
    """What was trained, what to look at, what to do next, and where both are."""
    folder = plan.run.folder.resolve()
    lines = [
        f"This was BiDVL on {len(plan.images.train):,} handwritten digits, {done:,} of "
        f"{plan.training.num_steps:,} steps.",
        "Look at the digits it draws, then at the report, which says what the numbers are worth.",
        "Next, train on images of your own: `bilevel train bidvl --data FOLDER`.",
        f"\nreport:  {folder / 'report.html'}",
    ]
    if (folder / "samples.png").exists():  # it takes an extra
        lines.append(f"picture: {folder / 'samples.png'}")
    return "\n".join(lines)
