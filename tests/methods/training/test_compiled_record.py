"""A run's record says how its steps are made into graphs."""

from pathlib import Path
from typing import Any

import pytest

from bilevel.methods.training.run import Run
from tests.runs import small, trained


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("compile", "found"), [(False, None), (True, "inductor"), ("inductor", "inductor")]
)
def test_the_record_says_what_was_used(tmp_path: Path, compile: Any, found: str | None) -> None:
    trained(small(), tmp_path, compile=compile, num_steps=1)
    config = Run(tmp_path).config()
    assert config.get("compiled") == found
    assert config["training"]["compile"] == compile


def test_recording_on_a_processor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'`compile="record"` makes CUDA graphs, but .* `cpu`; move'
    ):
        trained(small(), tmp_path / "run", compile="record")
    assert not (tmp_path / "run").exists()
