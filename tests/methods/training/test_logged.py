"""Loggers of a training: what they are told, and that training does not notice them."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Implicit, Problem, train
from bilevel.loggers import TensorBoard, WandB
from bilevel.methods import RBM, ContrastiveDivergence
from tests.runs import assert_equal, by_weights, small, timeless, trained


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.configuration: Mapping[str, Any] = {}
        self.taken: int | None = None
        self.numbers: dict[int, dict[str, float]] = {}
        self.pictures: list[tuple[int, str, Tensor]] = []
        self.closed = 0

    def begin(self, configuration: Mapping[str, Any], taken: int) -> None:
        self.configuration, self.taken = configuration, taken

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.numbers.setdefault(step, {}).update(values)

    def images(self, step: int, name: str, images: Tensor) -> None:
        self.pictures.append((step, name, images))

    def close(self) -> None:
        self.closed += 1


def test_a_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    with_, without, logger = small(), small(), Kept()
    torch.manual_seed(1)
    told = trained(with_, loggers=[logger], ema=0.9)
    after = torch.rand(3)
    torch.manual_seed(1)
    alone = trained(without, ema=0.9)
    assert torch.equal(after, torch.rand(3))
    assert_equal(with_, without)
    assert timeless(told.records) == timeless(alone.records)


def test_they_are_told_everything(tmp_path: Path) -> None:
    logger = Kept()
    history = trained(
        small(), tmp_path / "r", loggers=[logger], evaluate=by_weights, evaluate_every=3
    )
    assert logger.taken == 0
    assert logger.configuration["training"]["num_steps"] == 6
    for record in history.records:
        step = int(record["step"])
        same = {n: v for n, v in record.items() if n != "step"}
        assert {n: logger.numbers[step][n] for n in same} == same
    assert logger.numbers[3]["evaluation/frechet"] == history.evaluations[0]["frechet"]
    assert [(step, name) for step, name, _ in logger.pictures] == [
        (3, "samples"),
        (3, "reconstructions"),
        (6, "samples"),
        (6, "reconstructions"),
    ]
    for _, name, images in logger.pictures:
        assert images.shape == (32 if name == "samples" else 60, 1, 8, 8)
        assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert logger.closed == 1


def test_a_resumed_training_goes_on_at_its_step(tmp_path: Path) -> None:
    whole, half, rest = Kept(), Kept(), Kept()
    trained(small(), tmp_path / "whole", loggers=[whole])
    trained(small(), tmp_path / "r", loggers=[half], callbacks=[lambda step: step.number == 3])
    trained(small(), tmp_path / "r", loggers=[rest], resume=True)
    assert rest.taken == 3
    both = {**half.numbers, **rest.numbers}
    assert list(rest.numbers) == [4, 5, 6]
    assert timeless(list(both.values())) == timeless(list(whole.numbers.values()))


def test_tables_have_no_pictures_and_a_failed_training_closes_its_logger() -> None:
    logger = Kept()

    def fail(step: Any) -> None:
        raise KeyboardInterrupt

    learner = ContrastiveDivergence(RBM(6, 3))
    rows = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).round()
    with pytest.raises(KeyboardInterrupt):
        learner.fit(rows, num_steps=3, batch_size=5, loggers=[logger], callbacks=[fail])
    assert logger.closed == 1
    learner.fit(rows, num_steps=2, batch_size=5, loggers=[logger])
    assert (list(logger.numbers), logger.pictures) == ([2], [])


@pytest.mark.parametrize("wrong", ["tensorboard", [TensorBoard], [print], 3])
def test_what_is_no_logger_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`loggers`"):
        trained(small(), tmp_path / "r", loggers=wrong)
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------------- adapters


def calls_of(name: str, said: list[Any]) -> Any:
    """A function that notes its name and arguments."""
    return lambda *args, **options: said.append((name, *args, options))


def test_tensorboard_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []

    def writer(folder: str, purge_step: int | None) -> Any:
        said.append((folder, purge_step))
        names = ("add_text", "add_scalar", "add_images", "flush", "close")
        return types.SimpleNamespace(**{name: calls_of(name, said) for name in names})

    made: Any = types.ModuleType("torch.utils.tensorboard")
    made.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    logger = TensorBoard(tmp_path / "logs")
    assert not said
    trained(small(), loggers=[logger], num_steps=1)
    assert said[0] == (str(tmp_path / "logs"), 1)
    assert [call[0] for call in said[1:]].count("add_images") == 2
    assert ("add_scalar", "upper_loss") in [call[:2] for call in said]
    assert said[-1][0] == "close"


def test_a_loop_of_ones_own_logs_in_two_lines() -> None:
    x, y = {"x": torch.zeros(())}, {"y": torch.zeros(())}
    problem = Problem.from_functions(
        lambda x, y, _: (y["y"] - 3) ** 2, lambda x, y, _: (y["y"] - x["x"]) ** 2, x, y
    )
    logger = Kept()
    for step in train(
        problem,
        num_steps=2,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.4),
        solver=Implicit(),
    ):
        logger.scalars(step.number, step.numbers())
    assert list(logger.numbers) == [1, 2]
    assert logger.numbers[1]["upper_loss"] == 9.0
    assert {"lower_loss", "response_norm", "linear_residual"} <= logger.numbers[2].keys()


def test_wandb_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def init(**options: Any) -> Any:
        said.append(("init", options))
        names = ("log", "finish")
        return types.SimpleNamespace(
            id=options.get("id", "made-up"), **{name: calls_of(name, said) for name in names}
        )

    made: Any = types.ModuleType("wandb")
    made.init, made.Image = init, lambda pixels: pixels.shape
    monkeypatch.setitem(sys.modules, "wandb", made)
    run = tmp_path / "r"
    logger = WandB(run, project="mine", mode="offline")
    assert not run.exists()
    trained(small(), run, loggers=[logger], callbacks=[lambda step: step.number == 2])
    options = said[0][1]
    assert (options["project"], options["mode"], options["dir"]) == ("mine", "offline", str(run))
    assert options["config"]["method"] == "BiDVL"
    assert ("log", {"samples": (32, 64)}, {"step": 2}) in said
    assert said[-1][0] == "finish"
    said.clear()
    trained(small(), run, loggers=[WandB(run)], resume=True)
    assert said[0][1]["id"] == "made-up"
    assert next(call[2]["step"] for call in said if call[0] == "log") == 3


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [
        (TensorBoard, "torch.utils.tensorboard", "tensorboard"),
        (WandB, "wandb", "wandb"),
    ],
)
def test_a_missing_extra_is_named_at_once(
    kind: Any, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'bilevel\[{extra}\]'"):
        kind(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
