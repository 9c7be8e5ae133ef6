"""Things of one's own on the command line: what stands there by `package.module:Name` is imported.

A name in a file is no wish to run code: of a configuration only what `--code` allows is imported.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from bilevel.cli.options import UsageError
from bilevel.methods.catalogue import METHODS, SOLVERS
from bilevel.methods.data.tables import TABLES
from bilevel.methods.machines import MACHINES
from bilevel.methods.suite.config import SuiteConfig
from bilevel.plugins import entry_points, imported, is_address, plugged

_OURS = {"table": TABLES, "model": MACHINES, "method": METHODS, "solver": SOLVERS}


def add_code_option(group: argparse._ArgumentGroup) -> None:
    """`--code`."""
    group.add_argument(
        "--code",
        nargs="+",
        metavar="MODULE",
        default=[],
        help="modules and packages of your own that the names in the configuration may be imported from",
    )


def own_of(config: SuiteConfig, named: Iterable[str], code: Iterable[str]) -> dict[str, Any]:
    """The objects of a configuration that are not of this package.

    Args:
        config: the suite.
        named: what stands on the command line by its address.
        code: modules and packages that anything may be imported from.

    Raises:
        UsageError: if the configuration names code that the command line does not.
        ValueError: if there is no such object.
        ImportError: if importing it fails.
    """
    found: dict[str, Any] = {}
    for what, name in _names(config):
        if name in found:
            continue
        if is_address(name):
            if name not in set(named) and not _allowed(name, code):
                module = name.partition(":")[0]
                raise UsageError(
                    f"the configuration names code, the {what} `{name}`, and code is imported only if "
                    f"you say so: add `--code {module}`"
                )
            found[name] = imported(name)
        elif name not in _OURS[what] and name in entry_points(what):
            found[name] = plugged(what, name)
    return found


def _names(config: SuiteConfig) -> Iterator[tuple[str, str]]:
    for block in config.blocks:
        yield from (("table", data.source) for data in block.data)
        yield from (("model", model.kind) for model in block.models)
        for method in block.methods:
            yield "method", method.method
            yield "solver", str(method.solver.get("kind", "alternating"))


def _allowed(address: str, code: Iterable[str]) -> bool:
    module = address.partition(":")[0]
    return any(address == one or f"{module}.".startswith(f"{one}.") for one in code)
