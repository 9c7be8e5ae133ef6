r"""BiDVL on a ring in the plane: the density of an energy closes in on the data, and is drawn.

The model is $p(v, h) = p(v)\, q_1(h|v)$ with $p(v) \propto e^{-E(v)}$; energy, posterior and generator
are perceptrons. In the plane a sum over a grid gives the partition function, which no training step
needs, so the picture shows the normalised density itself:

    upper level    the energy, low at data and high at samples of the generator
    lower level    the generator, to low energy; the posterior and it, to reconstruct data and latents

With the hinge the upper level rests where the two energies are 2 apart, so that the density keeps a hole
and an edge but stays wider than the data; the samples, which the generator makes, do not.

Writes `runs/bidvl_rings.png`: shaded, the density of the energy after some steps; dots, samples of the
generator; first, the data. Needs matplotlib (`pip install 'bilevel[report]'`).
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bilevel import Step
from bilevel.methods import BiDVL
from bilevel.methods.data.densities import density

LATENT, WIDTH = 4, 64
SPREAD = 4.0  # the densities fill the unit square; ours is centred and as wide
EDGE, SIDE = 3.0, 150
RING = density("circle")


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, outputs),
    )


class Energy(nn.Module):
    """A bowl that a network bends: far from data and samples, where nobody trains it, it stays high."""

    def __init__(self) -> None:
        super().__init__()
        self.network = perceptron(2, 1)

    def forward(self, v: Tensor) -> Tensor:
        energies: Tensor = 3 * self.network(v).flatten() + v.square().sum(1)
        return energies


class Posterior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = perceptron(2, 2 * LATENT)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.network(v).chunk(2, 1)
        return mean, log_variance


def points(n: int, seed: int) -> Tensor:
    return SPREAD * (RING.sample(n, torch.Generator().manual_seed(seed)) - 0.5)


def log_density(model: BiDVL) -> tuple[Tensor, Tensor]:
    """Log p on a grid, normalised there, and log Z."""
    axis = torch.linspace(-EDGE, EDGE, SIDE)
    energies = model.energy(torch.cartesian_prod(axis, axis)).view(SIDE, SIDE)
    log_partition = (-energies).logsumexp((0, 1)) + 2 * math.log(2 * EDGE / (SIDE - 1))
    return -energies - log_partition, log_partition


def on_the_ring(samples: Tensor) -> float:
    """Share of samples within three standard deviations of the circle, where 99.7% of the data are."""
    inner, outer = SPREAD * (0.4 - 0.09), SPREAD * (0.4 + 0.09)
    radii = samples.norm(dim=1)
    return float(((radii > inner) & (radii < outer)).float().mean())


def draw(panels: list[tuple[str, Tensor | None, Tensor]], path: Path) -> None:
    figure = Figure(figsize=(3 * len(panels), 3.4), layout="constrained")
    for axes, (title, shade, dots) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        limits = (-EDGE, EDGE)
        if shade is not None:
            extent = (*limits, *limits)
            axes.imshow(shade.exp().mT, origin="lower", extent=extent, cmap="Blues")
        axes.scatter(*dots.mT, s=1.5, color="black" if shade is None else "#d9652b")
        axes.set(title=title, xlim=limits, ylim=limits, xticks=[], yticks=[], aspect="equal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(num_steps: int, seed: int, path: Path) -> None:
    torch.manual_seed(seed)
    model = BiDVL(
        Energy(),
        Posterior(),
        perceptron(LATENT, 2),
        latent_dim=LATENT,
        upper="hinge",
        latent_weight=1.0,
    )
    data, test = points(10_000, seed), points(2000, seed + 1)
    panels: list[tuple[str, Tensor | None, Tensor]] = [("data", None, data[:800])]

    def look(step: Step) -> None:
        if step.number not in (num_steps // 16, num_steps // 4, num_steps // 2, num_steps):
            return
        shade, log_partition = log_density(model)
        samples = model.sample(800, torch.Generator().manual_seed(seed))
        reached = float((-model.energy(test) - log_partition).mean())
        print(
            f"step {step.number:4}: log-likelihood {reached:.2f}, on the ring {on_the_ring(samples):.0%}"
        )
        panels.append((f"step {step.number}", shade, samples))

    model.fit(
        data,
        callbacks=[look],
        num_steps=num_steps,
        batch_size=256,
        upper_lr=1e-3,
        lower_lr=2e-3,
        lower_weight_decay=0.0,
        schedule="cosine",
        seed=seed,
    )
    draw(panels, path)
    _, log_partition = log_density(model)
    reached = float((-model.energy(test) - log_partition).mean())
    best = -RING.entropy - 2 * math.log(SPREAD)
    share = on_the_ring(model.sample(5000, torch.Generator().manual_seed(seed + 1)))
    print(
        f"{share:.1%} of 5,000 samples on the ring, test log-likelihood {reached:.2f} nats; the "
        f"density itself has {best:.2f}. Picture: {path}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bidvl_rings.png"))
    options = parser.parse_args()
    main(64 if options.small else 800, options.seed, options.out)
