"""`--compile`: an option with a word, without one, and switched off."""

from typing import Any

import pytest

from bilevel.cli.options import UsageError
from bilevel.cli.train_options import read_arguments


@pytest.mark.parametrize(
    ("arguments", "compile"),
    [
        ("--compile", True),
        ("--compile --seed 1", True),
        ("--compile record", "record"),
        ("--compile=Inductor", "inductor"),
        ("--compile record --no-compile", False),
        ("--no-compile --compile inductor", "inductor"),
    ],
)
def test_how_steps_are_made_into_graphs(arguments: str, compile: Any) -> None:
    for start in (["--preset", "digits"], ["bidvl", "--data", "digits"]):
        assert read_arguments([*start, *arguments.split()]).compile == compile


def test_a_method_may_follow_the_option_without_a_word() -> None:
    read = read_arguments(["--compile", "bidvl", "--data", "digits"])
    assert (read.method, read.compile) == ("bidvl", True)


def test_without_the_option_nothing_is_said() -> None:
    assert "compile" not in read_arguments(["--preset", "digits"])


def test_another_word_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="cannot be `recrod`; did you mean `record`"):
        read_arguments(["--preset", "digits", "--compile", "recrod"])
