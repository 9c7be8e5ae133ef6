"""The differentiable twins: step by step equal to torch, and their derivatives to differences."""

import copy
from collections.abc import Callable
from typing import Any

import higher
import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import Compiled, Problem, Unrolled, check_hypergradient
from bilevel.oracles import Oracles
from bilevel.solvers.unrolled import MODES
from bilevel.twins import RunningTwin
from tests.problems import NetProblem, Quadratic, mlp, normal, regression, seeded

BATCH = regression(seed=9)
UPPER = regression(seed=7)
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMSprop, Adagrad = torch.optim.RMSprop, torch.optim.Adagrad
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "sgd dampening": lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd weight decay": lambda p: SGD(p, 0.1, momentum=0.5, weight_decay=0.1),
    "sgd maximize": lambda p: SGD(p, 0.01, momentum=0.5, maximize=True),
    "sgd tensor rate": lambda p: SGD(p, torch.tensor(0.1).double()),
    "adam": lambda p: Adam(p, 0.05),
    "adam amsgrad": lambda p: Adam(p, 0.05, betas=(0.5, 0.9), amsgrad=True),
    "adam weight decay": lambda p: Adam(p, 0.05, weight_decay=0.1),
    "adam maximize": lambda p: Adam(p, 0.01, maximize=True),
    "adam large epsilon": lambda p: Adam(p, 0.05, eps=0.1),
    "adamw": lambda p: AdamW(p, 0.05, weight_decay=0.1),
    "adamw amsgrad": lambda p: AdamW(p, 0.05, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, 0.02),
    "rmsprop centered": lambda p: RMSprop(p, 0.02, alpha=0.9, centered=True),
    "rmsprop momentum": lambda p: RMSprop(p, 0.02, momentum=0.8, weight_decay=0.1, eps=1e-3),
    "rmsprop maximize": lambda p: RMSprop(p, 0.01, centered=True, momentum=0.5, maximize=True),
    "adagrad": lambda p: Adagrad(p, 0.1),
    "adagrad decays": lambda p: Adagrad(p, 0.1, lr_decay=0.2, weight_decay=0.1, eps=1e-3),
    "adagrad starts": lambda p: Adagrad(p, 0.1, initial_accumulator_value=0.5, maximize=True),
}


def real_steps(
    problem: Problem, optimizers: list[torch.optim.Optimizer], count: int, clip: float | None = None
) -> None:
    """`count` steps of the real thing, by `backward` and `step`."""
    for _ in range(count):
        for p in problem.parameters():
            p.grad = None
        loss = problem.lower_loss(BATCH)
        assert isinstance(loss, Tensor)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(problem.variables("lower").values(), clip)
        for optimizer in optimizers:
            optimizer.step()


def assert_twin_follows(
    problem: Problem, optimizers: list[torch.optim.Optimizer], solver: Unrolled | None = None
) -> None:
    """Four unrolled steps end where four real ones do, and leave the optimizer alone."""
    solver = solver or Unrolled(4)
    states = copy.deepcopy([o.state_dict() for o in optimizers])
    oracles = Oracles(problem, UPPER, [BATCH])
    with solver.context(oracles):
        answer = solver.respond(oracles, None, optimizers).lower
    torch.testing.assert_close([o.state_dict() for o in optimizers], states, rtol=0, atol=0)
    real_steps(problem, optimizers, 4, solver.max_grad_norm)
    for name, p in problem.variables("lower").items():
        torch.testing.assert_close(answer[name].detach(), p.detach(), rtol=0, atol=1e-13)


def net() -> Problem:
    return NetProblem(seeded(mlp))


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_running_twin_follows_torch(name: str, warm: int) -> None:
    problem = net()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    real_steps(problem, [optimizer], warm)
    assert_twin_follows(problem, [optimizer])


