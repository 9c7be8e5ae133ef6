"""The options of `bilevel train`: one method's, with its own defaults, or those of all in groups."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from bilevel.cli import solver as solvers
from bilevel.cli.loggers import LOGGERS
from bilevel.cli.options import (
    Parser,
    Setting,
    add_option,
    choice,
    filled,
    integer,
    model_settings,
    number,
    training_settings,
)
from bilevel.cli.placing import add_device
from bilevel.methods.catalogue import IMAGE_METHODS
from bilevel.methods.data.limits import GIGABYTES
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.presets import PRESETS, Preset
from bilevel.methods.training.settings import LOWER_ONLY

SUMMARY = "train a model on images, into a run folder"
_EXAMPLES = """  bilevel train --preset digits
  bilevel train --preset cifar10 --device cuda
  bilevel train --preset cifar10 --data images.zip --ratio 0.1
  bilevel train bidvl --data photos/ --num-steps 100000 --device cuda
  bilevel train bidvl --data mnist.npz --latent-dim 32 --run runs/mnist
  bilevel train --preset digits --variant complete --solver implicit
  bilevel train --run runs/mnist --resume
  bilevel train --run runs/mnist --resume --num-steps 20000
"""
_VARIES = "by METHOD"
_LEVELS = (
    "a level is a set of networks: BiDVL's upper level is the energy, its lower level posterior and "
    "generator"
)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The arguments of `bilevel train`.

    Raises:
        UsageError: for one there is not, with what is meant.
    """
    arguments = _apart(arguments)
    method, preset = _named(arguments)
    return _parser(method, preset).read(arguments, _elsewhere(method))


def _apart(arguments: list[str]) -> list[str]:
    """`--compile METHOD` as an option without a word, and a method."""
    follows = [*(text.lower() for text in arguments[1:]), ""]
    pairs = zip(arguments, follows, strict=True)
    return ["--compile=" if a == "--compile" and b in IMAGE_METHODS else a for a, b in pairs]


def _named(arguments: list[str]) -> tuple[str | None, Preset | None]:
    """The method whose options these are, named itself or by the preset, and the preset."""
    values = [*pairwise(arguments), *(a.split("=", 1) for a in arguments)]
    presets = [pair[1].lower() for pair in values if pair[0] == "--preset" and len(pair) == 2]
    preset = PRESETS.get(presets[0]) if presets else None
    for text in arguments:
        if text.lower() in IMAGE_METHODS:
            return text.lower(), preset
    return (None if preset is None else preset.method.__name__.lower()), preset


def _parser(method: str | None, preset: Preset | None) -> Parser:
    usage = "METHOD --data NAME|PATH [options]\n       bilevel train --preset NAME [options]"
    parser = Parser("train", SUMMARY, usage, _EXAMPLES)
    names = ", ".join(IMAGE_METHODS)
    alone = "" if method else "; `bilevel train METHOD --help` shows one alone, with its defaults"
    parser.add_argument("method", nargs="?", metavar="METHOD", help=names + alone)
    parser.add_argument(
        "--preset",
        type=choice(list(PRESETS)),
        metavar="NAME",
        help="settings of a published experiment, or of a small one; `bilevel presets` lists them",
    )
    _add_data(parser)
    _add_run(parser)
    if method is None:
        _add_models(parser)
        training = _varying({name: _usual(m.kind) for name, m in IMAGE_METHODS.items()})
    else:
        kind = IMAGE_METHODS[method].kind
        own = model_settings(kind)
        _add_group(parser, f"model: {method}", _with(own, preset.model if preset else {}))
        usual = {**_usual(kind), **(preset.training if preset else {})}
        training = _without_idle(kind, training_settings(usual))
    single = method is not None and _single(IMAGE_METHODS[method].kind)
    about = "this method has a single level, which is called the upper one" if single else _LEVELS
    _add_group(parser, "training", training, filled(about))
    solvers.add_options(parser, shown=not single)
    return parser


def _add_models(parser: Parser) -> None:
    """The options of all methods, in a group for those that have them in common."""
    owners: dict[str, dict[str, Setting]] = {}
    for name, method in IMAGE_METHODS.items():
        for setting in model_settings(method.kind):
            owners.setdefault(setting.name, {})[name] = setting
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for found in owners.values():
        first = next(iter(found.values()))
        same = all(setting.default == first.default for setting in found.values())
        texts = {setting.help for setting in found.values()}
        text = first.help if len(texts) == 1 else min(texts, key=len)
        setting = replace(first, help=text, default=first.default if same else _VARIES)
        groups.setdefault(tuple(found), []).append(setting)
    for names in sorted(groups, key=len, reverse=True):
        every = len(names) == len(IMAGE_METHODS)
        title = "model: every method" if every else f"model: {', '.join(names)}"
        _add_group(parser, title, groups[names])


def _add_group(parser: Parser, title: str, settings: list[Setting], about: str = "") -> None:
    group = parser.add_argument_group(title, about or None)
    for setting in settings:
        add_option(group, setting)


def _with(settings: list[Setting], values: Mapping[str, Any]) -> list[Setting]:
    return [replace(s, default=values.get(s.name, s.default)) for s in settings]


def _usual(kind: type[EBLVM]) -> dict[str, Any]:
    return {s.name: s.default for s in training_settings()} | kind.training_defaults


def _varying(usual: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """The settings of the training, where the method is not known."""
    first, *others = usual.values()
    values = {n: v if all(o[n] == v for o in others) else _VARIES for n, v in first.items()}
    return training_settings(values)


def _without_idle(kind: type[EBLVM], settings: list[Setting]) -> list[Setting]:
    """Without help for what means nothing to a single level; the option is refused with a reason."""
    idle = LOWER_ONLY if _single(kind) else ()
    return [replace(s, help=argparse.SUPPRESS) if s.name in idle else s for s in settings]


def _single(kind: type[EBLVM]) -> bool:
    return kind.lower_loss is EBLVM.lower_loss


def _elsewhere(method: str | None) -> dict[str, str]:
    """Options of the other methods, and whose they are."""
    if method is None:
        return {}
    owners: dict[str, list[str]] = {}
    for name, other in IMAGE_METHODS.items():
        for setting in model_settings(other.kind):
            owners.setdefault(setting.flag, []).append(f"`{name}`")
    mine = {setting.flag for setting in model_settings(IMAGE_METHODS[method].kind)}
    return {
        flag: f"it belongs to {', '.join(names)}, not to `{method}`"
        for flag, names in owners.items()
        if flag not in mine
    }


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--run",
        "--folder",  # `torchrun` takes `--run` for an option of its own
        metavar="FOLDER",
        help="where to write (default: runs/METHOD-DATA-NUMBER)",
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --run")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --run")
    add_device(group, "cuda if there is one")
    group.add_argument(
        "--no-report", action="store_true", help="train only: no evaluation, pictures and report"
    )
    group.add_argument(
        "--log-to",
        nargs="+",
        type=choice(list(LOGGERS)),
        metavar="|".join(LOGGERS),
        help="keep numbers and pictures there too, in the run's folder",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say what it would cost and time two steps; train and write nothing",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
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
