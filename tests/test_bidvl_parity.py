"""Training through the core equals the straightforward loop, parameter by parameter."""

import copy

import torch

from benchmarks.transcription import PlainBiDVL
from bilevel import Batches, train
from bilevel.methods import BiDVL


def test_twenty_steps_equal_the_straightforward_transcription():
    model = BiDVL.for_images((1, 8, 8), latent_dim=3, width=8, ratio=0.1).double().train()
    for module in model.modules():  # u and v at rest: one pass or two through E is then the same
        if type(module).__name__ == "_SpectralNorm":
            module.eval()
    plain = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, dtype=torch.float64, generator=generator) * 2 - 1

    def optimizers(of):
        settings = {"betas": (0.0, 0.9)}
        upper = torch.optim.Adam(of.upper.parameters(), 1e-3, **settings)
        lower = torch.optim.Adam(of.lower.parameters(), 1e-3, weight_decay=1e-4, **settings)
        return upper, lower

    upper, lower = optimizers(model)
    settings = {"upper_optimizer": upper, "lower_optimizer": lower, "order": "upper_first"}
    batches = Batches(images, 20, seed=0)
    for _ in train(model, batches, num_steps=20, seed=1, **settings):
        pass

    networks = (plain.network(name) for name in ("energy", "posterior", "generator"))
    loop = PlainBiDVL(*networks, *optimizers(plain), plain.ratio, plain.latent_weight)
    batches, noise = Batches(images, 20, seed=0), torch.Generator().manual_seed(1)
    for _ in range(20):
        batch = plain.draw(next(batches), noise)
        loop.step(batch.visible, batch.latent, batch.noise)

    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-10, msg=name)
