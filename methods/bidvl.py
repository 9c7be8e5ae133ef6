r"""BiDVL: bi-level doubly variational learning of a decoupled EBLVM, in its compact form.

The model is $p(v, h) = p_\psi(v)\, q_1(h|v)$ with $p_\psi(v) \propto e^{-E(v)}$: the posterior *is*
$q_1$. With the data density $q(v)$, a variational joint $p_2(v, h) = p(h)\,p_2(v|h)$ and
$\omega$ the parameters of $q_1$ and $p_2$, the paper's levels are

$$ \text{upper (10):}\quad \min_\psi\; KL(q\,q_1 \,\|\, p_\psi q_1) - KL(p_2 \,\|\, p_\psi q_1), \qquad
   \text{lower (9):}\quad \min_\omega\; KL(p_\psi q_1 \,\|\, p_2) + KL(p_2 \,\|\, p_\psi q_1). $$

As losses, with $\hat v = G(\hat h)$, $\hat h \sim p(h) = N(0, I)$, $h \sim q_1(h|v)$ and the importance
ratio $r(v) = p_\psi(v) / q(v)$:

| term | here | equation |
| --- | --- | --- |
| upper | $E_q[E(v)] - E_{p_2}[E(\hat v)]$ | (14) |
| lower, energy | $E_{p_2}[E(\hat v)]$ | (11), second term |
| lower, latent | $KL(p_2 \| q_1)$: $\hat h$ recovered from $\hat v$ | (11), third term |
| lower, VAE | $E_q\, r(v)\,[\lVert G(h)-v\rVert^2 + KL(q_1(h|v) \| p(h))]$ | (11), first term |

What becomes of the two latent terms in $\omega_1$ (one in each level, of opposite sign) is the variant:
`offset` keeps neither (13, 14), `complete` keeps both, `without` has no latent term at all.
"""

from typing import Any, Literal, NamedTuple, Self, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bilevel.arguments import explained
from bilevel.methods.data.sides import image_shape
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.models.decoupled import Decoupled
from bilevel.methods.models.evaluating import Statistics
from bilevel.methods.networks.build import build
from bilevel.methods.networks.convolutional import channels_of, conv_networks
from bilevel.methods.networks.residual import residual_networks
from bilevel.methods.training.optimizers import adam, trainable
from bilevel.methods.training.settings import Training
from bilevel.methods.variational.base import gaussian_kl, normal_noise, reparameterised
from bilevel.optimizers import Optimizers
from bilevel.problem import Loss
from bilevel.refusals import a_module, flag, one_of, positive, whole
from bilevel.sync_batch_norm import BatchNorm

Variant = Literal["offset", "complete", "without"]
RatioBias = Literal["none", "sigmoid"]
UpperLoss = Literal["difference", "hinge"]
NetworkFamily = Literal["conv", "resnet"]


@final
class Batch(NamedTuple):
    """Images and the noise of one turn, the same in the upper level and in the first lower step."""

    visible: Tensor
    latent: Tensor  # h_hat ~ p(h), shape (n, d)
    noise: Tensor  # reparameterises q1(h|v), shape (n, d)
    cycle_noise: Tensor  # reparameterises q1(h|v_hat), shape (n, d)
    fresh_latent: Tensor | None = None  # h_hat of the lower level, if it is not `latent`
    generated: Tensor | None = None  # G(latent), once `share` has computed it

    @property
    def lower_latent(self) -> Tensor:
        """The lower level's h_hat."""
        return self.latent if self.fresh_latent is None else self.fresh_latent


