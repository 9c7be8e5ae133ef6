"""The configuration of a suite: explained, read back, refused by the nearest valid name."""

import json
from pathlib import Path
from typing import Any

import pytest

from bilevel.methods.catalogue import make_solver
from bilevel.methods.suite import SuiteConfig, load_config, run_suite
from bilevel.methods.suite.config import (
    Block,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    parse_config,
)
from bilevel.methods.suite.job import make_job, make_table
from bilevel.methods.suite.presets import METHOD_PRESETS, SUITES
from tests.methods.suite.small_suite import no_steps, suite


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
    for name in SUITES:
        config = load_config(name)
        again = parse_config(json.loads(json.dumps(config.model_dump(mode="json"))), name)
        assert again == config


def test_every_short_name_builds(tmp_path: Path) -> None:
    plain = suite(methods=[name for name in METHOD_PRESETS if name != "vae"])
    table = make_table(plain.blocks[0].data[0])
    cells = plain.cells()
    assert len(cells) == len(METHOD_PRESETS) - 1
    for cell in cells:
        assert type(make_job(cell, table).learner).__name__ == cell.method.method


def test_the_presets_build_where_their_data_are_at_hand() -> None:
    for name in SUITES:
        built = set()
        for cell in load_config(name).cells():
            make_solver(cell.method.solver)
            if not cell.data.source.startswith("data/") and cell.seed == cell.block.seeds[0]:
                built.add(type(make_job(cell, make_table(cell.data)).learner).__name__)
        assert len(built) > 3, name


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
