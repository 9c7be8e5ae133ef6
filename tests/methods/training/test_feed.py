"""What `fit` reads: data sets, loaders, streams, as people have them; and augmentation in front."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import optree
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bilevel import Batches, CheckpointError
from bilevel.loop import watch
from bilevel.losses import purity
from bilevel.methods import BiDVL, ContrastiveDivergence
from bilevel.methods.data.entries import row_of, visibles_of
from bilevel.methods.data.images import Images
from bilevel.methods.data.streams import RowReader
from bilevel.methods.machines import RBM, GaussianRBM
from bilevel.methods.training import standardising
from bilevel.methods.training.run import Run

WIDTH, COUNT = 6, 22
BITS = torch.bernoulli(torch.full((COUNT, WIDTH), 0.4), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT)


def learner(kind: type = RBM) -> ContrastiveDivergence:
    return ContrastiveDivergence(kind(WIDTH, 3, generator=torch.Generator().manual_seed(0)))


def trained(data: Any, **options: Any) -> Tensor:
    """The parameters after six steps; an epoch has five batches of four."""
    model = learner()
    options = {"num_steps": 6, "batch_size": 4, "upper_lr": 0.1, "progress": False, **options}
    if options["batch_size"] is None:
        del options["batch_size"]
    model.fit(data, **options)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Mapped(Dataset[Any]):
    """As data sets of Hugging Face: rows are dicts, and several are read at once."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": BITS[index], "label": int(LABELS[index])}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in numbers]


class Pair(NamedTuple):
    image: Tensor
    label: int


class Noisy(Mapped):
    """Turns bits at random, with whatever generator stands around."""

    draw: Callable[[], float] = random.random

    def __getitem__(self, index: int) -> Any:
        turned = torch.rand(WIDTH) < 0.1 * type(self).draw()
        return Pair((BITS[index] - turned.float()).abs(), int(np.random.randint(3)))  # noqa: NPY002


