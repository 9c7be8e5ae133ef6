"""`Prepared`: an argument of a unit taken apart, and how trees are put together again."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import optree
from torch import Tensor

from bilevel.compile.trees import flatten, kinds

_HOLE = object()  # where a tensor goes


@final
class Prepared:
    """An argument taken apart; what a graph depends on of it is looked up once."""

    __slots__ = ("_kinds", "leaves", "structure", "tensors", "tree")

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.leaves, self.structure = flatten(tree)
        self.tensors = tensors_in(self.leaves)
        self._kinds: Any = None

    def kinds(self) -> Any:
        """Structure, constants, and the kinds of the tensors."""
        if self._kinds is None:
            self._kinds = self.structure, *kinds(self.leaves)
        return self._kinds


def trees_with(parts: Sequence[Prepared], tensors: Sequence[Tensor]) -> list[Any]:
    """The arguments with these tensors in the places of their own."""
    new = iter(tensors)
    return [filled_with(part.leaves, part.structure, new) for part in parts]


def tensors_in(leaves: Sequence[Any]) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def filled_with(leaves: Sequence[Any], structure: Any, tensors: Iterable[Tensor]) -> Any:
    """The tree with these tensors in the places of its own."""
    new = iter(tensors)
    filled = [next(new) if leaf is _HOLE or isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return optree.tree_unflatten(structure, filled)


def hollow(leaves: Sequence[Any]) -> list[Any]:
    """The leaves without the tensors, which are those of the trace."""
    return [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def all_tensors(hollowed: Sequence[Any]) -> bool:
    """Whether there was nothing but tensors among the leaves."""
    return all(leaf is _HOLE for leaf in hollowed)
