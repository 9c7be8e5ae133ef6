r"""The simulated quadratics of benchmark_bilevel: a stochastic bilevel problem in closed form.

Both losses are means over n samples of quadratics in y (lower) and x (upper),

$$ \tfrac12 y^\top H_i y + \tfrac12 x^\top K_i x + x^\top C_i y + c_i^\top y + e_i^\top x , $$

with rank-one $H_i = a_i a_i^\top$, $a_i$ Gaussian with a covariance whose eigenvalues go from mu to L on
a logarithmic scale; $K_i$ likewise, with one eigenvalue 0; $C_i = (U D z_i)(V z_i)^\top$ with singular
values from mu to 0.1 in the mean; $c_i$, $e_i$ standard normal. $K_i$ and $e_i$ of the lower loss move
nothing.

The distribution is that of the `simulated` data set of benchmark_bilevel (commit 3ad65dc), drawn by
torch: problems of the same kind, not the same numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel import Problem

MU, LARGEST, CROSS = 0.1, 1.0, 0.1
Form: TypeAlias = Literal["factors", "matrices"]


@final
@dataclass(frozen=True)
class Samples:
    """The samples of one loss; every tensor has one row for each."""

    lower_factors: Tensor  # a_i, shape (n, dim y)
    upper_factors: Tensor  # b_i with K_i = b_i b_i^T, shape (n, dim x)
    cross_left: Tensor  # U D z_i, shape (n, dim x)
    cross_right: Tensor  # V z_i, shape (n, dim y)
    lower_linear: Tensor  # c_i, shape (n, dim y)
    upper_linear: Tensor  # e_i, shape (n, dim x)

    @classmethod
    def drawn(cls, n: int, dim_lower: int, dim_upper: int, generator: torch.Generator) -> "Samples":
        """Independent samples, in float64."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def root(dim: int, eigenvalues: Tensor) -> Tensor:
            u = torch.linalg.svd(normal(dim, 1), full_matrices=True).U
            return u * eigenvalues.sqrt() @ u.mT

        def spectrum(low: float, high: float, count: int) -> Tensor:
            ends = torch.tensor([low, high], dtype=torch.float64).log10()
            return torch.logspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)

        lower_root = root(dim_lower, spectrum(MU, LARGEST, dim_lower))
        flat = torch.zeros(1, dtype=torch.float64)
        upper_root = root(dim_upper, torch.cat([flat, spectrum(MU, LARGEST, dim_upper - 1)]))
        u, _, vh = torch.linalg.svd(normal(dim_upper, dim_lower), full_matrices=True)
        rank = min(dim_lower, dim_upper)
        z = normal(n, dim_lower)
        return cls(
            lower_factors=normal(n, dim_lower) @ lower_root,
            upper_factors=normal(n, dim_upper) @ upper_root,
            cross_left=(z[:, :rank] * spectrum(MU, CROSS, rank)) @ u[:, :rank].mT,
            cross_right=z @ vh.mT,
            lower_linear=normal(n, dim_lower),
            upper_linear=normal(n, dim_upper),
        )

    def factors(self) -> dict[str, Tensor]:
        """The vectors that the matrices are made of: the same losses with far fewer numbers."""
        return dict(vars(self))

    def matrices(self) -> dict[str, Tensor]:
        """One matrix for each sample and term, as benchmark_bilevel holds them."""

        def outer(a: Tensor, b: Tensor) -> Tensor:
            return a[:, :, None] * b[:, None, :]

        return {
            "hessian": outer(self.lower_factors, self.lower_factors),
            "upper_hessian": outer(self.upper_factors, self.upper_factors),
            "cross": outer(self.cross_left, self.cross_right),
            "lower_linear": self.lower_linear,
            "upper_linear": self.upper_linear,
        }


