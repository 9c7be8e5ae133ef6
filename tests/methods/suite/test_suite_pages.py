"""Tables and pages of a suite, made from records."""

import statistics
from pathlib import Path

import pytest
import torch

from bilevel.methods.suite import SuiteFolder, run_suite
from bilevel.methods.suite.config import DataConfig, parse_config
from bilevel.methods.suite.job import make_table
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.tables import groups, markdown
from tests.methods.report.reading import read
from tests.methods.suite.small_suite import BLOCK, suite


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SuiteFolder:
    """A suite on the plane and on images, two seeds."""
    folder = tmp_path_factory.mktemp("done")
    images = {
        "data": ["digits"],
        "models": [{"kind": "RBM", "options": {"latent_dim": 3, "grey": True}}],
        "methods": [
            "cd1",
            {"preset": "vae", "options": {"hidden": [5]}},
            {"preset": "advil", "training": {"lower_steps": 2}},
        ],
        "training": BLOCK["training"],
        "evaluation": {"points": 3},
    }
    plane = {**BLOCK, "methods": ["ml", "dsm", "nce"], "seeds": [0, 1]}
    config = parse_config({"name": "tiny", "blocks": [plane, images]}, "tiny")
    run_suite(config, folder)
    return SuiteFolder(folder)


def test_numbers_in_tables_are_those_of_the_records(done: SuiteFolder) -> None:
    records = done.records()
    board, digits = groups(records)
    values = [r["test"]["value"] for r in records if r["cell"].startswith("checkerboard/Gauss")]
    ml, dsm = values[:2], values[2:4]
    row = board.rows[1]
    assert row.method == "dsm"
    assert row.value == pytest.approx(statistics.mean(dsm), abs=1e-12)
    assert row.spread == pytest.approx(abs(dsm[0] - dsm[1]) / 2**0.5, abs=1e-12)
    assert board.exact == pytest.approx(statistics.mean(ml), abs=1e-12)
    assert board.ceiling == records[0]["ceiling"]
    assert digits.rows[0].spread is None
    text = markdown([board, digits]).replace("\N{MINUS SIGN}", "-")
    line = next(line for line in text.splitlines() if line.startswith("| dsm"))
    assert f"{statistics.mean(dsm):.3f} ± {statistics.stdev(dsm):.3f}" in line
    assert f"{statistics.mean(ml) - statistics.mean(dsm):.3f}" in line
    assert "| negative entropy of the data | 0.693 |" in text


def test_the_first_line_of_a_table_is_the_independent_model(done: SuiteFolder) -> None:
    """Its likelihood by torch's own distributions, in the records, the tables and the page."""
    board, digits = groups(done.records())
    write_suite_report(done)
    page = (done.folder / "report.html").read_text()
    for group, data in ((board, BLOCK["data"][0]), (digits, "digits")):
        rows = make_table(DataConfig.model_validate(data))
        train, test = rows.train.double(), rows.test.double()
        if data == "digits":
            ones = torch.cat([train, torch.zeros(1, 64), torch.ones(1, 64)]).mean(0)
            grey = [
                torch.distributions.Bernoulli(ones).log_prob(torch.tensor(x).double())
                for x in (0.0, 1.0)
            ]
            expected = ((1 - test) * grey[0] + test * grey[1]).sum(1).mean()
        else:
            normal = torch.distributions.Normal(train.mean(0), train.std(0, correction=0))
            expected = normal.log_prob(test).sum(1).mean()
        assert group.independent == pytest.approx(float(expected), rel=1e-9)
        number = f"{float(expected):.3f}".replace("-", "\N{MINUS SIGN}")
        first = markdown([group]).splitlines()[4]
        assert first.startswith(f"| independent columns | {number} |")
        assert f'class="run">independent columns</th><td class="number">{number}</td>' in page


def test_records_of_old_runs_have_no_first_line_of_their_own(done: SuiteFolder) -> None:
    old = [{k: v for k, v in record.items() if k != "independent"} for record in done.records()]
    assert "independent" not in markdown(groups(old))


def test_the_page_is_self_contained_and_mentions_every_method(done: SuiteFolder) -> None:
    page = write_suite_report(done)
    found = read(page)
    source = found.source
    assert page == done.folder / "report.html"
    assert {"suite.json", "records.jsonl", "tables.md"} == {path.name for path in found.links}
    for time in (done.records()[0]["time"], done.records()[-1]["time"]):
        assert f'datetime="{time}"' in source
    for name in ("ml", "dsm", "nce", "cd1", "vae", "advil"):
        assert f'class="run">{name}</th>' in source
    assert "for &lt;tests&gt;" in source
    assert "upper_<wbr>lr" in source
    # curves of both, densities of the plane, filters and samples of the images
    assert source.count("data:image/png;base64,") == 5
    assert (done.folder / "tables.md").exists()


def test_records_alone_make_tables_and_curves(done: SuiteFolder, tmp_path: Path) -> None:
    for name in ("suite.json", "records.jsonl"):
        (tmp_path / name).write_bytes((done.folder / name).read_bytes())
    source = write_suite_report(SuiteFolder(tmp_path)).read_text()
    assert source.count("data:image/png;base64,") == 2
    write_suite_report(done)
    assert (tmp_path / "tables.md").read_text() == (done.folder / "tables.md").read_text()


def test_a_suite_without_records_has_no_report(tmp_path: Path) -> None:
    home = SuiteFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no `suite.json`"):
        write_suite_report(home)
    home.claim(suite())
    with pytest.raises(ValueError, match="no finished cells"):
        write_suite_report(home)
