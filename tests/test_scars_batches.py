"""Batches, data and logs of all kinds: taken as they are meant, or refused in a sentence."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Alternating, Batches, DivergenceError, Implicit, Unrolled
from tests.least_squares import DATA, INPUTS, TARGETS, Net, assert_equal, begin, end

# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("solver", [Implicit(), Unrolled(2, torchopt.sgd(0.1)), Alternating()])
@pytest.mark.parametrize("wrong", [DATA, INPUTS, {"x": INPUTS}, "ab", None, iter([DATA])])
def test_lower_batches_are_a_list(solver: Any, wrong: Any) -> None:
    """A tuple (inputs, targets) was read as two batches: another number, no error."""
    with pytest.raises(TypeError, match=r"`lower_batches` must be a list .* Write `\[batch\]`"):
        solver.hypergradient(Net(), DATA, wrong)


def test_a_batch_that_is_itself_a_list_is_not_taken_for_many() -> None:
    """`DataLoader`s give lists."""
    with pytest.raises(TypeError, match="`lower_batches` looks like one batch"):
        Implicit().hypergradient(Net(), list(DATA), list(DATA))
    Implicit().hypergradient(Net(), list(DATA), [list(DATA)])
    with pytest.raises(ValueError, match="`lower_batches` is empty"):
        Implicit().hypergradient(Net(), DATA, [])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seed": 0.5}, "`seed` must be a whole number"),
        ({"throw": None}, "`throw` must be `True` or `False`"),
        ({"lower_optimizer": 0.1}, "`lower_optimizer` must be a `torch.optim` optimizer"),
    ],
)
def test_arguments_of_hypergradient(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        Alternating().hypergradient(Net(), DATA, [DATA], **arguments)


class Frame:
    """Iterates over column names and converts to an array, as data frames do."""

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.zeros((4, 2))

    def __getitem__(self, name: str) -> Any:
        return np.zeros(4)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.zeros((12, 3)), "Convert arrays with `torch.as_tensor`"),
        ((np.zeros((12, 3)), np.zeros(12)), "Convert arrays"),
        ({"x": np.zeros(12)}, "Convert arrays"),
        (Frame(), "Convert arrays"),
        ([DATA, DATA], "write a tuple for the columns of one data set"),
        ([INPUTS, TARGETS], "write a tuple for the columns of one data set"),
        (collections.deque([DATA]), "write a tuple for the columns"),
        ({DATA[0]}, "write a tuple for the columns"),
        (collections.UserDict(x=INPUTS), r"Give `dict\(data\)`"),
        (TensorDataset(*DATA), r"goes into a `DataLoader\(data, batch_size=...\)`"),
        (range(5), r"goes into a `DataLoader"),
        (b"digits", "got a `bytes`"),
        (lambda: iter([DATA]), "Call it, and give what it returns"),
        (DataLoader, "got the class `DataLoader`"),
        ((), "got a `tuple`"),
    ],
)
def test_data_that_would_be_taken_for_something_else(data: Any, match: str) -> None:
    """Rows of an array were taken for batches, a frame's column names, a list of batches for one."""
    with pytest.raises(TypeError, match=match):
        begin(data=data)
    with pytest.raises(TypeError, match="`upper_data` must be a pytree of tensors"):
        begin(upper_data=data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.tensor(1.0), "a tensor without dimensions, which has no rows"),
        (
            INPUTS.clone().requires_grad_(),
            "the data require grad, but no gradient would reach them",
        ),
        ((INPUTS.to_sparse() / 0, TARGETS), "NaN or infinite numbers in 12 of 12 rows"),
    ],
)
def test_tensors_that_are_no_data(data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        begin(data=data)


def test_a_nested_tensor_is_refused() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="nested tensor, whose rows torch cannot select"):
        begin(data=ragged)


@pytest.mark.parametrize(
    "data", [DataLoader(TensorDataset(*DATA), 6), Batches(DATA, 6), None, iter([DATA])]
)
def test_a_batch_size_that_would_be_ignored(data: Any) -> None:
    with pytest.raises(ValueError, match="`batch_size` is 3, but"):
        begin(data=data, batch_size=3)
    begin(data=DATA, upper_data=DataLoader(TensorDataset(*DATA), 6), batch_size=3)


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor


