r"""The variational autoencoder, as an energy-based latent-variable model that is normalised.

With a latent $h \sim N(0, I)$ and a decoder $p(v|h)$ the joint energy is

$$ E(v, h) = -\log p(h) - \log p(v|h), \qquad Z = \int \sum_v e^{-E(v, h)}\, dh = 1 , $$

so only the free energy $F(v) = -\log p(v)$ is intractable, and a variational posterior bounds it:

$$ F(v) \leq L(v) = E_{q(h|v)}[E(v, h) + \log q(h|v)]
   = -E_{q(h|v)}[\log p(v|h)] + KL(q(h|v) \,\Vert\, p(h)) . $$

Decoder and posterior both descend L: two levels with one objective, hence a single level here. More
draws tighten the bound, $E[-\log \frac{1}{K} \sum_k w_k] \downarrow F(v)$ in K, with the weights
$w_k = p(v, h_k) / q(h_k|v)$, $h_k \sim q(h|v)$.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bilevel.methods.config import Training, one_of
from bilevel.methods.eblvm import EBLVM, attempt, chunked
from bilevel.methods.models.base import check_dim
from bilevel.methods.variational import GaussianPosterior
from bilevel.methods.variational.base import normal_log_prob, normal_noise
from bilevel.methods.variational.bernoulli import bernoulli_log_prob, xavier
from bilevel.optimizers import Optimizers
from bilevel.problem import Loss

Visible = Literal["bernoulli", "gaussian"]

ENERGY_SAMPLES = 100
"""Draws of the importance-weighted bound that `VAE.energy` is."""

_ROWS = 10_000  # pairs (v, h) evaluated at a time


class Batch(NamedTuple):
    """Visibles and the noise of the posterior."""

    visible: Tensor
    noise: Tensor


@final
class VAE(EBLVM):
    r"""The variational autoencoder, $E(v, h) = -\log p(h) - \log p(v|h)$ with $Z = 1$.

    Args:
        encoder: module v -> (mean, log-variance), each (n, latent_dim): a diagonal Gaussian q(h|v).
        decoder: module h -> logits of v for Bernoulli visibles, (mean, log-variance) for Gaussian
            ones, each (n, *visible_shape) or broadcast to that.
        latent_dim: width of h.
        visible: p(v|h).
        grey: take data anywhere in [0, 1] for Bernoulli visibles (grey values stand for probabilities
            of a 1). The model's distribution stays one on {0, 1}.

    Raises:
        TypeError: if `latent_dim` is not an integer.
        ValueError: if it is not positive, for an unknown `visible`, or for `grey` Gaussian visibles.

    Example:
        >>> model = VAE.for_table(6, 2)
        >>> history = model.fit(torch.bernoulli(torch.full((200, 6), 0.3)), num_steps=2)
        >>> model.sample(3).shape, model.log_likelihood(torch.ones(4, 6), num_samples=50).shape
        (torch.Size([3, 6]), torch.Size([4]))

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014), https://arxiv.org/abs/1312.6114
        Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016),
        https://arxiv.org/abs/1509.00519: the bound of `energy` and `log_likelihood`.
        Differs from the paper in: the Gaussian decoder of `for_table` has a learned variance per
        visible that does not depend on h. One that does has an unbounded likelihood.
    """

    training_defaults: ClassVar[dict[str, Any]] = {
        "upper_lr": 1e-3,
        "betas": (0.9, 0.999),
        "decay": 1.0,
    }

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        visible: Visible = "bernoulli",
        grey: bool = False,
    ) -> None:
        super().__init__()
        one_of("visible", visible, ("bernoulli", "gaussian"))
        if grey and visible == "gaussian":
            raise ValueError("`grey` is for Bernoulli visibles; Gaussian ones take any value")
        posterior = GaussianPosterior(encoder, check_dim("latent_dim", latent_dim))
        self.upper = nn.ModuleDict({"posterior": posterior, "decoder": decoder})
        self.lower = nn.ModuleDict()
        self.visible = visible
        self.visible_range = (0.0, 1.0) if visible == "bernoulli" else None
        self.binary = visible == "bernoulli" and not grey

    @classmethod
    def for_table(
        cls,
        visible_dim: int,
        latent_dim: int,
        *,
        hidden: Sequence[int] = (200, 200),
        visible: Visible = "bernoulli",
        grey: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A VAE of perceptrons, for rows of numbers.

        Args:
            visible_dim: width of v.
            latent_dim: width of h.
            hidden: widths of the encoder's hidden layers (ReLU) from v to h; the decoder's are the same
                in reverse.
            visible: p(v|h); a Gaussian's log-variances are parameters, one per visible.
            grey: take data anywhere in [0, 1] for Bernoulli visibles.
            generator: draws the weights (Xavier uniform; biases 0); seeded 0 by default.

        Raises:
            TypeError: if a width is not an integer.
            ValueError: if one is not positive, and as the constructor.
        """
        check_dim("visible_dim", visible_dim)
        check_dim("latent_dim", latent_dim)
        widths = [check_dim(f"hidden[{i}]", width) for i, width in enumerate(hidden)]
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        encoder = _Moments(_perceptron([visible_dim, *widths, latent_dim], 2, generator))
        decoder: nn.Module = _perceptron([latent_dim, *widths[::-1], visible_dim], 1, generator)
        if visible == "gaussian":
            decoder = _WithVariance(decoder, visible_dim)
        model = cls(encoder, decoder, latent_dim, visible=visible, grey=grey)
        model.visible_shape = (visible_dim,)
        model.recipe = {
            "visible_dim": visible_dim,
            "latent_dim": latent_dim,
            "hidden": widths,
            "visible": visible,
            "grey": grey,
        }
        return model

    @property
    def _posterior(self) -> GaussianPosterior:
        return cast(GaussianPosterior, self.upper.get_submodule("posterior"))

    # ------------------------------------------------------------------ the model

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) with all its constants, differentiable, shape (n,)."""
        return self._cost(v, h) - normal_log_prob(h).sum(1)

    def _cost(self, v: Tensor, h: Tensor) -> Tensor:
        """-log p(v|h), shape (n,)."""
        output = self.upper.get_submodule("decoder")(h)
        if self.visible == "bernoulli":
            return -bernoulli_log_prob(output.flatten(1), v.flatten(1))
        mean, log_variance = output
        z = (v - mean) * (-log_variance / 2).exp()
        cost: Tensor = (log_variance / 2 - normal_log_prob(z)).flatten(1).sum(1)
        return cost

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        """The batch with the posterior's noise."""
        return Batch(data, self._posterior.noise(len(data), generator, data))

    def upper_loss(self, batch: Batch) -> Loss:
        """The negative evidence bound, its KL term in closed form."""
        mean, log_variance = self._posterior.moments(batch.visible)
        h = mean + (log_variance / 2).exp() * batch.noise
        reconstruction = self._cost(batch.visible, h).mean()
        terms = mean.square() + log_variance.exp() - log_variance - 1
        kl = 0.5 * terms.sum(1).mean()
        return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}

    def lower_loss(self, batch: Any) -> Loss:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("`VAE` has a single level")

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        parameters = self.upper.parameters()
        return torch.optim.Adam(parameters, lr=training.upper_lr, betas=training.betas), []

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The importance-weighted bound on the free energy from `ENERGY_SAMPLES` draws.

        The noise is the same for every row and in every call: a function of v.
        """
        v = self.check(v)
        generator = torch.Generator(v.device).manual_seed(0)
        noise = normal_noise(ENERGY_SAMPLES, self._posterior.latent_dim, generator, v)

        def bound(rows: Tensor) -> Tensor:
            parts = iter(noise.split(max(1, _ROWS // len(rows))))
            return self._log_mean_weight(
                rows, ENERGY_SAMPLES, lambda count: next(parts)[:, None].expand(-1, len(rows), -1)
            )

        with self.evaluating():
            return -chunked(bound, v)

    def log_likelihood(
        self, v: Tensor, num_samples: int = 1000, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(v), shape (n,), from `num_samples` draws.

        On average over the draws it is below log p(v), and rises to it with their number.

        Args:
            v: visibles.
            num_samples: draws from the posterior per row.
            generator: draws the noise, on the model's device.

        Raises:
            TypeError: if `num_samples` is not an integer.
            ValueError: if it is not positive.
        """
        check_dim("num_samples", num_samples)
        width = self._posterior.latent_dim

        def bound(rows: Tensor) -> Tensor:
            def noise(count: int) -> Tensor:
                size = (count, len(rows), width)
                return torch.randn(size, generator=generator, dtype=rows.dtype, device=rows.device)

            return self._log_mean_weight(rows, num_samples, noise)

        with self.evaluating():
            return chunked(bound, self.check(v))

    def _log_mean_weight(
        self, v: Tensor, num_samples: int, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Log of the mean of w_k, shape (n,); `noise(count)` has shape (count, n, latent_dim)."""
        total = v.new_full((len(v),), -math.inf)
        for start in range(0, num_samples, size := max(1, _ROWS // len(v))):
            count = min(size, num_samples - start)
            rows = v.expand(count, *v.shape).flatten(0, 1)
            draws = self._posterior.draws(rows, noise(count).flatten(0, 1))
            log_weight = -self.joint_energy(draws.visible, draws.latent) - draws.log_prob
            total = torch.logaddexp(total, log_weight.view(count, len(v)).logsumexp(0))
        return total - math.log(num_samples)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N draws of v from p(v|h), h from p(h)."""
        like = next(self.parameters())
        size = (n, self._posterior.latent_dim)
        h = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        with self.evaluating():
            output = self.upper.get_submodule("decoder")(h)
            if self.visible == "bernoulli":
                return torch.bernoulli(output.sigmoid(), generator=generator)
            mean, log_variance = output
            noise = torch.empty_like(mean).normal_(generator=generator)
            return cast(Tensor, mean + (log_variance / 2).exp() * noise)

    def posterior(self, v: Tensor) -> Distribution:
        """q(h|v)."""
        with self.evaluating():
            return self._posterior.distribution(self.check(v))

    def reconstruct(self, v: Tensor) -> Tensor:
        """The mean of p(v|h) at the posterior mean of h."""
        mean = self.posterior(v).mean
        with self.evaluating():
            output = self.upper.get_submodule("decoder")(mean)
            return cast(Tensor, output.sigmoid() if self.visible == "bernoulli" else output[0])

    def probe(self, v: Tensor) -> None:
        width = self._posterior.latent_dim
        with self.evaluating():
            moments = attempt("encoder", self._posterior.network, v)
            shapes = [tuple(part.shape) for part in moments]
            if shapes != [(len(v), width)] * 2:
                raise ValueError(
                    "the encoder must give mean and log-variance of the latent, each of shape "
                    f"(n, {width}); got {shapes} for {len(v)} visibles"
                )
            output = attempt("decoder", self.upper.get_submodule("decoder"), moments[0])
            mean = output if self.visible == "bernoulli" else output[0]
            if mean.shape != v.shape:
                raise ValueError(
                    f"the decoder must give visibles of shape {tuple(v.shape)}, got "
                    f"{tuple(mean.shape)}"
                )

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        return cls.for_table(**recipe)


@final
class _Moments(nn.Module):
    """A network's output as mean and log-variance, side by side in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.network(v).chunk(2, dim=1)
        return mean, log_variance


@final
class _WithVariance(nn.Module):
    """A network for the mean, and a log-variance per output."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network = network
        self.log_variance = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(h), self.log_variance


def _perceptron(widths: Sequence[int], heads: int, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them; the last has `heads` outputs of its width."""
    layers: list[nn.Module] = []
    for number, (below, above) in enumerate(pairwise(widths), start=2):
        if number < len(widths):
            layers += [xavier(below, above, generator), nn.ReLU()]
        else:
            layers.append(xavier(below, above, generator, heads=heads))
    return nn.Sequential(*layers)
