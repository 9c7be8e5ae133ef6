r"""The two shapes of a machine: one hidden layer, or two of which the first touches the visibles.

With $E_v$ for the energy of the visibles alone,

$$ \text{one:}\quad E = E_v(v) - c^T h - v^T W h, \qquad
   F(v) = E_v(v) - \sum_j \log(1 + e^{(c + W^T v)_j}), $$

$$ \text{two:}\quad E = E_v(v) - c_1^T h_1 - c_2^T h_2 - v^T W_1 h_1 - h_1^T W_2 h_2, \qquad
   F(v) = E_v(v) - \log \sum_{h_1} e^{h_1^T (c_1 + W_1^T v)} \prod_k (1 + e^{(c_2 + W_2^T h_1)_k}) . $$
"""

import torch
from torch import Tensor, nn

from bilevel.methods.machines.base import (
    MEAN_FIELD_SWEEPS,
    BoltzmannMachine,
    check_dim,
    check_steps,
)
from bilevel.methods.machines.chance import Chance, coin_flips, uniforms
from bilevel.methods.machines.enumeration import MAX_UNITS, log_one_plus_exp, log_sum_over_states
from bilevel.methods.machines.neighbours import Neighbours


class OneHidden(BoltzmannMachine):
    """A machine with one hidden layer: its posterior factorises and its free energy is closed."""

    latent_bias: nn.Parameter
    weight: nn.Parameter

    @property
    def first_weight(self) -> Tensor:
        return self.weight

    @property
    def first_bias(self) -> Tensor:
        return self.latent_bias

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        self._check_visible(v)
        self._check_latent(h)
        return self._visible_energy(v, (torch.addmm(self.latent_bias, v, self.weight) * h).sum(1))

    def free_energy(self, v: Tensor) -> Tensor:
        return self._visible_energy(v, log_one_plus_exp(self.posterior_logits(v)).sum(1))

    def posterior_logits(self, v: Tensor) -> Tensor:
        self._check_visible(v)
        return torch.addmm(self.latent_bias, v, self.weight)

    @torch.no_grad()
    def mean_field(self, v: Tensor, sweeps: int = MEAN_FIELD_SWEEPS) -> Tensor:
        return self.posterior_logits(v).sigmoid_()

    @torch.no_grad()
    def first_probabilities(self, v: Tensor) -> Tensor:
        return self.posterior_logits(v).sigmoid_()

    def latent_gibbs(self, v: Tensor, generator: torch.Generator, steps: int = 1) -> Tensor:
        check_steps(steps)
        return self.first_layer(v, generator)

    def log_unnormalized_first(
        self, h1: Tensor, beta: float = 1.0, base: Tensor | None = None
    ) -> Tensor:
        self._check_first(h1)
        log_sum = self._log_sum_visible(h1, beta, base)
        return torch.addmv(log_sum, h1, self.latent_bias, alpha=beta)

    @torch.no_grad()
    def neighbours(self, base: Tensor | None = None) -> Neighbours:
        near = self._visible_neighbours(base)
        return near._replace(bias=near.bias + self.latent_bias)

    def _log_unnormalized_rest(self, rest: Tensor) -> Tensor:
        return -self.free_energy(rest)

    def chances(self, n: int, generator: torch.Generator, steps: int = 1) -> list[Tensor]:
        found: list[Tensor] = []
        for _ in range(steps):
            found.append(self._visible_chances(n, generator))
            found.append(uniforms(self.latent_bias, generator, n, self.latent_dims[0]))
        return found

    @torch.no_grad()
    def chain(
        self,
        h1: Tensor,
        chance: Chance,
        steps: int = 1,
        beta: float = 1.0,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_steps(steps)
        self._check_first(h1)
        visible = self._visible_draw(beta, base)
        c, weight = self.latent_bias, self.weight
        for _ in range(steps):
            v = visible(h1, chance)
            logits = torch.addmm(c, v, weight, beta=beta, alpha=beta)
            h1 = chance.coins(logits.sigmoid_())
        return v, h1


class TwoHidden(BoltzmannMachine):
    """A machine with two hidden layers: its posterior does not factorise."""

    latent_bias1: nn.Parameter
    latent_bias2: nn.Parameter
    weight1: nn.Parameter
    weight2: nn.Parameter

    @property
    def first_weight(self) -> Tensor:
        return self.weight1

    @property
    def first_bias(self) -> Tensor:
        return self.latent_bias1

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        self._check_visible(v)
        self._check_latent(h)
        h1, h2 = h.split(self.latent_dims, dim=1)
        gain = torch.addmv((self._first_logits(v, h2) * h1).sum(1), h2, self.latent_bias2)
        return self._visible_energy(v, gain)

    def free_energy(self, v: Tensor) -> Tensor:
        self._check_visible(v)
        n1, n2 = self.latent_dims
        if n1 > MAX_UNITS:
            raise ValueError(
                f"the free energy of this `{type(self).__name__}` is a sum over the {n1} units of its "
                f"first hidden layer, and at most {MAX_UNITS} can be enumerated; bound it with a "
                "variational posterior q(h|v): F(v) <= E_q[E(v, h) + log q(h|v)]"
            )
        logits = torch.addmm(self.latent_bias1, v, self.weight1)

        def log_weight(h1: Tensor) -> Tensor:
            return logits @ h1.mT + log_one_plus_exp(self._second_logits(h1)).sum(1)

        log_sum = log_sum_over_states(log_weight, n1, max(len(v), n2), logits)
        return self._visible_energy(v, log_sum)

    def posterior_logits(self, v: Tensor) -> Tensor:
        raise NotImplementedError(
            f"the posterior of a `{type(self).__name__}` does not factorise over its hidden units; use "
            "a variational posterior"
        )

    @torch.no_grad()
    def mean_field(self, v: Tensor, sweeps: int = MEAN_FIELD_SWEEPS) -> Tensor:
        self._check_visible(v)
        check_dim("sweeps", sweeps)
        from_visible = torch.addmm(self.latent_bias1, v, self.weight1)
        second = v.new_full((len(v), self.latent_dims[1]), 0.5)
        for _ in range(sweeps):
            first = torch.addmm(from_visible, second, self.weight2.mT).sigmoid_()
            second = self._second_logits(first).sigmoid_()
        return torch.cat([first, second], dim=1)

    @torch.no_grad()
    def first_probabilities(self, v: Tensor) -> Tensor:
        self._check_visible(v)
        half = v.new_full((len(v), self.latent_dims[1]), 0.5)
        return self._first_logits(v, half).sigmoid_()

    @torch.no_grad()
    def latent_gibbs(self, v: Tensor, generator: torch.Generator, steps: int = 1) -> Tensor:
        check_steps(steps)
        h1 = self.first_layer(v, generator)
        for _ in range(steps):
            h2 = coin_flips(self._second_logits(h1).sigmoid_(), generator)
            h1 = coin_flips(self._first_logits(v, h2).sigmoid_(), generator)
        return torch.cat([h1, h2], dim=1)

    def log_unnormalized_first(
        self, h1: Tensor, beta: float = 1.0, base: Tensor | None = None
    ) -> Tensor:
        self._check_first(h1)
        log_sum = self._log_sum_visible(h1, beta, base)
        log_sum = log_sum + log_one_plus_exp(self._second_logits(h1, beta)).sum(1)
        return torch.addmv(log_sum, h1, self.latent_bias1, alpha=beta)

    @torch.no_grad()
    def neighbours(self, base: Tensor | None = None) -> Neighbours:
        near = self._visible_neighbours(base)
        second = self.latent_bias2
        return near._replace(
            bias=near.bias + self.latent_bias1,
            binary_weight=torch.cat([near.binary_weight, self.weight2], dim=1),
            binary_bias=torch.cat([near.binary_bias, second]),
            binary_base=torch.cat([near.binary_base, torch.zeros_like(second)]),
        )

    def _log_unnormalized_rest(self, rest: Tensor) -> Tensor:
        v, h2 = rest.split((self.visible_dim, self.latent_dims[1]), dim=1)
        gain = log_one_plus_exp(self._first_logits(v, h2)).sum(1)
        return -self._visible_energy(v, torch.addmv(gain, h2, self.latent_bias2))

    def chances(self, n: int, generator: torch.Generator, steps: int = 1) -> list[Tensor]:
        n1, n2 = self.latent_dims
        found: list[Tensor] = []
        for _ in range(steps):
            found.append(self._visible_chances(n, generator))
            found += [uniforms(self.latent_bias1, generator, n, size) for size in (n2, n1)]
        return found

    @torch.no_grad()
    def chain(
        self,
        h1: Tensor,
        chance: Chance,
        steps: int = 1,
        beta: float = 1.0,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_steps(steps)
        self._check_first(h1)
        visible = self._visible_draw(beta, base)
        for _ in range(steps):
            v = visible(h1, chance)
            h2 = chance.coins(self._second_logits(h1, beta).sigmoid_())
            h1 = chance.coins(self._first_logits(v, h2, beta).sigmoid_())
        return v, torch.cat([h1, h2], dim=1)

    def _first_logits(self, v: Tensor, h2: Tensor, beta: float = 1.0) -> Tensor:
        """Logits of p(h1 | v, h2)."""
        from_visible = torch.addmm(self.latent_bias1, v, self.weight1, beta=beta, alpha=beta)
        return torch.addmm(from_visible, h2, self.weight2.mT, alpha=beta)

    def _second_logits(self, h1: Tensor, beta: float = 1.0) -> Tensor:
        """Logits of p(h2 | h1)."""
        return torch.addmm(self.latent_bias2, h1, self.weight2, beta=beta, alpha=beta)
