"""The single-level baselines: contrastive divergence, maximum likelihood, NCE and the VAE."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bilevel.methods.contrastive_divergence import Batch, ContrastiveDivergence
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines.enumeration import states
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.models import DBM, RBM, GaussianDBM, GaussianRBM, LatentVariableModel
from bilevel.methods.networks.convolutional import parameter_count
from bilevel.methods.noise_contrastive import Batch as NoiseBatch
from bilevel.methods.noise_contrastive import NoiseContrastive
from bilevel.methods.vae import VAE
from tests.problems import generator, normal

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def bits(n: int) -> Tensor:
    """All states of n units, float64."""
    return states(n, 0, 2**n, torch.zeros((), dtype=torch.float64))


def machine(kind: type, *sizes: object, seed: int = 0) -> LatentVariableModel:
    """A machine in float64 with every parameter drawn from N(0, 0.7^2)."""
    model = kind(*sizes).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=seed + number))
    return model


MACHINES = {
    "RBM": lambda: machine(RBM, 4, 3),
    "RBM, more latents": lambda: machine(RBM, 3, 4),
    "GaussianRBM": lambda: machine(GaussianRBM, 2, 3),
    "DBM": lambda: machine(DBM, 4, (3, 2)),
    "GaussianDBM": lambda: machine(GaussianDBM, 2, (3, 2)),
}
BINARY = ["RBM", "RBM, more latents", "DBM"]


def data_for(model: LatentVariableModel, n: int = 7) -> Tensor:
    v = normal(n, model.visible_dim, seed=9)
    return v if model.visible_range is None else (v > 0).double()


def gradient(learner: EBLVM, loss: Tensor) -> dict[str, Tensor]:
    variables = learner.variables("upper")
    grads = torch.autograd.grad(loss, list(variables.values()))
    return dict(zip(variables, grads, strict=True))


def loss_of(learner: EBLVM, batch: object) -> Tensor:
    return learner.upper_loss(batch)[0]


def joint_states(model: LatentVariableModel) -> tuple[Tensor, Tensor, Tensor]:
    """All (v, h) of a binary machine and their probabilities."""
    v, h = bits(model.visible_dim), bits(sum(model.latent_dims))
    rows, columns = v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)
    with torch.no_grad():
        return rows, columns, (-model(rows, columns)).softmax(0)


def draws(probabilities: Tensor, n: int, seed: int = 0) -> Tensor:
    """N indices drawn with the given probabilities."""
    return torch.multinomial(probabilities, n, replacement=True, generator=generator(seed))


def frequencies(rows: Tensor) -> Tensor:
    """How often each state of binary rows occurs."""
    numbers = (rows.long() * 2 ** torch.arange(rows.shape[1])).sum(1)
    return torch.bincount(numbers, minlength=2 ** rows.shape[1]) / len(rows)


def assert_distributed(rows: Tensor, probabilities: Tensor) -> None:
    """Frequencies within 4.5 standard errors of the probabilities, each of them."""
    error = (probabilities * (1 - probabilities) / len(rows)).sqrt()
    assert bool(((frequencies(rows) - probabilities).abs() < 4.5 * error + 1e-9).all())


# ---------------------------------------------------------------------- maximum likelihood


@pytest.mark.parametrize("name", BINARY)
def test_likelihood_gradient_is_model_moments_minus_data_moments(name: str) -> None:
    """Assertion 6: dNLL/dW = E_p[v h^T] - E_data,p(h|v)[v h^T], and so for every parameter."""
    model = MACHINES[name]()
    learner = MaximumLikelihood(model)
    data = data_for(model)
    found = gradient(learner, loss_of(learner, data))
    v, h, joint = joint_states(model)
    posterior = joint.view(2**model.visible_dim, -1)
    posterior = posterior / posterior.sum(1, keepdim=True)
    numbers = (data.long() * 2 ** torch.arange(model.visible_dim)).sum(1)
    observed = torch.zeros(len(posterior), dtype=torch.float64)
    observed.index_add_(0, numbers, torch.full((len(data),), 1 / len(data), dtype=torch.float64))
    change = joint - (observed[:, None] * posterior).flatten()  # model minus data
    layers = (v, *h.split(model.latent_dims, dim=1))
    weights = [name for name in found if "weight" in name]
    for name_, below, above in zip(weights, layers, layers[1:], strict=False):
        moments = torch.einsum("s,si,sj->ij", change, below, above)
        torch.testing.assert_close(found[name_], moments, **EXACT)
    biases = ["model.visible_bias", *(n for n in found if "latent_bias" in n)]
    for name_, layer in zip(biases, layers, strict=True):
        torch.testing.assert_close(found[name_], change @ layer, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_likelihood_gradient_by_finite_differences(name: str) -> None:
    learner = MaximumLikelihood(MACHINES[name]())
    data = data_for(learner.model)
    found = gradient(learner, loss_of(learner, data))
    step = 1e-5
    for key, parameter in learner.variables("upper").items():
        flat = parameter.detach().view(-1)
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(-learner.model.log_likelihood(data).mean().item())
                flat[i] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            # central differences: rounding 1e-16 / 1e-5 and curvature (1e-5)^2
            assert found[key].view(-1)[i].item() == pytest.approx(difference, abs=1e-8)


def test_maximum_likelihood_fits_a_distribution_within_reach() -> None:
    """Data of an RBM: the likelihood ends at the data's own entropy."""
    truth = machine(RBM, 4, 2, seed=3)
    with torch.no_grad():
        p = truth.log_likelihood(bits(4)).exp()
    data = bits(4)[draws(p, 4000)]
    observed = frequencies(data)
    learner = MaximumLikelihood(RBM(4, 4).double())
    learner.fit(data, num_steps=600, batch_size=4000, upper_lr=0.05)
    with torch.no_grad():
        reached = float(learner.model.log_likelihood(data).mean())
    assert reached == pytest.approx(-float(torch.special.entr(observed).sum()), abs=2e-3)


