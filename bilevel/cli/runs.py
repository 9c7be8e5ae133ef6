"""Run folders on the command line: finding, naming and loading them."""

from pathlib import Path
from typing import Any

from bilevel.cli.options import UsageError, methods
from bilevel.methods import EBLVM
from bilevel.methods.config import nearest
from bilevel.methods.data import Images, load_images
from bilevel.methods.run import Run

HOME = Path("runs")


def fresh(stem: str) -> Path:
    """`runs/<stem>-<n>` with the smallest n that is free."""
    n = 1
    while (HOME / f"{stem}-{n}").exists():
        n += 1
    return HOME / f"{stem}-{n}"


def existing(folder: str) -> Run:
    """The run in a folder.

    Raises:
        UsageError: if there is none, naming the nearest folder that holds one.
    """
    run = Run(folder)
    if run.config_path.exists():
        return run
    parent = run.folder.parent
    near = sorted({*parent.glob("*/config.json"), *HOME.glob("*/config.json")})
    hint = nearest(folder, [str(path.parent) for path in near][:20]) if near else "train one first"
    raise UsageError(f"there is no run in `{folder}`; {hint}")


def load_model(run: Run) -> EBLVM:
    """The trained model of a run.

    Raises:
        UsageError: if its training never ended, or the method is not known here.
    """
    config = run.config()
    known = methods()
    name = str(config["method"]).lower()
    if name not in known:
        raise UsageError(
            f"`{run.folder}` holds a `{config['method']}`, which cannot be loaded here"
        )
    if not (run.model_path / "model.json").exists():
        raise UsageError(
            f"the training in `{run.folder}` has not ended, so there is no model yet; continue it with "
            f"`bilevel train --run {run.folder} --resume`"
        )
    model = known[name].load(run.model_path)
    model.eval()
    return model


def images_of(run: Run, source: str | None = None) -> Images:
    """The images a run was trained on, or others.

    Raises:
        UsageError: if the run does not tell.
    """
    recorded: Any = run.config().get("notes", {}).get("data")
    if source is None and recorded is None:
        raise UsageError(
            f"`{run.folder}` does not say what it was trained on; name it with `--data`"
        )
    return load_images(source if source is not None else recorded)
