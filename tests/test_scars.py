"""One test per defect that was confirmed in another bilevel library; each says what it guards."""

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    Alternating,
    ConjugateGradient,
    HypergradientError,
    Implicit,
    Problem,
    Result,
    Unrolled,
    check_hypergradient,
    train,
)
from tests.problems import NetProblem, Quadratic, Ridge, normal, regression, seeded, spd


def test_cg_returns_its_last_iterate() -> None:
    """D1: returning the iterate before the last one loses the whole response term if H = I."""
    b = normal(5)
    one = ConjugateGradient(max_steps=1).solve(lambda v: v, b)
    torch.testing.assert_close(one.value, b, rtol=1e-15, atol=0)
    assert one.result is Result.SUCCESS
    A = spd(8)
    full = ConjugateGradient(max_steps=8, rtol=1e-12).solve(lambda v: A @ v, normal(8))
    torch.testing.assert_close(full.value, torch.linalg.solve(A, normal(8)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_cg_does_not_care_how_the_system_is_scaled(scale: float) -> None:
    """D2: a step scaled in the iterate and not in the residual is 2860 % wrong; ours has no such
    factor, only damping, which enters iterate and residual alike."""
    A, b = spd(6), normal(6)
    scaled = ConjugateGradient(rtol=1e-12).solve(lambda v: scale * (A @ v), scale * b)
    torch.testing.assert_close(scaled.value, torch.linalg.solve(A, b), rtol=1e-10, atol=1e-10)
    damped = ConjugateGradient(rtol=1e-12, damping=scale).solve(lambda v: A @ v, b)
    eye = torch.eye(6).double()
    torch.testing.assert_close(
        damped.value, torch.linalg.solve(A + scale * eye, b), rtol=1e-10, atol=1e-10
    )


def test_parameter_groups_keep_their_settings() -> None:
    """D4: groups with their own rate and weight decay silently became one with the defaults."""
    problem = NetProblem(seeded(lambda: nn.Linear(3, 1)))
    weight, bias = problem.lower.weight, problem.lower.bias
    optimizer = torch.optim.SGD(
        [{"params": [weight], "lr": 0.0}, {"params": [bias], "lr": 0.5, "weight_decay": 0.1}],
        lr=0.1,
    )
    before = weight.detach().clone(), bias.detach().clone()
    data = regression()
    for _ in train(
        problem,
        data,
        num_steps=1,
        lower_optimizer=optimizer,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        solver=Unrolled(1),
    ):
        pass
    assert torch.equal(weight, before[0])
    assert not torch.equal(bias, before[1])
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.5]


@pytest.mark.parametrize("warm", [1, 20])
def test_undifferentiated_steps_leave_no_upper_gradient(warm: int) -> None:
    """D5: `backward` in the warm-up steps of a truncated unroll added dG/dx to the answer."""
    problem = Quadratic().solve()
    short = Unrolled(3, torchopt.sgd(0.2)).hypergradient(problem)
    long = Unrolled(3 + warm, torchopt.sgd(0.2), truncate=3).hypergradient(problem)
    torch.testing.assert_close(short.grad, long.grad, rtol=1e-12, atol=1e-12)


def test_nan_is_not_turned_into_zero() -> None:
    """D7: a NaN gradient became 0 in silence and hid the divergence; only unused is zero."""
    problem = Problem.from_functions(
        lambda x, y, _: x["a"].sqrt().sum() * 0 + y["y"].sum(),
        lambda x, y, _: (y["y"] - x["a"]).square().sum(),
        {"a": torch.zeros(2).double(), "unused": torch.ones(1).double()},
        {"y": torch.ones(2).double()},
    )
    for solver in (Alternating(), Unrolled(2, torchopt.sgd(0.1))):
        grad = solver.hypergradient(problem, throw=False).grad
        assert grad["a"].isnan().all()
        assert torch.equal(grad["unused"], torch.zeros(1).double())
        with pytest.raises(HypergradientError, match="NaN or infinite"):
            solver.hypergradient(problem)
    broken = Problem.from_functions(
        lambda x, y, _: (y["y"] * x["a"]).sum(),
        lambda x, y, _: (y["y"] - x["a"]).abs().pow(1.5).sum(),
        {"a": torch.ones(2).double()},
        {"y": torch.ones(2).double()},
    )
    with pytest.raises(HypergradientError, match=r"NaN or infinite|negative curvature"):
        Implicit().hypergradient(broken)


def test_the_lower_optimizer_keeps_its_state() -> None:
    """D8: Adam's moments were thrown away at every upper step."""
    problem = Quadratic()
    lower = torch.optim.Adam(problem.lower.parameters(), 0.01)
    upper = torch.optim.SGD(problem.upper.parameters(), 0.0)
    for _ in train(
        problem, num_steps=5, lower_steps=2, lower_optimizer=lower, upper_optimizer=upper
    ):
        pass
    by_hand = Quadratic()
    adam = torch.optim.Adam(by_hand.lower.parameters(), 0.01)
    for _ in range(10):
        adam.zero_grad()
        by_hand.lower_loss(None).backward()
        adam.step()
    assert torch.equal(problem.lower["y"], by_hand.lower["y"])
    assert lower.state[problem.lower["y"]]["step"] == 10


def test_nothing_is_divided_by_the_lower_gradient() -> None:
    """D9: at the lower optimum |dG/dy|^2 = 0 was a divisor: 1e15 relative error."""
    problem = Quadratic().solve()
    for solver in (Implicit(), Unrolled(200, torchopt.sgd(0.4), max_grad_norm=1.0)):
        grad = solver.hypergradient(problem).grad["x"]
        torch.testing.assert_close(grad, problem.hypergradient(), rtol=1e-6, atol=1e-6)


def test_maximize_is_not_ignored() -> None:
    """D10: `maximize=True` was ignored and the loss went the wrong way."""
    problem = Quadratic().solve()
    answers = [
        Unrolled(3)
        .hypergradient(
            problem,
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), lr, maximize=flag),
        )
        .grad["x"]
        for flag, lr in ((True, 0.1), (False, 0.1))
    ]
    assert not torch.allclose(answers[0], answers[1])


