"""What `benchmarks.certificate` looks at: mistakes that a certificate must flag, one for every seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torchopt
from torch import Tensor, nn

from bilevel import (
    Alternating,
    Certificate,
    Cholesky,
    ConjugateGradient,
    Hypergradient,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
    certify,
)


@final
@dataclass(frozen=True)
class Flaw:
    """A hypergradient that is wrong, and what the certificate should say of it.

    Attributes:
        problem: at the point.
        solver: what the hypergradient comes from.
        says: a part of the cause that must be named.
        upper_batch: of the upper loss.
        lower_batches: of the lower loss.
        hypergradient: the wrong one, where the solver itself would be right.
        precision: what the losses are computed in.
    """

    problem: Problem
    solver: Solver
    says: str
    upper_batch: Any = None
    lower_batches: Sequence[Any] = (None,)
    hypergradient: Hypergradient | Mapping[str, Tensor] | None = None
    precision: torch.dtype | None = None

    def certificate(self, seed: int) -> Certificate:
        """What is said of it."""
        return certify(
            self.problem,
            self.solver,
            self.upper_batch,
            self.lower_batches,
            hypergradient=self.hypergradient,
            precision=self.precision,
            seed=seed,
        )


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, count: int = 24) -> tuple[Tensor, Tensor]:
    inputs = normal(count, 4, seed=seed)
    return inputs, inputs.sum(1, keepdim=True).sin() + 0.1 * normal(count, 1, seed=seed + 1)


@final
class Reweighted(Problem):
    """A network on examples whose weights, one for each of 24, and whose penalty are tuned."""

    kept: Tensor
    mean: Tensor

    def __init__(self, seed: int, mistake: str = "") -> None:
        super().__init__()
        self.mistake = mistake
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lower = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.upper = nn.ParameterDict({"l": normal(seed=seed) - 2, "w": normal(24, seed=seed + 1)})
        self.register_buffer("kept", self.upper["w"].detach().clone())
        self.register_buffer("mean", torch.zeros(()))

    def upper_loss(self, batch: Any) -> Tensor:
        loss: Tensor = (self.lower(batch[0]) - batch[1]).square().mean()
        return loss

    def lower_loss(self, batch: Any) -> Tensor:
        log = self.upper["l"]
        scale: Any = float(log.detach().exp()) if self.mistake == "float" else log.exp()
        weights = self.kept if self.mistake == "kept" else self.upper["w"]
        weights = weights.detach() if self.mistake == "detach" else weights
        errors = (self.lower(batch[0]) - batch[1]).square()[:, 0]
        loss = (weights.sigmoid() * errors).mean()
        if self.mistake == "mean":  # of the outputs so far, which the next step compares with
            loss = loss + 5 * (self.lower(batch[0]).mean() - self.mean - 1).square()
            with torch.no_grad():
                self.mean.copy_(self.lower(batch[0]).mean() + 0.5 * self.upper["w"].sum())
        squares = sum((p.square().sum() for p in self.lower.parameters()), torch.zeros(()))
        penalty: Tensor = 0.1 * scale * squares
        return loss + penalty


def quadratic(seed: int, *, solved: bool = True, size: int = 30) -> Problem:
    """Closed form; eigenvalues from 0.2 to 4."""
    turn, _ = torch.linalg.qr(normal(size, size, seed=seed))
    H = turn @ torch.diag(torch.linspace(0.2, 4, size)) @ turn.mT
    mix, target = normal(size, size, seed=seed + 1), normal(size, seed=seed + 2)
    x = normal(size, seed=seed + 3)
    y = torch.linalg.solve(H, mix @ x) if solved else torch.zeros(size)
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - target).square().sum(),
        lambda x, y, _: y["y"] @ (H @ y["y"]) / 2 - y["y"] @ (mix @ x["x"]),
        {"x": x},
        {"y": y},
    )


def chain(seed: int, size: int = 20) -> Problem:
    """Lower steps that are not quite stable: float32 bears their Jacobians, bfloat16 does not."""
    mix, target = normal(size, size, seed=seed), normal(size, seed=seed + 1)
    return Problem.from_functions(
        lambda x, y, _: (y["y"] - target).square().sum(),
        lambda x, y, _: (
            (mix @ torch.tanh(y["y"]) - x["x"]).square().sum() + 0.01 * y["y"].square().sum()
        ),
        {"x": normal(size, seed=seed + 2)},
        {"y": normal(size, seed=seed + 3)},
    )


_STEPS = Unrolled(5, torchopt.sgd(0.1))
_BATCHES = (1000, 2000)


def network(mistake: str, says: str) -> Callable[[int], Flaw]:
    def flaw(seed: int) -> Flaw:
        upper, lower = (rows(seed + apart) for apart in _BATCHES)
        return Flaw(Reweighted(seed, mistake), _STEPS, says, upper, [lower])

    return flaw


def other_batch(seed: int) -> Flaw:
    """The upper and the lower batch exchanged."""
    problem = Reweighted(seed)
    upper, lower = (rows(seed + apart) for apart in _BATCHES)
    wrong = _STEPS.hypergradient(problem, lower, [upper])
    return Flaw(problem, _STEPS, "exchanged", upper, [lower], wrong)


def changed(change: Callable[[Tensor], Tensor], says: str) -> Callable[[int], Flaw]:
    def flaw(seed: int) -> Flaw:
        problem, solver = quadratic(seed), Implicit(Cholesky())
        right = solver.hypergradient(problem).grad
        wrong = {name: change(g) for name, g in right.items()}
        return Flaw(problem, solver, says, hypergradient=wrong)

    return flaw


def stale(seed: int) -> Flaw:
    """The hypergradient of the upper variables before they moved."""
    problem, solver = quadratic(seed), Implicit(Cholesky())
    old = solver.hypergradient(problem).grad
    other = quadratic(seed + 1)
    return Flaw(other, solver, "not what `Implicit` gives here", hypergradient=old)


FLAWS: dict[str, Callable[[int], Flaw]] = {
    "bfloat16 in a chain of steps": lambda seed: Flaw(
        chain(seed), Unrolled(10, torchopt.sgd(0.1)), "rounding", precision=torch.bfloat16
    ),
    "lower level far from solved": lambda seed: Flaw(
        quadratic(seed, solved=False), Implicit(Cholesky()), "far from solved"
    ),
    "weights detached": network("detach", "look for"),
    "penalty through `float`": network("float", "look for"),
    "a frozen copy in a buffer": network("kept", "look for"),
    "a buffer that advances": network("mean", "buffers that advance"),
    "upper and lower batch exchanged": other_batch,
    "response dropped": lambda seed: Flaw(quadratic(seed), Alternating(), "drops the response"),
    "truncated after one step": lambda seed: Flaw(
        quadratic(seed), Unrolled(20, torchopt.sgd(0.05), truncate=1), "approximates the response"
    ),
    "5 Neumann terms": lambda seed: Flaw(
        quadratic(seed), Implicit(Neumann(5, step_size=0.1)), "approximates the response"
    ),
    "the identity for the Hessian": lambda seed: Flaw(
        quadratic(seed), Implicit(Identity()), "approximates the response"
    ),
    "damping of 2": lambda seed: Flaw(
        quadratic(seed), Implicit(ConjugateGradient(damping=2.0)), "damping"
    ),
    "one step of conjugate gradients": lambda seed: Flaw(
        quadratic(seed), Implicit(ConjugateGradient(max_steps=1, rtol=1e-6)), "did not succeed"
    ),
    "wrong sign": changed(torch.neg, "the wrong way"),
    "twice as long": changed(lambda g: 2 * g, "2 times as long"),
    "of an earlier point": stale,
}
