"""Progress of a run on the command line: how many lines, and how much time is left."""

import pytest

from bilevel.methods import Training
from bilevel.methods.training import progress as progress_module
from bilevel.methods.training.progress import Progress
from tests.runs import step


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made_up = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", made_up.monotonic)
    return made_up


def test_a_day_of_training_is_some_lines_an_hour(clock, capsys):
    training = Training(num_steps=30_000, evaluate_every=3_000)
    times: list[float] = []
    seconds = 0.0
    with Progress(training) as progress:
        for number in range(1, 30_001):
            taken = 60.0 if number == 1 else 1.0  # the first one compiles
            seconds, clock.now = seconds + taken, clock.now + taken
            progress(step(number, seconds))
            times += [clock.now] * capsys.readouterr().out.count("\n")
            if number % 3_000 == 0:
                clock.now += 300.0
                progress.evaluated({"frechet": 31.25, "rmse": 0.17}, 300.0)
    hours = [sum(3600 * h <= t < 3600 * (h + 1) for t in times) for h in range(9)]
    assert max(hours) <= 42
    assert min(hours[:8]) >= 25


def test_the_time_left_counts_evaluations_and_not_the_first_step(clock, capsys):
    training = Training(num_steps=1000, evaluate_every=100)
    with Progress(training) as progress:
        progress(step(1, 500.0))
        clock.now = 600.0
        progress.evaluated({"frechet": 31.25}, 50.0)
        progress(step(501, 1000.0))  # 499 steps of a second, and five evaluations of 50 s
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step    501/1000  [frechet 31.2 at 1]  upper -1.50  lower 2.00")
    assert line.endswith("16 min 40 s spent, 12 min 29 s left, 1 steps/s")


def test_the_time_left_of_a_resumed_run_is_that_of_its_own_steps(clock, capsys):
    # metrics tell of 900 steps, but the newest checkpoint is of step 500
    with Progress(Training(num_steps=1000), first=900) as progress:
        progress(step(501, 9.0))
        clock.now = 100.0
        progress(step(601, 109.0))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("1 min 49 s spent, 6 min 39 s left, 1 steps/s")


def test_the_time_left_stops_at_the_time_limit(clock, capsys):
    with Progress(Training(num_steps=1000, max_seconds=150)) as progress:
        progress(step(1, 1.0))
        clock.now = 100.0
        progress(step(101, 101.0))
    assert "49 s left" in capsys.readouterr().out
