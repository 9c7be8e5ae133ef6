"""The deep energies of BiSM and VaGES: their layers by the published tables."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, elu

from bilevel.methods.bism import BiSM
from bilevel.methods.networks.convolutional import parameter_count
from bilevel.methods.networks.deep import ConvMoments, DeepCoupledEnergy, DeepEnergy, trunk
from tests.methods.deep_cases import SHAPE, SMALL, TIGHT, images, normal, small


def published_count(channels: int, side: int, width: int, blocks: int, latent_dim: int) -> int:
    """Weights and biases of the layer table, block by block."""

    def block(c: int, wide: int) -> int:
        return 9 * c * c + (9 * c * wide + wide) + (c * wide + wide)

    total = 9 * channels * width + width
    for stage in range(3):
        c = width * 2**stage
        total += block(c, 2 * c) + (blocks - 1) * block(2 * c, 2 * c)
    features, head = 8 * width * (side // 8) ** 2, 4 * width * (side // 8) ** 2
    return total + (features + 1) * latent_dim + (2 * latent_dim + 1) * head


@pytest.mark.parametrize(
    ("shape", "width", "blocks"),
    [((1, 32, 32), 64, 2), ((3, 32, 32), 128, 3), ((3, 64, 64), 16, 3), ((1, 28, 28), 8, 2)],
)
def test_parameters_are_those_of_the_layer_table(
    shape: tuple[int, int, int], width: int, blocks: int
) -> None:
    with torch.device("meta"):
        made = DeepCoupledEnergy(shape, 50, width, blocks)
    assert parameter_count(made) == published_count(shape[0], shape[1], width, blocks, 50)


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_networks_take_images_of_any_side(side: int) -> None:
    v, h = torch.zeros(2, 3, side, side), torch.zeros(2, 3)
    assert trunk((3, side, side), 2, 2)(v).shape == (2, 16, side // 8, side // 8)
    assert DeepCoupledEnergy((3, side, side), 3, 2)(v, h).shape == (2,)
    assert DeepEnergy((3, side, side), 2)(v).shape == (2,)
    mean, log_variance = ConvMoments((3, side, side), 3, 2)(v)
    assert mean.shape == log_variance.shape == (2, 3)


@pytest.mark.parametrize("side", [7, 8])
def test_halving_convolution_is_a_convolution_and_a_mean(side: int) -> None:
    """Its value, and its second derivatives, which score matching needs."""
    block: Any = trunk(SHAPE, 3, 2)[1]
    layer = block.second.double()
    x = normal(2, 3, side, side).requires_grad_()
    weight, bias = layer.weight, layer.bias
    plain = avg_pool2d(conv2d(x, weight, bias, padding=1), 2)
    torch.testing.assert_close(layer(x), plain, **TIGHT)
    answers = []
    for y in (layer(x), plain):
        (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        answers.append(torch.autograd.grad(slope.square().sum(), (weight, bias, x)))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


def test_energy_is_the_formula() -> None:
    made = DeepCoupledEnergy(SHAPE, 3, 2).double()
    v, h = images(), normal(6, 4, 3)
    x = (v + 1) / 2
    for layer in made.trunk:
        if isinstance(layer, nn.Conv2d):
            x = layer(x)
            continue
        y = conv2d(elu(x), layer.first.weight, padding=1)
        y = conv2d(elu(y), layer.second.weight, layer.second.bias, padding=1)
        x = y + layer.shortcut(x) if not layer.halve else avg_pool2d(y + layer.shortcut(x), 2)
    f = x.flatten(1) @ made.project.weight.mT + made.project.bias
    for i in range(4):
        pair = torch.cat([f + h[:, i], h[:, i]], 1)
        expected = elu(pair @ made.head.weight.mT + made.head.bias).square().sum(1)
        torch.testing.assert_close(made(v, h[:, i]), expected, **TIGHT)
        several = made.coupled(made.features(v)[:, None], h)
        torch.testing.assert_close(several[:, i], expected, **TIGHT)


def test_posterior_has_the_networks_deviation() -> None:
    made = small(BiSM)
    v, network = images(), made.encoder.network
    log_std = network.log_std(network.trunk((v + 1) / 2).flatten(1))
    torch.testing.assert_close(made.posterior(v).stddev, log_std.exp().detach(), **TIGHT)


def test_seed_decides_the_weights_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other, third = (BiSM.for_images(SHAPE, **SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first = "upper.model.trunk.0.weight"
    states = [made.state_dict()[first] for made in (one, other, third)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
