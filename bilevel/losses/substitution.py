"""`Substitution`: tensors in the places of a problem's variables while code of the problem runs.

The code of a loss may run again when its gradient is taken, long after the loss was returned:
activation checkpointing recomputes a part of a network, a hook on saved tensors recomputes what it did
not keep, the `backward` of a `torch.autograd.Function` calls a module, a hook on a tensor calls one.
All of these are registered while the loss runs. They are wrapped there, so that whenever they run they
find what the loss found: its values of the variables and of the buffers. The buffers they advance are
copies of copies, so that a batch norm that is computed twice counts once.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

Slot: TypeAlias = tuple[MutableMapping[str, Any], str]  # a module's dict and a name in it

# One evaluation at a time: it occupies the modules and the global random generators.
_LOCK = threading.RLock()


_lent = False


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Read the modules, with no other thread's values in their places; gradients may be taken."""
    global _lent
    with _LOCK:
        before, _lent = _lent, True  # the autograd engine's threads work for this one
        try:
            yield
        finally:
            _lent = before


@final
class _Current(threading.local):
    """The substitution whose code this thread runs."""

    substitution: "Substitution | None" = None


_current = _Current()


@final
class Substitution:
    """Values for the variables of a problem, and copies of its buffers.

    Args:
        slots: the places of the variables.
        values: what to put there.
        buffers: the places of the buffers; copies are put there, tied ones stay tied.
        recurrent: the recurrent layers, which keep a list of their weights.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        values: Sequence[Tensor],
        buffers: Sequence[Slot],
        recurrent: Sequence[nn.RNNBase],
    ) -> None:
        self._slots = slots
        self._values = values
        self._buffer_slots = buffers
        self._recurrent = recurrent
        self._copies: list[Any] = []
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._running = False

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers as the code left them."""
        return [buffer.detach() for buffer in self._copies]

    def in_place(self) -> AbstractContextManager[None]:
        """Run code of the problem with the values in their places."""
        return _InPlace(self)

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """What to enter when code that is registered now runs: the values, the buffers as of now."""
        state = [self._keep(store[name]) for store, name in self._buffer_slots]
        scratch: list[Tensor] = []

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            nonlocal scratch
            free = self._running or _lent
            with contextlib.nullcontext() if free else _LOCK, _Put(self):
                scratch = scratch or _clones(state)
                versions = [tensor._version for tensor in scratch]
                before = _swap(self._buffer_slots, scratch)
                try:
                    yield
                finally:
                    _swap(self._buffer_slots, before)
                    if versions != [tensor._version for tensor in scratch]:
                        scratch = []

        return context

    def _keep(self, buffer: Tensor) -> Tensor:
        """A copy of a buffer that the code is about to advance, made once for each change."""
        known = self._kept.get(id(buffer))
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = (buffer, buffer._version, buffer.detach().clone())
            self._kept[id(buffer)] = known
        return known[2]


@final
class _Put:
    """While it lasts, the values are in their places, and what is registered is noticed.

    A class, as is what else is entered for every evaluation: contexts made of generators take longer.
    """

    def __init__(self, substitution: Substitution) -> None:
        self._of = substitution

    def __enter__(self) -> None:
        of = self._of
        self._outermost = not of._running
        if self._outermost:  # else a gradient inside the loss; maybe in a thread of the engine
            self._flat = [(list(m._flat_weights), m._flat_weight_refs) for m in of._recurrent]
            self._before = _swap(of._slots, of._values)
            of._running = True
        self._noticed, _current.substitution = _current.substitution, of
        attentive.__enter__()

    def __exit__(self, *error: object) -> None:
        of = self._of
        attentive.__exit__()
        _current.substitution = self._noticed
        if not self._outermost:
            return
        of._running = False
        _swap(of._slots, self._before)
        # recurrent layers cache the tensors of their last call, and with them a whole graph, and
        # remember which these were: without that, the next call with the same ones misses them
        for module, (weights, remembered) in zip(of._recurrent, self._flat, strict=True):
            module._flat_weights, module._flat_weight_refs = weights, remembered