Named = collections.namedtuple("Named", ["x", "y"])


class Encoding(collections.UserDict[str, Any]):
    """As the batches of tokenizers."""


class Attributes(Net):
    """Reads its batch by names."""

    def pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, (dict, Encoding)):
            return batch["x"], batch["y"]
        return torch.as_tensor(batch.x), torch.as_tensor(batch.y)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: Encoding(x=x, y=y),
        lambda x, y: Pair(x, y),
        lambda x, y: Named(x, y),
        lambda x, y: Pair(x.numpy(), y.numpy()),
    ],
    ids=["dict", "dict-like", "dataclass", "named tuple", "dataclass of arrays"],
)
def test_loaders_of_all_kinds_of_batches_just_work(make: Any) -> None:
    loader = DataLoader(
        TensorDataset(*DATA),
        4,
        collate_fn=lambda rows: make(*map(torch.stack, zip(*rows, strict=True))),
    )
    wanted = end(DataLoader(TensorDataset(*DATA), 4), num_steps=4)
    assert_equal(end(loader, problem=Attributes(), num_steps=4), wanted)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_data_give_what_dense_ones_give() -> None:
    """Minibatches of COO tensors; whole batches of every layout."""
    inputs = INPUTS * (INPUTS > 0)
    sparse = inputs.to_sparse()
    assert_equal(end((sparse, TARGETS), batch_size=5), end((inputs, TARGETS), batch_size=5))
    for whole in (sparse, inputs.to_sparse_csr()):
        assert_equal(end((whole, TARGETS)), end((inputs, TARGETS)))
    with pytest.raises(TypeError, match=r"torch cannot select rows .*`\.to_sparse_coo\(\)`"):
        begin(data=(inputs.to_sparse_csr(), TARGETS), batch_size=5)


# ---------------------------------------------------------------------- logs


@pytest.mark.parametrize(
    ("log", "match"),
    [
        ({"note": "text"}, "what `Net.upper_loss` logs as `note` must be a number .* got 'text'"),
        ({"auc": None}, "logs as `auc` must be a number or a tensor, got None; leave it out"),
        ({0: torch.ones(())}, "what `Net.upper_loss` logs must have names, got 0"),
    ],
)
def test_logs_are_numbers_with_names(log: dict[Any, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        next(begin(Net(log)))


def test_an_undefined_metric_does_not_stop_the_training() -> None:
    """The AUC of a batch without positives is NaN; training went on to nobody's surprise but ours."""
    nan = float("nan")
    steps = list(begin(Net({"auc": torch.tensor(nan), "f1": nan}), check_every=1))
    assert len(steps) == 3
    assert steps[-1].logs["auc"].isnan()


class Breaks(Net):
    """A part of the loss is NaN from its third evaluation on, a metric all the time."""

    def upper_loss(self, batch: Any) -> Any:
        part = torch.where(self.lower.bias > 0.2 + self.after, float("nan"), 1.0).sum()
        return self.error(batch) * 0 + part, {"metric": float("nan"), "part": part}

    def lower_loss(self, batch: Any) -> Any:
        return -self.lower.bias.sum() + self.error(batch) * 0

    after = 0.15


@pytest.mark.parametrize("check_every", [1, 3])
def test_the_part_of_a_loss_that_is_nan_is_still_named(check_every: int) -> None:
    with pytest.raises(DivergenceError, match="diverged at step 2: `part` is nan") as caught:
        list(begin(Breaks(), check_every=check_every))
    assert (caught.value.step, caught.value.term) == (2, "part")


def test_a_name_that_both_losses_log_is_not_lost() -> None:
    """One silently overwrote the other."""

    class Both(Net):
        def lower_loss(self, batch: Any) -> Any:
            return super().lower_loss(batch), {"error": 1.0, "own": 2.0}

    *_, step = begin(Both({"error": 3.0}))
    assert {name: float(v) for name, v in step.logs.items()} == {
        "lower.error": 1.0,
        "upper.error": 3.0,
        "own": 2.0,
    }
