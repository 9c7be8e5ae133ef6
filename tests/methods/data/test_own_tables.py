"""Tables of one's own: what they hold, how they are split, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.methods.data.tables import load_table

LINES = "a,b,c\n" + "".join(f"{k},{k % 2},{k / 4}\n" for k in range(20))


def csv(folder: Path, text: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(text)
    return path


def test_rows_of_a_file_are_shuffled_and_split(tmp_path: Path) -> None:
    path = csv(tmp_path, LINES)
    table = load_table(path, test=0.25, holdout=0.2, seed=1)
    assert (table.name, table.source, table.binary) == ("mine", str(path), False)
    assert table.valid is not None
    parts = [table.train, table.valid, table.test]
    assert [len(part) for part in parts] == [12, 3, 5]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(20))
    assert torch.equal(load_table(path, test=0.25, holdout=0.2, seed=1).train, table.train)
    assert not torch.equal(load_table(path, test=0.25, holdout=0.2, seed=2).train, table.train)


def test_columns_are_chosen_scaled_and_known_for_binary(tmp_path: Path) -> None:
    path = csv(tmp_path, LINES)
    assert load_table(path, columns=["b"]).binary
    scaled = load_table(path, columns=["c", "a"], standardised=True)
    torch.testing.assert_close(scaled.train.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.train.std(0, correction=0), torch.ones(2))
    plain = load_table(path, columns=["c", "a"])
    mean, scale = plain.train.mean(0), plain.train.std(0, correction=0)
    torch.testing.assert_close(scaled.test, (plain.test - mean) / scale)


def test_columns_that_pandas_counted_are_names(tmp_path: Path) -> None:
    """It writes 0, 1, 2, ... above columns without names."""
    assert len(load_table(csv(tmp_path, "0,1,2\n" + "1,0,1\n" * 10)).train) == 8


def test_a_mistyped_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", rows=np.ones((9, 2)))
    with pytest.raises(ValueError, match=r"no array `row`; did you mean `mine.npz:rows`\?"):
        load_table(tmp_path / "mine.npz:row")
    with pytest.raises(ValueError, match=r"holds arrays; say which, by name. There is `:rows`"):
        load_table(tmp_path / "mine.npz")


def test_arrays_of_real_numbers_are_tables(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    np.savez(tmp_path / "mine.npz", x=rows, train=rows[:20], test=rows[20:])
    whole, split = load_table(tmp_path / "mine.npz:x"), load_table(tmp_path / "mine.npz")
    assert (len(whole.train), len(whole.test), whole.name) == (24, 6, "x")
    assert (len(split.train), len(split.test), split.name) == (20, 10, "mine")
    assert torch.equal(split.test, torch.from_numpy(rows[20:]).float())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (LINES, {"columns": ["d"]}, "has no column `d`; choose one of `a`, `b`, `c`"),
        (LINES, {"test": 1.5}, "`test` is a share of the rows, between 0 and 1; got 1.5"),
        (LINES, {"size": 3}, "`size` means nothing for"),
        ("a,b\n1,x\n2,y\n", {}, r"the column `b` .* holds no numbers .* take: `columns=\['a'\]`"),
        ("a,b\n1,2\n2,\n", {}, "the column `b` .* lacks 1 of its 2 values; fill them, or drop"),
        ("a\nx\ny\n", {}, r"holds no numbers \(`\w+`\); encode it$"),
        ("a;b\n" + "1;2\n" * 9, {}, "seem to be separated by semicolons; separate them by commas"),
        ("a\tb\n" + "1\t2\n" * 9, {}, "seem to be separated by tabs"),
        (
            "1.5,-2\n" + "1,2\n" * 9,
            {},
            r"first line of .*, `1.5,-2`, holds numbers, where the names",
        ),
        ("0,1\n" + "1,0\n" * 9, {}, r"`0,1`, holds numbers, .*; put a line of names above it"),
        ("a\n1\n2\n", {}, "has 2 rows, too few to train and to test"),
        ("", {}, "cannot be read: No columns"),
        ("a\n" + "1\n" * 9, {"standardised": True}, "column 0 is constant in the training rows"),
    ],
)
def test_what_is_no_table_is_refused(
    text: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_table(csv(tmp_path, text), **options)
    assert "\n" not in str(caught.value)
