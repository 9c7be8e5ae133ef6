"""`Job`: a cell of a suite as objects - the table, the machine, the method, the solver."""

from dataclasses import dataclass
from typing import final

from bilevel import Solver
from bilevel.methods.catalogue import construct, make_for_machine, make_machine, make_solver
from bilevel.methods.data.tables import Table, load_table
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.suite.config import Cell, DataConfig
from bilevel.methods.training.settings import LOWER_ONLY, Training, refuse_idle, validated


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


def make_job(cell: Cell, table: Table) -> Job:
    """Build what a cell names.

    Raises:
        ValueError: for a name or an option there is not, or parts that do not fit; with the cell's name.
    """
    try:
        model, method, width = cell.model, cell.method, table.train.shape[1]
        machine = make_machine(model.kind, model.options, width, cell.seed)
        learner = make_for_machine(method.method, method.options, machine, cell.seed)
        solver = make_solver(method.solver)
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
        return construct("load_table", load_table, data.options, data.source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data `{data.name}`: {error}. Put it there, or leave these data out with `--only`"
        ) from error
    except ValueError as error:
        raise ValueError(f"data `{data.name}`: {error}") from error


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
