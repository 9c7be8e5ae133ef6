"""A loss sees what the user wrote, and one that is no function of its arguments is refused."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    Alternating,
    ConjugateGradient,
    Identity,
    Implicit,
    Problem,
    Solver,
    Unrolled,
    train,
)
from tests.problems import ROWS, generator, normal, seeded

DATA = (normal(9, 3, seed=4), normal(9, 1, seed=5))
VALIDATION = (normal(9, 3, seed=6), normal(9, 1, seed=7))


class Net(Problem):
    """Linear regression with a learned shift; the cases below change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"a": normal(1, seed=1)})
        self.lower = seeded(lambda: nn.Linear(3, 1))

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0]) - batch[1]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0] + self.upper["a"]) - batch[1]).square().mean()


def run(problem: Problem, *, steps: int = 1, **settings: Any) -> dict[str, Tensor]:
    """The last hypergradient of a short training."""
    defaults: dict[str, Any] = {
        "data": DATA,
        "solver": Unrolled(2),
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.1),
    }
    grads = {}
    for step in train(problem, num_steps=steps, **{**defaults, **settings}):
        grads = step.hypergradient.grad
    return grads


class Filtered(Net):
    """Weight decay over the parameters that require grad, in both losses and in both levels."""

    def __init__(self, filtered: bool) -> None:
        super().__init__()
        self.filtered = filtered

    def penalty(self) -> Tensor:
        used = [p for p in self.parameters() if p.requires_grad or not self.filtered]
        return self.upper["a"].exp().sum() * torch.stack([p.square().sum() for p in used]).sum()

    def upper_loss(self, batch: Any) -> Tensor:
        return super().upper_loss(batch) + self.penalty()

    def lower_loss(self, batch: Any) -> Tensor:
        return super().lower_loss(batch) + self.penalty()


@pytest.mark.parametrize("solver", [Alternating(), Unrolled(2)])
def test_a_penalty_over_what_requires_grad_is_a_penalty(solver: Solver) -> None:
    """`Alternating` evaluated the upper loss at constants, lower steps the lower loss at constant
    upper variables: such a penalty vanished there."""
    plain, filtered = (run(Filtered(f), steps=2, solver=solver) for f in (False, True))
    torch.testing.assert_close(filtered, plain, rtol=0, atol=0)
    got = Alternating().hypergradient(Filtered(True), VALIDATION).grad["a"]
    problem = Filtered(False)
    (right,) = torch.autograd.grad(problem.upper_loss(VALIDATION), problem.upper["a"])
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)


class Forces(Net):
    """An upper loss that holds a gradient."""

    def upper_loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (force,) = torch.autograd.grad(self.lower(x).tanh().sum(), x, create_graph=True)
        return force.square().mean()


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_an_upper_loss_may_hold_a_gradient(grad_mode: Callable[[], Any]) -> None:
    problem = Forces()
    with grad_mode():
        got = run(problem, lower_steps=0, solver=Unrolled(2, torchopt.sgd(0.1)))["a"]
    right = Unrolled(2, torchopt.sgd(0.1)).hypergradient(Forces(), DATA, [DATA]).grad["a"]
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    assert right.abs() > 1e-3


# ------------------------------------------------------------------ hooks on parameters


