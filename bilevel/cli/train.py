"""`bilevel train`: start a run, or take one up again."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bilevel.cli import solver as solvers
from bilevel.cli.options import (
    Parser,
    UsageError,
    add,
    check_training,
    choice,
    methods,
    model_settings,
    training_settings,
)
from bilevel.cli.running import Plan, carry_out, device_of
from bilevel.cli.runs import existing, fresh, images_of
from bilevel.methods.config import nearest
from bilevel.methods.data import load_images
from bilevel.methods.presets import DIGITS
from bilevel.methods.run import Run

SUMMARY = "train a model on images, into a run folder"
_PRESETS = {"digits": DIGITS}
_EXAMPLES = """  bilevel train bidvl --data digits --preset digits
  bilevel train bidvl --data photos/ --num-steps 100000 --device cuda
  bilevel train bidvl --data mnist.npz --latent-dim 32 --width 32 --run runs/mnist
  bilevel train bidvl --data digits --preset digits --variant complete --solver implicit
  bilevel train --run runs/mnist --resume
  bilevel train bidvl --help                      the options of this method's model too
"""


def command(arguments: list[str]) -> int:
    """Read the arguments and train."""
    known = methods()
    named = next((text.lower() for text in arguments if text.lower() in known), None)
    args = _parser(named).read(arguments)
    if hasattr(args, "method") and args.method.lower() not in known:
        raise UsageError(
            f"there is no method `{args.method}`; {nearest(args.method.lower(), known)}"
        )
    return _resume(args) if hasattr(args, "resume") else _start(args)


def _parser(method: str | None) -> Parser:
    parser = Parser("train", SUMMARY, "METHOD --data NAME|PATH [options]", _EXAMPLES)
    parser.add_argument("method", nargs="?", metavar="METHOD", help=", ".join(methods()))
    parser.add_argument(
        "--data",
        metavar="NAME|PATH",
        help="digits, an .npz file with an array `images` (or `train_images` and `test_images`), or a "
        "folder of PNG or JPEG files",
    )
    parser.add_argument(
        "--run", metavar="FOLDER", help="where to write (default: runs/METHOD-DATA-NUMBER)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    parser.add_argument(
        "--preset",
        type=choice(list(_PRESETS)),
        metavar="|".join(_PRESETS),
        help="settings known to work",
    )
    parser.add_argument(
        "--device",
        type=choice(["cpu", "cuda"]),
        metavar="cpu|cuda",
        help="(default: cuda if there is one)",
    )
    parser.add_argument(
        "--no-report", action="store_true", help="train only: no evaluation, pictures and report"
    )
    known = methods()
    chosen = [known[method]] if method is not None else list(known.values())
    model = {setting.name: setting for kind in chosen for setting in model_settings(kind)}
    note = (
        None if method else f"`bilevel train {next(iter(known))} --help` shows one method's alone"
    )
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
            add(group, setting)
    solvers.add_options(parser)
    return parser


def _start(args: argparse.Namespace) -> int:
    for name in ("method", "data"):
        if not hasattr(args, name):
            wanted = {"method": f"METHOD ({', '.join(methods())})", "data": "--data NAME|PATH"}[
                name
            ]
            raise UsageError(f"{wanted} is missing: `bilevel train METHOD --data NAME|PATH`")
    method = methods()[args.method.lower()]
    options = solvers.given(args)
    solver = solvers.build(options)
    preset = _PRESETS[args.preset] if hasattr(args, "preset") else None
    model_names = [setting.name for setting in model_settings(method)]
    recipe = _chosen(args, model_names, preset.model if preset else {})
    training_names = [setting.name for setting in training_settings()]
    settings = _chosen(args, training_names, preset.training if preset else {})
    check_training({**method.training_defaults, **settings})
    device = device_of(getattr(args, "device", None))
    overwrite = hasattr(args, "overwrite")
    if hasattr(args, "run") and Run(args.run).exists and not overwrite:
        raise UsageError(
            f"`{args.run}` already holds a run; continue it with `--resume`, replace it with "
            "`--overwrite`, or name another folder"
        )
    images = load_images(args.data)
    folder = (
        Path(args.run) if hasattr(args, "run") else fresh(f"{args.method.lower()}-{images.name}")
    )
    model = method.for_images(images.shape, seed=settings.get("seed", 0), **recipe)  # type: ignore[attr-defined]
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
    return carry_out(plan, report=not hasattr(args, "no_report"))


def _chosen(args: argparse.Namespace, names: list[str], preset: dict[str, Any]) -> dict[str, Any]:
    """The preset, and what the command line says instead."""
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {**{name: value for name, value in preset.items() if name in names}, **given}


# ---------------------------------------------------------------------- taking up a run again


def _resume(args: argparse.Namespace) -> int:
    if not hasattr(args, "run"):
        raise UsageError(
            "`--resume` needs the folder of the run: `bilevel train --run FOLDER --resume`"
        )
    if hasattr(args, "overwrite"):
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
    solver = solvers.build(notes.get("solver", {}))
    if repr(solver) != config["solver"]:
        raise UsageError(
            f"`{args.run}` was started from Python with the solver `{config['solver']}`; resume it there"
        )
    method = methods()[str(config["method"]).lower()]
    if config["model"] is None:
        raise UsageError(f"the model in `{args.run}` was built in Python; resume it there")
    device = device_of(notes.get("device"))
    model = method.from_recipe(config["model"]).to(device)
    settings = config["training"]
    plan = Plan(model, images, run, settings, solver, {}, device, resume=True)
    return carry_out(plan, report=not hasattr(args, "no_report"))


def _refuse_conflicts(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Options that differ from what the run was started with."""
    notes = config.get("notes", {})
    method = methods().get(str(config["method"]).lower())
    if method is None:
        raise UsageError(f"`{args.run}` holds a `{config['method']}`, which cannot be resumed here")
    if hasattr(args, "preset"):
        raise UsageError("a resumed run has its own settings: leave `--preset` out")
    model = {s.name: s.default for s in model_settings(method)} | (config["model"] or {})
    solver = {"solver": "alternating", **notes.get("solver", {})}
    own = {**config["training"], **model, **solver, "method": str(config["method"]).lower()}
    own |= {name: notes[name] for name in ("data", "device") if name in notes}
    for name, value in vars(args).items():
        if name == "data" and name in own:
            same = value == own[name] or str(Path(value).expanduser().resolve()) == own[name]
        elif name == "method":
            same = value.lower() == own[name]
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
    if hasattr(args, "data") and "data" not in own:
        print("this run does not say what it was trained on: taking your word", file=sys.stderr)
