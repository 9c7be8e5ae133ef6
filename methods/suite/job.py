"""`Job`: a cell of a suite as objects - the table, the machine, the method, the solver."""

from dataclasses import dataclass
from typing import Any, cast, final

from torch import Tensor

from bilevel import Solver
from bilevel.methods.catalogue import (
    METHODS,
    NOTHING,
    SOLVERS,
    Own,
    called,
    construct,
    make_for_machine,
    make_machine,
    make_solver,
)
from bilevel.methods.data.own_tables import Split, own_rows
from bilevel.methods.data.tables import Table, load_table
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import MACHINES, BoltzmannMachine
from bilevel.methods.suite.config import Cell, DataConfig
from bilevel.methods.training.json_lines import note
from bilevel.methods.training.settings import LOWER_ONLY, Training, refuse_idle, validated
from bilevel.plugins import is_address

STANDARDISED = (
    "standardise the table: `load_table(PATH, standardised=True)`, `--standardised` of the command, or "
    '`"options": {"standardised": true}` of the data in a configuration'
)
"""What to do in a suite about rows that are far from standard."""


@final
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
    machine: BoltzmannMachine
    learner: EBLVM
    solver: Solver
    training: Training


def make_job(cell: Cell, table: Table, own: Own = NOTHING) -> Job:
    """Build what a cell names.

    Args:
        cell: names.
        table: its data.
        own: what of these names is not of this package.

    Raises:
        ValueError: for a name or an option there is not, or parts that do not fit; with the cell's name.
    """
    try:
        model, method, width = cell.model, cell.method, table.train.shape[1]
        machine = make_machine(model.kind, model.options, width, cell.seed, own)
        learner = make_for_machine(method.method, method.options, machine, cell.seed, own)
        machine = _judged(learner, machine)
        solver = make_solver(method.solver, own)
        training = _training(cell, learner)
        learner.check(table.train[:1000])
        learner.check(table.test[:1000])
    except (TypeError, ValueError) as error:
        raise ValueError(f"cell `{cell.name}`: {error}") from error
    return Job(cell, table, machine, learner, solver, training)


def _judged(learner: EBLVM, machine: BoltzmannMachine) -> BoltzmannMachine:
    """The machine whose likelihood counts: the learner's; if it has none, the one it stands beside."""
    trained = learner.latent_model.machine
    if trained is None and not callable(getattr(learner, "log_likelihood", None)):
        raise ValueError(
            f"how likely a `{type(learner).__name__}` makes rows is not known: its energy is no "
            "Boltzmann machine; give it a method `log_likelihood(v, generator=...)`, shape (n,)"
        )
    return machine if trained is None else trained


def make_table(data: DataConfig, own: Own = NOTHING) -> Table:
    """Load the rows.

    Args:
        data: names them.
        own: tables that are not of this package: rows, or functions that return them, split or not.

    Raises:
        ValueError: as `load_table`, with the data's name.
        FileNotFoundError: likewise.
    """
    try:
        if data.source in own:
            return _own_table(data, own[data.source])
        return construct("load_table", load_table, data.options, data.source)
    except FileNotFoundError as error:
        said = str(error)
        stop = "" if said.endswith("?") else "."
        raise FileNotFoundError(
            f"data `{data.name}`: {said}{stop} Put it there, or leave these data out with `--only`"
        ) from error
    except ValueError as error:
        raise ValueError(f"data `{data.name}`: {error}") from error


def at_hand(cell: Cell, own: Own) -> bool:
    """Whether all that the cell names is of this package, or given; what is not is noted."""
    method, model = cell.method.method, cell.model.kind
    makers = {name for name, entry in METHODS.items() if entry.for_machine is not None}
    ours = (
        (method, makers),
        (model, MACHINES),
        (cell.method.solver.get("kind", "alternating"), SOLVERS),
    )
    missing = [name for name, known in ours if name not in known and name not in own]
    source = cell.data.source
    if (cell.data.checksum or is_address(source)) and source not in own:
        missing.append(source)
    if missing:
        note(
            f"`{missing[0]}` is code of somebody's own and was not named, so its models are not drawn; "
            "the command that ran the suite draws them"
        )
    return not missing


def _own_table(data: DataConfig, given: Any) -> Table:
    """Rows of one's own; a function is called with the options, other rows are split by them."""
    options = dict(data.options)
    if callable(given) and not isinstance(given, Tensor):
        given, options = called(data.source, given, options), {}
    if isinstance(getattr(given, "train", None), Tensor):
        if options:
            raise ValueError(f"`{data.source}` is a `Table`, split already; leave the options out")
        return cast(Table, given)
    split = construct(data.source, Split, options)
    return Table(data.name, data.source, *own_rows(f"`{data.source}`", given, split))


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
            + STANDARDISED
        )
    made = {**learner.training_defaults, **settings, "seed": cell.seed}
    training = validated(Training, made, levels=levels)
    refuse_idle(training, settings, validated(Training, learner.training_defaults), levels=levels)
    return training
