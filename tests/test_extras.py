"""Without an optional package everything else works, and what needs it says which extra brings it."""

import html
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel import Comparison
from bilevel.loggers import TensorBoard, WandB
from bilevel.methods import RBM, ContrastiveDivergence, History
from bilevel.methods.data import load_images, load_table, show
from bilevel.methods.training.history import load_records

PACKAGES = ("matplotlib", "PIL", "rich", "pandas", "torchvision", "tensorboard", "wandb", "IPython")
RUN = Path(__file__).parent / "data" / "saved_by_0_1" / "run"
HISTORY = History([{"step": 1, "seconds": 0.1, "upper_loss": 1.0}], steps=1, total=1)

COMPARISON = Comparison((), "Problem", "the lower solution")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if it were not installed, whatever of it was imported before."""
    for name in [name for name in sys.modules if package in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def folder_of_images(path: Path) -> object:
    (path / "images").mkdir()
    (path / "images" / "one.png").write_bytes(b"")
    return load_images(path / "images")


def table_of_numbers(path: Path) -> object:
    (path / "mine.csv").write_text("a,b\n1,2\n")
    return load_table(path / "mine.csv")


NEEDS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "plot": ("matplotlib", "report", lambda _: HISTORY.plot()),
    "show": ("PIL", "report", lambda _: show(np.zeros((1, 4, 4)))),
    "folder": ("PIL", "report", folder_of_images),
    "to_frame": ("pandas", "tables", lambda _: HISTORY.to_frame()),
    "comparison": ("matplotlib", "report", lambda _: COMPARISON.plot()),
    "comparison_frame": ("pandas", "tables", lambda _: COMPARISON.to_frame()),
    "load_records": ("pandas", "tables", lambda _: load_records(RUN)),
    "load_table": ("pandas", "tables", table_of_numbers),
    "TensorBoard": ("tensorboard", "tensorboard", TensorBoard),
    "WandB": ("wandb", "wandb", WandB),
    "published": ("torchvision", "images", lambda _: load_images("cifar10")),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_an_extra_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, extra, call = NEEDS[name]
    without(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"pip install .*'bilevel\[{extra}\]'"):
        call(tmp_path)


def test_without_any_extra_a_model_trains_and_shows_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PACKAGES:
        without(monkeypatch, package)
    model = ContrastiveDivergence(RBM(4, 2))
    rows = torch.bernoulli(torch.full((20, 4), 0.5), generator=torch.Generator().manual_seed(0))
    history = model.fit(rows, num_steps=3, batch_size=5, run=tmp_path / "run", progress=True)
    assert "3/3" in capsys.readouterr().out
    for thing in (model, history):
        title = repr(thing).splitlines()[0]
        assert html.escape(title) in thing._repr_html_()
    model.save(tmp_path / "model")
    again = ContrastiveDivergence.load(tmp_path / "model")
    assert torch.equal(again.energy(rows), model.energy(rows))
