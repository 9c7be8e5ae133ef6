r"""More than one process: means over ranks, and the one process that writes files and messages.

With R ranks, rank r evaluates both losses on its share of every batch. All shares are equally large, so
$F = \frac{1}{R} \sum_r F_r$ and $G = \frac{1}{R} \sum_r G_r$, and every derivative of a loss is the
average of the ranks' own. Two things are not linear in the losses and need care:

- a step of an optimizer takes the average of the lower gradients; where it is differentiated
  (`Unrolled`), so is the average, whose transpose is the average of the cotangents;
- a linear solve (`Implicit`) takes averaged products with the Hessian, so that all ranks solve the same
  system.

A wrapper that hooks `.backward()` sees none of these gradients: they come from `torch.autograd.grad`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, cast, final

import optree
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel.compile import is_tracing

_LOST = (
    "process {} of {} lost contact with another one, which failed or was killed{}; start the run again "
    "with `--resume`, with any number of processes"
)
_PATIENCE = timedelta(minutes=30)  # a rank may evaluate for long; one that dies is noticed at once


class LostRankError(RuntimeError):
    """Another process of the run ended, or cannot be reached any more."""


_alone = False


def world_size() -> int:
    """Number of processes that train together; 1 without `torch.distributed`."""
    together = not _alone and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Exchange nothing inside: what one process does while the others wait, such as an evaluation."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[str | None]:
    """Join the processes that `torchrun` started, for as long as the context lasts.

    Args:
        device: "cpu" or "cuda"; by default CUDA where every process of this machine can have a device
            of its own.

    Yields:
        "cpu" or "cuda", where "cuda" is now this process's own device; `device` as it was given if there
        is only one process.

    Raises:
        ValueError: if "cuda" is asked for and there are fewer devices than processes; for one device by
            its number.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or world_size() > 1:
        yield device
        return
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"`torchrun` gives each process a device of its own, so `{device}` cannot be chosen; use "
            "`--device cuda` or `--device cpu`"
        )
    here, own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if device == "cuda" and count < here:
        raise ValueError(
            f"{here} processes share this machine, but it has {count} CUDA devices; start one for each "
            "device (`torchrun --nproc-per-node`), or use `--device cpu`"
        )
    device = device or ("cuda" if 0 < here <= count else "cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    with _terminated_aloud():
        yield device
    dist.destroy_process_group()


@contextlib.contextmanager
def _terminated_aloud() -> Iterator[None]:
    """`torchrun` ends the processes that are left when one dies; let them say why."""

    def end(number: int, frame: FrameType | None) -> None:
        raise LostRankError(_LOST.format(os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), ""))

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means over all ranks, differentiable; the tensors themselves if there is one rank.

    One exchange for each dtype among the tensors. All ranks must call this with tensors of the same
    shapes.

    Raises:
        LostRankError: if another rank is gone.
    """
    if world_size() == 1:
        return list(tensors)
    averaged: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in places])
        parts = _mean(flat).split([tensors[i].numel() for i in places])
        averaged |= {i: p.view(tensors[i].shape) for i, p in zip(places, parts, strict=True)}
    return [averaged[i] for i in range(len(tensors))]


@final
class _MeanOverRanks(torch.autograd.Function):
    """The mean of a vector over the ranks; linear and symmetric, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if is_tracing():  # what a graph can hold
            from torch.distributed import _functional_collectives as functional

            everybody = cast(dist.ProcessGroup, dist.group.WORLD)
            return cast(Tensor, functional.all_reduce(x, "sum", everybody)) / world_size()
        total = x.clone()
        with _watched():
            dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _mean(grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _mean(tangents[0])


def _mean(x: Tensor) -> Tensor:
    mean: Tensor = _MeanOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return mean


@torch.no_grad()
def agree(module: nn.Module) -> None:
    """Give every rank the weights of rank 0 and the average of the ranks' floating-point buffers."""
    if world_size() == 1:
        return
    with _watched():
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    for buffer, value in zip(buffers, mean_over_ranks(buffers), strict=True):
        buffer.copy_(value)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; the same answer everywhere."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    raised = torch.tensor(float(flag), device=device)
    with _watched():
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def from_main(value: Any) -> Any:
    """The value that rank 0 has."""
    if world_size() == 1:
        return value
    box = [value]
    with _watched():
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    try:
        yield
    except LostRankError:
        raise
    except RuntimeError as error:
        reason = f" ({str(error).strip().splitlines()[0]})"
        raise LostRankError(_LOST.format(rank(), world_size(), reason)) from error


def share_of(batch: Any, rank: int, ranks: int, owner: str) -> Any:
    """One rank's rows of every tensor of a batch.

    Args:
        batch: a pytree of tensors; those without dimensions go to every rank.
        rank: number of the process.
        ranks: number of processes.
        owner: name of the problem's class.

    Raises:
        ValueError: if the tensors differ in their number of rows, or it is not a multiple of `ranks`.
    """
    leaves: list[Any] = optree.tree_leaves(batch)
    rows = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim} - {0}
    if len(rows) > 1:
        raise ValueError(
            f"the tensors of a batch of `{owner}` have {sorted(rows)} rows, so they "
            "cannot be shared out among processes; override `shard`"
        )
    if rows and (n := rows.pop()) % ranks:
        raise ValueError(
            f"a batch of {n} rows cannot be shared out equally among {ranks} processes; use "
            f"a batch size of {max(n // ranks, 1) * ranks}"
        )

    def share(leaf: Any) -> Any:
        cut = isinstance(leaf, Tensor) and leaf.ndim and len(leaf)
        return leaf.chunk(ranks)[rank] if cut else leaf

    return optree.tree_map(share, batch)
