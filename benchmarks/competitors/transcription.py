"""BiDVL's offset step as one would write it first: the yardstick for parity and for speed.

A straightforward transcription of the published step - `.backward()`, one optimizer per level, every
forward pass where the equations have it - on networks given from outside.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn


@final
@dataclass
class PlainBiDVL:
    """Networks, optimizers and coefficients of the plain loop."""

    energy: nn.Module
    posterior: nn.Module
    generator: nn.Module
    upper_optimizer: torch.optim.Optimizer
    lower_optimizer: torch.optim.Optimizer
    ratio: float
    latent_weight: float
    one_pass: bool = False  # the energy of data and samples together: one power iteration, not two

    def step(self, v: Tensor, latent: Tensor, noise: Tensor) -> None:
        """One upper step, then one lower step on the same batch and latent."""
        generated = self.generator(latent).detach()
        if self.one_pass:
            real, fake = self.energy(torch.cat([v, generated])).chunk(2)
        else:
            real, fake = self.energy(v), self.energy(generated)
        loss = real.mean() - fake.mean()
        self.upper_optimizer.zero_grad()
        loss.backward()
        self.upper_optimizer.step()

        mean, log_variance = self.posterior(v)
        h = mean + (log_variance / 2).exp() * noise
        reconstruction = (self.generator(h) - v).square().sum() / len(v)
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(v)
        generated = self.generator(latent)
        energy = self.energy(generated).mean()
        self.posterior.requires_grad_(False)
        recovered, _ = self.posterior(generated)
        self.posterior.requires_grad_(True)
        cycle = (recovered - latent).square().sum() / len(v)
        loss = energy + self.latent_weight * cycle + self.ratio * (reconstruction + prior)
        self.lower_optimizer.zero_grad()
        loss.backward()
        self.lower_optimizer.step()
