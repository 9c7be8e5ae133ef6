"""Run folders on the command line: finding, naming and loading them."""

import inspect
from pathlib import Path
from typing import Any

from bilevel.cli.options import UsageError
from bilevel.methods import EBLVM
from bilevel.methods.catalogue import IMAGE_METHODS
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.training.run import Run
from bilevel.refusals import nearest
from bilevel.reporting import Report, silent

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
    name = str(config["method"]).lower()
    if name not in IMAGE_METHODS:
        raise UsageError(
            f"`{run.folder}` holds a `{config['method']}`, which cannot be loaded here"
        )
    if not (run.model_path / "model.json").exists():
        raise UsageError(
            f"the training in `{run.folder}` has not ended, so there is no model yet; continue it with "
            f"`bilevel train --run {run.folder} --resume`"
        )
    model = IMAGE_METHODS[name].kind.load(run.model_path)
    model.eval()
    return model


def images_of(run: Run, source: str | None = None, stage: Report = silent) -> Images:
    """The images a run was trained on, loaded with the same options, or others of the same shape.

    Args:
        run: tells the source, its options and the shape.
        source: other images, brought to the side and the channels of the run's.
        stage: told how far it is.

    Raises:
        UsageError: if the run does not tell.
    """
    config = run.config()
    notes: dict[str, Any] = config.get("notes", {})
    recorded: str | None = notes.get("data")
    if source is None and recorded is None:
        raise UsageError(
            f"`{run.folder}` does not say what it was trained on; name it with `--data`"
        )
    if recorded is not None and (source is None or source == recorded or _path(source) == recorded):
        options = notes.get("data_options", {})
        for name in options:
            if name not in inspect.signature(load_images).parameters:
                raise UsageError(f"`{run.config_path}` has an unknown `data_options.{name}`")
        return load_images(recorded, **options, report=stage)
    shape = config.get("data", {}).get("shape", [])
    if len(shape) != 4:
        return load_images(str(source), report=stage)
    return load_images(str(source), side=shape[3], channels=shape[1], report=stage)


def _path(source: str) -> str:
    return str(Path(source).expanduser().resolve())
