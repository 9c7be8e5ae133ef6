"""The benchmarks hold together: tables are those of the records, and rivals compute what we compute."""

import importlib.util
import math
import re
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.cases.learners import ENTRIES, Entry
from benchmarks.learner_speed import loop, same
from benchmarks.measuring.bounded import NotDoneError, bounded
from benchmarks.measuring.records import RESULTS, append, newest, read
from benchmarks.measuring.turns import in_turns
from benchmarks.pages.images import image_speed_table
from benchmarks.table import everything
from benchmarks.toy_starts import slip, starts, summary
from bilevel.check.problems.toy import PenaltyToy

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_generated_from_the_records() -> None:
    assert (RESULTS / "tables.md").read_text(encoding="utf-8") == everything()


def test_every_documented_command_is_there() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py")]
    names = set(re.findall(r"python -m (benchmarks\.[a-z_]+)", "\n".join(texts)))
    assert len(names) > 10
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        assert "\nif __name__ ==" in Path(spec.origin).read_text(encoding="utf-8"), name


@pytest.mark.filterwarnings("ignore:the upper loss does not depend on:RuntimeWarning")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_plain_loop_takes_the_same_steps(entry: Entry) -> None:
    """Otherwise `benchmarks.learner_speed` would compare the speed of different things."""
    torch.manual_seed(0)
    learner = entry.learner()
    steps = loop(entry, learner, entry.data(), compiled=False)
    assert same(entry, entry.plain(), learner, steps, compiled=False) < 1e-6


def test_a_record_says_where_it_was_made_and_leaves_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    append(path, {"name": "a", "value": 1})
    first = path.read_bytes()
    append(path, {"name": "b", "value": 2})
    append(path, {"name": "a", "value": 3}, also=["numpy"])
    assert path.read_bytes().startswith(first)
    records = read(path)
    assert [record["value"] for record in records] == [1, 2, 3]
    for record in records:
        assert record.keys() >= {"time", "commit", "device", "gpu", "threads", "versions"}
    assert records[2]["versions"].keys() - records[0]["versions"].keys() == {"numpy"}
    assert {key: r["value"] for key, r in newest(path, lambda r: r["name"]).items()} == {
        "a": 3,
        "b": 2,
    }


def test_competitors_take_turns() -> None:
    calls: list[str] = []
    ticks = iter(range(1000))
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = in_turns(runs, 2, warm_up=1, repeats={"a": 1, "b": 2}, clock=lambda: float(next(ticks)))
    assert calls == ["a", "b", "b"] * 3
    assert taken == {"a": [1.0, 1.0], "b": [0.5, 0.5]}


def test_work_is_bounded_and_says_what_kept_it_from_being_done() -> None:
    assert bounded(math.sqrt, 4.0, seconds=60) == 2.0
    with pytest.raises(NotDoneError, match="not done within 1 s"):
        bounded(time.sleep, 60, seconds=1)
    with pytest.raises(NotDoneError, match="ValueError: "):
        bounded(math.sqrt, -1.0, seconds=60)
    words = "the step is not recorded and runs as without `compile`: x"
    with pytest.raises(NotDoneError, match="RuntimeWarning: the step is not recorded"):
        bounded(warnings.warn, words, RuntimeWarning, seconds=60)


def test_the_pages_of_steps_say_what_was_not_timed_and_whether_the_goal_is_met(
    tmp_path: Path,
) -> None:
    names = ("straightforward", "recorded bfloat16")
    record = {
        "device_kind": "cuda",
        "batch": 100,
        "rounds": 3,
        "operations": 1e12,
        "peak_tflops": None,
        "difference": 1e-14,
        "numbers": [
            {"name": name, "ms": ms, "speedup": 30 / ms, "first": 1.0}
            for name, ms in zip(names, (30.0, 4.5), strict=True)
        ],
        "not_done": {"compiled float32": "not done within 120 s"},
        "goal": {"ms": 5.0, "speedup": 5.0},
    }
    append(tmp_path / "steps.jsonl", record)
    page = image_speed_table(tmp_path / "steps.jsonl")
    assert "met by recorded bfloat16" in page
    assert "- compiled float32: not done within 120 s" in page


def test_the_toy_of_penalty_methods_is_the_published_one() -> None:
    x, y = (t.requires_grad_() for t in starts(50))
    wave, valley = (4 * y + 2).cos() / (1 + (2 - 4 * x).exp()), ((4 * x - 2) ** 2 + 1).log() / 2
    toy = PenaltyToy(x.detach(), y.detach())
    torch.testing.assert_close(toy.upper_loss(None), (wave + valley).sum())
    e = (2 - 4 * x).exp()
    released = 4 * e * (4 * y + 2).cos() / (1 + e**2) + (16 * x - 8) / ((4 * x - 2) ** 2 + 1)
    (true,) = torch.autograd.grad((wave + valley).sum(), [x])
    torch.testing.assert_close(slip(x, y), released - true)
    found = summary(torch.tensor([4, -1, 6]), torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, -1.5]]))
    assert (found["stopped"], found["steps"], found["residual"]) == (2, 5.0, 0.25)
    assert found["ends"] == {"1.00": 1, "2.00": 1}
