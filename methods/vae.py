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
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from bilevel.methods.data.visibles import latents
from bilevel.methods.eblvm import EBLVM, Statistics, attempt, chunked
from bilevel.methods.machines.base import check_dim
from bilevel.methods.networks.convolutional import Generator, Posterior, channels_of
from bilevel.methods.networks.perceptron import FixedVariance, LearnedVariance, Moments, perceptron
from bilevel.methods.training.settings import one_of
from bilevel.methods.variational import GaussianPosterior
from bilevel.methods.variational.base import normal_log_prob, normal_noise
from bilevel.methods.variational.bernoulli import bernoulli_log_prob
from bilevel.problem import Loss

Visible = Literal["bernoulli", "gaussian"]

ENERGY_SAMPLES, IMAGE_ENERGY_SAMPLES = 100, 10
"""Draws of the importance-weighted bound that `VAE.energy` is, of rows and of images."""

_ROWS, _IMAGES = 10_000, 500  # pairs (v, h) evaluated at a time


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
        noisy: whether samples are draws from p(v|h), or its means, as is usual for images.
        statistics: batch-norm statistics of samples and reconstructions. Energies and likelihoods
            always use running ones.

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
        Bi-level Doubly Variational Learning for Energy-based Latent Variable Models (Kan et al., CVPR
        2022), https://arxiv.org/abs/2203.14702: the networks of `for_images`, and the baseline there.
        Differs from the paper in: a Gaussian decoder's variance is learned per visible (`for_table`) or
        fixed (`for_images`) and does not depend on h. One that does has an unbounded likelihood.
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
        noisy: bool = True,
        statistics: Statistics = "running",
    ) -> None:
        super().__init__()
        one_of("visible", visible, ("bernoulli", "gaussian"))
        one_of("statistics", statistics, ("running", "batch"))
        if grey and visible == "gaussian":
            raise ValueError("`grey` is for Bernoulli visibles; Gaussian ones take any value")
        posterior = GaussianPosterior(encoder, check_dim("latent_dim", latent_dim))
        self.upper = nn.ModuleDict({"posterior": posterior, "decoder": decoder})
        self.lower = nn.ModuleDict()
        self.visible = visible
        self.visible_range = (0.0, 1.0) if visible == "bernoulli" else None
        self.binary = visible == "bernoulli" and not grey
        self.noisy = noisy
        self.statistics = statistics

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
        encoder = Moments(perceptron([visible_dim, *widths, latent_dim], 2, generator))
        decoder: nn.Module = perceptron([latent_dim, *widths[::-1], visible_dim], 1, generator)
        if visible == "gaussian":
            decoder = LearnedVariance(decoder, visible_dim)
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

    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        *,
        latent_dim: int = 100,
        width: float = 64,
        seed: int = 0,
        statistics: Statistics = "running",
    ) -> Self:
        r"""A VAE of BiDVL's posterior and generator, for square images in [-1, 1].

        $p(v|h) = N(v; G(h), \frac12 I)$: squared error with weight one, as in BiDVL's lower loss.
        Samples are the means G(h).

        Args:
            shape: (channels, side, side).
            latent_dim: dimension of the latent; 100 in the BiDVL paper.
            width: as in `BiDVL.for_images`, whose two networks of the same width these are.
            seed: seed of the initial weights; torch's global generator is left as it was.
            statistics: batch-norm statistics of samples and reconstructions.

        Raises:
            ValueError: if the shape cannot be halved down to 4-8 pixels, and as the constructor.
        """
        narrow = channels_of(width, latent_dim, 3 / 4)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = Posterior(shape, latent_dim, narrow)
            decoder = FixedVariance(Generator(shape, latent_dim, narrow), 0.5)
        model = cls(
            encoder, decoder, latent_dim, visible="gaussian", noisy=False, statistics=statistics
        )
        cast(Any, model).to(memory_format=torch.channels_last)  # the faster layout for convolutions
        model.visible_shape, model.visible_range = shape, (-1.0, 1.0)
        sizes = {"shape": shape, "latent_dim": latent_dim, "width": width, "seed": seed}
        model.recipe = {**sizes, "statistics": statistics}
        return model

    def network(self, name: Literal["encoder", "decoder"]) -> nn.Module:
        """One of the two networks."""
        return self._posterior.network if name == "encoder" else self.upper.get_submodule("decoder")

    @property
    def latent_dim(self) -> int:
        """Dimension of the latent."""
        return self._posterior.latent_dim

    @property
    def _posterior(self) -> GaussianPosterior:
        return cast(GaussianPosterior, self.upper.get_submodule("posterior"))

    # ------------------------------------------------------------------ the model

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) with all its constants, differentiable, shape (n,)."""
        return self._cost(v, h) - normal_log_prob(h).sum(1)

    def _cost(self, v: Tensor, h: Tensor) -> Tensor:
        """-log p(v|h), shape (n,)."""
        output = self.network("decoder")(h)
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

    # ------------------------------------------------------------------ the trained model

    def energy(self, v: Tensor) -> Tensor:
        """The importance-weighted bound on the free energy from `ENERGY_SAMPLES` draws.

        Of images it takes `IMAGE_ENERGY_SAMPLES`. The noise is the same for every row and in every
        call: a function of v.
        """
        v = self.check(v)
        generator = torch.Generator(v.device).manual_seed(0)
        draws = ENERGY_SAMPLES if v.ndim == 2 else IMAGE_ENERGY_SAMPLES
        noise = normal_noise(draws, self.latent_dim, generator, v)

        def bound(rows: Tensor) -> Tensor:
            left = noise

            def following(count: int) -> Tensor:
                nonlocal left
                now, left = left[:count], left[count:]
                return now[:, None].expand(-1, len(rows), -1)

            return self._log_mean_weight(rows, draws, following)

        with self.evaluating("running"):
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

        def bound(rows: Tensor) -> Tensor:
            def noise(count: int) -> Tensor:
                size = (count, len(rows), self.latent_dim)
                return torch.randn(size, generator=generator, dtype=rows.dtype, device=rows.device)

            return self._log_mean_weight(rows, num_samples, noise)

        with self.evaluating("running"):
            return chunked(bound, self.check(v))

    def _log_mean_weight(
        self, v: Tensor, num_samples: int, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Log of the mean of w_k, shape (n,); `noise(count)` has shape (count, n, latent_dim)."""
        mean, log_variance = self._posterior.moments(v)
        total = v.new_full((len(v),), -math.inf)
        size = max(1, (_ROWS if v.ndim == 2 else _IMAGES) // len(v))
        for start in range(0, num_samples, size):
            count = min(size, num_samples - start)
            z = noise(count)
            h = mean + (log_variance / 2).exp() * z
            log_posterior = normal_log_prob(z).sum(2) - 0.5 * log_variance.sum(1)
            rows = v.expand(count, *v.shape).flatten(0, 1)
            energy = self.joint_energy(rows, h.flatten(0, 1)).view(count, len(v))
            total = torch.logaddexp(total, (-energy - log_posterior).logsumexp(0))
        return total - math.log(num_samples)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N visibles of p(v|h), h from p(h): draws if `noisy`, means if not."""
        like = next(self.parameters())
        size = (n, self.latent_dim)
        h = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)

        def visibles(h: Tensor) -> Tensor:
            if not self.noisy:
                return self._mean(h)
            output = self.network("decoder")(h)
            if self.visible == "bernoulli":
                return torch.bernoulli(output.sigmoid(), generator=generator)
            mean, log_variance = output
            noise = torch.empty_like(mean).normal_(generator=generator)
            return cast(Tensor, mean + (log_variance / 2).exp() * noise)

        with self.evaluating():
            return chunked(visibles, h)

    def decode(self, h: Tensor) -> Tensor:
        """The means of p(v|h) at given latents, shape (n, latent_dim).

        Raises:
            ValueError: if they have the wrong width, or are not finite.
        """
        with self.evaluating():
            return chunked(self._mean, latents(h, self.latent_dim, next(self.parameters())))

    def posterior(self, v: Tensor) -> Distribution:
        """q(h|v)."""
        with self.evaluating():
            both = chunked(
                lambda part: torch.stack(self._posterior.moments(part), 1), self.check(v)
            )
        mean, log_variance = both.unbind(1)
        return Independent(Normal(mean, (log_variance / 2).exp()), 1)

    def reconstruct(self, v: Tensor) -> Tensor:
        """The mean of p(v|h) at the posterior mean of h."""
        with self.evaluating():
            return chunked(lambda part: self._mean(self._posterior.moments(part)[0]), self.check(v))

    def _mean(self, h: Tensor) -> Tensor:
        """The mean of p(v|h)."""
        output = self.network("decoder")(h)
        return cast(Tensor, output.sigmoid() if self.visible == "bernoulli" else output[0])

    def probe(self, v: Tensor) -> None:
        width = self.latent_dim
        with self.evaluating():
            moments = attempt("encoder", self._posterior.network, v)
            shapes = [tuple(part.shape) for part in moments]
            if shapes != [(len(v), width)] * 2:
                raise ValueError(
                    "the encoder must give mean and log-variance of the latent, each of shape "
                    f"(n, {width}); got {shapes} for {len(v)} visibles"
                )
            output = attempt("decoder", self.network("decoder"), moments[0])
            mean = output if self.visible == "bernoulli" else output[0]
            if mean.shape != v.shape:
                raise ValueError(
                    f"the decoder must give visibles of shape {tuple(v.shape)}, got "
                    f"{tuple(mean.shape)}"
                )

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        if "shape" in recipe:
            return cls.for_images(**{**recipe, "shape": tuple(recipe["shape"])})
        return cls.for_table(**recipe)