@pytest.mark.parametrize("name", ["rmsprop maximize", "adagrad decays"])
def test_a_compiled_twin_is_the_same_also_at_another_rate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    problem = Quadratic()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    compiled = Compiled(Unrolled(2))
    for rate in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        grads = [
            solver.hypergradient(problem, lower_optimizer=optimizer).grad["x"]
            for solver in (compiled, compiled.solver)
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivative_of_the_real_loop(name: str) -> None:
    """Against differences of torch.optim itself, not of the twin."""
    problem = net()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    real_steps(problem, [optimizer], 2)
    grad = Unrolled(3).hypergradient(problem, UPPER, [BATCH], lower_optimizer=optimizer).grad

    def loop(h: float) -> Tensor:
        with torch.no_grad():
            trial = copy.deepcopy((problem, optimizer))
            trial[0].upper["l2"]["log"] += h
        real_steps(trial[0], [trial[1]], 3)
        return trial[0].upper_loss(UPPER).detach()

    h = 1e-3
    near, far = loop(h) - loop(-h), loop(2 * h) - loop(-2 * h)
    truth = (8 * near - far) / (12 * h)
    # differences of fourth order: h^4 and the rounding of the loss divided by h
    torch.testing.assert_close(grad["l2.log"], truth, rtol=1e-7, atol=1e-11)


def test_several_groups_and_optimizers() -> None:
    problem = net()
    first, second = problem.lower[0], problem.lower[2]
    groups = [{"params": [first.weight], "lr": 0.3}, {"params": [first.bias], "momentum": 0.5}]
    optimizers = [SGD(groups, 0.1), AdamW(second.parameters(), 0.02)]
    real_steps(problem, optimizers, 3)
    assert_twin_follows(problem, optimizers)


def test_a_variable_that_was_frozen_for_a_while() -> None:
    problem = net()
    problem.lower[0].requires_grad_(False)
    optimizer = Adam(problem.lower.parameters(), 0.05)
    real_steps(problem, [optimizer], 3)
    problem.lower[0].requires_grad_(True)
    real_steps(problem, [optimizer], 1)
    assert_twin_follows(problem, [optimizer])


def test_variables_the_optimizer_or_the_loss_leave_out() -> None:
    problem = net()
    problem.lower.add_module("unused", seeded(lambda: nn.Linear(3, 3)))
    problem.lower_loss = lambda batch: (problem.predict(batch[0]) - batch[1]).square().mean()  # type: ignore[method-assign]
    problem.predict = lambda inputs: problem.lower[2](problem.lower[1](problem.lower[0](inputs)))[
        :, 0
    ]
    params = [p for n, p in problem.lower.named_parameters() if n != "0.bias"]
    optimizer = AdamW(params, 0.05, weight_decay=0.5)  # would decay what has a gradient of zero
    assert_twin_follows(problem, [optimizer])


@pytest.mark.parametrize("name", ["sgd momentum", "adam"])
@pytest.mark.parametrize("most", [0.1, 100.0])
def test_clipping_follows_torch_and_is_differentiated(name: str, most: float) -> None:
    problem = net()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    real_steps(problem, [optimizer], 2, most)
    solver = Unrolled(4, max_grad_norm=most)
    check = check_hypergradient(
        problem, solver, UPPER, [BATCH], lower_optimizer=optimizer, num_directions=4, tolerance=1e-7
    )
    assert check.passed, check.verdict
    assert_twin_follows(problem, [optimizer], solver)


def test_mixed_dtypes_keep_their_own_rounding() -> None:
    y = {"a": normal(3).float(), "b": normal(3)}
    problem = Problem.from_functions(
        lambda x, y, _: y["a"].double().sum() + y["b"].sum(),
        lambda x, y, _: (y["a"] - x["x"]).square().sum() + (y["b"] - x["x"]).square().sum(),
        {"x": normal(3)},
        y,
    )
    optimizer = Adam(problem.lower.parameters(), 0.1)
    oracles = Oracles(problem, None, [None])
    answer = Unrolled(4).respond(oracles, None, optimizer).lower
    real_steps(problem, [optimizer], 4)
    for name, p in problem.variables("lower").items():
        assert answer[name].dtype == p.dtype
        tolerance = 1e-6 if p.dtype == torch.float32 else 1e-13
        torch.testing.assert_close(answer[name].detach(), p.detach(), rtol=0, atol=tolerance)


TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: torchopt.sgd(0.1),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "nesterov": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: torchopt.adam(0.05, eps=1e-2),
    "adamw": lambda: torchopt.adamw(0.05, eps=1e-2, weight_decay=0.1),
    "rmsprop": lambda: torchopt.rmsprop(0.05, eps=1e-2),
    "schedule": lambda: torchopt.sgd(torchopt.schedule.linear_schedule(0.1, 0.01, 5)),
    "chain": lambda: torchopt.combine.chain(
        torchopt.sgd(0.5), torchopt.sgd(0.2), torchopt.sgd(1.0)
    ),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_torchopt_transformations(name: str, clip: float | None) -> None:
    """With torchopt's `eps` large enough for its kink at a zero gradient not to be stepped over."""
    solver = Unrolled(3, TRANSFORMATIONS[name](), max_grad_norm=clip)
    check = check_hypergradient(net(), solver, UPPER, [BATCH], num_directions=4, tolerance=1e-7)
    assert check.passed, check.verdict


LIKE_OTHERS = {"rmsprop", "rmsprop centered", "rmsprop momentum", "adagrad", "adagrad starts"}


@pytest.mark.parametrize("mode", ["recompute", "forward"])
@pytest.mark.parametrize(
    "name", [*TRANSFORMATIONS, *(n for n in OPTIMIZERS if n not in LIKE_OTHERS)]
)
def test_modes_agree(name: str, mode: Any) -> None:
    problem = net()
    make = TRANSFORMATIONS.get(name, lambda: None)
    optimizer = OPTIMIZERS[name](problem.lower.parameters()) if name in OPTIMIZERS else None
    if optimizer is not None:
        real_steps(problem, [optimizer], 2)
    for truncate in (None, 2):
        answers = [
            Unrolled(3, make(), truncate=truncate, mode=m).hypergradient(
                problem, UPPER, [BATCH], lower_optimizer=optimizer
            )
            for m in ("reverse", mode)
        ]
        torch.testing.assert_close(answers[0].grad, answers[1].grad, rtol=1e-11, atol=1e-12)
        assert answers[0].stats.lower_residual == answers[1].stats.lower_residual


def by_higher(problem: Problem, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """The same hypergradient by `higher`, in the log-penalty."""
    log = problem.upper["l2"]["log"]
    with higher.innerloop_ctx(problem.lower, optimizer, copy_initial_weights=True) as (twin, diff):
        fast = copy.copy(problem)
        fast._modules = {**problem._modules, "lower": twin}
        for _ in range(steps):
            diff.step(fast.lower_loss(BATCH))
        loss = fast.upper_loss(UPPER)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, log)[0]


@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "sgd weight decay"])
def test_higher_agrees_on_sgd(name: str) -> None:
    problem = net()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    real_steps(problem, [optimizer], 2)
    ours = Unrolled(3).hypergradient(problem, UPPER, [BATCH], lower_optimizer=optimizer).grad
    torch.testing.assert_close(ours["l2.log"], by_higher(problem, optimizer, 3), rtol=1e-11, atol=0)


