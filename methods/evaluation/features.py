r"""Feature networks: images are compared by the features of a network, whose name is recorded.

A distance between sets of features means nothing without the network that made them. So every feature
network has a label - what it is, how many features, and eight digits of a digest of its weights - that
goes into the record beside the numbers; numbers with different labels are never compared.
"""

import hashlib
import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel.methods.data.images import Images, scaled
from bilevel.methods.evaluation.fidelity import refuse_undefined
from bilevel.methods.evaluation.inception import Inception
from bilevel.methods.models.model import attempt
from bilevel.methods.training.json_lines import check_fields
from bilevel.methods.training.schemas import Classifier
from bilevel.methods.training.weights import fill_module, read_metadata, read_weights, write_weights
from bilevel.reporting import Report, silent, tracked

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_AT = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
_FEATURES, _WIDEST = 64, 128
_COMPONENTS = 20
_AT_ONCE = 500
_MOST = 10_000  # images principal components are fitted to


@final
@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network that turns images into features, and what it is called in records.

    Attributes:
        name: what it is, in a few words: "classifier of mnist (98.9% right)".
        module: takes images in [-1, 1], (n, channels, side, side), gives features (n, dim).
        dim: number of features.
        head: takes features, gives a score for each class; `None` if it knows no classes.
        accuracy: of the head, on held-out images.
        sizes: of one that `classifier` made, (shape, classes, width): what it is built again from.

    Raises:
        ValueError: if `dim` is not positive.

    Example:
        >>> network = FeatureNetwork("pixels", nn.Flatten(), dim=64)
        >>> network(torch.zeros(3, 1, 8, 8)).shape, network.label
        (torch.Size([3, 64]), 'pixels, 64 features (e3b0c442)')
    """

    name: str
    module: nn.Module
    dim: int
    head: nn.Module | None = None
    accuracy: float = float("nan")
    sizes: tuple[tuple[int, int, int], int, int] | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"`dim` must be positive, got {self.dim}")

    @property
    def label(self) -> str:
        """The feature space: its name, number of features and a digest of the weights."""
        return f"{self.name}, {self.dim:,} features ({_digest(self.module)})"

    def __call__(self, images: Tensor, report: Report = silent, what: str = "features") -> Tensor:
        """Features of images, bytes or in [-1, 1]: (n, dim), on the processor.

        Args:
            images: to be looked at.
            report: told how far it is.
            what: the name of this stage.

        Raises:
            ValueError: if the network cannot take the images or gives something else, or a value is NaN
                or infinite.
        """
        refuse_undefined(images, "the images")
        device = _device(self.module)
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                parts = [
                    self._checked(attempt(self.name, self.module, scaled(part.to(device))), part)
                    for part in tracked(images.split(_AT_ONCE), what, report)
                ]
        finally:
            self.module.train(was_training)
        return torch.cat(parts)

    def classes(self, features: Tensor) -> Tensor:
        """Shares of the classes that the head sees in features, shape (number of classes,).

        Raises:
            ValueError: if there is no head, or a feature is NaN or infinite.
        """
        if self.head is None:
            raise ValueError(f"the feature network `{self.name}` knows no classes")
        refuse_undefined(features, "the features")
        with torch.no_grad():
            scores = self.head(features.to(_device(self.head)))
        counts: Tensor = scores.argmax(dim=1).cpu().bincount(minlength=scores.shape[1])
        return counts / len(features)

    def to(self, device: torch.device | str) -> Self:
        """The same network on a device: itself if it is there, else a copy."""
        if _device(self.module) == torch.device(device):
            return self
        head = None if self.head is None else deepcopy(self.head).to(device)
        return replace(self, module=deepcopy(self.module).to(device), head=head)

    def _checked(self, features: Any, images: Tensor) -> Tensor:
        wanted = (len(images), self.dim)
        if not isinstance(features, Tensor) or tuple(features.shape) != wanted:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"the feature network `{self.name}` must give features of shape {wanted} for images of "
                f"shape {tuple(images.shape)}, got {got}"
            )
        refuse_undefined(features, f"the features of the network `{self.name}`")
        return features.cpu()


# ---------------------------------------------------------------------- trained on the images


def default_features(images: Images, report: Report = silent) -> FeatureNetwork:
    """The features that images are judged by if no others are given: a classifier trained now.

    Without labels, the first principal components of the training images. The seed is fixed, so that all
    runs on a data set are judged alike.

    Args:
        images: the data set.
        report: told how far it is.
    """
    if images.train_labels is None or images.test_labels is None:
        report("principal components, by which samples are judged", 0, 0)
        return principal_components(images)
    return classifier(images, report=report)


judge = default_features
"""The earlier name."""


def classifier(
    images: Images,
    *,
    num_steps: int = 300,
    width: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], object] | None = None,
    report: Report = silent,
) -> FeatureNetwork:
    """A small convolutional classifier of the images; its features are those before the last layer.

    Convolutions with stride 2, batch norm and ReLU down to 4 pixels (7 for 28), a layer of 64 features,
    a linear head; AdamW on batches of 64 with a rate that rises and falls.

    Args:
        images: with labels.
        num_steps: steps of training.
        width: channels of the first layer; they double with every halving, up to 128.
        seed: seed of the weights and batches; torch's global generator is left as it was.
        device: where to train; the network stays there.
        progress: called with the step and the loss of its batch, fifty times.
        report: told how far it is.

    Raises:
        ValueError: if there are no labels.
    """
    labels, truth = images.train_labels, images.test_labels
    if labels is None or truth is None:
        raise ValueError(
            f"`{images.name}` has no labels to train a classifier on; without, `principal_components` "
            "are what is left"
        )
    classes = int(max(labels.max(), truth.max())) + 1
    sizes = (images.shape, classes, width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk, head = (part.to(device) for part in _networks(*sizes))
    generator = torch.Generator().manual_seed(seed)
    weights = [*trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=num_steps)
    what = "training the classifier that judges samples"
    for step in tracked(range(1, num_steps + 1), what, report):
        rows = torch.randint(len(labels), (64,), generator=generator)
        batch = images.train[rows.to(images.train.device)].to(device)
        loss = cross_entropy(head(trunk(scaled(batch))), labels[rows].to(device))
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad
        optimizer.step()
        schedule.step()
        if progress is not None and step % max(1, num_steps // 50) == 0:
            progress(step, float(loss.detach()))
    for module in (trunk, head):
        module.eval().requires_grad_(False)
    accuracy = _accuracy(FeatureNetwork("", trunk, _FEATURES, head), images.test, truth)
    name = f"classifier of {images.name} ({accuracy:.1%} right)"
    return FeatureNetwork(name, trunk, _FEATURES, head, accuracy, sizes)


def principal_components(images: Images) -> FeatureNetwork:
    """Coordinates along the first principal components of the training images, at most 20."""
    from sklearn.decomposition import PCA

    rows = at_most(images.train, _MOST)
    # of fewer test images than components the covariance would be singular
    most = max(1, min(_COMPONENTS, len(images.test) - 1))
    pixels = scaled(rows).flatten(1).double().numpy()
    pca = PCA(min(most, *pixels.shape), random_state=0).fit(pixels)
    module = _Projection(torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_))
    return FeatureNetwork(f"principal components of {images.name}", module, pca.n_components_)


def at_most(images: Tensor, n: int) -> Tensor:
    """At most n of the images, always the same ones: folders come sorted by class."""
    if len(images) <= n:
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:n].to(images.device)]


def nearest_images(
    network: FeatureNetwork, images: Tensor, among: Tensor, report: Report = silent
) -> Tensor:
    """For each image the one nearest to it in features, (n, channels, side, side) in [-1, 1].

    Samples beside the training images nearest to them show whether the model has memorised any.

    Args:
        network: what is compared in.
        images: bytes or in [-1, 1].
        among: likewise; at most 10,000 of them are looked at.
        report: told how far it is.
    """
    rows = at_most(among, _MOST)
    others = network(rows, report, "features of images near to samples")
    distances = torch.cdist(network(images).double(), others.double())
    return scaled(rows[distances.argmin(dim=1).to(rows.device)]).cpu()


# ---------------------------------------------------------------------- files


def save_classifier(network: FeatureNetwork, path: str | os.PathLike[str]) -> None:
    """Write a network that `classifier` made: weights, and what they are, in one safetensors file.

    Raises:
        ValueError: if it is another network.
    """
    trunk, sizes = network.module, network.sizes
    if sizes is None or network.head is None:
        raise ValueError(f"`{network.name}` is no classifier made here; save its module yourself")
    path = Path(path)
    state = nn.ModuleDict({"trunk": trunk, "head": network.head}).state_dict()
    about = {"name": network.name, "accuracy": network.accuracy, "sizes": sizes}
    write_weights(path, state, about, {"bilevel": json.dumps(about)})


def load_classifier(path: str | os.PathLike[str]) -> FeatureNetwork:
    """Read a network that `save_classifier` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no feature network in `{path}`; `bilevel features DATA --out {path}` trains one"
        )
    try:
        about = json.loads(read_metadata(path)["bilevel"])
        check_fields(Classifier, about)
        tensors = read_weights(path, about)  # before anything is built of what may be damaged
        shape, classes, width = about["sizes"]
        trunk, head = _networks(shape, classes, width)
        fill_module(nn.ModuleDict({"trunk": trunk, "head": head}), tensors, path)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{path}` is no feature network that `bilevel features` wrote: {error}"
        ) from None
    for module in (trunk, head):
        module.eval().requires_grad_(False)
    sizes = (tuple(shape), classes, width)
    return FeatureNetwork(about["name"], trunk, _FEATURES, head, about["accuracy"], sizes)


def inception(
    path: str | os.PathLike[str] | None = None, *, published: str = INCEPTION
) -> FeatureNetwork:
    """The network of the published FID: TensorFlow's Inception of 2015-12-05, 2048 features.

    By torchmetrics and torch-fidelity, with the weights of the latter, images resized as TensorFlow 1
    did. Nothing is downloaded.

    Args:
        path: of the weights; by default `checkpoints/weights-inception-2015-12-05-6726825d.pth` in
            `torch.hub.get_dir()`, where both packages look for them.
        published: the name of the weights, which ends in the first digits of their SHA-256.

    Raises:
        FileNotFoundError: if the weights are not there, saying where they come from and go.
        ValueError: if the file holds something else.
        ImportError: if torchmetrics or torch-fidelity is missing.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / published if path is None else Path(path)
    if not weights.is_file():
        raise FileNotFoundError(
            f"there are no Inception weights in `{weights}`; fetch {_INCEPTION_AT}{published} (95 MB) "
            "and put it there, or give the path of the file"
        )
    with open(weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(published.removesuffix(".pth").rsplit("-", 1)[1]):
        raise ValueError(
            f"`{weights}` is not the file {published}: its SHA-256 starts with {found[:8]}; FIDs of "
            "other weights cannot be compared with published ones"
        )
    return FeatureNetwork("Inception of 2015-12-05", Inception(weights), 2048)


# ---------------------------------------------------------------------- networks


@final
class _Projection(nn.Module):
    """(v - mean) axes^T."""

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.axes: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)

    def forward(self, v: Tensor) -> Tensor:
        return (v.flatten(1).to(self.mean) - self.mean) @ self.axes.mT


def _networks(
    shape: tuple[int, int, int], classes: int, width: int
) -> tuple[nn.Sequential, nn.Linear]:
    """The layers of a classifier up to its features, and its head."""
    channels, side, _ = shape
    stride = 2 if side > 8 else 1  # images of 8 pixels are looked at whole first
    layers: list[nn.Module] = []
    while not layers or (side > 4 and side % 2 == 0):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels, side = width, -(-side // stride)
        width, stride = min(2 * width, max(width, _WIDEST)), 2
    layers += [nn.Flatten(), nn.Linear(channels * side**2, _FEATURES), nn.ReLU()]
    return nn.Sequential(*layers), nn.Linear(_FEATURES, classes)


def _accuracy(network: FeatureNetwork, images: Tensor, labels: Tensor) -> float:
    assert network.head is not None
    scores = network.head(network(images).to(_device(network.head)))
    return float((scores.argmax(dim=1).cpu() == labels).double().mean())


def _digest(module: nn.Module) -> str:
    """Eight digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
