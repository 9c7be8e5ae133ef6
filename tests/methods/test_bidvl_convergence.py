"""BiDVL learns: exact divergence on an enumerable model, exact likelihood on a 2-D mixture (A26)."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bilevel import train
from bilevel.methods import BiDVL, GeneralBiDVL
from bilevel.methods.variational import TabularEnergy, TabularJoint, TabularPosterior

COUNTS = torch.tensor([3, 1, 4, 1, 5, 2])
DATA = torch.arange(6).repeat_interleave(COUNTS)


def divergence(problem: GeneralBiDVL) -> float:
    """KL(q || p_psi), exact."""
    q = COUNTS.double() / COUNTS.sum()
    log_p = problem.upper["energy"].log_joint().detach().logsumexp(dim=1)
    return float((q * (q.log() - log_p)).sum())


def test_converges_to_the_data_distribution_on_an_enumerable_model():
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    problem = GeneralBiDVL(
        TabularEnergy(tables[0]), TabularPosterior(tables[1]), TabularJoint(tables[2])
    )
    before = divergence(problem)
    for step in train(
        problem,
        DATA,
        upper_optimizer=torch.optim.Adam(problem.upper.parameters(), 0.02),
        lower_optimizer=torch.optim.Adam(problem.lower.parameters(), 0.05),
        lower_steps=3,
        num_steps=500,
    ):
        assert step.upper_loss.isfinite()
    assert before > 0.3
    assert divergence(problem) < 0.01


class PlaneEnergy(nn.Module):
    """A Lipschitz energy on the plane."""

    def __init__(self) -> None:
        super().__init__()
        widths = [2, 64, 64, 1]
        layers: list[nn.Module] = []
        for m, n in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Linear(m, n)), nn.LeakyReLU(0.1)]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, v: Tensor) -> Tensor:
        return 20 * self.net(v).flatten()  # exp(-E) can fall by e^20 within one unit


class PlanePosterior(nn.Module):
    """Mean and log-variance of a 2-D latent."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.Linear(64, 4)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.heads(self.net(v)).chunk(2, dim=1)
        return mean, log_variance


def mixture(n: int, seed: int) -> Tensor:
    """Eight Gaussians of standard deviation 0.2 on a circle of radius 2."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=generator) * (2 * math.pi / 8)
    centers = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centers + 0.2 * torch.randn(n, 2, generator=generator)


def likelihood(model: BiDVL, v: Tensor, half: float = 4.0, points: int = 200) -> float:
    """Negative log-likelihood of p(v) ~ exp(-E(v)) on a square, by quadrature."""
    axis = (torch.arange(points) + 0.5) / points * 2 * half - half
    grid = torch.cartesian_prod(axis, axis)
    log_z = (-model.energy(grid)).logsumexp(0) + 2 * math.log(2 * half / points)
    return float(model.energy(v).mean() + log_z)


def test_lowers_the_exact_likelihood_of_a_mixture():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        model = BiDVL(
            PlaneEnergy(), PlanePosterior(), generator, latent_dim=2, ratio=0.1, visible_shape=(2,)
        )
    held_out = mixture(2000, seed=1)
    before = likelihood(model, held_out)
    model.fit(
        mixture(4000, seed=2),
        num_steps=300,
        batch_size=200,
        upper_lr=2e-3,
        lower_lr=1e-3,
        schedule="cosine",
    )
    after = likelihood(model, held_out)
    # the uniform density on the square has 4.16 nats, the mixture itself about 1.9
    assert before > 4.16
    assert after < 3.2
