"""The networks of BiDVL by image shape: sizes, shapes, normalisation, precision."""

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, relu

from bilevel.methods.networks import convolutional as networks
from bilevel.methods.networks import residual as resnets
from bilevel.methods.networks.convolutional import (
    Energy,
    Generator,
    JointEnergy,
    Posterior,
    parameter_count,
)
from bilevel.methods.networks.residual import ResidualEnergy, ResidualGenerator, ResidualPosterior
from bilevel.methods.networks.spectral_norm import SpectralNorm

PUBLISHED = {  # energy, posterior, generator; `None`: not in the official code
    ("conv", 32): (7_385_665, 2_780_024, 4_452_963),
    ("conv", 64): (29_670_977, 8_728_952, 16_866_147),
    ("conv", 128): (118_806_081, 30_063_992, 65_285_475),
    ("resnet", 32): (1_053_825, 1_086_720, 4_276_739),
    ("resnet", 64): (10_141_441, None, None),
    ("resnet", 128): (29_017_857, 29_278_976, 32_150_787),
}


def make(family, side):
    shape = (3, side, side)
    if family == "conv":
        return Energy(shape), Posterior(shape, 100), Generator(shape, 100)
    return ResidualEnergy(shape), ResidualPosterior(shape), ResidualGenerator(shape)


def small(network, shape=(1, 8, 8)):
    torch.manual_seed(0)
    if network in (Energy, Posterior, Generator):
        return network(shape, *([3] if network is not Energy else []), width=4).double()
    return network(shape, *([3] if network is not ResidualEnergy else []), width=0.05).double()


def images(n=3, shape=(1, 8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape, generator=generator, dtype=dtype) * 2 - 1


def spectral_norms(network):
    return [m for m in network.modules() if isinstance(m, SpectralNorm)]


@pytest.mark.parametrize(("family", "side"), PUBLISHED)
def test_a20_parameter_counts(family, side):
    with torch.device("meta"):
        counts = tuple(parameter_count(network) for network in make(family, side))
    expected = PUBLISHED[family, side]
    assert [a for a, b in zip(counts, expected, strict=True) if b not in (None, a)] == []


def test_spectral_norm_adds_no_parameter():
    layer = networks.normed(nn.Conv2d(3, 5, 4))
    assert parameter_count(layer) == 3 * 5 * 16 + 5


def test_joint_energy_has_the_published_parameters():
    assert parameter_count(JointEnergy((3, 32, 32), 100)) == 8_701_633


def test_joint_energy_depends_on_images_and_latents():
    generator = torch.Generator().manual_seed(0)
    energy = JointEnergy((1, 8, 8), 3, width=4).double()
    v = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    h = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    energies = energy(v, h)
    assert energies.shape == (5,)
    assert energies.min() >= 0
    for gradient in torch.autograd.grad(energies.sum(), (v, h)):
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


# ---------------------------------------------------------------------- spectral norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_spectral_norm_divides_by_the_largest_singular_value(kind, layout):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3) if kind == "conv" else nn.Linear(7, 5)
    weight = layer.weight.detach().clone()
    layer = networks.normed(layer).to(memory_format=layout)
    for _ in range(200):
        normed = layer.weight
    largest = torch.linalg.matrix_norm(weight.flatten(1), 2)
    torch.testing.assert_close(normed, weight / largest, rtol=1e-5, atol=1e-6)


def test_spectral_norm_has_the_gradient_of_the_quotient():
    torch.manual_seed(0)
    layer = networks.normed(nn.Conv2d(2, 3, 3)).double().eval()
    (norm,) = spectral_norms(layer)
    weight = layer.parametrizations.weight.original
    factors = torch.rand_like(weight)
    (gradient,) = torch.autograd.grad((layer.weight * factors).sum(), weight)
    # d/dW <C, W / s> = C / s - <C, W> / s^2 * u v^T, s = u^T W v
    outer = torch.outer(norm._u, norm._v).view(3, 3, 3, 2).permute(0, 3, 1, 2)
    s = (outer * weight).sum()
    expected = factors / s - (factors * weight).sum() / s**2 * outer
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_two_passes_before_one_backward():
    energy = small(Energy)
    first, second = energy(images()), energy(images() / 2)
    (first - second).mean().backward()
    assert all(p.grad.isfinite().all() for p in energy.parameters())


# ---------------------------------------------------------------------- residual networks


def test_a_residual_energy_is_the_published_one_step_by_step():
    """In-place relu before the shortcut, convolution before pooling, sum over the pixels."""
    energy = small(ResidualEnergy, (1, 16, 16)).eval()
    v = images(shape=(1, 16, 16))

    def apply(layer, x):
        return conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)

    first, *blocks, _ = energy.trunk.blocks
    y = apply(first.residual[2], relu(apply(first.residual[0], v)))
    x = avg_pool2d(y, 2) + apply(first.shortcut, avg_pool2d(v, 2))
    for block in blocks:
        y = x.relu_()  # in place: x has changed
        y = apply(block.residual[2], apply(block.residual[0], y).relu_())
        if not isinstance(block.shortcut, nn.Identity):
            x = apply(block.shortcut, x)
        x, y = (avg_pool2d(x, 2), avg_pool2d(y, 2)) if block.halves else (x, y)
        x = x + y
    features = x.relu().sum((2, 3))
    expected = features @ energy.top.weight.T + energy.top.bias
    torch.testing.assert_close(energy(v), expected[:, 0], rtol=1e-12, atol=1e-12)


