"""Images out of the distribution."""

import torch

from bilevel.methods.data.images import (
    constant_images,
    inverted,
    scaled,
    shuffled_pixels,
    uniform_noise,
)
from tests.methods.data.files import some_bytes


def test_outsiders() -> None:
    v = torch.rand(5, 3, 8, 8) * 2 - 1
    seeded = [torch.Generator().manual_seed(1) for _ in range(3)]
    shuffled = shuffled_pixels(v, seeded[0])
    assert torch.equal(shuffled.flatten(2).sort().values, v.flatten(2).sort().values)
    assert not torch.equal(shuffled, v)
    pixels = {tuple(p) for p in v[0].flatten(1).T.tolist()}
    assert {tuple(p) for p in shuffled[0].flatten(1).T.tolist()} == pixels  # channels together
    assert torch.equal(shuffled_pixels(v, seeded[1]), shuffled)
    assert torch.equal(inverted(v), -v)
    noise = uniform_noise(v, seeded[2])
    assert noise.shape == v.shape
    assert noise.abs().max() <= 1


def test_outsiders_of_bytes_are_floats() -> None:
    v = some_bytes(5, 3)
    seeded = [torch.Generator().manual_seed(1) for _ in range(6)]
    for index, make in enumerate((shuffled_pixels, uniform_noise, constant_images)):
        outside = make(v, seeded[2 * index])
        assert torch.equal(outside, make(scaled(v), seeded[2 * index + 1]))
        assert outside.shape == v.shape
        assert outside.abs().max() <= 1
    assert torch.equal(inverted(v), -scaled(v))


def test_constant_images_have_one_colour_each() -> None:
    images = constant_images(torch.zeros(50, 3, 8, 8), torch.Generator().manual_seed(0))
    colours = images[:, :, 0, 0]
    assert torch.equal(images, colours[:, :, None, None].expand(-1, -1, 8, 8))
    assert len(colours.unique()) == 150
    assert colours.min() < -0.9
    assert colours.max() > 0.9
