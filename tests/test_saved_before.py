"""What version 0.1.0 saved still loads: models of six methods, and a run that is taken up again.

`data/saved_by_0_1` was written before the rooms of `methods` were made, in double precision: six models
of five steps each, BiDVL's run of four steps on digits, and in `expected.json` what all of them gave of
fixed rows, and what the same run gives after six steps. The files are never written again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.methods import (
    EBLVM,
    VAE,
    AdvIL,
    BiDVL,
    BiSM,
    ContrastiveDivergence,
    GeneralBiDVL,
    VaGES,
)
from bilevel.methods.data import load_images

SAVED = Path(__file__).resolve().parent / "data" / "saved_by_0_1"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())
METHODS: list[type[EBLVM]] = [BiSM, VaGES, AdvIL, ContrastiveDivergence, VAE, GeneralBiDVL]
STEPS = 4  # of the run


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_gives(model: EBLVM, expected: dict[str, Any], rtol: float = 1e-12) -> None:
    """Energies, posterior means and reconstructions of the rows."""
    rows = numbers(expected["rows"])
    for found, name in (
        (model.energy(rows), "energy"),
        (model.posterior(rows).mean, "posterior_mean"),
        (model.reconstruct(rows), "reconstruct"),
    ):
        torch.testing.assert_close(found, numbers(expected[name]), rtol=rtol, atol=rtol)
    sample = model.sample(3, torch.Generator().manual_seed(0))
    assert sample.shape == rows.shape
    assert bool(sample.isfinite().all())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_saved_model_loads_and_is_the_same(method: type[EBLVM], tmp_path: Path) -> None:
    folder, expected = SAVED / method.__name__, EXPECTED[method.__name__]
    model = method.load(folder)
    assert_gives(model, expected)
    model.save(tmp_path)  # today's files say the same of it
    old, new = (json.loads((at / "model.json").read_text()) for at in (folder, tmp_path))
    assert old == new
    assert_gives(method.load(tmp_path), expected)


def test_persistent_chains_are_among_what_was_saved() -> None:
    learner = ContrastiveDivergence.load(SAVED / "ContrastiveDivergence")
    assert learner.chains.shape == (5, 3)
    sample = learner.sample(7, torch.Generator().manual_seed(0), start="chains", sweeps=1)
    assert sample.shape == (7, 6)


def test_a_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(SAVED / "run", run)
    assert_gives(BiDVL.load(run / "model"), EXPECTED["run"])
    images = load_images("digits")

    def measure(model: EBLVM) -> dict[str, float]:
        v = model.check(images.test[:20])
        return {"rmse": float((model.reconstruct(v) - v).square().mean().sqrt())}

    recipe = json.loads((run / "config.json").read_text())["model"]
    model = BiDVL.for_images(tuple(recipe.pop("shape")), **recipe).double()
    history = model.fit(images.train, run=run, resume=True, num_steps=STEPS + 2, evaluate=measure)
    after = EXPECTED["run_of_6_steps"]
    assert (history.steps, history.total) == (2, STEPS + 2)
    # another processor may round otherwise, and training carries that on
    assert_gives(model, after, rtol=1e-7)
    for found, expected in (
        (history.records, after["records"]),
        (history.evaluations, after["evaluations"]),
    ):
        numbers_of = [{k: v for k, v in r.items() if k != "seconds"} for r in found]
        assert numbers_of == [pytest.approx(record, rel=1e-7) for record in expected]
    assert_gives(BiDVL.load(run / "model"), after, rtol=1e-7)
