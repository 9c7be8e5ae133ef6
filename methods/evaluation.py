r"""What a trained model is worth, in numbers: samples, reconstructions, out-of-distribution scores.

The Fréchet distance of two sets of features is that of the Gaussians with their moments,

$$ d^2 = \lVert \mu_a - \mu_b \rVert^2
   + \mathrm{tr}\big(C_a + C_b - 2 (C_a^{1/2} C_b\, C_a^{1/2})^{1/2}\big). $$

On Inception features it is the FID; here the features are those of a small classifier trained on the
images themselves (principal components where there are no labels), so it compares models on one
data set and never with published FIDs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bilevel.methods.data import Images, inverted, shuffled_pixels, uniform_noise
from bilevel.methods.eblvm import EBLVM, Statistics

Array: TypeAlias = NDArray[np.float64]

_MOST = 10_000  # images used to fit a classifier or principal components, and samples drawn
_COMPONENTS = 20
_HIDDEN = 64


def reconstruction_rmse(model: EBLVM, v: Tensor) -> float:
    """Root of the mean squared error of `reconstruct`, over all images and pixels."""
    return float((model.reconstruct(v) - model.check(v)).square().mean().sqrt())


def ood_auroc(model: EBLVM, inside: Tensor, outside: Tensor) -> float:
    """How well low energy tells images of the data from others: 1 always, 0.5 chance.

    The probability that an image of `inside` has lower energy than one of `outside` (area under the
    ROC curve of -energy).
    """
    from sklearn.metrics import roc_auc_score

    energies = [model.energy(v).double().cpu().numpy() for v in (inside, outside)]
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    return float(roc_auc_score(truth, -np.concatenate(energies)))


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Fréchet distance of two sets of features, each (n, k), as the FID takes it.

    Raises:
        ValueError: if a set has fewer than two rows or the sets differ in their number of features.

    Example:
        >>> square = [[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]
        >>> frechet_distance(square, [[x + 3, y] for x, y in square])
        9.0
    """
    x, y = (np.asarray(part, dtype=np.float64) for part in (a, b))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            "`frechet_distance` takes two arrays of shape (n, k) with the same k and n of at least 2, "
            f"got {x.shape} and {y.shape}"
        )
    shift = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    cov_x, cov_y = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0)).sum()
    return max(0.0, float(shift + np.trace(cov_x) + np.trace(cov_y) - 2 * cross))


@dataclass(frozen=True)
class Judge:
    """What samples are looked at with, fitted to the real training images.

    Attributes:
        name: the feature space, in words.
        features: images to features, (n, k).
        classify: images to classes 0, 1, ..., or `None` without labels.
        classes: number of classes.
        accuracy: of the classifier, on the test images.
    """

    name: str
    features: Callable[[Tensor], Array]
    classify: Callable[[Tensor], NDArray[np.int64]] | None = None
    classes: int = 0
    accuracy: float = float("nan")

    def smallest_share(self, images: Tensor) -> float:
        """Share of the class that the fewest images are judged to be of."""
        assert self.classify is not None
        counts = np.bincount(self.classify(images), minlength=self.classes)
        return float(counts.min() / len(images))


def judge(images: Images, seed: int = 0) -> Judge:
    """A classifier with one hidden layer, or principal components if there are no labels."""
    if images.train_labels is None or images.test_labels is None:
        pca = _components(images.train, _COMPONENTS, seed)
        name = f"the first {pca.n_components_} principal components of the training images"
        return Judge(name, lambda v: np.asarray(pca.transform(_rows(v))))
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    labels, truth = images.train_labels.numpy()[:_MOST], images.test_labels.numpy()
    network = MLPClassifier(
        (_HIDDEN,), alpha=1e-2, learning_rate_init=3e-3, max_iter=30, random_state=seed
    )
    # on one thread: the products are too small to share, and on a busy machine sharing takes 50 times
    # as long
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # 30 passes are enough to judge with
        network.fit(_rows(images.train[:_MOST]), labels)

    def features(v: Tensor) -> Array:
        hidden: Array = _rows(v) @ network.coefs_[0] + network.intercepts_[0]
        return hidden.clip(min=0)

    def classify(v: Tensor) -> NDArray[np.int64]:
        return np.asarray(network.predict(_rows(v)))

    accuracy = float((classify(images.test) == truth).mean())
    classes = int(max(images.train_labels.max(), images.test_labels.max())) + 1
    name = f"the {_HIDDEN} hidden units of a classifier of the training images"
    return Judge(name, features, classify, classes, accuracy)


def evaluate(
    model: EBLVM,
    images: Images,
    seed: int = 0,
    *,
    statistics: Statistics | None = None,
) -> dict[str, float]:
    """Everything a report shows of a model.

    Args:
        model: a trained model.
        images: what it was trained on; all measures but the reference values use the test part.
        seed: seed of samples, noise and classifier.
        statistics: batch-norm statistics of samples and reconstructions, the model's own choice by
            default.

    Returns:
        By name: `frechet` (samples to test images) and `frechet_reference` (training to test images,
        what a perfect model would get), `rmse` and `rmse_pca` (as many principal components as the
        model has latents), `auroc_uniform`, `auroc_inverted`, `auroc_shuffled`; with labels
        `smallest_class_share`, `smallest_class_share_reference` (of the training images) and
        `classifier_accuracy`.
    """
    seen = judge(images, seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = images.train[:_MOST], images.test
    with _statistics(model, statistics):
        device = next(model.parameters()).device
        on_device = torch.Generator(device).manual_seed(seed)
        samples = model.sample(len(train), on_device).cpu().clamp(-1, 1)
        rmse = reconstruction_rmse(model, test)
    real = seen.features(test)
    results = {
        "frechet": frechet_distance(seen.features(samples), real),
        "frechet_reference": frechet_distance(seen.features(train), real),
        "rmse": rmse,
    }
    latents = getattr(model, "latent_dim", None)
    if latents is not None:
        results["rmse_pca"] = pca_rmse(train, test, latents, seed)
    outside = {
        "uniform": uniform_noise(test, generator),
        "inverted": inverted(test),
        "shuffled": shuffled_pixels(test, generator),
    }
    results |= {f"auroc_{name}": ood_auroc(model, test, v) for name, v in outside.items()}
    if seen.classify is not None:
        results["smallest_class_share"] = seen.smallest_share(samples)
        results["smallest_class_share_reference"] = seen.smallest_share(train)
        results["classifier_accuracy"] = seen.accuracy
    return results


def pca_rmse(train: Tensor, test: Tensor, components: int, seed: int = 0) -> float:
    """RMSE of test images rebuilt from principal components of the training images."""
    pca = _components(train, components, seed)
    rows = _rows(test)
    rebuilt = pca.inverse_transform(pca.transform(rows))
    return float(np.sqrt(np.square(rebuilt - rows).mean()))


def _components(images: Tensor, components: int, seed: int) -> Any:
    from sklearn.decomposition import PCA

    rows = _rows(images[:_MOST])
    return PCA(min(components, *rows.shape), random_state=seed).fit(rows)


def _rows(images: Tensor) -> Array:
    rows: Array = images.detach().flatten(1).double().cpu().numpy()
    return rows


@contextmanager
def _statistics(model: EBLVM, statistics: Statistics | None) -> Iterator[None]:
    before = model.statistics
    model.statistics = statistics if statistics is not None else before
    try:
        yield
    finally:
        model.statistics = before
