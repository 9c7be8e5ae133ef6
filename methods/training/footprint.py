r"""`footprint`: what a training step costs - parameters, operations, bytes - before it is paid.

A step is taken on tensors that have a shape and no numbers: no arithmetic is done and no memory is
used, but every operation passes by and is counted. A product of matrices $(m, k)\,(k, n)$, and a
convolution as the product it is, counts

$$ 2\,m\,n\,k \quad\text{operations (a multiplication and an addition are two)}, $$

everything else (normalisations, activations, optimizers) none; a linear solve takes all its steps.
Memory is that of all tensors alive at the worst moment of the step; with a batch of $b$ visibles

$$ M(b) = W + A + G + S(b), \qquad S(b) \approx \sigma_0 + \sigma_1 b, $$

where $W$ are weights and buffers, $A$ the optimizers' averages, $G$ the gradients of the larger level,
and $S$ what else is alive: mostly activations that wait for the backward pass.
"""

import copy
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import optree
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bilevel import Solver
from bilevel.distributed import world_size
from bilevel.methods.training.settings import Training
from bilevel.methods.training.steps import training_steps
from bilevel.methods.training.trainable import Trainable
from bilevel.optimizers import listed

_Model = TypeVar("_Model", bound=Trainable)


@final
@dataclass(frozen=True)
class Footprint:
    """What one training step costs.

    Attributes:
        batch_size: visibles in a batch.
        parameters: number of parameters by network.
        operations: of one step, both levels, forward and backward.
        weights: bytes of parameters and buffers, those of a moving average included.
        optimizer: bytes the optimizers keep.
        gradients: bytes of the larger level's gradients.
        activations: bytes of what else is alive at the worst moment of a step.
    """

    batch_size: int
    parameters: dict[str, int]
    operations: int
    weights: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes at the worst moment of a step."""
        return self.weights + self.optimizer + self.gradients + self.activations


def footprint(
    model: Trainable,
    batch_size: int,
    *,
    training: Training | None = None,
    solver: Solver | None = None,
    shape: tuple[int, ...] | None = None,
) -> Footprint:
    """Count a training step of a model without taking it; about a second.

    Not counted: workspaces of convolution libraries, fragments of the allocator, the process itself
    (some 0.5 GB on a GPU) and the data. A compiled step needs less.

    Args:
        model: the model, which is left as it is.
        batch_size: visibles per batch.
        training: its settings; the method's own by default.
        solver: how the hypergradient is computed; the method's own by default.
        shape: of one visible, if the model does not know it.

    Returns:
        The cost of the second step: in the first one the optimizers' averages are not there yet.

    Raises:
        ValueError: if the batch size is not positive, or the shape of a visible is not known; among
            several processes, whose steps exchange numbers.

    Example:
        >>> from bilevel.methods import BiDVL
        >>> cost = footprint(BiDVL.for_images((3, 32, 32)), batch_size=100)
        >>> cost.parameters
        {'energy': 7385665, 'posterior': 2780024, 'generator': 4452963}
        >>> 4.5e11 < cost.operations < 5.5e11, 0.6e9 < cost.total < 1.2e9
        (True, True)
    """
    shape = model.visible_shape if shape is None else shape
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}")
    if world_size() > 1:
        raise ValueError(
            "a step is counted in one process, without `torchrun`; each of several processes takes its "
            "share of the batch, so count with that"
        )
    if shape is None:
        raise ValueError("this model takes visibles of any shape; say which one by `shape=...`")
    training = Training(**model.training_defaults) if training is None else training
    solver = model.default_solver() if solver is None else solver
    simple = training.model_copy(update={"num_steps": 3, "compile": False, "ema": None})
    parameter = next(model.parameters())
    mode, tally = FakeTensorMode(), _Tally()
    counted = _weightless(model, mode)
    tally.see([*counted.parameters(), *counted.buffers()])
    with mode, tally:
        batch = torch.zeros(batch_size, *shape, dtype=parameter.dtype, device=parameter.device)
        optimizers = counted.optimizers(simple)
        steps = training_steps(counted, _Same(batch), simple, solver, optimizers, check_every=10**9)
        next(steps)
        tally.restart()
        next(steps)
    weights = _bytes((*model.parameters(), *model.buffers()))
    both = (*listed(optimizers[0]), *listed(optimizers[1]))
    states = [list(entry.values()) for optimizer in both for entry in optimizer.state.values()]
    kept = _bytes(value for entry in states for value in entry if isinstance(value, Tensor))
    gradients = max(_bytes(model.variables(level).values()) for level in ("upper", "lower"))
    return Footprint(
        batch_size,
        _parameters(model),
        tally.operations,
        weights if training.ema is None else 2 * weights,
        kept,
        gradients,
        max(0, tally.peak - weights - kept - gradients),
    )


def largest_batch(
    model: Trainable,
    available: int,
    *,
    training: Training | None = None,
    solver: Solver | None = None,
    shape: tuple[int, ...] | None = None,
) -> int:
    """The largest batch whose training step fits into `available` bytes; 0 if none does.

    Args:
        model: the model.
        available: bytes.
        training: its settings; the method's own by default.
        solver: how the hypergradient is computed; the method's own by default.
        shape: of one visible, if the model does not know it.

    Returns:
        A number of visibles.
    """

    def total(size: int) -> int:
        return footprint(model, size, training=training, solver=solver, shape=shape).total

    return largest_size(total, available)


def largest_size(total: Callable[[int], int], available: int) -> int:
    """The largest size whose `total` is at most `available`; 0 if there is none.

    Memory grows in proportion to the batch once activations decide: a line through two batch sizes
    says where it meets `available`, and a third look whether that was right.

    Args:
        total: bytes by size.
        available: bytes.

    Example:
        >>> largest_size(lambda size: 1000 + 10 * size, 3000)
        200
    """
    few, many = 64, 128
    low, high = total(few), total(many)
    slope = max(1.0, (high - low) / (many - few))
    size = max(0, few + math.floor((available - low) / slope))
    while size > 0 and total(size) > available:
        size = size * 9 // 10
    return size


# ---------------------------------------------------------------------- out of memory


def asked(error: BaseException) -> int | None:
    """Bytes an error says could not be had; `None` if it is about something else.

    Example:
        >>> asked(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."))
        2147483648
        >>> asked(RuntimeError("DefaultCPUAllocator: you tried to allocate 4000 bytes. Error 12"))
        4000
        >>> asked(ValueError("no"))
    """
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    known = ("out of memory", "DefaultCPUAllocator")
    if not (isinstance(error, torch.OutOfMemoryError) or any(words in text for words in known)):
        return None
    found = re.search(r"tried to allocate ([\d.]+) *(bytes|[KMGT]iB)", text, re.IGNORECASE)
    if found is None:
        return 0
    units = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    return int(float(found[1].rstrip(".")) * units[found[2].lower()])


def available(device: torch.device) -> int | None:
    """Bytes this process has and can get on a device; `None` where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        table = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", table)[1])  # type: ignore[index]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return free + pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, TypeError, ValueError):
        return None


def advice(
    error: BaseException,
    model: Trainable,
    training: Training,
    solver: Solver,
    shape: tuple[int, ...],
    there: int | None,
) -> str:
    """Advice after memory ran out: how much was asked for, how much there is, what would fit.

    Args:
        error: what was raised.
        model: that was trained.
        training: its settings.
        solver: how the hypergradient is computed.
        shape: of one visible.
        there: bytes this process can have in all, `None` if that is not known.
    """
    size = asked(error) or 0
    text = f"out of memory at `batch_size` {training.batch_size}: "
    text += f"{bytes_in_words(size)} more were asked for" if size else "the memory is used up"
    if there is None:
        return text + "; make `batch_size` smaller"
    text += f", this process can have {bytes_in_words(there)} in all"
    try:
        room = int(0.9 * there)  # workspaces and fragments
        needed = footprint(
            model, training.batch_size, training=training, solver=solver, shape=shape
        )
        fits = largest_batch(model, room, training=training, solver=solver, shape=shape)
    except Exception:  # the estimate must not hide the error
        return text + "; make `batch_size` smaller"
    text += f". A step is estimated to need {bytes_in_words(needed.total)}; "
    if fits < 2:
        return text + "not even a batch of 2 would fit: make the networks smaller"
    if fits >= training.batch_size:
        return (
            text + "that would fit, so something else holds the memory: free it, or halve the batch"
        )
    return text + f"set `batch_size` to {fits} or less"


def bytes_in_words(size: int) -> str:
    """Bytes in words.

    Example:
        >>> bytes_in_words(58_580_384), bytes_in_words(1_310_000_000), bytes_in_words(0)
        ('59 MB', '1.3 GB', '0 MB')
    """
    if size < 1e9:
        return f"{size / 1e6:.2g} MB" if 0 < size < 1e7 else f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB"


# ---------------------------------------------------------------------- counting


@final
class _Tally(TorchDispatchMode):
    """Counts operations, and the bytes of all tensors alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0  # a look at a number there is not
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        self.see(leaf for leaf in optree.tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors, once, until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def restart(self) -> None:
        """Count operations and the worst moment from here on."""
        self.operations, self.peak = 0, self.live


@final
class _Same:
    """A source that gives one batch again and again."""

    def __init__(self, batch: Tensor) -> None:
        self._batch = batch

    def __next__(self) -> Tensor:
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _weightless(model: _Model, mode: FakeTensorMode) -> _Model:
    """A copy whose tensors have shapes and no numbers, on the devices they are on."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})


def _parameters(model: Trainable) -> dict[str, int]:
    networks: dict[str, nn.Module] = {}
    for level, module in (("upper", model.upper), ("lower", model.lower)):
        parts = dict(module.items()) if isinstance(module, nn.ModuleDict) else {level: module}
        networks |= parts
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    return {name: count for name, count in counts.items() if count}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared memory counted once."""
    storages = {id(s): s for s in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