def test_highers_adam_is_another_one() -> None:
    """`higher` adds epsilon before the bias correction. Ours is torch's, to differences (above)."""
    problem = net()
    optimizer = OPTIMIZERS["adam large epsilon"](problem.lower.parameters())
    real_steps(problem, [optimizer], 2)
    ours = Unrolled(3).hypergradient(problem, UPPER, [BATCH], lower_optimizer=optimizer).grad
    theirs = by_higher(problem, optimizer, 3)
    assert abs(ours["l2.log"] / theirs - 1) > 1e-3


DIVIDING: dict[str, Make] = {
    "rmsprop centered": lambda p: RMSprop(p, 0.02, eps=1e-2, centered=True, momentum=0.5),
    "adagrad": lambda p: Adagrad(p, 0.1, eps=1e-2),
}


@pytest.mark.parametrize("mode", ["reverse", "recompute", "forward"])
@pytest.mark.parametrize(
    "twin", ["running", "torchopt adam", "torchopt rmsprop", "clipped", *DIVIDING]
)
def test_a_second_moment_of_zero(twin: str, mode: Any) -> None:
    """A dead input: its weights' gradient is exactly 0, where Adam's root has no derivative."""
    inputs, targets = BATCH
    dead = (inputs * torch.tensor([1.0, 0.0, 1.0]).double(), targets)
    problem = NetProblem(seeded(mlp))
    problem.lower_loss = lambda batch: (  # type: ignore[method-assign]
        problem.upper["weigh"](batch[0])[:, 0] * (problem.predict(batch[0]) - batch[1]).square()
    ).mean()
    transformation = {
        "torchopt adam": torchopt.adam(0.05, eps=1e-2),
        "torchopt rmsprop": torchopt.rmsprop(0.05, eps=1e-2),
    }.get(twin)
    make = DIVIDING.get(twin, lambda p: Adam(p, 0.05, eps=1e-2))
    optimizer = make(problem.lower.parameters())
    solver = Unrolled(
        3, transformation, mode=mode, max_grad_norm=1.0 if twin == "clipped" else None
    )
    check = check_hypergradient(
        problem, solver, UPPER, [dead], lower_optimizer=optimizer, tolerance=1e-7
    )
    assert check.passed, check.verdict


