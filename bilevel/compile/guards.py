"""`Guard`: what a graph takes for granted - the Python values that were read while it was traced.

A graph holds numbers and decisions, not the Python that made them: `self.beta`, `module.training`, a
global, what a loss closes over. While a step is traced, every attribute that is read of any module is
noted, and so is what the functions found there close over. Before each run all of it is compared
again, a few microseconds per module; if something has changed, the step is traced again.

What the step itself writes (a counter, a cache) is not noted. Of containers with more than `_LARGE`
entries, only identity and length are.
"""

import contextlib
import copy
import dis
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

_LARGE = 256
_DEEP = 4  # containers in containers that are looked into
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)
_NOT_THE_USERS = {"torch", "bilevel", "numpy", "optree", "torchopt", "higher", "builtins"}
# found by the walk over all modules, or not looked at by name
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}

# what second derivatives switch off for as long as they are taken; modes are compared by themselves
_SWITCHED = {"training", "sparse"}

_MISSING = object()


@final
class _Same:
    """Equal to itself only, as tensors and functions are here."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    __hash__ = None  # type: ignore[assignment]


def frozen(value: Any, depth: int = _DEEP) -> Any:
    """A picture of the value: equal to a later one if nothing of it has changed."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray) and value.size <= _LARGE and value.dtype != object:
        return value.shape, value.dtype, value.tobytes()
    if isinstance(value, MethodType):  # a new object each time
        return _Same(value.__func__), _Same(value.__self__)
    if isinstance(value, partial):
        return tuple(frozen(v, depth - 1) for v in (value.func, value.args, value.keywords))
    if isinstance(value, (Tensor, nn.Module, type, FunctionType, ModuleType, np.ndarray)):
        return _Same(value)
    if isinstance(value, (list, tuple, set, frozenset, deque, Mapping)):
        if len(value) > _LARGE or not depth:
            return _Same(value), len(value)
        entries = value.items() if isinstance(value, Mapping) else value
        return type(value), [frozen(entry, depth - 1) for entry in entries]
    inside = getattr(value, "__dict__", None)
    if not isinstance(inside, dict) or not depth or _root(type(value)) in _NOT_THE_USERS:
        return _Same(value)
    return _Same(value), frozen(dict(inside), depth - 1)


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


def _equal_by_value(value: Any, depth: int = _DEEP) -> bool:
    """Whether `==` with a copy shows every change."""
    if isinstance(value, (*_PLAIN, FunctionType, type)):
        return True
    if type(value) in (list, tuple) or isinstance(value, dict):
        entries = value.values() if isinstance(value, dict) else value
        return len(value) <= _LARGE and all(
            depth and _equal_by_value(e, depth - 1) for e in entries
        )
    return False


