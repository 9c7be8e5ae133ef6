"""Marks and ranks: against hand-made records whose order is known."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from bilevel.methods.suite.ranking import as_plain, rankings, rankings_markdown
from bilevel.methods.suite.tables import as_html, groups, markdown


def record(
    data: str, method: str, seed: int, value: float | None, error: float | None = None
) -> dict[str, Any]:
    test = {"known": "exact", "value": value, "standard_error": error, "lower": None, "upper": None}
    return {
        "cell": f"{data}/m/{method}/seed{seed}",
        "status": "failed" if value is None else "finished",
        "reason": "it diverged",
        "data": {"name": data},
        "model": {"name": "m"},
        "method": {"name": method, "method": method, "options": {}},
        "seed": seed,
        "test": test,
        "device": "cpu",
        "threads": 1,
        "ceiling": None,
        "steps": 1,
        "seconds": 1.0,
        "startup_seconds": 0.0,
        "steps_per_second": 1.0,
    }


def records(values: Mapping[str, Mapping[str, list[float | None]]]) -> list[dict[str, Any]]:
    return [
        record(data, method, seed, value)
        for data, methods in values.items()
        for method, found in methods.items()
        for seed, value in enumerate(found)
    ]


def test_mean_ranks_are_those_of_the_trials() -> None:
    """Two data sets count alike, whatever their seeds; a failed training is the last."""
    (found,) = rankings(
        records(
            {
                "one": {"a": [3.0, 3.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [1.0, None, 2.0]},
                "two": {"a": [0.0], "b": [1.0], "c": [-1.0]},
            }
        )
    )
    a, b, c = ((1 + 1 + 3) / 3 + 2) / 2, ((2 + 2 + 1.5) / 3 + 1) / 2, ((3 + 3 + 1.5) / 3 + 3) / 2
    assert {one.method: one.rank for one in found.standings} == pytest.approx(
        {"a": a, "b": b, "c": c}
    )
    assert [one.method for one in found.standings] == ["b", "a", "c"]
    assert found.trials == 4
    for one in found.standings:
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.rank <= one.high


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_that_of_the_published_table(methods: int, q: float) -> None:
    """Table 5a of Demsar (2006), q at 0.05."""
    names = [f"m{k}" for k in range(methods)]
    (found,) = rankings(
        records({f"d{i}": {n: [float(-k)] for k, n in enumerate(names)} for i in range(14)})
    )
    expected = q * math.sqrt(methods * (methods + 1) / (6 * 14))
    assert found.difference == pytest.approx(expected, abs=1e-3)
    assert found.standings[0].low is None  # one trial for each data set


def test_few_data_sets_tell_nothing_of_others() -> None:
    seeds = {"a": [2.0] * 9, "b": [1.0] * 9}
    (few,) = rankings(records({"one": seeds, "two": seeds}))
    assert few.verdict.startswith("With 2 data sets no difference between 2 methods is significant")
    (many,) = rankings(records({f"d{i}": seeds for i in range(5)}))
    assert many.verdict.startswith("a is significantly better than all others")
    mixed = {f"d{i}": {"a": [2.0], "b": [1.0 + 2 * (i % 2)]} for i in range(6)}
    (close,) = rankings(records(mixed))
    assert "No method differs significantly" in close.verdict
    assert close.verdict in rankings_markdown([close])


def test_only_what_was_run_alike_is_ranked() -> None:
    half = records({"one": {"a": [1.0, 2.0], "b": [2.0]}, "two": {"c": [1.0], "d": [2.0]}})
    first, second = rankings(half)
    assert first.trials == 1  # b has no second seed yet
    assert second.data == ("two",)
    assert not rankings(records({"one": {"a": [1.0, 2.0]}}))


def test_the_best_are_marked_with_what_seeds_cannot_tell_from_them() -> None:
    found = records(
        {"one": {"a": [2.0, 2.2], "b": [1.9, 2.25], "c": [1.0, 1.1], "d": [None, None]}}
    )
    (group,) = groups(found)
    assert group.best == {"a", "b"}
    text = markdown([group])
    assert "| a | **2.100 ± 0.141** |" in text
    assert "| c | 1.050 ± 0.071 |" in text
    (alone,) = groups([record("one", "a", 0, 1.0), record("one", "b", 0, 0.9, error=0.2)])
    assert alone.best == {"a", "b"}  # by the error of the estimate
    (sure,) = groups([record("one", "a", 0, 1.0), record("one", "b", 0, 0.9)])
    assert sure.best == {"a"}


def test_a_table_for_a_terminal_is_aligned() -> None:
    assert as_plain(["name", "n"], [["a", "1.0"], ["longer", "12.0"]]).splitlines() == [
        "name       n",
        "a        1.0",
        "longer  12.0",
    ]


def test_times_that_were_taken_side_by_side_are_told_apart() -> None:
    alone = [record("one", name, 0, 1.0) for name in "ab"]
    (group,) = groups(alone)
    assert "no measure of speed" not in as_html(group)
    (shared,) = groups([{**alone[0], "jobs": 3}, alone[1]])
    assert "Times were taken with 3 cells at once" in as_html(shared)
    assert "3 cells at a time" in markdown([shared])
