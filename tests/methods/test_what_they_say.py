"""What learners, machines, data and histories say of themselves, in text and in notebooks."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from bilevel.methods import BiDVL, ContrastiveDivergence, History, load_records
from bilevel.methods.data import load_images, load_table
from bilevel.methods.data.densities import density
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import DBM, RBM, GaussianRBM
from tests.small_learners import MODELS, SHAPE, WIDTH, bits

OFFERED = {
    "energy": lambda model, v: model.energy(v),
    "sample": lambda model, v: model.sample(2, torch.Generator().manual_seed(0)),
    "posterior": lambda model, v: model.posterior(v),
    "reconstruct": lambda model, v: model.reconstruct(v),
    "decode": lambda model, v: model.decode(torch.zeros(2, model.latent_dim)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_learner_says_what_it_is_and_can(name: str) -> None:
    make, data = MODELS[name]
    model, v = make(), data()[:2]
    text = repr(model)
    assert text.splitlines()[0] == type(model).__name__
    assert len(text.splitlines()) <= 12
    assert re.search(r"\n  upper +[\d,]+ parameters in \d+ tensors", text)
    assert "\n  on        cpu, float32" in text
    assert str(tuple(v.shape[1:])) in text
    for other in (copy.deepcopy(model), copy.deepcopy(model).double(), make().to("meta")):
        assert repr(other).splitlines()[0] == text.splitlines()[0]
        assert other._repr_html_().startswith("<div>")
    model.probe(v)
    can = model.latent_model.abilities()
    said = repr(model).replace("sample (by Langevin dynamics)", "sample")
    assert ("score, " in said) == model.latent_model.visibles.real
    said = said.replace("score, ", "")
    assert f"\n  can       {', '.join(can)}\n" in said
    for ability in can:
        OFFERED[ability](model, v)
    for ability in OFFERED.keys() - set(can):
        with pytest.raises((NotImplementedError, ValueError)):
            OFFERED[ability](model, v)
    assert repr(model.latent_model).endswith(", ".join(can))


def test_a_learner_tells_its_variant_and_what_is_open() -> None:
    model = BiDVL.for_images(SHAPE, latent_dim=2, width=4, variant="complete")
    for words in (
        "variant='complete'",
        "(1, 8, 8) in [-1, 1]",
        "2 numbers",
        "generator (Generator)",
    ):
        assert words in repr(model)
    assert "first order only" not in repr(model)
    own = BiDVL(
        *(model.latent_model.marginal, model.latent_model.moments, model.lower["generator"])
    )
    assert "first order only: variant='offset'" in repr(own)
    assert "latent    its dimension is found from the first data" in repr(own)
    assert "visibles  of any shape, real numbers" in repr(own)
    assert repr(EBLVM.__new__(BiDVL)) == "BiDVL, before `super().__init__()`"


def test_machines_say_their_units() -> None:
    assert repr(RBM(784, 64)) == (
        "RBM(784 binary visible, 64 hidden; 51,024 parameters on cpu, float32)"
    )
    assert repr(RBM(2, 1, grey=True)).startswith("RBM(2 grey visible, 1 hidden;")
    assert repr(GaussianRBM(2, 1).double()).startswith("GaussianRBM(2 real visible, 1 hidden;")
    assert repr(DBM(6, (3, 2))).startswith("DBM(6 binary visible, 3 and 2 hidden;")
    assert "(model): RBM(6 binary" in repr(ContrastiveDivergence(RBM(WIDTH, 3)).upper)


def test_data_say_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images("digits")
    text = repr(images)
    for words in ("1,438 images (1, 8, 8), float32 in [-1, 1]", "359 images", "classes  10"):
        assert words in text
    assert len(text) < 400
    assert "data:image/png;base64," in images._repr_html_()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "<img" not in images._repr_html_()
    assert "1,438 images" in images._repr_html_()
    table = load_table("checkerboard", size=5)
    for words in ("Table `checkerboard`", "5 rows of 2", "real numbers", "entropy  -0.6931 nats"):
        assert words in repr(table)
    assert "5 rows of 2" in table._repr_html_()
    assert "UniformSquares" in repr(density("checkerboard"))


# ---------------------------------------------------------------------- histories


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    for name, evaluate in (("a", lambda model: {"own": 2.0, "rmse": 0.5}), ("b", None)):
        model = ContrastiveDivergence(RBM(WIDTH, 3))
        model.fit(
            bits(),
            num_steps=6,
            batch_size=4,
            log_every=2,
            evaluate_every=3 if evaluate else None,
            run=folder / name,
            evaluate=evaluate,
        )
    return folder


def test_a_history_says_its_last_numbers_and_is_drawn(runs: Path) -> None:
    history = History.load(runs / "a")
    text = repr(history)
    assert text.startswith("History: 6 steps in ")
    assert re.search(r"at step 6 +upper_loss ", text)
    assert re.search(r"evaluated at 6 +own 2, rmse 0.5", text)
    assert len(text.splitlines()) <= 6
    assert "<polyline" in history._repr_html_()
    assert "0 records" in repr(History())
    assert "<polyline" not in History()._repr_html_()
    figure = history.plot()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert {"losses", "own", "RMSE of reconstructions"} <= set(titles)
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no records"):
        History().plot()


def test_records_become_data_frames(runs: Path) -> None:
    frame = History.load(runs / "a").to_frame()
    assert frame["step"].tolist() == [2, 3, 4, 6]
    assert frame.loc[frame["step"] == 6, "own"].item() == 2
    assert frame["own"].isna().tolist() == [True, False, True, False]
    assert frame["upper_loss"].isna().tolist() == [False, True, False, False]
    both = load_records(runs)
    assert both.groupby("run")["step"].max().to_dict() == {"a": 6, "b": 6}
    assert load_records(runs / "a", runs / "b").equals(both)
    twice = load_records(runs / "a", runs)
    assert set(twice["run"]) == {(runs / "a").as_posix(), "b"}
    assert History().to_frame().empty


def test_what_is_no_run_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run, and there is none below it"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="give the folder"):
        load_records()
    with pytest.raises(TypeError, match=r"write `load_records\(\*folders\)`"):
        load_records([runs / "a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`folders` must be a path"):
        load_records(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        History.load(tmp_path)


def test_without_the_extras_a_sentence_says_which(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pandas", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    history = History.load(runs / "a")
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[tables\]'"):
        history.to_frame()
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[report\]'"):
        history.plot()
    assert "<polyline" in history._repr_html_()
