"""Log Z from annealing and from bounds, against enumeration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods.data.tables import load_table
from bilevel.methods.likelihood import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket,
    chi_square_upper_bound,
    exact_samples,
    gibbs_samples,
    linear_schedule,
    log_likelihood,
    reverse_annealed_importance_sampling,
    salakhutdinov_schedule,
    sampler_lower_bound,
    variational_lower_bound,
)
from bilevel.methods.likelihood.annealing import AnnealedChains, Uniforms
from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import DBM, RBM, GaussianDBM, GaussianRBM, LatentVariableModel
from bilevel.methods.variational import (
    BernoulliPosterior,
    HierarchicalJoint,
    TabularEnergy,
    TabularJoint,
)
from tests.devices import DEVICES, generator

KINDS = ["RBM", "GaussianRBM", "DBM", "GaussianDBM"]


def randomized(model: LatentVariableModel, scale: float = 0.7, seed: int = 1) -> Any:
    """The model in float64 with normal parameters, scales included."""
    model = model.double()
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def machine(kind: str, scale: float = 0.7, seed: int = 1) -> Any:
    makers = {
        "RBM": lambda: RBM(6, 5),
        "GaussianRBM": lambda: GaussianRBM(3, 5),
        "DBM": lambda: DBM(6, (5, 4)),
        "GaussianDBM": lambda: GaussianDBM(3, (5, 4)),
    }
    return randomized(makers[kind](), scale, seed)


def base_of(model: LatentVariableModel) -> Tensor | None:
    if model.visible_range is None:
        return None
    return torch.randn(model.visible_dim, generator=generator(9), dtype=torch.float64)


# ---------------------------------------------------------------------- the chains


@pytest.mark.parametrize("large_weights", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_the_ratio_of_the_annealed_marginals(kind: str, large_weights: bool) -> None:
    """The product of sigmoids and, where it could overflow, the sum of softplus."""
    model = machine(kind, scale=400.0 if large_weights else 0.7)
    if large_weights and model.visible_range is None:
        with torch.no_grad():
            model.log_scale.zero_()
    base = base_of(model)
    h = exact_samples(machine(kind), 7, generator())
    chains = AnnealedChains(model.neighbours(base), h)
    if kind != "GaussianRBM":
        assert (chains._highest > chains._limit) == large_weights
    for start, end in ((0.0, 0.3), (0.3, 0.9), (0.9, 1.0), (1.0, 0.2)):
        with torch.no_grad():
            want = model.log_unnormalized_first(h, end, base)
            want = want - model.log_unnormalized_first(h, start, base)
        torch.testing.assert_close(chains.weigh(start, end), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_chains_forget_their_start_and_keep_the_annealed_marginal(kind: str) -> None:
    model, beta, n = machine(kind), 0.8, 20_000
    base = base_of(model)
    chains = AnnealedChains(model.neighbours(base), torch.zeros(n, 5, dtype=torch.float64))
    g = generator()
    for _ in range(40):
        chains.weigh(beta, beta)
        chains.move(g)
    every = states(5, 0, 32, model.visible_bias)
    with torch.no_grad():
        want = model.log_unnormalized_first(every, beta, base).softmax(0)
    numbers = (chains._h @ 2 ** torch.arange(5, dtype=torch.float64)).long()
    found = torch.bincount(numbers, minlength=32) / n
    assert ((found - want).abs() < 4.5 * (want * (1 - want) / n).sqrt()).all()


def test_numbers_for_coins_are_uniform_below_a_16th_bit_too() -> None:
    uniforms, g = Uniforms(1_000_001, torch.zeros(())), generator()
    below, total = 0, 0
    for draw in range(300):
        uniforms.draw(g)
        u = uniforms.values
        below, total = below + int((u < 2**-18).sum()), total + len(u)
        if draw == 0:
            assert u.min() >= 0
            assert u.max() < 1
            assert u.mean().item() == pytest.approx(0.5, abs=2e-3)
            assert u.var().item() == pytest.approx(1 / 12, abs=1e-3)
            assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 5e-3
    # a draw's 15 smallest numbers share their fraction, so there are 300 coins, one in four heads
    assert below / total == pytest.approx(2**-18, rel=0.4)


# ---------------------------------------------------------------------- AIS against enumeration


@pytest.mark.parametrize("kind", KINDS)
def test_ais_agrees_with_enumeration_within_its_standard_error(kind: str) -> None:
    """Over seeds, error / standard error is a standard normal number."""
    model, seeds = machine(kind), 30
    truth, base = model.log_partition().item(), base_of(model)
    deviations = []
    for seed in range(seeds):
        found = annealed_importance_sampling(
            model, temperatures=100, num_chains=100, base=base, generator=generator(seed)
        )
        assert found.standard_error < 0.05
        assert 80 < found.effective_sample_size <= 100
        deviations.append((found.value - truth) / found.standard_error)
    z = torch.tensor(deviations)
    assert abs(z.mean().item()) < 3 / math.sqrt(seeds)
    assert 0.7 < z.square().mean().sqrt().item() < 1.3
    assert z.abs().max() < 4


def test_advil_9_ais_on_a_5_by_4_rbm() -> None:
    model = randomized(RBM(5, 4), scale=1.0)
    found = annealed_importance_sampling(
        model, temperatures=1000, num_chains=2000, generator=generator()
    )
    assert found.value == pytest.approx(model.log_partition().item(), abs=0.01)


def test_advil_10_at_temperature_zero_all_units_are_independent() -> None:
    for kind, latents in (("RBM", 5), ("DBM", 9)):
        model = machine(kind)
        base = base_of(model)
        assert base is not None
        want = nn.functional.softplus(base).sum() + latents * math.log(2)
        torch.testing.assert_close(model.log_partition_base(base), want)
        every = states(5, 0, 32, base)
        at_zero = model.log_unnormalized_first(every, 0.0, base).logsumexp(0)
        torch.testing.assert_close(at_zero.detach(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_base_is_exact(kind: str) -> None:
    """Without interactions and hidden biases every chain has the same weight: Z."""
    model = machine(kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "weight" in name or "latent" in name:
                p.zero_()
    found = annealed_importance_sampling(
        model, temperatures=20, num_chains=7, base=base_of(model), generator=generator()
    )
    assert found.value == pytest.approx(model.log_partition().item(), abs=1e-12)
    assert found.effective_sample_size == pytest.approx(7, abs=1e-9)
    assert found.standard_error < 1e-12


def test_bism_16_ais_on_the_two_dimensional_grbm() -> None:
    model = randomized(GaussianRBM(2, 4), scale=1.0)
    found = annealed_importance_sampling(
        model, temperatures=2000, num_chains=2000, generator=generator()
    )
    assert found.value == pytest.approx(model.log_partition().item(), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype_are_the_models(kind: str, device: str, dtype: torch.dtype) -> None:
    model = machine(kind)
    want = model.log_partition().item()
    model = model.to(device, dtype)
    found = bracket(model, temperatures=300, num_chains=200, generator=generator(0, device))
    for part in (found.forward, found.backward):
        assert part.log_weights.dtype == torch.float64
        assert part.log_weights.device.type == device
        assert part.value == pytest.approx(want, abs=0.05)


def test_chunking_changes_nothing_but_the_order_of_the_draws() -> None:
    model = machine("RBM")
    whole, one, parts = (
        annealed_importance_sampling(
            model, temperatures=50, num_chains=n, chunk=chunk, generator=generator()
        )
        for n, chunk in ((30, 2000), (30, 30), (75, 30))
    )
    assert torch.equal(whole.log_weights, one.log_weights)
    assert torch.equal(parts.log_weights[:30], one.log_weights)
    assert parts.num_chains == 75
    assert len(parts.log_weights.unique()) == 75
    samples = exact_samples(model, 75, generator(1))
    up = [
        reverse_annealed_importance_sampling(
            model, rows, temperatures=50, chunk=30, generator=generator()
        )
        for rows in (samples, samples[:30])
    ]
    assert torch.equal(up[0].log_weights[:30], up[1].log_weights)


def test_the_answer_is_the_seeds() -> None:
    model = machine("DBM")
    a, b, c = (
        annealed_importance_sampling(model, temperatures=20, generator=generator(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(a.log_weights, b.log_weights)
    assert not torch.equal(a.log_weights, c.log_weights)


# ---------------------------------------------------------------------- from above


def test_forward_is_low_and_backward_high_on_average() -> None:
    """With few temperatures and chains both biases show."""
    model = machine("RBM", scale=1.5)
    truth = model.log_partition().item()
    g = generator()
    below, above = [], []
    for _ in range(60):
        found = bracket(model, temperatures=4, num_chains=3, generator=g)
        below.append(found.forward.value)
        above.append(found.backward.value)
    low, high = torch.tensor(below), torch.tensor(above)
    assert low.mean() + 3 * low.std() / math.sqrt(60) < truth
    assert high.mean() - 3 * high.std() / math.sqrt(60) > truth


@pytest.mark.parametrize("kind", KINDS)
def test_the_bracket_contains_the_truth_and_closes(kind: str) -> None:
    model = machine(kind, scale=1.0)
    truth = model.log_partition().item()
    for seed in range(3):
        found = bracket(
            model,
            temperatures=500,
            num_chains=200,
            base=base_of(model),
            generator=generator(seed),
        )
        assert found.exact
        assert found.lower < truth < found.upper
        assert found.meet
        assert found.width < 0.2


def test_a_bracket_that_does_not_meet_says_so() -> None:
    """Without intermediate temperatures one chain has all the weight, and the error bar misses that."""
    model = randomized(RBM(20, 15), scale=4.0)
    found = bracket(model, temperatures=2, num_chains=200, generator=generator())
    assert found.forward.effective_sample_size < 5
    assert not found.meet


def test_where_nothing_enumerates_the_bracket_starts_at_the_data() -> None:
    model = randomized(RBM(30, 26), scale=0.1)
    with pytest.raises(ValueError, match="pass `data`"):
        bracket(model, generator=generator())
    data = torch.zeros(7, 30, dtype=torch.float64)
    found = bracket(
        model, data=data, temperatures=100, num_chains=20, burn_in=20, generator=generator()
    )
    assert not found.exact
    assert found.meet
    assert found.backward.num_chains == 20


def test_exact_samples_have_the_models_frequencies() -> None:
    model, n = machine("DBM"), 20_000
    every = states(5, 0, 32, model.visible_bias)
    with torch.no_grad():
        want = model.log_unnormalized_first(every).softmax(0)
    h1 = exact_samples(model, n, generator())
    found = torch.bincount((h1 @ 2 ** torch.arange(5, dtype=h1.dtype)).long(), minlength=32) / n
    assert ((found - want).abs() < 4.5 * (want * (1 - want) / n).sqrt()).all()
    with pytest.raises(ValueError, match="Use `gibbs_samples`"):
        exact_samples(RBM(30, 26), 3, generator())


def test_gibbs_samples_take_the_data_in_turn() -> None:
    model = machine("DBM")
    h1 = gibbs_samples(model, torch.ones(3, 6, dtype=torch.float64), 8, 2, generator())
    assert h1.shape == (8, 5)
    with pytest.raises(ValueError, match="number of rows of `data` must be at least 1, got 0"):
        gibbs_samples(model, torch.ones(0, 6), 8, 2, generator())
    assert set(h1.unique().tolist()) <= {0.0, 1.0}


# ---------------------------------------------------------------------- the record


def test_the_record_of_an_estimate() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    forward, backward = (LogPartition(weights.log(), 10, reverse) for reverse in (False, True))
    assert forward.value == pytest.approx(math.log(2))
    assert backward.value == pytest.approx(-math.log(2))
    assert forward.standard_error == pytest.approx(1 / math.sqrt(3) / 2)
    assert forward.effective_sample_size == pytest.approx(36 / 14)
    error = 1 / math.sqrt(3)
    ends = math.log(2 - 1.5 * error), math.log(2 + 1.5 * error)
    assert forward.interval(1.5) == pytest.approx(ends)
    assert backward.interval(1.5) == pytest.approx((-ends[1], -ends[0]))
    wide = LogPartition(torch.tensor([0.0, 50.0], dtype=torch.float64), 10)
    assert wide.interval()[0] == -math.inf
    single = LogPartition(weights[:1].log(), 10)
    assert single.standard_error == math.inf
    assert not Bracket(single, single, exact=True).meet


def test_schedules() -> None:
    betas = salakhutdinov_schedule()
    assert len(betas) == 15_001
    assert (betas.diff() > 0).all()
    counts = [int(((betas >= a) & (betas < b)).sum()) for a, b in ((0, 0.5), (0.5, 0.9), (0.9, 1))]
    assert counts == [1000, 4000, 10_000]
    assert linear_schedule(3).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "`num_chains` must be at least 1, got 0"),
        ({"chunk": 0}, "`chunk` must be at least 1"),
        ({"temperatures": 1}, "at least 2 temperatures, 0 and 1, got 1"),
        ({"temperatures": torch.tensor([0, 0.6, 0.5, 1])}, "must increase, got 0.6 and then 0.5"),
        ({"temperatures": torch.tensor([0, 0.5, 0.5, 1])}, "must increase, got 0.5 and then 0.5"),
        (
            {"temperatures": torch.tensor([0.1, 0.5, 1])},
            "from 0 to 1 in one dimension, got from 0.1",
        ),
        ({"temperatures": torch.tensor([0, 0.5])}, "got from 0 to 0.5"),
        ({"temperatures": torch.tensor([0, math.nan, 1])}, "must increase, got 0 and then nan"),
        ({"temperatures": torch.zeros(0)}, "inverse temperatures from 0 to 1"),
        ({"temperatures": torch.zeros(2, 2)}, "in one dimension"),
        ({"base": torch.zeros(5)}, r"one logit per visible, shape \(6,\), got \(5,\)"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = machine("RBM")
    with pytest.raises(ValueError, match=message):
        annealed_importance_sampling(model, generator=generator(), **options)
    if "num_chains" not in options:
        samples = torch.zeros(2, 5, dtype=torch.float64)
        with pytest.raises(ValueError, match=message):
            reverse_annealed_importance_sampling(model, samples, generator=generator(), **options)


def test_further_refusals() -> None:
    for kind in ("GaussianRBM", "GaussianDBM"):
        with pytest.raises(ValueError, match="are Gaussian; leave `base` out"):
            annealed_importance_sampling(machine(kind), base=torch.zeros(3), generator=generator())
    with pytest.raises(ValueError, match=r"shape \(n, 5\), got \(2, 6\)"):
        reverse_annealed_importance_sampling(
            machine("RBM"), torch.zeros(2, 6), generator=generator()
        )
    with pytest.raises(ValueError, match="the number of samples must be at least 1"):
        reverse_annealed_importance_sampling(
            machine("RBM"), torch.zeros(0, 5), generator=generator()
        )


# ---------------------------------------------------------------------- likelihoods and bounds


def test_log_likelihood_is_exact_where_log_z_enumerates() -> None:
    model = machine("DBM")
    v = (torch.rand(9, 6, generator=generator()) < 0.5).double()
    want = model.log_likelihood(v).mean().item()
    assert log_likelihood(model, v) == pytest.approx(want, abs=1e-12)
    estimate = LogPartition(torch.full((3,), 2.0, dtype=torch.float64), 10)
    want = -model.free_energy(v).mean().item() - 2
    assert log_likelihood(model, v, estimate) == pytest.approx(want, abs=1e-12)


def test_a_log_likelihood_out_of_reach_says_what_to_use() -> None:
    rbm, v = RBM(30, 26), torch.zeros(2, 30)
    with pytest.raises(ValueError, match="annealed_importance_sampling"):
        log_likelihood(rbm, v)
    assert math.isfinite(log_likelihood(rbm, v, 40.0))
    with pytest.raises(ValueError, match="`variational_lower_bound`"):
        log_likelihood(DBM(30, (26, 3)), v, 40.0)


def exact_posterior(model: Any) -> BernoulliPosterior:
    posterior = BernoulliPosterior.for_model(model)
    linear = posterior.networks[0]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(model.weight.mT)
        linear.bias.copy_(model.latent_bias)
    return posterior


@pytest.mark.parametrize("kind", ["RBM", "GaussianRBM"])
def test_the_exact_posterior_leaves_no_gap(kind: str) -> None:
    model = machine(kind)
    v = (torch.rand(9, model.visible_dim, generator=generator()) < 0.5).double()
    found = variational_lower_bound(
        model, exact_posterior(model), v, model.log_partition(), generator=generator()
    )
    assert found.gap == pytest.approx(0, abs=1e-12)
    assert found.value == pytest.approx(log_likelihood(model, v), abs=1e-12)
    assert found.standard_error < 1e-12


@pytest.mark.parametrize("kind", ["RBM", "DBM"])
def test_the_gap_is_the_divergence_of_the_posterior(kind: str) -> None:
    model = machine(kind)
    posterior = BernoulliPosterior.for_model(model, generator=generator(3))
    v = (torch.rand(6, 6, generator=generator()) < 0.5).double()
    h = states(sum(model.latent_dims), 0, 2 ** sum(model.latent_dims), v)
    divergence = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row in v.split(1):
            rows = row.expand(len(h), -1)
            log_q = posterior.log_prob(rows, h)
            log_p = (-model(rows, h)).log_softmax(0)
            divergence += (log_q.exp() * (log_q - log_p)).sum() / len(v)
    found = variational_lower_bound(
        model, posterior, v, model.log_partition(), generator=generator(), num_samples=2000
    )
    assert found.gap is not None
    assert found.gap > 0
    assert abs(found.gap - divergence.item()) < 4 * found.standard_error < 0.1
    assert found.value + found.gap == pytest.approx(log_likelihood(model, v), abs=1e-9)


def test_a_gap_that_cannot_be_computed_is_none() -> None:
    model = DBM(6, (16, 2))
    found = variational_lower_bound(
        model,
        BernoulliPosterior.for_model(model),
        torch.zeros(2, 6),
        10.0,
        generator=generator(),
        num_samples=1,
    )
    assert found.gap is None
    assert found.standard_error == math.inf
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        variational_lower_bound(
            model,
            BernoulliPosterior.for_model(model),
            torch.zeros(2, 6),
            10.0,
            generator=generator(),
            num_samples=0,
        )


def test_advil_13_half_the_log_of_the_mean_square_is_above_log_z() -> None:
    table = torch.randn(6, 5, generator=generator(1), dtype=torch.float64)
    energy = TabularEnergy(table)
    log_z = (-table).flatten().logsumexp(0).item()
    for seed in range(5):
        q = TabularJoint(torch.randn(6, 5, generator=generator(seed), dtype=torch.float64))
        above = chi_square_upper_bound(energy, q, generator=generator(), num_samples=1)
        below = sampler_lower_bound(energy, q, generator=generator(), num_samples=1)
        assert below.value < log_z < above.value
        log_q = q.logits.detach().flatten().log_softmax(0)
        want = 0.5 * (-2 * table.flatten() - log_q).logsumexp(0).item()
        assert above.value == pytest.approx(want, abs=1e-12)
    perfect = TabularJoint(-table)
    for bound in (chi_square_upper_bound, sampler_lower_bound):
        found = bound(energy, perfect, generator=generator(), num_samples=1)
        assert found.value == pytest.approx(log_z, abs=1e-12)
        assert found.standard_error == 0


@pytest.mark.parametrize("prior", ["gaussian", "bernoulli"])
def test_advil_14_the_sampler_bounds_log_z_on_both_sides(prior: Any) -> None:
    """With the auxiliary r(z|h) too, trained or not; the draws are many enough for the upper one."""
    model = machine("RBM", scale=0.3)
    joint = HierarchicalJoint.for_model(model, prior=prior, latent_dim=2, hidden=3)
    log_z = model.log_partition().item()
    below = sampler_lower_bound(model, joint, generator=generator(), num_samples=20_000)
    above = chi_square_upper_bound(model, joint, generator=generator(), num_samples=20_000)
    assert below.value + 3 * below.standard_error < log_z
    assert above.value - 3 * above.standard_error > log_z
    assert above.standard_error < 0.2
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        chi_square_upper_bound(model, joint, generator=generator(), num_samples=0)


# ---------------------------------------------------------------------- impossible likelihoods


def test_advil_12_the_base_rate_of_the_digits_is_where_likelihoods_start() -> None:
    table = load_table("digits")
    train, test = table.train.double(), table.test.double()
    model = RBM(64, 15, grey=True).double()
    base = model.base_rate(train)
    with torch.no_grad():
        model.weight.zero_()
        model.visible_bias.copy_(base)
    found = log_likelihood(model, test)
    assert found == pytest.approx(-30.90, abs=0.01)
    estimate = annealed_importance_sampling(
        model, temperatures=10, num_chains=3, base=base, generator=generator()
    )
    assert log_likelihood(model, test, estimate) == pytest.approx(found, abs=1e-9)


def test_bism_15_no_likelihood_on_the_checkerboard_beats_its_entropy() -> None:
    g = generator()
    v = 0.5 * torch.rand(2000, 2, generator=g, dtype=torch.float64)
    v[1000:] += 0.5
    model = GaussianRBM(2, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (-model.log_likelihood(v).mean()).backward()
        optimizer.step()
    found = log_likelihood(model, v)
    assert -0.3 < found < 0.36 < math.log(2)
