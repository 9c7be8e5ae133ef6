r"""Data hyper-cleaning: weights of training items with wrong labels, judged on clean ones.

Half of the labels are drawn anew. The lower level trains a classifier on weighted items, the upper
level moves the weights so that it does well on clean items:

$$ \min_x \frac{1}{m} \sum_j \ell(y^*(x); v_j, c_j), \qquad
   y^*(x) \in \arg\min_y \frac{1}{n} \sum_i \sigma(x_i) \, \ell(y; u_i, b_i). $$

There is no penalty on the weights y, so that the lower level of a linear classifier need not have a
minimum: a training is judged by the accuracy on test items and by which items it keeps.

The protocol is that of the code released with "On Penalty-based Bilevel Gradient Descent Method" (Shen,
Chen, 2023), https://arxiv.org/abs/2302.05185, with its two slips unless told otherwise: a label that is
drawn anew may be the true one (of ten classes, 45 % of all labels are wrong then and not 50 %), and
such an item counts as a wrong one all the same.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bilevel.check.problems.case import Case
from bilevel.problem import Problem

Network = Literal["linear", "mlp"]
_POLLUTED = 0.5  # of the labels
_UPPER_RATE, _LOWER_RATE = 100.0, 0.1  # a weight's share of the mean loss is small


@final
class Cleaning(Problem):
    """Weights of items in the upper level, a classifier in the lower.

    Batches of the upper loss are (inputs, labels), those of the lower loss (inputs, labels, numbers of
    the items).

    Args:
        items: how many have a weight.
        network: the classifier.
    """

    upper: nn.ParameterDict
    lower: nn.Module

    def __init__(self, items: int, network: nn.Module) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": torch.zeros(items)})
        self.lower = network

    def upper_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.lower(inputs), labels)

    def lower_loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        inputs, labels, items = batch
        losses = nn.functional.cross_entropy(self.lower(inputs), labels, reduction="none")
        loss: Tensor = (self.upper["x"][items].sigmoid() * losses).mean()
        return loss


@final
class TestItems(NamedTuple):
    """What a cleaning is judged by.

    Attributes:
        inputs: of the test items.
        labels: theirs.
        kept: which of the items to clean count as clean.
    """

    inputs: Tensor
    labels: Tensor
    kept: Tensor

    def measures(self, problem: Problem) -> Mapping[str, float]:
        """In percent: the accuracy, and the F1 score of `x >= 0` as a test for clean items."""
        with torch.no_grad():
            found = problem.lower(self.inputs).argmax(1)
        kept = problem.get_parameter("upper.x").detach() >= 0
        right = float((kept & self.kept).sum())
        f1 = 2 * right / float(kept.sum() + self.kept.sum())
        return {"accuracy": 100 * float((found == self.labels).double().mean()), "f1": 100 * f1}


def cleaning(
    seed: int,
    path: str | None = None,
    *,
    network: Network = "linear",
    sizes: tuple[int, int, int] | None = None,
    released: bool = True,
) -> Case:
    """Hyper-cleaning of digits.

    Args:
        seed: of the shuffling, of the labels and of the network.
        path: an .npz file with `train_images` and `train_labels`, such as MNIST; by default the 1,797
            digits of scikit-learn.
        network: a linear classifier, or one with 300 hidden sigmoid units.
        sizes: items to clean, clean ones for the upper level, test items, all from the training
            images; by default 5,000, 5,000 and 10,000 of a file, and a third of scikit-learn's each.
        released: follow the released code in its two slips.

    Raises:
        ValueError: if the file does not hold images and labels, or fewer items than needed.
    """
    images, labels = _digits() if path is None else _read(Path(path))
    cut = sizes or ((599, 599, 599) if path is None else (5_000, 5_000, 10_000))
    if sum(cut) > len(images):
        raise ValueError(f"{sum(cut):,} items are needed, and there are {len(images):,}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, valid, test = order[: sum(cut)].split(cut)
    noisy, kept = _polluted(labels[train], generator, released=released)
    model = _network(network, images.shape[1], int(labels.max()) + 1, generator)
    lower = images[train], noisy, torch.arange(len(train))
    held = TestItems(images[test], labels[test], kept)
    return Case(
        Cleaning(len(train), model),
        (images[valid], labels[valid]),
        [lower],
        measures=held.measures,
        rates=(_UPPER_RATE, _LOWER_RATE),
    )


def _polluted(
    labels: Tensor, generator: torch.Generator, *, released: bool
) -> tuple[Tensor, Tensor]:
    """The labels, half of them drawn anew, and which items count as clean."""
    classes, count = int(labels.max()) + 1, int(_POLLUTED * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    noisy, clean = labels.clone(), torch.ones(len(labels), dtype=torch.bool)
    if released:
        noisy[chosen] = torch.randint(classes, (count,), generator=generator)
    else:  # another than the true one
        apart = torch.randint(1, classes, (count,), generator=generator)
        noisy[chosen] = (labels[chosen] + apart) % classes
    clean[chosen] = False
    return noisy, clean


def _network(
    network: Network, features: int, classes: int, generator: torch.Generator
) -> nn.Module:
    """The classifier, drawn by the generator as torch's defaults are."""
    widths = [features, classes] if network == "linear" else [features, 300, classes]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        parts += [nn.Sigmoid(), layer] if parts else [layer]
    return nn.Sequential(*parts)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float() / 16, torch.tensor(labels).long()


def _read(path: Path) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        with np.load(path) as found:
            arrays: Any = {name: found[name] for name in ("train_images", "train_labels")}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"`{path}` must be an .npz file with `train_images` and `train_labels`: {error}"
        ) from None
    images = torch.from_numpy(arrays["train_images"]).flatten(1).float()
    return images / images.max(), torch.from_numpy(arrays["train_labels"]).long()
