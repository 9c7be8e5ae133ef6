"""`Run`: the folder of one training run - config, metrics, checkpoints, pictures, report."""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bilevel


class Run:
    """A folder with the configuration, metrics, evaluations, checkpoints, the best and the last model.

    Every file is replaced whole or appended to, so that a process killed at any moment leaves a
    folder that can be resumed.

    Args:
        folder: where the run is, or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._newest: int | None = None  # step of the newest checkpoint

    @property
    def config_path(self) -> Path:
        """The configuration, plain JSON."""
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations_path(self) -> Path:
        """One JSON object per evaluation during training."""
        return self.folder / "evaluations.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """The newest checkpoint; those before it stand beside it as `step-<number>.pt`."""
        return self.folder / "checkpoints" / "last.pt"

    @property
    def best_path(self) -> Path:
        """The best model that an evaluation met, as `save` writes it, and `best.json`."""
        return self.folder / "best"

    @property
    def model_path(self) -> Path:
        """The trained model, as `save` writes it."""
        return self.folder / "model"

    @property
    def exists(self) -> bool:
        """Whether the folder already holds a run."""
        return self.config_path.exists() or self.metrics_path.exists()

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make sure that this folder may be written.

        Raises:
            FileExistsError: if it holds a run and neither `resume` nor `overwrite` is set.
            FileNotFoundError: if there is nothing to resume.
        """
        if resume:
            if not self.checkpoint_path.exists():
                raise FileNotFoundError(
                    f"there is no run to resume in `{self.folder}`: `{self.checkpoint_path.name}` is "
                    "missing; start it without `resume`"
                )
        elif self.exists and not overwrite:
            raise FileExistsError(
                f"`{self.folder}` already holds a run; choose another folder, continue it with "
                "`resume=True` or replace it with `overwrite=True`"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Start a new run here: write the configuration, drop what an overwritten run left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stale = (self.metrics_path, self.evaluations_path, self.checkpoint_path)
        for file in (*stale, *self._earlier()):
            file.unlink(missing_ok=True)
        for folder in (self.best_path, *self._beside_best()):
            shutil.rmtree(folder, ignore_errors=True)
        record = {**config, "versions": versions()}
        write_text(self.config_path, json.dumps(record, indent=2) + "\n")

    def config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: if the folder holds no run.
        """
        if not self.config_path.exists():
            raise FileNotFoundError(f"`{self.folder}` holds no run: there is no `config.json`")
        content: dict[str, Any] = json.loads(self.config_path.read_text())
        return content

    def append(self, record: dict[str, Any]) -> None:
        """Add a line of metrics."""
        _append(self.metrics_path, record)

    def append_evaluation(self, record: dict[str, Any]) -> None:
        """Add a line of evaluations."""
        _append(self.evaluations_path, record)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; a line cut off by a crash is ignored."""
        return _records(self.metrics_path)

    def evaluations(self) -> list[dict[str, Any]]:
        """All lines of evaluations; a line cut off by a crash is ignored."""
        return _records(self.evaluations_path)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, that of the newest checkpoint.

        The resumed run records it again. The best model stays: it is one that was measured.
        """
        self._newest = step
        for path in (self.metrics_path, self.evaluations_path):
            if path.exists():
                kept = [record for record in _records(path) if record["step"] <= step]
                write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, state: bilevel.State, keep: int = 1) -> None:
        """Write the newest checkpoint, and of those before it keep `keep - 1`.

        `last.pt` is there at every moment: the file it was gets a second name, and the new one, once
        it is whole on the disk, takes the first over.

        Args:
            state: the state of the run.
            keep: number of checkpoints on disk.

        Raises:
            CheckpointError: if a variable is not finite; no checkpoint is lost then.
        """
        if keep > 1 and self._newest is not None and self.checkpoint_path.exists():
            name = self.checkpoint_path.with_name(f"step-{self._newest:08}.pt")
            if not name.exists():
                _second_name(self.checkpoint_path, name)
        state.save(self.checkpoint_path)
        self._newest = state.step
        earlier = self._earlier()
        for path in earlier[: max(0, len(earlier) - (keep - 1))]:
            path.unlink()

    def _earlier(self) -> list[Path]:
        """The checkpoints before the newest, in order."""
        return sorted(self.checkpoint_path.parent.glob("step-*.pt"))

    # ------------------------------------------------------------------ the best model

    def keep_best(self, save: Callable[[Path], None], record: dict[str, Any], rule: str) -> None:
        """Replace the best model: weights and record together, or neither.

        Args:
            save: writes the model into a folder.
            record: the evaluation that made it the best.
            rule: by which it is, in words.
        """
        self._mend_best()
        fresh, old = self._beside_best()
        save(fresh)
        content = {"step": record["step"], "rule": rule, "evaluation": record}
        write_text(fresh / "best.json", json.dumps(content, indent=2) + "\n")
        if self.best_path.exists():
            os.replace(self.best_path, old)
        os.replace(fresh, self.best_path)
        shutil.rmtree(old, ignore_errors=True)

    def best(self) -> dict[str, Any] | None:
        """The evaluation of the best model, `None` as long as there is none."""
        self._mend_best()
        path = self.best_path / "best.json"
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text())["evaluation"]
        return record

    def _beside_best(self) -> tuple[Path, Path]:
        """Where the next best model is written, and where the one before waits to be removed."""
        return self.folder / ".best.new", self.folder / ".best.old"

    def _mend_best(self) -> None:
        """Finish or undo a replacement that was cut short."""
        fresh, old = self._beside_best()
        if old.exists() and not self.best_path.exists():
            os.replace(old, self.best_path)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _second_name(path: Path, name: Path) -> None:
    """The same file under another name too; a copy where the file system has no links."""
    try:
        os.link(path, name)
    except OSError:
        whole = name.with_suffix(".tmp")
        shutil.copyfile(path, whole)
        os.replace(whole, name)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on beside its configuration."""
    return {
        "bilevel": bilevel.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
