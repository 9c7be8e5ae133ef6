"""Learners: no default drops a term in silence, no noise serves twice, and nobody loses to coins."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Batches, train
from bilevel.methods import BiDVL, Training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- several lower steps


def images(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=generator(1)) * 2 - 1


def small_bidvl(**options: Any) -> BiDVL:
    return BiDVL.for_images((1, 8, 8), latent_dim=3, width=4, **options)


def spied(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The batches that the upper and the lower losses of `BiDVL` see from now on."""
    seen: dict[str, list[Any]] = {"upper_loss": [], "lower_loss": []}
    for name, batches in seen.items():
        original = getattr(BiDVL, name)

        def spy(self: BiDVL, batch: Any, original: Any = original, batches: Any = batches) -> Any:
            batches.append(batch)
            return original(self, batch)

        monkeypatch.setattr(BiDVL, name, spy)
    return seen["upper_loss"], seen["lower_loss"]


@pytest.mark.parametrize("fresh", [False, True])
def test_every_lower_step_of_bidvl_has_its_own_reparameterisation_noise(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """The official code draws it in each of them, at the same images and the same h_hat.

    Where the lower level has an h_hat of its own (the residual scripts), that is new, too.
    """
    model = small_bidvl(fresh_latent=fresh)
    upper, lower = spied(monkeypatch)
    model.fit(images(), num_steps=2, batch_size=6, lower_steps=3)
    upper, lower = upper[1:], lower[1:]  # the rehearsal
    assert (len(upper), len(lower)) == (2, 6)
    for turn in range(2):
        steps = lower[3 * turn : 3 * turn + 3]
        for batch in steps:
            assert torch.equal(batch.visible, upper[turn].visible)
            assert torch.equal(batch.latent, upper[turn].latent)
        for name in ("noise", "cycle_noise", *(["fresh_latent"] if fresh else [])):
            drawn = torch.stack([getattr(batch, name) for batch in steps])
            assert torch.equal(drawn[0], getattr(upper[turn], name))
            assert len(drawn.flatten(1).unique(dim=0)) == 3
            assert 0.5 < float(drawn.std()) < 1.5


def test_one_lower_step_of_bidvl_takes_the_numbers_it_always_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit those of a model that hands the turn's batch to every lower step."""
    new, old = small_bidvl(), small_bidvl()
    new.fit(images(), num_steps=3, batch_size=6, lower_steps=1)
    monkeypatch.delattr(BiDVL, "draw_lower")
    old.fit(images(), num_steps=3, batch_size=6, lower_steps=1)
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    other = small_bidvl()
    other.fit(images(), num_steps=3, batch_size=6, lower_steps=2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(new.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_bidvl_still_computes_its_samples_once_for_both_levels() -> None:
    """Drawing anew in later lower steps must not cost the first one its shared G(h_hat)."""
    model, calls = small_bidvl(), []
    model.lower["generator"].register_forward_pre_hook(lambda *_: calls.append(None))
    upper, lower = model.optimizers(Training())
    data = Batches(images(), 6, seed=0)
    counts = []
    steps = {"num_steps": 3, "lower_steps": 2, "order": "upper_first"}
    for _ in train(model, data, upper_optimizer=upper, lower_optimizer=lower, **steps):
        counts.append(len(calls))
        calls.clear()
    # a turn: G(h_hat) for both levels, G(h); then both again in the second lower step
    assert counts[1:] == [4, 4]