@final
class BiDVL(EBLVM):
    r"""A decoupled EBLVM and its learning problem.

    The energy is the upper level, posterior and generator are the lower one.

    Args:
        energy: module v -> (n,), the marginal energy E.
        posterior: module v -> (mean, log-variance), each (n, d): a diagonal Gaussian q1(h|v).
        generator: module h -> v, shape (n, d) -> (n, *visible_shape).
        latent_dim: dimension d of the latent; found from the posterior's output at the first data
            if not given.
        variant: "offset", "complete" (latent terms of both levels, and the posterior trained in both) or
            "without" (Table 6 of the paper).
        ratio: r', the constant part of the importance ratio: 0.05 at 32 pixels, 0.1 at 64 (Sec. 5.4;
            the official code has 1.0 at 64).
        ratio_bias: "sigmoid" multiplies r' by sigmoid(mean E - E(v)), the bias term of Eq. 15 as the
            text gives it; "none" drops it, as the formal experiments do.
        latent_weight: weight of the latent reconstruction, 1/d by default.
        upper: "difference" (Eq. 14), or "hinge", the official ResNet scripts' relu(1 + E(v)) +
            relu(1 - E(v_hat)).
        fresh_latent: draw another h_hat for the lower level, as the official ResNet scripts do. One
            h_hat for both, the default, lets `train` compute G(h_hat) once for both.
        statistics: batch-norm statistics at evaluation; "batch" is what the paper's numbers use.
        visible_shape: shape of one image, if known: checked before training.
        visible_range: range of the pixels, (-1, 1) for generators that end in a tanh.

    Raises:
        ValueError: for an unknown option (naming the nearest) or a weight out of range.

    Example:
        >>> model = BiDVL.for_images((1, 8, 8), latent_dim=4, width=8)
        >>> history = model.fit(torch.rand(200, 1, 8, 8) * 2 - 1, num_steps=2, batch_size=50)
        >>> model.sample(3).shape, model.energy(torch.zeros(2, 1, 8, 8)).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([2]))

    References:
        Bi-level Doubly Variational Learning for Energy-based Latent Variable Models (Kan, Lü, Wang,
        Zhang, Zhu, Huang, Ding, Chen, CVPR 2022), https://arxiv.org/abs/2203.14702
        Differs from the paper in:
        - the dropped best-response term can be kept: `fit(solver=Implicit(...))` or `Unrolled(...)`
          (Algorithm 1, line 6, of which no public implementation exists); their hypothetical lower
          steps all see the noise of the turn, those of the loop new noise each;
        - upper level first by default, as the official code; Algorithm 1 starts with the lower one
          (`order="lower_first"`);
        - the upper level evaluates the energy on data and samples in one pass (if it has no batch
          norm), so spectral norm advances by one power iteration there, not two;
        - the generator's batch norm sees h_hat once a turn where both levels share G(h_hat), not twice:
          its running averages move slower, to the same place;
        - `latent` is the official code's squared error of the posterior *mean* times 1/d, not the
          Gaussian log-density of Eq. 11 (weight 1/2, variance term): the published coefficients;
        - $p_2(v|h)$ has a fixed variance of 1/2 (squared error with weight one), so the entropy of
          $p_2$ is a constant and left out;
        - `complete` shares the posterior between the levels; each level has its own Adam state (the
          official code shares one), and in the upper level the unbounded ascent of (12) is replaced
          by the descent of $KL(q_1(h|\hat v) \| p(h)) / d$, as the official code does;
        - the sigmoid bias is that of the text; the official code computes a clamped exponential and
          never uses it.
    """

    latent_model: Decoupled

    @explained
    def __init__(
        self,
        energy: nn.Module,
        posterior: nn.Module,
        generator: nn.Module,
        *,
        latent_dim: int | None = None,
        variant: Variant = "offset",
        ratio: float = 0.05,
        ratio_bias: RatioBias = "none",
        latent_weight: float | None = None,
        upper: UpperLoss = "difference",
        fresh_latent: bool = False,
        statistics: Statistics = "running",
        visible_shape: tuple[int, ...] | None = None,
        visible_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        one_of("variant", variant, ("offset", "complete", "without"))
        one_of("ratio_bias", ratio_bias, ("none", "sigmoid"))
        one_of("upper", upper, ("difference", "hinge"))
        one_of("statistics", statistics, ("running", "batch"))
        for part, network in (
            ("energy", energy),
            ("posterior", posterior),
            ("generator", generator),
        ):
            a_module(part, network)
        if latent_dim is not None:
            whole("latent_dim", latent_dim)
        positive("ratio", ratio, zero=True)
        if latent_weight is not None:
            positive("latent_weight", latent_weight, zero=True)
        flag("fresh_latent", fresh_latent)
        both = {"posterior": posterior} if variant == "complete" else {}
        self.upper = nn.ModuleDict({"energy": energy, **both})
        self.lower = nn.ModuleDict({"posterior": posterior, "generator": generator})
        self.latent_model = Decoupled(
            Visibles(visible_shape, visible_range),
            marginal=energy,
            moments=posterior,
            generator=generator,
            latent_dim=latent_dim,
        )
        self._mixing_energy = any(isinstance(m, BatchNorm) for m in energy.modules())
        self.variant, self.upper_kind, self.fresh_latent = variant, upper, fresh_latent
        self.ratio, self.ratio_bias, self._latent_weight = ratio, ratio_bias, latent_weight
        self.statistics = statistics
        if variant == "offset":
            self.stops_lower_gradient = (
                "variant='offset' stops it at the posterior of generated samples (Eq. 13); use "
                "variant='complete' or 'without'"
            )

    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        *,
        family: NetworkFamily = "conv",
        latent_dim: int | None = None,
        width: float = 64,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """The published networks, scaled to square images in [-1, 1].

        Args:
            shape: (channels, side, side).
            family: "conv", the paper's networks, or "resnet", those of its 128 pixel images. With
                "resnet" go the settings of the official ResNet scripts: `upper="hinge"`,
                `latent_weight=1e-4`, `ratio=0.05` at every size, `fresh_latent=True`.
            latent_dim: dimension of the latent; 100 in the official conv scripts, 128 in the others.
            width: channels in proportion: 64 gives the published networks, 32 half their channels.
            seed: seed of the initial weights; torch's global generator is left as it was.
            **options: further arguments of `BiDVL`; the `ratio` of "conv" is 0.1 from 64 pixels on,
                as in the paper.

        Returns:
            The untrained model.

        Raises:
            ValueError: for an unknown family, or a shape it has no networks for.
        """
        shape = image_shape(shape)
        one_of("family", family, get_args(NetworkFamily))
        conv = family == "conv"
        latent_dim = latent_dim if latent_dim is not None else 100 if conv else 128
        channels_of(width, latent_dim)
        options = {**(_conv_options(shape) if conv else _RESNET_OPTIONS), **options}
        make = conv_networks if conv else residual_networks
        networks = build(lambda: nn.ModuleList(make(shape, latent_dim, width / 64)), seed)
        model = cls(
            *networks,
            latent_dim=latent_dim,
            visible_shape=shape,
            visible_range=(-1.0, 1.0),
            **options,
        )
        sizes = {"family": family, "latent_dim": latent_dim, "width": width, "seed": seed}
        model.recipe = {"shape": shape, **sizes, **options}
        return model

    @property
    def latent_weight(self) -> float:
        """Weight of the latent reconstruction."""
        return 1 / self.latent_dim if self._latent_weight is None else self._latent_weight

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Any, generator: torch.Generator) -> Batch:
        if self.latent_model.latent_dim is None:
            self.probe(data[:2])
        h, noise, cycle_noise = (self._normal(data, generator) for _ in range(3))
        batch = Batch(data, latent=h, noise=noise, cycle_noise=cycle_noise)
        return self._with_fresh_latent(batch, generator)

    def draw_lower(self, batch: Batch, generator: torch.Generator, step: int) -> Batch:
        """The turn's batch in the first lower step; in the others new noise of q1 at the same h_hat.

        With `fresh_latent` the others have a new h_hat of their own, too.
        """
        if step == 0:
            return batch
        noise, cycle_noise = (self._normal(batch.visible, generator) for _ in range(2))
        batch = batch._replace(noise=noise, cycle_noise=cycle_noise)
        return self._with_fresh_latent(batch, generator)

    def _with_fresh_latent(self, batch: Batch, generator: torch.Generator) -> Batch:
        if not self.fresh_latent:
            return batch
        return batch._replace(fresh_latent=self._normal(batch.visible, generator))

    def _normal(self, v: Tensor, generator: torch.Generator) -> Tensor:
        return normal_noise(len(v), self.latent_dim, generator, v)

    def share(self, batch: Batch) -> Batch:
        """G(h_hat), unless the lower level has an h_hat of its own."""
        if batch.fresh_latent is not None:
            return batch
        return batch._replace(generated=self.latent_model.generate(batch.latent))

    def upper_loss(self, batch: Batch) -> Loss:
        """Eq. 14, or its hinge; `complete` adds the posterior's term."""
        generated, model = batch.generated, self.latent_model
        generated = model.generate(batch.latent) if generated is None else generated
        real, fake = self._energies(batch.visible, generated)
        if self.upper_kind == "hinge":
            loss = relu(1 + real).mean() + relu(1 - fake).mean()
        else:
            loss = real.mean() - fake.mean()
        if self.variant == "complete":
            loss = loss + gaussian_kl(*model.encode(generated)).mean() / self.latent_dim
        return loss, {"energy_data": real.mean(), "energy_samples": fake.mean()}

    def _energies(self, v: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
        """E of data and of samples: in one pass, unless batch norm would mix the two."""
        free_energy = self.latent_model.free_energy
        if self._mixing_energy:
            return free_energy(v), free_energy(generated)
        real, fake = free_energy(torch.cat([v, generated])).split([len(v), len(generated)])
        return real, fake

    def lower_loss(self, batch: Batch) -> Loss:
        """Eq. 13 (`offset`), Eq. 11 (`complete`), or Eq. 11 without its third term."""
        v, generated, model = batch.visible, batch.generated, self.latent_model
        generated = model.generate(batch.lower_latent) if generated is None else generated
        if self.ratio_bias == "none":
            ratio, energies = self.importance_ratio(v), model.free_energy(generated)
        else:
            real, energies = self._energies(v, generated)
            ratio = self.importance_ratio(v, real)

        mean, log_variance = model.encode(v)
        h = reparameterised(mean, log_variance, batch.noise)
        reconstruction = (model.generate(h) - v).square().flatten(1).sum(dim=1)
        vae = reconstruction + gaussian_kl(mean, log_variance)
        latent = self.latent_reconstruction(generated, batch).mean()
        loss = energies.mean() + self.latent_weight * latent + (ratio * vae).mean()
        return loss, {"reconstruction": reconstruction.mean(), "latent_reconstruction": latent}

    def importance_ratio(self, v: Tensor, energy: Tensor | None = None) -> Tensor:
        """r(v) = r' bias(v) of Eq. 15, shape (n,) or a constant; `energy` is E(v), if known."""
        if self.ratio_bias == "none":
            return v.new_full((), self.ratio)  # made where v lies: a copy would wait for the device
        energy = self.latent_model.free_energy(v) if energy is None else energy
        return self.ratio * torch.sigmoid(energy.mean() - energy)

    def latent_reconstruction(self, generated: Tensor, batch: Batch) -> Tensor:
        r"""What is left of $-\log q_1(\hat h|\hat v)$: $\lVert h(\hat v) - \hat h \rVert^2$, (n,)."""
        if self.variant == "without":
            return batch.lower_latent.new_zeros(len(generated))
        if self.variant == "offset":
            # gradients reach the generator through v_hat, never the posterior's weights
            recovered, _ = self.latent_model.encode(generated, frozen=True)
        else:
            recovered = reparameterised(*self.latent_model.encode(generated), batch.cycle_noise)
        return (recovered - batch.lower_latent).square().sum(dim=1)

    def optimizers(self, training: Training) -> tuple[Optimizers, Optimizers]:
        """Adam for both levels; weight decay in the lower one only (the official settings).

        Of `complete` the posterior moves at the lower level's rate in both (Algorithm 1).
        """
        rate, decay = training.lower_lr, training.lower_weight_decay
        groups: list[dict[str, Any]] = [{"params": trainable(self.latent_model.marginal)}]
        if self.variant == "complete":
            posterior = trainable(self.latent_model.moments)
            groups.append({"params": posterior, "lr": rate, "weight_decay": decay})
        upper = adam(groups, training, training.upper_lr, training.upper_weight_decay)
        variables = trainable(self.lower)
        return upper, adam(variables, training, rate, decay) if variables else []


_RESNET_OPTIONS = {"upper": "hinge", "latent_weight": 1e-4, "ratio": 0.05, "fresh_latent": True}


def _conv_options(shape: tuple[int, int, int]) -> dict[str, Any]:
    return {"ratio": 0.1 if shape[1] >= 64 else 0.05}