@final
class Reads:
    """The attributes of modules and the surroundings of functions that a step has read."""

    def __init__(self) -> None:
        self.attributes: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.surroundings: dict[tuple[int, str], tuple[Callable[[], Any], str, Any]] = {}
        self.modules: dict[int, nn.Module] = {}
        self._written: set[tuple[int, str]] = set()
        self._walked: set[int] = set()
        self._kept: list[Any] = []  # kept alive, so that no address is used again

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        """A module's attribute was read."""
        key = (id(module), name)
        self.modules.setdefault(id(module), module)
        if name.startswith("__") or name in _ELSEWHERE:
            return
        if key in self.attributes or key in self._written:
            return
        if name not in object.__getattribute__(module, "__dict__"):
            held = inspect.getattr_static(type(module), name, None)
            if isinstance(held, property):  # what it reads is noted by itself
                value = held.fget
                held = None
            if held is None or (isinstance(value, MethodType) and _root(value) in _NOT_THE_USERS):
                self.watch(value)
                return
        self.attributes[key] = module, name, frozen(value)
        self.watch(value)

    def note_write(self, module: nn.Module, name: str) -> None:
        """A module's attribute was written: from here on it is the step's own."""
        self._written.add((id(module), name))

    def lasting(
        self,
    ) -> tuple[list[tuple[nn.Module, str]], list[tuple[Callable[[], Any], str, Any]]]:
        """What was read and has not changed since: what the step changes itself is not guarded."""
        attributes = [
            (module, name)
            for key, (module, name, was) in self.attributes.items()
            if key not in self._written and frozen(getattr(module, name, _MISSING)) == was
        ]
        around = [place for place in self.surroundings.values() if frozen(place[0]()) == place[2]]
        return attributes, around

    def watch(self, value: Any) -> None:
        """What a function of the user's own closes over, or what it is a method of, was read."""
        for owner in _owners(value):
            self._kept.append(owner)
            found = partial(_itself, owner)
            self.surroundings.setdefault(
                (id(owner), ""), (found, type(owner).__name__, frozen(owner))
            )
        for function in _functions(value):
            self._walk(function)

    def _walk(self, function: FunctionType) -> None:
        """Note what a function closes over, its globals, and those of the functions among them."""
        code = function.__code__
        if id(code) in self._walked and not function.__closure__:
            return
        if id(function) in self._walked:
            return
        if _root(function) in _NOT_THE_USERS:
            if _root(function) == "torchopt":  # which closes over schedules of the user's own
                self._walked.add(id(function))
                self._kept.append(function)
                for cell in function.__closure__ or ():
                    self.watch(_content(cell))
            return
        self._walked |= {id(code), id(function)}
        self._kept.append(function)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._surround(cell, name, partial(_content, cell), name)
        names, attributes = _names(code)
        for name in names:
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            place = partial(function.__globals__.get, name, _MISSING)
            if not isinstance(value, (ModuleType, type)):
                self._surround(function.__globals__, name, place, name)
            elif _root(value) not in _NOT_THE_USERS and value.__name__ not in _NOT_THE_USERS:
                for inner in attributes & vars(value).keys():  # `settings.BETA`
                    held = vars(value)[inner]
                    if isinstance(held, (*_PLAIN, Tensor, FunctionType, list, dict)):
                        found = partial(getattr, value, inner, _MISSING)
                        self._surround(value, inner, found, f"{name}.{inner}")

    def _surround(self, owner: Any, key: str, get: Callable[[], Any], name: str) -> None:
        value = get()
        if isinstance(value, (type, ModuleType)):
            return
        self._kept.append(owner)
        self.surroundings.setdefault((id(owner), key), (get, name, frozen(value)))
        self.watch(value)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _MISSING


def _itself(owner: Any) -> Any:
    return owner


def _owners(value: Any, depth: int = _DEEP) -> Iterator[Any]:
    """The objects of the user's own whose methods a value is made of."""
    if isinstance(value, partial):
        yield from _owners(value.func, depth)
    elif isinstance(value, (list, tuple)) and depth and len(value) <= _LARGE:
        for entry in value:
            yield from _owners(entry, depth - 1)
    elif isinstance(value, MethodType) or callable(value):
        owner = value.__self__ if isinstance(value, MethodType) else value
        inside = getattr(owner, "__dict__", None)
        known = isinstance(owner, (nn.Module, type, FunctionType))
        if isinstance(inside, dict) and not known and _root(owner) not in _NOT_THE_USERS:
            yield owner


def _functions(value: Any, depth: int = _DEEP) -> Iterator[FunctionType]:
    """The Python functions that a value is made of."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, MethodType):
        yield from _functions(value.__func__)
    elif isinstance(value, partial):
        yield from _functions(value.func)
    elif isinstance(value, (list, tuple, dict)) and depth and len(value) <= _LARGE:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _functions(entry, depth - 1)
    elif callable(value) and not isinstance(value, (nn.Module, type)):
        call = getattr(type(value), "__call__", None)  # noqa: B004
        if isinstance(call, FunctionType):  # a weak reference's is callable in its turn, for ever
            yield call


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals that code reads and does not write, and the attributes, lambdas' included."""
    read: set[str] = set()
    written: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            read.add(str(instruction.argval))
        elif instruction.opname == "STORE_GLOBAL":
            written.add(str(instruction.argval))
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(str(instruction.argval))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more, also = _names(inner)
            read, attributes = read | more, attributes | also
    return read - written, attributes


