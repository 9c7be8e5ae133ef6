"""Faults on purpose: damaged copies of a run, a disk that fails, signals at random times.

`python -m tests.faults kills FOLDER COUNT SEED` kills a training that often and prints what it saw.
"""

import builtins
import contextlib
import errno
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bilevel.files
from bilevel.cli import main
from bilevel.methods.evaluation.features import load_classifier
from bilevel.methods.suite import SuiteConfig, SuiteFolder, run_suite
from bilevel.methods.suite.config import parse_config
from bilevel.methods.suite.tables import groups, markdown
from bilevel.methods.training.json_lines import note
from bilevel.methods.training.run import Run

TINY = ["--width", "2", "--latent-dim", "2", "--batch-size", "10", "--log-every", "2"]
TINY += ["--checkpoint-every", "3", "--keep-checkpoints", "2", "--device", "cpu"]
SUITE: dict[str, Any] = {
    "data": [{"source": "checkerboard", "options": {"size": 60}}],
    "models": [{"kind": "GaussianRBM", "options": {"latent_dim": 2}}],
    "methods": ["dsm", "bism-dsm"],
    "training": {"num_steps": 6, "batch_size": 20, "checkpoint_every": 3},
    "evaluation": {"points": 2},
}
CLOCK = ("seconds", "time", "startup_seconds", "steps_per_second", "checksum")


def images(path: Path) -> None:
    """Forty images of noise, without classes."""
    values = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(path, images=values)


def start(data: Path, run: Path, *more: str) -> list[str]:
    """The command that trains a tiny model."""
    return ["train", "bidvl", "--data", str(data), "--run", str(run), *TINY, *more]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock says."""
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


# ---------------------------------------------------------------------- damage


@dataclass(frozen=True)
class Damage:
    """A kind of damage: what becomes of a file's content; `None` deletes it, a folder replaces it."""

    name: str
    change: Callable[[bytes, random.Random], "bytes | Path | None"]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Another digit in a number of a text."""
    places = [m.start() for m in re.finditer(rb"\d", content)]
    place = rng.choice(places)
    other = rng.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def _value(new: str) -> Callable[[bytes, random.Random], bytes]:
    """One number of a text replaced."""

    def change(content: bytes, rng: random.Random) -> bytes:
        found = rng.choice(list(re.finditer(rb"-?\d+\.?\d*(?:e-?\d+)?", content)))
        return content[: found.start()] + new.encode() + content[found.end() :]

    return change


def _key(content: bytes, rng: random.Random) -> bytes:
    found = rng.choice(list(re.finditer(rb'"(\w+)":', content)))
    return content[: found.start(1)] + b"other" + content[found.end(1) :]


def _lines(content: bytes, rng: random.Random, what: str) -> bytes:
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    if what == "twice":
        lines.insert(place, lines[place])
    elif what == "missing":
        del lines[place]
    elif what == "garbage":
        lines.insert(place, b"what is this\n")
    else:
        rng.shuffle(lines)
    return b"".join(lines)


EVERY = (
    Damage("a bit", _flip),
    Damage("truncated", lambda content, rng: content[: rng.randrange(1, len(content))]),
    Damage("emptied", lambda content, rng: b""),
    Damage("deleted", lambda content, rng: None),
    Damage("a folder", lambda content, rng: Path()),
    Damage("zeros", lambda content, rng: bytes(len(content))),
    Damage("noise", lambda content, rng: rng.randbytes(len(content))),
    Damage("more", lambda content, rng: content + b"more"),
)
TEXTS = (
    Damage("a digit", _digit),
    Damage("a text for a number", _value('"text"')),
    Damage("NaN", _value("NaN")),
    Damage("null", _value("null")),
    Damage("a huge number", _value("1" + "0" * 400)),
    Damage("a list", lambda content, rng: b"[1, 2]\n"),
    Damage("nested", lambda content, rng: b"[" * 100_000),
    Damage("a key", _key),
    Damage("no text", lambda content, rng: b"\xff\xfe" + content),
)
LINES = tuple(
    Damage(f"lines: {what}", lambda content, rng, what=what: _lines(content, rng, what))
    for what in ("twice", "missing", "garbage", "shuffled")
)


def damage(path: Path, kind: Damage, rng: random.Random) -> bool:
    """Damage a file; whether it differs now."""
    before = path.read_bytes()
    after = kind.change(before, rng)
    if after == before:
        return False
    path.unlink()
    if isinstance(after, Path):
        path.mkdir()
    elif after is not None:
        path.write_bytes(after)
    return True


# ---------------------------------------------------------------------- what comes of it


@dataclass(frozen=True)
class Seen:
    """What a command did: its status, what it said of faults, and its result."""

    status: int
    said: str
    result: Any


def seen(arguments: list[str], result: Callable[[], Any]) -> Seen:
    """Run a command in this process; whatever it raises is a traceback and passes."""
    note.cache_clear()
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), heard(errors):
        status = main(arguments)
    return Seen(status, errors.getvalue(), result() if status == 0 else None)


@contextlib.contextmanager
def heard(stream: io.StringIO) -> Iterator[None]:
    """What the library logs, as it appears on the screen."""
    handler, logger = logging.StreamHandler(stream), logging.getLogger("bilevel")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def sampled(world: Path) -> Seen:
    """Images drawn from the run's model."""
    drawn = world / "drawn.npz"
    drawn.unlink(missing_ok=True)
    arguments = ["sample", str(world / "run"), "-n", "3", "--out", str(drawn)]
    return seen(arguments, lambda: np.load(drawn)["images"].tobytes())


