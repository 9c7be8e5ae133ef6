"""Damaged files, full disks, signals: harmless or one sentence, and never another result in silence."""

import contextlib
import io
from pathlib import Path

import pytest

from bilevel.cli import main
from bilevel.methods.data import load_images
from bilevel.methods.features import classifier, save_classifier
from bilevel.methods.suite import run_suite
from tests import faults


def make_world(world: Path) -> None:
    """A finished run, one and a suite that were stopped midway, a suite, a feature network."""
    data = world / "data.npz"
    faults.images(data)
    with contextlib.redirect_stdout(io.StringIO()):
        options = ["--num-steps", "6", "--evaluate-every", "2"]
        assert main(faults.start(data, world / "run", *options)) == 0
        short = ["--num-steps", "6", "--evaluate-every", "2", "--no-report"]
        assert main(faults.start(data, world / "half", *short)) == 0
    checkpoints = world / "half" / "checkpoints"
    (checkpoints / "step-00000003.pt").replace(checkpoints / "last.pt")
    run_suite(faults.suite(), world / "suite")

    def stop(step: object) -> None:
        if getattr(step, "number", 0) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(faults.suite(), world / "halfsuite", callbacks=[stop])
    network = classifier(load_images("digits", limit=60), num_steps=2, width=2)
    save_classifier(network, world / "features.safetensors")
