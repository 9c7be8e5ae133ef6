"""`explain` names the mistake of a program, and finds none where there is none."""

from functools import cache

import pytest

from bilevel import ConjugateGradient, Explanation, Implicit, explain, train
from tests.core.check.mistaken_programs import (
    HEALTHY,
    MISTAKES,
    Program,
    cleaning,
)


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
    assert "Both levels have the same rate" in found.meaning
    assert "two time scales" in found.change
    assert not page("data cleaning, two time scales").wrong
    # and so it is: an upper step moves each logit by its rate, whatever the gradient
    assert noisy_weight_after(cleaning(1e-1), 50) < 0.01
    assert noisy_weight_after(cleaning(1e-5), 50) == pytest.approx(0.5 - 50 * 2e-5 / 4, abs=1e-5)