def reported(world: Path) -> Seen:
    """The run's page."""
    page = world / "run" / "report.html"

    def text() -> str:
        return re.sub(r"It took [^,<]*", "", page.read_text())

    return seen(["report", str(world / "run")], text)


def resumed(world: Path) -> Seen:
    """The weights and records of the half-finished run, once it is finished."""
    run = world / "half"

    def result() -> Any:
        weights = load_file(run / "model" / "weights.safetensors")
        # its best model is one that was measured before
        return sorted((n, t.numpy().tobytes()) for n, t in weights.items()), timeless(
            Run(run).metrics()
        )

    return seen(["train", "--run", str(run), "--resume", "--no-report"], result)


def best(world: Path) -> Seen:
    """The best evaluation of the run, from Python."""
    return called(lambda: Run(world / "run").best())


def featured(world: Path) -> Seen:
    """Features of one image, from Python."""
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    return called(lambda: load_classifier(world / "features.safetensors")(image).tolist())


def tabled(world: Path) -> Seen:
    """The suite's configuration and tables, from Python."""
    home = SuiteFolder(world / "suite")

    def tables() -> Any:
        config = home.config()
        return repr(config), markdown(groups(home.records(), [c.name for c in config.cells()]))

    return called(tables)


def traced(world: Path) -> Seen:
    """The records of the half-finished suite, once it is finished."""
    return called(lambda: timed(run_suite(suite(), world / "halfsuite")))


def timed(records: list[dict[str, Any]]) -> Any:
    kept = timeless(records)
    return [{**r, "trace": [[step, value] for step, _, value in r["trace"]]} for r in kept]


def called(function: Callable[[], Any]) -> Seen:
    """From Python: one exception with a sentence, as on the command line."""
    note.cache_clear()
    errors = io.StringIO()
    with heard(errors):
        try:
            result = function()
            return Seen(0, errors.getvalue(), result)
        except (ValueError, OSError) as error:
            return Seen(2, f"bilevel: {error}\n", None)


def suite() -> SuiteConfig:
    return parse_config({"name": "tiny", "blocks": [SUITE]}, "tiny")


#: per file: what damages it, and what looks at it
FILES: dict[str, tuple[tuple[Damage, ...], Callable[[Path], Seen]]] = {
    "run/config.json": (EVERY + TEXTS, reported),
    "run/metrics.jsonl": (EVERY + TEXTS + LINES, reported),
    "run/evaluation.json": (EVERY + TEXTS, reported),
    "run/model/model.json": (EVERY + TEXTS, sampled),
    "run/model/weights.safetensors": (EVERY, sampled),
    "run/best/best.json": (EVERY + TEXTS, best),
    "features.safetensors": (EVERY, featured),
    "suite/suite.json": (EVERY + TEXTS, tabled),
    "suite/records.jsonl": (EVERY + TEXTS + LINES, tabled),
    "half/config.json": (EVERY + TEXTS, resumed),
    "half/metrics.jsonl": (EVERY + TEXTS + LINES, resumed),
    "half/evaluations.jsonl": (EVERY + TEXTS + LINES, resumed),
    "half/checkpoints/last.pt": (EVERY, resumed),
    "halfsuite/cells/checkerboard/GaussianRBM-2/dsm/seed0/trace.jsonl": (
        EVERY + TEXTS + LINES,
        traced,
    ),
}


def outcome(world: Path, file: str, kind: Damage, rng: random.Random, whole: Seen) -> str:
    """Damage one file of a copy of the world and look.

    Returns:
        "harmless" (the same result), "noted" (a note beside another result), "sentence", or what is
        wrong: "traceback ...", "silent", "no sentence".
    """
    copy = world.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world, copy)
    if not damage(copy / file, kind, rng):
        return "harmless"
    try:
        found = FILES[file][1](copy)
    except Exception as error:
        return f"traceback {error!r}"
    if found.status == 0:
        if found.result == whole.result:
            return "harmless"
        return "noted" if "note: " in found.said else "silent"
    lines = [line for line in found.said.splitlines() if not line.startswith("note: ")]
    if found.status == 2 and len(lines) == 1 and lines[0].startswith("bilevel: "):
        return "sentence"
    return f"no sentence: {found.status} {found.said!r}"


