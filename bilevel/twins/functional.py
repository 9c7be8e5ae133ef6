"""The twin of a torchopt transformation: any chain of sgd, adam, clipping, schedules, ..."""

import copy
import inspect
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from functools import partial
from types import FunctionType
from typing import Any, Protocol, cast, final, runtime_checkable

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.compile import known
from bilevel.tree import Tree
from bilevel.twins.base import NOT_LEARNED, Gradients, Twin, clip, moved, safe_sqrt


@runtime_checkable
class Transformation(Protocol):
    """A torchopt (or optax-like) gradient transformation."""

    init: Any
    update: Any


@final
class TransformationTwin(Twin):
    """Starts a transformation afresh at the given variables.

    Args:
        transformation: any torchopt transformation, e.g. `torchopt.adam(1e-3)`.
        tree: the point at which to start.
        used: names of the variables the lower loss uses; the others stay where they are.
        make: what makes it of the upper variables, if its settings are learned.
    """

    def __init__(
        self,
        transformation: Transformation,
        tree: Tree,
        used: set[str],
        make: Callable[[Tree], Any] | None = None,
    ) -> None:
        self._transformation = transformation
        self._make = make
        self._tree = {name: value.detach() for name, value in tree.items()}
        self._names = [name for name in tree if name in used]

    def pack(self, tree: Tree) -> list[Tensor]:
        return [tree[name] for name in self._names]

    def unpack(self, points: list[Tensor]) -> Tree:
        return {**self._tree, **dict(zip(self._names, points, strict=True))}

    def moves(self) -> list[str]:
        return self._names

    def start(self, points: list[Tensor]) -> Any:
        return self._transformation.init(dict(zip(self._names, points, strict=True)))

    def whole(self, points: list[Tensor]) -> Any:
        return self.start(points)

    def held(self) -> Any:
        return {name: value for name, value in self._tree.items() if name not in self._names}

    def holding(self, held: Any) -> "TransformationTwin":
        other = copy.copy(self)
        other._tree = held
        return other

    def reading(self, upper: Tree) -> "TransformationTwin":
        if self._make is None:
            return self
        other = copy.copy(self)
        other._transformation = made_at(self._make, upper)
        return other

    def key(self) -> Hashable:
        return tuple(self._names)

    def step(
        self, points: list[Tensor], gradients: Gradients, state: Any
    ) -> tuple[list[Tensor], Any]:
        params = dict(zip(self._names, points, strict=True))
        grads = dict(zip(self._names, moved(gradients, self._names, "Unrolled"), strict=True))
        with nullcontext() if known(partial(_no_zero, grads)) else _SafeSqrt():
            updates, state = self._transformation.update(grads, state, params=params, inplace=False)
        return [params[name] + updates[name] for name in self._names], state


def _no_zero(gradients: Tree) -> Tensor:
    """Whether no second moment can be exactly 0: it is where the gradient is, or its square."""
    return torch.stack([g.detach().square().all() for g in gradients.values()]).all()


