r"""AdvIL's sampler: a joint of visibles and binary latents with a latent of its own, z.

For layers $h = (h^1, \dots, h^L)$, $h^1$ next to the visibles, top-down:

$$ q(z, h, v) = q(z)\, q(h^L|z)\, q(h^{L-1}|h^L) \cdots q(h^1|h^2)\, q(v|h^1) . $$

Its marginal $q(v, h)$ is an infinite (or $2^{\dim z}$-fold) mixture without a usable density, so an
auxiliary $r(z|h^L)$ stands in for $q(z|h) = q(z|h^L)$. Both identities

$$ H(q(v, h)) = E_q[\log r(z|h) - \log q(z, h, v)] + E_q\, KL(q(z|h) \,\|\, r(z|h)), $$
$$ \log q(v, h) = E_{z \sim r(z|h)}[\log q(z, h, v) - \log r(z|h)] + KL(r(z|h) \,\|\, q(z|h)) $$

give lower bounds, tight iff $r(z|h) = q(z|h)$. The first trains the sampler (`draws`), the second
prices a given pair (`bound`).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from bilevel.methods.machines.enumeration import log_one_plus_exp, log_sum_over_states
from bilevel.methods.networks.perceptron import xavier
from bilevel.methods.networks.units import Change, output_change
from bilevel.methods.variational.base import (
    Draws,
    VariationalJoint,
    equal_weights,
    logistic_noise,
    normal_log_prob,
    normal_noise,
    reparameterised,
)
from bilevel.methods.variational.bernoulli import (
    bernoulli_log_prob,
    positive_temperature,
    relaxed,
    side_by_side,
)
from bilevel.refusals import one_of

if TYPE_CHECKING:
    from bilevel.methods.machines import BoltzmannMachine

MAX_BITS = 15
"""Bits of z that `HierarchicalJoint.log_prob` still enumerates."""

Family = Literal["gaussian", "bernoulli"]


@final
class Ancestral(NamedTuple):
    """Exact draws from q(z) q(h|z) q(v|h), top-down.

    Attributes:
        visible: v, shape (n, visible_dim).
        latent: h in {0, 1}, shape (n, sum(latent_dims)).
        code: z, shape (n, latent_dim).
    """

    visible: Tensor
    latent: Tensor
    code: Tensor


@final
class HierarchicalJoint(VariationalJoint):
    r"""$q(v, h) = \int q(z)\, q(h|z)\, q(v|h)\, dz$ with an auxiliary $r(z|h)$.

    h is binary and relaxed in `draws` as in `BernoulliPosterior`. A Bernoulli z has fixed
    probabilities 1/2, so `draws` needs no relaxation of it; `bound`, where z comes from r, does.

    Args:
        networks: L + 1 modules, top-down: z -> logits of h^L, h^L -> logits of h^(L-1), ..., and last
            h^1 -> v: logits (n, visible_dim), or mean and log-variance side by side
            (n, 2 visible_dim) for Gaussian visibles.
        auxiliary: module h^L -> parameters of r(z|h): mean and log-variance side by side
            (n, 2 latent_dim) for a Gaussian prior, logits (n, latent_dim) for a Bernoulli one.
        visible_dim: width of v.
        latent_dims: widths of h's layers, the one next to the visibles first (L of them).
        latent_dim: width of z.
        prior: q(z): "gaussian" for N(0, I), "bernoulli" for fair coins.
        visible: q(v|h).
        temperature: of the relaxed draws.

    Raises:
        ValueError: if there is not one network per layer and one for the visibles, for an unknown
            family, or a temperature that is not positive.

    References:
        "To Relieve Your Headache of Training an MRF, Take AdVIL" (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400.
        Differs from the paper in:
        - probabilities are not clipped, the logits need no clipping;
        - in `for_model` the gain 4 is that of r's hidden layer alone. On r's output it makes the log-
          variances so wide that the entropy bound starts hundreds of nats below the entropy;
        - `bound` is ours: the paper never evaluates log q at pairs it did not draw.
    """

    binary: ClassVar[bool] = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        auxiliary: nn.Module,
        *,
        visible_dim: int,
        latent_dims: Sequence[int],
        latent_dim: int,
        prior: Family = "gaussian",
        visible: Family = "bernoulli",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        one_of("prior", prior, ("gaussian", "bernoulli"))
        one_of("visible", visible, ("gaussian", "bernoulli"))
        if not latent_dims or len(networks) != len(latent_dims) + 1:
            raise ValueError(
                "`networks` must hold one module per hidden layer and one for the visibles, got "
                f"{len(networks)} networks for latent_dims={tuple(latent_dims)}"
            )
        self.networks = nn.ModuleList(networks)
        self.auxiliary = auxiliary
        self.visible_dim = visible_dim
        self.latent_dims = tuple(latent_dims)
        self.latent_dim = latent_dim
        self.prior = prior
        self.visible = visible
        self.temperature = positive_temperature(temperature)

    @classmethod
    def for_model(
        cls,
        model: "BoltzmannMachine",
        *,
        prior: Family = "gaussian",
        latent_dim: int | None = None,
        hidden: int | None = None,
        temperature: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Self:
        """AdvIL's sampler of a Boltzmann machine.

        q(h^L|z) has one hidden layer (ReLU; sigmoid for two layers of h), the others are linear, r(z|h)
        has one hidden layer of sigmoids. Weights are Xavier uniform, with gain 4 for r's hidden layer;
        biases 0.

        Args:
            model: the machine; dtype and device are those of its parameters.
            prior: q(z).
            latent_dim: width of z. By default max(15, n/4) for n units in the top layer, and 10 for a
                Bernoulli prior: the widths of all published runs.
            hidden: width of both hidden layers, 0 for none in q(h^L|z). By default max(15, n/2), the
                width of all published runs but OCR-letters (50); none in q(h^L|z) for a `GaussianRBM`,
                as published for Frey faces.
            temperature: of the relaxed draws.
            generator: draws the weights; seeded 2 by default.
        """
        generator = torch.Generator().manual_seed(2) if generator is None else generator
        visible: Family = "gaussian" if model.visible_range is None else "bernoulli"
        first, top = model.latent_dims[0], model.latent_dims[-1]
        deep = len(model.latent_dims) > 1
        width = max(15, top // 2)
        if hidden is None:
            hidden = width if deep or visible == "bernoulli" else 0
        if latent_dim is None:
            latent_dim = max(15, top // 4) if prior == "gaussian" else 10
        activation = nn.Sigmoid() if deep else nn.ReLU()
        networks: list[nn.Module] = [_perceptron(latent_dim, hidden, top, activation, generator)]
        downward = model.latent_dims[::-1]
        networks += [xavier(a, b, generator) for a, b in pairwise(downward)]
        networks.append(xavier(first, model.visible_dim, generator, heads=_heads(visible)))
        auxiliary = _perceptron(
            top, hidden or width, latent_dim, nn.Sigmoid(), generator, gain=4.0, heads=_heads(prior)
        )
        return cls(
            networks,
            auxiliary,
            visible_dim=model.visible_dim,
            latent_dims=model.latent_dims,
            latent_dim=latent_dim,
            prior=prior,
            visible=visible,
            temperature=temperature,
        ).to(next(model.parameters()))

    # ------------------------------------------------------------------ draws

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise of v, h^1, ..., h^L and z side by side, normal or logistic."""
        parts = (
            _family_noise(self.visible)(n, self.visible_dim, generator, like),
            logistic_noise(n, sum(self.latent_dims), generator, like),
            self.code_noise(n, generator, like),
        )
        return torch.cat(parts, dim=1)

    def code_noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The noise that `bound` turns into n draws from r(z|h), shape (n, latent_dim)."""
        return _family_noise(self.prior)(n, self.latent_dim, generator, like)

    def draws(self, noise: Tensor) -> Draws:
        """Relaxed draws; `log_prob` is log q(z, h, v) - log r(z|h).

        So minus its mean estimates the lower bound on the entropy of q(v, h).
        """
        widths = (self.visible_dim, *self.latent_dims, self.latent_dim)
        v_noise, *h_noise, z = noise.split(widths, dim=1)
        if self.prior == "bernoulli":
            z = (z > 0).to(z.dtype)
        outputs, layers = [], [z]
        for network, layer_noise in zip(self.networks, reversed(h_noise), strict=False):
            outputs.append(network(layers[-1]))
            layers.append(relaxed(outputs[-1], layer_noise, self.temperature))
        outputs.append(self.networks[-1](layers[-1]))
        h = side_by_side(layers[:0:-1])
        v = self._visibles(outputs[-1], v_noise)
        log_prob = self._log_conditionals(v, h, outputs[::-1]) + self._log_ratio(z, layers[1])
        return Draws(v, h, log_prob, equal_weights(log_prob))

    @torch.no_grad()
    def hard(self, n: int, generator: torch.Generator | None) -> Ancestral:
        """Exact draws from q(z) q(h|z) q(v|h), h in {0, 1}, without gradient."""
        like = next(self.parameters())
        size = (n, self.latent_dim)
        if self.prior == "gaussian":
            z = normal_noise(*size, generator, like)
        else:
            z = torch.bernoulli(like.new_full(size, 0.5), generator=generator)
        layers = [z]
        for network in list(self.networks)[:-1]:
            layers.append(torch.bernoulli(network(layers[-1]).sigmoid(), generator=generator))
        output = self.networks[-1](layers[-1])
        if self.visible == "bernoulli":
            v = torch.bernoulli(output.sigmoid(), generator=generator)
        else:
            mean, log_variance = output.chunk(2, dim=1)
            noise = torch.empty_like(mean).normal_(generator=generator)
            v = reparameterised(mean, log_variance, noise)
        return Ancestral(v, side_by_side(layers[:0:-1]), z)

    def exact_draws(self, n: int, generator: torch.Generator) -> Draws:
        v, h, z = self.hard(n, generator)
        log_prob = self.log_weight(v, h, z)
        return Draws(v, h, log_prob, equal_weights(log_prob))

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.hard(n, generator).visible

    def rewriting(self) -> Change | None:
        if self.visible == "bernoulli":
            return None
        return output_change(self.networks[-1], moments=True)

    def visible_mean(self, h: Tensor) -> Tensor:
        """The mean of q(v|h), shape (n, visible_dim)."""
        output: Tensor = self.networks[-1](h[:, : self.latent_dims[0]])
        return output.sigmoid() if self.visible == "bernoulli" else output.chunk(2, dim=1)[0]

    # ------------------------------------------------------------------ probabilities

    def log_weight(self, v: Tensor, h: Tensor, z: Tensor) -> Tensor:
        """Log q(z, h, v) - log r(z|h), shape (n,).

        Its mean over hard draws is minus the entropy bound; exp of it, averaged over z ~ r(z|h), is an
        unbiased estimate of q(v, h).
        """
        layers = (*h.split(self.latent_dims, dim=1), z)
        outputs = [net(x) for net, x in zip(reversed(self.networks), layers, strict=True)]
        return self._log_conditionals(v, h, outputs) + self._log_ratio(z, layers[-2])

    def bound(self, v: Tensor, h: Tensor, noise: Tensor) -> Tensor:
        """A lower bound on log q(v, h) on average over the noise, at one draw from r(z|h), shape (n,).

        Differentiable in all parameters, r's by reparameterisation. With a Bernoulli prior the draw is
        relaxed, and it is a bound in the limit of low temperature.

        Args:
            v: visibles, shape (n, visible_dim).
            h: latents, shape (n, sum(latent_dims)).
            noise: from `code_noise`, shape (n, latent_dim).
        """
        parameters = self.auxiliary(h[:, -self.latent_dims[-1] :])
        if self.prior == "gaussian":
            mean, log_variance = parameters.chunk(2, dim=1)
            z = reparameterised(mean, log_variance, noise)
        else:
            z = relaxed(parameters, noise, self.temperature)
        return self.log_weight(v, h, z)

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        """Log q(v, h), shape (n,), exact: a sum over all z.

        Raises:
            NotImplementedError: if z is Gaussian or has more than 15 bits.
        """
        if self.prior == "gaussian" or self.latent_dim > MAX_BITS:
            raise NotImplementedError(
                f"log q(v, h) is a sum over z that can be enumerated for a Bernoulli prior of at most "
                f"{MAX_BITS} bits only, not for prior={self.prior!r}, latent_dim={self.latent_dim}; use "
                "`bound(v, h, noise)`, a lower bound, or `draws`, whose `log_prob` bounds the entropy"
            )
        layers: tuple[Tensor, ...] = h.split(self.latent_dims, dim=1)
        outputs = [net(x) for net, x in zip(reversed(self.networks), layers, strict=False)]
        log_rest = self._log_conditionals(v, h[:, : sum(self.latent_dims[:-1])], outputs)
        top = layers[-1]

        def log_top(z: Tensor) -> Tensor:
            logits: Tensor = self.networks[0](z)
            return top @ logits.mT - log_one_plus_exp(logits).sum(1)

        width = max(len(v), self.latent_dims[-1])
        log_sum = log_sum_over_states(log_top, self.latent_dim, width, top)
        return log_rest + log_sum - self.latent_dim * math.log(2)

    def _visibles(self, output: Tensor, noise: Tensor) -> Tensor:
        if self.visible == "bernoulli":
            return relaxed(output, noise, self.temperature)
        mean, log_variance = output.chunk(2, dim=1)
        return reparameterised(mean, log_variance, noise)

    def _log_conditionals(self, v: Tensor, h: Tensor, outputs: list[Tensor]) -> Tensor:
        """Log-probability of v and the layers in h given the networks' outputs for them, bottom-up."""
        if self.visible == "bernoulli":
            return bernoulli_log_prob(side_by_side(outputs), torch.cat((v, h), dim=1))
        mean, log_variance = outputs[0].chunk(2, dim=1)
        z = (v - mean) * (-log_variance / 2).exp()
        log_visible = (normal_log_prob(z) - 0.5 * log_variance).sum(1)
        if len(outputs) == 1:
            return log_visible
        return log_visible + bernoulli_log_prob(side_by_side(outputs[1:]), h)

    def _log_ratio(self, z: Tensor, top: Tensor) -> Tensor:
        """Log q(z) - log r(z|h^L)."""
        parameters: Tensor = self.auxiliary(top)
        if self.prior == "bernoulli":
            return -bernoulli_log_prob(parameters, z) - self.latent_dim * math.log(2)
        mean, log_variance = parameters.chunk(2, dim=1)
        squares = (z - mean).square() * (-log_variance).exp() - z.square()
        return 0.5 * (squares + log_variance).sum(1)


def _family_noise(family: Family) -> Callable[[int, int, torch.Generator, Tensor], Tensor]:
    return normal_noise if family == "gaussian" else logistic_noise


def _heads(family: Family) -> int:
    return 2 if family == "gaussian" else 1


def _perceptron(
    below: int,
    hidden: int,
    above: int,
    activation: nn.Module,
    generator: torch.Generator,
    *,
    gain: float = 1.0,
    heads: int = 1,
) -> nn.Module:
    """One hidden layer with weights of the given gain, or none if `hidden` is 0."""
    if hidden == 0:
        return xavier(below, above, generator, heads=heads)
    return nn.Sequential(
        xavier(below, hidden, generator, gain=gain),
        activation,
        xavier(hidden, above, generator, heads=heads),
    )