@final
class _InPlace:
    """While it lasts, values and copies of the buffers are in place, and no other thread evaluates."""

    def __init__(self, substitution: Substitution) -> None:
        self._of = substitution
        self._put = _Put(substitution)

    def __enter__(self) -> None:
        # a layer's backward pass evaluates, too; in a thread of the engine, on a GPU, it would wait
        # for the thread that waits for it
        backward = _lent and torch._C._current_graph_task_id() >= 0
        self._locked = _LOCK.acquire(blocking=not backward)
        of = self._of
        self._before = [store[name] for store, name in of._buffer_slots]
        _swap(of._buffer_slots, _clones(self._before))
        self._put.__enter__()

    def __exit__(self, *error: object) -> None:
        self._put.__exit__()
        # code may have assigned (`self.average = ...`)
        self._of._copies = _swap(self._of._buffer_slots, self._before)
        if self._locked:
            _LOCK.release()


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = {id(t): t.detach().clone() for t in tensors}
    return [copies[id(t)] for t in tensors]


def _swap(slots: Sequence[Slot], values: Sequence[Any]) -> list[Any]:
    """Put values into slots, get back what was there."""
    before = [store[name] for store, name in slots]
    for (store, name), value in zip(slots, values, strict=True):
        store[name] = value
    return before


# ---------------------------------------------------------- what is registered while a loss runs

_ENTER = saved_tensors_hooks.__enter__
_REGISTER: Any = torch.Tensor.register_hook
_APPLY: Any = torch.autograd.Function.__dict__["apply"]


@final
class _Attention:
    """Functions in the places of torch's, from the first that enters to the last that leaves.

    They do what torch's do, and more in a thread that evaluates. After an assignment to `torch.Tensor`
    Python looks up all its methods anew. One at each evaluation would cost a tenth of a small loss, so
    whoever evaluates many times enters this once around them all.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                _install(_enter, _register, classmethod(_apply))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _install(_ENTER, _REGISTER, _APPLY)


attentive = _Attention()


def _install(enter: Any, register: Any, apply: Any) -> None:
    setattr(saved_tensors_hooks, "__enter__", enter)  # noqa: B010 - not a method of ours
    setattr(torch.Tensor, "register_hook", register)  # noqa: B010
    setattr(torch.autograd.Function, "apply", apply)  # noqa: B010


def _enter(hooks: saved_tensors_hooks) -> None:
    substitution, unpack = _current.substitution, hooks.unpack_hook
    if substitution is not None:
        hooks.unpack_hook = _within(substitution.again(), unpack)
    try:
        _ENTER(hooks)
    finally:
        hooks.unpack_hook = unpack  # the same object may be entered in another evaluation


def _register(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    substitution = _current.substitution
    return _REGISTER(tensor, hook if substitution is None else _within(substitution.again(), hook))


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    answer = _APPLY.__func__(function, *args, **kwargs)
    substitution = _current.substitution
    if substitution is None:
        return answer
    for tensor in answer if isinstance(answer, tuple) else (answer,):
        node = tensor.grad_fn if isinstance(tensor, Tensor) else None
        if isinstance(node, BackwardCFunction) and "apply" not in vars(node):
            vars(node)["apply"] = _backward_within(substitution.again(), node)
    return answer


def _backward_within(
    again: Callable[[], AbstractContextManager[None]], node: Any
) -> Callable[..., Any]:
    reference = weakref.ref(node)  # the node holds this function

    def apply(*grads: Any) -> Any:
        node: Any = reference()
        with again():
            return type(node).apply(node, *grads)

    return apply


def _within(
    again: Callable[[], AbstractContextManager[None]], function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    def run(argument: Any) -> Any:
        with again():
            return function(argument)

    return run
