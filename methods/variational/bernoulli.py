r"""The posterior of binary latents, relaxed: $q_1(h|v) = \prod_l \prod_j \sigma(\pm a^l_j)$.

Layer l has logits $a^l$ computed from the layer below ($h^0 = v$). With logistic noise $\epsilon$ and
a temperature $\tau$ a draw is

$$ \tilde h = \sigma((a + \epsilon) / \tau), \qquad
   \log q_1 := \sum_j \tilde h_j a_j - \log(1 + e^{a_j}), $$

the Bernoulli log-probability continued to soft values. As $\tau \to 0$, $\tilde h$ becomes an exact 0/1
draw. This is AdvIL's convention and not the log-density of the relaxed variable (the concrete
distribution), for which an energy over 0/1 units has no counterpart.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from bilevel.methods.machines.enumeration import log_one_plus_exp
from bilevel.methods.networks.perceptron import xavier
from bilevel.methods.networks.units import Change, input_change
from bilevel.methods.variational.base import (
    Draws,
    ExactDraws,
    VariationalPosterior,
    equal_weights,
    logistic_noise,
)

if TYPE_CHECKING:
    from bilevel.methods.machines import BoltzmannMachine


@final
class BernoulliPosterior(VariationalPosterior):
    r"""$q_1(h|v) = \prod_l q_1(h^l|h^{l-1})$, each factor a product of Bernoullis.

    With one `nn.Linear` and one layer this family contains the exact posterior of an RBM.

    Args:
        networks: one module per layer from the visibles upward: layer below (n, ...) -> logits
            (n, width of the layer).
        latent_dims: widths of the layers, the one next to the visibles first; a latent is the layers
            side by side, shape (n, sum(latent_dims)).
        temperature: of the relaxed draws; low is nearly binary with a noisy gradient.

    Raises:
        ValueError: if there is not one width per network, or the temperature is not positive.

    Example:
        >>> posterior = BernoulliPosterior([nn.Linear(6, 3)], [3])
        >>> v, generator = torch.ones(2, 6), torch.Generator()
        >>> posterior.draws(v, posterior.noise(2, generator, v)).latent.shape
        torch.Size([2, 3])
        >>> posterior.hard(v, generator).unique()
        tensor([0., 1.])

    References:
        "To Relieve Your Headache of Training an MRF, Take AdVIL" (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400.
        Differs from the paper in: probabilities are not clipped, the logits need no clipping.
        "The Concrete Distribution" (Maddison et al., ICLR 2017), https://arxiv.org/abs/1611.00712.
        `torch.distributions.RelaxedBernoulli` is not used: its `rsample` takes no generator, and its
        `log_prob` is the relaxation's density.
    """

    binary: ClassVar[bool] = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        latent_dims: Sequence[int],
        *,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if not networks or len(networks) != len(latent_dims):
            raise ValueError(
                f"`latent_dims` must hold one width per network, got {len(networks)} networks and "
                f"latent_dims={tuple(latent_dims)}"
            )
        self.networks = nn.ModuleList(networks)
        self.latent_dims = tuple(latent_dims)
        self.temperature = positive_temperature(temperature)

    @classmethod
    def for_model(
        cls,
        model: "BoltzmannMachine",
        *,
        temperature: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Self:
        """AdvIL's encoder of a Boltzmann machine: linear logits, layer by layer.

        Args:
            model: the machine; dtype and device are those of its parameters.
            temperature: of the relaxed draws.
            generator: draws the weights (Xavier uniform; biases 0); seeded 1 by default.
        """
        generator = torch.Generator().manual_seed(1) if generator is None else generator
        widths = (model.visible_dim, *model.latent_dims)
        layers = [xavier(below, above, generator) for below, above in pairwise(widths)]
        return cls(layers, model.latent_dims, temperature=temperature).to(next(model.parameters()))

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return logistic_noise(n, sum(self.latent_dims), generator, like)

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        below, logits, layers = v, [], []
        for network, layer_noise in zip(
            self.networks, noise.split(self.latent_dims, dim=1), strict=True
        ):
            logits.append(network(below))
            below = relaxed(logits[-1], layer_noise, self.temperature)
            layers.append(below)
        h = side_by_side(layers)
        log_prob = bernoulli_log_prob(side_by_side(logits), h)
        return Draws(v, h, log_prob, equal_weights(log_prob))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        below = (v, *h.split(self.latent_dims, dim=1))
        logits = [network(x) for network, x in zip(self.networks, below, strict=False)]
        return bernoulli_log_prob(side_by_side(logits), h)

    def logits(self, v: Tensor) -> Tensor:
        """Logits of the layer next to the visibles given v, exact, shape (n, latent_dims[0])."""
        logits: Tensor = self.networks[0](v)
        return logits

    def distribution(self, v: Tensor) -> Distribution:
        """q1(.|v), a product of Bernoullis over {0, 1}.

        Raises:
            NotImplementedError: if there are several layers: units of the higher ones depend on each
                other given v.
        """
        if len(self.networks) > 1:
            raise NotImplementedError(
                f"q1(h|v) of {len(self.networks)} layers is no product of Bernoullis; draw from it with "
                "`hard(v, generator)`, or take the first layer's `logits(v)`"
            )
        return Independent(Bernoulli(logits=self.logits(v)), 1)

    def mean(self, v: Tensor) -> Tensor:
        """Probabilities of the layer next to the visibles, exact, shape (n, latent_dims[0])."""
        return self.logits(v).sigmoid()

    def exact(self, v: Tensor, noise: Tensor) -> ExactDraws:
        below, logits, layers = v[None], [], []
        for network, part in zip(self.networks, noise.split(self.latent_dims, dim=2), strict=True):
            logits.append(network(below))
            below = (logits[-1] + part > 0).to(v.dtype)
            layers.append(below)
        h, shape = torch.cat(layers, dim=2), (len(noise), len(v), -1)
        log_prob = bernoulli_log_prob(torch.cat([a.expand(shape) for a in logits], dim=2), h)
        return ExactDraws(h, log_prob, log_prob.new_full(log_prob.shape, 1 / len(noise)))

    def rewriting(self) -> Change | None:
        return input_change(self.networks[0])

    @torch.no_grad()
    def hard(self, v: Tensor, generator: torch.Generator | None) -> Tensor:
        """Exact draws from q1(h|v) in {0, 1}, without gradient, shape (n, sum(latent_dims))."""
        layers = [v]
        for network in self.networks:
            layers.append(torch.bernoulli(network(layers[-1]).sigmoid(), generator=generator))
        return side_by_side(layers[1:])


def relaxed(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Soft values in [0, 1] from logits and logistic noise."""
    return ((logits + noise) / temperature).sigmoid()


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Log-probability of units x (soft values too) under their logits, summed over units: (n,)."""
    return (logits * x - log_one_plus_exp(logits)).sum(-1)


def side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """Layers of shape (n, width) as one tensor; a single one as it is."""
    return layers[0] if len(layers) == 1 else torch.cat(list(layers), dim=1)


def positive_temperature(temperature: float) -> float:
    """The temperature.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}")
    return temperature
