"""Regression whose penalties, one for each feature, are tuned on other rows: ridge and logistic.

The lower solution is found to rounding. Rows are drawn, or those of scikit-learn, or of a file in the
LIBSVM format (IJCNN1 is one).
"""

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.check.problems.case import Case, normal
from bilevel.problem import Problem

Rows = tuple[Tensor, Tensor]


@final
class Penalties(Problem):
    """Regression whose penalties, one for each feature, are tuned on other rows; logistic or squares.

    Args:
        generator: draws where both levels begin.
        logistic: whether targets are classes, by their sign.
        features: columns of the rows.
    """

    upper: nn.ParameterDict
    lower: nn.ParameterDict

    def __init__(self, generator: torch.Generator, *, logistic: bool, features: int = 10) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"log_penalty": normal(generator, features) - 1})
        self.lower = nn.ParameterDict({"w": normal(generator, features)})
        self.logistic = logistic

    def upper_loss(self, batch: Rows) -> Tensor:
        rows, targets = batch
        predicted: Tensor = rows @ self.lower["w"]
        if self.logistic:
            labels = (targets > 0).to(targets)
            return nn.functional.binary_cross_entropy_with_logits(predicted, labels)
        error: Tensor = (predicted - targets).square().mean()
        return error

    def lower_loss(self, batch: Rows) -> Tensor:
        penalty: Tensor = self.upper["log_penalty"].exp() * self.lower["w"].square()
        return self.upper_loss(batch) + 0.1 * penalty.sum()


def drawn_rows(seed: int, *, logistic: bool) -> Case:
    """On rows that are drawn, of which three features count."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Rows:
        rows = normal(generator, 30, 10)
        return rows, rows[:, :3].sum(1).sin() + 0.1 * normal(generator, 30)

    upper, lower = batch(), batch()
    return Case(Penalties(generator, logistic=logistic), upper, [lower])


def breast_cancer(seed: int) -> Case:
    """569 rows of 30 features, standardised: benign or not."""
    from sklearn.datasets import load_breast_cancer

    return _classified(seed, _table(*load_breast_cancer(return_X_y=True)))


def even_digits(seed: int) -> Case:
    """1,797 images of 8 x 8: even or odd."""
    from sklearn.datasets import load_digits

    rows, labels = load_digits(return_X_y=True)
    return _classified(seed, _table(rows, labels % 2))


def libsvm(seed: int, path: str, upper: str | None = None) -> Case:
    """Two classes from a file in the LIBSVM format.

    Args:
        seed: of the halves, and where both levels begin.
        path: the rows of the lower level; of both, half of them each, without `upper`.
        upper: a file with those of the upper level.

    Raises:
        ValueError: if a file is not there or cannot be read, or there are not two classes.
    """
    first, features = _read(path)
    if upper is None:
        return _classified(seed, first)
    second, _ = _read(upper, features)
    generator = torch.Generator().manual_seed(seed)
    return Case(Penalties(generator, logistic=True, features=features), second, [first])


def _read(path: str, features: int | None = None) -> tuple[Rows, int]:
    from sklearn.datasets import load_svmlight_file

    if not Path(path).is_file():
        raise ValueError(f"there is no file `{path}`, which should be in the LIBSVM format")
    try:
        rows, labels = load_svmlight_file(path, n_features=features)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not in the LIBSVM format: {error}") from None
    return (torch.tensor(rows.toarray()), _signs(path, torch.tensor(labels))), rows.shape[1]


def _signs(path: str, labels: Tensor) -> Tensor:
    """The classes as -1 and 1, whatever the two numbers in the file are."""
    classes = labels.unique()
    if len(classes) != 2:
        raise ValueError(f"`{path}` has {len(classes)} classes, and two are needed")
    return torch.where(labels == classes[0], -1.0, 1.0).double()


def _table(rows: Any, labels: Any) -> Rows:
    inputs = torch.tensor(rows).double()
    deviation = inputs.std(0)
    inputs = (inputs - inputs.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
    return inputs, 2 * torch.tensor(labels).double() - 1


def _classified(seed: int, table: Rows) -> Case:
    """Half of the rows for each level."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels = table
    order = torch.randperm(len(rows), generator=generator)
    lower, upper = order[: len(rows) // 2], order[len(rows) // 2 :]
    problem = Penalties(generator, logistic=True, features=rows.shape[1])
    return Case(problem, (rows[upper], labels[upper]), [(rows[lower], labels[lower])])
