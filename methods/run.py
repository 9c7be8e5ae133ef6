"""`Run`: the folder of one training run - config, metrics, checkpoints, pictures, report."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import bilevel


class Run:
    """A folder with `config.json`, `metrics.jsonl`, `checkpoints/` and `model/`.

    Args:
        folder: where the run is, or will be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @property
    def config_path(self) -> Path:
        """The configuration, plain JSON."""
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.pt"

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
        for stale in (self.metrics_path, self.checkpoint_path):
            stale.unlink(missing_ok=True)
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
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; a line cut off by a crash is ignored."""
        records = []
        lines = self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind(self, step: int) -> None:
        """Forget the metrics after `step`: the resumed run writes them again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))


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