def mask(gradient: Tensor) -> Tensor:
    return gradient * torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_act_as_in_a_plain_loop(kind: str) -> None:
    """Masks and per-layer clipping were ignored without a word."""

    def hook(given: Tensor) -> Tensor | None:
        if kind == "register_hook":
            return mask(given)
        assert given.grad is not None
        given.grad.copy_(mask(given.grad))
        return None

    problem, plain = Filtered(False), Filtered(False)
    for p in (problem, plain):
        getattr(p.lower.weight, kind)(hook)
        p.upper["a"].register_hook(lambda g: 3 * g)
    run(problem, steps=3, solver=Alternating(), clip_lower=0.5)
    upper = torch.optim.SGD(plain.upper.parameters(), 0.1)
    lower = torch.optim.SGD(plain.lower.parameters(), 0.1)
    for _ in range(3):
        for optimizer, loss in ((lower, plain.lower_loss), (upper, plain.upper_loss)):
            plain.zero_grad()
            loss(DATA).backward()
            if optimizer is lower:
                nn.utils.clip_grad_norm_(plain.lower.parameters(), 0.5)
            optimizer.step()
    torch.testing.assert_close(problem.state_dict(), plain.state_dict(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("solver", [Implicit(), Unrolled(2)])
def test_solvers_of_second_order_refuse_hooks_by_name(kind: str, solver: Solver) -> None:
    problem = Net()
    getattr(problem.lower.weight, kind)(lambda g: None)
    with pytest.raises(ValueError, match=f"`weight` has a hook .`{kind}`"):
        run(problem, solver=solver)


@pytest.mark.usefixtures("traced_only")
def test_a_compiled_step_does_not_leave_out_a_hook() -> None:
    problem = Net()
    problem.lower.weight.register_hook(torch.zeros_like)
    before = problem.lower.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="`weight` has a hook"):
        run(problem, solver=Alternating(), compile=True)
    assert torch.equal(problem.lower.weight, before)


# ------------------------------------------------------------------ losses that are no functions


class Impure(Net):
    """A lower (or upper) loss that depends on, or changes, something else."""

    def __init__(self, how: str, level: str = "lower") -> None:
        super().__init__()
        self.how, self.level = how, level
        self.teacher = seeded(lambda: nn.Linear(3, 1)).requires_grad_(False)
        self.own = generator(3)
        self.average = torch.zeros(1).double()
        self.calls = 0
        self.listed = list(self.lower.parameters())
        self.table = nn.Embedding(4, 3, max_norm=0.1).double()

    def upper_loss(self, batch: Any) -> Tensor:
        loss = super().upper_loss(batch) + self.upper["a"].sum() ** 2
        return self.changed(loss, batch) if self.level == "upper" else loss

    def lower_loss(self, batch: Any) -> Tensor:
        loss = super().lower_loss(batch)
        return self.changed(loss, batch) if self.level == "lower" else loss

    def changed(self, loss: Tensor, batch: Any) -> Tensor:
        w = self.lower.weight
        match self.how:
            case "NumPy":
                loss = loss * np.random.rand()  # noqa: NPY002
            case "Python":
                loss = loss * random.random()
            case "generator":
                loss = loss * torch.rand((), generator=self.own, dtype=torch.float64)
            case "batch":
                batch[0].mul_(1.1)
            case "teacher":
                with torch.no_grad():
                    self.teacher.weight.lerp_(w, 0.3)
                loss = loss + (w - self.teacher.weight).square().sum()
            case "attribute":
                loss = loss + (w.mean() - self.average).square().sum()
                self.average = self.average.lerp(w.detach().mean(), 1e-6)
            case "counter":
                self.calls += 1
                loss = loss / self.calls
            case "list":
                loss = loss + self.listed[0].square().sum()
            case "isinstance":
                loss = loss + sum(
                    p.square().sum() for p in self.lower.parameters() if isinstance(p, nn.Parameter)
                )
            case "node":  # a hook that is registered where nobody looks
                assert loss.grad_fn is not None
                loss.grad_fn.register_hook(
                    lambda ins, outs: tuple(
                        g if g is None else g * self.lower.weight.detach().sum() for g in ins
                    )
                )
            case "reentrant":
                loss = (
                    loss
                    + torch.utils.checkpoint.checkpoint(torch.square, w, use_reentrant=True).sum()
                )
            case "data":
                w.data.mul_(0.9)
        return loss


SENTENCES = {
    "NumPy": "is not a function .* .NumPy's random generator was used.. Draw noise in `draw`",
    "Python": "is not a function .* .Python's random generator was used",
    "generator": "is not a function .* .`own` changed",
    "batch": r"writes into its batch .`batch\[0\]`",
    "teacher": "writes into `teacher.weight`",
    "attribute": "is not a function .* .`average` changed",
    "counter": "is not a function .* .`calls` changed",
    "list": "uses `lower.weight` by a reference of its own",
    "isinstance": "differs .* between the module's parameters and other tensors",
    "node": "has code that runs again",
    "reentrant": ".*give it `use_reentrant=False`",
    "data": "writes into the variable `lower.weight`",
}


@pytest.mark.parametrize("how", SENTENCES)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_loss_that_is_no_function_is_refused_before_the_first_step(how: str, level: str) -> None:
    """Two evaluations of it differed, and with them reverse and recomputed hypergradients."""
    for start in (
        lambda p: run(p, data=tuple(t.clone() for t in DATA)),
        lambda p: Implicit().hypergradient(p, [t.clone() for t in DATA], [[*DATA]]),
    ):
        problem = Impure(how, level)
        before = {n: p.detach().clone() for n, p in problem.lower.named_parameters()}
        with pytest.raises(ValueError, match=f"`Impure.{level}_loss` {SENTENCES[how]}"):
            start(problem)
        torch.testing.assert_close(dict(problem.lower.named_parameters()), before, rtol=0, atol=0)


class Rows(Net):
    """An embedding whose forward pass writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = seeded(lambda: nn.Embedding(4, 3, max_norm=0.1))

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower(batch).square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch) - self.upper["a"]).square().sum()


def test_a_hypergradient_never_writes_into_an_embedding() -> None:
    problem, rows = Rows(), torch.arange(4)
    before = problem.lower.weight.detach().clone()
    for start in (
        lambda: Implicit().hypergradient(problem, rows, [rows]),
        lambda: run(problem, data=rows, solver=Alternating()),
    ):
        with pytest.raises(ValueError, match=r"writes into the variable `lower\.weight`"):
            start()
    assert torch.equal(problem.lower.weight, before)


class Legal(Net):
    """What may change: buffers, caches that nobody reads, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = seeded(
            lambda: nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
                nn.BatchNorm1d(4),
                nn.Dropout(0.5),
                nn.Linear(4, 1),
            )
        )
        self.register_buffer("average", torch.zeros(1).double())
        self.calls = 0

    def lower_loss(self, batch: Any) -> Tensor:
        self.calls += 1
        self.last = super().lower_loss(batch)
        self.average = 0.9 * self.average + 0.1 * self.last.detach()
        self.average.mul_(1.0)
        return self.last + (self.upper["a"] * self.average).square().sum()