@contextlib.contextmanager
def reading() -> Iterator[Reads]:
    """Note what is read of modules inside."""
    reads = Reads()
    write = nn.Module.__setattr__

    def noting_get(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        reads.note(module, name, value)
        return value

    def noting_set(module: nn.Module, name: str, value: Any) -> None:
        reads.note_write(module, name)
        write(module, name, value)

    nn.Module.__getattribute__ = noting_get  # type: ignore[assignment, method-assign]
    nn.Module.__setattr__ = noting_set  # type: ignore[assignment, method-assign]
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = write  # type: ignore[method-assign]


@final
class Guard:
    """Whether what graphs take for granted still holds.

    Args:
        problem: whose modules, parameters and buffers must be the same objects, in the same modes.
    """

    def __init__(self, problem: nn.Module) -> None:
        self._names = {id(m): path for path, m in problem.named_modules()}
        self._modules = list(problem.modules())
        self._own = set(self._names)
        self._dicts = [d for m in self._modules for d in (m._modules, m._parameters, m._buffers)]
        self._members = self._found()
        self._parameters = list(problem.parameters())
        self._variables = self._flags()
        self._modes = self._training()
        self._kept = list(chain.from_iterable(d.values() for d in self._dicts))
        self._plain: list[tuple[nn.Module, Callable[[nn.Module], tuple[Any, ...]], list[str]]] = []
        self._values: list[tuple[Any, ...]] = []
        self._places: list[tuple[Callable[[], Any], str, Any]] = []

    def add(self, reads: Reads) -> None:
        """Take for granted, too, what tracing another graph has read."""
        attributes, places = reads.lasting()
        self._places += places
        for module in reads.modules.values():  # a teacher that a function closes over
            if id(module) not in self._names:
                self._names[id(module)] = type(module).__name__
                held: list[Any] = [module._modules, module._parameters, module._buffers]
                self._dicts += held
                self._kept += [module, *chain.from_iterable(d.values() for d in held)]
                self._members = self._found()
        simple: dict[int, tuple[nn.Module, list[str]]] = {}
        for module, name in attributes:
            if name in _SWITCHED and id(module) in self._own:
                continue
            value = getattr(module, name)
            if isinstance(value, MethodType) or _equal_by_value(value):
                simple.setdefault(id(module), (module, []))[1].append(name)
            else:
                get = partial(getattr, module, name, _MISSING)
                self._places.append((get, self._path(module, name), frozen(value)))
        for module, names in simple.values():
            get_all = _getter(names)
            self._plain.append((module, get_all, names))
            self._values.append(tuple(map(_copied, get_all(module))))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        try:
            return (
                [get(module) for module, get, _ in self._plain] == self._values
                and self._found() == self._members
                and self._flags() == self._variables
                and self._training() == self._modes
                and all(frozen(get()) == was for get, _, was in self._places)
            )
        except Exception:  # an attribute is gone, a comparison is not a truth value
            return False

    def changed(self) -> str:
        """The name of something that has changed."""
        for (module, _, names), values in zip(self._plain, self._values, strict=True):
            for name, was in zip(names, values, strict=True):
                if frozen(getattr(module, name, _MISSING)) != frozen(was):
                    return f"`{self._path(module, name)}`"
        for get, name, was in self._places:
            if frozen(get()) != was:
                return f"`{name}`"
        if self._flags() != self._variables:
            return "which variables require grad"
        for module, now, then in zip(self._modules, self._training(), self._modes, strict=True):
            if now != then:
                return f"`{self._path(module, 'training')}`"
        return "a module, parameter or buffer"

    def _flags(self) -> list[Any]:
        return [
            (p.requires_grad, *(p._backward_hooks or ()), *(p._post_accumulate_grad_hooks or ()))
            for p in self._parameters
        ]

    def _training(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _found(self) -> list[int]:
        return [*map(id, chain.from_iterable([d.values() for d in self._dicts]))]

    def _path(self, module: nn.Module, name: str) -> str:
        path = self._names.get(id(module), type(module).__name__)
        return f"{path}.{name}" if path else f"self.{name}"


def _copied(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, tuple, dict)) else value


def _getter(names: list[str]) -> Callable[[nn.Module], tuple[Any, ...]]:
    if len(names) == 1:
        get = attrgetter(names[0])
        return lambda module: (get(module),)
    return attrgetter(*names)
