"""Run folders on the command line: finding, naming and loading them."""

import functools
import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.cli.options import Parser, UsageError
from bilevel.methods import EBLVM
from bilevel.methods.catalogue import METHODS, called, of_own, pick
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.training.run import Run
from bilevel.methods.training.saved import read_about, restored_into
from bilevel.plugins import imported
from bilevel.refusals import nearest
from bilevel.reporting import Report, silent

HOME = Path("runs")


def fresh(stem: str) -> Path:
    """`runs/<stem>-<n>` with the smallest n that is free."""
    n = 1
    while (HOME / f"{stem}-{n}").exists():
        n += 1
    return HOME / f"{stem}-{n}"


def spelled(command: str, arguments: list[str]) -> str:
    """A command as it can be typed again.

    Example:
        >>> spelled("train", ["vae", "--data", "my images"])
        "bilevel train vae --data 'my images'"
    """
    return shlex.join(["bilevel", command, *arguments])


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


def add_model_option(parser: Parser) -> None:
    """`--model`."""
    parser.add_argument(
        "--model",
        metavar="CODE",
        help="package.module:Name of the code that makes the model again, if its networks or its method "
        "are your own",
    )


def load_model(run: Run, code: str | None = None) -> EBLVM:
    """The trained model of a run.

    Args:
        run: the folder.
        code: the address of what makes the model again: a class of a method, or a function without
            arguments (or what it returns) that gives the untrained model, or the arguments of the
            constructor by name. It is imported; no file of the run can ask for that.

    Raises:
        UsageError: if its training never ended, or its code is needed and was not named.
        ValueError: if that makes another model.
        ImportError: if it cannot be imported.
    """
    if not (run.model_path / "model.json").exists():
        raise UsageError(
            f"the training in `{run.folder}` has not ended, so there is no model yet; continue it with "
            f"`bilevel train --run {run.folder} --resume`"
        )
    about = read_about(run.model_path)
    if code is not None:
        return _made_by(code, run, about["method"])
    if about["method"] not in METHODS:
        raise UsageError(
            f"`{run.folder}` holds a `{about['method']}`, which is no method of this package; name its "
            f"code: `--model package.module:{about['method']}`"
        )
    if about["recipe"] is None:
        raise UsageError(
            f"the `{about['method']}` in `{run.folder}` is made of networks of your own; name the "
            "function that makes it: `--model package.module:function`"
        )
    return METHODS[about["method"]].kind.load(run.model_path)


def _made_by(code: str, run: Run, method: str) -> EBLVM:
    found: Any = imported(code)
    base: Any = EBLVM
    learner: EBLVM
    load = getattr(found, "load", None)
    if inspect.isclass(found) and callable(load):
        learner = load(run.model_path)
        return learner
    made = called(code, found, {}) if inspect.isroutine(found) else found
    if not isinstance(made, Mapping):
        learner = restored_into(of_own(code, base, made, {}), run.model_path)
        return learner
    kind = pick("method", method, METHODS).kind
    learner = called(code, functools.partial(kind.load, run.model_path, **made), {})
    return learner


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
    shape = config.get("data", {}).get("shape", [])
    if len(shape) == 2:
        raise UsageError(
            f"`{run.folder}` was trained on rows of {shape[1]} numbers, and `evaluate` measures images; "
            "`bilevel bench eblvm` judges models of rows"
        )
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
    if len(shape) != 4:
        return load_images(str(source), report=stage)
    return load_images(str(source), side=shape[3], channels=shape[1], report=stage)


def _path(source: str) -> str:
    return str(Path(source).expanduser().resolve())