# ---------------------------------------------------------------------- contrastive divergence


@pytest.mark.parametrize("name", ["RBM", "RBM, more latents"])
def test_divergence_with_exact_samples_has_the_likelihood_gradient(name: str) -> None:
    """The expectation over v_k ~ p, by enumeration."""
    model = MACHINES[name]()
    learner, exact = ContrastiveDivergence(model), MaximumLikelihood(model)
    data = data_for(model)
    with torch.no_grad():
        p = model.log_likelihood(bits(model.visible_dim)).exp()
    losses = [loss_of(learner, Batch(data, None, v[None], None)) for v in bits(model.visible_dim)]
    found = gradient(learner, p @ torch.stack(losses))
    wanted = gradient(exact, loss_of(exact, data))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **EXACT)


@pytest.mark.parametrize("name", ["DBM", "GaussianDBM"])
def test_divergence_of_two_layers_has_the_gradient_of_the_variational_bound(name: str) -> None:
    """Of E(v, mu) - H(mu) + log Z, by finite differences that let mu follow."""
    model = MACHINES[name]()
    learner, data = ContrastiveDivergence(model), data_for(model)

    def bound() -> Tensor:
        mu = model.mean_field(data, sweeps=60)
        entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
        return (model(data, mu) - entropy.sum(1)).mean() + model.log_partition()

    mu = model.mean_field(data, sweeps=60)
    log_z = gradient(learner, model.log_partition())
    positive = gradient(learner, model(data, mu).mean())
    loss = loss_of(learner, Batch(data, mu, data[:1], mu[:1]))
    negative = gradient(learner, model(data[:1], mu[:1]).mean())
    of_loss = gradient(learner, loss)
    for key, parameter in learner.variables("upper").items():
        torch.testing.assert_close(of_loss[key], positive[key] - negative[key], **EXACT)
        flat, step = parameter.detach().view(-1), 1e-5
        values = []
        for sign in (1, -1):
            flat[0] += sign * step
            values.append(bound().item())
            flat[0] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        found = (positive[key] + log_z[key]).view(-1)[0].item()
        assert found == pytest.approx(difference, abs=1e-8)


def test_joint_samples_of_two_layers_give_the_model_term() -> None:
    model = MACHINES["DBM"]()
    learner, data = ContrastiveDivergence(model), data_for(model)
    mu = model.mean_field(data)
    v, h, p = joint_states(model)
    losses = [loss_of(learner, Batch(data, mu, v[i : i + 1], h[i : i + 1])) for i in range(len(v))]
    found = gradient(learner, p @ torch.stack(losses))
    wanted = gradient(learner, model(data, mu).mean() + model.log_partition())
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **EXACT)


