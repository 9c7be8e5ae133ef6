"""Tables for `benchmarks.dropped_term`: BiDVL on tables of energies, all seeds at once."""

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from benchmarks.cases.dropped_case import FIRST, SEEDS, Case, rng
from bilevel import Implicit, Problem
from bilevel.methods import GeneralBiDVL
from bilevel.methods.variational import Draws, TabularPosterior, VariationalJoint, enumerated
from bilevel.tree import Tree

V, H = 6, 4
COUNTS = torch.tensor([3, 1, 4, 1, 5, 2])
ENTROPY = -float((COUNTS / 16 * (COUNTS / 16).log()).sum())


@final
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


@final
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