# ---------------------------------------------------------------------- a disk that fails


@contextlib.contextmanager
def failing(at: int, code: int, where: str, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The `at`-th file that is opened for writing fails, where it is said: open, write, fsync, rename.

    Yields:
        The names of the files opened so far.
    """
    opened: list[str] = []

    def fails() -> bool:
        return len(opened) == at

    def error(path: Any) -> OSError:
        return OSError(code, os.strerror(code), os.fspath(path))

    class Faulty(io.FileIO):
        def write(self, content: Any) -> int:
            if fails() and where == "write":
                half = memoryview(content)[: len(content) // 2]
                super().write(half)  # a full disk takes what fits
                raise error(str(self.name))
            return super().write(content)

    def open_(path: Any, mode: str = "r", **options: Any) -> Any:
        if not set(mode) & set("wa"):
            return builtins.open(path, mode, **options)
        opened.append(os.fspath(path))
        if fails() and where == "open":
            raise error(path)
        return io.BufferedWriter(Faulty(path, mode.replace("b", "")), 16)

    def fsync(number: int) -> None:
        if fails() and where == "fsync":
            raise OSError(code, os.strerror(code))

    replace = os.replace

    def rename(source: Any, target: Any) -> None:
        if fails() and where == "rename":
            raise error(target)
        replace(source, target)

    with patch.context() as only:
        only.setattr(bilevel.files, "open", open_, raising=False)
        only.setattr(os, "fsync", fsync)
        only.setattr(bilevel.files.os, "replace", rename)
        yield opened


DISKS = (
    (errno.ENOSPC, "write"),
    (errno.EIO, "fsync"),
    (errno.EROFS, "open"),
    (errno.EACCES, "rename"),
)


def temporary(folder: Path) -> list[Path]:
    """What nobody should find in a folder once nothing runs."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name or ".new" in path.name]


# ---------------------------------------------------------------------- signals


def kills(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Stop trainings by signals at random times, each time in a process of its own, and go on.

    Returns:
        How often what was seen.

    Raises:
        AssertionError: if a run ended otherwise than it should.
    """
    rng, counts = random.Random(seed), Counter[str]()
    images(folder / "data.npz")
    options = ["--num-steps", "60", "--no-report", "--evaluate-every", "20"]
    whole, number, sent = folder / "whole", 0, 0
    began = time.monotonic()
    assert _wait(_spawn(start(folder / "data.npz", whole, *options))) == 0
    usual = time.monotonic() - began
    while sent < count:
        number += 1
        run = folder / f"run{number}"
        arguments = start(folder / "data.npz", run, *options)
        while True:
            child = _spawn(arguments)
            time.sleep(rng.uniform(0.02, 0.6 * usual))
            kind = rng.choice(["KILL", "KILL", "TERM", "HUP", "INT", "INT INT"]).split()
            for name in kind:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, getattr(signal, f"SIG{name}"))
                time.sleep(0.02)
            sent += 1
            status = _wait(child)
            counts[_checked(status, kind, run)] += 1
            if status == 0:
                break
            if (run / "checkpoints" / "last.pt").exists():
                arguments = ["train", "--run", str(run), "--resume", "--no-report"]
            elif (run / "config.json").exists():
                arguments = [*start(folder / "data.npz", run, *options), "--overwrite"]
        counts["runs equal to the whole one"] += 1
        for one, other in (
            (Run(run).metrics(), Run(whole).metrics()),
            (Run(run).evaluations(), Run(whole).evaluations()),
        ):
            assert timeless(one) == timeless(other)
        mine, theirs = (load_file(r / "model" / "weights.safetensors") for r in (run, whole))
        assert all(mine[name].equal(theirs[name]) for name in theirs)
        assert not temporary(run), temporary(run)
    return dict(counts)


def _checked(status: int, kind: list[str], run: Path) -> str:
    number = int(getattr(signal, f"SIG{kind[0]}"))
    if kind[0] == "KILL":
        assert status in (-9, 0), status
        return "SIGKILL" if status else "ended before the signal"
    # a signal before the command has begun ends Python as it ends any program
    assert status in (128 + number, -number, 0), (status, kind)
    assert not temporary(run), temporary(run)
    return f"SIG{' SIG'.join(kind)}" if status else "ended before the signal"


def _spawn(arguments: list[str]) -> int:
    """A command in a forked process: torch is imported once for all."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        status = main(arguments)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        os.write(2, f"Traceback: {error!r} {arguments}\n".encode())
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    home = Path(sys.argv[2]).resolve()
    os.chdir(home)
    torch.set_num_threads(1)
    print(json.dumps(kills(home, int(sys.argv[3]), int(sys.argv[4]))))
    assert "Traceback" not in (home / "log").read_text()
