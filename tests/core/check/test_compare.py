"""`compare`: solvers side by side on one problem."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Cholesky,
    ConjugateGradient,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Response,
    Solver,
    Unrolled,
    compare,
)
from bilevel.check.comparison import short_name
from bilevel.check.costs import measure
from tests.problems import Quadratic, normal

ONCE: dict[str, Any] = {"repeats": 1}


class Scaled(Solver):
    """The right answer, `factor` times as long."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        exact = Implicit(Cholesky()).respond(oracles, state, lower_optimizer)
        return Response(
            exact.lower, lambda v: exact.vjp(v)._replace(product=self._scaled(exact, v))
        )

    def _scaled(self, exact: Response, v: Any) -> Any:
        assert exact.vjp is not None
        return {n: self.factor * g for n, g in exact.vjp(v).product.items()}


class Clumsy(Solver):
    """Fails at its `after`-th call; draws from the global generator before."""

    def __init__(self, after: int = 0) -> None:
        self.after = after

    def respond(self, oracles: Any, state: Any, lower_optimizer: Any) -> Response:
        self.after -= 1
        torch.rand(3)
        if self.after < 0:
            return {}["missing"]
        return Response(oracles.lower, None)


class Wide(Problem):
    """60 upper variables, in float32."""

    matrix: Tensor
    curvature: Tensor

    def __init__(self, n: int = 60) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(n).float()})
        self.lower = nn.ParameterDict({"y": torch.zeros(n)})
        self.register_buffer("matrix", normal(n, n, seed=3).float() / n**0.5)
        self.register_buffer("curvature", torch.linspace(0.2, 1, n))

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - 1).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        away = self.lower["y"] - self.best_response(None)["y"]
        return (self.curvature * away.square()).sum() / 2

    def best_response(self, batch: Any) -> dict[str, Tensor]:
        return {"y": self.matrix @ self.upper["x"].tanh()}


def test_errors_are_those_of_the_closed_form() -> None:
    """Seven unrolled steps from the solution leave out (I - 0.1 H)^7 of the response."""
    problem = Quadratic()
    sgd = torch.optim.SGD(problem.lower.parameters(), 0.1)
    found = compare(problem, [Unrolled(7), Implicit(), Alternating()], lower_optimizer=sgd, **ONCE)
    exact = problem.hypergradient()
    problem.solve()
    for row in found.rows:
        answer = row.solver.hypergradient(problem, lower_optimizer=sgd).grad["x"]
        error = float((answer - exact).norm() / exact.norm())
        assert row.relative_error == pytest.approx(error, rel=1e-6, abs=1e-9)
        cosine = float(answer @ exact / answer.norm() / exact.norm())
        assert row.cosine == pytest.approx(cosine, rel=1e-9)
        assert row.norm_ratio == pytest.approx(float(answer.norm() / exact.norm()), rel=1e-6)
        low, high = row.relative_error_interval or (1.0, 0.0)
        assert low <= row.relative_error <= high < row.relative_error + 1e-6
        assert row.seconds is not None
        assert row.first_seconds is not None
        assert 0 < row.seconds < 1 > row.first_seconds > 0
    assert [row.products for row in found.rows][::2] == [7, 0]
    assert "the lower solution, where solvers are asked; all 3 directions measured" in found.truth


def test_of_many_variables_the_intervals_hold_the_truth() -> None:
    """Along the answers' own directions and a few random ones, in float64 though it is float32."""
    problem = Wide()
    solvers = {"exact": Implicit(Cholesky()), "half": Scaled(0.5), "none": Implicit(Identity())}
    found = compare(problem, solvers, num_directions=6, **ONCE)
    assert "8 of their 60 directions measured" in found.truth
    assert found["exact"].relative_error is not None
    assert found["exact"].relative_error < 1e-4
    for name, error in (("half", 0.5), ("exact", 0.0)):
        low, high = found[name].relative_error_interval or (1.0, 0.0)
        assert low <= error + 1e-5
        assert error - 1e-5 <= high < error + 0.01
    assert found["half"].cosine == pytest.approx(1, abs=1e-6)
    assert found["half"].norm_ratio == pytest.approx(0.5, abs=1e-4)


