"""A draw cut in two is the draw: the same batch, the same buffers, the same state of the generator."""

import copy
from typing import Any

import pytest
import torch

from bilevel import Alternating, Batches, train
from bilevel.methods import ContrastiveDivergence, NoiseContrastive
from tests.methods.small_models import MACHINES, data_for
from tests.problems import generator

LEARNERS: dict[str, Any] = {
    "CD-3": lambda machine: ContrastiveDivergence(machine, 3),
    "PCD-2": lambda machine: ContrastiveDivergence(machine, 2, persistent=True),
    "PCD-1, chains": lambda m: ContrastiveDivergence(m, persistent=True, num_chains=7),
    "NCE": lambda machine: NoiseContrastive(machine, ratio=2),
}
KINDS = ("RBM", "GaussianRBM", "DBM", "GaussianDBM")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNERS)
def test_both_parts_make_the_draw(name: str, kind: str) -> None:
    learner, ours, theirs = LEARNERS[name](MACHINES[kind]()), generator(1), generator(1)
    twin = copy.deepcopy(learner)
    for _ in range(3):
        data = data_for(learner.model, 10)
        begun = twin.begin_draw(data, theirs)
        numbers = [number.clone() for number in begun.numbers]
        for whole, parts in zip(learner.draw(data, ours), twin.finish_draw(begun), strict=True):
            assert whole is parts is None or whole.equal(parts)
        assert all(map(torch.equal, begun.numbers, numbers))  # a graph does not write to arguments
        assert ours.get_state().equal(theirs.get_state())
        state = twin.state_dict()
        assert all(value.equal(state[key]) for key, value in learner.state_dict().items())


@pytest.mark.parametrize("name", ["PCD-1, chains"])  # compiling takes seconds
def test_a_graph_with_the_draw_inside_takes_the_same_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, finished = [], []
    for how in (False, "inductor"):
        learner = LEARNERS[name](MACHINES["RBM"]())
        steps = train(
            learner,
            Batches(data_for(learner.model, 30), 10, seed=0),
            upper_optimizer=torch.optim.Adam(learner.upper.parameters(), 0.1),
            num_steps=5,
            solver=Alternating(),
            lower_steps=0,
            seed=0,
            compile=how,
        )
        for step in steps:
            if how and step.number == 1:  # from here on the graph alone runs
                monkeypatch.setattr(type(learner), "finish_draw", finished.append)
        states.append(learner.state_dict())
    assert not finished
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-12)


def test_a_draw_that_is_replaced_is_called() -> None:
    learner = ContrastiveDivergence(MACHINES["RBM"]())
    assert learner.draws_in_parts
    learner.draw = learner.draw  # type: ignore[method-assign]
    assert not learner.draws_in_parts


def test_long_chains_are_drawn_outside() -> None:
    learner = ContrastiveDivergence(MACHINES["RBM"](), steps=11)
    assert learner.begin_draw(data_for(learner.model), generator()) is None
