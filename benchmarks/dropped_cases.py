"""The problems and solvers of `benchmarks.dropped_term`: models whose likelihood is a finite sum."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor, nn

from bilevel import Alternating, Cholesky, ConjugateGradient, Implicit, Problem, Solver, Unrolled
from bilevel.methods import RBM, BiSM, GaussianRBM, GeneralBiDVL, ScoreMatching
from bilevel.methods.data.densities import density
from bilevel.methods.variational import (
    BernoulliPosterior,
    Draws,
    HierarchicalJoint,
    TabularPosterior,
    VariationalJoint,
    enumerated,
)
from bilevel.tree import Tree

SEEDS = 3
V, H = 6, 4
COUNTS = torch.tensor([3, 1, 4, 1, 5, 2])
ENTROPY = -float((COUNTS / 16 * (COUNTS / 16).log()).sum())


@dataclass(frozen=True)
class Case:
    """A problem, how it is trained, and what is known of it exactly.

    Attributes:
        name: short name, in the records.
        title: a row of the table.
        make: the problem with the initial variables of a seed; with `together`, of all seeds.
        data: training data of a seed.
        judge: exact log-likelihood of held-out data, one number per seed that is trained at once.
        target: gradient of what the upper level should descend, at the problem's point.
        probe: the problem, at the same variables, that the response is measured in.
        probe_batch: its upper and lower batch.
        solver: what measures it.
        solvers: those that are compared, by name.
        steps: upper steps.
        lower_steps: lower steps before each.
        rate: learning rate of both levels.
        betas: of Adam.
        batch_size: rows per batch, `None` for all.
        compile: whether the steps are compiled.
        together: whether all seeds are trained at once, as blocks of the same tables.
        ceiling: the largest log-likelihood, if it is known.
        reference: the problem without a lower level whose gradient an exact response gives.
        shares: whether the probe looks at every tensor of the upper level by itself.
    """

    name: str
    title: str
    make: Callable[[int], Problem]
    data: Callable[[int], Tensor]
    judge: Callable[[Any], list[float]]
    target: Callable[[Any, Any], Tree]
    probe: Callable[[Any], Any]
    probe_batch: Callable[[Any], tuple[Any, Any]]
    solver: Solver
    solvers: dict[str, Solver]
    steps: int
    lower_steps: int
    rate: float
    betas: tuple[float, float]
    batch_size: int | None = None
    compile: bool = False
    together: bool = False
    ceiling: float | None = None
    reference: Callable[[int], Problem] | None = None
    shares: bool = False


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- tables, all seeds at once


class Tables(nn.Module):
    """E(v, h) of `SEEDS` models: row s V + v of the table is visible v of model s.

    As one model over (s, v, h) with p(s) = 1 / SEEDS: each loss is the mean of the models' losses, and
    Adam, which moves every number by itself, trains them side by side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(noise(0, V, H))

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        return self.table[v, h]

    def log_joint(self) -> Tensor:
        return normalised(-self.table)

    def free_energy(self, v: Tensor) -> Tensor:
        return -(-self.table).logsumexp(1)[v]


class TablesJoint(VariationalJoint):
    """p2(v, h) of `SEEDS` models: a table, or if `limited` the product p2(v) p2(h)."""

    def __init__(self, *, limited: bool) -> None:
        super().__init__()
        self.limited = limited
        if limited:
            self.visible, self.latent = nn.Parameter(noise(2, V, 1)), nn.Parameter(noise(3, 1, H))
        else:
            self.logits = nn.Parameter(noise(2, V, H))

    def log_table(self) -> Tensor:
        if not self.limited:
            return normalised(self.logits)
        visible = self.visible.view(SEEDS, V, 1).log_softmax(1)
        pairs = visible + self.latent.log_softmax(1)[:, None]
        return pairs.flatten(0, 1) - math.log(SEEDS)

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return torch.zeros(n, 0, dtype=torch.float64)

    def draws(self, noise: Tensor) -> Draws:
        return enumerated(self.log_table())

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self.log_table()[v, h]

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError


