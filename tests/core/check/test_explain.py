"""`explain` names the mistake of a program, and finds none where there is none."""

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import (
    Alternating,
    ConjugateGradient,
    Explanation,
    Implicit,
    Problem,
    Unrolled,
    explain,
    train,
)
from bilevel.check.explaining.lanczos import lanczos
from tests.core.check.mistaken_programs import (
    DOUBLE,
    HEALTHY,
    MISTAKES,
    Program,
    cleaning,
    normalised,
)
from tests.devices import DEVICES
from tests.problems import Quadratic, normal, spd


def page_of(program: Program) -> Explanation:
    return explain(
        program.problem,
        program.solver,
        program.upper_batch,
        program.lower_batches,
        **program.settings,
    )


@cache
def page(name: str) -> Explanation:
    return page_of(MISTAKES[name][1]() if name in MISTAKES else HEALTHY[name]())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_the_top_finding(mistake: str) -> None:
    found = page(mistake)
    assert found.top.topic == MISTAKES[mistake][0], found
    assert found.top.severity != "fine"
    assert found.top.change
    lines = str(found).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_programs_raise_nothing(name: str) -> None:
    assert page(name).top.severity == "fine", page(name)


# ------------------------------------------------------------------ step sizes of the two levels


def noisy_weight_after(program: Program, turns: int) -> float:
    """The weight of the corrupted source after some turns of the real loop."""
    for _ in train(
        program.problem,
        program.lower_batches[0],
        upper_data=program.upper_batch,
        num_steps=turns,
        solver=Implicit(ConjugateGradient(10)),
        **{**program.settings, "lower_steps": 1},
    ):
        pass
    return float(program.problem.variables("upper")["source"].detach().softmax(0)[1])


def test_equal_step_sizes_are_told_from_two_time_scales() -> None:
    """A published run: .497 with one rate of 1e-5 after all its turns, .008 with 1e-1 above."""
    found = page("equal step sizes").about("step sizes")
    assert found is not None
    assert found.severity == "wrong"
    assert "50 rehearsed turns" in found.meaning
    assert "both levels have the same rate" in found.meaning
    assert "two time scales" in found.change
    assert not page("data cleaning, two time scales").wrong
    # and so it is: an upper step moves each logit by its rate, whatever the gradient
    assert noisy_weight_after(cleaning(1e-1), 50) < 0.01
    assert noisy_weight_after(cleaning(1e-5), 50) == pytest.approx(0.5 - 50 * 2e-5 / 4, abs=1e-5)


# ------------------------------------------------------------------ what it leaves and what it refuses


@pytest.mark.parametrize("device", DEVICES)
def test_any_device_and_float32(device: str) -> None:
    program = MISTAKES["too few Neumann terms"][1]()
    problem = program.problem.float().to(device)
    rates = {
        f"{level}_optimizer": torch.optim.SGD(problem.variables(level).values(), 0.01)
        for level in ("upper", "lower")
    }
    found = explain(problem, program.solver, **rates, num_steps=3)
    assert found.about("linear solve") in found.wrong


def test_nothing_is_moved() -> None:
    """Variables, buffers, `.grad`, optimizer states, modes and random generators stay to the bit."""
    program = normalised(8)
    problem, mask = program.problem, nn.Dropout(0.5)
    problem.lower.append(mask)
    sgd = torch.optim.SGD(problem.lower.parameters(), 0.01, momentum=0.9)
    adam = torch.optim.Adam(problem.upper.parameters(), 0.01)
    for parameter in problem.parameters():
        parameter.grad = torch.ones_like(parameter)
    sgd.step()
    adam.step()
    grads = [p.grad for p in problem.parameters()]

    def everything() -> Any:
        states = [x.state_dict() for x in (problem, sgd, adam)]
        return copy.deepcopy([states, torch.get_rng_state(), mask.training])

    before = everything()
    found = explain(
        problem,
        Unrolled(3),
        program.upper_batch,
        program.lower_batches,
        upper_optimizer=adam,
        lower_optimizer=sgd,
        num_steps=5,
    )
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(problem.parameters(), grads, strict=True))
    assert found.about("dropout") is not None