@final
class _SafeSqrt(TorchFunctionMode):
    """Replaces the square roots inside an optimizer's update by `safe_sqrt`.

    torchopt's own remedy, `eps_root > 0`, moves the iterates; this does not.
    """

    _ROOTS = (torch.sqrt, Tensor.sqrt, Tensor.sqrt_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._ROOTS and isinstance(args[0], Tensor):
            return safe_sqrt(args[0])
        return func(*args, **(kwargs or {}))


def makes_transformation(optimizer: Any) -> bool:
    """Whether it is a function of the upper variables that makes a transformation."""
    made = isinstance(optimizer, (type, Transformation)) or not callable(optimizer)
    return not made and not isinstance(optimizer, torch.optim.Optimizer)


def transformation_at(optimizer: Any, upper: Tree) -> Any:
    """The transformation that was given, or that a function of the upper variables makes."""
    return optimizer(upper) if makes_transformation(optimizer) else optimizer


def made_at(make: Callable[[Tree], Any], upper: Tree) -> Transformation:
    """What the function makes of the upper variables, ready for any step.

    torchopt's momentum keeps outside of its state whether it was called before, and forgets its first
    moment if not: a call that counts for nothing comes first.
    """
    transformation = as_transformation(make(upper))
    probe = {"y": torch.zeros(1)}
    with torch.no_grad(), suppress(Exception):  # it may want particular variables
        transformation.update(probe, transformation.init(probe), params=probe, inplace=False)
    return transformation


def as_transformation(optimizer: Any) -> Transformation:
    """A torchopt transformation as it can be differentiated.

    torchopt's `clip_grad_norm` computes its factor outside autograd, so the hypergradient through it
    would be wrong; in its place stands the same formula with its derivative.

    Raises:
        TypeError: if `optimizer` is something else, saying what to pass.
        ValueError: if it clips by another norm than the Euclidean one, or where it cannot be replaced.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "`Unrolled(optimizer=...)` takes a torchopt transformation; leave it out to branch from "
            f"the running `{type(optimizer).__name__}` given as `lower_optimizer`"
        )
    if not isinstance(optimizer, Transformation):
        raise TypeError(
            "`optimizer` must be a torchopt transformation such as `torchopt.sgd(0.1)` (or a function "
            f"of the upper variables that makes one), got {optimizer!r}"
        )
    if _dampened(optimizer.update):
        raise ValueError(
            "torchopt's `sgd(dampening=...)` keeps outside its state whether it was called before, so "
            "its first step differs from one hypergradient to the next; leave `dampening` out, or "
            "unroll a running `torch.optim.SGD`"
        )
    differentiable = _with_differentiable_clip(optimizer)
    if _holds_clip(differentiable.update):
        raise ValueError(
            "torchopt's `clip_grad_norm` cannot be differentiated inside this transformation; chain "
            "it at the top, `torchopt.chain(clip_grad_norm(...), ...)`, or use "
            "`Unrolled(..., max_grad_norm=...)`"
        )
    return differentiable


def _with_differentiable_clip(transformation: Any) -> Transformation:
    if hasattr(transformation, "transformations"):
        import torchopt

        parts = [_with_differentiable_clip(part) for part in transformation.transformations]
        return cast(Transformation, torchopt.chain(*cast(Any, parts)))
    if getattr(transformation.update, "__module__", None) != "torchopt.clip":
        return cast(Transformation, transformation)
    settings = inspect.getclosurevars(transformation.update).nonlocals
    if settings["norm_type"] != 2:
        raise ValueError(
            f"`clip_grad_norm(norm_type={settings['norm_type']!r})` cannot be differentiated; use "
            "the Euclidean norm, `norm_type=2.0`"
        )

    def update(
        updates: Gradients, state: Any, *, params: Any = None, inplace: bool = True
    ) -> tuple[Gradients, Any]:
        return clip(updates, settings["max_norm"]), state

    changed: Transformation = transformation._replace(update=update)
    return changed


def _holds_clip(function: Any) -> bool:
    """Whether a (chained) update function contains torchopt's clipping, found in its closures."""
    if isinstance(function, (list, tuple)):
        return any(_holds_clip(entry) for entry in function)
    if not isinstance(function, FunctionType):
        return False
    if function.__module__ == "torchopt.clip":
        return True
    return any(_holds_clip(cell.cell_contents) for cell in function.__closure__ or ())


def _closed(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that is not filled yet
            found[name] = cell.cell_contents
    return found


def _dampened(function: Any) -> bool:
    if isinstance(function, (list, tuple)):
        return any(_dampened(entry) for entry in function)
    if not isinstance(function, FunctionType):
        return False
    closed = _closed(function)
    if "first_call" in closed and closed.get("dampening"):
        return True
    return any(_dampened(value) for value in closed.values())


def refuse_learned(transformation: Transformation) -> None:
    """Refuse a transformation with a setting to be learned, also inside a schedule.

    A step at constants that has a graph got it from such a setting.

    Raises:
        ValueError: naming the setting.
    """
    probe = {"y": torch.ones(1)}
    with torch.enable_grad():
        try:
            state = transformation.init(dict(probe))
            # `moment_requires_grad` makes leaves of the moments, which are not settings
            state = optree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)
            updates, _ = transformation.update(probe, state, params=probe, inplace=False)
        except Exception:  # it wants particular variables; the steps themselves will refuse
            updates = {}
    named = _learned(transformation.update)
    if named or any(isinstance(u, Tensor) and u.requires_grad for u in updates.values()):
        raise ValueError(
            f"`{named[0] if named else 'a setting'}` of the transformation that `Unrolled` is to "
            f"unroll is a tensor that requires grad; {NOT_LEARNED}"
        )


def _learned(function: Any, seen: set[int] | None = None) -> list[str]:
    """Names under which functions close over tensors that require grad."""
    seen = set() if seen is None else seen
    if id(function) in seen:
        return []
    seen.add(id(function))
    if isinstance(function, (list, tuple)):
        return [name for entry in function for name in _learned(entry, seen)]
    values: dict[str, Any] = {}
    if isinstance(function, partial):
        positional = {str(i): value for i, value in enumerate(function.args)}
        values = {**positional, **function.keywords, "func": function.func}
    elif isinstance(function, FunctionType):
        values = _closed(function)
    found = [n for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad]
    return found + [name for value in values.values() for name in _learned(value, seen)]


def describe(transformation: Transformation) -> str:
    """A transformation and its settings in words: torchopt's own `repr` shows addresses only.

    Example:
        >>> import torchopt
        >>> describe(torchopt.sgd(0.1, momentum=0.9))
        'trace(dampening=0.0, momentum=0.9, nesterov=False), scale(step_size=-0.1)'
    """
    if makes_transformation(transformation):
        return getattr(transformation, "__qualname__", type(transformation).__name__)
    return ", ".join(_described(transformation.update))


_BOOKKEEPING = {"already_flattened", "first_call", "moment_requires_grad", "initial_scale"}


def _described(function: Any) -> list[str]:
    """The functions that make up an update, innermost first, with the numbers they close over."""
    if isinstance(function, (list, tuple)):
        return [words for entry in function for words in _described(entry)]
    if not isinstance(function, FunctionType):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    closed = dict(zip(function.__code__.co_freevars, cells, strict=True))
    inner = [words for value in closed.values() for words in _described(value)]
    settings = ", ".join(
        f"{key}={value!r}"
        for key, value in closed.items()
        if isinstance(value, (bool, int, float, str)) and key not in _BOOKKEEPING
    )
    name = function.__qualname__.partition(".<locals>")[0].strip("_")
    return [*inner, f"{name}({settings})"] if settings else inner
