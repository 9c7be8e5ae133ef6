"""What a stranger does wrong with a solver is said in a sentence, before anything has moved."""

from typing import Any, final

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from bilevel import (
    BDA,
    BOME,
    DARTS,
    F2BA,
    F2SA,
    FSLA,
    KFAC,
    MINRES,
    SABA,
    SAMA,
    SOBA,
    SUSTAIN,
    BiCGStab,
    ConditionProblem,
    ConjugateGradient,
    EvolutionStrategies,
    HypergradientError,
    Implicit,
    Problem,
    Result,
    SciPy,
    Solver,
    StocBiO,
    Unrolled,
    train,
)
from tests.problems import NetProblem, Quadratic, normal, seeded
from tests.solver_rows import plain


@final
class Turning(ConditionProblem):
    """A condition whose Jacobian is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2)})
        self.lower = nn.ParameterDict({"y": normal(2, seed=1)})

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower["y"].square().sum()

    def lower_condition(self, batch: Any) -> dict[str, Tensor]:
        y = self.lower["y"]
        return {"y": y + 0.5 * torch.stack([y[1], -y[0]]) - self.upper["x"]}


@pytest.mark.parametrize(
    "solver", [F2SA(step_size=0.1), SOBA(0.1), SABA(step_size=0.1), FSLA(step_size=0.1)]
)
@pytest.mark.parametrize("state", [0, "state", [1, 2], torch.zeros(7), {"calls": 0}, "larger"])
def test_a_state_of_something_else_is_refused(solver: Solver, state: Any) -> None:
    if isinstance(state, str) and state == "larger":
        state = solver.hypergradient(Quadratic(5)).state
    with pytest.raises(ValueError, match=rf"`{type(solver).__name__}`.*leave it out"):
        solver.hypergradient(Quadratic(), state=state)


def test_the_solvers_own_state_goes_on() -> None:
    solver = SUSTAIN(num_terms=2, step_size=0.1)
    state = solver.hypergradient(Quadratic()).state
    assert solver.hypergradient(Quadratic(), state=state).state["calls"] == 2


@pytest.mark.parametrize(
    "solver", [Unrolled(2), SAMA(), F2SA(), BOME(), SOBA(), SABA(), Implicit(BiCGStab())]
)
@pytest.mark.parametrize("where", ["c", "t"])
def test_nan_is_no_success(solver: Solver, where: str) -> None:
    problem = Quadratic()
    getattr(problem, where)[0] = torch.nan
    given = {"lower_optimizer": plain(problem)}
    assert solver.hypergradient(problem, throw=False, **given).result is Result.NOT_FINITE
    with pytest.raises(HypergradientError, match="a NaN or infinite number appeared"):
        solver.hypergradient(problem, **given)


@pytest.mark.parametrize("solver", [F2BA(), DARTS(), SOBA(), SUSTAIN()])
def test_step_sizes_of_other_variables_are_refused(solver: Solver) -> None:
    with pytest.raises(ValueError, match="moves none of the lower variables; build it from"):
        solver.hypergradient(Quadratic(), lower_optimizer=plain(Quadratic()))


@pytest.mark.parametrize(
    "solver",
    [F2SA(), BDA(2), DARTS(), SAMA(), EvolutionStrategies(2), SOBA(), StocBiO()],
)
def test_a_learned_rate_is_not_taken_for_a_number(solver: Solver) -> None:
    problem = Quadratic()
    problem.upper["lr"] = torch.tensor(0.1, dtype=torch.float64)
    optimizer = plain(problem)
    optimizer.param_groups[0]["lr"] = problem.upper["lr"]
    with pytest.raises(
        ValueError, match=rf"`lr` .* is learned.*`{type(solver).__name__}` takes it"
    ):
        solver.hypergradient(problem, lower_optimizer=optimizer)


@pytest.mark.parametrize(
    ("solver", "kind", "said"),
    [
        (Implicit(KFAC()), Quadratic, "`KFAC` found no layer"),
        (Implicit(ConjugateGradient()), Turning, "`ConjugateGradient` solves symmetric systems"),
        (Implicit(MINRES()), Turning, "`MINRES` solves symmetric systems"),
        (SAMA(), Turning, "`SAMA` needs a lower loss"),
    ],
)
def test_what_cannot_go_together_moves_nothing(
    solver: Solver, kind: type[Problem], said: str
) -> None:
    problem = kind()
    before = [p.detach().clone() for p in problem.parameters()]
    upper = torch.optim.SGD(problem.upper.parameters(), 0.1)
    with pytest.raises(ValueError, match=said):
        next(
            train(
                problem,
                upper_optimizer=upper,
                lower_optimizer=plain(problem),
                num_steps=1,
                solver=solver,
            )
        )
    assert all(map(torch.equal, before, problem.parameters()))


def test_kronecker_factors_of_layers_in_bfloat16() -> None:
    problem = NetProblem(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))))
    problem.float()
    solver = Implicit(KFAC(damping=1.0))
    batch = normal(8, 3).float(), normal(8).float()
    exact = solver.hypergradient(problem, batch, [batch]).grad
    steps = train(
        problem,
        batch,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.0),
        lower_steps=0,
        num_steps=1,
        solver=solver,
        precision=torch.bfloat16,
    )
    for name, g in next(steps).hypergradient.grad.items():
        torch.testing.assert_close(g, exact[name], rtol=0.1, atol=0.01)


def test_scipy_stops_at_what_the_dtype_allows() -> None:
    problem = Quadratic().float()
    solver = Implicit(SciPy(scipy.sparse.linalg.gmres))
    assert solver.hypergradient(problem).result is Result.SUCCESS
    with pytest.raises(TypeError, match="`options` must be a dictionary"):
        SciPy(scipy.sparse.linalg.gmres, options="maxiter=5")  # type: ignore[arg-type]
