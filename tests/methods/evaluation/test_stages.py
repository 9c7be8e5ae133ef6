"""What takes long says how far it is, and annealing comes to the same numbers."""

import torch
from torch import nn

from bilevel.methods import RBM
from bilevel.methods.data.images import Images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.likelihood import bracket
from tests.runs import data, small


class Heard:
    """A `Report` that keeps the last word of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        self.stages[what] = (done, total)


def test_an_evaluation_names_its_stages() -> None:
    images = Images("noise", "noise.npz", data(80), data(70), None, None, "made up")
    pixels, heard = FeatureNetwork("pixels", nn.Flatten(), dim=64), Heard()
    evaluate(small(), images, features=pixels, samples=70, report=heard)
    assert list(heard.stages) == [
        "features of training images",
        "features of test images",
        "comparing features",
        "drawing 70 samples",
        "reconstructing images",
        "energies of test images",
        "energies of uniform images",
        "energies of constant images",
        "energies of inverted images",
        "energies of shuffled images",
    ]
    assert heard.stages["reconstructing images"] == (1, 1)


def test_annealing_says_how_far_it_is() -> None:
    heard, machine = Heard(), RBM(6, 4)

    def estimate(**options: object) -> float:
        generator = torch.Generator().manual_seed(0)
        found = bracket(machine, temperatures=5, num_chains=3, generator=generator, **options)  # type: ignore[arg-type]
        return found.forward.value + found.backward.value

    assert estimate(report=heard) == estimate()
    assert heard.stages["annealing to the model"] == (4, 4)
    assert heard.stages["annealing back to the base"] == (4, 4)
