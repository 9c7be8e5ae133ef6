"""Tables: AdvIL's digits, densities, binary tables and faces from files, and refusals in words."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bilevel.methods.data.densities import DENSITIES
from bilevel.methods.data.tables import Table, load_table


def npz(folder: Path, name: str = "tables.npz", **arrays: Any) -> Path:
    path = folder / name
    np.savez(path, **arrays)
    return path


def bits(rows: int, columns: int = 5, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 2, (rows, columns), dtype=np.uint8)


def faces(n: int = 1965) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(8, 239, (n, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def digits() -> Table:
    return load_table("digits")


def grey_levels(table: Table, rows: Tensor) -> Tensor:
    """The rows in 0..16, shape (n, 8, 8): the scaling undone by each pixel's training maximum."""
    top = torch.cat([table.train, *([] if table.valid is None else [table.valid])]).amax(0).double()
    high = (1e-4 * top / (1 - top)).round()  # top = high / (high + 1e-4)
    return (rows * (high + 1e-4)).round().int().view(-1, 8, 8)


def originals(levels: Tensor) -> list[int]:
    """Which of scikit-learn's images the first fifth of the rows are: they are all different."""
    known = {image.astype(int).tobytes(): i for i, image in enumerate(load_digits().images)}
    return [known[image.astype(int).tobytes()] for image in levels[: len(levels) // 5].numpy()]


# ---------------------------------------------------------------------- digits


def base_rate(table: Table) -> float:
    """Mean log-likelihood of the test rows under independent pixels of the training means."""
    rate = table.train.double().mean(dim=0).clamp(1e-5, 1 - 1e-5)
    test = table.test.double()
    return float((test @ rate.log() + (1 - test) @ (-rate).log1p()).mean())


def test_advil_11_digits_arrays(digits: Table) -> None:
    assert digits.train.shape == (7185, 64)
    assert digits.test.shape == (1800, 64)
    assert digits.valid is None
    assert not digits.binary
    for rows in (digits.train, digits.test):
        assert rows.dtype == torch.float32
        assert (rows.min() >= 0) & (rows.max() < 1)
    assert base_rate(digits) == pytest.approx(-30.90, abs=0.01)
    assert float(digits.train.mean()) == pytest.approx(0.291, abs=5e-4)
    assert float(digits.test.mean()) == pytest.approx(0.289, abs=5e-4)
    grey = ((digits.test > 0.02) & (digits.test < 0.98)).double().mean()
    assert float(grey) == pytest.approx(0.40, abs=0.005)


STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def moved(images: Tensor, down: int, right: int) -> Tensor:
    rolled = images.roll((down, right), (1, 2)).clone()
    if down:
        rolled[:, 0 if down > 0 else -1] = 0
    if right:
        rolled[:, :, 0 if right > 0 else -1] = 0
    return rolled


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_no_augmented_row_stems_from_an_image_of_another_part(holdout: float) -> None:
    table = load_table("digits", holdout=holdout)
    parts = [table.train, table.test, *([] if table.valid is None else [table.valid])]
    levels = [grey_levels(table, part) for part in parts]
    sources = [originals(part) for part in levels]
    assert sorted(chain(*sources)) == list(range(1797))  # each image in one part, once
    for part in levels:
        first, *shifted = part.split(len(part) // 5)
        expected = {moved(first, *step).numpy().tobytes() for step in STEPS}
        assert {block.numpy().tobytes() for block in shifted} == expected
    seen = {image.tobytes() for image in levels[0].numpy()}
    assert not any(image.tobytes() in seen for image in levels[1].numpy())


def test_holdout_takes_training_images_and_leaves_the_test_rows(digits: Table) -> None:
    one, two, other = (load_table("digits", holdout=0.2, seed=seed) for seed in (0, 0, 1))
    assert one.valid is not None
    assert two.valid is not None
    assert other.valid is not None
    assert (len(one.train), len(one.valid)) == (5 * 1150, 5 * 287)
    assert torch.equal(one.test, digits.test)
    assert torch.equal(one.valid, two.valid)
    assert not torch.equal(one.valid, other.valid)
    together = torch.cat([one.train, one.valid])
    assert torch.equal(together.unique(dim=0), digits.train.unique(dim=0))
    assert "287 training images" in one.note


# ---------------------------------------------------------------------- densities


@pytest.mark.parametrize("name", DENSITIES)
def test_density_tables_have_bisms_sizes(name: str) -> None:
    table = load_table(name)
    assert table.valid is not None
    assert table.density is not None
    assert [len(part) for part in (table.train, table.valid, table.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    assert {part.shape[1] for part in (table.train, table.valid, table.test)} == {2}
    assert table.train.dtype == torch.float32
    assert (table.name, table.source, table.binary) == (name, name, False)
    assert f"{table.density.entropy:.4f}" in table.note


def test_seed_determines_a_density_table_and_size_only_its_training_rows() -> None:
    one, two, small = load_table("moons"), load_table("moons"), load_table("moons", size=100)
    assert one.valid is not None
    assert small.valid is not None
    assert torch.equal(one.train, two.train)
    assert small.train.shape == (100, 2)
    assert torch.equal(small.test, one.test)
    assert torch.equal(small.valid, one.valid)
    assert not torch.equal(load_table("moons", seed=1).test, one.test)
    parts = torch.cat([one.train, one.valid, one.test])
    assert len(parts.unique(dim=0)) > len(parts) - 10  # no part repeats another


# ---------------------------------------------------------------------- files


def test_binary_table_keeps_the_splits_of_its_file(tmp_path: Path) -> None:
    parts = {
        f"a_{split}": bits(n, seed=n) for split, n in (("train", 9), ("valid", 4), ("test", 6))
    }
    path = npz(tmp_path, **parts, a_b_train=bits(3, 2).astype(bool), a_b_test=bits(2, 2) * 1.0)
    table = load_table(f"{path}:a")
    assert table.valid is not None
    for split, rows in (("train", table.train), ("valid", table.valid), ("test", table.test)):
        assert rows.dtype == torch.float32
        np.testing.assert_array_equal(rows, parts[f"a_{split}"])
    assert table.binary
    assert (table.name, table.source) == ("a", f"{path.resolve()}:a")
    assert torch.equal(load_table(table.source).train, table.train)
    other = load_table(f"{path}:a_b")
    assert other.valid is None
    assert other.train.shape == (3, 2)
    assert "no `a_b_valid`" in other.note


def test_valid_takes_the_place_of_a_missing_split(tmp_path: Path) -> None:
    whole = {"x_valid": bits(4), "y_valid": bits(4), "z_valid": bits(4)}
    path = npz(tmp_path, **whole, x_train=bits(9), y_test=bits(6))
    no_test, no_train = load_table(f"{path}:x"), load_table(f"{path}:y")
    assert (len(no_test.train), no_test.valid, len(no_test.test)) == (9, None, 4)
    assert (len(no_train.train), no_train.valid, len(no_train.test)) == (4, None, 6)
    assert "there is no `x_test`: `valid` takes its place" in no_test.note
    assert "there is no `y_train`: `valid` takes its place" in no_train.note
    with pytest.raises(ValueError, match=r"no split but `valid`; .* add `z_train`"):
        load_table(f"{path}:z")


def test_faces_are_split_by_order(tmp_path: Path) -> None:
    images = faces()
    path = npz(tmp_path, "some_faces.npz", images=images)
    table = load_table(path)
    assert table.valid is not None
    parts = [table.train, table.valid, table.test]
    assert [tuple(part.shape) for part in parts] == [(1400, 12), (300, 12), (265, 12)]
    expected = images.reshape(1965, 12).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(torch.cat(parts), expected)
    assert (table.name, table.source, table.binary) == ("some_faces", str(path.resolve()), False)
    assert torch.equal(load_table(f"{path}:images").train, table.train)


def test_standardised_faces_are_dequantised_by_an_explicit_seed(tmp_path: Path) -> None:
    images = faces()
    images[:, 0, 0] = 7  # a pixel that never changes: the noise gives it a spread
    path = npz(tmp_path, images=images)
    one, two, other = (load_table(path, standardised=True, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(one.train.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(one.train.std(0, correction=0), torch.ones(12), atol=1e-4, rtol=0)
    assert torch.equal(one.test, two.test)
    assert not torch.equal(one.test, other.test)
    assert abs(one.test.mean(0)).max() > 1e-3  # by the range of the training rows, not their own
    flat = images.reshape(1965, 12).astype(np.float64)
    scale = (flat[:1400] + 0.5).std(0)[1:]
    noise = one.train.numpy()[:, 1:] * np.sqrt(scale**2 + 1 / 12)
    noise += (flat[:1400].mean(0) + 0.5)[1:] - flat[:1400, 1:]
    assert noise.min() > -0.5
    assert noise.max() < 1.5
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)
    assert "dequantised with seed 1" in other.note


# ---------------------------------------------------------------------- refusals


def with_nan() -> np.ndarray[Any, np.dtype[np.float64]]:
    array = bits(6).astype(float)
    array[2, 3] = np.nan
    return array


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (bits(6) * 3, r"`x_train` in .* not binary: \d+ of 30 values .* from 0 to 3"),
        (with_nan(), "not binary: 1 of 30 values are neither 0 nor 1, 1 of these NaN"),
        (np.full((6, 5), np.nan), "30 of these NaN; it holds no number"),
        (np.array([[0, None]], dtype=object), "`x_train` in .* is an object array"),
        (np.array([["0", "1"]]), "of type `<U1`"),
        (bits(6)[0], r"`x_train` in .* has shape \(5,\)"),
        (bits(0), r"has shape \(0, 5\)"),
        (bits(6, 4), "differ in width: {'train': 4, 'test': 5}"),
    ],
)
def test_what_is_no_binary_table_is_refused(tmp_path: Path, train: Any, message: str) -> None:
    path = npz(tmp_path, x_train=train, x_test=bits(3))
    with pytest.raises(ValueError, match=message):
        load_table(f"{path}:x")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (faces(30) / 255, r"are float64 of shape \(30, 4, 3\); expected bytes"),
        (faces(30)[0], r"uint8 of shape \(4, 3\)"),
        (faces(2), "none may be empty"),
        (np.array([None, 1], dtype=object), "object array"),
    ],
)
def test_what_are_no_faces_is_refused(tmp_path: Path, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_table(npz(tmp_path, images=images))


def test_unknown_tables_are_refused_with_what_is_there(tmp_path: Path) -> None:
    path = npz(tmp_path, dna_train=bits(3), dna_test=bits(3), mushrooms_valid=bits(3))
    with pytest.raises(ValueError, match=r"did you mean `tables.npz:mushrooms`.*`:dna`"):
        load_table(f"{path}:mushroom")
    with pytest.raises(ValueError, match=r"no table `web`.*`:dna`, `:mushrooms`"):
        load_table(f"{path}:web")
    for bare in (str(path), f"{path}:"):
        with pytest.raises(ValueError, match=r"say which, by name.*`:dna`, `:mushrooms`"):
            load_table(bare)
    with pytest.raises(ValueError, match=r"holds no binary table.*but `train`; rename"):
        load_table(npz(tmp_path, "other.npz", train=bits(3)))


def test_unknown_sources_name_the_nearest(tmp_path: Path) -> None:
    path = npz(tmp_path, dna_train=bits(3), dna_test=bits(3))
    for text, near in (
        ("digit", "digits"),
        ("checkerbord", "checkerboard"),
        ("swisroll", "swissroll"),
    ):
        with pytest.raises(ValueError, match=f"did you mean `{near}`"):
            load_table(text)
    with pytest.raises(ValueError, match="known by name: `digits`, `checkerboard`"):
        load_table("zzz")
    with pytest.raises(FileNotFoundError, match=r"did you mean `.*tables\.npz`"):
        load_table(f"{path.parent / 'table.npz'}:dna")
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_table(tmp_path / "broken.npz")
    np.save(tmp_path / "single.npy", bits(3))
    for other in (tmp_path, tmp_path / "single.npy"):
        with pytest.raises(ValueError, match=r"is no `.npz` file"):
            load_table(other)


def test_options_that_mean_nothing_here_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, dna_train=bits(3), dna_test=bits(3))
    with pytest.raises(ValueError, match=r"`size` means nothing for `digits`.*takes is `holdout`"):
        load_table("digits", size=10)
    with pytest.raises(ValueError, match=r"`holdout` means nothing for `moons`.*takes is `size`"):
        load_table("moons", holdout=0.1)
    with pytest.raises(ValueError, match="`standardised` means nothing"):
        load_table(f"{path}:dna", standardised=True)
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        load_table("moons", size=0)
    for holdout in (1.0, -0.1, 1e-9, float("nan")):
        with pytest.raises(ValueError, match="`holdout` is a share of the 1437 training images"):
            load_table("digits", holdout=holdout)
