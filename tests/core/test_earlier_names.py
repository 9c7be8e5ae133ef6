"""Modules under their earlier names: the very modules, once."""

import importlib

import pytest

from bilevel.moved import NEW_NAMES


@pytest.mark.parametrize(("earlier", "new"), sorted(NEW_NAMES.items()))
def test_an_earlier_name_gives_the_module_that_moved(earlier: str, new: str) -> None:
    moved, module = importlib.import_module(earlier), importlib.import_module(new)
    assert moved is module
    assert module.__name__ == new
    assert module.__spec__ is not None
    assert module.__spec__.name == new


def test_no_earlier_name_is_in_use_again() -> None:
    """Nor does one lead to another earlier name."""
    assert not NEW_NAMES.keys() & set(NEW_NAMES.values())
