"""Solvers by name, with the options that are worth a flag."""

import argparse
from typing import Any

from bilevel import (
    GMRES,
    Alternating,
    ConjugateGradient,
    Identity,
    Implicit,
    LinearSolver,
    Neumann,
    Solver,
    Unrolled,
)
from bilevel.cli.options import Parser, UsageError, choice, number, whole

_OWNERS = {
    "unroll_steps": "unrolled",
    "linear_solver": "implicit",
    "linear_steps": "implicit",
    "damping": "implicit",
}
_LINEAR = ("conjugate-gradient", "neumann", "gmres", "identity")


def add_options(parser: Parser) -> None:
    """`--solver` and what belongs to it."""
    group = parser.add_argument_group(
        "solver", "how the upper level feels the lower level's answer (the hypergradient)"
    )
    kinds = ("alternating", "implicit", "unrolled")
    group.add_argument(
        "--solver",
        type=choice(kinds),
        metavar="|".join(kinds),
        help="alternating drops the lower level's response, the others keep it (default: alternating)",
    )
    group.add_argument(
        "--unroll-steps", type=whole, metavar="N", help="unrolled: lower steps (default: 5)"
    )
    group.add_argument(
        "--linear-solver",
        type=choice(_LINEAR),
        metavar="|".join(_LINEAR),
        help="implicit: how the linear system is solved (default: conjugate-gradient)",
    )
    group.add_argument(
        "--linear-steps", type=whole, metavar="N", help="implicit: steps of it (default: 20)"
    )
    group.add_argument(
        "--damping", type=number, metavar="X", help="implicit: added to the Hessian (default: 0.1)"
    )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The solver's options on this command line, as plain values.

    Raises:
        UsageError: if one belongs to another solver.
    """
    options = {name: getattr(args, name) for name in ("solver", *_OWNERS) if hasattr(args, name)}
    for name, owner in _OWNERS.items():
        if name in options and options.get("solver", "alternating") != owner:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` belongs to `--solver {owner}`; add that or leave `{flag}` out"
            )
    return options


def build(options: dict[str, Any]) -> Solver:
    """The solver of these options.

    Raises:
        ValueError: if a value is out of range.
    """
    kind = options.get("solver", "alternating")
    if kind == "alternating":
        return Alternating()
    if kind == "unrolled":
        return Unrolled(num_steps=options.get("unroll_steps", 5))
    return Implicit(_linear(options))


def _linear(options: dict[str, Any]) -> LinearSolver:
    steps, damping = options.get("linear_steps", 20), options.get("damping", 0.1)
    kind = options.get("linear_solver", "conjugate-gradient")
    if kind == "conjugate-gradient":
        return ConjugateGradient(max_steps=steps, damping=damping)
    if kind == "gmres":
        return GMRES(max_steps=steps, damping=damping)
    if "damping" in options:
        raise UsageError(f"`--damping` has no meaning for `--linear-solver {kind}`; leave it out")
    if kind == "neumann":
        return Neumann(num_steps=steps)
    if "linear_steps" in options:
        raise UsageError(
            "`--linear-steps` has no meaning for `--linear-solver identity`; leave it out"
        )
    return Identity()
