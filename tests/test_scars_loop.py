"""What a user may hand to `train` by mistake is refused at the call; what is right just works."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import nn
from torch.optim import lr_scheduler

from bilevel import Alternating, ConjugateGradient, Implicit
from tests.least_squares import DATA, INPUTS, TARGETS, Given, Net, assert_equal, begin, end, sgd


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_steps": 2.5}, "`num_steps` must be a whole number, got 2.5"),
        ({"num_steps": "3"}, "`num_steps` must be a whole number, got '3'"),
        ({"num_steps": True}, "`num_steps` must be a whole number, got True"),
        ({"num_steps": None}, "`num_steps` must be a whole number, got None"),
        ({"lower_steps": 1.5}, "`lower_steps` must be a whole number"),
        ({"lower_steps": torch.tensor(1)}, "`lower_steps` must be a whole number, got a `Tensor`"),
        ({"check_every": 2.0}, "`check_every` must be a whole number"),
        ({"batch_size": 4.0}, "`batch_size` must be a whole number"),
        ({"batch_size": True}, "`batch_size` must be a whole number"),
        ({"batch_size": 0}, "`batch_size` must lie between 1 and the number of rows, 12; got 0"),
        ({"seed": 1.5}, "`seed` must be a whole number"),
        ({"seed": None}, "`seed` must be a whole number"),
        ({"seed": 2**63}, "`seed` must lie between"),
        ({"clip_upper": -1.0}, "`clip_upper` must be positive, got -1.0"),
        ({"clip_upper": 0}, "`clip_upper` must be positive, got 0"),
        ({"clip_lower": float("nan")}, "`clip_lower` must be positive, got nan"),
        ({"clip_lower": float("inf")}, "`clip_lower` must be positive and finite"),
        ({"clip_lower": "1"}, "`clip_lower` must be positive: a number, got '1'"),
        ({"clip_lower": True}, "`clip_lower` must be positive: a number, got True"),
        ({"ema": 1.0}, "`ema` must lie between 0 and 1"),
        ({"ema": -0.5}, "`ema` must be positive"),
        ({"ema": True}, "`ema` must be positive: a number"),
        ({"throw": "no"}, "`throw` must be `True` or `False`, got 'no'"),
        ({"compile": 1}, '`compile` must be `True`, `False`, "record" or "inductor", got 1'),
        ({"order": None}, "`order` must be"),
        ({"resume": True}, "`resume` must be the path of a checkpoint .*, got True"),
        ({"resume": b"run.pt"}, "`resume` must be the path of a checkpoint"),
        ({"solver": "implicit"}, r"`solver` must be a solver, got 'implicit'; .*`Implicit\(\)`"),
        ({"solver": Implicit}, r"got the class `Implicit`; give an instance, `Implicit\(...\)`"),
        ({"solver": ConjugateGradient()}, r"`solver=Implicit\(ConjugateGradient\(\)\)`"),
        ({"solver": nn.Linear(1, 1)}, "`solver` must be a solver, got a `Linear`"),
        (
            {"upper_optimizer": 0.1},
            "`upper_optimizer` must be a `torch.optim` optimizer .* got 0.1",
        ),
        ({"upper_optimizer": torch.optim.SGD}, "got the class `SGD`"),
        ({"upper_optimizer": None}, "there is no `upper_optimizer`"),
        ({"upper_optimizer": []}, "there is no `upper_optimizer`"),
        ({"lower_optimizer": torchopt.sgd(0.1)}, r"torchopt transformation is for `Unrolled\("),
        ({"lower_optimizer": torchopt.sgd}, "`lower_optimizer` must be a `torch.optim` optimizer"),
        ({"upper_scheduler": lr_scheduler.StepLR}, "got the class `StepLR`"),
        ({"upper_scheduler": 0.9}, "`upper_scheduler` must be a scheduler"),
    ],
)
def test_a_bad_argument_is_one_sentence_at_the_call(changes: dict[str, Any], match: str) -> None:
    """Half of these were accepted: 2.5 steps were three, a negative clip climbed uphill."""
    with pytest.raises((TypeError, ValueError), match=match):
        begin(**changes)


def made_of(make: Callable[..., Any]) -> Given:
    return Given(lambda settings, problem: make(settings, problem))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {
                "upper_scheduler": made_of(
                    lambda s, p: lr_scheduler.ReduceLROnPlateau(s["upper_optimizer"])
                )
            },
            "`ReduceLROnPlateau`, whose `step` needs `metrics`",
        ),
        (
            {"upper_scheduler": made_of(lambda s, p: lr_scheduler.StepLR(sgd(Net()), 1))},
            "scheduler of another optimizer than `upper_optimizer`",
        ),
        (
            {"lower_scheduler": made_of(lambda s, p: lr_scheduler.StepLR(s["upper_optimizer"], 1))},
            "scheduler of another optimizer than `lower_optimizer`",
        ),
        (
            {
                "upper_scheduler": made_of(
                    lambda s, p: [lr_scheduler.StepLR(s["upper_optimizer"], 1)] * 2
                )
            },
            "holds the same scheduler twice",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: sgd(p))},
            r"`lower_optimizer` also holds `upper\.l`, which the lower level does not",
        ),
        (
            {
                "upper_optimizer": made_of(
                    lambda s, p: torch.optim.SGD([p.upper["l"], nn.Parameter(torch.ones(2))], 0.1)
                )
            },
            r"`upper_optimizer` also holds 1 tensors \(the first of shape \(2,\)\)",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: [sgd(p.lower), sgd(p.lower)])},
            "two optimizers in `lower_optimizer` hold the same variables",
        ),
        (
            {
                "lower_optimizer": made_of(
                    lambda s, p: sgd(p.lower, torch.tensor(0.1, requires_grad=True))
                )
            },
            "`lr` of `lower_optimizer` is a tensor that is learned",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: sgd(p.lower, p.upper["l"].data.fill_(0.5)))},
            "`lr` of `lower_optimizer` is a tensor that is learned or belongs to the problem",
        ),
    ],
)
def test_optimizers_and_schedulers_of_something_else(changes: dict[str, Any], match: str) -> None:
    """A scheduler of another optimizer scheduled nothing; a learned rate had gradient 0."""
    with pytest.raises((TypeError, ValueError), match=match):
        begin(**changes)


def test_a_rate_that_is_a_plain_tensor_is_taken() -> None:
    assert_equal(
        end(lower_optimizer=Given(lambda s, p: sgd(p.lower, torch.tensor(0.125)))),
        end(lower_optimizer=Given(lambda s, p: sgd(p.lower, 0.125))),
    )


def test_whole_numbers_of_numpy_and_nothing_for_a_scheduler_just_work() -> None:
    assert_equal(
        end(
            num_steps=np.int64(3),
            lower_steps=np.int32(1),
            batch_size=np.int64(12),
            seed=np.uint8(0),
            throw=np.bool_(True),
            clip_upper=np.float32(1e9),
            upper_scheduler=None,
            lower_scheduler=[],
        ),
        end(batch_size=12),
    )


def test_a_stale_gradient_moves_no_frozen_parameter() -> None:
    """`.grad` that a pretraining left on a layer frozen since would be applied in every step."""
    problem = Net()
    problem.lower.bias.grad = torch.ones(1).double()
    problem.lower.bias.requires_grad_(False)
    before = problem.lower.bias.clone()
    end(problem=problem)
    assert torch.equal(problem.lower.bias, before)


def test_under_inference_mode_there_is_one_sentence() -> None:
    with torch.inference_mode():
        for attempt in (begin, lambda: Alternating().hypergradient(Net(), DATA, [DATA])):
            with pytest.raises(
                RuntimeError, match=r"inside `torch.inference_mode\(\)` nothing can be"
            ):
                attempt()
        made = INPUTS.clone(), TARGETS.clone()
    steps = begin()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="nothing can be differentiated"):
        next(steps)
    assert_equal(end(made), end())  # data made there are fine


def test_what_is_no_problem() -> None:
    for wrong in (nn.Linear(1, 1), Net, None):
        with pytest.raises(TypeError, match="`problem` must be a `Problem`, got"):
            Alternating().hypergradient(wrong)  # type: ignore[arg-type]
    levelless = Net()
    del levelless.lower
    with pytest.raises(TypeError, match=r"`Net` has no `self\.lower`"):
        Alternating().hypergradient(levelless, DATA)
