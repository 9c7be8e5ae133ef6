"""What is shown of a long work: on a terminal, in a notebook, in a pipe."""

import io
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bilevel.methods import Training
from bilevel.methods.training.display import Lines, Stages, stages
from bilevel.methods.training.progress import Progress
from bilevel.methods.training.run import Run
from tests.runs import small, step, trained


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def on_a_terminal() -> Iterator[Terminal]:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(Terminal()) as made:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "150")
        yield made


class Cell:
    """The output of a notebook's cell."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, content: dict[str, str], **_: Any) -> "Cell":
        self.shown.append(content)
        return self

    def update(self, content: dict[str, str], **_: Any) -> None:
        self.shown.append(content)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    made, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    found = Cell()
    vars(made)["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    vars(inner)["display"] = found.display
    monkeypatch.setitem(sys.modules, "IPython", made)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return found


def test_fit_is_quiet_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    trained(small())
    assert capsys.readouterr() == ("", "")
    trained(small(), progress=True)
    assert "step      6/6" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`progress` must be True, False or "):
        trained(small(), progress="yes")


def test_fit_shows_a_bar_on_a_terminal() -> None:
    with on_a_terminal() as seen:
        trained(small(), progress=False)
        assert seen.getvalue() == ""
        history = trained(small(), max_seconds=1e-9)
    assert "1/6" in seen.getvalue()
    assert "stopped by the clock" in seen.getvalue()
    assert history.stopped == "stopped by the clock (`max_seconds` 1e-09) at step 1 of 6"


def test_a_refusal_leaves_no_bar_behind() -> None:
    with on_a_terminal() as seen, pytest.raises(ValueError, match="batch_size"):
        trained(small(), batch_size=31)
    assert "first step" in seen.getvalue()
    assert seen.getvalue().endswith("\x1b[2K")  # its line is erased


def test_fit_shows_a_bar_in_a_notebook(cell: Cell) -> None:
    trained(small())
    first, *_, last = cell.shown
    assert first["text/plain"] == "first step"
    assert last["text/plain"].startswith("6 of 6, 0 s spent")
    assert '<progress value="6" max="6">' in last["text/html"]


def test_losses_are_looked_at_five_times_a_second_at_most(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress(Training(num_steps=1000)) as progress:
        for number in range(1, 1000):
            now += 0.01
            progress(step(number, now))
    assert len(cell.shown) <= 10 / 0.2 + 3


def test_why_a_run_was_stopped_stands_in_its_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    history = trained(small(), run.folder, callbacks=[lambda step: step.number == 3])
    assert history.stopped == run.stopped() == "stopped by a callback at step 3 of 6"
    with pytest.raises(KeyboardInterrupt):
        trained(small(), run.folder, resume=True, callbacks=[interrupt])
    assert run.stopped() == "not ended; the newest checkpoint is that of step 3 of 6"
    assert trained(small(), run.folder, resume=True).stopped is None
    assert run.stopped() is None


def interrupt(step: Any) -> None:
    raise KeyboardInterrupt


def test_what_takes_long_is_named_in_a_pipe() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    report = Stages(lines)
    now = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        report("quick", 0, 2)
        now = 1.0
        report("drawing samples", 0, 100)
        now = 1.5
        report("drawing samples", 20, 100)
        time.sleep(0.3)
        assert stream.getvalue() == ""
        now = 2.1
        wait_until(lambda: stream.getvalue() != "", 5.0)
        now = 4.0  # it has been said
        time.sleep(0.3)
        lines.close()
    assert stream.getvalue() == "drawing samples: 20 of 100 ...\n"


def wait_until(done: Any, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not done():
        time.sleep(0.02)


def test_stages_show_how_far_they_are_and_vanish() -> None:
    with on_a_terminal() as seen, stages() as report:
        report("drawing samples", 0, 1000)
        report("drawing samples", 1000, 1000)
    assert "drawing samples" in seen.getvalue()
    assert "1,000/1,000" in seen.getvalue()
    assert seen.getvalue().endswith("\x1b[2K")


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    with on_a_terminal() as seen, stages() as report:
        report("drawing samples", 0, 1000)
    assert seen.getvalue() == ""
