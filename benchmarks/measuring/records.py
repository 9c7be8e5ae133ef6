"""Records: one JSON line for each measurement, with where and with what it was made."""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"
Record: TypeAlias = dict[str, Any]
LIBRARIES = ("bilevel", "torch", "torchopt", "higher")


def command(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with the file that its records go to.

    Args:
        name: the command; its records go to `benchmarks/results/NAME.jsonl` by default.
        description: the module's docstring, whose first line is shown.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / f"{name}.jsonl",
        metavar="FILE",
        help="JSON lines, one more per record (default: %(default)s)",
    )
    return parser


def environment(device: str = "cpu", also: Iterable[str] = ()) -> Record:
    """Where and with what numbers are made.

    Args:
        device: "cpu" or "cuda"; names the graphics card in the second case.
        also: packages whose versions count, beside those of every record.
    """
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=RESULTS, capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or None,
        "device": f"cpu ({platform.machine()})",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in (*LIBRARIES, *also)},
    }


def append(
    path: Path, content: Mapping[str, Any], *, device: str = "cpu", also: Iterable[str] = ()
) -> None:
    """Add a line with the content and the environment; earlier lines stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**content, **environment(device, also)})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(path: Path, key: Callable[[Record], Any]) -> dict[Any, Record]:
    """The newest record of every key, in the order in which the keys first came."""
    return {key(record): record for record in read(path)}
