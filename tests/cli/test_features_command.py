"""The command that keeps a feature network, and the commands that read it."""

from pathlib import Path

import numpy as np
import pytest

from bilevel.cli import main
from bilevel.cli.features import feature_network
from bilevel.methods import BiDVL
from bilevel.methods.report.saved import feature_space
from bilevel.methods.training.run import Run
from tests.methods.evaluation.known import digits


def test_the_features_command_and_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "40", "--width", "4", "--out", "f.safetensors", "--device", "cpu"]
    assert main(["features", "digits", *options]) == 0
    seen = feature_network("f.safetensors")
    assert seen.label in capsys.readouterr().out
    images = digits()
    np.savez("strangers.npz", images=np.zeros((30, 5, 5), np.uint8))
    model = BiDVL.for_images(images.shape, latent_dim=2, width=2)
    model.fit(images.train, num_steps=1, run="r", notes={"data": "digits", "name": "digits"})
    model.save(Path("r") / "model")
    evaluate_it = ["evaluate", "r", "--features", "f.safetensors", "--samples", "60"]
    assert main([*evaluate_it, "--ood", "strangers.npz"]) == 0
    out, err = capsys.readouterr()
    assert seen.label in out
    assert "images or strangers" in out
    assert "note: too few images for a Fréchet distance: 60 for 64 features" in err
    assert feature_space(Run("r")) == seen.label
    assert (tmp_path / "r" / "neighbours.png").is_file()
    assert main(["features", "strangers.npz", "--out", "g"]) == 2
    assert "no labels" in capsys.readouterr().err
    assert main(["features", "digits"]) == 2
    assert "--out FILE is missing" in capsys.readouterr().err
    assert main(["evaluate", "r", "--samples", "1"]) == 2
    with pytest.raises(FileNotFoundError, match="no Inception weights in `w"):
        feature_network("w.pth")
