"""Methods, models, data and solvers of one's own in a suite, and several processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel.methods.catalogue import NOTHING
from bilevel.methods.data.tables import Table
from bilevel.methods.suite import SuiteFolder, compare_methods, load_suite, run_suite
from bilevel.methods.suite.config import ModelConfig
from bilevel.methods.suite.job import at_hand
from bilevel.methods.suite.report import write_suite_report
from bilevel.methods.suite.workers import CrashError
from bilevel.methods.training.standardising import UnitsWarning
from bilevel.plugins import entry_points, imported
from tests.methods.suite import own_things
from tests.methods.suite.small_suite import no_steps, suite
from tests.methods.suite.test_runner import timeless

HERE = "tests.methods.suite.own_things"
OWN = {
    f"{HERE}:{name}": getattr(own_things, name)
    for name in ("Denoiser", "four", "rows", "points", "solver", "failing", "Dies")
}
QUICK = {"evaluation": {"points": 2}}


def test_everything_may_be_of_ones_own(tmp_path: Path) -> None:
    method = {"preset": f"{HERE}:Denoiser", "options": {"sigma": 0.2}}
    solved = {"preset": "bism-dsm", "name": "solved", "solver": {"kind": f"{HERE}:solver"}}
    config = suite(
        data=[f"{HERE}:rows", {"source": f"{HERE}:points", "options": {"n": 90}}],
        models=[f"{HERE}:four"],
        methods=[method, solved],
        **QUICK,
    )
    records = run_suite(config, tmp_path, own=OWN)
    assert [record["cell"] for record in records] == [
        f"{data}/four/{name}/seed0"
        for data in ("rows", "points")
        for name in ("Denoiser", "solved")
    ]
    assert {record["test"]["known"] for record in records} == {"exact"}
    assert records[1]["solver"] == "Alternating()"
    assert len({record["independent"] for record in records}) == 2
    page = write_suite_report(SuiteFolder(tmp_path)).read_text()
    assert "Denoiser" in page  # tables and curves, without the code
    cells = config.cells()
    assert all(at_hand(cell, OWN) for cell in cells)
    assert not any(at_hand(cell, NOTHING) for cell in cells)


def test_a_table_keeps_what_it_says_of_itself(tmp_path: Path) -> None:
    rows = own_things.points(110)
    table = Table("mine", "mine", rows[:90], None, rows[90:], False, "split by hand")
    config = suite(data=["mine", "pair"], methods=["dsm"], **QUICK)
    own = {"mine": table, "pair": (rows[:90], rows[90:])}
    one, two = run_suite(config, tmp_path, own=own)
    assert one["test"] == two["test"]


@pytest.mark.parametrize(
    ("changes", "own", "message"),
    [
        ({"methods": [f"{HERE}:NoMethod"]}, own_things.NoMethod, "is the class `NoMethod`, and"),
        (
            {"methods": [f"{HERE}:x"]},
            own_things.Denoiser(own_things.four(2, generator=torch.Generator())),
            "already, and every cell",
        ),
        (
            {"methods": [f"{HERE}:x"]},
            3,
            "is 3, and something else is needed: a subclass of `EBLVM`",
        ),
        ({"methods": [f"{HERE}:x"]}, lambda model: 1 / 0, "raised ZeroDivisionError: division"),
        ({"methods": [f"{HERE}:x"]}, lambda model: model, "made a `GaussianRBM`, and"),
        (
            {"methods": [{"preset": f"{HERE}:x", "options": {"sgima": 1}}]},
            own_things.Denoiser,
            "has no option `sgima`; did you mean `sigma`",
        ),
        ({"models": [f"{HERE}:x"]}, own_things.wider, "a machine of 3 visibles for rows of 2"),
        ({"data": [f"{HERE}:x"]}, torch.ones(3), r"has shape \(3,\); a table has"),
        ({"data": [f"{HERE}:x"]}, {"trian": torch.ones(3, 2)}, "must map `train`, `test`"),
        ({"data": [f"{HERE}:x"]}, torch.full((9, 2), torch.nan), "18 values that are not finite"),
        ({"data": [f"{HERE}:x"]}, torch.rand(40, 2), "`batch_size` is 50, but there are only 32"),
        ({"methods": [f"{HERE}:gone"]}, None, "there is no method `tests.methods.suite.own_thi"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    changes: dict[str, Any], own: Any, message: str, tmp_path: Path
) -> None:
    given = {f"{HERE}:x": own, f"{HERE}:NoMethod": own}
    with pytest.raises(ValueError, match=message) as caught:
        run_suite(suite(**changes), tmp_path, own=given, callbacks=[no_steps])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"{HERE}:Denoisr", "there is no `Denoisr` in .*; did you mean `Denoiser`"),
        ("tests.nowhere:x", "there is no module `tests.nowhere` in this folder or among"),
        ("mine.py:x:y", "is no address of an object; write `package.module:Name`"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: str, message: str) -> None:
    with pytest.raises((ValueError, ImportError), match=message):
        imported(address)


def test_a_module_that_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_on_import.py").write_text("import json\nvalue = json.loads('{')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="importing `raises_on_import` raised JSONDecodeError"):
        imported("raises_on_import:value")


def test_entry_points_bring_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "plug-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[bilevel.methods]\ndenoiser = {HERE}:Denoiser\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry_points.cache_clear()
    try:
        (cell,) = suite(methods=["denoiser"]).cells()
    finally:
        entry_points.cache_clear()
    assert (cell.method.name, cell.method.method) == ("denoiser", "denoiser")


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("RBM-15", "RBM", {"latent_dim": 15}),
        ("GaussianDBM-4-3", "GaussianDBM", {"latent_dims": [4, 3]}),
        ("mine.models:Deep", "mine.models:Deep", {}),
    ],
)
def test_a_model_may_be_written_as_its_name(text: str, kind: str, options: Any) -> None:
    model = ModelConfig.model_validate(text)
    assert (model.kind, model.options) == (kind, options)
    assert model.name == text.rpartition(":")[2]


# ---------------------------------------------------------------------- several processes


def test_several_processes_record_what_one_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method with a mistake costs its own cell, and so does a process that dies."""
    monkeypatch.setenv("DIES", str(os.getpid()))  # in a child of this process alone
    names = ["dsm", f"{HERE}:Denoiser", f"{HERE}:failing"]
    config = suite(methods=[*names, f"{HERE}:Dies"], **QUICK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    told: list[dict[str, Any]] = []

    def tell(number: int, total: int, record: dict[str, Any]) -> None:
        told.append({"place": f"{number}/{total}", **record})

    try:
        with pytest.raises(CrashError, match=r"1 of 3 cells crashed.*failing/seed0`: Fails: the"):
            run_suite(config, tmp_path / "one", own=OWN, only=["dsm", "Denoiser", "failing"])
        with pytest.raises(CrashError, match="2 of 4 cells crashed"):
            run_suite(config, tmp_path / "two", own=OWN, jobs=2, observer=tell)
    finally:
        torch.set_num_threads(before)
    one, two = (
        {record["cell"]: timeless(record) for record in SuiteFolder(tmp_path / name).records()}
        for name in ("one", "two")
    )
    assert [record.pop("jobs") for record in two.values()] == [2, 2]
    assert one == two
    assert [record["place"] for record in told] == ["1/4", "2/4", "3/4", "4/4"]
    crashed = {r["cell"].split("/")[2]: r["reason"] for r in told if r["status"] == "crashed"}
    assert crashed == {
        "failing": "Fails: the loss has a mistake",
        "Dies": "its process died (exit status 3)",
    }
    crash = tmp_path / "two/cells/checkerboard/GaussianRBM-2/failing/seed0/crash.txt"
    assert "in upper_loss" in crash.read_text()


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    own = {f"{HERE}:x": lambda model: own_things.Denoiser(model)}
    with pytest.raises(ValueError, match="every object has to be sent to other processes"):
        run_suite(suite(methods=[f"{HERE}:x"]), tmp_path, own=own, jobs=2)
    with pytest.raises(ValueError, match="`callbacks` cannot be called in other processes"):
        run_suite(suite(), tmp_path, callbacks=[no_steps], jobs=2)


# ---------------------------------------------------------------------- from Python


def test_objects_are_compared_from_python(tmp_path: Path) -> None:
    """Names and objects mixed; the folder remembers which rows it was."""
    rows = own_things.points()
    parts: dict[str, Any] = {
        "models": {"four": own_things.four, "small": "GaussianRBM-2"},
        "methods": {"ours": own_things.Denoiser, "dsm": "dsm"},
        "training": {"num_steps": 2, "batch_size": 20},
    }
    records = compare_methods({"mine": rows}, folder=tmp_path, **parts)
    assert [record["cell"] for record in records] == [
        f"mine/{model}/{method}/seed0" for model in ("four", "small") for method in ("ours", "dsm")
    ]
    assert load_suite(tmp_path) == records
    assert compare_methods({"mine": rows.numpy()}, folder=tmp_path, **parts) == records
    with pytest.raises(ValueError, match=r"`blocks.0.data.0.checksum` was"):
        compare_methods({"mine": rows + 1}, folder=tmp_path, **parts)
    with pytest.raises(
        ValueError, match="are lists of names, or mappings of a name to each object"
    ):
        compare_methods([rows], folder=tmp_path, **parts)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="two of these are called `four`"):
        compare_methods({"four": rows}, folder=tmp_path, **parts)
    entry = {"source": "checkerboard", "options": {"size": 30}}
    (record,) = compare_methods(
        {"plane": entry}, ["GaussianRBM-2"], ["dsm"], tmp_path / "b", training=parts["training"]
    )
    assert record["cell"] == "plane/GaussianRBM-2/dsm/seed0"
    with pytest.raises(FileNotFoundError, match=r"holds no suite"):
        load_suite(tmp_path / "cells")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "01"}, r"`seeds` must be whole numbers, such as `\[0, 1\]`, got '01'"),
        ({"seeds": 3}, "`seeds` must be whole numbers"),
        ({"seeds": [0.5]}, "`seeds` must be a whole number, got 0.5"),
        ({"folder": None}, "`folder` must be a path"),
        ({"training": [3]}, "`training` maps settings to values, .*; got a `list`"),
    ],
)
def test_what_compare_cannot_take_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"folder": tmp_path, **changes}
    with pytest.raises(TypeError, match=message):
        compare_methods(["moons"], ["GaussianRBM-2"], ["dsm"], **given)
    assert not list(tmp_path.iterdir())


def test_rows_far_from_standard_are_told_once_with_what_a_suite_can_do(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "training": {"num_steps": 2, "batch_size": 20},
        "models": ["GaussianRBM-2"],
    }
    with pytest.warns(UnitsWarning, match=r"means from .*: standardise the table: `load_") as said:
        compare_methods(
            {"far": 100 + own_things.points()}, methods=["dsm", "ml"], folder=tmp_path, **given
        )
    assert len([each for each in said if each.category is UnitsWarning]) == 1
    given["training"]["standardise"] = True
    with pytest.raises(
        ValueError, match=r"no training setting of a suite.*`load_table\(PATH, stan"
    ):
        compare_methods(
            {"far": own_things.points()}, methods=["dsm"], folder=tmp_path / "b", **given
        )