def test_answers_that_are_all_wrong_leave_the_rest_to_random_directions() -> None:
    problem = Wide()
    matrix_free = compare(problem, [Implicit(Identity())], num_directions=32, **ONCE).rows[0]
    whole = compare(problem, [Implicit(Identity())], num_directions=60, **ONCE).rows[0]
    low, high = matrix_free.cosine_interval or (1.0, 0.0)
    assert whole.cosine is not None
    assert low < whole.cosine < high
    assert high - low < 0.3
    assert "± " in str(compare(problem, [Implicit(Identity())], num_directions=8, **ONCE))


def test_a_solver_that_fails_has_a_reason_and_stops_nobody() -> None:
    problem = Quadratic()
    found = compare(
        problem,
        {
            "at once": Clumsy(),
            "later": Clumsy(2),
            "no optimizer": Unrolled(3),
            "short": Implicit(ConjugateGradient(1, rtol=1e-12)),
            "far": Implicit(Neumann(400, step_size=3.0)),
            "good": Implicit(Cholesky()),
        },
        **ONCE,
    )
    assert found["at once"].reason == "KeyError: 'missing'"
    assert found["later"].reason == "called again, it failed: KeyError: 'missing'"
    assert "pass it as `lower_optimizer`" in found["no optimizer"].reason
    for name in ("at once", "no optimizer"):
        assert found[name].cosine is found[name].seconds is found[name].relative_error is None
    assert found["short"].relative_error is not None
    assert found["short"].reason.startswith("the linear solver ended without")
    assert "diverged" in found["far"].reason or "NaN" in found["far"].reason
    assert (found["good"].relative_error or 0) < 1e-8
    assert found.verdict.startswith("The quickest within 1% of the truth is `good`")
    text = str(found)
    assert "at once: KeyError: 'missing'\n" in text
    assert "short !" in text


