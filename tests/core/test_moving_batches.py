"""Batches on their way to the problem's device, and what is said of those on another one."""

import collections
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from bilevel import Alternating, Implicit, Problem, Step, check_hypergradient, train
from bilevel.devices import brought, global_generators, usable_device, widest

META, CPU = torch.device("meta"), torch.device("cpu")


class Named(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    name: str = "a"
    later: Any = dataclasses.field(init=False)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x",)
    x: Any


class Encoding(collections.UserDict[str, Any]):
    """As the batches of tokenizers: moves itself, in place."""

    asked: ClassVar[list[torch.device]] = []

    def to(self, device: torch.device) -> "Encoding":
        self.asked.append(device)
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class Answers(dict[str, Any]):
    """A dict that holds more than its entries."""

    note = "kept"


def tensor() -> Tensor:
    return torch.ones(2, 3)


BATCHES = {
    "tensor": tensor,
    "tuple": lambda: (tensor(), "text", 3),
    "list": lambda: [tensor(), [tensor()]],
    "named tuple": lambda: Named(tensor(), None),
    "dict": lambda: {"b": tensor(), "a": {"c": tensor()}},
    "ordered": lambda: collections.OrderedDict(b=tensor(), a=1),
    "default": lambda: collections.defaultdict(list, a=tensor()),
    "subclass": lambda: Answers(a=tensor()),
    "dict-like": lambda: collections.UserDict(a=tensor(), b="text"),
    "read only": lambda: types.MappingProxyType({"a": tensor()}),
    "record": lambda: Record(tensor()),
    "slots": lambda: Slotted(tensor()),
    "packed": lambda: pack_sequence([torch.ones(3), torch.ones(2)]),
    "sparse": lambda: tensor().to_sparse(),
    "bytes": lambda: torch.zeros(2, dtype=torch.uint8),
}


def tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, PackedSequence):
        yield batch.data  # the lengths stay where torch wants them
    elif isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from tensors(part)
    elif isinstance(batch, collections.abc.Mapping):
        yield from tensors(list(batch.values()))
    elif dataclasses.is_dataclass(batch):
        yield from tensors(getattr(batch, "x"))  # noqa: B009 (both classes have it)


@pytest.mark.parametrize("name", BATCHES)
def test_tensors_are_moved_wherever_they_are_and_nothing_else_changes(name: str) -> None:
    batch = BATCHES[name]()
    there = brought(batch, META)
    assert type(there) is type(batch)
    pairs = list(zip(tensors(batch), tensors(there), strict=True))
    assert pairs
    for old, new in pairs:
        assert old.device == CPU, "the batch that was given is left as it was"
        assert (new.device, new.dtype, new.shape) == (META, old.dtype, old.shape)
    assert name == "packed" or brought(batch, CPU) is batch


def test_what_is_no_tensor_stays() -> None:
    kept = [
        None,
        "text",
        3,
        2.5,
        object(),
        {1, 2},
        torch.float32,
        nn.Linear(1, 1),
        Tensor,
        lambda: 0,
    ]
    for leaf, same in zip(kept, brought(kept, META), strict=True):
        assert same is leaf
    there = brought(collections.OrderedDict(b=tensor(), a="text"), META)
    assert list(there) == ["b", "a"]
    assert brought(BATCHES["default"](), META).default_factory is list
    assert brought(Answers(a=tensor()), META).note == "kept"
    assert brought(Record(tensor(), "b"), META).name == "b"


class Net(Problem):
    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": torch.ones(3)})
        self.lower = nn.ParameterDict({"y": torch.zeros(3)})

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - batch["v"]).square().mean() + self.upper["x"].square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - self.upper["x"] * batch["v"]).square().mean()


def steps(data: Any, **options: Any) -> list[Step]:
    problem = Net()
    return list(
        train(
            problem,
            data,
            num_steps=3,
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
            **options,
        )
    )


def test_train_brings_batches_to_the_device_unless_told_not_to() -> None:
    Encoding.asked.clear()
    losses = [
        [float(step.upper_loss) for step in steps(Endless(), **options)]
        for options in ({}, {"move_batches": False})
    ]
    assert losses[0] == losses[1]
    assert Encoding.asked == [CPU] * 3
    with pytest.raises(TypeError, match="`move_batches` must be `True` or `False`, got 1"):
        steps(Endless(), move_batches=1)


class Endless:
    """An epoch of three batches."""

    def __iter__(self) -> Iterator[Encoding]:
        return iter([Encoding(v=tensor()) for _ in range(3)])


def test_a_batch_elsewhere_is_named() -> None:
    """torch spoke of `mat2` or of a kernel."""
    away, here = {"v": tensor().to(META)}, {"v": tensor()}
    for solver, upper, lower in (
        (Alternating(), away, here),
        (Implicit(), away, here),
        (Implicit(), here, away),
    ):
        with pytest.raises(ValueError, match="batch has tensors on `meta`, but `Net` is on `cpu`"):
            solver.hypergradient(Net(), upper, [lower])
    exact = Net().double()
    with pytest.raises(ValueError, match=r"move the batch, such as with `batch.to\('cpu'\)`"):
        check_hypergradient(exact, Implicit(), away, [{"v": tensor().double()}])


def test_errors_of_the_losses_stay_theirs() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        Implicit().hypergradient(Net(), {"v": torch.ones(2, 2)}, [{"v": tensor()}])


# ---------------------------------------------------------------------- the devices there are


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("gpu", ValueError, "`device` cannot be `gpu`; did you mean `cuda`"),
        ("xpu:0", ValueError, "`device` cannot be `xpu:0`; "),
        ("cuad", ValueError, "did you mean `cuda`"),
        ("cuda:", ValueError, "`device` cannot be `cuda:`"),
        ("cuda:x", ValueError, "`device` cannot be `cuda:x`"),
        ("cuda:7", ValueError, "is `cuda:7`, but there are 2 CUDA devices: `cuda:0`, `cuda:1`"),
        ("cpu:1", ValueError, "is `cpu:1`, but there is 1 CPU device: `cpu:0`"),
        (
            "mps",
            ValueError,
            r"is `mps`, but there is no Metal device, Apple's \(this torch was built without Metal\)",
        ),
        (1, TypeError, "must be the name of a device, such as 'cuda:0', got 1"),
    ],
)
def test_devices_that_are_not_there(
    name: Any, kind: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    with pytest.raises(kind, match=match):
        usable_device(name)


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("cpu", "cuda", "cuda:1", "mps", "CUDA:1", torch.device("cuda:0")):
        assert usable_device(name) == torch.device(str(name).lower())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ValueError, match=r"`device` is `cuda`, but there is no CUDA device.*; leave it out"
    ):
        usable_device("cuda")


def test_metal_has_no_doubles() -> None:
    assert widest(torch.device("mps")) == torch.float32
    assert widest(CPU) == widest(torch.device("cuda:1")) == torch.float64
    assert global_generators(CPU) == [torch.default_generator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_the_processor_train_a_problem_on_a_gpu() -> None:
    device, data = torch.device("cuda:0"), {"v": torch.rand(12, 3)}
    ends = []
    for rows in (data, brought(data, device), {"v": data["v"].pin_memory()}):
        problem = Net().to(device)
        for _ in train(
            problem,
            rows,
            batch_size=12,
            num_steps=5,
            upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=torch.optim.SGD(problem.lower.parameters(), 0.1),
        ):
            pass
        ends.append(problem.upper["x"].detach().cpu())
    assert all(torch.allclose(end, ends[0]) for end in ends)
    assert brought(torch.ones(3).pin_memory(), device).device == device