def test_buffers_caches_and_dropout_are_legal() -> None:
    problem = Legal()
    run(problem, steps=2)
    assert problem.get_buffer("average") > 0


def test_a_loss_is_looked_at_once() -> None:
    """Two evaluations of each loss before the first hypergradient, none before the next ones."""
    problem, counts = Legal(), []
    for _ in range(3):
        before = problem.calls
        Implicit(Identity()).hypergradient(problem, VALIDATION, [DATA])
        counts.append(problem.calls - before)
    assert counts == [3, 1, 1]


# ------------------------------------------------------------------ variables that enter elsewhere


class Drawn(Net):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        scale = self.upper["a"] if self.where == "draw" else 1
        return data[0] * scale, data[1]

    def draw_lower(self, batch: Any, generator: torch.Generator, step: int) -> Any:
        scale = self.lower.bias if self.where == "draw_lower" else 1
        return batch[0] * scale, batch[1]

    def share(self, batch: Any) -> Any:
        return batch if self.where != "share" else (batch[0] + self.upper["a"], batch[1])


@pytest.mark.parametrize(("where", "name"), [("draw", "upper.a"), ("draw_lower", "lower.bias")])
def test_a_batch_that_depends_on_a_variable_is_refused(where: str, name: str) -> None:
    """Its gradient was silently 0."""
    with pytest.raises(
        ValueError, match=f"`Drawn.{where}` returns depends on the variable `{name}`"
    ):
        run(Drawn(where))
    problem = Net()
    batch = {"inputs": [DATA[0] * problem.upper["a"]]}
    with pytest.raises(ValueError, match=r"batch given to `hypergradient` depends on .* `upper.a`"):
        Implicit().hypergradient(problem, VALIDATION, [batch])


def test_what_is_shared_may_not_depend_on_upper_variables() -> None:
    class Shares(Drawn):
        draw_lower = Problem.draw_lower

    with pytest.raises(
        ValueError, match=r"`Shares\.share` returns depends on the upper variable `a`"
    ):
        run(Shares("share"), solver=Alternating(), order="upper_first")


def test_distinct_variables_that_share_memory_are_refused() -> None:
    """The same initial tensor for both levels: lower steps moved the upper variable."""

    def losses(x: Any, y: Any, _: Any) -> Tensor:
        return (y["w"] - 3).square().sum() + (y["w"] - x["init"]).square().sum()

    def make(init: Tensor, w: Tensor) -> Problem:
        return Problem.from_functions(losses, losses, {"init": init}, {"w": w})

    base = torch.zeros(4, 2).double()
    for init, w in ((base, base), (base[:3], base[1:]), (base[:, 0], base[1]), (base, base[2])):
        with pytest.raises(ValueError, match=r"`upper.init` and `lower.w` .* share memory.*clone"):
            Implicit().hypergradient(make(init, w))
    for init, w in ((base.clone(), base), (base[:2], base[2:]), (base[:, 0], base[:, 1])):
        assert Implicit().hypergradient(make(init, w)).grad["init"].shape == init.shape
    both = nn.Parameter(base)  # one variable of both levels
    assert Alternating().hypergradient(make(both, both)).grad["init"].abs().sum() > 0


# ------------------------------------------------------------------ threads


class Masks(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lower = seeded(
            lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
        )


def test_threads_compute_what_one_thread_computes() -> None:
    """Dropout is drawn from the global generator, and evaluations occupy the modules."""
    shared, others = Masks(), [Masks() for _ in range(8)]
    solver = Unrolled(4, torchopt.sgd(0.1), mode="recompute")

    def compute(problem: Problem, seed: int) -> Tensor:
        return solver.hypergradient(problem, VALIDATION, [DATA], seed=seed).grad["a"]

    right = [compute(shared, seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        found[seed] = [compute(p, seed) for p in (shared, others[seed], shared, others[seed + 4])]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answers in found.items():
        torch.testing.assert_close(answers, [right[seed]] * 4, rtol=0, atol=0)
    assert len(found) == 4
    assert len({float(r) for r in right}) == 4


def test_a_recurrent_layer_is_differentiated_for_every_lower_batch() -> None:
    """It remembers the weights of its last call; called with the same again, it took older ones."""
    row = ROWS["lstm"]
    answers = [
        Implicit(ConjugateGradient(5, rtol=None, damping=1.0)).hypergradient(
            row.make(), row.upper_batch, [row.lower_batch] * count
        )
        for count in (1, 2)
    ]
    torch.testing.assert_close(answers[1].grad, answers[0].grad)