def test_recompute_keeps_less() -> None:
    """Bytes that autograd holds on to at once, by the tensors it saves."""

    def peak(mode: Any, steps: int) -> int:
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor = tensor.detach()  # with its graph, it would keep itself alive
                alive += tensor.nbytes
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.nbytes

        problem = net()
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            Unrolled(steps, torchopt.sgd(0.01), mode=mode).hypergradient(problem, UPPER, [BATCH])
        return most

    assert peak("reverse", 40) > 1.9 * peak("reverse", 20)
    assert peak("recompute", 40) == peak("recompute", 20) < peak("reverse", 40) / 4
    assert peak("forward", 8) == peak("forward", 4)
    assert peak("mixed", 40) == peak("mixed", 10) <= peak("recompute", 10)
    # segments grow as the square root of the number of steps
    assert peak("checkpoint", 96) / peak("checkpoint", 24) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_every_step_uses_its_own_batch(mode: Any) -> None:
    """y_{t+1} = y_t - (y_t - b_t x) unrolls to y_T = b_{T-1} x: the last batch counts."""
    problem = Problem.from_functions(
        lambda x, y, _: y["y"].sum(),
        lambda x, y, b: (y["y"] - b * x["x"]).square().sum() / 2 + 0 * x["x"].sum(),
        {"x": torch.ones(2).double()},
        {"y": torch.zeros(2).double()},
    )
    batches = [torch.tensor(float(k)).double() for k in (2, 3, 5)]
    half = Unrolled(3, torchopt.sgd(0.5), mode=mode).hypergradient(problem, None, batches)
    expected = 0.5 * 5 + 0.25 * 3 + 0.125 * 2
    torch.testing.assert_close(half.grad["x"], torch.full((2,), expected).double())


def test_unpack_inverts_pack() -> None:
    problem = Quadratic()
    optimizer = SGD(problem.lower.parameters(), 0.1)
    lower = problem.variables("lower")
    twin = RunningTwin(optimizer, lower, lower, set(lower))
    points = twin.pack(lower)
    torch.testing.assert_close(twin.unpack(points), {n: p.detach() for n, p in lower.items()})
