"""Devices: which are there, how a batch gets to one, and where its random numbers come from."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.refusals import nearest, shown

_KINDS = ("cpu", "cuda", "mps")
_PLAIN = (str, bytes, int, float)


# ---------------------------------------------------------------------- batches


def brought(batch: Any, device: torch.device) -> Any:
    """The batch on a device; the very same object where nothing has to move.

    Tensors are found in tuples, lists, mappings (dicts, `UserDict`s) and dataclasses, however nested.
    Anything else that has a method `to`, such as a tokenizer's `BatchEncoding`, is asked `to(device)`.
    All other leaves, and every dtype, stay as they are. From pinned memory to a CUDA device the copy is
    queued (`non_blocking`), and the caller may go on.

    Args:
        batch: anything.
        device: where to, with its index.

    Example:
        >>> batch = {"image": torch.zeros(2), "name": "zero"}
        >>> brought(batch, torch.device("cpu")) is batch
        True
        >>> brought(batch, torch.device("meta"))
        {'image': tensor(..., device='meta', size=(2,)), 'name': 'zero'}
    """
    if batch is None or isinstance(batch, _PLAIN):
        return batch
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        # on other devices than CUDA's a copy that is only queued may read memory that was freed
        return batch.to(device, non_blocking=device.type == "cuda" and _pinned(batch))
    if (
        type(batch) not in (tuple, list, dict)
        and callable(getattr(batch, "to", None))
        and not isinstance(batch, (type, nn.Module))
    ):
        return batch if getattr(batch, "device", None) == device else batch.to(device)
    if isinstance(batch, (tuple, list)):
        if _here(batch, device):
            return batch
        parts = [brought(part, device) for part in batch]
        same = all(new is old for new, old in zip(parts, batch, strict=True))
        return batch if same else _sequence(batch, parts)
    if type(batch) is dict or isinstance(batch, Mapping):
        if _here(batch.values(), device):
            return batch
        entries = {key: brought(value, device) for key, value in batch.items()}
        same = all(new is batch[key] for key, new in entries.items())
        return batch if same else _mapping(batch, entries)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _record(batch, device)
    return batch


def _here(parts: Iterable[Any], device: torch.device) -> bool:
    """Whether all parts are tensors there, or plain: the quick answer for most batches."""
    for part in parts:
        if isinstance(part, Tensor):
            if part.device != device:
                return False
        elif not isinstance(part, _PLAIN):
            return False
    return True


def _pinned(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_pinned()


def _sequence(batch: Any, parts: list[Any]) -> Any:
    named = getattr(batch, "_make", None)
    return type(batch)(parts) if named is None else named(parts)


def _mapping(batch: Any, entries: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return entries
    if not isinstance(batch, MutableMapping):
        return type(batch)(entries)
    other = copy.copy(batch)  # with what it holds beside its entries
    for key, value in entries.items():
        other[key] = value
    return other


def _record(batch: Any, device: torch.device) -> Any:
    """A dataclass, frozen or not, without running its `__init__` again."""
    before = {f.name: getattr(batch, f.name, None) for f in dataclasses.fields(batch)}
    after = {name: brought(value, device) for name, value in before.items()}
    changed = {name: value for name, value in after.items() if value is not before[name]}
    if not changed:
        return batch
    other = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(other, name, value)
    return other


def elsewhere(problem: nn.Module, batch: Any) -> str | None:
    """What to do about a batch with tensors on a device where the problem has none, if it has any.

    Args:
        problem: its parameters and buffers say which devices it uses.
        batch: that it could not compute with.
    """
    homes = {tensor.device for tensor in (*problem.parameters(), *problem.buffers())}
    strays = {tensor.device for tensor in _tensors(batch) if tensor.ndim} - homes
    if not strays or not homes:
        return None
    home = next(iter(problem.parameters()), next(problem.buffers(), torch.empty(0))).device
    stray = min(map(str, strays))
    return (
        f"the batch has tensors on `{stray}`, but `{type(problem).__name__}` is on `{home}`; move the "
        f"batch, such as with `batch.to('{home}')`, or the problem (`train` moves batches by itself)"
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from _tensors([getattr(batch, f.name, None) for f in dataclasses.fields(batch)])


# ---------------------------------------------------------------------- the devices there are


def usable_device(name: Any, what: str = "`device`") -> torch.device:
    """The device of that name, if it is there.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", or a `torch.device`.
        what: what it was given as, for the message.

    Raises:
        ValueError: if there is no such kind, it is not there, or its index is too large.
        TypeError: if it is no name.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
        >>> usable_device("gpu")
        Traceback (most recent call last):
            ...
        ValueError: `device` cannot be `gpu`; did you mean `cuda`?
    """
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f"{what} must be the name of a device, such as 'cuda:0', got {shown(name)}")
    text = str(name).strip().lower()
    hint = "did you mean `cuda`?" if text == "gpu" else nearest(text, (*_KINDS, "cuda:N"))
    kind, colon, digits = text.partition(":")
    if kind not in _KINDS or (colon and not digits.isdecimal()):
        raise ValueError(f"{what} cannot be `{name}`; {hint}")
    index = int(digits) if colon else 0
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": _count_mps()}[kind]
    if count == 0:
        raise ValueError(f"{what} is `{name}`, but {_missing(kind)}")
    if index >= count:
        there = ", ".join(f"`{kind}:{i}`" for i in range(count))
        many = (
            f"is 1 {kind.upper()} device" if count == 1 else f"are {count} {kind.upper()} devices"
        )
        raise ValueError(f"{what} is `{name}`, but there {many}: {there}")
    return torch.device("cpu") if kind == "cpu" else torch.device(text)


def _count_mps() -> int:
    return int(torch.backends.mps.is_available())


def _missing(kind: str) -> str:
    """Why there is no device of a kind, and what to do."""
    if kind == "cuda":
        built, why = torch.backends.cuda.is_built(), "there is no CUDA device"
        without = "this torch was built without CUDA"
    else:
        built, why = torch.backends.mps.is_built(), "there is no Metal device, Apple's"
        without = "this torch was built without Metal"
    return f"{why}{'' if built else f' ({without})'}; leave it out to use the processor"


def widest(device: torch.device) -> torch.dtype:
    """The floating-point dtype with the most digits that a device has: Metal has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def global_generators(device: torch.device) -> list[torch.Generator]:
    """What draws without a generator of its own take their numbers from, beside a problem there."""
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    elif device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    return found


def usable_precision(precision: Any) -> torch.dtype | None:
    """The dtype to compute losses in, if their gradients are right in it.

    Raises:
        ValueError: for another than `torch.bfloat16`.
    """
    if precision is None or precision is torch.bfloat16:
        dtype: torch.dtype | None = precision
        return dtype
    got = f"`{precision}`" if isinstance(precision, torch.dtype) else shown(precision)
    why = ", in which gradients underflow to 0 without loss scaling"
    raise ValueError(
        "`precision` must be `torch.bfloat16`, or `None` for that of the variables, got "
        f"{got}{why if precision is torch.float16 else ''}"
    )