def test_a_problem_that_stops_its_gradient_is_explained_without_a_hessian() -> None:
    problem = Quadratic()
    problem.stops_lower_gradient = "it is stopped at the posterior; use another"
    found = explain(problem, Alternating()).about("dropped term")
    assert found is not None
    assert "not measured" in found.meaning
    assert "stopped at the posterior" in found.meaning


def test_a_single_level_has_no_response() -> None:
    problem = Problem.from_functions(
        lambda x, y, _: x["x"].square().sum(), lambda x, y, _: None, {"x": torch.ones(2)}, {}
    )
    assert explain(problem, Alternating()).top.severity == "fine"


def test_constants_in_float32_do_not_hide_rounding() -> None:
    target = torch.tensor([0.3, 0.7])
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - target).square().sum(),
        lambda x, y, _: (y["y"] - x["x"] * target).square().sum(),
        {"x": torch.tensor([0.5, 2.0])},
        {"y": torch.tensor([0.15, 1.4])},
    )
    found = explain(problem, Implicit()).about("precision")
    assert found is not None
    assert 0 <= (found.measured or 0) < 1e-6
    assert "float32" in found.meaning


def test_at_an_optimum_rounding_is_no_finding() -> None:
    target = torch.tensor([0.3, 0.7])
    problem = Problem.from_functions(
        lambda x, y, _: 1 + (y["y"] - target).square().sum(),
        lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        {"x": target + 1e-7},
        {"y": target + 2e-7},
    )
    assert not explain(problem, Implicit()).wrong


def test_bad_input_is_refused_with_a_sentence() -> None:
    problem = Quadratic()
    with pytest.raises(TypeError, match="goes into `Implicit`"):
        explain(problem, ConjugateGradient())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a `Problem`"):
        explain(nn.Linear(1, 1), Implicit())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`explain` has no argument `lr`"):
        explain(problem, Implicit(), lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="`num_steps` must be positive"):
        explain(problem, Implicit(), num_steps=0)
    elsewhere = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(ValueError, match="holds none of the lower variables"):
        explain(problem, Implicit(), lower_optimizer=elsewhere)
    hooked = torch.optim.SGD(problem.lower.parameters(), 0.1)
    hooked.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has step hooks"):
        explain(problem, Implicit(), lower_optimizer=hooked)
    with pytest.raises(ValueError, match="branches from the running lower optimizer"):
        explain(problem, Unrolled(3))


def test_the_page_and_its_table_say_the_same() -> None:
    found = page("equal step sizes")
    text, table = str(found), found._repr_html_()
    assert repr(found) == text
    assert text.splitlines()[-1].startswith("Took ")
    assert "<" not in re.sub(r"<[^<>]*>", "", table)
    for finding in found.findings:
        assert f"{finding.severity}: {finding.topic}" in table
    assert found.about("nothing of the kind") is None


# ------------------------------------------------------------------ eigenvalues


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_lanczos_is_exact_where_the_space_is_small(n: int) -> None:
    """Also for eigenvalues that come several times, and for none but zeros."""
    matrix = spd(n, low=-1.0, high=3.0)
    for a in (matrix, torch.eye(n, **DOUBLE), torch.zeros(n, n, **DOUBLE)):
        found = lanczos(lambda v, a=a: a @ v, normal(n), rounding=1e-12)
        values = torch.linalg.eigvalsh(a)
        assert found.certain
        assert found.smallest == pytest.approx(float(values[0]), abs=1e-10)
        assert found.largest == pytest.approx(float(values[-1]), abs=1e-10)
        assert found.flat == (n if not a.any() else 0)
        assert found.asymmetry < 1e-12
        torch.testing.assert_close(
            a @ found.lowest, found.smallest * found.lowest, rtol=0, atol=1e-9
        )


def test_lanczos_finds_the_ends_of_a_large_spectrum_and_an_operator_that_is_not_symmetric() -> None:
    values = torch.cat([torch.tensor([-2.0, 50.0], **DOUBLE), torch.linspace(0, 10, 998, **DOUBLE)])
    found = lanczos(lambda v: values * v, values, rounding=1e-12)
    assert not found.certain
    assert found.products == 80
    assert found.smallest == pytest.approx(-2, rel=1e-6)
    assert found.largest == pytest.approx(50, rel=1e-9)
    skew = normal(20, 20)
    assert lanczos(lambda v: skew @ v, values[:20], rounding=1e-12).asymmetry > 0.1
