"""`Report`: how a long work says where it is, to whoever wants to know."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

Item = TypeVar("Item")

Report: TypeAlias = Callable[[str, int, int], Any]
"""Called with the name of a stage, how much of it is done, and how much there is (0 if unknown)."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that says nothing: what library functions take if no other is given."""


def tracked(items: Sequence[Item], what: str, report: Report) -> Iterator[Item]:
    """The items one by one, a stage of that name.

    Args:
        items: what is to be done.
        what: the name of the stage.
        report: told before each item, and at the end.

    Example:
        >>> [len(word) for word in tracked(["a", "few"], "counting", print)]
        counting 0 2
        counting 1 2
        counting 2 2
        [1, 3]
    """
    for done, item in enumerate(items):
        report(what, done, len(items))
        yield item
    report(what, len(items), len(items))
