"""Densities on the plane: sampled, evaluated and integrated, three ways that must agree."""

import math

import pytest
import torch
from torch import Tensor

from bilevel.methods.data.densities import (
    DENSITIES,
    Density2D,
    GaussianMixture2D,
    UniformSquares,
    blobs,
    checkerboard,
    circle,
    density,
)

ROWS = 20_000
BOARDS = [name for name in DENSITIES if name.startswith("checkerboard")]
MIXTURES = [name for name in DENSITIES if name not in BOARDS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(step: float) -> Tensor:
    """Centres of the cells of a grid that holds all but 1e-12 of every density, float64."""
    axis = torch.arange(-0.375, 1.375, step, dtype=torch.float64) + step / 2
    return torch.cartesian_prod(axis, axis)


@pytest.mark.parametrize("name", DENSITIES)
def test_density_integrates_to_one(name: str) -> None:
    step = 1 / 64  # the edges of every board are edges of the cells
    mass = density(name).log_prob(cells(step)).exp().sum() * step**2
    assert mass == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("name", DENSITIES)
def test_entropy_is_the_mean_of_minus_log_prob(name: str) -> None:
    truth = density(name)
    log_prob = truth.log_prob(truth.sample(ROWS, seeded()).double())
    error = log_prob.std() / math.sqrt(ROWS)
    assert abs(log_prob.mean() + truth.entropy) <= 4 * error + 1e-12
    assert error < 0.01


@pytest.mark.parametrize("name", MIXTURES)
def test_entropy_is_the_integral_over_another_grid(name: str) -> None:
    step, truth = 1 / 128, density(name)
    log_prob = truth.log_prob(cells(step))
    assert -(log_prob.exp() * log_prob).sum() * step**2 == pytest.approx(truth.entropy, abs=1e-8)


@pytest.mark.parametrize("name", MIXTURES)
def test_quadrature_has_converged(name: str) -> None:
    truth = density(name)
    assert isinstance(truth, GaussianMixture2D)
    assert truth._integral(torch.special.entr, 12) == pytest.approx(truth.entropy, abs=1e-11)
    assert truth._integral(torch.clone, 6) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_fill_the_cells_as_the_density_says(name: str) -> None:
    """Counts in squares of side 1/4 against the integral of p over them."""
    truth, fine = density(name), 1 / 64
    v = truth.sample(ROWS, seeded(1)).double()

    def counts(points: Tensor, weights: Tensor) -> Tensor:
        squares = ((points + 0.5) * 4).floor().long().clamp(0, 7)  # 0.25 wide
        flat = torch.zeros(64, dtype=torch.float64)
        return flat.index_add(0, squares[:, 0] * 8 + squares[:, 1], weights)

    centres = cells(fine)
    expected = ROWS * counts(centres, truth.log_prob(centres).exp() * fine**2)
    found = counts(v, torch.ones(ROWS, dtype=torch.float64))
    likely = expected > 5
    statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = int(likely.sum())
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)
    assert found[~likely].sum() < 5 + 2 * expected[~likely].sum()


@pytest.mark.parametrize("name", DENSITIES)
def test_same_seed_same_points(name: str) -> None:
    one, two, other = (density(name).sample(50, seeded(seed)) for seed in (3, 3, 4))
    assert one.shape == (50, 2)
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_checkerboard_is_uniform_on_two_squares_with_ceiling_log_2() -> None:
    board = checkerboard()
    assert board.entropy == pytest.approx(-math.log(2), abs=1e-15)
    v = torch.tensor([[0.2, 0.4], [0.7, 0.9], [1.0, 1.0], [0.2, 0.6], [0.7, 0.1], [1.1, 0.9]])
    expected = torch.tensor([math.log(2)] * 3 + [-math.inf] * 3, dtype=torch.float64)
    torch.testing.assert_close(board.log_prob(v.double()), expected, atol=1e-15, rtol=0)
    inside = board.sample(ROWS, seeded())
    assert torch.isfinite(board.log_prob(inside)).all()
    assert (inside.amin(), inside.amax()) == (
        pytest.approx(0, abs=0.01),
        pytest.approx(1, abs=0.01),
    )
    assert checkerboard(4).entropy == pytest.approx(-math.log(2), abs=1e-15)


