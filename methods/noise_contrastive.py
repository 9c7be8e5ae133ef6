r"""Noise-contrastive estimation: the energy as a classifier of data against noise.

With $\nu$ noise rows $y \sim p_n$ for each data row v and a learned log normaliser c, the log-odds
that a row is from the data are $G(v) = -F(v) - c - \log \nu - \log p_n(v)$, and

$$ L(\theta, c) = -E_q[\log \sigma(G(v))] - \nu\, E_{p_n}[\log \sigma(-G(y))] . $$

At the minimum over all functions $e^{-F - c}$ is the density of the data: the normaliser is learned,
so c estimates log Z where the model is right. It has a single level.

The noise is $N(0, I)$ for real visibles, and for binary ones independent units at the rates of the data.
"""

import math
from typing import Any, ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.machines.base import check_dim
from bilevel.methods.machines.chance import (
    Begun,
    Chance,
    Drawn,
    Given,
    normals,
    uniforms,
)
from bilevel.methods.machines.enumeration import log_one_plus_exp
from bilevel.methods.models.machine import MachineModel, require_machine
from bilevel.methods.networks.units import Change
from bilevel.methods.training.settings import MACHINE_DEFAULTS
from bilevel.methods.variational.base import normal_log_prob
from bilevel.methods.variational.bernoulli import bernoulli_log_prob
from bilevel.problem import Loss


@final
class Batch(NamedTuple):
    """Visibles, noise, and log(ratio p_n) at both."""

    visible: Tensor
    noise: Tensor  # shape (ratio n, visible_dim)
    visible_offset: Tensor  # shape (n,)
    noise_offset: Tensor  # shape (ratio n,)


@final
class NoiseContrastive(EBLVM):
    r"""NCE, $-E_q[\log \sigma(G(v))] - \nu\, E_{p_n}[\log \sigma(-G(y))]$.

    The log normaliser c is the upper variable `log_normalizer`, 0 at first.

    Args:
        model: a machine with a tractable free energy.
        ratio: nu, noise rows per data row.

    Raises:
        TypeError: if `ratio` is not an integer.
        ValueError: if it is not positive, or the free energy cannot be enumerated.

    Example:
        >>> from bilevel.methods.machines import GaussianRBM
        >>> learner = NoiseContrastive(GaussianRBM(2, 4))
        >>> history = learner.fit(torch.rand(200, 2), num_steps=2)
        >>> abs(learner.log_normalizer.item()) <= 0.002  # two steps of Adam
        True

    References:
        Noise-contrastive estimation: A new estimation principle for unnormalized statistical models
        (Gutmann and Hyvärinen, 2010), https://proceedings.mlr.press/v9/gutmann10a.html
        Bi-level Score Matching for Learning Energy-based Latent Variable Models (Bao et al., NeurIPS
        2020), https://arxiv.org/abs/2010.07856, whose baseline on real visibles this is.
        Differs from the papers in:
        - the noise of binary visibles is ours. Its rates are the mean of all rows seen so far and of
          two imagined ones, of 0s and of 1s, kept in the buffer `rates` and clipped to
          [1e-5, 1 - 1e-5]: every step is NCE against a known noise, which settles as the mean does;
        - grey data are drawn as bits anew at each step: noise is binary, and a classifier would tell
          grey from black and white without learning anything of their distribution.
    """

    latent_model: MachineModel
    training_defaults: ClassVar[dict[str, Any]] = MACHINE_DEFAULTS

    @explained
    def __init__(self, model: BoltzmannMachine, ratio: int = 1) -> None:
        super().__init__()
        instead = "`ContrastiveDivergence(model, persistent=True)`"
        machine = require_machine(model, "NoiseContrastive", instead)
        self.ratio = check_dim("ratio", ratio)
        self.latent_model = MachineModel.of(machine)
        self.upper, self.lower = nn.ModuleDict({"model": machine}), nn.ModuleDict()
        self.recipe = {"model": machine.recipe, "ratio": ratio}
        self.upper.register_parameter(
            "log_normalizer", nn.Parameter(model.visible_bias.new_zeros(()))
        )
        self.rates: Tensor
        self.seen: Tensor
        if model.visible_range is not None:
            self.register_buffer("rates", torch.full_like(model.visible_bias, 0.5).detach())
            self.register_buffer("seen", torch.tensor(2, device=self.rates.device))

    @property
    def log_normalizer(self) -> Tensor:
        """C, the learned estimate of log Z; a scalar."""
        return cast(Tensor, self.upper.log_normalizer)

    def rewritings(self) -> list[Change] | None:
        """Those of the machine; c takes the Jacobian, as log Z does."""
        known = self.latent_model.rewritings()

        def normalizer(shift: Tensor, scale: Tensor) -> None:
            self.log_normalizer.add_(scale.log().sum())

        return None if known is None else [*known, normalizer]

    # ------------------------------------------------------------------ the learning problem

    @torch.no_grad()
    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        """The batch with its noise; updates the rates of binary visibles."""
        return self._drawn(data, Drawn(generator))

    def begin_draw(self, data: Tensor, generator: torch.Generator) -> Begun | None:
        """The noise, or the coins for it."""
        if data.is_cuda:
            return None
        count, width = self.ratio * len(data), self.model.visible_dim
        if self.model.visible_range is None:
            return Begun(data, [normals(data, generator, count, width)])
        grey = [] if self.model.binary else [len(data)]
        return Begun(data, [uniforms(data, generator, n, width) for n in (count, *grey)])

    def finish_draw(self, begun: Begun) -> Batch:
        return self._drawn(begun.data, Given(begun.numbers))

    def _drawn(self, data: Tensor, chance: Chance) -> Batch:
        count = self.ratio * len(data)
        if self.model.visible_range is None:
            noise = chance.normal(data, count, self.model.visible_dim)
        else:
            self.seen += len(data)
            self.rates += (data.mean(0) - self.rates) * len(data) / self.seen
            noise = chance.coins(self._noise_logits().sigmoid().expand(count, -1))
            if not self.model.binary:
                data = chance.coins(data)
        return Batch(data, noise, self._offset(data), self._offset(noise))

    def _offset(self, v: Tensor) -> Tensor:
        """log(ratio p_n(v)), shape (n,)."""
        if self.model.visible_range is None:
            log_noise = normal_log_prob(v).sum(1)
        else:
            log_noise = bernoulli_log_prob(self._noise_logits(), v)
        return log_noise + math.log(self.ratio)

    def _noise_logits(self) -> Tensor:
        return cast(Tensor, self.model.base_rate(self.rates[None]))

    def upper_loss(self, batch: Batch) -> Loss:
        """The cross-entropy of the classifier, and c."""
        of_data = self._logits(batch.visible, batch.visible_offset)
        of_noise = self._logits(batch.noise, batch.noise_offset)
        loss = log_one_plus_exp(-of_data).mean() + self.ratio * log_one_plus_exp(of_noise).mean()
        return loss, {"log_normalizer": self.log_normalizer}

    def _logits(self, v: Tensor, offset: Tensor) -> Tensor:
        """G(v)."""
        return -self.model.free_energy(v) - self.log_normalizer - offset
