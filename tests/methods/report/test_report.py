"""Reports: whole, self-contained, and safe with any name."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from bilevel.methods import BiDVL
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.report.pictures import save_grid
from bilevel.methods.report.report import (
    feature_space,
    save_results,
    saved_pictures,
    saved_results,
    write_comparison,
    write_report,
)
from bilevel.methods.training.measures import result_rows
from bilevel.methods.training.run import Run

RESULTS = {
    "frechet": 2.5,
    "frechet_reference": 1.0,
    "rmse": 0.24,
    "rmse_pca": 0.21,
    "auroc_uniform": 1.0,
    "smallest_class_share": 0.07,
    "classifier_accuracy": 0.97,
}
VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: Path) -> str:
    """The text of a page that is well formed and loads nothing."""
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", source)
    assert "url(" not in source
    assert "http" not in source
    parser = Balanced()
    parser.feed(source)
    assert parser.open == []
    return " ".join(" ".join(parser.text).split())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return trained(tmp_path / "one")


def trained(folder: Path, **notes: str) -> Run:
    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=2)
    notes = {"data": "x", "name": "<x>", "note": "a & b", **notes}
    model.fit(
        torch.rand(20, 1, 8, 8), num_steps=2, batch_size=10, log_every=1, run=folder, notes=notes
    )
    save_grid(model.sample(4), folder / "samples.png")
    return Run(folder)


def test_a_report_tells_everything(run: Run) -> None:
    page = write_report(run, RESULTS, saved_pictures(run))
    assert page == run.folder / "report.html"
    text = read(page)
    assert "BiDVL on <x>" in text  # escaped in the source
    assert "a & b" in text
    assert "2 steps in" in text
    assert "training images: 1" in text
    assert "7.0%" in text
    assert "training.upper_lr" in text
    assert "versions.torch" in text
    assert page.read_text().count("data:image/png;base64,") == 1


def test_a_report_without_results_says_how_to_get_them(run: Run) -> None:
    assert "bilevel evaluate" in read(write_report(run, None, {}))


def test_a_comparison_has_a_row_per_run(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two")
    save_results(run, RESULTS, seed=0)
    save_results(other, {**RESULTS, "frechet": 2.0, "rmse": 0.3}, seed=0)
    page = write_comparison([run, other], tmp_path / "out" / "comparison.html")
    text, source = read(page), page.read_text()
    assert text.count("BiDVL on <x>") >= 2
    assert "<b>2</b>" in source  # the lower distance
    assert "<b>0.24</b>" in source  # the lower error
    assert "same configuration" in text
    assert source.count("data:image/png;base64,") == 2


def test_a_report_names_the_feature_space(run: Run) -> None:
    save_results(run, RESULTS, features="classifier of <x>, 64 features (1234abcd)")
    assert feature_space(run) == "classifier of <x>, 64 features (1234abcd)"
    page = write_report(run, saved_results(run), {})
    assert "judged by: classifier of <x>, 64 features (1234abcd)" in read(page)


def test_distances_in_different_feature_spaces_are_not_compared(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two")
    save_results(run, RESULTS, features="one")
    save_results(other, {**RESULTS, "frechet": 2.0, "rmse": 0.3}, features="two")
    page = write_comparison([run, other], tmp_path / "comparison.html")
    assert "<b>2</b>" not in page.read_text()
    assert "<b>0.24</b>" in page.read_text()  # an error is an error
    assert "one by one; two by two" in read(page)
    save_results(other, {**RESULTS, "frechet": 2.0}, features="one")
    page = write_comparison([run, other], tmp_path / "comparison.html")
    assert "<b>2</b>" in page.read_text()
    assert "judged by: one" in read(page)


def test_a_comparison_across_data_warns(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two", data="y")
    text = read(write_comparison([run, other], tmp_path / "c.html"))
    assert "different data" in text
    assert "notes.data" in text
    with pytest.raises(ValueError, match="no runs"):
        write_comparison([], tmp_path / "c.html")


def test_results_are_kept(run: Run) -> None:
    assert saved_results(run) is None
    path = save_results(run, RESULTS, statistics="batch")
    assert json.loads(path.read_text())["statistics"] == "batch"
    assert saved_results(run) == RESULTS


def test_rows_show_what_is_there() -> None:
    rows = {row.name: row for row in result_rows(RESULTS)}
    assert rows["smallest_class_share"].value == "7.0%"
    assert rows["rmse"].beside == "principal components: 0.21"
    assert "auroc_inverted" not in rows
    assert all(row.meaning for row in rows.values())


def test_strangers_get_a_row_of_their_own() -> None:
    rows = result_rows({"auroc_svhn": 0.76, "auroc_uniform": 1.0, "seconds": 3.0, "other": 1.0})
    assert [row.name for row in rows] == ["auroc_uniform", "auroc_svhn", "seconds"]
    assert rows[1].label == "Energy: images or svhn"
    assert rows[1].value == "0.7600"


def test_every_result_of_an_evaluation_has_a_row() -> None:
    images = load_images("digits")
    model = BiDVL.for_images(images.shape, latent_dim=2, width=2)
    seen = FeatureNetwork("pixels", nn.Flatten(), 64, nn.Linear(64, 3), 0.5)
    results = evaluate(model, images, features=seen, samples=80)
    shown = {row.name for row in result_rows(results)}
    references = {name for name in results if name.endswith("_reference")}
    assert results.keys() - shown - references == {"classifier_accuracy"}
    assert {name.removesuffix("_reference") for name in references} <= shown
