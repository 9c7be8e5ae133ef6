"""From names to objects: the one place where a suite's strings become tables, models and methods."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

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
from bilevel.linear import Cholesky
from bilevel.methods.advil import AdvIL
from bilevel.methods.bism import BiSM
from bilevel.methods.contrastive_divergence import ContrastiveDivergence
from bilevel.methods.data.tables import Table, load_table
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.general_bidvl import GeneralBiDVL
from bilevel.methods.machines import DBM, RBM, GaussianDBM, GaussianRBM, LatentVariableModel
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.noise_contrastive import NoiseContrastive
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.suite.config import Cell, DataConfig
from bilevel.methods.training.settings import LOWER_ONLY, Training, nearest, refuse_idle, validated
from bilevel.methods.vae import VAE
from bilevel.methods.vages import VaGES

MODELS: dict[str, type[LatentVariableModel]] = {
    "RBM": RBM,
    "GaussianRBM": GaussianRBM,
    "DBM": DBM,
    "GaussianDBM": GaussianDBM,
}
METHODS: dict[str, Callable[..., EBLVM]] = {
    "MaximumLikelihood": MaximumLikelihood,
    "ContrastiveDivergence": ContrastiveDivergence,
    "ScoreMatching": ScoreMatching,
    "NoiseContrastive": NoiseContrastive,
    "VAE": VAE.for_table,
    "AdvIL": AdvIL,
    "GeneralBiDVL": GeneralBiDVL.for_model,
    "BiSM": BiSM,
    "VaGES": VaGES,
}
_LINEAR: dict[str, Callable[..., LinearSolver]] = {
    "cholesky": Cholesky,
    "conjugate_gradient": ConjugateGradient,
    "neumann": Neumann,
    "gmres": GMRES,
    "identity": Identity,
}
_OBJECTS = {
    "model",
    "energy",
    "posterior",
    "joint",
    "generator",
}  # arguments that are no plain values


@dataclass(frozen=True, eq=False)
class Job:
    """A cell as objects, nothing trained yet.

    Attributes:
        cell: what it was made of.
        table: its data.
        machine: the Boltzmann machine; of `VAE`, which has none, the one it stands beside.
        learner: the method that trains it.
        solver: of the hypergradient.
        training: all settings, the method's own and those of the configuration.
    """

    cell: Cell
    table: Table
    machine: LatentVariableModel
    learner: EBLVM
    solver: Solver
    training: Training


def make_job(cell: Cell, table: Table) -> Job:
    """Build what a cell names.

    Raises:
        ValueError: for a name or an option there is not, or parts that do not fit; with the cell's name.
    """
    try:
        machine = _machine(cell, table)
        learner = _learner(cell, machine)
        solver = make_solver(cell.method.solver)
        training = _training(cell, learner)
        learner.check(table.train[:1000])
    except (TypeError, ValueError) as error:
        raise ValueError(f"cell `{cell.name}`: {error}") from error
    return Job(cell, table, machine, learner, solver, training)


def make_table(data: DataConfig) -> Table:
    """Load the rows.

    Raises:
        ValueError: as `load_table`, with the data's name.
        FileNotFoundError: likewise.
    """
    try:
        table: Table = construct("load_table", load_table, data.options, data.source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data `{data.name}`: {error}. Put it there, or leave these data out with `--only`"
        ) from error
    except ValueError as error:
        raise ValueError(f"data `{data.name}`: {error}") from error
    return table


def make_solver(settings: Mapping[str, Any]) -> Solver:
    """A solver from plain values: its kind and arguments.

    Raises:
        ValueError: for a name there is not, or a value out of range.

    Example:
        >>> make_solver({"kind": "implicit", "linear_solver": "cholesky", "damping": 0.1})
        Implicit(linear_solver=Cholesky(damping=0.1, max_size=5000, rtol='auto'))
    """
    options = dict(settings)
    kinds = {"alternating": Alternating, "unrolled": Unrolled, "implicit": _implicit}
    kind = options.pop("kind", "alternating")
    if kind == "implicit":
        return _implicit(options)
    solver: Solver = construct(kind, _pick("solver", kind, kinds), options)
    return solver


def construct(
    name: str, make: Callable[..., Any], options: Mapping[str, Any], *given: Any, **objects: Any
) -> Any:
    """`make(*given, **options, **objects)`.

    Args:
        name: what to call it in a refusal.
        make: a class or function.
        options: plain values from a configuration.
        *given: its first arguments.
        **objects: further arguments that no configuration can hold.

    Raises:
        ValueError: for an option it does not have, naming the nearest that it has.
    """
    parameters = list(inspect.signature(make).parameters)[len(given) :]
    known = [parameter for parameter in parameters if parameter not in _OBJECTS]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it takes none"
            raise ValueError(f"`{name}` has no option `{option}`; {hint}")
    return make(*given, **options, **objects)


def _implicit(options: dict[str, Any]) -> Solver:
    kind = options.pop("linear_solver", "conjugate_gradient")
    return Implicit(construct(kind, _pick("linear solver", kind, _LINEAR), options))


def _pick(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"there is no {what} `{name}`; {nearest(str(name), known)}")
    return known[name]


def _machine(cell: Cell, table: Table) -> LatentVariableModel:
    kind = cell.model.kind
    made: LatentVariableModel = construct(
        kind,
        _pick("model", kind, MODELS),
        cell.model.options,
        table.train.shape[1],
        generator=torch.Generator().manual_seed(cell.seed),
    )
    return made


def _learner(cell: Cell, machine: LatentVariableModel) -> EBLVM:
    name, options = cell.method.method, cell.method.options
    make, first, objects = _pick("method", name, METHODS), cast(Any, machine), {}
    if name == "VAE":  # no machine: a table's width, and the visibles of the machine beside it
        gaussian = machine.visible_range is None
        own = {
            "latent_dim": machine.latent_dims[-1],
            "visible": "gaussian" if gaussian else "bernoulli",
            "grey": not gaussian and not machine.binary,
        }
        options, first = {**own, **options}, machine.visible_dim
        objects = {"generator": torch.Generator().manual_seed(cell.seed)}
    learner: EBLVM = construct(name, make, options, first, **objects)
    return learner


def _training(cell: Cell, learner: EBLVM) -> Training:
    levels = 2 if learner.variables("lower") else 1
    # those of a block are for all its methods, and mean nothing to some
    shared = {n: v for n, v in cell.block.training.items() if levels == 2 or n not in LOWER_ONLY}
    settings = {**shared, **cell.method.training}
    if "seed" in settings:
        raise ValueError("`seed` is no training setting of a suite; list `seeds`")
    if settings.get("standardise"):
        raise ValueError(
            "`standardise` is no training setting of a suite, whose models are judged on the way; "
            "standardise the table"
        )
    made = {**learner.training_defaults, **settings, "seed": cell.seed}
    training = validated(Training, made, levels=levels)
    refuse_idle(training, settings, validated(Training, learner.training_defaults), levels=levels)
    return training