def test_one_gaussian_has_its_textbook_entropy() -> None:
    one = GaussianMixture2D("one", torch.zeros(1, 2, dtype=torch.float64), 0.3)
    assert one.entropy == pytest.approx(1 + math.log(2 * math.pi * 0.09), abs=1e-12)
    v = torch.randn(5, 2, dtype=torch.float64, generator=seeded())
    normal = torch.distributions.Normal(0, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(one.log_prob(v), normal.log_prob(v).sum(1), atol=1e-12, rtol=0)


def test_distant_blobs_have_log_k_more_entropy_than_one() -> None:
    means = torch.tensor([[0, 0], [0, 9], [9, 0.0]], dtype=torch.float64)
    three = GaussianMixture2D("three", means, 0.3)
    assert three.entropy == pytest.approx(math.log(3) + 1 + math.log(2 * math.pi * 0.09), abs=1e-12)


def test_circle_is_the_blurred_continuous_circle() -> None:
    """The mixture along the curve against the Bessel function of the convolution."""
    truth, radius = circle(), 0.4
    v = truth.sample(500, seeded()).double()
    distance, s2 = (v - 0.5).norm(dim=1), truth.scale**2
    bessel = torch.special.i0e(distance * radius / s2).log()
    exact = bessel - (distance - radius) ** 2 / (2 * s2) - math.log(2 * math.pi * s2)
    torch.testing.assert_close(truth.log_prob(v), exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["circle", "rings", "moons", "swissroll"])
def test_means_along_a_curve_are_dense(name: str) -> None:
    """Every mean has another one nearer than half the blur: no beads on the string."""
    truth = density(name)
    assert isinstance(truth, GaussianMixture2D)
    distances = torch.cdist(truth.means, truth.means).fill_diagonal_(math.inf)
    second = distances.kthvalue(2, dim=1).values
    assert (distances.amin(dim=1) < truth.scale / 2).all()
    assert (second.sort().values[:-4] < truth.scale / 2).all()  # an end has one neighbour


def test_score_is_the_gradient_of_log_prob() -> None:
    truth = blobs(3)
    v = truth.sample(6, seeded()).double().requires_grad_()
    assert torch.autograd.gradcheck(truth.log_prob, (v,), atol=1e-6)


def test_log_prob_in_chunks_is_log_prob() -> None:
    truth = circle()
    v = truth.sample(20_000, seeded()).double()  # 16,384 rows have 2^22 distances: two chunks
    parts = torch.cat([truth.log_prob(part) for part in v.split(6_000)])
    torch.testing.assert_close(truth.log_prob(v), parts, atol=0, rtol=0)


GOOD = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: density("mons"), "did you mean `moons`"),
        (lambda: density("?"), "There are checkerboard"),
        (lambda: checkerboard(3), "even and positive, got 3"),
        (lambda: blobs(1), "at least 2"),
        (lambda: GaussianMixture2D("x", GOOD, 0.0), "`scale` must be positive"),
        (lambda: GaussianMixture2D("x", torch.zeros(3), 1.0), r"`means` .* shape \(3,\)"),
        (lambda: UniformSquares("x", GOOD, math.nan), "`side` must be positive"),
        (lambda: UniformSquares("x", torch.rand(2, 2), 2.0), "overlap"),
        (lambda: circle().log_prob(torch.zeros(4, 3)), r"`v` .* shape \(4, 3\)"),
        (lambda: checkerboard().log_prob(torch.zeros(4, 2).int()), "`v` .* torch.int32"),
    ],
)
def test_bad_densities_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_every_name_is_its_density_s_own() -> None:
    made = [density(name) for name in DENSITIES]
    assert all(isinstance(one, Density2D) for one in made)
    assert [one.name for one in made] == list(DENSITIES)
