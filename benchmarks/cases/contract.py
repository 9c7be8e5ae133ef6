"""The tests' contract table of problems and solvers, at variables drawn from a seed."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch

from bilevel import Certificate, Cholesky, Implicit, Problem, Solver, Unrolled, certify
from bilevel.check.lower_solution import solve_lower
from bilevel.oracles import Oracles
from tests.problems import ROWS, Row
from tests.test_contract_solvers import SOLVERS, build

_SPREAD = 0.3  # of the drawn changes of all variables


@final
@dataclass(frozen=True)
class Trial:
    """A problem of the table, a solver, and the lower optimizer it branches from."""

    row_name: str
    solver_name: str
    problem: Problem
    optimizer: Any

    @property
    def _row(self) -> Row:
        return ROWS[self.row_name]

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.solver_name][0]

    def certificate(self, seed: int) -> Certificate:
        """What is said of the solver's hypergradient."""
        row = self._row
        return certify(
            self.problem,
            self._solver,
            row.upper_batch,
            [row.lower_batch],
            lower_optimizer=self.optimizer,
            seed=seed,
        )

    def error(self) -> float | None:
        """The relative error by the exact derivative; `None` where it is not known."""
        row, solver = self._row, self._solver
        batches, steps = (row.upper_batch, [row.lower_batch]), solver.unrolled_steps()
        kept = {"lower_optimizer": self.optimizer, "throw": False}
        answer = solver.hypergradient(self.problem, *batches, **kept).grad
        if steps is not None:
            full = Unrolled(steps.num_steps, steps.optimizer, mode="recompute")
            exact = full.hypergradient(self.problem, *batches, **kept).grad
        elif row.solvable:
            solved = copy.deepcopy(self.problem)
            found = solve_lower(Oracles(solved, *batches))
            with torch.no_grad():
                for name, y in solved.variables("lower").items():
                    y.copy_(found[name])
            exact = Implicit(Cholesky()).hypergradient(solved, *batches).grad
        else:
            return None
        mine, true = (
            torch.cat([g.double().reshape(-1) for g in grads.values()]) for grads in (answer, exact)
        )
        return float((mine - true).norm() / true.norm())


def trials(seed: int) -> Iterator[Trial]:
    """Every problem of the table, each with the solver whose turn it is: all pairs in 14 seeds."""
    names = list(SOLVERS)
    for place, (row_name, row) in enumerate(ROWS.items()):
        solver_name = names[(seed + place) % len(names)]
        problem, optimizer = build(row, solver_name, "cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in problem.parameters():
                p += _SPREAD * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        yield Trial(row_name, solver_name, problem, optimizer)
