"""Langevin dynamics of deep energies."""

import math

import pytest
import torch
from torch import Tensor

from bilevel.methods.bism import BiSM
from bilevel.methods.models.langevin import annealed_langevin, refined, temperatures
from bilevel.methods.vages import VaGES
from tests.devices import generator
from tests.methods.deep_cases import SHAPE, TIGHT, images, normal, small


def test_temperatures_are_the_published_ones() -> None:
    """500 at 100, 2000 geometric from 100 to 1, 200 linear from 1 to 0."""
    t = temperatures((500, 2000, 200))
    assert len(t) == 2700
    assert t[:500] == [100.0] * 500
    ratios = torch.tensor(t[500:2500]).double()
    torch.testing.assert_close(
        ratios[1:] / ratios[:-1], torch.full((1999,), 0.01**0.0005).double(), rtol=1e-6, atol=0
    )
    assert t[500] == 100.0
    assert t[2500] == 1.0
    assert t[-1] == 0.0
    assert t[2500] - t[2501] == pytest.approx(1 / 199)


def test_dynamics_have_the_moments_of_a_linear_recursion() -> None:
    """Of a Gaussian they are known: x <- (1 - s^2/2) x + sqrt(T) s eps, at last x <- (1 - d^2) x."""
    n, size, denoise, steps = 20_000, 0.4, 0.5, (5, 20, 5)
    start = torch.full((n, 2), 3.0).double()
    (x,) = annealed_langevin(
        lambda x: 0.5 * x.square().sum(1),
        [start],
        generator(),
        steps=steps,
        size=size,
        hottest=9.0,
        denoise=denoise,
    )
    mean, variance = 3.0, 0.0
    for temperature in temperatures(steps, 9.0):
        mean *= 1 - size**2 / 2
        variance = variance * (1 - size**2 / 2) ** 2 + temperature * size**2
    mean, variance = mean * (1 - denoise**2), variance * (1 - denoise**2) ** 2
    values = x.flatten()
    assert values.mean() == pytest.approx(mean, abs=4 * math.sqrt(variance / values.numel()))
    assert values.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / values.numel()))


@pytest.mark.parametrize("given", [True, False])
def test_range_of_the_visibles_is_only_a_unit(given: bool) -> None:
    """In [-1, 1] the chains are those in [0, 1], stretched; a fixed latent stays where it is."""
    made = small(BiSM)
    h, seen = normal(3, 3), []

    def energy(v: Tensor, h: Tensor) -> Tensor:
        seen.append(h)
        return made.joint_energy(v, h)

    made.visible_range = (-3.0, 5.0)
    model = made.latent_model
    one = model.langevin.visibles(energy, h, model.visibles, generator(), given=given)
    start = torch.randn(3, *SHAPE, generator=(g := generator()), dtype=torch.float64) + 0.5
    free = [] if given else [torch.randn(3, 3, generator=g, dtype=torch.float64) + 0.5]

    def scaled(x: Tensor, *free: Tensor) -> Tensor:
        return made.joint_energy(8 * x - 3, *(free or (h,)))

    x = annealed_langevin(scaled, [start, *free], g, steps=made.langevin, denoise=1 / 8)[0]
    torch.testing.assert_close(one, (8 * x - 3).clamp(-3, 5), **TIGHT)
    assert (one.abs() < 3).sum() > 0
    assert all(torch.equal(used, h) for used in seen) is given


def test_refined_latents_are_the_steps_written_out() -> None:
    made = small(VaGES)
    f = made.upper["model"].features(images())[:, None]
    h, noise = normal(6, 2, 3), normal(3, 6, 2, 3, seed=1)

    def energies(h: Tensor) -> Tensor:
        return made.upper["model"].coupled(f, h)

    expected = h
    for epsilon in noise:
        leaf = expected.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energies(leaf).sum(), leaf, retain_graph=True)
        expected = expected - 0.5 * 0.05 * slope + 0.3 * epsilon
    answer = refined(energies, h, noise, 0.05, 0.3)
    torch.testing.assert_close(answer, expected, **TIGHT)
    assert not answer.requires_grad
    assert torch.equal(refined(energies, h, noise[:0], 0.05, 0.3), h)
