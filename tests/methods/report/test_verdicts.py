"""What a page says of a number: never more than the records do."""

import math

import pytest

from bilevel.methods.report.verdicts import five_numbers, length_of

NAN = math.nan


@pytest.mark.parametrize(
    ("results", "value", "sentence"),
    [
        (
            {"frechet": 24.7, "frechet_reference": 7.31},
            "24.7",
            "3.4 times the distance that the training images themselves have to held-out images (7.31).",
        ),
        (
            {"frechet": 7.0, "frechet_reference": 7.31},
            "7",
            "Samples are as close to held-out images as the training images themselves (7.31).",
        ),
        ({"frechet": 7.0}, "7", "Distance between samples and held-out images; low is good."),
        (
            {"frechet": 7.0, "frechet_reference": 0.0},
            "7",
            "Distance between samples and held-out images; low is good.",
        ),
        (
            {"frechet": NAN, "frechet_reference": 7.0},
            "not a number",
            "Distance between samples and held-out images; low is good.",
        ),
        (
            {"coverage": 0.54, "coverage_reference": 0.992},
            "54.0%",
            "54.0% of held-out images have a sample near them; 99.2% have a training image near them.",
        ),
        (
            {"coverage": 0.99, "coverage_reference": 0.992},
            "99.0%",
            "As many held-out images have a sample near them as have a training image near them "
            "(99.2%).",
        ),
        (
            {"rmse": 0.3, "rmse_mean": 0.6, "rmse_pca": 0.2},
            "0.3",
            "50% less than the mean image's (0.6). "
            "Principal components, as many as latents, err less (0.2).",
        ),
        (
            {"rmse": 0.7, "rmse_mean": 0.6},
            "0.7",
            "No better than showing the mean image every time (0.6).",
        ),
        (
            {"rmse": 0.1, "rmse_pca": 0.2},
            "0.1",
            "Principal components, as many as latents, err more (0.2).",
        ),
        ({"rmse": 0.1}, "0.1", "Of a pixel, where black and white are 2 apart; low is good."),
        (
            {"auroc_uniform": 1.0, "auroc_shuffled": 0.99996},
            "0.999",
            "99.9% of the time a real image has lower energy than one with its pixels shuffled; a coin "
            "toss would be 50%. This is the hardest of 2 kinds of images.",
        ),
        (
            {"auroc_svhn": 0.51},
            "0.510",
            "A coin toss: the energy does not tell a real image from one of svhn.",
        ),
        (
            {"auroc_inverted": 0.2},
            "0.200",
            "Worse than a coin toss (0.5): 20.0% of the time a real image has lower energy than its "
            "negative.",
        ),
        ({"auroc_uniform": NAN, "auroc_svhn": 1.0}, "not a number", "It could not be computed."),
    ],
)
def test_a_verdict_says_what_the_numbers_support(
    results: dict[str, float], value: str, sentence: str
) -> None:
    (verdict,) = five_numbers(None, results)
    assert (verdict.value, verdict.sentence) == (value, sentence)


def lines(*seconds: float) -> list[dict[str, float]]:
    return [{"step": step, "seconds": s} for step, s in enumerate(seconds, start=1)]


def told(config: dict[str, object], *seconds: float) -> str:
    length = length_of(config, lines(*seconds))
    assert length is not None
    return five_numbers(length, {})[0].sentence


def test_how_a_training_ended() -> None:
    assert (
        told({"training": {"num_steps": 2}}, 1, 20) == "All 2 steps were taken. It took 20 seconds."
    )
    by = {"step": 2, "num_steps": 9, "by": "a callback"}
    assert told({"training": {"num_steps": 9}, "stopped": by}, 1, 1.5) == (
        "Stopped by a callback at step 2 of 9. It took 1.5 seconds."
    )
    clock = {"training": {"num_steps": 9, "max_seconds": 3.0}}  # of an earlier version
    assert told(clock, 1, 3).startswith("Stopped by the clock (`max_seconds` 3) at step 2 of 9.")
    assert told(clock, 1, 2).startswith("Its end is not on record; the last step that is: 2 of 9.")
    by = {"step": 4, "num_steps": 9, "by": "divergence"}  # between two lines of metrics
    assert told({"training": {"num_steps": 9}, "stopped": by}, 1, 1.5).startswith(
        "Stopped by divergence at step 4 of 9."
    )
    resumed = {"training": {"num_steps": 3}, "resumed": [2]}
    assert told(resumed, 30, 60, 40) == "All 3 steps were taken. It took 100 seconds."
    assert told({"training": {"num_steps": 9}}) == (
        "Its end is not on record; the last step that is: 0 of 9."
    )
    assert length_of({}, lines(1)) is None


def test_five_numbers_are_five() -> None:
    results = dict.fromkeys(
        ("frechet", "coverage", "rmse", "auroc_uniform", "smallest_class_share"), 0.5
    )
    labels = [v.label for v in five_numbers(length_of({"training": {"num_steps": 1}}, []), results)]
    assert len(labels) == 5
    assert labels[0] == "Steps"
    assert len(five_numbers(None, results)) == 5
