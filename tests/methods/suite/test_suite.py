"""The suite: resumable to the bit, refused by name, tables and pages made from records."""

import json
import re
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import CheckpointError, Step, cli
from bilevel.cli import main
from bilevel.methods.likelihood import log_likelihood
from bilevel.methods.suite import SuiteConfig, SuiteFolder, load_config, run_suite
from bilevel.methods.suite.config import (
    Block,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    parse_config,
)
from bilevel.methods.suite.judge import judge
from bilevel.methods.suite.learners import Job, make_job, make_solver, make_table
from bilevel.methods.suite.presets import METHOD_PRESETS, PRESETS
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.runner import trained
from bilevel.methods.suite.tables import groups, markdown
from bilevel.methods.suite.trace import log_spaced
from bilevel.methods.training.settings import Training

Capture = pytest.CaptureFixture[str]
TIMES = ("time", "seconds", "startup_seconds", "steps_per_second")
BLOCK: dict[str, Any] = {
    "note": "for <tests>",
    "data": [{"source": "checkerboard", "options": {"size": 200}}],
    "models": [{"kind": "GaussianRBM", "options": {"latent_dim": 2}}],
    "methods": ["dsm", "bism-dsm"],
    "training": {"num_steps": 20, "batch_size": 50, "checkpoint_every": 5},
}