def test_a_residual_generators_shortcut_may_be_taken_before_the_interpolation():
    generator = small(ResidualGenerator).eval()
    block = generator.blocks[0]
    x = torch.randn(2, block.before[0].num_features, 4, 4, dtype=torch.float64)

    def doubled(y):
        return interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)

    expected = block.residual(doubled(block.before(x))) + block.shortcut(doubled(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_a_residual_posterior_is_no_wider_than_the_prior():
    posterior = small(ResidualPosterior)
    mean, log_variance = posterior(100 * images())
    assert mean.shape == log_variance.shape == (3, 3)
    assert log_variance.max() < 0


@pytest.mark.parametrize(("side", "bias"), [(32, True), (128, False)])
def test_heads_have_the_published_biases(side, bias):
    posterior = ResidualPosterior((3, side, side), width=0.02)
    assert (posterior.mean.bias is not None) == bias
    assert ResidualEnergy((3, side, side), width=0.02).top.bias is not None


def test_initial_weights_of_residual_networks_are_xavier_before_the_norm():
    torch.manual_seed(0)
    energy = ResidualEnergy((3, 32, 32), width=0.25)
    block = energy.trunk.blocks[1]
    for layer, gain in ((block.residual[0], 2**0.5), (block.shortcut, 1.0), (energy.top, 1.0)):
        weight = layer.parametrizations.weight.original.detach()
        fans = weight[0].numel() + weight[:, 0].numel()
        bound = gain * (6 / fans) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound


def test_sides_without_a_table_are_refused():
    with pytest.raises(ValueError, match=r"no residual networks for images of side 256.*resize"):
        ResidualEnergy((3, 256, 256))
    with pytest.raises(ValueError, match="`width` must be positive, got 0"):
        ResidualGenerator((3, 32, 32), width=0)


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64, 128])
def test_residual_networks_of_every_side_fit_together(side):
    shape = (3, side, side)
    torch.manual_seed(0)
    energy, posterior, generator = resnets.residual_networks(shape, 5, width=0.02)
    with torch.no_grad():
        made = generator(torch.randn(2, 5))
        assert made.shape == (2, *shape)
        assert made.abs().max() <= 1
        assert energy(made).shape == (2,)
        assert posterior(made)[0].shape == (2, 5)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("network", [Energy, ResidualEnergy, Posterior, ResidualPosterior])
def test_heads_and_norms_stay_in_float32_under_autocast(network):
    net = small(network).float().eval()
    v = images(dtype=torch.float32)
    weights = [m.weight.clone() for m in net.modules() if hasattr(m, "parametrizations")]
    assert bool(weights) == (network is not Posterior)
    exact = net(v)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(v)
        there = [m.weight for m in net.modules() if hasattr(m, "parametrizations")]
    assert all(a.equal(b) for a, b in zip(weights, there, strict=True))
    for part, truth in zip(rough, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, truth, rtol=0.05, atol=0.05)  # bfloat16 before the head


@pytest.mark.parametrize("network", [Generator, ResidualGenerator])
def test_images_are_float32_under_autocast(network):
    net = small(network).float()
    h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    exact = net(h)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(h)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)  # bfloat16: 8 bits
