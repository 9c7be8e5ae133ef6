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

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.data.sides import image_shape
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines.base import check_dim
from bilevel.methods.models.directed import Directed
from bilevel.methods.models.evaluating import Statistics
from bilevel.methods.networks.build import build
from bilevel.methods.networks.convolutional import Generator, Posterior, channels_of
from bilevel.methods.networks.perceptron import (
    FixedVariance,
    LearnedVariance,
    Moments,
    perceptron,
)
from bilevel.methods.variational import GaussianPosterior
from bilevel.methods.variational.base import reparameterised
from bilevel.problem import Loss
from bilevel.refusals import a_generator, a_module, one_of

Visible = Literal["bernoulli", "gaussian"]


@final
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
        visible_shape: shape of one visible, if known: checked before training.
        visible_range: range of Gaussian visibles, if they have one.

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

    latent_model: Directed
    training_defaults: ClassVar[dict[str, Any]] = {
        "upper_lr": 1e-3,
        "betas": (0.9, 0.999),
        "decay": 1.0,
    }

    @explained
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
        visible_shape: tuple[int, ...] | None = None,
        visible_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        one_of("visible", visible, ("bernoulli", "gaussian"))
        one_of("statistics", statistics, ("running", "batch"))
        if grey and visible == "gaussian":
            raise ValueError("`grey` is for Bernoulli visibles; Gaussian ones take any value")
        a_module("encoder", encoder)
        a_module("decoder", decoder)
        posterior = GaussianPosterior(encoder, check_dim("latent_dim", latent_dim))
        self.upper = nn.ModuleDict({"posterior": posterior, "decoder": decoder})
        self.lower = nn.ModuleDict()
        bits = visible == "bernoulli"
        limits = (0.0, 1.0) if bits else visible_range
        self.latent_model = Directed(
            Visibles(visible_shape, limits, binary=bits and not grey, bits=bits),
            encoder=posterior,
            decoder=decoder,
            bits=bits,
            noisy=noisy,
            latent_dim=latent_dim,
        )
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
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise TypeError(
                f"`hidden` holds the widths of the layers, `({hidden!r},)` for one layer"
            )
        a_generator("generator", generator)
        widths = [check_dim(f"hidden[{i}]", width) for i, width in enumerate(hidden)]
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        encoder = Moments(perceptron([visible_dim, *widths, latent_dim], 2, generator))
        decoder: nn.Module = perceptron([latent_dim, *widths[::-1], visible_dim], 1, generator)
        if visible == "gaussian":
            decoder = LearnedVariance(decoder, visible_dim)
        options: dict[str, Any] = {"visible": visible, "grey": grey}
        model = cls(encoder, decoder, latent_dim, visible_shape=(visible_dim,), **options)
        model.recipe = {
            "visible_dim": visible_dim,
            "latent_dim": latent_dim,
            "hidden": widths,
            **options,
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
        shape = image_shape(shape)
        narrow = channels_of(width, latent_dim, 3 / 4)

        def networks() -> nn.ModuleList:
            encoder = Posterior(shape, latent_dim, narrow)
            return nn.ModuleList([encoder, Generator(shape, latent_dim, narrow)])

        encoder, generator = build(networks, seed)
        model = cls(
            encoder,
            FixedVariance(generator, 0.5),
            latent_dim,
            visible="gaussian",
            noisy=False,
            statistics=statistics,
            visible_shape=shape,
            visible_range=(-1.0, 1.0),
        )
        sizes = {"shape": shape, "latent_dim": latent_dim, "width": width, "seed": seed}
        model.recipe = {**sizes, "statistics": statistics}
        return model

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        """The batch with the posterior's noise."""
        return Batch(data, self.encoder.noise(len(data), generator, data))

    def upper_loss(self, batch: Batch) -> Loss:
        """The negative evidence bound, its KL term in closed form."""
        mean, log_variance = self.latent_model.encoder.moments(batch.visible)
        h = reparameterised(mean, log_variance, batch.noise)
        reconstruction = self.latent_model.cost(batch.visible, h).mean()
        terms = mean.square() + log_variance.exp() - log_variance - 1
        kl = 0.5 * terms.sum(1).mean()
        return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}

    # ------------------------------------------------------------------ the trained model

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
        v = self.check(v)
        with self.evaluating("running"):
            return self.latent_model.log_likelihood(v, num_samples, generator)