def suite(**changes: Any) -> SuiteConfig:
    return parse_config({"name": "tiny", "blocks": [{**BLOCK, **changes}]}, "tiny")


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock says."""
    kept = {name: value for name, value in record.items() if name not in TIMES}
    return {**kept, "trace": [[step, value] for step, _, value in record["trace"]]}


def stopping_at(number: int) -> Callable[[Step], None]:
    def stop(step: Step) -> None:
        if step.number == number:
            raise KeyboardInterrupt

    return stop


def no_steps(step: Step) -> None:
    raise AssertionError(f"step {step.number} was taken again")


# ---------------------------------------------------------------------- running


def test_a_cell_killed_midway_resumes_to_the_uninterrupted_record(tmp_path: Path) -> None:
    config = suite()
    whole = run_suite(config, tmp_path / "whole")
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run_suite(config, tmp_path / "parts", callbacks=[stopping_at(13)])
    resumed = run_suite(
        config, tmp_path / "parts", callbacks=[lambda step: steps.append(step.number)]
    )
    assert steps[0] == 11  # after the checkpoint of step 10, not from the start
    assert list(map(timeless, resumed)) == list(map(timeless, whole))
    clock = [seconds for _, seconds, _ in resumed[0]["trace"]]
    assert clock == sorted(clock)
    assert resumed[0]["seconds"] >= clock[-1] > clock[-2]


def test_finished_cells_are_not_repeated(tmp_path: Path) -> None:
    first = run_suite(suite(), tmp_path)
    lines = (tmp_path / "records.jsonl").read_text()
    assert run_suite(suite(), tmp_path, callbacks=[no_steps]) == first
    assert (tmp_path / "records.jsonl").read_text() == lines


def test_other_seeds_are_other_cells_of_the_same_suite(tmp_path: Path) -> None:
    run_suite(suite(), tmp_path, only=["dsm"])
    more = run_suite(suite(seeds=[0, 1]), tmp_path, only=["dsm"])
    assert [record["seed"] for record in more] == [0, 1]
    assert more[0]["test"]["value"] != more[1]["test"]["value"]
    assert len(SuiteFolder(tmp_path).records()) == 2


def test_a_record_cut_off_by_a_crash_is_run_again(tmp_path: Path) -> None:
    first = run_suite(suite(), tmp_path, only=["dsm"])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text()[:-20])
    again = run_suite(suite(), tmp_path, only=["dsm"], callbacks=[no_steps])  # it was trained
    assert list(map(timeless, again)) == list(map(timeless, first))
    assert SuiteFolder(tmp_path).records() == again


def test_a_changed_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run_suite(suite(), tmp_path, only=["dsm"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = suite(training={**BLOCK["training"], "num_steps": 30})
    with pytest.raises(ValueError, match=r"`blocks.0.training.num_steps` was 20, is 30") as caught:
        run_suite(changed, tmp_path)
    assert "--out" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failing_cell_is_recorded_and_the_suite_goes_on(tmp_path: Path) -> None:
    broken = {"preset": "dsm", "name": "broken", "training": {"upper_lr": 1e30}}
    records = run_suite(suite(methods=[broken, "dsm"]), tmp_path)
    assert [record["status"] for record in records] == ["failed", "finished"]
    assert "step" in records[0]["reason"]
    assert "test" not in records[0]
    assert run_suite(suite(methods=[broken, "dsm"]), tmp_path, callbacks=[no_steps]) == records
    page = write_suite_report(SuiteFolder(tmp_path)).read_text()
    assert "Failed: broken" in page


def test_a_checkpoint_that_does_not_fit_is_no_failure_of_the_method(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite(), tmp_path, callbacks=[stopping_at(13)])
    for path in tmp_path.rglob("last.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        run_suite(suite(), tmp_path)
    assert not SuiteFolder(tmp_path).records()


def test_time_that_is_up_ends_a_cell(tmp_path: Path) -> None:
    limited = suite(methods=["dsm"], training={**BLOCK["training"], "max_seconds": 1e-9})
    (record,) = run_suite(limited, tmp_path)
    assert record["steps"] == 2  # the first is not counted
    assert record["trace"][-1][0] == 2


def test_a_record_tells_how_it_was_made(tmp_path: Path) -> None:
    (record,) = run_suite(suite(methods=["bism-dsm"]), tmp_path)
    assert record["solver"].startswith("Unrolled(num_steps=5")
    assert record["training"]["lower_steps"] == 5  # the paper's
    assert record["training"]["num_steps"] == 20  # the block's
    assert record["ceiling"] == pytest.approx(0.6931, abs=1e-4)
    assert record["test"]["known"] == "exact"
    assert record["steps"] == 20
    assert record["startup_seconds"] > 0
    assert record["steps_per_second"] == pytest.approx(19 / record["seconds"], rel=0.02)
    assert {"bilevel", "torch", "python"} <= record["versions"].keys()
    assert [point[0] for point in record["trace"]] == [0, *sorted(log_spaced(20, 20))]
    assert record["trace"][-1][2] == record["test"]["value"]
    json.dumps(record, allow_nan=False)


def test_the_recorded_likelihood_is_that_of_the_kept_model(tmp_path: Path) -> None:
    config = suite(methods=["pcd"])  # its chains are part of what is kept
    (record,) = run_suite(config, tmp_path)
    (cell,) = config.cells()
    job = trained(cell, make_table(cell.data), SuiteFolder(tmp_path).cell_folder(cell))
    assert job is not None
    assert log_likelihood(job.machine, job.table.test) == pytest.approx(
        record["test"]["value"], abs=1e-5
    )


# ---------------------------------------------------------------------- judging


def binary(tmp_path: Path, kind: str, options: dict[str, Any], method: str) -> Job:
    """A job on a table of six bits."""
    rows = np.random.default_rng(0).random((60, 6)) < 0.3
    path = tmp_path / "bits.npz"
    parts = {"a_train": rows[:20], "a_valid": rows[20:40], "a_test": rows[40:]}
    arrays: dict[str, Any] = {name: part.astype(np.uint8) for name, part in parts.items()}
    np.savez(path, **arrays)
    config = suite(
        data=[f"{path}:a"], models=[{"kind": kind, "options": options}], methods=[method]
    )
    (cell,) = config.cells()
    return make_job(cell, make_table(cell.data))


def test_an_annealed_estimate_brackets_the_exact_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 5}, "cd1")
    evaluation = EvaluationConfig(chains=200, temperatures=300, trace_temperatures=300)
    exact = judge(job, evaluation, final=True)
    assert exact.known == "exact"
    monkeypatch.setattr(type(job.machine), "enumerable", False)
    found, quick = (judge(job, evaluation, final=final) for final in (True, False))
    assert found.known == quick.known == "annealed estimate"
    assert found.starts == "exact"
    assert found.standard_error is not None
    assert abs(found.value - exact.value) < 5 * found.standard_error
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower <= exact.value <= found.upper


def test_the_mean_field_bound_of_a_deep_machine_is_below_its_likelihood(tmp_path: Path) -> None:
    job = binary(tmp_path, "DBM", {"latent_dims": [16, 2]}, "cd1")
    bound = judge(job, EvaluationConfig(), final=True)
    exact = log_likelihood(job.machine, job.table.test)
    assert bound.known == "variational lower bound"
    assert exact - 2 < bound.value <= exact


def test_a_vae_is_judged_by_its_own_bound(tmp_path: Path) -> None:
    job = binary(tmp_path, "RBM", {"latent_dim": 3}, "vae")
    found = judge(job, EvaluationConfig(), final=True)
    assert found.known == "importance-weighted lower bound"
    assert found.value == pytest.approx(judge(job, EvaluationConfig(), final=False).value, abs=0.1)


# ---------------------------------------------------------------------- tables and pages


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


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_mentions_every_method(done: SuiteFolder) -> None:
    page = write_suite_report(done)
    source = page.read_text(encoding="utf-8")
    assert page == done.folder / "report.html"
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", source)
    assert "url(" not in source
    parser = Balanced()
    parser.feed(source)
    assert not parser.open
    for name in ("ml", "dsm", "nce", "cd1", "vae", "advil"):
        assert f'class="run">{name}</th>' in source
    assert "for &lt;tests&gt;" in source
    assert "upper_lr" in source
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


# ---------------------------------------------------------------------- configuration


def test_every_field_is_explained() -> None:
    kinds = (SuiteConfig, Block, DataConfig, ModelConfig, MethodConfig, EvaluationConfig)
    bare = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, field in kind.model_fields.items()
        if not field.description
    ]
    assert not bare


def test_a_written_configuration_reads_as_itself() -> None:
    for name in PRESETS:
        config = load_config(name)
        again = parse_config(json.loads(json.dumps(config.model_dump(mode="json"))), name)
        assert again == config


def test_every_short_name_builds(tmp_path: Path) -> None:
    plain = suite(methods=[name for name in METHOD_PRESETS if name != "vae"])
    table = make_table(plain.blocks[0].data[0])
    for cell in plain.cells():
        assert isinstance(make_job(cell, table).training, Training)


def test_the_presets_build_where_their_data_are_at_hand() -> None:
    for name in PRESETS:
        for cell in load_config(name).cells():
            make_solver(cell.method.solver)
            if not cell.data.source.startswith("data/") and cell.seed == cell.block.seeds[0]:
                make_job(cell, make_table(cell.data))


def test_a_preset_can_be_changed_in_part() -> None:
    (cell,) = suite(methods=[{"preset": "dsm", "options": {"sigma": 0.3}}]).cells()
    assert cell.method.options == {"objective": "denoising", "sigma": 0.3}
    assert METHOD_PRESETS["dsm"]["options"]["sigma"] == 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["dms"]}, "there is no method `dms`; did you mean `dsm`"),
        ({"methods": [{"preset": "dsm", "solvr": {}}]}, "methods.0.solvr`; did you mean `solver`"),
        ({"method": []}, r"there is no field `blocks.0.method`; did you mean `methods`"),
        ({"seeds": [0, 0]}, "seeds must be different"),
        ({"models": [{}]}, "`blocks.0.models.0.kind` is missing"),
    ],
)
def test_bad_names_get_the_nearest_valid_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [{"kind": "GausianRBM"}]}, "did you mean `GaussianRBM`"),
        (
            {"models": [{"kind": "GaussianRBM", "options": {"latent_dims": 3}}]},
            "no option `latent_dims`; did you mean `latent_dim`",
        ),
        ({"methods": [{"name": "a", "method": "BISM"}]}, "no method `BISM`; did you mean `BiSM`"),
        ({"methods": [{"preset": "dsm", "options": {"sgma": 1}}]}, "did you mean `sigma`"),
        ({"methods": [{"preset": "bism-dsm", "solver": {"kind": "unroled"}}]}, "`unrolled`"),
        (
            {"methods": [{"preset": "bism-dsm", "solver": {"kind": "unrolled", "steps": 3}}]},
            "`unrolled` has no option `steps`; did you mean `num_steps`",
        ),
        (
            {
                "methods": [
                    {"preset": "bism-dsm", "solver": {"kind": "implicit", "linear_solver": "c"}}
                ]
            },
            "there is no linear solver `c`",
        ),
        ({"training": {"num_step": 3}}, "did you mean `num_steps`"),
        ({"training": {"seed": 3}}, "list `seeds`"),
        ({"models": [{"kind": "RBM", "options": {"latent_dim": 2}}]}, "RBM-2/dsm/seed0.*real"),
        ({"data": ["chekerboard"]}, "did you mean `checkerboard`"),
        ({"data": ["nowhere/to.npz:dna"]}, "there is no file"),
        ({"data": [{"source": "checkerboard", "options": {"sise": 3}}]}, "did you mean `size`"),
        ({"methods": ["dsm", {"preset": "ssm", "name": "dsm"}]}, "two cells are called"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_suite(suite(**changes), tmp_path, callbacks=[no_steps])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the command


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"name": "tiny", "blocks": [BLOCK]}))
    return path


def test_the_command_runs_lists_and_reports(file: Path, capsys: Capture) -> None:
    bench = ["bench", "eblvm", "--config", str(file)]
    assert main([*bench, "--only", "dsm"]) == 0
    out = capsys.readouterr().out
    assert str(file) in out
    assert "[1/1] checkerboard/GaussianRBM-2/dsm/seed0" in out
    assert "(exact)" in out
    assert "report: runs/eblvm-tiny/report.html" in out
    assert main([*bench, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert "nats" in listed[0]
    assert listed[1].endswith("to do")
    assert main(["report", "runs/eblvm-tiny", "--out", "page.html"]) == 0
    assert "dsm" in Path("page.html").read_text()
    cell = "runs/eblvm-tiny/cells/checkerboard/GaussianRBM-2/dsm/seed0"
    assert main(["report", cell, "runs/eblvm-tiny", "--out", "both.html"]) == 0
    assert "ScoreMatching" in Path("both.html").read_text()  # of the run; a suite is left out
    capsys.readouterr()
    assert main([*bench, "--show", "--seeds", "3", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["blocks"][0]["seeds"] == [3, 4]
    assert shown["blocks"][0]["methods"][0]["method"] == "ScoreMatching"
    assert main(["bench", "eblvm", "--preset", "full", "--list", "--only", "digits", "advil"]) == 0
    assert "digits/RBM-15/advil/seed2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ebvlm"], "did you mean `eblvm`"),
        (["eblvm", "--preset", "smal"], "did you mean `small`"),
        (["eblvm", "--only", "bsm-dsm"], "did you mean `bism-dsm`"),
        (["eblvm", "--config", "none.json"], "none.json"),
        (["eblvm", "--preset", "small", "--config", "tiny.json"], "choose one"),
        (["eblvm", "--seeds", "-1"], "not negative"),
    ],
)
def test_bad_arguments_are_one_helpful_sentence(
    arguments: list[str], message: str, file: Path, capsys: Capture
) -> None:
    assert main(["bench", *arguments]) == cli.BAD_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
