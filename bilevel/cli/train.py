"""`bilevel train`: start a run, or take one up again."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bilevel.cli import solver as solvers
from bilevel.cli import train_options
from bilevel.cli.options import (
    LOADING,
    UsageError,
    check_training,
    model_settings,
    training_settings,
)
from bilevel.cli.placing import device_of
from bilevel.cli.progress import stages
from bilevel.cli.running import Plan, carry_out
from bilevel.cli.runs import existing, fresh, images_of, spelled
from bilevel.cli.wording import as_flag
from bilevel.distributed import from_main, is_main, processes
from bilevel.methods.catalogue import IMAGE_METHODS
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.presets import PRESETS, Preset
from bilevel.methods.training.run import Run
from bilevel.methods.training.saved import rebuilt
from bilevel.refusals import nearest

SUMMARY = train_options.SUMMARY
_LENGTH = ("num_steps", "max_seconds")  # what of a run may be changed when it is resumed


def command(arguments: list[str]) -> int:
    """Read the arguments and train."""
    args = train_options.read_arguments(arguments)
    if "method" in args and args.method.lower() not in IMAGE_METHODS:
        raise UsageError(
            f"there is no method `{args.method}`; {nearest(args.method.lower(), IMAGE_METHODS)}"
        )
    with processes(_device(args)) as device, _main_speaks():
        if device is not None:
            args.device = device
        return _resume(args) if "resume" in args else _start(args, spelled("train", arguments))


def _device(args: argparse.Namespace) -> str | None:
    """The device that was asked for, now or when the run was started."""
    if "device" in args or not ("resume" in args and "run" in args):
        return getattr(args, "device", None)
    device: str | None = existing(args.run).config().get("notes", {}).get("device")
    return device


@contextlib.contextmanager
def _main_speaks() -> Iterator[None]:
    """Of several processes only the first prints."""
    with open(os.devnull, "w") as nothing, contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(nothing))
        yield


def _start(args: argparse.Namespace, command: str) -> int:
    preset = PRESETS[args.preset] if "preset" in args else None
    method = IMAGE_METHODS[_method(args, preset)]
    source = getattr(args, "data", None if preset is None else preset.data)
    if source is None:
        raise UsageError("--data NAME|PATH is missing: `bilevel train METHOD --data NAME|PATH`")
    options = solvers.given(args)
    solver = solvers.solver_of(options)
    model_names = [setting.name for setting in model_settings(method.kind)]
    recipe = {**(preset.model if preset else {}), **_given(args, model_names)}
    training_names = [setting.name for setting in training_settings()]
    settings = {**(preset.training if preset else {}), **_given(args, training_names)}
    check_training({**method.kind.training_defaults, **settings})
    if "best" in settings and settings.get("evaluate_every") is None:
        raise UsageError(
            "`--best` says which evaluated model is kept; give `--evaluate-every N` with it"
        )
    device = device_of(getattr(args, "device", None))
    _refuse_taken(args)
    loading = {**(preset.loading if preset else {}), **_given(args, LOADING)}
    with stages() as stage:
        images = load_images(source, **loading, report=stage)
    if preset is not None:
        _refuse_other_images(preset, images, args)
    plain = preset is None or preset.name == images.name
    stem = (
        f"{method.kind.__name__.lower()}-{images.name}" if plain or preset is None else preset.name
    )
    folder = Path(args.run) if "run" in args else from_main(fresh(stem))
    assert method.for_images is not None  # it is one of `IMAGE_METHODS`
    model = method.for_images(images.shape, seed=settings.get("seed", 0), **recipe)
    if not model.variables("lower") and not solver.drops_response:
        kind = method.kind.__name__
        raise UsageError(
            f"`--solver {options['solver']}` needs a lower level, which `{kind}` lacks; leave it out"
        )
    if preset is not None:
        print(f"{preset.name}: {preset.about}")
    print(f"{images.name}: {len(images.train):,} training images, {images.note}")
    plan = Plan(
        model.to(device),
        images,
        Run(folder),
        settings,
        solver,
        options,
        device,
        overwrite="overwrite" in args,
        log_to=getattr(args, "log_to", []),
        command=command,
    )
    if "dry_run" in args:
        from bilevel.cli.dry_run import dry_run  # imported here: only `--dry-run` needs it

        return dry_run(plan)
    return carry_out(plan, report="no_report" not in args)


def _refuse_taken(args: argparse.Namespace) -> None:
    """A folder that holds a run, unless that is to be replaced."""
    if "run" in args and Run(args.run).exists and "overwrite" not in args:
        raise UsageError(
            f"`{args.run}` already holds a run; continue it with `--resume`, replace it with "
            "`--overwrite`, or name another folder"
        )


def _method(args: argparse.Namespace, preset: Preset | None) -> str:
    """The method's name, from the command line or the preset."""
    if preset is None:
        if "method" not in args:
            raise UsageError(
                f"METHOD ({', '.join(IMAGE_METHODS)}) is missing: `bilevel train METHOD --data "
                "NAME|PATH`, or `bilevel train --preset NAME`"
            )
        return str(args.method.lower())
    own = preset.method.__name__.lower()
    if getattr(args, "method", own).lower() != own:
        raise UsageError(
            f"the preset `{preset.name}` is for `{own}`, not for `{args.method}`; leave `{args.method}` "
            "out, or the preset"
        )
    return own