class Flow(IterableDataset[Any]):
    """As streaming data sets: no length, an order that depends on the number of the epoch."""

    def __init__(self, rows: Tensor = BITS) -> None:
        self.rows, self.epoch = rows, 0
        self.begun: list[int] = []

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        self.begun.append(self.epoch)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        for index in order.tolist():
            yield {"v": self.rows[index].numpy(), "label": index}

    # these two, as they are in streaming data sets: every later epoch would begin there
    def state_dict(self) -> dict[str, Any]:
        return {"place": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("its epochs are told by their number")


class Again:
    """Batches, from the start each time."""

    def __iter__(self) -> Iterator[Any]:
        return (BITS[i : i + 4].numpy() for i in range(0, 20, 4))


def loader(data: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(BITS, LABELS) if data is None else data, 4, **options)


def endless() -> Iterator[Tensor]:
    while True:
        yield BITS[:4]


def images() -> Images:
    return Images("bits", "bits", BITS, BITS[:2], None, None, "")


def pictures() -> list[Any]:
    return [Image.fromarray((row.numpy() * 255).astype(np.uint8)[None]) for row in BITS]


# ---------------------------------------------------------------------- what is read, and how


@pytest.mark.parametrize(
    "data",
    [TensorDataset(BITS), TensorDataset(BITS, LABELS), Mapped(), images()],
    ids=["tensors", "with labels", "dicts", "images"],
)
def test_a_data_set_trains_as_its_rows_in_memory_do(data: Any) -> None:
    """In the same order, to the bit; labels are left out."""
    assert torch.equal(trained(data), trained(BITS))


class OwnPlace:
    """Knows its place in the middle of an epoch, as `torchdata`'s `StatefulDataLoader` does."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        while self.taken < 5:
            self.taken += 1
            yield [BITS[4 * self.taken - 4 : 4 * self.taken], LABELS[:4]]
        self.taken = 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


KINDS: dict[str, Callable[[], Any]] = {
    "data set": Mapped,
    "noisy": Noisy,
    "loader": loader,
    "shuffled": lambda: loader(shuffle=True),
    "workers": lambda: loader(Noisy(), shuffle=True, num_workers=1),
    "stream": Flow,
    "stream in a loader": lambda: loader(Flow()),
    "again": Again,
    "own place": OwnPlace,
    "source": lambda: Batches(BITS, 4, seed=3),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_gives_the_same_run_and_a_checkpoint_goes_on_to_the_bit(
    name: str, tmp_path: Path
) -> None:
    """Also in the second epoch, and where rows draw from global generators."""
    size = 4 if name in ("data set", "noisy", "stream") else None
    options: dict[str, Any] = {"batch_size": size, "run": tmp_path / "run", "augment": turned}
    wanted = trained(KINDS[name](), num_steps=8, batch_size=size, augment=turned)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    random.random()
    trained(KINDS[name](), **options)
    assert torch.equal(trained(KINDS[name](), **options, num_steps=8, resume=True), wanted)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    config = Run(tmp_path / "run").config()
    assert config["training"]["batch_size"] == 4
    assert config["data"]["shape"][1:] == [WIDTH]


def turned(v: Tensor, generator: torch.Generator) -> Tensor:
    """Another bit for one in ten, written into the batch; and one coin of a global generator."""
    v[torch.rand(v.shape, generator=generator) < 0.1] = 1.0
    return v.flip(1) if random.random() < 0.5 else v


def test_epochs_of_a_stream_are_numbered_and_counted() -> None:
    flow = Flow()
    model = learner()
    history = model.fit(
        flow,
        num_steps=11,
        batch_size=4,
        decay=0.5,
        schedule="exponential",
        log_every=1,
        progress=False,
    )
    assert history.steps == 11
    assert flow.begun == [0, 1, 2]


def test_what_augment_changes_is_a_copy() -> None:
    kept = [row.clone() for row in BITS[:4]]
    trained(Again(), batch_size=None, augment=lambda v, g: v.zero_())
    assert all(torch.equal(a, b) for a, b in zip(kept, BITS, strict=False))
    once = trained(BITS, augment=turned)
    assert torch.equal(once, trained(BITS, augment=turned))
    assert not torch.equal(once, trained(BITS))


def test_no_more_is_read_than_is_needed() -> None:
    """RowReader that come after are not looked at: a set may be larger than memory, or endless."""

    class Long(Mapped):
        seen: ClassVar[set[int]] = set()

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> Any:
            self.seen.add(index)
            return {"image": BITS[index % COUNT]}

    trained(Long())
    assert len(Long.seen) == 24
    trained(endless(), batch_size=None)


def test_pictures_become_bytes() -> None:
    grey = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert row_of(grey).tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert row_of(grey.convert("RGB")).shape == (3, 2, 3)
    see_through = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    assert row_of(see_through).flatten().tolist() == [255, 255, 255]
    with pytest.raises(TypeError, match="more than 8 bits per pixel"):
        row_of(Image.new("I;16", (2, 2)))


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ((1.5, "label"), (1.5, "label")),
        ((BITS, LABELS), BITS),
        ([BITS, LABELS], BITS),
        (Pair(BITS, 1), BITS),
        ({"img": BITS, "label": 3}, BITS),
        ({"anything": BITS}, BITS),
        ({"pixel_values": BITS, "labels": LABELS}, BITS),
    ],
)
def test_which_part_of_an_entry_the_visibles_are(entry: Any, wanted: Any) -> None:
    assert visibles_of(entry) is wanted or visibles_of(entry) == wanted


# ---------------------------------------------------------------------- refusals


class Bad(Mapped):
    def __init__(self, row: Any) -> None:
        self.row = row

    def __getitem__(self, index: int) -> Any:
        return self.row if index == 7 else BITS[index]


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Tensor:
        return BITS[index]


NAN = float("nan") * BITS[0]
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "batch size of a loader": (
        loader(),
        {"batch_size": 3},
        r"`batch_size` is 3, but the `DataLoader` gives batches of 4; set it where",
    ),
    "a short data set": (Mapped(), {"batch_size": 30}, "is 30, but there are only 22 visibles"),
    "a short stream": (
        Flow(),
        {"batch_size": 30},
        "is 30, but an epoch of the data has only 22 rows",
    ),
    "nothing": (DataLoader([]), {"batch_size": None}, "the data are empty: an epoch gave no batch"),  # type: ignore[arg-type]
    "an end": (
        iter([BITS[:4], BITS[4:8]]),
        {"batch_size": None},
        "the data ended after 2 batches: .* read once only; give the iterable it came from",
    ),
    "a hole": (
        Bad(NAN),
        {},
        r"rows .* of the `Bad`: 1 of 4 visibles hold NaN or infinity \(index 7\)",
    ),
    "a hole in a loader": (
        loader(Bad(NAN)),
        {"batch_size": None},
        r"batch 2 of the `DataLoader`: 1 of 4 visibles hold NaN or infinity \(index 3\)",
    ),
    "two shapes": (Bad(BITS[0, :3]), {}, r"row \d+ has the shape \(\d,\), row \d+ \(\d,\); bring"),
    "another width": (
        TensorDataset(BITS[:, :3]),
        {},
        r"this model takes visibles of shape \(n, 6\), got \(4, 3\)",
    ),
    "a range": (TensorDataset(BITS * 3), {}, "exactly 0 or 1, but"),
    "one row left over": (
        DataLoader(TensorDataset(BITS[:21]), 4),
        {"batch_size": None},
        r"the last of the loader's batches would have a single row \(21 rows in batches of 4\)",
    ),
    "standardise": (Mapped(), {"standardise": True}, "`standardise` needs the means of all rows"),
    "augment and standardise": (
        BITS,
        {"standardise": True, "augment": turned},
        "leave one of them out",
    ),
    "augment to nothing": (
        BITS,
        {"augment": lambda v, g: v[:2]},
        r"`augment` must return visibles as it got them, of shape \(22, 6\)",
    ),
    "augment to greys": (
        BITS,
        {"augment": lambda v, g: v / 2},
        "`augment` returned what the model",
    ),
    "augment that is none": (BITS, {"augment": 0.1}, "`augment` must be a function"),
    "augment without answer": (
        BITS,
        {"augment": lambda v, g: None},
        "a tensor of visibles, got None",
    ),
    "columns": (
        [{"a": 0.0, "b": 1.0}] * COUNT,
        {},
        "no number",
    ),
    "no length": (Unsized(), {}, "the `Unsized` has rows by number, but no length"),
    "pictures in a loader": (
        loader([{"image": p} for p in pictures()]),
        {"batch_size": None},
        "the loader cannot make a batch of its rows .*PIL.*; give `fit` the data set itself",
    ),
    "single rows": (
        [BITS[0]].__iter__(),
        {"batch_size": None},
        r"batch 1 of the `list_iterator` .*`IterableDataset` may give single rows.: "
        r"this model takes visibles of shape .*`rows\[None\]`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_data_that_cannot_be_trained_on_are_refused_by_name(name: str) -> None:
    data, options, match = MISTAKES[name]
    with pytest.raises((ValueError, TypeError), match=match):
        trained(data, **options)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"a": 1.0, "b": 2.0}, "each column is an entry of its own"),
        ({"a": BITS, "b": BITS}, "of the entries `a`, `b` none is known to be the visibles"),
        ({"x": BITS, "v": BITS}, "several could be the visibles"),
    ],
)
def test_entries_that_could_be_read_in_two_ways(entry: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        visibles_of(entry)


class Counting:
    """A sampler that never gives one order twice."""

    def __init__(self) -> None:
        self.count = 0

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        self.count += 1
        return iter(
            torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.count)).tolist()
        )


class Own(Mapped):
    def __init__(self) -> None:
        self.noise = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("data", "size", "match"),
    [
        (endless(), None, "a `generator` can be read once only, so the run could not be resumed"),
        (loader(sampler=Counting()), None, "the order that the sampler `Counting` gives"),
        (Own(), 4, "`Own` draws from a generator of NumPy or Python"),
        (loader(num_workers=1, persistent_workers=True), None, "use `persistent_workers=False`"),
        (loader(num_workers=2, in_order=False), None, r"in any order \(`in_order=False`\)"),
    ],
)
def test_what_cannot_be_resumed_is_refused_before_a_run_begins(
    data: Any, size: int | None, match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        trained(data, batch_size=size, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_data_are_noticed_when_a_run_is_resumed(tmp_path: Path) -> None:
    """A shuffle without a seed gives other batches in another process, and nobody could see it."""
    options: dict[str, Any] = {"run": tmp_path / "run", "batch_size": 4}
    trained(Flow(), **options)
    with pytest.raises(CheckpointError, match="the `Flow` does not give the batches again"):
        trained(Flow(1 - BITS), **options, num_steps=8, resume=True)
    with pytest.raises(CheckpointError, match="data of another kind"):
        trained(BITS, **options, num_steps=8, resume=True)
    with pytest.raises(CheckpointError, match="begun without `augment`"):
        trained(Flow(), **options, num_steps=8, resume=True, augment=turned)


def test_a_stream_far_from_standard_is_remarked() -> None:
    with pytest.warns(UserWarning, match="means from .*: scale the rows"):
        learner(GaussianRBM).fit(
            TensorDataset(BITS + 100), num_steps=1, batch_size=4, progress=False
        )


def test_rows_count_their_epochs() -> None:
    rows = RowReader(Mapped(), 4, seed=0)
    counts = []
    for _ in range(7):
        next(rows)
        counts.append(rows.epochs)
    assert counts == [0] * 5 + [1] * 2


class WithoutDoubles(TorchDispatchMode):
    """As Apple's GPU, which has no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(out):
            assert not isinstance(leaf, Tensor) or leaf.dtype != torch.float64, (
                f"{func} gave a float64"
            )
        return out


def test_a_training_needs_no_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (watch, purity, standardising):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    rows = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    model = learner(GaussianRBM)
    with WithoutDoubles():
        model.fit(rows, num_steps=2, batch_size=4, progress=False)
    with pytest.raises(ValueError, match="`standardise` computes in float64, which `cpu` has not"):
        model.fit(rows, num_steps=2, batch_size=4, progress=False, standardise=True)


@pytest.mark.parametrize("loader", [False, True])
def test_images_in_half_of_the_range_are_remarked_where_fit_is_called(loader: bool) -> None:
    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=2)
    images: Any = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sized = {} if loader else {"batch_size": 4}
    data = DataLoader(TensorDataset(images), batch_size=4) if loader else images
    with pytest.warns(UserWarning, match=r"none of these is negative .* `2 \* images - 1`") as seen:
        model.fit(data, num_steps=1, **sized)
    assert seen[0].filename == __file__


def test_a_stream_that_cannot_begin_again_says_so() -> None:
    class Once(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.rows = iter(BITS)

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    with pytest.raises(
        ValueError, match="the data could be read once only; each call of `__iter__`"
    ):
        trained(Once())
