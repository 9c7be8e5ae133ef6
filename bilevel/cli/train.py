"""`bilevel train`: start a run, or take one up again."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from bilevel.cli import solver as solvers
from bilevel.cli.options import (
    Parser,
    UsageError,
    add_option,
    check_training,
    choice,
    integer,
    model_settings,
    number,
    training_settings,
)
from bilevel.cli.running import Plan, carry_out, device_of
from bilevel.cli.runs import existing, fresh, images_of
from bilevel.distributed import from_main, is_main, processes
from bilevel.methods.catalogue import IMAGE_METHODS
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.data.limits import GIGABYTES
from bilevel.methods.presets import PRESETS, Preset
from bilevel.methods.training.run import Run
from bilevel.methods.training.saved import rebuilt
from bilevel.refusals import nearest

SUMMARY = "train a model on images, into a run folder"
_LENGTH = ("num_steps", "max_seconds")  # what of a run may be changed when it is resumed
_LOADING = ("side", "crop", "channels", "skip_unreadable", "limit", "max_gigabytes")
_EXAMPLES = """  bilevel train --preset digits
  bilevel train --preset cifar10 --device cuda
  bilevel train --preset cifar10 --data images.zip --ratio 0.1
  bilevel train bidvl --data photos/ --num-steps 100000 --device cuda
  bilevel train bidvl --data mnist.npz --latent-dim 32 --width 32 --run runs/mnist
  bilevel train --preset digits --variant complete --solver implicit
  bilevel train --run runs/mnist --resume
  bilevel train --run runs/mnist --resume --num-steps 20000      make it longer
  bilevel train bidvl --help                      the options of this method's model too
"""


def command(arguments: list[str]) -> int:
    """Read the arguments and train."""
    args = _parser(_named(arguments)).read(arguments)
    if "method" in args and args.method.lower() not in IMAGE_METHODS:
        raise UsageError(
            f"there is no method `{args.method}`; {nearest(args.method.lower(), IMAGE_METHODS)}"
        )
    with processes(_device(args)) as device, _main_speaks():
        if device is not None:
            args.device = device
        return _resume(args) if "resume" in args else _start(args)


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


def _named(arguments: list[str]) -> str | None:
    """The method whose options these are: named itself, or by the preset."""
    for text in arguments:
        if text.lower() in IMAGE_METHODS:
            return text.lower()
    values = [*pairwise(arguments), *(a.split("=", 1) for a in arguments)]
    presets = [pair[1].lower() for pair in values if pair[0] == "--preset" and len(pair) == 2]
    preset = PRESETS.get(presets[0]) if presets else None
    return None if preset is None else preset.method.__name__.lower()


def _parser(method: str | None) -> Parser:
    usage = "METHOD --data NAME|PATH [options]\n       bilevel train --preset NAME [options]"
    parser = Parser("train", SUMMARY, usage, _EXAMPLES)
    parser.add_argument("method", nargs="?", metavar="METHOD", help=", ".join(IMAGE_METHODS))
    parser.add_argument(
        "--preset",
        type=choice(list(PRESETS)),
        metavar="NAME",
        help="settings of a published experiment, or of a small one; `bilevel presets` lists them",
    )
    _add_data(parser)
    parser.add_argument(
        "--run",
        "--folder",  # `torchrun` takes `--run` for an option of its own
        metavar="FOLDER",
        help="where to write (default: runs/METHOD-DATA-NUMBER)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    parser.add_argument(
        "--device",
        type=choice(["cpu", "cuda"]),
        metavar="cpu|cuda",
        help="(default: cuda if there is one)",
    )
    parser.add_argument(
        "--no-report", action="store_true", help="train only: no evaluation, pictures and report"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would cost; train and write nothing"
    )
    chosen = list(IMAGE_METHODS.values()) if method is None else [IMAGE_METHODS[method]]
    model = {setting.name: setting for one in chosen for setting in model_settings(one.kind)}
    note = None if method else "`bilevel train METHOD --help` shows one method's alone"
    for title, settings, about in (
        ("model", list(model.values()), note),
        (
            "training",
            training_settings(),
            "a level is a set of networks: BiDVL's upper level is the "
            "energy, its lower level posterior and generator",
        ),
    ):
        group = parser.add_argument_group(title, about)
        for setting in settings:
            add_option(group, setting)
    solvers.add_options(parser)
    return parser


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data", "`bilevel.methods.data.images` tells more")
    group.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="a name such as digits or cifar10, an .npz file with an array `images` (or `train_images` "
        "and `test_images`), or a folder or zip archive of images",
    )
    group.add_argument(
        "--side", type=integer, metavar="N", help="bring the images to this height and width"
    )
    group.add_argument("--crop", type=integer, metavar="N", help="cut out this centre square first")
    group.add_argument(
        "--channels", type=integer, metavar="1|3", help="make the images grey (1) or colour (3)"
    )
    group.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files that cannot be read"
    )
    group.add_argument("--limit", type=integer, metavar="N", help="most images of each part")
    group.add_argument(
        "--max-gigabytes",
        type=number,
        metavar="X",
        help=f"most memory that the images may take (default: {GIGABYTES:g})",
    )


def _start(args: argparse.Namespace) -> int:
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
    device = device_of(getattr(args, "device", None))
    overwrite = "overwrite" in args
    if "run" in args and Run(args.run).exists and not overwrite:
        raise UsageError(
            f"`{args.run}` already holds a run; continue it with `--resume`, replace it with "
            "`--overwrite`, or name another folder"
        )
    loading = {**(preset.loading if preset else {}), **_given(args, _LOADING)}
    images = load_images(source, **loading)
    if preset is not None:
        _refuse_other_images(preset, images, args)
    plain = preset is None or preset.name == images.name
    stem = (
        f"{method.kind.__name__.lower()}-{images.name}" if plain or preset is None else preset.name
    )
    folder = Path(args.run) if "run" in args else from_main(fresh(stem))
    assert method.for_images is not None  # it is one of `IMAGE_METHODS`
    model = method.for_images(images.shape, seed=settings.get("seed", 0), **recipe)
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
        overwrite=overwrite,
    )
    if "dry_run" in args:
        from bilevel.cli.dry_run import dry_run  # imported here: only `--dry-run` needs it

        return dry_run(plan)
    return carry_out(plan, report="no_report" not in args)


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
    images = images_of(run, getattr(args, "data", None))
    try:
        solver = solvers.solver_of(notes.get("solver", {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"`{run.config_path}` has a bad `notes.solver`: {error}") from None
    if repr(solver) != config["solver"]:
        raise UsageError(
            f"`{args.run}` was started from Python with the solver `{config['solver']}`; resume it there"
        )
    method = IMAGE_METHODS[str(config["method"]).lower()].kind
    if config["model"] is None:
        raise UsageError(f"the model in `{args.run}` was built in Python; resume it there")
    device = device_of(notes.get("device"))
    model = rebuilt(method, config["model"], run.config_path).to(device)
    longer, kept = _given(args, _LENGTH), config["training"]
    _refuse_other_rates(args, {**kept, **longer})
    plan = Plan(model, images, run, longer, solver, {}, device, resume=True, kept=kept)
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
    own |= dict.fromkeys(_LOADING) | notes.get("data_options", {})
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
            same = name in ("run", "resume", "no_report", "data", "device")
        if not same:
            flag = "METHOD" if name == "method" else "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` is {value!r}, but the run in `{args.run}` was started with "
                f"{own.get(name)!r}; leave it out to resume, or start a new run"
            )
    if "data" in args and "data" not in own:
        print("this run does not say what it was trained on: taking your word", file=sys.stderr)
