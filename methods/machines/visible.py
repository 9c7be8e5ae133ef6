r"""The two kinds of visibles: binary ones, $e^{b v}$ on {0, 1}, and Gaussian ones on the real line.

Given the first hidden layer a visible feels the field $x = W h_1$. With $-E = \ldots + v^T x$,

$$ \text{binary:}\quad \sum_v e^{(b + x) v} = 1 + e^{b + x}, \qquad p(v=1|h_1) = \sigma(b + x), $$

$$ \text{Gaussian:}\quad \int e^{-(v-b)^2 / 2 s^2 + v x}\, dv = \sqrt{2 \pi}\, s\, e^{b x + s^2 x^2 / 2},
   \qquad p(v|h_1) = N(b + s^2 x,\ s^2) . $$
"""

import math

import torch
from torch import Tensor, nn

from bilevel.methods.machines.base import LOG_2, BoltzmannMachine, VisibleDraw
from bilevel.methods.machines.chance import Chance, normals, uniforms
from bilevel.methods.machines.enumeration import log_one_plus_exp
from bilevel.methods.machines.neighbours import Neighbours
from bilevel.methods.networks.units import Change


class BinaryVisible(BoltzmannMachine):
    """A machine with visibles in {0, 1}."""

    def visible_mean(self, h: Tensor) -> Tensor:
        return self._visible_logits(h[:, : self.latent_dims[0]], 1.0, None).sigmoid()

    def rewriting(self) -> None:
        return None

    def base_rate(self, data: Tensor) -> Tensor:
        return data.mean(0).clamp(1e-5, 1 - 1e-5).logit()

    def log_partition_base(self, base: Tensor | None = None) -> Tensor:
        logits = torch.zeros_like(self.visible_bias) if base is None else base
        return log_one_plus_exp(logits).sum() + sum(self.latent_dims) * LOG_2

    def _visible_logits(self, h1: Tensor, beta: float, base: Tensor | None) -> Tensor:
        b, weight = self.visible_bias, self.first_weight.mT
        if base is None:
            return torch.addmm(b, h1, weight, beta=beta, alpha=beta)
        return torch.addmm(torch.lerp(base, b, beta), h1, weight, alpha=beta)

    def _visible_energy(self, v: Tensor, less: Tensor) -> Tensor:
        return torch.addmv(less, v, self.visible_bias, beta=-1, alpha=-1)

    def _log_sum_visible(self, h1: Tensor, beta: float, base: Tensor | None) -> Tensor:
        return log_one_plus_exp(self._visible_logits(h1, beta, base)).sum(1)

    def _visible_draw(self, beta: float, base: Tensor | None) -> VisibleDraw:
        b = self.visible_bias
        bias = torch.lerp(torch.zeros_like(b) if base is None else base, b, beta)
        weight = self.first_weight.mT

        def draw(h1: Tensor, chance: Chance) -> Tensor:
            return chance.coins(torch.addmm(bias, h1, weight, alpha=beta).sigmoid_())

        return draw

    def _visible_chances(self, n: int, generator: torch.Generator) -> Tensor:
        return uniforms(self.visible_bias, generator, n, self.visible_dim)

    def _visible_neighbours(self, base: Tensor | None) -> Neighbours:
        b, weight = self.visible_bias.detach(), self.first_weight.detach()
        n1 = weight.shape[1]
        start = torch.zeros_like(b) if base is None else base.to(b)
        return Neighbours(b.new_zeros(n1), weight.mT, b, start, b.new_empty(n1, 0))


class GaussianVisible(BoltzmannMachine):
    """A machine with real visibles, Gaussian given the latent, of scale exp(log_scale)."""

    log_scale: nn.Parameter

    def visible_mean(self, h: Tensor) -> Tensor:
        field = h[:, : self.latent_dims[0]] @ self.first_weight.mT
        return torch.addcmul(self.visible_bias, field, (2 * self.log_scale).exp())

    def base_rate(self, data: Tensor) -> None:
        return None

    def rewriting(self) -> Change:
        r"""$b' = m + d \odot b$, $\log s' = \log s + \log d$, $W' = W / d$, $c' = c - W^T (m / d)$."""

        def change(shift: Tensor, scale: Tensor) -> None:
            weight = self.first_weight.double()
            self.first_bias.copy_(self.first_bias.double() - (shift / scale) @ weight)
            self.first_weight.copy_(weight / scale[:, None])
            self.visible_bias.copy_(shift + scale * self.visible_bias.double())
            self.log_scale.copy_(self.log_scale.double() + scale.log())

        return change

    def log_partition_base(self, base: Tensor | None = None) -> Tensor:
        self._check_no_base(base)
        return self._log_normalizer() + sum(self.latent_dims) * LOG_2

    def _log_normalizer(self) -> Tensor:
        return self.log_scale.sum() + 0.5 * self.visible_dim * math.log(2 * math.pi)

    def _visible_energy(self, v: Tensor, less: Tensor) -> Tensor:
        deviation, precision = v - self.visible_bias, (-2 * self.log_scale).exp()
        return torch.addmv(less, deviation.square(), precision, beta=-1, alpha=0.5)

    def _log_sum_visible(self, h1: Tensor, beta: float, base: Tensor | None) -> Tensor:
        self._check_no_base(base)
        field = h1 @ self.first_weight.mT
        variance = (2 * self.log_scale).exp()
        exponent = field @ (beta * self.visible_bias)
        exponent = torch.addmv(exponent, field.square(), variance, alpha=0.5 * beta**2)
        return exponent + self._log_normalizer()

    def _visible_draw(self, beta: float, base: Tensor | None) -> VisibleDraw:
        self._check_no_base(base)
        b, scale = self.visible_bias, self.log_scale.exp()
        weight = (scale.square()[:, None] * self.first_weight).mT

        def draw(h1: Tensor, chance: Chance) -> Tensor:
            mean = torch.addmm(b, h1, weight, alpha=beta)
            return mean.addcmul_(chance.normal(mean, *mean.shape), scale)

        return draw

    def _visible_chances(self, n: int, generator: torch.Generator) -> Tensor:
        return normals(self.visible_bias, generator, n, self.visible_dim)

    def _visible_neighbours(self, base: Tensor | None) -> Neighbours:
        self._check_no_base(base)
        b, weight = self.visible_bias.detach(), self.first_weight.detach()
        none = b.new_empty(0)
        scaled = (self.log_scale.detach().exp()[:, None] * weight).mT
        return Neighbours(b @ weight, b.new_empty(weight.shape[1], 0), none, none, scaled)

    def _check_no_base(self, base: Tensor | None) -> None:
        if base is not None:
            raise ValueError(
                f"a base rate is for binary visibles, and those of a `{type(self).__name__}` are "
                "Gaussian; leave `base` out"
            )
