r"""An energy of one's own on two moons: its score, its samples, its density.

A network $E(v)$ of two numbers is all there is; $p(v) \propto e^{-E(v)}$. Score matching trains it
without the partition function: it compares $-\nabla E$ with the slope of the data's log-density, which
integration by parts makes computable from the data alone. What a density can be asked for comes after:

    score        where the density rises from a point, and how fast
    samples      Langevin dynamics and Hamiltonian Monte Carlo from noise, on the energy and its gradient
    likelihood   on the plane, Z is a sum over a grid; the moons know their own, which none can exceed

Writes `runs/two_moons.png`. Needs matplotlib (`pip install 'bilevel[report]'`).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bilevel.methods import ScoreMatching
from bilevel.methods.data.densities import density
from bilevel.methods.likelihood import plane_density
from bilevel.methods.report import plot_density
from bilevel.methods.samplers import HamiltonianMonteCarlo, Langevin

MOONS = density("moons")  # on the unit square, blurred with a deviation of 0.03
BOX = (-0.2, 1.2), (0.0, 1.0)


class Energy(nn.Module):
    """A bowl that a network bends: far from the data, where nobody trains it, it stays high."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1, bias=False),  # a constant is no part of a density
        )

    def forward(self, v: Tensor) -> Tensor:
        """Energies of points, (n, 2) -> (n,)."""
        x = 6 * (v - 0.5)
        energies: Tensor = self.network(x).flatten() + 0.5 * x.square().sum(1)
        return energies


def main(num_steps: int, moves: int, path: Path) -> None:
    torch.set_num_threads(1)  # the network is too small for more
    torch.manual_seed(0)  # the network's weights
    generator = torch.Generator().manual_seed(0)
    data, test = MOONS.sample(20_000, generator), MOONS.sample(5000, generator)

    model = ScoreMatching(Energy(), objective="exact")
    model.fit(data, num_steps=num_steps, batch_size=256, upper_lr=2e-3, schedule="cosine")

    points = torch.tensor([[0.33, 0.8], [0.33, 0.75], [0.33, 0.7]])  # above a moon, on it, below
    for point, slope in zip(points.tolist(), model.score(points).tolist(), strict=True):
        print(
            f"at ({point[0]:.2f}, {point[1]:.2f}) the score is ({slope[0]:7.2f}, {slope[1]:7.2f})"
        )

    log_prob = MOONS.log_prob(test)
    lowest = log_prob.quantile(0.01)  # of the data, 99% lie where the moons' density is higher
    langevin = Langevin(num_steps=10 * moves, step_size=1e-4)
    hamiltonian = HamiltonianMonteCarlo(num_steps=moves, step_size=0.015, num_leapfrog=10)
    samples, shares = {}, {}
    for sampler in (langevin, hamiltonian):
        name = type(sampler).__name__
        samples[name] = model.sample(1000, generator, sampler=sampler, start="noise")
        shares[name] = float((MOONS.log_prob(samples[name]) > lowest).float().mean())
        print(f"{shares[name]:.1%} of 1,000 samples lie on the moons, by {sampler}")

    reached = plane_density(model, BOX).log_prob(test).mean().item()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plot_density(
        model, data=test[:1000], samples=samples["HamiltonianMonteCarlo"], box=BOX
    )
    figure.savefig(path, dpi=240)
    print(
        f"Test log-likelihood {reached:.3f} nats, of the moons' own density {log_prob.mean():.3f}. "
        f"On the moons lie 99.0% of the data, {shares['Langevin']:.1%} of samples by Langevin dynamics "
        f"and {shares['HamiltonianMonteCarlo']:.1%} by Hamiltonian Monte Carlo. Picture: {path}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    main(30 if small else 2000, 2 if small else 50, Path("runs/two_moons.png"))
