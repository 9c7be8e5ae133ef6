"""The variational autoencoder: its bounds on a linear model whose evidence is known, and its images."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bilevel.methods.networks.convolutional import parameter_count
from bilevel.methods.vae import VAE
from tests.methods.small_models import EXACT, assert_distributed, bits, loss_of, rows, small_vae
from tests.problems import generator, normal

# ---------------------------------------------------------------------- VAE


class LinearDecoder(nn.Module):
    """N(v; A h + b, diag s^2)."""

    def __init__(self, visible_dim: int, latent_dim: int) -> None:
        super().__init__()
        # orthogonal columns and one scale: the posterior's covariance is diagonal
        basis = torch.linalg.qr(normal(visible_dim, latent_dim))[0]
        self.matrix = nn.Parameter(basis * torch.tensor([1.5, 0.7]))
        self.bias = nn.Parameter(normal(visible_dim, seed=1))
        self.log_variance = nn.Parameter(torch.tensor(-0.8).double())

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h @ self.matrix.mT + self.bias, self.log_variance

    def evidence(self, v: Tensor) -> Tensor:
        """The log density of N(b, A A^T + s^2 I)."""
        noise = torch.eye(len(self.bias)).double() * self.log_variance.exp()
        return MultivariateNormal(self.bias, self.matrix @ self.matrix.mT + noise).log_prob(v)


class ExactEncoder(nn.Module):
    """Mean and log-variance of the linear decoder's posterior, shifted and scaled by an error."""

    def __init__(self, decoder: LinearDecoder, error: float = 0.0) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.error = error

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        a, s2 = self.decoder.matrix, self.decoder.log_variance.exp()
        precision = 1 + (a * a).sum(0) / s2
        mean = (v - self.decoder.bias) @ a / s2 / precision
        return mean + self.error, (self.error - precision.log()).expand_as(mean)


def linear_vae(error: float = 0.0) -> tuple[VAE, LinearDecoder]:
    decoder = LinearDecoder(3, 2)
    return VAE(ExactEncoder(decoder, error), decoder, 2, visible="gaussian").double(), decoder