def test_mean_field_descends_its_bound_and_is_exact_without_a_second_layer() -> None:
    model = MACHINES["DBM"]()
    v = data_for(model)
    with torch.no_grad():
        bounds = []
        for sweeps in (1, 2, 4, 8, 100):
            mu = model.mean_field(v, sweeps)
            entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
            bounds.append(model(v, mu) - entropy.sum(1))
        for worse, better in itertools.pairwise(bounds):
            assert bool((better <= worse + 1e-12).all())
        assert bool((bounds[0] > bounds[1]).all())
        assert bool((bounds[-1] >= model.free_energy(v)).all())
        model.weight2.zero_()
        mu = model.mean_field(v, sweeps=1)
        entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
        torch.testing.assert_close(model(v, mu) - entropy.sum(1), model.free_energy(v), **EXACT)
    single = MACHINES["RBM"]()
    exact = single.posterior_logits(data_for(single)).sigmoid()
    torch.testing.assert_close(single.mean_field(data_for(single), 1), exact, **EXACT)


@pytest.mark.parametrize("steps", [1, 3])
def test_chains_from_data_leave_the_model_invariant(steps: int) -> None:
    model = MACHINES["RBM"]()
    with torch.no_grad():
        p = model.log_likelihood(bits(4)).exp()
    data = bits(4)[draws(p, 200_000)]
    batch = ContrastiveDivergence(model, steps).draw(data, generator(1))
    assert_distributed(batch.sampled_visible, p)
    assert not batch.sampled_visible.equal(data)
    assert batch.visible is data
    assert batch.mean_field is batch.sampled_latent is None


@pytest.mark.parametrize("name", BINARY)
def test_persistent_chains_leave_the_model_invariant(name: str) -> None:
    model = MACHINES[name]()
    learner = ContrastiveDivergence(model, steps=2, persistent=True)
    _, h, p = joint_states(model)
    learner.chains = h[draws(p, 200_000)][:, : model.latent_dims[0]]
    before = learner.chains.clone()
    batch = learner.draw(data_for(model), generator(1))
    assert_distributed(batch.sampled_visible, p.view(2**model.visible_dim, -1).sum(1))
    first = bits(model.latent_dims[0])
    marginal = torch.stack([p[(h[:, : first.shape[1]] == row).all(1)].sum() for row in first])
    assert_distributed(learner.chains, marginal)
    assert not learner.chains.equal(before)
    if batch.sampled_latent is not None:
        assert batch.sampled_latent[:, : first.shape[1]].equal(learner.chains)
        both = torch.cat([batch.sampled_latent, batch.sampled_visible], dim=1)
        assert_distributed(both, p)  # numbered as the joint states are: v counts for more


def test_persistent_chains_go_on_where_they_were_and_forget_their_start() -> None:
    model = MACHINES["RBM"]()
    learner = ContrastiveDivergence(model, persistent=True, num_chains=50_000)
    source, data = generator(2), torch.zeros(10, 4, dtype=torch.float64)
    for _ in range(60):
        batch = learner.draw(data, source)
    with torch.no_grad():
        p = model.log_likelihood(bits(4)).exp()
    assert_distributed(batch.sampled_visible, p)
    assert len(learner.chains) == 50_000
    state = generator(3)
    v, h = model.gibbs(learner.chains.clone(), state.clone_state())
    batch = learner.draw(data, state)
    assert batch.sampled_visible.equal(v)
    assert learner.chains.equal(h)


def test_contrastive_chains_start_at_the_data_of_each_batch() -> None:
    model = machine(RBM, 4, 3)
    with torch.no_grad():
        model.weight.copy_(50 * torch.eye(4, 3))  # h copies three visibles, v copies h
        model.visible_bias.copy_(torch.tensor([-25.0, -25, -25, -25]))
        model.latent_bias.fill_(-25)
    learner = ContrastiveDivergence(model)
    for seed in range(3):
        data = (normal(8, 4, seed=seed) > 0).double()
        kept = learner.draw(data, generator(seed)).sampled_visible
        assert kept[:, :3].equal(data[:, :3])


