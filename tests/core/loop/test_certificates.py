"""`train(certify_every=...)`: certificates on the way, and a run that does not notice."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import Alternating, Implicit, Problem, Solver, Step, Unrolled, train


class Noisy(Problem):
    """Dropout, batch norm, and noise drawn into the batch."""

    def __init__(self, drop: float = 0.2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lower = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 1)
            )
        self.upper = nn.ParameterDict({"w": torch.zeros(20), "l": torch.tensor(-3.0)})

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        return (*data, torch.randn(len(data[0]), 1, generator=generator))

    def upper_loss(self, batch: Any) -> Tensor:
        loss: Tensor = (self.lower(batch[0]) - batch[1]).square().mean()
        return loss

    def lower_loss(self, batch: Any) -> Tensor:
        inputs, targets, noise = batch
        errors = (self.lower(inputs) - targets - 0.1 * noise).square()[:, 0]
        place = (100 * inputs[:, 0].abs()).long() % 20
        squares = sum((p.square().sum() for p in self.lower.parameters()), torch.zeros(()))
        loss: Tensor = (self.upper["w"][place].sigmoid() * errors).mean()
        return loss + self.upper["l"].exp() * squares


def run(solver: Solver, **settings: Any) -> tuple[list[Step], dict[str, Tensor], Tensor]:
    problem = Noisy(0.0 if settings.get("compile") else 0.2)
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    steps = list(
        train(
            problem,
            (inputs, inputs.sum(1, keepdim=True).sin()),
            upper_optimizer=torch.optim.Adam(problem.upper.parameters(), 0.05),
            lower_optimizer=torch.optim.Adam(problem.lower.parameters(), 0.01),
            solver=solver,
            batch_size=20,
            **{"num_steps": 4, "lower_steps": 2, **settings},
        )
    )
    return steps, problem.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        (Unrolled(3), {}),
        (Unrolled(3), {"order": "upper_first", "precision": torch.bfloat16, "clip_lower": 1.0}),
        (Alternating(), {"order": "upper_first", "certify_steps": 2}),
    ],
)
def test_the_run_is_the_same_to_the_bit(solver: Solver, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        looked, after, random = run(solver, certify_every=2, **settings)
        settings.pop("certify_steps", None)
        plain, alone, untouched = run(solver, **settings)
    assert [s.certificate is not None for s in looked] == [False, True, False, True]
    assert all(s.certificate is None for s in plain)
    assert [float(s.upper_loss) for s in looked] == [float(s.upper_loss) for s in plain]
    assert all(torch.equal(after[n], alone[n]) for n in alone)
    assert torch.equal(random, untouched)


def test_it_says_what_it_found_and_what_it_cost() -> None:
    steps, _, _ = run(Unrolled(3), certify_every=4)
    certificate = steps[-1].certificate
    assert certificate is not None
    assert certificate.passed, certificate
    assert certificate.share is not None
    assert 0 < certificate.share < 1
    assert certificate.seconds <= steps[-1].seconds
    assert steps[-1].numbers()["certificate.cosine"] == certificate.cosine
    assert "certificate.cosine" not in steps[0].numbers()


def test_it_warns_once() -> None:
    with pytest.warns(RuntimeWarning, match="hypergradient of step 1 is suspect") as caught:
        run(Unrolled(1), certify_every=1, certify_steps=5, num_steps=2)
    assert len(caught) == 1


def test_a_resumed_run_may_be_looked_at(tmp_path: Path) -> None:
    def go(num_steps: int, resume: Path | None, every: int | None) -> Step:
        problem = Noisy()
        rows = torch.ones(8, 4), torch.ones(8, 1)
        *_, last = train(
            problem,
            rows,
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.05),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.01),
            solver=Unrolled(2),
            num_steps=num_steps,
            resume=resume,
            certify_every=every,
        )
        return last

    go(2, None, None).state.save(tmp_path / "run.pt")
    resumed, whole = go(3, tmp_path / "run.pt", 3), go(3, None, None)
    assert resumed.certificate is not None
    assert resumed.certificate.passed, resumed.certificate
    assert float(resumed.upper_loss) == float(whole.upper_loss)


class Stopped(Noisy):
    stops_lower_gradient = "it is stopped somewhere; use another"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"certify_every": 0}, "certify_every"),
        ({"certify_every": 1, "certify_steps": 0}, "certify_steps"),
    ],
)
def test_refused_before_the_first_step(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(Implicit(), **settings)


def test_a_stopped_gradient_has_no_solution_to_differentiate() -> None:
    problem = Stopped()
    with pytest.raises(
        ValueError, match=r"stopped somewhere; use another, or give `certify_steps`"
    ):
        train(
            problem,
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
            num_steps=1,
            certify_every=1,
        )
