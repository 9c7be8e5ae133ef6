"""Command-line options: from typed settings to `--flags`, and refusals that help."""

import argparse
import difflib
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Union, final, get_args, get_origin, get_type_hints

from bilevel.cli.wording import as_flag, as_flags, meant, plain
from bilevel.methods import EBLVM, Training
from bilevel.methods.catalogue import IMAGE_METHODS, METHODS
from bilevel.methods.training.settings import validated
from bilevel.refusals import nearest

LOADING = ("side", "crop", "channels", "skip_unreadable", "limit", "max_gigabytes")
"""Arguments of `load_images` that have a flag."""


@final
class UsageError(ValueError):
    """Arguments that make no sense; the message says which and what would."""


@final
class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` and knows what was meant.

    Args:
        name: of the command.
        summary: what the command does, a sentence.
        usage: how it is written.
        examples: lines of examples, shown below the help.
    """

    def __init__(self, name: str, summary: str, usage: str, examples: str) -> None:
        super().__init__(
            prog=f"bilevel {name}",
            usage=f"bilevel {name} {usage}",
            description=filled(summary[0].upper() + summary[1:] + "."),
            epilog="examples:\n" + examples,
            formatter_class=_narrow,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UsageError: always.
        """
        said = re.sub(r"^argument (\S+):", r"`\1`:", message)
        raise UsageError(f"{said} (`{self.prog} --help` tells more)")

    def read(
        self, arguments: Sequence[str], elsewhere: Mapping[str, str] | None = None
    ) -> argparse.Namespace:
        """Parse, refusing what is left over.

        Args:
            arguments: what was written.
            elsewhere: options there are in other circumstances, and a clause that says in which.

        Raises:
            UsageError: naming the option that is meant, or the nearest there is.
        """
        parsed, rest = self.parse_known_args(arguments)
        if rest:
            name = rest[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"`{rest[0]}` is one argument too many")
            self.error(f"there is no option `{name}`{self._hint(name, elsewhere or {})}")
        return parsed

    def _hint(self, name: str, elsewhere: Mapping[str, str]) -> str:
        known = [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for option in action.option_strings
        ]
        hint = elsewhere.get(name) or meant(name, known)
        if hint is None and (close := difflib.get_close_matches(name, known, n=1, cutoff=0.75)):
            hint = f"did you mean `{close[0]}`?"
        return f"; {hint}" if hint else ""


def _narrow(prog: str) -> argparse.HelpFormatter:
    """Help in at most 80 columns, with its examples as they were written."""
    width = min(80, shutil.get_terminal_size((80, 24)).columns)
    return argparse.RawDescriptionHelpFormatter(prog, width=width)


def filled(text: str) -> str:
    """A description of a group of options, in lines that fit beside its indentation."""
    return textwrap.fill(text, min(78, shutil.get_terminal_size((80, 24)).columns - 2))


@final
@dataclass(frozen=True)
class Setting:
    """A typed setting that becomes an option.

    Attributes:
        name: in Python.
        annotation: its type.
        default: its default.
        help: what it is, in a few words.
    """

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return as_flag(self.name)


def add_option(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Make an option of a setting; without it on the command line, the name stays unset."""
    kinds = [kind for kind in _alternatives(setting.annotation) if kind is not type(None)]
    kind = kinds[0] if len(kinds) == 1 else str
    text, hidden = setting.help.replace("%", "%%"), setting.help == argparse.SUPPRESS
    if not hidden and setting.default not in (None, inspect.Parameter.empty):
        text += f" (default: {_shown(setting.default)})"
    more: dict[str, Any] = {"help": text.strip(), "dest": setting.name}
    if get_origin(kind) is Literal and True in get_args(kind):
        words = [option for option in get_args(kind) if isinstance(option, str)]
        wanted = _or_nothing(choice(words))
        group.add_argument(
            setting.flag, nargs="?", const=True, type=wanted, metavar="|".join(words), **more
        )
        group.add_argument(as_flag(f"no_{setting.name}"), action="store_false", dest=setting.name)
    elif get_origin(kind) is Literal:
        options = [str(option) for option in get_args(kind)]
        group.add_argument(setting.flag, type=choice(options), metavar="|".join(options), **more)
    elif get_origin(kind) is tuple:
        parts = get_args(kind)
        names = tuple("X" for _ in parts)
        group.add_argument(setting.flag, type=number, nargs=len(parts), metavar=names, **more)
    elif kind is bool:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **more)
    else:
        convert, metavar = {int: (integer, "N"), float: (number, "X")}.get(kind, (str, "TEXT"))
        group.add_argument(setting.flag, type=convert, metavar=metavar, **more)


def choice(options: Sequence[str]) -> Callable[[str], str]:
    """A converter that takes one of the options, in any case, and else names the nearest."""

    def convert(text: str) -> str:
        if text.lower() not in options:
            raise argparse.ArgumentTypeError(
                f"it cannot be `{text}`; {nearest(text.lower(), options)}"
            )
        return text.lower()

    return convert


def _or_nothing(convert: Callable[[str], str]) -> Callable[[str], str | bool]:
    """A converter that takes `--option=` for the option without a word."""
    return lambda text: convert(text) if text else True


def integer(text: str) -> int:
    """A whole number; 1e4 and 10_000 too."""
    try:
        value = float(text)
        return int(text) if value != int(value) or "e" not in text.lower() else int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"it takes a whole number, got `{text}`") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it takes a number, got `{text}`") from None


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def training_settings(usual: Mapping[str, Any] | None = None) -> list[Setting]:
    """The fields of `Training`.

    Args:
        usual: what they are where nothing is given, if not the class's own defaults.
    """
    return [
        Setting(
            name,
            field.annotation,
            (usual or {}).get(name, field.default),
            plain(field.description or ""),
        )
        for name, field in Training.model_fields.items()
    ]


def check_training(values: dict[str, Any]) -> None:
    """Refuse bad training settings, by the names they have on the command line.

    Raises:
        UsageError: naming them.
    """
    try:
        validated(Training, values)
    except ValueError as error:
        raise UsageError(as_flags(str(error), Training.model_fields)) from None


def model_settings(method: type[EBLVM]) -> list[Setting]:
    """The options of a method's `for_images`, and of its constructor if they are passed on to that.

    What is given otherwise, such as the shape and the seed, is left out.
    """
    settings: dict[str, Setting] = {}
    taken = {
        "self",
        "cls",
        "shape",
        "seed",
        "visible_shape",
        "visible_range",
        *Training.model_fields,
    }
    for_images = METHODS[method.__name__].for_images
    assert for_images is not None  # the command line offers no other
    kinds = {parameter.kind for parameter in inspect.signature(for_images).parameters.values()}
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds
    for function in (for_images, method.__init__) if passes_on else (for_images,):
        hints = get_type_hints(function)
        texts = _documented(inspect.getdoc(function) or "") | _documented(method.__doc__ or "")
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name not in taken | settings.keys():
                annotation = hints.get(name, str)
                settings[name] = Setting(name, annotation, parameter.default, texts.get(name, ""))
    return list(settings.values())


def option_names() -> set[str]:
    """Names in Python of all that has a flag of `bilevel train`; "upper" is a level, too."""
    own = {s.name for method in IMAGE_METHODS.values() for s in model_settings(method.kind)}
    return {*Training.model_fields, *own, *LOADING, "run", "resume", "overwrite"} - {"upper"}


def _documented(docstring: str) -> dict[str, str]:
    """The first clause about each argument of a Google-style docstring."""
    _, _, rest = inspect.cleandoc(docstring).partition("Args:\n")
    section = re.split(r"\n\S", rest, maxsplit=1)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    end = re.compile(r"(?<!Eq)(?<!Sec)[.;:](?:\s|$)")
    return {name: plain(end.split(" ".join(text.split()))[0]) for name, text in entries}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)
