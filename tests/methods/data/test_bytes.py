"""Images kept as bytes: a model takes them for what they are scaled to."""

import pytest
import torch

from bilevel import Batches
from bilevel.methods import BiDVL
from bilevel.methods.data.images import scaled
from tests.methods.data.files import some_bytes


def model(channels: int = 1) -> BiDVL:
    return BiDVL.for_images((channels, 8, 8), latent_dim=2, width=2)


def test_a_model_takes_bytes_for_what_they_are_scaled_to() -> None:
    learner, v = model().double(), some_bytes()
    learner.eval()
    assert torch.equal(learner.energy(v), learner.energy(scaled(v)))
    assert torch.equal(learner.reconstruct(v), learner.reconstruct(scaled(v)))
    assert learner.check(v).dtype == torch.float64
    assert learner.admit(v).dtype == torch.uint8


def test_training_on_bytes_is_training_on_the_floats() -> None:
    learners = [model(), model()]
    for learner, v in zip(learners, (some_bytes(), scaled(some_bytes())), strict=True):
        learner.fit(v, num_steps=3, batch_size=5)
    one, two = (learner.state_dict() for learner in learners)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_batches_convert_the_drawn_rows_only() -> None:
    seen: list[torch.Size] = []

    def convert(rows: torch.Tensor) -> torch.Tensor:
        assert rows.dtype == torch.uint8
        seen.append(rows.shape)
        return scaled(rows)

    batches, floats = Batches(some_bytes(), 5, convert=convert), Batches(scaled(some_bytes()), 5)
    assert all(torch.equal(next(batches), next(floats)) for _ in range(6))
    assert seen == [(5, 1, 8, 8)] * 6


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((9, 1, 8, 8), "channels=3`"), ((9, 3, 9, 9), "`side=8`"), ((9, 1, 9, 9), "=3, side=8`")],
)
def test_images_of_another_shape_are_refused_with_the_option_that_mends_it(
    shape: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        model(3).fit(torch.zeros(shape, dtype=torch.uint8))
