"""Log Z from annealed importance sampling, from below and from above, against enumeration."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from bilevel.methods.likelihood import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket,
    exact_samples,
    gibbs_samples,
    linear_schedule,
    reverse_annealed_importance_sampling,
    salakhutdinov_schedule,
)
from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import RBM, GaussianRBM
from tests.devices import DEVICES, generator
from tests.methods.likelihood.cases import KINDS, base_of, machine, randomized

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
    copies = RBM(5, 5).double()  # latents copy visibles and visibles latents, so chains stand still
    with torch.no_grad():
        copies.weight.copy_(80 * torch.eye(5))
        copies.visible_bias.fill_(-40)
        copies.latent_bias.fill_(-40)
    rows = torch.eye(5, dtype=torch.float64)[:3]
    h1 = gibbs_samples(copies, rows, 8, 2, generator())
    assert h1.equal(rows[[0, 1, 2, 0, 1, 2, 0, 1]])
    model = machine("DBM")
    assert gibbs_samples(model, torch.ones(3, 6).double(), 8, 2, generator()).shape == (8, 5)
    with pytest.raises(ValueError, match="number of rows of `data` must be at least 1, got 0"):
        gibbs_samples(model, torch.ones(0, 6), 8, 2, generator())


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