@final
class Quadratics(Problem):
    """The problem, and the truth about it.

    Args:
        seed: of the samples.
        form: whether samples are matrices, as in benchmark_bilevel, or the vectors they are made of.
        n: samples of either loss.
        dim_lower: entries of y, which begins at 0.
        dim_upper: entries of x, which begins at -2.
    """

    def __init__(
        self,
        seed: int,
        form: Form = "factors",
        n: int = 1024,
        dim_lower: int = 100,
        dim_upper: int = 10,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            samples = [Samples.drawn(n, dim_lower, dim_upper, generator) for _ in range(2)]
            self.truth = Truth(*samples)
            if self.truth.curvature() > 0:
                break
        else:
            raise ValueError(f"no problem of seed {seed} is convex in x; take another seed")
        self.upper = nn.ParameterDict({"x": torch.full((dim_upper,), -2.0)})
        self.lower = nn.ParameterDict({"y": torch.zeros(dim_lower)})
        self.form: Form = form
        whole = [s.factors() if form == "factors" else s.matrices() for s in samples]
        self.rows = [{name: t.float() for name, t in rows.items()} for rows in whole]

    def data(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of the upper and of the lower loss, without what no derivative in use depends on."""
        lower, upper = self.rows
        idle = {"upper_factors", "upper_hessian", "upper_linear"}
        return upper, {name: t for name, t in lower.items() if name not in idle}

    def upper_loss(self, batch: Any) -> Tensor:
        x = self.upper["x"]
        if self.form == "factors":
            curved = (batch["upper_factors"] @ x).square().mean() / 2
        else:
            curved = x @ batch["upper_hessian"].mean(0) @ x / 2
        return self.lower_loss(batch) + curved + batch["upper_linear"].mean(0) @ x

    def lower_loss(self, batch: Any) -> Tensor:
        x, y = self.upper["x"], self.lower["y"]
        if self.form == "factors":
            curved = (batch["lower_factors"] @ y).square().mean() / 2
            crossed = ((batch["cross_left"] @ x) * (batch["cross_right"] @ y)).mean()
        else:
            curved = y @ batch["hessian"].mean(0) @ y / 2
            crossed = x @ batch["cross"].mean(0) @ y
        return curved + crossed + batch["lower_linear"].mean(0) @ y

    def error(self) -> float:
        """The squared norm of the hypergradient at the current x."""
        return self.truth.error(self.upper["x"].detach())


@final
class Truth:
    """The hypergradient at any x, in float64 and on all samples."""

    def __init__(self, lower: Samples, upper: Samples) -> None:
        means = [{k: t.mean(0) for k, t in s.matrices().items()} for s in (lower, upper)]
        self._lower, self._upper = means

    def _response(self) -> Tensor:
        return -torch.linalg.solve(self._lower["hessian"], self._lower["cross"].mT)

    def curvature(self) -> float:
        """The smallest eigenvalue of the Hessian of x -> F(x, y*(x))."""
        response, f = self._response(), self._upper
        mixed = f["cross"] @ response
        whole = response.mT @ f["hessian"] @ response + f["upper_hessian"] + mixed + mixed.mT
        return float(torch.linalg.eigvalsh(whole)[0])

    def error(self, x: Tensor) -> float:
        """The squared norm of the hypergradient at x."""
        return float(self._hypergradient(x.double()).square().sum())

    def floor(self) -> float:
        """The error of the solution itself, rounded to 32 bits: no single precision gets below it."""
        zero = torch.zeros(self._lower["cross"].shape[0], dtype=torch.float64)
        at_zero = self._hypergradient(zero)
        columns = [self._hypergradient(e) - at_zero for e in torch.eye(len(zero)).double()]
        solution = torch.linalg.solve(torch.stack(columns, 1), -at_zero)
        return self.error(solution.float())

    def _hypergradient(self, x: Tensor) -> Tensor:
        g, f = self._lower, self._upper
        y = -torch.linalg.solve(g["hessian"], g["lower_linear"] + g["cross"].mT @ x)
        by_y = f["hessian"] @ y + f["cross"].mT @ x + f["lower_linear"]
        direct = f["upper_hessian"] @ x + f["cross"] @ y + f["upper_linear"]
        return direct + self._response().mT @ by_y
