"""Reports: whole, self-contained, safe with any name, and true."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from bilevel.methods import BiDVL
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.evaluate import evaluate
from bilevel.methods.evaluation.features import FeatureNetwork
from bilevel.methods.report import (
    feature_space,
    save_results,
    saved_pictures,
    saved_results,
    write_comparison,
    write_report,
)
from bilevel.methods.report.pictures import save_curves, save_evaluations, save_grid
from bilevel.methods.training.measures import result_rows
from bilevel.methods.training.run import Run
from tests.methods.report.reading import read

RESULTS = {
    "frechet": 2.5,
    "frechet_reference": 1.0,
    "rmse": 0.24,
    "rmse_mean": 0.6,
    "rmse_pca": 0.21,
    "auroc_uniform": 1.0,
    "smallest_class_share": 0.07,
    "classifier_accuracy": 0.97,
}
SAVED = Path(__file__).resolve().parents[2] / "data" / "saved_by_0_1" / "run"
ODD = "a <b>&'\" name, " + "very_long_" * 20 + "%23"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return trained(tmp_path / "one")


def trained(folder: Path, **notes: str) -> Run:
    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=2)
    notes = {"data": "x", "name": "<x>", "note": "a & b", **notes}
    model.fit(
        torch.rand(20, 1, 8, 8) * 2 - 1,
        num_steps=2,
        batch_size=10,
        log_every=1,
        run=folder,
        notes=notes,
    )
    save_grid(model.sample(4), folder / "samples.png")
    run = Run(folder)
    few = ("step", "seconds", "upper_loss", "lower_loss")  # each takes time to draw
    lines = [json.dumps({name: line[name] for name in few}) for line in run.metrics()]
    run.metrics_path.write_text("\n".join(lines) + "\n")
    return run


def test_a_report_tells_everything(run: Run) -> None:
    page = write_report(run, RESULTS, saved_pictures(run))
    assert page == run.folder / "report.html"
    found = read(page)
    assert "BiDVL on <x>" in found.text  # escaped in the source
    assert "a & b" in found.text
    assert "All 2 steps were taken. It took" in found.text
    assert "training images: 1" in found.text
    assert "7.0%" in found.text
    assert "training. upper_ lr" in found.text  # a line may be broken after dots and dashes
    assert "versions. torch" in found.text
    assert found.alts == ["Samples drawn from the model, in a grid"]
    assert {path.name for path in found.links} == {"config.json", "metrics.jsonl", "model.json"}


def test_samples_come_first_and_all_else_is_folded(run: Run) -> None:
    save_curves(run.metrics(), run.folder / "curves.png")
    found = read(write_report(run, RESULTS, saved_pictures(run)))
    order = [found.source.index(part) for part in ("<img", 'class="five"', "<details>")]
    assert order == sorted(order)
    assert found.source.index("losses against step, from first to last. upper: ") > order[-1]
    for title in ("Curves", "All numbers", "All settings and versions"):
        assert f'<summary><span class="title">{title}</span>' in found.source


def test_a_report_says_when_and_how_the_run_was_begun(run: Run, tmp_path: Path) -> None:
    found = read(write_report(run, None, {}))
    config = run.config()
    assert f'datetime="{config["began"]}"' in found.source
    assert "Command from Python" in found.text
    assert f"bilevel {config['versions']['bilevel']}" in found.text
    typed = trained(tmp_path / "two", command="bilevel train bidvl --data 'my <x>' --seed 3")
    text = read(write_report(typed, None, {})).text.replace("  ", " ")
    assert "bilevel train bidvl --data 'my <x>' --seed 3" in text


def test_a_page_elsewhere_links_to_the_files_of_the_run(tmp_path: Path) -> None:
    run = trained(tmp_path / ODD[:60])
    found = read(write_report(run, None, {}, tmp_path / "deep" / "er" / "page.html"))
    assert run.config_path.resolve() in found.links
    assert not (run.folder / "report.html").exists()


def test_a_report_without_results_says_how_to_get_them(run: Run) -> None:
    assert "bilevel evaluate" in read(write_report(run, None, {})).text


def test_old_short_and_odd_runs_get_their_pages(tmp_path: Path) -> None:
    """No dates, no commands, NaN among the losses, one step, no lines at all, odd names."""
    old = Run(tmp_path / "old")
    shutil.copytree(SAVED, old.folder)
    save_evaluations(old.evaluations(), old.folder / "evaluations.png")
    text = read(write_report(old, None, saved_pictures(old))).text
    assert "Begun not recorded Command not recorded" in text
    assert "All 4 steps were taken" in text

    odd = trained(tmp_path / ODD[:90], name=ODD, data="y" * 300, note="`code` <i>")
    lines = odd.metrics()
    lines = [{**lines[0], "upper_loss": float("nan"), "lower_loss": float("inf")}]
    text_of_lines = "".join(json.dumps(line) + "\n" for line in lines)
    odd.metrics_path.write_text(text_of_lines)
    save_curves(lines, odd.folder / "curves.png")
    results = {"frechet": float("nan"), "rmse": float("inf"), "auroc_uniform": float("nan")}
    page = read(write_report(odd, results, saved_pictures(odd)))
    assert ODD in page.text
    assert "not a number" in page.text
    assert "Its end is not on record; the last step that is: 1 of 2." in page.text
    odd.metrics_path.unlink()
    read(write_report(odd, {}, {}))
    compared = read(write_comparison([old, odd, odd], tmp_path / "c.html"))
    assert "different data" in compared.text


def test_a_comparison_has_a_row_per_run(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two")
    write_report(run, None, {})
    save_results(run, RESULTS, seed=0)
    save_results(other, {**RESULTS, "frechet": 2.0, "rmse": 0.3}, seed=0)
    page = read(write_comparison([run, other], tmp_path / "out" / "comparison.html"))
    assert page.text.count("BiDVL on <x>") >= 2
    assert '<b class="best">2</b>' in page.source  # the lower distance
    assert '<b class="best">0.24</b>' in page.source  # the lower error
    assert '<b class="best">1.0000</b>' not in page.source  # equal: none is better
    assert "same configuration" in page.text
    assert page.alts[:2] == ["Samples of one", "Samples of two"]
    assert run.folder.resolve() / "report.html" in page.links


def test_a_comparison_draws_all_runs_in_one_chart(run: Run, tmp_path: Path) -> None:
    """A chart for each quantity; each tells the first and the last value of every run."""
    other = trained(tmp_path / "two")
    for number, one in enumerate((run, other)):
        for step in (1, 2):
            line = {"step": step, "seconds": 1.0 * step, "frechet": 9.0 - number - step}
            one.append_evaluation(line)
    page = read(write_comparison([run, other], tmp_path / "c.html"))
    assert (
        "Samples: Fréchet distance against step, from first to last. one: 8 to 7; two: 7 to 6."
        in page.alts
    )
    assert any(alt.startswith("Samples: Fréchet distance against seconds") for alt in page.alts)
    losses = [alt for alt in page.alts if alt.startswith("upper loss against step")]
    assert len(losses) == 1
    assert "one: " in losses[0]
    assert "two: " in losses[0]
    assert page.source.count('class="legend"') == 2


def test_a_report_names_the_feature_space(run: Run) -> None:
    save_results(run, RESULTS, features="classifier of <x>, 64 features (1234abcd)")
    assert feature_space(run) == "classifier of <x>, 64 features (1234abcd)"
    page = write_report(run, saved_results(run), {})
    assert "judged by: classifier of <x>, 64 features (1234abcd)" in read(page).text


def test_distances_in_different_feature_spaces_are_not_compared(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two")
    save_results(run, RESULTS, features="one")
    save_results(other, {**RESULTS, "frechet": 2.0, "rmse": 0.3}, features="two")
    page = write_comparison([run, other], tmp_path / "comparison.html")
    assert '<b class="best">2</b>' not in page.read_text()
    assert '<b class="best">0.24</b>' in page.read_text()  # an error is an error
    assert "one by one; two by two" in read(page).text
    save_results(other, {**RESULTS, "frechet": 2.0}, features="one")
    page = write_comparison([run, other], tmp_path / "comparison.html")
    assert '<b class="best">2</b>' in page.read_text()
    assert "judged by: one" in read(page).text


def test_a_comparison_across_data_warns(run: Run, tmp_path: Path) -> None:
    other = trained(tmp_path / "two", data="y")
    text = read(write_comparison([run, other], tmp_path / "c.html")).text
    assert "different data" in text
    assert "notes. data" in text
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
