"""Problems that know their truth, by name, and the value function they are judged by."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel import Cholesky, Implicit
from bilevel.check.cases import Case, case_named
from bilevel.check.problems.cleaning import Cleaning, cleaning
from bilevel.check.problems.toy import PenaltyToy
from bilevel.check.value import Value


def made(name: str, seed: int = 0) -> Case:
    case = case_named(name, seed)
    assert case is not None
    return case


def test_a_quadratic_has_the_size_and_the_condition_of_its_name() -> None:
    H = made("quadratic:30:100").problem.get_buffer("H")
    eigenvalues = torch.linalg.eigvalsh(H)
    assert H.shape == (30, 30)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(100)


def test_the_value_function_is_that_of_the_closed_form() -> None:
    case = made("quadratic")
    H, B, t = (case.problem.get_buffer(name) for name in "HBt")
    x, A = case.problem.get_parameter("upper.x").detach(), torch.linalg.solve(H, B)
    value, norm = Value(case).at(case.problem)
    assert value == pytest.approx(float((A @ x - t).square().sum()), rel=1e-12)
    assert norm == pytest.approx(float((2 * A.mT @ (A @ x - t)).norm()), rel=1e-10)
    of_value, of_lower = Value(case).curvatures()  # by a power iteration, from below
    assert 0.8 < of_value / float(2 * torch.linalg.matrix_norm(A, 2) ** 2) <= 1 + 1e-6
    assert 0.9 < of_lower / 4 <= 1 + 1e-9
    best = torch.linalg.lstsq(A, t[:, None]).solution[:, 0]
    assert Value(case).least() == pytest.approx(float((A @ best - t).square().sum()), rel=1e-9)


def test_the_toy_has_one_lower_solution_and_starts_side_by_side() -> None:
    case = made("toy:7")
    with torch.no_grad():
        case.problem.get_parameter("lower.y").copy_(-case.problem.get_parameter("upper.x"))
    alone = PenaltyToy(
        *(case.problem.get_parameter(n).detach()[3:4] for n in ("upper.x", "lower.y"))
    )
    every = Implicit(Cholesky()).hypergradient(case.problem)
    one = Implicit(Cholesky()).hypergradient(alone)
    assert float(every.stats.lower_residual or 0) < 1e-12
    assert float(every.grad["x"][3]) == pytest.approx(float(one.grad["x"]), rel=1e-12)


def test_a_file_in_the_libsvm_format_is_read(tmp_path: Path) -> None:
    lines = [f"{1 if k % 3 else 2} 1:{k} 3:{k * k}\n" for k in range(12)]
    file = tmp_path / "rows.txt"
    file.write_text("".join(lines))
    case = made(f"libsvm:{file}")
    rows, labels = case.lower_batches[0]
    assert rows.shape == (6, 3)
    assert set(labels.tolist()) <= {-1.0, 1.0}
    both = made(f"libsvm:{file}:{file}")
    assert both.upper_batch[0].shape == (12, 3)
    assert both.upper_batch[1].sum() == 4 - 8  # the greater number is the positive class


def test_cleaning_follows_the_released_code_in_its_slips_unless_told_otherwise() -> None:
    given = cleaning(0), cleaning(0, released=False)
    wrong = []
    for case in given:
        assert isinstance(case.problem, Cleaning)
        noisy = case.lower_batches[0][1]
        clean = cleaning(0).measures
        assert clean is not None
        wrong.append(noisy)
    assert not torch.equal(*wrong)
    measures = given[0].measures
    assert measures is not None
    found = measures(given[0].problem)
    assert found["f1"] == pytest.approx(100 * 2 / 3, abs=0.1)  # at first all items count as clean
    with torch.no_grad():
        given[0].problem.get_parameter("upper.x").fill_(-1)
    assert measures(given[0].problem)["f1"] == 0


@pytest.mark.parametrize(("released", "share"), [(True, 0.45), (False, 0.5)])
def test_how_many_labels_are_wrong(released: bool, share: float, tmp_path: Path) -> None:
    labels = np.arange(6000) % 10
    images = np.repeat(labels[:, None, None], 2, axis=1).astype(np.uint8)  # the label itself
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels)
    sizes = (5000, 500, 500)
    case = cleaning(1, str(tmp_path / "x.npz"), sizes=sizes, released=released)
    inputs, noisy, _ = case.lower_batches[0]
    true = (9 * inputs[:, 0]).round().long()
    assert float((noisy != true).double().mean()) == pytest.approx(share, abs=0.012)
    if not released:
        assert int((noisy != true).sum()) == 2500


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quadratic:a", "it takes numbers, got `a`"),
        ("quadratic:1:2:3", r"`quadratic` is written `quadratic\[:SIZE\[:CONDITION\]\]`"),
        ("quadratic:5:0.5", "size and condition must be at least 1"),
        ("breast-cancer:1", "takes no arguments"),
        ("toy:0", "at least one start"),
        ("libsvm:nowhere.txt", "there is no file `nowhere.txt`"),
        ("cleaning:nowhere.npz", "must be an .npz file"),
    ],
)
def test_bad_names_are_refused_in_a_sentence(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        case_named(name, 0)