def test_everything_is_left_as_it_was() -> None:
    class Normed(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.lower["scale"] = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.norm = nn.BatchNorm1d(1, affine=False).double()

        def lower_loss(self, batch: Any) -> Tensor:
            pull = super().lower_loss(batch) + (self.lower["scale"] - 1).square()
            return pull + 0 * self.norm(self.lower["y"][:, None]).sum()

        def best_response(self, batch: Any) -> Any:
            return None

    problem = Normed()
    adam = torch.optim.Adam(problem.lower.parameters(), 0.1)
    problem.lower_loss(None).backward()
    adam.step()
    state, optimizer = copy.deepcopy(problem.state_dict()), copy.deepcopy(adam.state_dict())
    grads = [p.grad for p in problem.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    draws = torch.get_rng_state()
    solvers = [Unrolled(2), Clumsy(9), Implicit()]
    compare(problem, solvers, lower_optimizer=adam, num_directions=1, **ONCE)
    assert torch.equal(torch.get_rng_state(), draws)
    torch.testing.assert_close(problem.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(adam.state_dict()["state"], optimizer["state"], rtol=0, atol=0)
    for p, grad, value in zip(problem.parameters(), grads, values, strict=True):
        assert p.grad is grad
        assert value is None or torch.equal(p.grad, value)


def test_against_the_steps_that_are_run() -> None:
    """Unrolling all of them is exact there; the implicit answer belongs to another lower level."""
    problem = Quadratic()
    sgd = torch.optim.SGD(problem.lower.parameters(), 0.1)
    found = compare(problem, [Unrolled(4), Implicit()], lower_steps=4, lower_optimizer=sgd, **ONCE)
    assert "a replay of the lower optimizer's 4 lower steps" in found.truth
    unrolled, implicit = found.rows
    assert (unrolled.relative_error or 0) < 1e-8
    assert (implicit.relative_error or 0) > 0.1
    unsolved = compare(problem, [Implicit()], solve_first=False, **ONCE)
    assert "asked at the current lower variables" in unsolved.truth
    assert (unsolved.rows[0].relative_error or 0) > 0.1


def test_where_the_truth_is_not_known_costs_are_told() -> None:
    problem = Wide(2)
    problem.best_response = lambda batch: None  # type: ignore[method-assign]
    problem.stops_lower_gradient = "the lower gradient is stopped; drop the `.detach()`"
    found = compare(problem, [Alternating(), Implicit()], **ONCE)
    assert found.truth.startswith("a truth that is not known: ")
    assert "the lower gradient is stopped" in found.truth
    alternating, implicit = found.rows
    assert alternating.cosine is None
    assert alternating.seconds is not None
    assert "the lower gradient is stopped" in implicit.reason
    assert found.verdict.startswith("No solver can be recommended")
    found.plot()


def test_a_single_level() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: x["x"].pow(3).sum(),
        lambda x, y, _: torch.zeros(()),
        {"x": torch.ones(2)},
        {},
    )
    plain, implicit = compare(problem, [Alternating(), Implicit()], **ONCE).rows
    assert (plain.relative_error or 0) < 1e-6
    assert "needs a lower level" in implicit.reason


def test_memory_is_what_is_held_at_a_time() -> None:
    kept: list[Tensor] = []

    def keeps() -> None:
        parts = [torch.ones(1000) for _ in range(5)]  # 4 kB each
        kept.append(parts[0])

    def drops() -> None:
        for _ in range(5):
            torch.ones(1000)

    costs, failed = measure({"keeps": keeps, "drops": drops}, 1, torch.device("cpu"))
    assert not failed
    assert 20_000 <= (costs["keeps"].peak_bytes or 0) < 25_000
    assert 4_000 <= (costs["drops"].peak_bytes or 0) < 9_000


def test_reading_a_comparison(tmp_path: Path) -> None:
    solvers = [Alternating(), Implicit(), Implicit(), Implicit(ConjugateGradient(30, rtol=1e-9))]
    solvers += [Implicit(ConjugateGradient(40, damping=1e-3, rtol=1e-11)), Clumsy()]
    found = compare(Quadratic(), solvers, **ONCE)
    names = [row.name for row in found.rows]
    assert names[:4] == [
        "Alternating()",
        "Implicit()",
        "Implicit() (2)",
        "Implicit(ConjugateGradient(30, rtol=1e-09))",
    ]
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert repr(found) == str(found)
    assert lines[0].startswith("Quadratic against the lower solution")
    frame = found.to_frame()
    assert list(frame["name"]) == names
    assert {"cosine_low", "cosine_high", "relative_error_high", "peak_bytes"} <= set(frame)
    assert math.isnan(frame["cosine"][5])
    assert found._repr_html_().count("<tr>") == len(names) + 3
    with pytest.raises(KeyError, match=r"there is no solver `Implicit`"):
        found["Implicit"]
    figure = found.plot()
    figure.savefig(tmp_path / "solvers.png")
    words = [t.get_text() for t in figure.axes[1].get_yticklabels()]
    assert len(words) == len(names)
    assert "failed" in [t.get_text() for t in figure.axes[1].texts]


@pytest.mark.parametrize(
    ("solvers", "error", "message"),
    [
        ([], ValueError, "`solvers` is empty"),
        ({}, ValueError, "`solvers` is empty"),
        (Implicit(), TypeError, "must be a list of solvers, or a mapping of names to them"),
        ("implicit", TypeError, "got 'implicit'"),
        ([Implicit], TypeError, r"give an instance, `Implicit\(...\)`"),
        (["implicit"], TypeError, "`solver` must be a solver, got 'implicit'"),
        ([None], TypeError, "`solver` must be a solver"),
        ([Cholesky()], TypeError, r"a linear solver goes into `Implicit`"),
        ({1: Implicit()}, TypeError, "name must be a string, got 1"),
    ],
)
def test_what_is_no_list_of_solvers_is_refused(solvers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        compare(Quadratic(), solvers)


def test_other_arguments_are_refused_before_anything_is_asked() -> None:
    asked = {"good": Clumsy()}
    for given in ({"repeats": 0}, {"num_directions": 0}, {"against": "truth"}, {"lower_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(given))):
            compare(Quadratic(), asked, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`lower_optimizer`, which was not given"):
        compare(Quadratic(), asked, lower_steps=3)
    with pytest.raises(TypeError, match="`problem` must be a `Problem`"):
        compare(Quadratic, asked)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean `repeats`"):
        compare(Quadratic(), asked, repeat=1)  # type: ignore[call-arg]
    assert asked["good"].after == 0


def test_a_short_name_says_what_is_unusual() -> None:
    assert short_name(Unrolled(5, mode="forward")) == "Unrolled(5, mode='forward')"
    assert short_name(Implicit(Neumann(9))) == "Implicit(Neumann(9))"
    assert short_name(Implicit(lambda A, b: b)) == "Implicit(...)"
    assert short_name(Clumsy()) == "Clumsy()"