def _refuse_other_images(preset: Preset, images: Images, args: argparse.Namespace) -> None:
    """Images of another shape than the preset's, unless the command line asked for that shape."""
    (channels, side, _), (wanted_channels, wanted_side, _) = images.shape, preset.shape
    change, keep = [], []
    for name, got, wanted in (
        ("side", side, wanted_side),
        ("channels", channels, wanted_channels),
    ):
        if got != wanted and name not in args:
            change.append(f"--{name} {wanted}")
            keep.append(f"--{name} {got}")
    if change:
        raise UsageError(
            f"the preset `{preset.name}` is for {_described(preset.shape)}, but `{images.name}` holds "
            f"{_described(images.shape)}; make them so with `{' '.join(change)}`, train on them as they "
            f"are with `{' '.join(keep)}`, or choose another preset"
        )


def _described(shape: tuple[int, int, int]) -> str:
    kind = {1: "grey", 3: "colour"}.get(shape[0], f"{shape[0]}-channel")
    return f"{kind} images of {shape[1]}x{shape[2]} pixels"


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What the command line says of these."""
    return {name: getattr(args, name) for name in names if name in args}


# ---------------------------------------------------------------------- taking up a run again


def _resume(args: argparse.Namespace) -> int:
    if "run" not in args:
        raise UsageError(
            "`--resume` needs the folder of the run: `bilevel train --run FOLDER --resume`"
        )
    if "overwrite" in args:
        raise UsageError("`--resume` continues a run and `--overwrite` replaces it; choose one")
    run = existing(args.run)
    config = run.config()
    if not run.checkpoint_path.exists():
        raise UsageError(
            f"`{args.run}` ended before its first checkpoint; start it again with `--overwrite`"
        )
    _refuse_conflicts(args, config)
    notes = config.get("notes", {})
    if config["model"] is None:
        raise UsageError(f"the model in `{args.run}` was built in Python; resume it there")
    with stages() as stage:
        images = images_of(run, getattr(args, "data", None), stage)
    try:
        solver = solvers.solver_of(notes.get("solver", {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"`{run.config_path}` has a bad `notes.solver`: {error}") from None
    if repr(solver) != config["solver"]:
        raise UsageError(
            f"`{args.run}` was started from Python with the solver `{config['solver']}`; resume it there"
        )
    method = IMAGE_METHODS[str(config["method"]).lower()].kind
    device = device_of(notes.get("device"))
    model = rebuilt(method, config["model"], run.config_path).to(device)
    longer, kept = _given(args, _LENGTH), config["training"]
    _refuse_other_rates(args, {**kept, **longer})
    logs = getattr(args, "log_to", notes.get("log_to", []))
    plan = Plan(model, images, run, longer, solver, {}, device, resume=True, kept=kept, log_to=logs)
    return carry_out(plan, report="no_report" not in args)


def _refuse_other_rates(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """More steps where the learning rates of those already taken depended on their number."""
    check_training(settings)
    before = existing(args.run).config()["training"]
    if settings["schedule"] == "cosine" and settings["num_steps"] != before["num_steps"]:
        raise UsageError(
            f"`{args.run}` has cosine schedules, which end after {before['num_steps']} steps: it cannot "
            "be made longer or shorter; start a new run with `--num-steps`"
        )


def _refuse_conflicts(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Options that differ from what the run was started with."""
    notes = config.get("notes", {})
    method = IMAGE_METHODS.get(str(config["method"]).lower())
    if method is None:
        raise UsageError(f"`{args.run}` holds a `{config['method']}`, which cannot be resumed here")
    if "preset" in args:
        raise UsageError("a resumed run has its own settings: leave `--preset` out")
    model = {s.name: s.default for s in model_settings(method.kind)} | (config["model"] or {})
    solver = {"solver": "alternating", **notes.get("solver", {})}
    own = {**config["training"], **model, **solver, "method": str(config["method"]).lower()}
    own |= {name: notes[name] for name in ("data", "device") if name in notes}
    own |= dict.fromkeys(LOADING) | notes.get("data_options", {})
    for name, value in vars(args).items():
        if name == "data" and name in own:
            same = value == own[name] or str(Path(value).expanduser().resolve()) == own[name]
        elif name == "method":
            same = value.lower() == own[name]
        elif name in _LENGTH:
            same = True
        elif name in own:
            same = json.loads(json.dumps(value)) == json.loads(json.dumps(own[name]))
        else:
            same = name in ("run", "resume", "no_report", "data", "device", "log_to")
        if not same:
            said = "METHOD" if name == "method" else as_flag(name)
            raise UsageError(
                f"`{said}` is {value!r}, but the run in `{args.run}` was started with "
                f"{own.get(name)!r}; leave it out to resume, or start a new run"
            )
    if "data" in args and "data" not in own:
        print("this run does not say what it was trained on: taking your word", file=sys.stderr)
