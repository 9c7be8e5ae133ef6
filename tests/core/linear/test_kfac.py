"""Kronecker factors against a Gauss-Newton matrix that is made by brute force."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bilevel import (
    EKFAC,
    KFAC,
    Cholesky,
    Compiled,
    ConjugateGradient,
    Implicit,
    LinearSolver,
    Pieces,
    Problem,
    Result,
)
from bilevel.oracles import Oracles
from tests.problems import Quadratic, normal, seeded

ROWS, CLASSES = 7, 3
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2])


class Classifier(Problem):
    """Weighted cross-entropy, or squared errors, and no penalty."""

    def __init__(self, net: nn.Module, squares: bool = False) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"weights": nn.Parameter(normal(ROWS, seed=5))})
        self.lower, self.squares = net, squares

    def lower_loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        out = self.lower(inputs)
        if self.squares:
            return (out - normal(ROWS, CLASSES, seed=3)).square().sum(dim=1).mean()
        losses = nn.functional.cross_entropy(out, labels, reduction="none")
        return (self.upper["weights"].exp()[: len(inputs)] * losses).mean()

    def upper_loss(self, batch: Any) -> Tensor:
        return sum((p.square().sum() + p.sum() for p in self.lower.parameters()), torch.zeros(()))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, CLASSES), normal(ROWS, 4, seed=2)),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)),
        normal(ROWS, 4, seed=2),
    ),
    "convolutions, in-place relu": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(2, CLASSES),
        ),
        normal(ROWS, 2, 4, 4, seed=2),
    ),
}


def classifier(name: str, squares: bool = False) -> tuple[Classifier, tuple[Tensor, Tensor]]:
    make, inputs = NETS[name]
    return Classifier(seeded(make), squares), (inputs, LABELS)


def gauss_newton(problem: Classifier, inputs: Tensor, labels: Tensor) -> Tensor:
    """The sum over rows of J^T H J, by the formula of the softmax's Hessian."""
    params = {name: p.detach() for name, p in problem.lower.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(problem.lower, p, (inputs,)))(params)
    J = torch.cat([j.reshape(len(inputs), CLASSES, -1) for j in jacobians.values()], dim=2)
    p = functional_call(problem.lower, params, (inputs,)).softmax(dim=1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weights = problem.upper["weights"].detach().exp()[: len(inputs)] / len(inputs)
    return torch.einsum("b,bki,bkl,blj->ij", weights, J, H, J)


def made(solver: LinearSolver, problem: Problem, batch: Any) -> Callable[[Tensor], Tensor]:
    """The inverse as a function of a right-hand side."""
    ready = solver.prepared(Oracles(problem, None, [batch]))
    return lambda b: ready.solve(lambda v: v, b).value


def inverse(solver: LinearSolver, problem: Problem, batch: Any) -> Tensor:
    size = sum(p.numel() for p in problem.lower.parameters())
    apply = made(solver, problem, batch)
    return torch.stack([apply(e) for e in torch.eye(size).double()], dim=1)


def blocks(problem: Problem) -> list[slice]:
    found, start = [], 0
    for layer in problem.lower.modules():
        size = sum(p.numel() for p in layer.parameters(recurse=False))
        found += [slice(start, start + size)] * bool(size)
        start += size
    return found


@pytest.mark.parametrize("solver", [KFAC(0.3), EKFAC(0.3)], ids=repr)
def test_exact_for_a_linear_layer_and_squares(solver: LinearSolver) -> None:
    problem, batch = classifier("linear", squares=True)
    wanted = Implicit(Cholesky(damping=0.3)).hypergradient(problem, None, [batch])
    # no upper variable acts through the squares: compare what the systems give
    oracles = Oracles(problem, None, [batch])
    linear = oracles.linearize_lower(oracles.upper, oracles.lower)
    rhs = normal(15)
    found = solver.prepared(oracles).solve(linear.hessian, rhs)
    truth = Cholesky(damping=0.3).solve(linear.hessian, rhs).value
    torch.testing.assert_close(found.value, truth, rtol=1e-10, atol=1e-10)
    assert found.result is wanted.result is Result.SUCCESS
    assert float(found.residual or 0) < 1e-12


@pytest.mark.parametrize("solver", [KFAC(0.1), EKFAC(0.1)], ids=repr)
@pytest.mark.parametrize("name", ["linear", "two layers"])
def test_a_block_of_one_row_is_exact(name: str, solver: LinearSolver) -> None:
    problem, (inputs, labels) = classifier(name)
    row = (inputs[:1], labels[:1])
    G, H = gauss_newton(problem, *row), inverse(solver, problem, row)
    for block in blocks(problem):
        eye = torch.eye(G[block, block].shape[0]).double()
        wanted = torch.linalg.inv(G[block, block] + 0.1 * eye)
        torch.testing.assert_close(H[block, block], wanted, rtol=1e-9, atol=1e-9)
        others = torch.ones(len(G), dtype=torch.bool)
        others[block] = False
        assert not H[block, others].any()


def test_kfac_multiplies_the_mean_input_and_the_summed_gradient() -> None:
    problem, (inputs, labels) = classifier("linear")
    ones = torch.cat([inputs, torch.ones(ROWS, 1).double()], dim=1)
    p = problem.lower(inputs).detach().softmax(dim=1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    B = (problem.upper["weights"].detach().exp()[:, None, None] * H).sum(dim=0) / ROWS
    whole = torch.kron(B, ones.mT @ ones / ROWS) + 0.2 * torch.eye(15).double()
    b = normal(15)
    layered = torch.cat([b[:12].reshape(3, 4), b[12:, None]], dim=1).reshape(-1)
    w = torch.linalg.solve(whole, layered).reshape(3, 5)
    wanted = torch.cat([w[:, :4].reshape(-1), w[:, 4]])
    found = made(KFAC(0.2), problem, (inputs, labels))(b)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_ekfac_has_the_diagonal_of_the_gauss_newton_matrix(name: str) -> None:
    """In its own eigenvectors, which are those of KFAC: for convolutions, too, exactly."""
    problem, batch = classifier(name)
    G, damping = gauss_newton(problem, *batch), 1e-3
    mine, other = inverse(EKFAC(damping), problem, batch), inverse(KFAC(damping), problem, batch)
    for block in blocks(problem):
        exact, guess = (torch.linalg.inv(m[block, block]) for m in (mine, other))
        eye = torch.eye(len(exact)).double()
        guess = guess - damping * eye
        # distinct eigenvalues of KFAC give the basis; EKFAC is diagonal there
        commuting = exact @ guess - guess @ exact
        assert float(commuting.norm()) < 1e-6 * float(exact.norm() * guess.norm())
        _, U = torch.linalg.eigh(guess + 1e-3 * exact)
        wanted = (U.mT @ G[block, block] @ U).diagonal() + damping
        torch.testing.assert_close((U.mT @ exact @ U).diagonal(), wanted, rtol=1e-5, atol=1e-7)
        closer, far = (float((m - G[block, block]).norm()) for m in (exact - damping * eye, guess))
        assert closer <= far + 1e-9


def test_several_batches_are_averaged() -> None:
    problem, (inputs, labels) = classifier("two layers")
    halves = [(inputs[:3], labels[:3]), (inputs[3:6], labels[3:6])]
    problem.upper["weights"].data.zero_()
    for solver in (KFAC(0.1), EKFAC(0.1)):
        several = solver.prepared(Oracles(problem, None, halves))
        whole = solver.prepared(Oracles(problem, None, [(inputs[:6], labels[:6])]))
        unequal = Pieces([(inputs[:4], labels[:4]), (inputs[4:6], labels[4:6])])
        pieces = solver.prepared(Oracles(problem, None, [unequal]))
        b = normal(40)
        expected, *values = [s.solve(lambda v: v, b).value for s in (whole, several, pieces)]
        for value in values:
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_as_preconditioner_it_saves_products() -> None:
    problem, (inputs, labels) = classifier("linear")
    batch = (inputs * torch.tensor([10.0, 1.0, 0.1, 3.0]).double(), labels)

    def products(preconditioner: Any) -> int:
        solver = ConjugateGradient(rtol=1e-8, damping=1e-4, preconditioner=preconditioner)
        answer = Implicit(solver).hypergradient(problem, None, [batch])
        assert answer.result is Result.SUCCESS
        return answer.stats.num_products

    assert products(EKFAC(1e-6)) < 0.7 * products(None)


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(TypeError, match=r"use it as `Implicit\(KFAC\(\)\)`"):
        KFAC().solve(lambda v: v, normal(3))
    with pytest.raises(ValueError, match=r"`EKFAC` found no layer.*use `Nystrom"):
        Implicit(EKFAC()).hypergradient(Quadratic())
    with pytest.raises(ValueError, match="`damping` must be positive"):
        KFAC(damping=0.0)
    problem, batch = classifier("two layers")
    rough = Implicit(KFAC(1e-6)).hypergradient(problem, None, [batch])
    assert rough.result is Result.SUCCESS  # a Gauss-Newton matrix is what was asked for
    assert "differs from its Kronecker factors" in rough.stats.note


def test_compiled_graphs_do_not_remember_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    problem, batch = classifier("linear")
    compiled = Compiled(Implicit(ConjugateGradient(3, rtol=None, preconditioner=KFAC(0.1))))
    for shift in (0.0, 0.5):
        problem.lower.weight.data[0].add_(shift)
        found, wanted = (
            s.hypergradient(problem, None, [batch]).grad["weights"]
            for s in (compiled, compiled.solver)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
