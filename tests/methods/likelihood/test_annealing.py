"""Annealed chains: their weights, their marginals, their numbers."""

import pytest
import torch

from bilevel.methods.likelihood import exact_samples
from bilevel.methods.likelihood.annealing import AnnealedChains, Uniforms
from bilevel.methods.machines.enumeration import states
from tests.devices import generator
from tests.methods.likelihood.cases import KINDS, base_of, machine


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