@pytest.mark.parametrize("name", ["RBM", "GaussianRBM", "DBM"])
def test_a_resumed_persistent_run_equals_the_uninterrupted_one(name: str, tmp_path) -> None:
    truth = MACHINES[name]()
    data = truth.gibbs(truth.initial(60, generator()), generator(), steps=20)[0]
    states_ = []
    for folder, stops in (("whole", [6]), ("parts", [3, 6])):
        for part, stop in enumerate(stops):
            learner = ContrastiveDivergence(MACHINES[name](), persistent=True)
            learner.fit(
                data,
                num_steps=6,
                batch_size=20,
                checkpoint_every=3,
                run=tmp_path / folder,
                resume=part > 0,
                callbacks=[lambda step, stop=stop: step.number == stop],
            )
        states_.append(learner.state_dict())
    assert states_[0]["chains"].shape == (20, truth.latent_dims[0])
    assert states_[0].keys() == states_[1].keys()
    assert all(states_[0][key].equal(states_[1][key]) for key in states_[0])


def test_number_of_chains_need_not_be_the_batch_size() -> None:
    learner = ContrastiveDivergence(MACHINES["RBM"](), persistent=True, num_chains=33)
    data = data_for(learner.model, 10)
    assert learner.chains.shape == (0, 3)
    assert len(learner.draw(data, generator()).sampled_visible) == 33
    assert math.isfinite(loss_of(learner, learner.draw(data, generator())).item())
    twin = copy.deepcopy(learner)
    twin.load_state_dict(ContrastiveDivergence(learner.model, persistent=True).state_dict())
    assert twin.chains.shape == (0, 3)
    assert learner.chains.shape == (33, 3)


# ---------------------------------------------------------------------- noise-contrastive estimation


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("name", ["RBM", "DBM"])
def test_noise_contrastive_gradient_vanishes_at_the_truth(name: str, ratio: int) -> None:
    """At c = log Z, data and noise in expectation by enumeration; and nowhere near it."""
    model = MACHINES[name]()
    learner = NoiseContrastive(model, ratio)
    learner.draw(data_for(model), generator())
    v = bits(4)
    with torch.no_grad():
        log_z = model.log_partition()
        learner.log_normalizer.copy_(log_z)
        p = model.log_likelihood(v).exp()
        offset = learner._offset(v)
    noise = offset.exp() / ratio
    assert float(noise.sum()) == pytest.approx(1, abs=1e-12)

    def expected() -> dict[str, Tensor]:
        losses = [
            loss_of(learner, NoiseBatch(v[s][None], v[t][None], offset[s][None], offset[t][None]))
            for s in range(16)
            for t in range(16)
        ]
        return gradient(learner, (p[:, None] * noise).flatten() @ torch.stack(losses))

    for value in expected().values():
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    with torch.no_grad():
        learner.log_normalizer.add_(0.1)
    assert all(float(value.abs().max()) > 1e-4 for value in expected().values())


def test_noise_is_what_its_log_probability_says() -> None:
    binary = NoiseContrastive(MACHINES["RBM"](), ratio=20_000)
    batch = binary.draw(data_for(binary.model, 5), generator())
    with torch.no_grad():
        p = binary._offset(bits(4)).exp() / 20_000
    assert_distributed(batch.noise, p)
    assert batch.noise_offset.shape == (100_000,)
    real = NoiseContrastive(MACHINES["GaussianRBM"](), ratio=2)
    batch = real.draw(data_for(real.model, 5), generator())
    normal_ = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    for rows, offset in ((batch.visible, batch.visible_offset), (batch.noise, batch.noise_offset)):
        torch.testing.assert_close(offset, normal_.log_prob(rows) + math.log(2), **EXACT)
    assert batch.noise.shape == (10, 2)


def test_noise_rates_are_the_mean_of_all_rows_seen() -> None:
    learner = NoiseContrastive(MACHINES["RBM"]())
    rows, source = data_for(learner.model, 30), generator()
    for part in rows.split(7):
        learner.draw(part, source)
    wanted = (rows.sum(0) + 1) / (30 + 2)
    torch.testing.assert_close(learner.rates, wanted, **EXACT)
    assert int(learner.seen) == 32


def test_grey_data_become_bits_for_the_classifier() -> None:
    learner = NoiseContrastive(RBM(4, 3, grey=True).double())
    grey = torch.full((40_000, 4), 0.3).double()
    batch = learner.draw(grey, generator())
    assert batch.visible.unique().tolist() == [0, 1]
    assert float(batch.visible.mean()) == pytest.approx(0.3, abs=0.005)
    plain = NoiseContrastive(RBM(4, 3).double())
    data = data_for(plain.model)
    assert plain.draw(data, generator()).visible is data


