"""What the numbers of an evaluation mean: their labels, what to compare them with, how to read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

_AUROC = "chance that a real image has lower energy than {}: 1 always, 0.5 a coin toss"
_OTHER = "the same with batch norm by {}"
_POLICIES = {
    "running": "running averages, each image by itself",
    "batch": "the statistics of 100 images at a time, as the BiDVL paper evaluates",
}


@final
@dataclass(frozen=True)
class ResultRow:
    """One line of the results table.

    Attributes:
        name: key of the value in the results.
        label: what is measured.
        value: as text.
        beside: what to compare it with, as text; may be empty.
        meaning: how to read it, in a sentence.
        detail: whether a first look can do without it.
    """

    name: str
    label: str
    value: str
    beside: str
    meaning: str
    detail: bool


@final
@dataclass(frozen=True)
class Measure:
    """What a number of an evaluation is.

    Attributes:
        label: what is measured.
        meaning: how to read it, in a sentence.
        better: whether low or high values are good.
        by_features: whether it depends on the feature network.
        reference: name of the value to compare with; may be empty.
        beside: what that is.
        style: how it is written: three digits, percent, or four decimals.
        detail: whether a first look can do without it.
    """

    label: str
    meaning: str
    better: Literal["low", "high"]
    by_features: bool = False
    reference: str = ""
    beside: str = ""
    style: Literal["digits", "percent", "decimals"] = "digits"
    detail: bool = False

    def written(self, value: float) -> str:
        """The value as text."""
        return {"digits": f"{value:.3g}", "percent": f"{value:.1%}", "decimals": f"{value:.4f}"}[
            self.style
        ]


def _of_samples(
    name: str, label: str, meaning: str, better: Literal["low", "high"], **more: Any
) -> dict[str, Measure]:
    measure = Measure(
        f"Samples: {label}",
        meaning,
        better,
        by_features=True,
        reference=f"{name}_reference",
        beside="training images",
        **more,
    )
    return {name: measure}


def _of_energies(short: str, text: str) -> Measure:
    return Measure(f"Energy: images or {short}", _AUROC.format(text), "high", style="decimals")


_STRANGERS = {
    "auroc_uniform": ("noise", "uniform noise"),
    "auroc_constant": ("one colour", "one of a single colour"),
    "auroc_inverted": ("negatives", "its negative"),
    "auroc_shuffled": ("shuffled", "one with its pixels shuffled"),
}
_MEASURES = {
    **_of_samples(
        "frechet",
        "Fréchet distance",
        "distance between samples and held-out images, in features of a network; the real training "
        "images show what can be reached",
        "low",
    ),
    "frechet_train": Measure(
        "Samples: Fréchet distance to training images",
        "the same to the images that were learned from, as FIDs are published",
        "low",
        by_features=True,
        detail=True,
    ),
    **{
        f"frechet_{policy}": Measure(
            f"Samples: Fréchet distance ({policy})",
            _OTHER.format(text),
            "low",
            by_features=True,
            detail=True,
        )
        for policy, text in _POLICIES.items()
    },
    **_of_samples(
        "kid",
        "kernel distance",
        "another distance between samples and held-out images, not biased by their number; 0 if they "
        "cannot be told apart",
        "low",
        detail=True,
    ),
    **_of_samples(
        "precision",
        "precision",
        "share of samples that lie among the held-out images",
        "high",
        style="percent",
        detail=True,
    ),
    **_of_samples(
        "recall",
        "recall",
        "share of held-out images that lie among the samples",
        "high",
        style="percent",
        detail=True,
    ),
    **_of_samples(
        "density",
        "density",
        "how densely held-out images lie around a sample, 1 where they do around one another; no single "
        "odd image spoils it",
        "high",
        detail=True,
    ),
    **_of_samples(
        "coverage",
        "coverage",
        "share of held-out images that have a sample among their neighbours",
        "high",
        style="percent",
    ),
    **_of_samples(
        "smallest_class_share",
        "rarest class",
        "share of the class that the fewest samples are judged to be of; near 0, a class is missing",
        "high",
        style="percent",
    ),
    "rmse": Measure(
        "Reconstruction: RMSE",
        "error of a pixel (white - black = 2) when held-out images go through the latent; principal "
        "components are the best linear way with as many numbers",
        "low",
        reference="rmse_pca",
        beside="principal components",
    ),
    **{
        f"rmse_{policy}": Measure(
            f"Reconstruction: RMSE ({policy})", _OTHER.format(text), "low", detail=True
        )
        for policy, text in _POLICIES.items()
    },
    **{name: _of_energies(short, what) for name, (short, what) in _STRANGERS.items()},
}
_TRAINING = {
    "seconds": Measure("Training: seconds", "time spent in training steps", "low"),
    "steps_per_second": Measure(
        "Training: steps per second", "upper-level steps, each with its lower-level steps", "high"
    ),
}


def direction_of(name: str) -> Literal["low", "high"] | None:
    """Whether low or high values of a number of `evaluate` are good; `None` for an unknown one."""
    measure = _MEASURES.get(name)
    return None if measure is None else measure.better


def stranger(name: str) -> str:
    """The images that an `auroc_...` tells from the data, as the object of a sentence."""
    return _STRANGERS[name][1] if name in _STRANGERS else f"one of {name.removeprefix('auroc_')}"


def measures_of(results: Mapping[str, float]) -> dict[str, Measure]:
    """What is known about the results, in the order to show them; references are not results."""
    strangers = {
        name: _of_energies(name.removeprefix("auroc_"), stranger(name))
        for name in results
        if name.startswith("auroc_") and name not in _MEASURES
    }
    everything = _MEASURES | strangers | _TRAINING
    return {name: measure for name, measure in everything.items() if name in results}


def result_rows(results: Mapping[str, float]) -> list[ResultRow]:
    """What `evaluate` returned, as lines of a table a newcomer can read."""
    rows = []
    for name, measure in measures_of(results).items():
        beside = ""
        if measure.reference in results:
            beside = f"{measure.beside}: {measure.written(results[measure.reference])}"
        value = measure.written(results[name])
        rows.append(ResultRow(name, measure.label, value, beside, measure.meaning, measure.detail))
    return rows