def noise(seed: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers of all models, one below the other."""
    return torch.randn(SEEDS * rows, columns, dtype=torch.float64, generator=rng(seed))


def normalised(scores: Tensor) -> Tensor:
    """Log p(s, v, h), shape (SEEDS V, H)."""
    blocks = scores.view(SEEDS, -1).log_softmax(1) - math.log(SEEDS)
    return blocks.view_as(scores)


def table_data(_: int = 0) -> Tensor:
    rows = torch.arange(V).repeat_interleave(COUNTS)
    return torch.cat([rows + V * s for s in range(SEEDS)])


def table_likelihoods(energy: Tables) -> Tensor:
    log_p = energy.log_joint().logsumexp(1).view(SEEDS, V) + math.log(SEEDS)
    return (COUNTS / COUNTS.sum() * log_p).sum(1)


def by_seed(ids: Tensor, steps: int, damping: float) -> Callable[..., Tensor]:
    """Conjugate gradients on each seed's own variables; a seed stops at negative curvature.

    Args:
        ids: the seed that each variable belongs to, shape (n,).
        steps: products.
        damping: added to the diagonal.
    """

    def dots(a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros(SEEDS, dtype=a.dtype).index_add_(0, ids, a * b)

    def solve(operator: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
        w, r, p = torch.zeros_like(rhs), rhs, rhs
        squares = start = dots(r, r)
        negative = torch.zeros(SEEDS, dtype=torch.bool)
        for _ in range(steps):
            product = operator(p) + damping * p
            curvature = dots(p, product)
            negative = negative | (curvature <= 0)
            still = ~negative & (squares > 1e-16 * start)
            if not bool(still.any()):
                break
            pace = torch.where(still, squares / curvature, 0.0)[ids]
            w, r = w + pace * p, r - pace * product
            squares, before = dots(r, r), squares
            p = r + torch.where(still, squares / before, 0.0)[ids] * p
        return w

    return solve


def owners(problem: Problem) -> Tensor:
    """The seed of every lower variable, as the linear systems order them."""
    sizes = [p.numel() // SEEDS for p in problem.variables("lower").values()]
    return torch.cat([torch.arange(SEEDS).repeat_interleave(size) for size in sizes])


def tables(divergence: Any, *, limited: bool, lower_steps: int) -> Case:
    def make(_: int = 0) -> GeneralBiDVL:
        joint = TablesJoint(limited=limited)
        return GeneralBiDVL(
            Tables(), TabularPosterior(noise(1, V, H)), joint, divergence=divergence
        )

    def target(problem: GeneralBiDVL, _: Any) -> Tree:
        energy = problem.upper["energy"]
        loss = -table_likelihoods(energy).mean()
        return {"energy.table": torch.autograd.grad(loss, energy.table)[0]}

    def batch(problem: GeneralBiDVL) -> tuple[Any, Any]:
        drawn = problem.draw(table_data(), rng(0))
        return drawn, drawn

    ids = owners(make())
    kind = "limited" if limited else "tables"
    family = "product of marginals" if limited else "table"
    return Case(
        name=f"{kind}-{divergence}-{lower_steps}",
        title=f"p2 a {family}, {divergence if divergence == 'symmetric' else 'KL'}, K = {lower_steps}",
        make=make,
        data=table_data,
        judge=lambda problem: table_likelihoods(problem.upper["energy"]).tolist(),
        target=target,
        probe=lambda problem: problem,
        probe_batch=batch,
        solver=Implicit(by_seed(ids, 60, 1e-4)),
        solvers={**FIRST, "Implicit": Implicit(by_seed(ids, 15, 1e-2))},
        steps=300,
        lower_steps=lower_steps,
        rate=0.03,
        betas=(0.5, 0.999),
        together=True,
        ceiling=-ENTROPY,
    )


FIRST: dict[str, Solver] = {
    "Alternating": Alternating(),
    **{f"Unrolled({n})": Unrolled(num_steps=n) for n in (1, 5, 20)},
}


# ---------------------------------------------------------------- an RBM on bars and stripes


def bars_and_stripes(_: int = 0) -> Tensor:
    """The 14 pictures of 3 x 3 pixels, eight of each."""
    lines = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    bars = lines[:, None, :].expand(-1, 3, 3)
    both = torch.cat([bars, bars.mT]).reshape(-1, 9)
    return both.unique(dim=0).repeat(8, 1)


def rbm(divergence: Any) -> Case:
    def make(seed: int) -> GeneralBiDVL:
        model = RBM(9, 5, generator=rng(seed))
        with torch.no_grad():
            model.weight.mul_(0.1)  # AdvIL's initial weights are for hundreds of units
        posterior = BernoulliPosterior.for_model(model, generator=rng(seed + 10))
        joint = HierarchicalJoint.for_model(model, generator=rng(seed + 20))
        return GeneralBiDVL(model, posterior, joint, divergence=divergence)

    def target(problem: GeneralBiDVL, _: Any) -> Tree:
        names, leaves = zip(*problem.upper.named_parameters(), strict=True)
        loss = -problem.upper["energy"].log_likelihood(bars_and_stripes()[:14]).mean()
        return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    def batch(problem: GeneralBiDVL) -> tuple[Any, Any]:
        drawn = problem.draw(bars_and_stripes().repeat(5, 1), rng(0))
        return drawn, problem.draw_lower(drawn, rng(1), 0)

    damped = Implicit(ConjugateGradient(max_steps=10, rtol=None, damping=3.0))
    return Case(
        name=f"rbm-{divergence}",
        title=f"RBM(9, 5), {divergence if divergence == 'symmetric' else 'KL'}, K = 5",
        make=make,
        data=bars_and_stripes,
        judge=lambda p: [p.upper["energy"].log_likelihood(bars_and_stripes()[:14]).mean().item()],
        target=target,
        probe=lambda problem: problem,
        probe_batch=batch,
        solver=Unrolled(num_steps=20, optimizer=torchopt.sgd(0.1)),  # defined at any curvature
        solvers={**{n: FIRST[n] for n in ("Alternating", "Unrolled(5)")}, "Implicit": damped},
        steps=1000,
        lower_steps=5,
        rate=1e-2,
        betas=(0.5, 0.999),
        compile=True,
        ceiling=-math.log(14),
    )


# ---------------------------------------------------------------- BiSM on the plane


def bism(where: str, expectation: Any) -> Case:
    truth = density(where)
    held_out = truth.sample(5000, rng(99))
    probe_rows = truth.sample(1000, rng(98))

    def model(seed: int) -> GaussianRBM:
        return GaussianRBM(2, 4, generator=rng(seed))

    def make(seed: int) -> BiSM:
        machine = model(seed)
        posterior = BernoulliPosterior.for_model(machine, generator=rng(seed + 10))
        return BiSM(machine, posterior, expectation=expectation)

    def target(problem: BiSM, upper_batch: Any) -> Tree:
        single = ScoreMatching(problem.model)
        names, leaves = zip(*single.upper.named_parameters(), strict=True)
        loss = single.upper_loss(upper_batch.points)
        assert isinstance(loss, Tensor)
        return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    def batch(problem: BiSM) -> tuple[Any, Any]:
        drawn = problem.draw(probe_rows, rng(0))
        return drawn, problem.draw_lower(drawn, rng(1), 0)

    damping = 1e-3 if expectation == "exact" else 0.1
    solvers = {**FIRST, "Implicit": Implicit(Cholesky(damping=damping))}
    del solvers["Unrolled(20)"]  # minutes of compiling
    return Case(
        name=f"bism-{where}-{expectation}",
        title=f"BiSM, {where}, lower loss {expectation}, K = 5",
        make=make,
        data=lambda seed: truth.sample(5000, rng(seed)),
        judge=lambda problem: [float(problem.model.log_likelihood(held_out).mean())],
        target=target,
        probe=lambda problem: BiSM(problem.model, problem.encoder, expectation="exact"),
        probe_batch=batch,
        solver=Implicit(Cholesky(damping=1e-4)),
        solvers=solvers,
        steps=4000,
        lower_steps=5,
        rate=1e-2,
        betas=(0.9, 0.95),
        batch_size=100,
        compile=True,
        reference=lambda seed: ScoreMatching(model(seed)),
        shares=True,
    )


def cases() -> dict[str, Case]:
    """All of them by name."""
    found = [
        *(
            tables(divergence, limited=limited, lower_steps=k)
            for limited in (False, True)
            for divergence in ("kl", "symmetric")
            for k in (1, 10)
        ),
        *(rbm(divergence) for divergence in ("kl", "symmetric")),
        *(
            bism(where, expectation)
            for where, expectation in (
                ("checkerboard", "exact"),
                ("checkerboard", "sampled"),
                ("moons", "exact"),
            )
        ),
    ]
    return {case.name: case for case in found}
