"""Objects that are not of this package, by address or by entry point.

Nothing is imported that was not named by whoever runs the process: the command line asks for the
addresses that stand on it, and packages that were installed say in their entry points what they offer.
"""

import difflib
import functools
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from bilevel.refusals import nearest

GROUPS: Mapping[str, str] = {
    "method": "bilevel.methods",
    "model": "bilevel.models",
    "table": "bilevel.tables",
    "solver": "bilevel.solvers",
    "problem": "bilevel.problems",
}
"""Groups of entry points, by what they hold."""

_ADDRESS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NONE = object()


def is_address(name: str) -> bool:
    """Whether a name is the address of an object, `package.module:Name`, and no path of a file.

    Example:
        >>> is_address("mine.flow:Flow"), is_address("uci.npz:dna"), is_address("moons")
        (True, False, False)
    """
    return _ADDRESS.fullmatch(name) is not None and not name.partition(":")[0].endswith(".npz")


def imported(address: str) -> Any:
    """The object at `package.module:Name`; modules are looked for in the working directory, too.

    Raises:
        ValueError: if it is no address, or the module has no such name.
        ImportError: if there is no such module, or importing it fails.

    Example:
        >>> imported("collections:OrderedDict").__name__
        'OrderedDict'
    """
    if not is_address(address):
        raise ValueError(
            f"`{address}` is no address of an object; write `package.module:Name`, such as "
            "`mine.methods:Flow`"
        )
    module, _, path = address.partition(":")
    found = _module(module, address)
    for part in path.split("."):
        member = getattr(found, part, _NONE)
        if member is _NONE:
            names = [name for name in vars(found) if name.isidentifier() and name[0] != "_"]
            close = difflib.get_close_matches(part, names, n=1)
            hint = nearest(part, close or names[:20]) if names else "there is nothing public in it"
            raise ValueError(f"`{address}`: there is no `{part}` in `{module}`; {hint}")
        found = member
    return found


def _module(name: str, address: str) -> Any:
    here = os.getcwd()  # `python -m` looks here, the installed script `bilevel` does not
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise ImportError(
                f"`{address}`: there is no module `{missing}` in this folder or among what is "
                "installed; go to the folder that holds it, or install it"
            ) from None
        raise ImportError(
            f"`{address}`: importing `{name}` raised {type(error).__name__}: {error}"
        ) from error


@functools.cache
def entry_points(what: str) -> Mapping[str, importlib.metadata.EntryPoint]:
    """What installed packages offer, by name; nothing is imported.

    Args:
        what: a key of `GROUPS`.
    """
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUPS[what])}


def plugged(what: str, name: str) -> Any:
    """The object of an entry point.

    Args:
        what: a key of `GROUPS`.
        name: of the entry point.

    Raises:
        ImportError: if it cannot be loaded.
    """
    point = entry_points(what)[name]
    try:
        return point.load()
    except Exception as error:
        raise ImportError(
            f"the {what} `{name}` is an entry point at `{point.value}`, and loading it raised "
            f"{type(error).__name__}: {error}"
        ) from error
