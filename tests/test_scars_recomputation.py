"""Code of a loss that runs again when its gradient is taken sees the values of its evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from bilevel import GMRES, Implicit, Problem, Solver, Unrolled, train
from tests.problems import normal, seeded


class Block(nn.Module):
    """A layer computed in one of several ways that all mean the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.how = how

    def plain(self, h: Tensor) -> Tensor:
        return self.layer(h).tanh()

    def forward(self, h: Tensor) -> Tensor:
        way: Callable[[Tensor], Tensor] = getattr(self, self.how)
        return way(h)

    def checkpointed(self, h: Tensor) -> Tensor:
        return checkpoint(self.plain, h, use_reentrant=False)

    def to_the_end(self, h: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return self.checkpointed(h)

    def nested(self, h: Tensor) -> Tensor:
        return checkpoint(self.checkpointed, h, use_reentrant=False)

    def hooked(self, h: Tensor) -> Tensor:
        z = self.layer(h)
        with saved_tensors_hooks(lambda t: None, lambda _: self.layer(h).tanh().detach()):
            return z.tanh()

    def function(self, h: Tensor) -> Tensor:
        return Again.apply(self, h, *self.layer.parameters())  # type: ignore[no-untyped-call]


class Again(torch.autograd.Function):
    """As adjoint methods do: keep the input, call the module in `backward`."""

    @staticmethod
    def forward(ctx: Any, block: Block, h: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(h, *parameters)
        return block.plain(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, graph = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            out = ctx.block.plain(inputs[0])
        return None, *torch.autograd.grad(out, inputs, grads[0], create_graph=graph)


class Net(Problem):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.lower = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Block(how), nn.Linear(4, 1)))
        self.upper = nn.ParameterDict({"log_l2": normal(1, seed=3)})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower(batch[0]) - batch[1]).square().mean()

    def lower_loss(self, batch: Any) -> Tensor:
        weights = sum(p.square().sum() for p in self.lower.parameters())
        return self.upper_loss(batch) + self.upper["log_l2"].exp().sum() * weights


DATA = (normal(6, 3, seed=4), normal(6, 1, seed=5))
VALIDATION = (normal(6, 3, seed=6), normal(6, 1, seed=7))
WAYS = ["checkpointed", "to_the_end", "nested", "hooked", "function"]
SOLVERS: dict[str, Solver] = {
    "reverse": Unrolled(5, torchopt.adam(0.1)),
    "recompute": Unrolled(5, torchopt.adam(0.1), mode="recompute"),
    "forward": Unrolled(5, torchopt.sgd(0.1), mode="forward"),
    "implicit": Implicit(GMRES(max_steps=40, rtol=1e-10)),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_runs_again_sees_the_values_of_its_evaluation(how: str, solver: str) -> None:
    """Run after the evaluation, a checkpointed layer found the module's own weights in every step:
    a third of the hypergradient was wrong, without a word."""
    if (how, solver) == ("function", "forward"):
        pytest.skip("torch has no forward mode through a function without `jvp`")
    right = SOLVERS[solver].hypergradient(Net("plain"), VALIDATION, [DATA]).grad["log_l2"]
    got = SOLVERS[solver].hypergradient(Net(how), VALIDATION, [DATA]).grad["log_l2"]
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    assert right.abs() > 1e-4


@pytest.mark.parametrize("how", WAYS)
def test_training_with_recomputation_is_the_same_training(how: str) -> None:
    def run(how: str) -> list[Tensor]:
        problem = Net(how)
        for _ in train(
            problem,
            DATA,
            upper_data=VALIDATION,
            num_steps=3,
            lower_steps=2,
            solver=Unrolled(2),
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.Adam(problem.lower.parameters(), 0.1),
        ):
            pass
        return [p.detach() for p in problem.parameters()]

    torch.testing.assert_close(run(how), run("plain"), rtol=1e-10, atol=1e-12)


class Noisy(nn.Module):
    """Dropout and a batch norm, recomputed or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


class NoisyNet(Net):
    def __init__(self, again: bool) -> None:
        super().__init__("plain")
        self.lower = seeded(lambda: nn.Sequential(Noisy(again), nn.Tanh(), nn.Linear(4, 1)))


@pytest.mark.parametrize("solver", ["reverse", "recompute", "implicit"])
def test_recomputed_dropout_has_the_same_masks(solver: str) -> None:
    problems = [NoisyNet(again) for again in (False, True)]
    plain, again = (SOLVERS[solver].hypergradient(p, VALIDATION, [DATA], seed=3) for p in problems)
    torch.testing.assert_close(again.grad, plain.grad, rtol=1e-9, atol=1e-12)
    assert plain.grad["log_l2"].abs() > 1e-6


def test_a_batch_norm_computed_twice_counts_once() -> None:
    """The second run advances copies of the statistics as they were when the first one began."""

    def statistics(again: bool) -> list[Tensor]:
        problem = NoisyNet(again)
        for _ in train(
            problem,
            DATA,
            num_steps=3,
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
            solver=Unrolled(2),
        ):
            pass
        return list(problem.buffers())

    plain, again = statistics(False), statistics(True)
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=0)
    assert plain[2] == 6  # one lower and one upper evaluation in each of three steps


class Scaled(Problem):
    """A gradient that a hook on a tensor multiplies by a weight, looked up then or before."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2, seed=1)})
        self.lower = nn.ParameterDict({"y": normal(2, seed=2)})
        self.late = late

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower["y"].square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        y = self.lower["y"]
        moved = y - self.upper["x"]
        moved.register_hook(lambda g: g * (self.lower["y"] if self.late else y).square())
        return moved.square().sum()


def test_a_hook_on_a_tensor_sees_the_values_of_its_evaluation() -> None:
    solver = Unrolled(3, torchopt.sgd(0.1))
    late, early = (solver.hypergradient(Scaled(late)).grad["x"] for late in (True, False))
    torch.testing.assert_close(late, early, rtol=1e-13, atol=0)


class Broken(Net):
    """A loss that raises in its third step, long after it was examined."""

    calls = 0

    def lower_loss(self, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("broken")
        return super().lower_loss(batch)


def test_nothing_of_torch_stays_replaced_after_an_evaluation() -> None:
    def theirs() -> tuple[Any, ...]:
        apply = vars(torch.autograd.Function)["apply"]
        return saved_tensors_hooks.__enter__, Tensor.register_hook, apply

    before = theirs()
    SOLVERS["reverse"].hypergradient(Net("checkpointed"), VALIDATION, [DATA])
    assert theirs() == before
    broken = Broken("plain")
    own = list(broken.parameters())
    with pytest.raises(RuntimeError, match="broken"):
        SOLVERS["reverse"].hypergradient(broken, VALIDATION, [DATA])
    assert theirs() == before
    assert all(a is b for a, b in zip(broken.parameters(), own, strict=True))
