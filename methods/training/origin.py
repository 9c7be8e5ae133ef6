"""Where a run comes from: the versions, the commit and the moment it began with."""

import contextlib
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import bilevel


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its configuration."""
    return {
        "bilevel": bilevel.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


@cache
def commit() -> str | None:
    """The commit of the checkout this package is imported from, if it is one."""
    root = Path(bilevel.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError):
        git = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def origin() -> dict[str, object]:
    """What a run notes of its origin when it begins."""
    return {"began": now(), "commit": commit(), "versions": versions()}
