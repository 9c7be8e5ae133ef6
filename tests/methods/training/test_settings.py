"""Laws of the training configuration: it survives JSON, and says what is wrong with a bad value."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.cli import main
from bilevel.methods import Training
from bilevel.methods.training.settings import nearest, validated

positive = st.floats(1e-8, 1e3)
VALUES = {
    "num_steps": st.integers(1, 10**6),
    "batch_size": st.integers(2, 10**4),
    "lower_steps": st.integers(0, 100),
    "order": st.sampled_from(["upper_first", "lower_first"]),
    "upper_lr": positive,
    "lower_lr": positive,
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    "upper_weight_decay": st.floats(0, 1),
    "lower_weight_decay": st.floats(0, 1),
    "schedule": st.sampled_from(["exponential", "cosine"]),
    "decay": st.floats(0.1, 1),
    "final_lr": st.floats(0, 1),
    "clip_upper": st.none() | positive,
    "clip_lower": st.none() | positive,
    "standardise": st.booleans(),
    "seed": st.integers(0, 2**31),
    "max_seconds": st.none() | positive,
    "compile": st.sampled_from([False, True, "record", "inductor"]),
    "precision": st.sampled_from(["float32", "bfloat16"]),
    "ema": st.none() | st.floats(0.1, 0.999),
    "sync_batch_norm": st.booleans(),
    "evaluate_every": st.none() | st.integers(1, 1000),
    "best": st.none() | st.sampled_from(["frechet", "highest x"]),
    "certify_every": st.none() | st.integers(1, 1000),
    "log_every": st.integers(1, 1000),
    "checkpoint_every": st.integers(1, 1000),
    "keep_checkpoints": st.integers(1, 100),
}


def test_every_field_is_drawn() -> None:
    assert VALUES.keys() == Training.model_fields.keys()


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_configuration_survives_json(settings: dict[str, Any]) -> None:
    training = validated(Training, settings)
    text = json.dumps(training.model_dump(mode="json"))
    assert validated(Training, json.loads(text)) == training
    assert Training.model_validate_json(text) == training


@given(st.sampled_from(sorted(VALUES)), st.data())
def test_a_misspelt_field_names_the_right_one(name: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, len(name) - 1))
    misspelt = name[:place] + name[place + 1 :]
    if misspelt in VALUES:
        return
    with pytest.raises(ValueError, match=f"no setting `{misspelt}`; did you mean"):
        validated(Training, {misspelt: 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("batch_size", 1), ("upper_lr", -1.0), ("decay", 1.5), ("order", "both")],
)
def test_a_bad_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}`: .*got {value!r}"):
        validated(Training, {field: value})


def test_nearest_lists_all_when_nothing_is_close() -> None:
    assert nearest("zzz", ["offset", "complete"]) == "choose one of `offset`, `complete`"


def test_the_command_line_reads_the_same_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(["train", "bidvl", "--help"])
    shown = capsys.readouterr().out
    for field in Training.model_fields:
        assert f"--{field.replace('_', '-')}" in shown
