"""Endless streams of minibatches that know their position: what a run reads its data from."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, final, runtime_checkable

import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel.arguments import explaining
from bilevel.errors import CheckpointError
from bilevel.loaders import Repeated, Stateful, knows_its_place
from bilevel.refusals import SEEDS, callable_or_none, shown, whole

_AT_ONCE = 4096  # rows looked at together


@runtime_checkable
class Source(Protocol):
    """An endless stream of batches whose position can be saved and restored."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@final
class Batches:
    """Minibatches of tensors held in memory, in a fresh random order every epoch.

    Batches are cut on the tensors' own device, without a loader process or a copy from the host. The
    last, smaller batch of an epoch is dropped.

    Args:
        data: a tensor, or any pytree (tuple, dict, ...) of tensors with the same first dimension.
        batch_size: rows per batch; `None` gives all rows every time, in their own order.
        seed: seed of the order.
        convert: applied to the rows that were drawn, and to no others: with it the data can be kept as
            bytes, a quarter of the memory, and become floats a batch at a time.

    Raises:
        ValueError: if the data are empty, of unequal length, fewer than `batch_size` rows, or hold a
            NaN or infinite number (named by index).
        TypeError: if a leaf is not a tensor.

    Example:
        >>> batches = Batches(torch.arange(4), batch_size=2, seed=0)
        >>> sorted(torch.cat([next(batches), next(batches)]).tolist())
        [0, 1, 2, 3]
        >>> pixels = torch.tensor([0, 255], dtype=torch.uint8)
        >>> next(Batches(pixels, convert=lambda rows: rows / 127.5 - 1))
        tensor([-1.,  1.])
    """

    @explaining(shuffle="the rows of every epoch are in a new order, by `seed`")
    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        convert: Callable[[Any], Any] | None = None,
    ) -> None:
        callable_or_none("convert", convert, "convert(rows)")
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, *SEEDS)
        self.length = _check(data, batch_size)
        if batch_size is not None and not 1 <= batch_size <= self.length:
            raise ValueError(
                f"`batch_size` must lie between 1 and the number of rows, {self.length}; "
                f"got {batch_size}"
            )
        self.data = optree.tree_map(_ordinary, data)
        self.batch_size = batch_size
        self.convert = convert if convert is not None else _as_they_are
        leaf: Tensor = optree.tree_leaves(data)[0]
        self._generator = torch.Generator(leaf.device).manual_seed(whole("seed", seed, *SEEDS))
        self._order = torch.randperm(0)
        self._position = self.length

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.batch_size is None:
            return self.convert(self.data)
        if self._position + self.batch_size > self.length:
            device = self._generator.device
            self._order = torch.randperm(self.length, generator=self._generator, device=device)
            self._position = 0
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return self.convert(optree.tree_map(lambda leaf: _selected(leaf, rows), self.data))

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch, order of the epoch and state of the generator."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order,
            "position": self._position,
            "length": self.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: if the data have another number of rows than then.
        """
        if "length" not in state:
            raise CheckpointError(
                "the checkpoint was written with data of another kind, read as a stream or augmented; "
                "resume with the same data and arguments"
            )
        if state["length"] != self.length:
            raise CheckpointError(
                f"the checkpoint was written with {state['length']} rows of data, "
                f"there are {self.length} now; resume with the same data"
            )
        self._generator.set_state(state["generator"].cpu())
        self._order = state["order"].to(self._generator.device)
        self._position = state["position"]


@final
class Nothing:
    """The source of problems that need no data: every batch is `None`."""

    def __next__(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def sources_of(data: Any, upper_data: Any, batch_size: Any, seed: int) -> dict[str, Source]:
    """The sources of both levels; one for both if the upper level has no data of its own.

    Args:
        data: the argument of `train`.
        upper_data: the argument of `train`.
        batch_size: the argument of `train`.
        seed: seed of the order of the data; `seed + 1` is that of the upper level's own data.

    Raises:
        TypeError: as `as_source`.
        ValueError: as `as_source`; if there are no tensors that could be cut into batches.
    """
    sources = {"data": as_source("data", data, batch_size, seed)}
    if upper_data is not None:
        sources["upper_data"] = as_source("upper_data", upper_data, batch_size, seed + 1)
    if batch_size is not None and not any(_has_rows(given) for given in (data, upper_data)):
        what = "there are no data" if data is None else "the data come in batches already"
        raise ValueError(
            f"`batch_size` is {batch_size}, but {what}; set it where they are made "
            "(`DataLoader(..., batch_size=...)`) and leave it out here"
        )
    return sources


def as_source(name: str, data: Any, batch_size: int | None, seed: int) -> Source:
    """What `train` accepts as data, as a `Source`.

    Args:
        name: name of the argument.
        data: what was given.
        batch_size: rows per batch, if data are tensors.
        seed: seed of their order.

    Raises:
        TypeError: if `data` is neither tensors, nor a source, nor an iterable of batches.
        ValueError: as `Batches`.
    """
    if data is None:
        return Nothing()
    if isinstance(data, type):
        raise TypeError(f"`{name}` {_WANTED}; got {shown(data)}")
    if isinstance(data, Source):
        return data
    if _has_rows(data):
        return Batches(data, batch_size, seed=seed)
    single = hasattr(data, "__getitem__") or isinstance(data, (set, frozenset, Mapping))
    loader = isinstance(data, Iterable) and (isinstance(data, DataLoader) or not single)
    if not loader:
        raise TypeError(f"`{name}` {_WANTED}; got {shown(data)}. {_advice(data)}")
    return Stateful(data) if knows_its_place(data) else Repeated(data)


def _has_rows(data: Any) -> bool:
    """Whether data are tensors that batches can be cut from, rather than batches."""
    if isinstance(data, (type, Source, list, deque, set, frozenset)):
        return False
    leaves = optree.tree_leaves(data)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


_WANTED = "must be a pytree of tensors, a `DataLoader` (or another iterable of batches), or `None`"


def _advice(data: Any) -> str:
    """What to do with data that `train` does not take."""
    if isinstance(data, (list, deque, set, frozenset)):
        return (
            "It could be one data set or many batches: write a tuple for the columns of one data set, "
            "`DataLoader(batches, batch_size=None)` for a list of batches"
        )
    if isinstance(data, Mapping) and not isinstance(data, dict):
        return "Give `dict(data)`"
    if isinstance(data, Dataset) or (
        hasattr(data, "__getitem__")
        and not hasattr(data, "__array__")
        and not isinstance(data, (str, bytes, tuple, dict))
    ):
        return "What has rows by index goes into a `DataLoader(data, batch_size=...)`"
    if callable(data):
        return "Call it, and give what it returns"
    return "Convert arrays with `torch.as_tensor`"


def refuse_no_list(lower_batches: Any, upper_batch: Any = None) -> None:
    """Refuse what is one batch rather than a list of lower batches.

    Args:
        lower_batches: what was given.
        upper_batch: the batch of the upper loss; batches of both levels often look alike.

    Raises:
        TypeError: for everything but a list, and for a list that looks like `upper_batch` itself.
    """
    nothing = isinstance(lower_batches, tuple) and all(batch is None for batch in lower_batches)
    if not isinstance(lower_batches, list) and not nothing:
        raise TypeError(
            "`lower_batches` must be a list of batches, since a batch may be anything else; got "
            f"{shown(lower_batches)}. Write `[batch]` for one batch"
        )
    if not nothing and isinstance(upper_batch, (list, tuple)) and lower_batches:
        columns, wanted = _looks(list(lower_batches)), _looks(list(upper_batch))
        if columns == wanted and _looks(lower_batches[0]) != wanted:
            raise TypeError(
                "`lower_batches` looks like one batch (it is built as `upper_batch` is), but must be a "
                "list of batches; write `[batch]`"
            )


def _looks(batch: Any) -> Any:
    """How a batch is built, a tuple and a list being alike."""
    if isinstance(batch, (list, tuple)):
        return [_looks(part) for part in batch]
    return type(batch), batch.ndim if isinstance(batch, Tensor) else None


def not_finite(rows: Tensor) -> tuple[int, str]:
    """How many rows hold NaN or infinity, and which, in words.

    Example:
        >>> not_finite(torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, float("inf")]]))
        (2, 'index 1, 2')
    """
    if not (rows.is_floating_point() or rows.is_complex()):
        return 0, indices([])
    if rows.layout is not torch.strided:
        entries = rows.to_sparse().coalesce()
        wrong = ~entries.values().isfinite().flatten(1 if entries.dense_dim() else 0)
        wrong = wrong.any(dim=1) if entries.dense_dim() else wrong
        bad = entries.indices()[0][wrong].unique().tolist()
        return len(bad), indices(bad)
    # in pieces: `isfinite` makes copies of what it is given
    pieces = [part.isfinite().reshape(len(part), -1).all(dim=1) for part in rows.split(_AT_ONCE)]
    bad = (~torch.cat(pieces)).nonzero()[:, 0].tolist()
    return len(bad), indices(bad)


def indices(rows: list[int]) -> str:
    """The first few row numbers, in words."""
    return "index " + ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _as_they_are(rows: Any) -> Any:
    return rows


def _selected(leaf: Tensor, rows: Tensor) -> Tensor:
    return leaf.index_select(0, rows) if leaf.is_sparse else leaf[rows]


def _check(data: Any, batch_size: int | None) -> int:
    leaves = optree.tree_leaves(data)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"the data must be tensors, got a {type(leaf).__name__} among them")
        _refuse_kind(leaf, batch_size)
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(
            "the tensors of the data must share their first dimension, got lengths "
            f"{sorted(lengths)}"
        )
    (length,) = lengths
    if length == 0:
        raise ValueError("the data are empty: their first dimension is 0")
    for leaf in leaves:
        count, which = not_finite(leaf)
        if count:
            raise ValueError(
                f"the data hold NaN or infinite numbers in {count} of {length} rows "
                f"({which}); drop or repair these rows"
            )
    return length


def _refuse_kind(leaf: Tensor, batch_size: int | None) -> None:
    """Refuse tensors that have no rows, or whose rows cannot be selected."""
    if leaf.is_meta:
        raise ValueError("the data are on the meta device, which holds no numbers")
    if leaf.is_nested:
        raise TypeError("the data hold a nested tensor, whose rows torch cannot select; pad them")
    if leaf.ndim == 0:
        raise ValueError(
            "the data hold a tensor without dimensions, which has no rows; keep single numbers as "
            "attributes of the problem"
        )
    if leaf.layout not in (torch.strided, torch.sparse_coo) and batch_size is not None:
        raise TypeError(
            f"torch cannot select rows of a `{leaf.layout}` tensor; convert it with `.to_sparse_coo()`, "
            "or leave out `batch_size` to use all rows in every step"
        )
    if leaf.requires_grad:
        raise ValueError(
            "the data require grad, but no gradient would reach them: they are constants here. "
            "`.detach()` them, or make them variables of a level if they are to be learned"
        )


def _ordinary(leaf: Tensor) -> Tensor:
    """The tensor; made under `inference_mode` a copy, because autograd takes no others."""
    return leaf.clone() if leaf.is_inference() else leaf