def test_noise_contrastive_finds_model_and_normaliser() -> None:
    """Data of a Gaussian RBM: c near log Z of the machine it ends at."""
    truth = machine(GaussianRBM, 2, 2, seed=5)
    data = truth.gibbs(truth.initial(20_000, generator()), generator(), steps=30)[0]
    learner = NoiseContrastive(GaussianRBM(2, 2).double())
    learner.fit(data, num_steps=500, batch_size=500, upper_lr=2e-2)
    with torch.no_grad():
        gap = truth.log_likelihood(data).mean() - learner.model.log_likelihood(data).mean()
        drift = learner.log_normalizer - learner.model.log_partition()
    assert float(gap) < 0.02
    assert abs(float(drift)) < 0.1


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


def test_bound_does_not_depend_on_how_its_samples_are_grouped(monkeypatch) -> None:
    """The mean of exp(log w) over groups is that over all."""
    model, _ = linear_vae(error=0.4)
    v = normal(4, 3, seed=4)
    whole = model.energy(v)
    monkeypatch.setattr("bilevel.methods.vae._ROWS", 28)  # 7 draws at a time, and 2 at last
    torch.testing.assert_close(model.energy(v), whole, **EXACT)


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


def small_vae(**options: object) -> VAE:
    return VAE.for_images((1, 8, 8), latent_dim=3, width=4, **options)


def test_vae_of_images_shares_bidvls_networks() -> None:
    with torch.device("meta"):
        model = VAE.for_images((3, 32, 32))
    assert parameter_count(model.network("encoder")) == 2_780_024
    assert parameter_count(model.network("decoder")) == 4_452_963


def test_loss_of_images_is_squared_error_and_kl() -> None:
    """Variance 1/2: squared error with weight one, and the constant (d/2) log pi."""
    model = small_vae().double()
    batch = model.draw(images(6).double(), generator())
    mean, log_variance = model.network("encoder")(batch.visible)
    h = mean + (log_variance / 2).exp() * batch.noise
    error = (model.network("decoder")(h)[0] - batch.visible).square().flatten(1).sum(1)
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
        means = model.network("decoder")(h)[0]
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


LEARNERS: dict[str, Callable[[], EBLVM]] = {
    "CD": lambda: ContrastiveDivergence(RBM(6, 3), steps=2),
    "PCD": lambda: ContrastiveDivergence(RBM(6, 3), persistent=True, num_chains=30),
    "PCD, two layers": lambda: ContrastiveDivergence(DBM(6, (3, 2)), persistent=True),
    "ML": lambda: MaximumLikelihood(GaussianRBM(6, 3)),
    "NCE": lambda: NoiseContrastive(RBM(6, 3), ratio=2),
    "NCE, Gaussian": lambda: NoiseContrastive(GaussianRBM(6, 3)),
    "VAE": lambda: VAE.for_table(6, 2, hidden=[8]),
    "VAE, Gaussian": lambda: VAE.for_table(6, 2, hidden=[8], visible="gaussian"),
}
SETTINGS = {"num_steps": 4, "batch_size": 20, "seed": 1}


def rows(n: int = 60) -> Tensor:
    return (normal(n, 6, seed=2) > 0.3).double()


@pytest.mark.parametrize("name", LEARNERS)
def test_fit_save_load(name: str, tmp_path) -> None:
    learner = LEARNERS[name]().double()
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    history = learner.fit(rows(), **SETTINGS)
    assert history.steps == 4
    after = learner.state_dict()
    variables = set(learner.variables("upper"))
    moved = {key for key in variables if not after[f"upper.{key}"].equal(before[f"upper.{key}"])}
    assert moved == variables
    learner.save(tmp_path)
    again = type(learner).load(tmp_path).double()
    assert after.keys() == again.state_dict().keys()
    assert all(value.float().equal(again.state_dict()[key].float()) for key, value in after.items())
    v = rows(5)
    assert learner.energy(v).shape == (5,)
    torch.testing.assert_close(again.energy(v), learner.energy(v), rtol=1e-5, atol=1e-5)
    assert learner.sample(3, generator()).shape == (3, 6)
    if name != "PCD, two layers":
        assert learner.posterior(v).sample().shape[0] == 5
        assert learner.reconstruct(v).shape == (5, 6)