def test_frozen_parameters_and_batch_norm() -> None:
    """D11: a frozen parameter, and batch norm in an implicit step, raised; D10: statistics were
    lost. Here they advance once per evaluation that counts."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    net[0].requires_grad_(False)
    problem = NetProblem(net)
    for _ in train(
        problem,
        regression(),
        num_steps=3,
        lower_steps=2,
        solver=Implicit(ConjugateGradient(max_steps=5, rtol=None, damping=10.0)),
        lower_optimizer=torch.optim.SGD(net.parameters(), 0.01),
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.01),
    ):
        pass
    assert net[1].num_batches_tracked == 3 * (2 + 1)


@pytest.mark.parametrize("most", [0.05, 100.0])
def test_clipping_inside_a_chain_is_differentiated(most: float) -> None:
    """torchopt's `clip_grad_norm` computes its factor outside autograd: the hypergradient through it
    is wrong wherever it clips. A differentiable one takes its place."""
    schedule = torchopt.schedule.linear_schedule(0.2, 0.05, 4)
    chained = torchopt.chain(
        torchopt.clip.clip_grad_norm(most),
        torchopt.adam(schedule),
        torchopt.clip.clip_grad_norm(9.0),
    )
    problem, upper, lower = Ridge(), regression(seed=7), [regression(seed=9)]
    solver = Unrolled(4, torchopt.chain(torchopt.clip.clip_grad_norm(most), torchopt.sgd(0.1)))
    same = Unrolled(4, torchopt.sgd(0.1), max_grad_norm=most)
    for checked in (solver, Unrolled(4, chained)):
        check = check_hypergradient(problem, checked, upper, lower, tolerance=1e-6)
        assert check.passed, check
    answers = [s.hypergradient(problem, upper, lower).grad for s in (solver, same)]
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-12, atol=0)


def test_clipping_that_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_type=2\.0"):
        Unrolled(3, torchopt.clip.clip_grad_norm(1.0, norm_type=1.0))


def test_fused_optimizers_get_gradients_in_their_parameters_memory_format() -> None:
    """Ours: `autograd.grad` may return other strides than a channels-last weight has.

    Fused Adam then pairs each number with another one's gradient, and training quietly gets worse.
    """

    def trained(fused: bool) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Conv2d(3, 4, 6, dtype=torch.float64)
        lower = nn.Sequential(net).to(memory_format=torch.channels_last)
        problem = LayoutProblem(lower)
        images = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
        for _ in train(
            problem,
            images,
            upper_optimizer=torch.optim.Adam(problem.upper.parameters(), 0.1, fused=fused),
            lower_optimizer=torch.optim.Adam(problem.lower.parameters(), 0.1, fused=fused),
            num_steps=5,
        ):
            pass
        return problem

    fused, plain = trained(True).state_dict(), trained(False).state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-9, atol=1e-9)


class LayoutProblem(Problem):
    """A convolution whose weight gradient does not come in the weight's own strides."""

    def __init__(self, lower: nn.Module) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": torch.ones(()).double()})
        self.lower = lower

    def upper_loss(self, batch: Any) -> Tensor:
        weight = self.lower[0].weight.flatten(1)
        return (batch.flatten(1) @ weight.mT - self.upper["x"]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        return self.upper_loss(batch)
