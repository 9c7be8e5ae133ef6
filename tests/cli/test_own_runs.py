"""`sample` and `evaluate` of runs whose networks or method are somebody's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.cli import main
from bilevel.methods import VAE, GaussianRBM, MaximumLikelihood, ScoreMatching
from tests import runs
from tests.methods.suite.own_things import Denoiser

Capture = pytest.CaptureFixture[str]


def networks() -> Any:
    return runs.small()


def parts() -> dict[str, Any]:
    return {**runs.parts(), "latent_dim": 2, "visible_shape": runs.SHAPE}


def other() -> Any:
    return VAE.for_table(2, 2, generator=torch.Generator().manual_seed(0))


def wrong_parts() -> dict[str, Any]:
    return {**runs.parts(), "energi": torch.nn.Identity()}


def denoiser() -> Denoiser:
    return Denoiser(GaussianRBM(2, 3))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of networks of one's own, made in Python."""
    monkeypatch.chdir(tmp_path)
    model = runs.small()
    runs.trained(model, tmp_path / "mine", num_steps=2)
    return tmp_path / "mine"


def test_networks_of_ones_own_are_sampled(run: Path, capsys: Capture) -> None:
    drawn = []
    for name in ("networks", "parts"):
        assert (
            main(["sample", "mine", "-n", "3", "--out", "s.npz", "--model", f"{__name__}:{name}"])
            == 0
        )
        with np.load("s.npz") as file:
            drawn.append(file["images"])
    assert drawn[0].shape == (3, *runs.SHAPE)
    assert (drawn[0] == drawn[1]).all()
    learner = runs.small().load(run / "model", **parts())
    expected = learner.sample(3, torch.Generator().manual_seed(0))
    assert (drawn[0] == expected.numpy()).all()


def energy() -> Any:
    return ScoreMatching(Far())


class Far(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.scale * v.square().sum(1)


def test_an_energy_of_ones_own_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = ["sample", "mine", "-n", "2", "--model", f"{__name__}:energy"]
    model = energy()
    model.fit(torch.randn(8, 2), num_steps=1, batch_size=4, run="mine")
    assert main(sample) == 0
    with np.load("mine/drawn.npz") as file:
        assert file["rows"].shape == (2, 2)
    model.visible_shape = None  # as earlier versions left it
    model.save("mine/model")
    capsys.readouterr()
    assert main(sample) == 2
    assert "this `ScoreMatching` cannot be sampled: the shape of a vis" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "is made of networks of your own; name the function that makes it: `--model"),
        (
            "networkz",
            "did you mean `networks`?",
        ),
        ("other", "holds a `BiDVL`, and what was made is a `VAE`"),
        ("wrong_parts", ":wrong_parts` raised TypeError: `BiDVL` has no argument `energi`"),
        ("Path", "is the class `Path`, and something else is needed"),
        ("runs", "is a `module`, and something else is needed"),
    ],
)
def test_code_that_does_not_fit_is_refused(
    command: str, code: str | None, message: str, run: Path, capsys: Capture
) -> None:
    more = [] if code is None else ["--model", f"{__name__}:{code}"]
    assert main([command, "mine", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rows_of_machines_and_methods_of_ones_own_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    MaximumLikelihood(GaussianRBM(2, 3)).fit(rows, num_steps=2, batch_size=20, run="exact")
    denoiser().fit(rows, num_steps=2, batch_size=20, run="mine")
    assert main(["sample", "exact", "-n", "4"]) == 0
    assert main(["sample", "mine", "-n", "4", "--model", f"{__name__}:denoiser"]) == 0
    for name in ("exact", "mine"):
        with np.load(f"{name}/drawn.npz") as file:
            assert file["rows"].shape == (4, 2)
    capsys.readouterr()
    for words, message in (
        ("sample exact --out x.png", "draws rows of shape (2,), which make no picture"),
        ("sample mine", "is no method of this package; name its code: `--model package.module:Den"),
        ("evaluate exact", "was trained on rows of 2 numbers, and `evaluate` measures images"),
    ):
        assert main(words.split()) == 2
        assert message in capsys.readouterr().err
