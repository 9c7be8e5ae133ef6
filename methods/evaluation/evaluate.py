r"""How good a trained model is: its samples, reconstructions and out-of-distribution scores.

Samples are judged by features (`features`, `fidelity`). Reconstructions by the root of the mean
squared error, pooled over all images and pixels,

$$ \mathrm{RMSE} = \sqrt{\frac{1}{N C H W} \sum_n \lVert v_n - G(\mu(v_n)) \rVert^2} , $$

on the scale of the images, [-1, 1]. Energies by the chance that an image of the data has a lower one
than an image of another kind, the area under the ROC curve of -energy.

Batch norm has two policies. With "running" averages an output depends on its own input only; with those
of the "batch", 100 images at a time, samples and reconstructions are what the BiDVL paper measures.
Energies are always taken with running averages: the score of an image must not depend on its company.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.methods.data.images import (
    Images,
    constant_images,
    inverted,
    scaled,
    shuffled_pixels,
    uniform_noise,
)
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.evaluation.features import FeatureNetwork, at_most, default_features
from bilevel.methods.evaluation.fidelity import FEWEST, fid, kid, neighbourhoods, refuse_undefined
from bilevel.methods.models.evaluating import Statistics
from bilevel.reporting import Report, silent, tracked
from bilevel.sync_batch_norm import BatchNorm

_Array: TypeAlias = NDArray[np.float64]

_MOST = 10_000  # images of a set that are looked at, and samples drawn, if nothing else is asked
_MOST_CHAINS = 500  # the same, where every sample and every reconstruction is a Markov chain
_NEIGHBOURS = 5_000  # of these: distances of all pairs are taken
_BATCH = 100  # images that share batch-norm statistics: the paper's batch on CIFAR-10
_AT_ONCE = 500


def reconstruction_rmse(model: EBLVM, v: Tensor, report: Report = silent) -> float:
    """Root of the mean squared error of `reconstruct`, over all images and pixels.

    Args:
        model: a trained model.
        v: images.
        report: told how far it is.
    """
    total = 0.0
    for part in tracked(v.split(_at_once(model)), "reconstructing images", report):
        error = (model.reconstruct(part) - model.check(part)).double()
        refuse_undefined(error, "the reconstructions")
        total += float(error.square().sum())
    return float((total / v.numel()) ** 0.5)


def ood_auroc(model: EBLVM, inside: Tensor, outside: Tensor) -> float:
    """How well low energy tells images of the data from others: 1 always, 0.5 chance.

    The probability that an image of `inside` has lower energy than one of `outside` (area under the
    ROC curve of -energy).
    """
    return _auroc(_energies(model, inside), _energies(model, outside))


def evaluate(
    model: EBLVM,
    images: Images,
    seed: int = 0,
    *,
    statistics: Statistics | None = None,
    features: FeatureNetwork | None = None,
    samples: int | None = None,
    outside: Mapping[str, Tensor] | None = None,
    report: Report = silent,
) -> dict[str, float]:
    """Everything a report shows of a model. What a model cannot do is left out.

    Args:
        model: a trained model.
        images: what it was trained on; all measures but the reference values use the test part.
        seed: seed of samples and noise.
        statistics: batch-norm statistics of samples and reconstructions, the model's own choice by
            default.
        features: what samples are judged by; by default `default_features(images)`, a small classifier
            trained first. Record its `label` beside the numbers.
        samples: how many samples are drawn, and images of each set looked at, at most; by default as
            many as there are training images, at most 10,000 (500 of a model that draws them by Langevin
            dynamics). 1,000 are a quick look.
        outside: further images by name, in the shape of the model's, bytes or in [-1, 1], that its
            energy should tell from the data.
        report: told which stage it is at and how far.

    Returns:
        By name: `frechet` (samples to test images), `frechet_train` (to training images, as FIDs are
        published), `kid`, `precision`, `recall`, `density`, `coverage`; with labels
        `smallest_class_share` and `classifier_accuracy`; each distance and share with a `..._reference`,
        that of the training images, what a perfect model would get. `rmse`; `rmse_mean`, of the mean
        training image in place of every reconstruction, and `rmse_pca`, of as many principal
        components as the model has latents (not if `samples` is given: they tell nothing about the
        model). `auroc_uniform`, `auroc_constant`, `auroc_inverted`, `auroc_shuffled` and
        `auroc_<name>` of `outside`. If the model has batch norm, `frechet` and `rmse` under its other
        policy: `frechet_batch` and `rmse_batch`, or `..._running`.

    Warns if there are no more images, of training, test or samples, than features.

    Raises:
        ValueError: if `samples` is less than 2, images have another shape than the model's, or the
            model gives samples, reconstructions or energies that are NaN or infinite.
    """
    if samples is not None and samples < 2:
        raise ValueError(f"`samples` must be at least 2, got {samples}")
    seen = (default_features(images, report) if features is None else features).to(model.device)
    usual = _MOST_CHAINS if model.latent_model.draws_by_chains else _MOST
    most = samples if samples is not None else usual
    train, test = at_most(images.train, most), at_most(images.test, most)
    count = samples if samples is not None else len(train)
    chosen = statistics if statistics is not None else model.statistics
    _warn_of_few(min(len(train), len(test), count), seen)
    known = seen(train, report, "features of training images")
    beside = _Beside(seen, known, seen(test, report, "features of test images"), seed, report)

    def frechet(policy: Statistics) -> float:
        return fid(_features(model, policy, beside, count), beside.test)

    def rmse(policy: Statistics) -> float:
        with _statistics(model, policy):
            return reconstruction_rmse(model, test, report)

    # a model refuses what it has no way to do: a score model, say, to reconstruct
    likeness = beside.likeness(beside.train)
    results = {f"{name}_reference": value for name, value in likeness.items()}
    with suppress(NotImplementedError):
        drawn = _features(model, chosen, beside, count)
        results |= beside.likeness(drawn)
        results["frechet_train"] = fid(drawn, beside.train)
    with suppress(NotImplementedError):
        results["rmse"] = rmse(chosen)
    if any(isinstance(module, BatchNorm) for module in model.modules()):
        other: Statistics = "running" if chosen == "batch" else "batch"
        with suppress(NotImplementedError):
            results[f"frechet_{other}"] = frechet(other)
        with suppress(NotImplementedError):
            results[f"rmse_{other}"] = rmse(other)
    latents = model.latent_model.latent_dim
    if samples is None and "rmse" in results:
        results["rmse_mean"] = mean_rmse(train, test)
        if latents is not None:
            report("principal components, to compare with", 0, 0)
            results["rmse_pca"] = pca_rmse(train, test, latents)
    if seen.head is not None:
        results["classifier_accuracy"] = seen.accuracy
    others = {name: at_most(v, most) for name, v in (outside or {}).items()}
    generator = torch.Generator().manual_seed(seed)
    with suppress(NotImplementedError), _statistics(model, "running"):
        inside = _energies(model, test, report)
        for name, v in _strangers(test, others, generator):
            results[f"auroc_{name}"] = _auroc(inside, _energies(model, v, report, name))
    return results


def mean_rmse(train: Tensor, test: Tensor) -> float:
    """RMSE of test images if every one is taken for the mean of the training images."""
    rows = _rows(test)
    refuse_undefined(rows, "the test images")
    return float(np.sqrt(np.square(rows - _rows(train).mean(0)).mean()))


def pca_rmse(train: Tensor, test: Tensor, components: int, seed: int = 0) -> float:
    """RMSE of test images rebuilt from principal components of the training images."""
    from sklearn.decomposition import PCA

    rows = _rows(at_most(train, _MOST))
    refuse_undefined(rows, "the training images")
    pca = PCA(min(components, *rows.shape), random_state=seed).fit(rows)
    tested = _rows(test)
    refuse_undefined(tested, "the test images")
    rebuilt = pca.inverse_transform(pca.transform(tested))
    return float(np.sqrt(np.square(rebuilt - tested).mean()))


# ---------------------------------------------------------------------- the parts of an evaluation


def _warn_of_few(images: int, seen: FeatureNetwork) -> None:
    if images <= seen.dim:  # a covariance is singular
        warnings.warn(
            f"too few images for a Fréchet distance: {images:,} for {seen.dim:,} features; it says more "
            "about their number than about the images. Take more, or a feature network with fewer "
            "features",
            stacklevel=3,
        )


@final
@dataclass(frozen=True)
class _Beside:
    """Images beside the real ones, by their features."""

    seen: FeatureNetwork
    train: Tensor
    test: Tensor
    seed: int
    report: Report

    def likeness(self, features: Tensor) -> dict[str, float]:
        """What features of samples, or of training images, are like beside those of test images."""
        self.report("comparing features", 0, 0)
        found = {"frechet": fid(features, self.test)}
        kernel = kid(features, self.test, self.seed)
        if kernel is not None:
            found["kid"] = kernel
        if min(len(features), len(self.test)) >= FEWEST:
            found |= neighbourhoods(self.test[:_NEIGHBOURS], features[:_NEIGHBOURS])
        if self.seen.head is not None:
            found["smallest_class_share"] = float(self.seen.classes(features).min())
        return found


def _features(model: EBLVM, statistics: Statistics, beside: _Beside, count: int) -> Tensor:
    """Features of samples, drawn and looked at a few at a time."""
    generator = torch.Generator(model.device).manual_seed(beside.seed)
    what = f"drawing {count:,} samples"
    found = []
    with _statistics(model, statistics):
        size = _at_once(model)
        for done in range(0, count, size):
            beside.report(what, done, count)
            found.append(beside.seen(_sampled(model, min(size, count - done), generator)))
    return torch.cat(found)


def _sampled(model: EBLVM, n: int, generator: torch.Generator) -> Tensor:
    """N samples, cut to the range of images.

    Raises:
        ValueError: if one holds NaN or infinity; a cut would hide the latter.
    """
    samples = model.sample(n, generator)
    refuse_undefined(samples, "the model's samples")
    return samples.clamp(-1, 1)


def _strangers(
    test: Tensor, outside: Mapping[str, Tensor], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Images that are not of the data, by name; made one set at a time."""
    yield "uniform", uniform_noise(test, generator)
    yield "constant", constant_images(test, generator)
    yield "inverted", inverted(test)
    yield "shuffled", shuffled_pixels(test, generator)
    yield from outside.items()


def _energies(model: EBLVM, v: Tensor, report: Report = silent, name: str = "test") -> _Array:
    what = f"energies of {name} images"
    parts = [model.energy(part).double().cpu() for part in tracked(v.split(_AT_ONCE), what, report)]
    energies = torch.cat(parts)
    refuse_undefined(energies, "the energies")
    return energies.numpy()


def _auroc(inside: _Array, outside: _Array) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.repeat([1, 0], [len(inside), len(outside)])
    return float(roc_auc_score(truth, -np.concatenate([inside, outside])))


def _at_once(model: EBLVM) -> int:
    return _BATCH if model.statistics == "batch" else _AT_ONCE


def _rows(images: Tensor) -> _Array:
    rows: _Array = scaled(images).detach().flatten(1).double().cpu().numpy()
    return rows


@contextmanager
def _statistics(model: EBLVM, statistics: Statistics) -> Iterator[None]:
    before = model.statistics
    model.statistics = statistics
    try:
        yield
    finally:
        model.statistics = before
