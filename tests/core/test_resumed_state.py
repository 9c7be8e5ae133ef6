"""What else belongs to a run: buffers, extra state, changed rates, the number of steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import CheckpointError, train
from tests.core.resumed import Noisy, Reading, assert_same, finish, make, state_of
from tests.problems import NetProblem, seeded


class Momentum(Reading):
    """Buffers that no `state_dict` holds: one that a loss assigns, one that begins as `None`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()).double(), persistent=False)
        self.lower.register_buffer("late", None, persistent=False)
        self.register_buffer("mask", torch.zeros(3).double(), persistent=False)

    def upper_loss(self, batch: Any) -> Tensor:
        loss = super().upper_loss(batch)
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss * (1 + self.mean) + self.mask.sum()


def test_buffers_that_no_state_dict_holds_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def fresh(**changes: Any) -> dict[str, Any]:
        return make(**{"problem": Momentum(), "ema": 0.5, **changes})

    whole = finish(fresh())
    assert set(whole["buffers"]) == {"mean", "mask", "lower.late"}
    assert whole["buffers"]["mean"] != 0
    finish(fresh(), path, 3)
    assert_same(finish(fresh(resume=path)), whole)


def test_a_buffer_that_came_late_is_resumed() -> None:
    problem, again = Momentum(), Momentum()
    problem.lower.late = torch.ones(2).double()
    state_of(again).load_state_dict(state_of(problem).state_dict())
    assert torch.equal(again.lower.late, problem.lower.late)


def test_an_earlier_checkpoint_goes_on_from_the_buffers_of_now(tmp_path: Path) -> None:
    state = state_of(Momentum()).state_dict()
    del state["buffers"]
    with pytest.warns(RuntimeWarning, match=r"earlier version, without the values of `mask`"):
        state_of(Momentum()).load_state_dict(state)
    state["buffers"] = {"other": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"the buffer `lower\.late` .* is not in both"):
        state_of(Momentum()).load_state_dict(state)


def test_a_module_whose_extra_state_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            pass

    problem = NetProblem(seeded(lambda: Extra(3, 1)))
    with pytest.raises(CheckpointError, match=r"`lower\._extra_state` is a `object`"):
        state_of(problem).save(tmp_path / "run.pt")


def rates(upper: float = 0.05, gamma: float = 0.9, **options: Any) -> dict[str, Any]:
    problem = Noisy()
    first = torch.optim.Adam(problem.upper.parameters(), upper, **options)
    second = torch.optim.Adam(problem.lower.parameters(), 0.05)
    step = torch.optim.lr_scheduler.StepLR
    return {
        "problem": problem,
        "upper_optimizer": first,
        "lower_optimizer": second,
        "upper_scheduler": step(first, 1, gamma),
        "lower_scheduler": torch.optim.lr_scheduler.SequentialLR(
            second,
            [step(second, 1, gamma=0.5), step(second, 1, options.get("weight_decay", 0.5))],
            [3],
        ),
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"upper": 0.01}, r"`upper_optimizer\.initial_lr` was 0\.05, is 0\.01"),
        ({"weight_decay": 0.1}, r"`upper_optimizer\.weight_decay` was 0, is 0\.1"),
        ({"weight_decay": 0.1}, r"`lower_scheduler\.parts\.1` was .*0\.5.*, is .*0\.1"),
        ({"betas": (0.5, 0.9)}, r"`upper_optimizer\.betas` was \(0\.9, 0\.999\), is \(0\.5"),
        ({"gamma": 0.5}, r"`upper_scheduler\.gamma` was 0\.9, is 0\.5"),
    ],
)
def test_a_changed_rate_is_not_ignored(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    """A resumed run takes the rates of the checkpoint: new ones were accepted and did nothing."""
    path = tmp_path / "run.pt"
    finish(make(**rates()), path, 2)
    train(**make(**rates()), resume=path)
    with pytest.raises(CheckpointError, match=match):
        train(**make(**rates(**changes)), resume=path)


def test_the_optimizers_of_the_run_itself_may_resume_it(tmp_path: Path) -> None:
    """In a notebook the loop is left and entered again with what is there."""
    settings = make(**rates())
    for step in train(**settings):
        if step.number == 2:
            step.state.save(tmp_path / "run.pt")
        if step.number == 3:
            break
    assert next(iter(train(**settings, resume=tmp_path / "run.pt"))).number == 3


def test_a_run_that_is_further_than_its_steps(tmp_path: Path) -> None:
    finish(make(), tmp_path / "run.pt", 4)
    with pytest.raises(
        ValueError, match="after 4 steps, but `num_steps`, the steps in total, is 3"
    ):
        train(**make(num_steps=3, resume=tmp_path / "run.pt"))
    assert list(train(**make(num_steps=4, resume=tmp_path / "run.pt"))) == []


def test_another_number_of_sources(tmp_path: Path) -> None:
    finish(make(), tmp_path / "run.pt", 2)
    with pytest.raises(
        CheckpointError, match="read `data` and `upper_data`, this one reads `data`"
    ):
        train(**make(upper_data=None, resume=tmp_path / "run.pt"))
