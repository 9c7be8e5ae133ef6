"""Langevin dynamics and Hamiltonian Monte Carlo: laws of the steps, and of what the chains are of."""

import math
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.methods.samplers import HamiltonianMonteCarlo, Langevin, Sampler
from bilevel.methods.samplers.base import Target
from bilevel.methods.samplers.hamiltonian import Phase, leapfrog
from bilevel.methods.samplers.slopes import energies_and_slopes

MEAN = torch.tensor([1.0, -2.0]).double()
PRECISION = torch.tensor([[2.0, 0.6], [0.6, 0.5]]).double()
COVARIANCE = PRECISION.inverse()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(v: Tensor) -> Tensor:
    z = v - MEAN
    return 0.5 * ((z @ PRECISION) * z).sum(1)


def quartic(v: Tensor) -> Tensor:
    """No straight line anywhere, and two wells in each coordinate."""
    return (v.square() - 1).square().sum(1) + 0.3 * v.prod(1)


def mixture(v: Tensor) -> Tensor:
    """A lopsided pair of Gaussians on the line."""
    x = v[:, 0]
    parts = torch.stack([-((x + 1) ** 2) / 0.5, math.log(0.5) - (x - 0.8) ** 2 / 0.18])
    return -parts.logsumexp(0)


def shares(energy: Any, edges: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the density on the line, how much lies between the edges, by quadrature."""
    points = torch.linspace(float(edges[0]), float(edges[-1]), 20_001).double()
    mass = (-energy(points[:, None]) / temperature).exp()
    cell = torch.bucketize(points, edges[1:-1])
    return torch.zeros(len(edges) - 1).double().index_add(0, cell, mass) / mass.sum()


def assert_drawn(found: Tensor, expected: Tensor, n: int, loss: float = 1.0) -> None:
    """Shares of n draws, worth n / `loss` independent ones, within four deviations."""
    deviation = (expected * (1 - expected) * loss / n).sqrt()
    assert bool(((found - expected).abs() < 4 * deviation + 1e-3).all())


# ---------------------------------------------------------------------- the steps


def test_a_langevin_step_is_the_formula() -> None:
    v = torch.randn(5, 2, generator=rng()).double()
    sampler = Langevin(num_steps=1, step_size=0.03, temperature=0.25)
    (state,) = sampler.steps(gaussian, v, rng(1))
    noise = torch.randn(5, 2, generator=rng(1), dtype=v.dtype)
    slope = (v - MEAN) @ PRECISION
    expected = v - 0.03 * slope + math.sqrt(2 * 0.03 * 0.25) * noise
    torch.testing.assert_close(state.visible, expected)
    torch.testing.assert_close(state.energy, gaussian(expected))
    assert state.accepted.all()


def test_the_metropolis_test_of_langevin_is_its_ratio_of_densities() -> None:
    """Of the proposals q(v'|v) = N(v - eta E'(v), 2 eta T), whatever way it is computed."""
    eta, temperature, n = 0.2, 0.7, 400
    v = 1.5 * torch.randn(n, 2, generator=rng()).double()
    sampler = Langevin(1, eta, temperature, metropolis=True)
    (state,) = sampler.steps(quartic, v, g := rng(1))
    noise = torch.randn(n, 2, generator=(h := rng(1)), dtype=v.dtype)
    luck = torch.rand(n, generator=h, dtype=v.dtype)
    assert torch.equal(g.get_state(), h.get_state())

    def drift(x: Tensor) -> Tensor:
        return x - eta * energies_and_slopes(quartic, x)[1]

    proposal = drift(v) + math.sqrt(2 * eta * temperature) * noise
    forth, back = (proposal - drift(v)), (v - drift(proposal))
    ratio = -(quartic(proposal) - quartic(v)) / temperature
    ratio = ratio + (forth.square().sum(1) - back.square().sum(1)) / (4 * eta * temperature)
    taken = luck.log() < ratio
    assert 0.2 < taken.double().mean() < 0.95
    assert torch.equal(state.accepted, taken)
    torch.testing.assert_close(state.visible, torch.where(taken[:, None], proposal, v))


def phase(n: int, limits: tuple[float, float] | None = None) -> tuple[Target, Phase]:
    target = Target(quartic, limits)
    v, p = torch.randn(2, n, 2, generator=rng(), dtype=torch.float64)
    v = target.reflected(v)[0]
    return target, Phase(v, p, *target.at(v))


@pytest.mark.parametrize("limits", [None, (-0.5, 1.2)])
def test_leapfrog_paths_are_their_own_reverse(limits: tuple[float, float] | None) -> None:
    target, begin = phase(50, limits)
    end = leapfrog(target, begin, 0.05, 30)
    assert (end.visible - begin.visible).abs().mean() > 0.2
    back = leapfrog(target, end._replace(momentum=-end.momentum), 0.05, 30)
    torch.testing.assert_close(back.visible, begin.visible, rtol=0, atol=1e-9)
    torch.testing.assert_close(back.momentum, -begin.momentum, rtol=0, atol=1e-9)


def test_leapfrog_keeps_the_energy_to_second_order() -> None:
    target, begin = phase(50)

    def drift(size: float) -> float:
        end = leapfrog(target, begin, size, round(1 / size))
        kinetic = 0.5 * (end.momentum.square() - begin.momentum.square()).sum(1)
        return float((end.energy - begin.energy + kinetic).abs().mean())

    assert math.log2(drift(0.01) / drift(0.005)) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("limits", [None, (-0.9, 1.1)])
def test_leapfrog_preserves_volume(limits: tuple[float, float] | None) -> None:
    target, begin = phase(3, limits)

    def moved(flat: Tensor) -> Tensor:
        v, p = flat.view(2, 1, 2)
        end = leapfrog(target, Phase(v, p, *target.at(v)), 0.1, 7)
        return torch.cat([end.visible, end.momentum]).flatten()

    for v, p in zip(begin.visible, begin.momentum, strict=True):
        at, h = torch.cat([v, p]), 1e-6
        columns = [(moved(at + h * e) - moved(at - h * e)) / (2 * h) for e in torch.eye(4).double()]
        assert float(torch.stack(columns).det()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("metropolis", [True, False])
def test_small_steps_are_all_taken(metropolis: bool) -> None:
    start = torch.randn(500, 2, generator=rng()).double()
    langevin = Langevin(10, 1e-6, metropolis=metropolis).run(quartic, start, rng())
    hamiltonian = HamiltonianMonteCarlo(5, 1e-3, 5).run(quartic, start, rng())
    assert langevin.acceptance.mean() > 0.999
    assert hamiltonian.acceptance.mean() > 0.999


# ---------------------------------------------------------------------- what the chains are of


@pytest.mark.parametrize(
    "sampler",
    [HamiltonianMonteCarlo(12, 0.6, 4), Langevin(80, 0.3, metropolis=True), Langevin(150, 0.15)],
    ids=repr,
)
def test_chains_of_a_gaussian_have_its_moments(sampler: Sampler) -> None:
    """Of unadjusted Langevin dynamics those of its recursion, whose covariance is known too."""
    n = 4000
    draws = sampler.run(gaussian, torch.zeros(n, 2).double(), rng(3))
    covariance = COVARIANCE
    if isinstance(sampler, Langevin) and not sampler.metropolis:
        # x <- x - eta A x + sqrt(2 eta) eps rests at the inverse of A (1 - eta A / 2)
        eye = torch.eye(2).double()
        covariance = (PRECISION @ (eye - sampler.step_size * PRECISION / 2)).inverse()
    deviation = covariance.diagonal().sqrt()
    assert bool(((draws.visible.mean(0) - MEAN).abs() < 4 * deviation / math.sqrt(n)).all())
    spread = torch.outer(deviation, deviation) * math.sqrt(2 / n)
    assert bool(((draws.visible.T.cov() - covariance).abs() < 4 * spread).all())


@pytest.mark.parametrize(
    ("sampler", "temperature"),
    [
        (HamiltonianMonteCarlo(8, 0.35, 4), 1.0),
        (Langevin(25, 0.15, metropolis=True), 1.0),
        (Langevin(25, 0.15, 2.0, metropolis=True), 2.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("limits", [None, (-1.2, 1.0)])
def test_tested_chains_leave_the_density_as_it_is(
    sampler: Sampler, temperature: float, limits: tuple[float, float] | None
) -> None:
    """A step so long that it is often refused, from exact draws: also where walls turn it back."""
    n = 10_000
    low, high = limits or (-5.0, 4.0)
    edges = torch.linspace(low, high, 25).double()
    expected = shares(mixture, edges, temperature)
    fine = torch.linspace(low, high, 4001).double()
    mass = (-mixture(fine[:, None]) / temperature).exp()
    start = fine[torch.multinomial(mass, n, replacement=True, generator=rng(1))][:, None]
    draws = sampler.run(mixture, start, rng(2), limits=limits)
    assert 0.3 < draws.acceptance.mean() < 0.995
    found = torch.histogram(draws.visible[:, 0], edges).hist / n
    assert_drawn(found, expected, n)
    assert not torch.equal(draws.visible, start)
    assert draws.visible.min() >= low
    assert draws.visible.max() <= high


def test_walls_turn_unadjusted_chains_back() -> None:
    """Of a flat energy on a box they are even over it."""
    start = torch.zeros(8000, 1).double()
    draws = Langevin(40, 0.3).run(lambda v: 0 * v.sum(1), start, rng(), limits=(-0.5, 2.0))
    found = torch.histogram(draws.visible[:, 0], torch.linspace(-0.5, 2, 11).double()).hist / 8000
    assert_drawn(found, torch.full((10,), 0.1).double(), 8000)


def test_without_noise_langevin_descends() -> None:
    draws = Langevin(300, 0.3, temperature=0.0).run(gaussian, torch.zeros(3, 2).double(), rng())
    torch.testing.assert_close(draws.visible, MEAN.expand(3, 2), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- how they are used


def test_steps_are_what_a_run_ends_with() -> None:
    sampler, start = HamiltonianMonteCarlo(6, 0.5, 3), torch.zeros(40, 2).double()
    states = list(sampler.steps(quartic, start, rng(1)))
    draws = sampler.run(quartic, start, rng(1))
    assert len(states) == 6
    assert torch.equal(draws.visible, states[-1].visible)
    assert torch.equal(draws.energy, states[-1].energy)
    rate = torch.stack([state.accepted for state in states]).float().mean(0)
    torch.testing.assert_close(draws.acceptance, rate)
    early = list(islice(sampler.steps(quartic, start, rng(1)), 2))
    assert torch.equal(early[-1].visible, states[1].visible)
    assert repr(draws).startswith("ChainEnds((40, 2), energy=")


def test_chains_do_not_know_each_other() -> None:
    """Many are taken in parts; a NaN of one is refused and leaves the others alone."""
    torn = torch.zeros(4500, 1).double()
    torn[7] = 5.0

    def energy(v: Tensor) -> Tensor:
        return torch.where(v[:, 0].abs() > 4, 1e3 * v[:, 0].abs(), v[:, 0].square() / 2)

    def broken(v: Tensor) -> Tensor:
        return energy(v) + torch.where(v[:, 0] > 5.0, torch.nan, 0.0)

    sampler = HamiltonianMonteCarlo(3, 0.1, 2)
    with pytest.warns(
        UserWarning, match=r"took 0.0% of the proposals, and 4500 of 4500 never moved"
    ):
        one = HamiltonianMonteCarlo(3, 500.0, 2).run(broken, torn, rng())
    assert one.visible.isfinite().all()
    whole, calm = (sampler.run(f, torn[8:], rng()).visible for f in (energy, broken))
    torch.testing.assert_close(whole, calm)


def test_an_energy_that_is_none_is_refused() -> None:
    v, sampler = torch.zeros(3, 2), Langevin(2, 0.1)
    with pytest.raises(ValueError, match=r"one number per row.*\(3, 2\) for 3 rows"):
        sampler.run(lambda v: v.square(), v)
    with pytest.raises(ValueError, match="no gradient in its input"):
        sampler.run(lambda v: v.detach().sum(1), v)
    with pytest.raises(ValueError, match="`start` must be floating-point rows"):
        sampler.run(lambda v: v.sum(1), v.long())
    with pytest.raises(FloatingPointError, match=r"2 of 3 chains begin \(the first is row 0\)"):
        sampler.run(lambda v: v.sum(1) / v[:, 0], torch.tensor([[0.0, 0], [0, 1], [1, 1]]))


def test_chains_that_leave_all_bounds_are_a_sentence() -> None:
    with pytest.raises(
        FloatingPointError, match="4 of 4 chains left all bounds by step 100 of `Lan"
    ):
        Langevin(200, 3.0).run(lambda v: v.square().sum(1), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Langevin(0, 0.1), ValueError, "`num_steps` must be positive"),
        (lambda: Langevin(5, -0.1), ValueError, "`step_size` must be positive"),
        (lambda: Langevin(5, 0.1, 0.0, metropolis=True), ValueError, "`temperature` must be"),
        (lambda: Langevin(5, 0.1, metropolis="yes"), TypeError, "`metropolis` must be"),
        (lambda: HamiltonianMonteCarlo(5, 0.1, 2.5), TypeError, "`num_leapfrog` must be a whole"),
        (lambda: HamiltonianMonteCarlo(5, 0.0), ValueError, "`step_size` must be positive"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
