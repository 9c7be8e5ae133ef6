"""Training through the core equals the straightforward loop, parameter by parameter."""

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.competitors.transcription import PlainBiDVL
from bilevel import Batches, train
from bilevel.methods import BiDVL
from bilevel.methods.networks.spectral_norm import SpectralNorm
from bilevel.methods.presets import CIFAR10
from bilevel.methods.training.settings import Training


def optimizers(model: BiDVL, training: Training) -> tuple[Any, Any]:
    """The official settings, written down once more."""
    upper = torch.optim.Adam(model.upper.parameters(), training.upper_lr, training.betas)
    decay = training.lower_weight_decay
    lower = torch.optim.Adam(
        model.lower.parameters(), training.lower_lr, training.betas, weight_decay=decay
    )
    return upper, lower


def assert_parity(
    model: BiDVL, images: Tensor, training: Training, batch: int, *, steps: int, one_pass: bool
) -> None:
    """The library's turns and the plain loop's, from the same start and with the same noise."""
    plain = copy.deepcopy(model)
    upper, lower = model.optimizers(training)  # what `fit` uses: fused
    batches = Batches(images, batch, seed=0)
    settings = {"upper_optimizer": upper, "lower_optimizer": lower, "order": training.order}
    for _ in train(model, batches, num_steps=steps, seed=1, **settings):
        pass

    networks = (plain.upper["energy"], plain.lower["posterior"], plain.lower["generator"])
    loop = PlainBiDVL(
        *networks, *optimizers(plain, training), plain.ratio, plain.latent_weight, one_pass
    )
    batches, noise = Batches(images, batch, seed=0), torch.Generator().manual_seed(1)
    for _ in range(steps):
        drawn = plain.draw(next(batches), noise)
        loop.step(drawn.visible, drawn.latent, drawn.noise)

    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-10, msg=name)


def rest_power_iterations(model: nn.Module) -> None:
    """Then one pass through E or two give the same weights."""
    for module in model.modules():
        if isinstance(module, SpectralNorm):
            module.eval()


@pytest.mark.parametrize("one_pass", [False, True])
def test_twenty_steps_equal_the_straightforward_transcription(one_pass: bool) -> None:
    model = BiDVL.for_images((1, 8, 8), latent_dim=3, width=8, ratio=0.1).double().train()
    if not one_pass:
        rest_power_iterations(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, dtype=torch.double, generator=generator) * 2 - 1
    training = CIFAR10.settings(upper_lr=1e-3, lower_lr=1e-3)
    assert_parity(model, images, training, 20, steps=20, one_pass=one_pass)


def test_a_step_of_the_cifar10_preset_equals_the_published_one() -> None:
    model = CIFAR10.build()
    assert isinstance(model, BiDVL)
    model.double().train()
    rest_power_iterations(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, dtype=torch.double, generator=generator) * 2 - 1
    assert_parity(model, images, CIFAR10.settings(), 4, steps=1, one_pass=False)


def test_the_transcription_is_of_the_networks_as_they_are_written() -> None:
    """Our convolutions that cover their whole input are matrix products; the numbers are the same."""
    model = CIFAR10.build(width=8).double()
    h, v = torch.randn(3, 100).double(), torch.rand(3, 3, 32, 32).double() * 2 - 1
    before = [model.lower["generator"](h), model.upper["energy"].eval()(v)]
    replaced = Counter[type]()
    for module in model.modules():
        for plain in (nn.Conv2d, nn.ConvTranspose2d):
            if isinstance(module, plain) and type(module).forward is not plain.forward:
                module.forward = partial(plain.forward, module)
                replaced[plain] += 1
    assert replaced == {nn.Conv2d: 3, nn.ConvTranspose2d: 1}
    model.upper["energy"].eval()
    after = [model.lower["generator"](h), model.upper["energy"](v)]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