@pytest.mark.parametrize("name", LEARNERS)
def test_losses_are_pure_and_same_seed_is_same_run(name: str) -> None:
    runs = []
    for _ in range(2):
        learner = LEARNERS[name]()
        learner.fit(rows().float(), **SETTINGS)
        runs.append(learner.state_dict())
    assert all(runs[0][key].equal(runs[1][key]) for key in runs[0])
    batch = learner.draw(rows().float(), generator())
    assert loss_of(learner, batch).equal(loss_of(learner, batch))
    with pytest.raises(NotImplementedError, match="single level"):
        learner.lower_loss(batch)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("name", LEARNERS)
def test_traced_run_equals_the_eager_one(name: str) -> None:
    runs = []
    for compiled in (False, True):
        learner = LEARNERS[name]().double()
        learner.fit(rows(), compile=compiled, **SETTINGS)
        runs.append(learner.state_dict())
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_train_on_a_gpu(name: str) -> None:
    learner = LEARNERS[name]().to("cuda")
    learner.fit(rows().float(), **SETTINGS)
    assert learner.energy(rows(5).float()).device.type == "cuda"
    assert all(buffer.device.type == "cuda" for buffer in learner.buffers())


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
    ("make", "error", "words"),
    [
        (lambda: ContrastiveDivergence(RBM(4, 3), steps=0), ValueError, "`steps` must be positive"),
        (lambda: ContrastiveDivergence(RBM(4, 3), steps=1.5), TypeError, "`steps` must be an int"),
        (
            lambda: ContrastiveDivergence(RBM(4, 3), persistent=True, num_chains=0),
            ValueError,
            "`num_chains` must be positive, got 0",
        ),
        (
            lambda: ContrastiveDivergence(RBM(4, 3), num_chains=10),
            ValueError,
            "`num_chains` is for `persistent=True`",
        ),
        (
            lambda: MaximumLikelihood(RBM(64, 50)),
            ValueError,
            r"log Z of this `RBM` \(64 visibles, latents \(50,\)\).*`ContrastiveDivergence",
        ),
        (
            lambda: MaximumLikelihood(DBM(4, (30, 2))),
            ValueError,
            "free energy, and that of this `DBM` is a sum over the 30 units.*`ContrastiveDivergence",
        ),
        (lambda: NoiseContrastive(RBM(4, 3), ratio=0), ValueError, "`ratio` must be positive"),
        (lambda: NoiseContrastive(RBM(4, 3), ratio=0.5), TypeError, "`ratio` must be an integer"),
        (
            lambda: NoiseContrastive(GaussianDBM(4, (30, 2))),
            ValueError,
            "`NoiseContrastive` needs the free energy.*this `GaussianDBM`.*`ContrastiveDivergence",
        ),
        (lambda: VAE.for_table(4, 0), ValueError, "`latent_dim` must be positive"),
        (lambda: VAE.for_table(4, 2, hidden=[8, 0]), ValueError, r"`hidden\[1\]` must be positive"),
        (lambda: VAE.for_table(4, 2, visible="gausian"), ValueError, "did you mean `gaussian`"),
        (
            lambda: VAE.for_table(4, 2, visible="gaussian", grey=True),
            ValueError,
            "`grey` is for Bernoulli visibles",
        ),
        (lambda: small_vae(statistics="bach"), ValueError, "did you mean `batch`"),
        (lambda: VAE.for_images((1, 8, 6)), ValueError, "square images"),
        (
            lambda: VAE.for_table(4, 2).log_likelihood(torch.ones(3, 4), num_samples=0),
            ValueError,
            "`num_samples` must be positive",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


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


def test_data_the_model_cannot_take_are_refused() -> None:
    grey = torch.full((60, 6), 0.5)
    for name in ("CD", "NCE", "VAE"):
        with pytest.raises(ValueError, match=r"exactly 0 or 1.*grey=True"):
            LEARNERS[name]().fit(grey, num_steps=1, batch_size=20)
    VAE.for_table(6, 2, grey=True).fit(grey, num_steps=1, batch_size=20)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        LEARNERS["PCD"]().fit(3 * grey, num_steps=1, batch_size=20)