def test_evidence_bound_is_exact_at_the_exact_posterior() -> None:
    """The bound of Eq. L(v), its expectation over the noise by many draws; and E with one draw."""
    model, decoder = linear_vae()
    v = normal(6, 3, seed=4)
    evidence = decoder.evidence(v).detach()
    # log p(v, h) - log q(h|v) is log p(v) for every h, so one draw is enough
    torch.testing.assert_close(model.log_likelihood(v, 1, generator()), evidence, **EXACT)
    torch.testing.assert_close(-model.energy(v), evidence, **EXACT)
    # the loss has its KL term in closed form, so single draws differ; their mean does not
    batch = model.draw(v.repeat(100_000 // 6, 1), generator())
    loss = loss_of(model, batch).item()
    assert loss == pytest.approx(-float(evidence.mean()), abs=0.02)


def test_evidence_bound_is_below_the_evidence() -> None:
    model, decoder = linear_vae(error=0.4)
    v = normal(6, 3, seed=4)
    batch = model.draw(v.repeat(100_000 // 6, 1), generator())
    gap = (loss_of(model, batch) + decoder.evidence(v).mean()).item()
    # KL(q || p(h|v)) of Gaussians: the shift 0.4 in units of the posterior, variances e^0.4 apart
    a, s2 = decoder.matrix, decoder.log_variance.exp()
    precision = 1 + (a * a).sum(0) / s2
    wanted = 0.5 * (0.16 * precision + math.exp(0.4) - 1 - 0.4).sum()
    assert gap == pytest.approx(wanted.item(), abs=0.02)


def test_importance_weighted_bound_tightens_with_its_samples() -> None:
    model, decoder = linear_vae(error=0.4)
    v = normal(3, 3, seed=4)
    rows = v.repeat(20_000, 1)
    evidence = decoder.evidence(v).mean().item()
    bounds = [float(model.log_likelihood(rows, k, generator(k)).mean()) for k in (1, 2, 5, 25)]
    assert all(worse < better for worse, better in itertools.pairwise(bounds))
    assert bounds[-1] < evidence
    assert float(model.log_likelihood(v, 200_000, generator()).mean()) == pytest.approx(
        evidence, abs=5e-3
    )


def test_bound_does_not_depend_on_how_its_samples_are_grouped() -> None:
    """The mean of exp(log w) over groups is that over all: of many rows, few draws fit at a time."""
    model, _ = linear_vae(error=0.4)
    v = normal(480, 3, seed=4)  # 20 draws of 100 at a time; of 4 rows all at once
    torch.testing.assert_close(model.energy(v)[:4], model.energy(v[:4]), **EXACT)


def test_energy_is_a_function_of_each_row() -> None:
    model = VAE.for_table(5, 2, hidden=[8]).double()
    v = bits(5)
    energies = model.energy(v)
    assert energies.equal(model.energy(v))
    alone = torch.cat([model.energy(row[None]) for row in v])
    torch.testing.assert_close(alone, energies, **EXACT)


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_partition_function_of_a_vae_is_one(visible: str) -> None:
    """The joint energy on a grid of h (and v), summed."""
    width = 3 if visible == "bernoulli" else 1
    model = VAE.for_table(width, 1, hidden=[4], visible=visible).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=number))
    h = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    v = bits(3) if visible == "bernoulli" else 4 * h[:, None]
    step = 18 / 1200
    volume = step if visible == "bernoulli" else 4 * step**2
    with torch.no_grad():
        total = sum((-model.joint_energy(v, latent.expand(len(v), 1))).exp().sum() for latent in h)
    assert float(total) * volume == pytest.approx(1, abs=1e-9)


def test_vae_samples_follow_its_energy() -> None:
    model = VAE.for_table(3, 1, hidden=[4]).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    h = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    with torch.no_grad():
        rows = [-model.joint_energy(v.expand(1201, 3), h[:, None]) for v in bits(3)]
    p = torch.stack(rows).logsumexp(1).exp() * (18 / 1200)
    assert_distributed(model.sample(200_000, generator()), p / p.sum())
    # 100,000 draws from an untrained posterior: the weights' standard error
    estimate = model.log_likelihood(bits(3), 100_000, generator())
    torch.testing.assert_close(estimate.exp(), p, rtol=3e-2, atol=0)


# ---------------------------------------------------------------------- VAE of images


def images(n: int = 40) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=generator(3)) * 2 - 1


def test_vae_of_images_shares_bidvls_networks() -> None:
    with torch.device("meta"):
        model = VAE.for_images((3, 32, 32))
    assert parameter_count(model.upper["posterior"].network) == 2_780_024
    assert parameter_count(model.upper["decoder"]) == 4_452_963


def test_loss_of_images_is_squared_error_and_kl() -> None:
    """Variance 1/2: squared error with weight one, and the constant (d/2) log pi."""
    model = small_vae().double()
    batch = model.draw(images(6).double(), generator())
    mean, log_variance = model.upper["posterior"].network(batch.visible)
    h = mean + (log_variance / 2).exp() * batch.noise
    error = (model.upper["decoder"](h)[0] - batch.visible).square().flatten(1).sum(1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
        torch.distributions.Normal(0.0, torch.tensor(1.0).double()),
    ).sum(1)
    wanted = (error + kl).mean() + 32 * math.log(math.pi)
    torch.testing.assert_close(loss_of(model, batch), wanted, **EXACT)


def test_vae_of_images_trains_saves_and_loads(tmp_path) -> None:
    model = small_vae(statistics="batch")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.fit(images(), num_steps=2, batch_size=20)
    after = model.state_dict()
    assert not [key for key, _ in model.named_parameters() if after[key].equal(before[key])]
    model.save(tmp_path)
    again, v = VAE.load(tmp_path), images(5)
    assert again.statistics == "batch"
    assert again.energy(v).equal(model.energy(v))
    assert again.sample(3, generator()).equal(model.sample(3, generator()))
    assert model.latent_dim == 3


def test_samples_of_images_are_means_and_batch_norm_is_as_asked() -> None:
    model = small_vae()
    model.fit(images(), num_steps=2, batch_size=20)
    h = torch.randn(4, 3, generator=generator(1))
    with model.evaluating("running"):
        means = model.upper["decoder"](h)[0]
    assert model.sample(4, generator(1)).equal(means)
    assert not means.requires_grad
    v = images(6)
    running, energies = model.reconstruct(v), model.energy(v)
    model.statistics = "batch"
    assert not model.reconstruct(v).allclose(running)
    assert model.energy(v).equal(energies)  # always a function of each image
    alone = torch.cat([model.energy(row[None]) for row in v])
    torch.testing.assert_close(alone, energies, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------- use


def test_load_asks_for_the_modules_of_a_vae_made_of_your_own(tmp_path) -> None:
    model, decoder = linear_vae()
    model.save(tmp_path)
    with pytest.raises(ValueError, match="made of your own modules"):
        VAE.load(tmp_path)
    other = {"encoder": ExactEncoder(decoder), "decoder": decoder, "latent_dim": 2}
    again = VAE.load(tmp_path, **other, visible="gaussian")
    assert again.energy(normal(4, 3)).equal(model.energy(normal(4, 3)))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("encoder", "decoder", "words"),
    [
        (nn.Linear(6, 4), nn.Linear(2, 6), "the encoder must give mean and log-variance"),
        (nn.Linear(5, 4), nn.Linear(2, 6), "the encoder cannot take a tensor of shape"),
        (None, nn.Linear(3, 6), "the decoder cannot take a tensor of shape"),
        (None, nn.Linear(2, 7), r"the decoder must give visibles of shape \(2, 6\), got \(2, 7\)"),
    ],
)
def test_modules_that_do_not_fit_are_named(encoder, decoder, words: str) -> None:
    if encoder is None:
        encoder = VAE.for_table(6, 2).upper["posterior"].network
    with pytest.raises(ValueError, match=words):
        VAE(encoder, decoder, 2).fit(rows().float(), num_steps=1, batch_size=20)
