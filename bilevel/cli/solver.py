"""Solvers on the command line: the options that are worth a flag, and what they stand for."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel import Solver
from bilevel.cli.options import Parser, UsageError, choice, integer, number
from bilevel.cli.wording import as_flag
from bilevel.methods.catalogue import (
    LINEAR_SOLVERS,
    SOLVERS,
    arguments,
    make_solver,
    needed,
    pick,
)

_STEPPING = frozenset(kind for kind, make in SOLVERS.items() if needed(make))  # a number of steps
_OWNERS: Mapping[str, Sequence[str]] = {
    "unroll_steps": ("unrolled", *sorted(_STEPPING - {"unrolled"})),
    "linear_solver": ("implicit",),
    "linear_steps": ("implicit",),
    "damping": ("implicit",),
}
_LINEAR = tuple(name.replace("_", "-") for name in LINEAR_SOLVERS)
_STEPS, _DAMPING = 20, 0.1  # of a linear solver, where the command line does not say


def add_options(parser: Parser, *, shown: bool = True) -> None:
    """`--solver` and what belongs to it; not `shown` in the help of a method with a single level."""
    about = "how the upper level feels the lower level's answer (the hypergradient)"
    group = parser.add_argument_group(*(("solver", about) if shown else ()))
    kinds = tuple(SOLVERS)
    group.add_argument(
        "--solver",
        type=choice(kinds),
        metavar="NAME",
        help=f"{', '.join(kinds)}; alternating drops the lower level's response, the others keep it "
        "(default: alternating)",
    )
    group.add_argument(
        "--unroll-steps",
        type=integer,
        metavar="N",
        help=f"{', '.join(_OWNERS['unroll_steps'])}: lower steps (default: 5)",
    )
    group.add_argument(
        "--linear-solver",
        type=choice(_LINEAR),
        metavar="NAME",
        help=f"implicit: how the linear system is solved: {', '.join(_LINEAR)} "
        "(default: conjugate-gradient)",
    )
    group.add_argument(
        "--linear-steps",
        type=integer,
        metavar="N",
        help=f"implicit: steps of it (default: {_STEPS})",
    )
    group.add_argument(
        "--damping",
        type=number,
        metavar="X",
        help=f"implicit: added to the Hessian (default: {_DAMPING})",
    )
    if not shown:
        for action in group._group_actions:
            action.help = argparse.SUPPRESS


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The solver's options on this command line, as plain values.

    Raises:
        UsageError: if one belongs to another solver.
    """
    options = {name: getattr(args, name) for name in ("solver", *_OWNERS) if name in args}
    for name, owners in _OWNERS.items():
        if name in options and options.get("solver", "alternating") not in owners:
            said = as_flag(name)
            raise UsageError(
                f"`{said}` belongs to `--solver {owners[0]}`; add that or leave `{said}` out"
            )
    return options


def solver_of(options: dict[str, Any]) -> Solver:
    """The solver of these options.

    Raises:
        ValueError: if a value is out of range.
    """
    for name in ("unroll_steps", "linear_steps"):
        if options.get(name, 1) < 1:
            raise UsageError(f"`{as_flag(name)}` must be positive, got {options[name]}")
    settings: dict[str, Any] = {"kind": options.get("solver", "alternating")}
    if settings["kind"] in _STEPPING:
        settings["num_steps"] = options.get("unroll_steps", 5)
    if settings["kind"] == "implicit":
        settings |= _linear(options)
    return make_solver(settings)


def _linear(options: dict[str, Any]) -> dict[str, Any]:
    """The linear solver and its own arguments: not every one counts steps, or knows damping."""
    name = options.get("linear_solver", "conjugate-gradient").replace("-", "_")
    known = arguments(pick("linear solver", name, LINEAR_SOLVERS))
    settings: dict[str, Any] = {"linear_solver": name}
    for option, own, usual in (
        ("linear_steps", ("max_steps", "num_steps"), _STEPS),
        ("damping", ("damping",), _DAMPING),
    ):
        found = [argument for argument in own if argument in known]
        if found:
            settings[found[0]] = options.get(option, usual)
        elif option in options:
            kind = name.replace("_", "-")
            raise UsageError(
                f"`{as_flag(option)}` has no meaning for `--linear-solver {kind}`; leave it out"
            )
    return settings
