"""The command line: one module per command."""

import os
import sys
from collections.abc import Sequence
from types import ModuleType

from bilevel import DivergenceError, HypergradientError, __version__
from bilevel.cli import bench, demo, evaluate, features, presets, report, sample, signals, train
from bilevel.cli.options import UsageError, option_names
from bilevel.cli.wording import as_flags
from bilevel.distributed import LostRankError
from bilevel.errors import WriteError
from bilevel.files import reason
from bilevel.methods.training.settings import nearest

OK, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

_COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "presets": presets,
    "sample": sample,
    "evaluate": evaluate,
    "features": features,
    "report": report,
    "bench": bench,
}
_SPELLED = ("train", "demo", "evaluate")  # their options are arguments in Python
_HELP = """usage: bilevel COMMAND ...

Train energy-based latent-variable models by bilevel optimization.

commands:
{commands}

examples:
  bilevel demo                                 a first look, about two minutes
  bilevel train bidvl --data images.npz        train on your own images
  bilevel sample runs/bidvl-images-1 -n 100    draw from what was trained
  bilevel report runs/*                        compare all runs on one page

`bilevel COMMAND --help` tells more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit status: 0 all is well, 1 training failed, 2 bad usage or bad input, 130 interrupted, 143
        stopped by SIGTERM, 129 by SIGHUP.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with signals.ending():
            return _dispatch(arguments)
    except SystemExit as done:  # argparse printed its help
        return int(done.code or 0)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except KeyboardInterrupt as stopped:
        status = signals.status_of(stopped)
        return _complain(signals.named(status - 128), status)
    except LostRankError as error:
        return _complain(error, FAILED, everywhere=True)
    except (DivergenceError, HypergradientError) as error:
        return _complain(error, FAILED, arguments)
    except (ValueError, OSError, ImportError) as error:
        return _complain(error, BAD_USAGE, arguments)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:<10}{module.SUMMARY}" for name, module in _COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)), end="")
        return OK if arguments else BAD_USAGE
    if name == "--version":
        print(f"bilevel {__version__}")
        return OK
    if name not in _COMMANDS:
        raise UsageError(f"there is no command `{name}`; {nearest(name, _COMMANDS)}")
    status: int = _COMMANDS[name].command(arguments[1:])
    return status


def _complain(
    problem: object, status: int, arguments: Sequence[str] = (), *, everywhere: bool = False
) -> int:
    if int(os.environ.get("RANK", 0)) and not everywhere:
        return status  # the first process says the same
    if os.environ.get("BILEVEL_TRACEBACK") and isinstance(problem, BaseException):
        raise problem
    told = str(problem)
    if isinstance(problem, OSError) and not isinstance(problem, WriteError) and problem.filename:
        told = f"`{problem.filename}`: {reason(problem)}"
    sentences = [told, *getattr(problem, "__notes__", [])]
    said = " ".join(". ".join(sentences).split())
    if arguments and arguments[0] in _SPELLED:
        said = as_flags(said, option_names())
    print(f"bilevel: {said}", file=sys.stderr)
    return status
