"""What a user may hand to `train` by mistake is refused at the call; what is right just works."""

import ast
import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    Alternating,
    Batches,
    CheckpointError,
    ConjugateGradient,
    DivergenceError,
    HypergradientError,
    Implicit,
    Problem,
    Unrolled,
    train,
)
from bilevel.cli.options import UsageError
from bilevel.distributed import LostRankError
from tests.problems import Quadratic, normal

INPUTS, TARGETS = normal(12, 3), normal(12, 1)
DATA = INPUTS, TARGETS


class Net(Problem):
    """Least squares with a learned penalty; `log` is what the upper loss logs."""

    def __init__(self, log: Any = None) -> None:
        super().__init__()
        self.log = log
        self.upper = nn.ParameterDict({"l": torch.tensor(-2.0).double()})
        self.lower = nn.Linear(3, 1).double()
        with torch.no_grad():
            self.lower.weight.fill_(0.1)
            self.lower.bias.fill_(0.2)

    def pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs, targets

    def error(self, batch: Any) -> Tensor:
        inputs, targets = self.pair(batch)
        return (inputs @ self.lower.weight.mT + self.lower.bias - targets).square().mean()

    def upper_loss(self, batch: Any) -> Any:
        loss = self.error(batch) + self.upper["l"] ** 2
        return loss if self.log is None else (loss, self.log)

    def lower_loss(self, batch: Any) -> Any:
        return self.error(batch) + self.upper["l"].exp() * self.lower.weight.square().sum()


def sgd(module: nn.Module, rate: Any = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), rate)


def begin(problem: Problem | None = None, data: Any = DATA, **changes: Any) -> Iterator[Any]:
    """`train` with these arguments; not a step is taken. Functions are given the settings."""
    problem = Net() if problem is None else problem
    settings: dict[str, Any] = {
        "num_steps": 3,
        "upper_optimizer": sgd(problem.upper),
        "lower_optimizer": sgd(problem.lower),
    }
    made = {n: v(settings, problem) if isinstance(v, Given) else v for n, v in changes.items()}
    return train(problem, data, **{**settings, **made})


@dataclasses.dataclass
class Given:
    """An argument that is made from the other ones."""

    make: Callable[[dict[str, Any], Problem], Any]

    def __call__(self, settings: dict[str, Any], problem: Problem) -> Any:
        return self.make(settings, problem)


def end(*args: Any, **changes: Any) -> dict[str, Tensor]:
    """The variables after training."""
    problem = changes.pop("problem", None) or Net()
    steps = list(begin(problem, *args, **changes))
    assert len(steps) == changes.get("num_steps", 3)
    return {name: p.detach().clone() for name, p in problem.named_parameters()}


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_steps": 2.5}, "`num_steps` must be a whole number, got 2.5"),
        ({"num_steps": "3"}, "`num_steps` must be a whole number, got '3'"),
        ({"num_steps": True}, "`num_steps` must be a whole number, got True"),
        ({"num_steps": None}, "`num_steps` must be a whole number, got None"),
        ({"lower_steps": 1.5}, "`lower_steps` must be a whole number"),
        ({"lower_steps": torch.tensor(1)}, "`lower_steps` must be a whole number, got a `Tensor`"),
        ({"check_every": 2.0}, "`check_every` must be a whole number"),
        ({"batch_size": 4.0}, "`batch_size` must be a whole number"),
        ({"batch_size": True}, "`batch_size` must be a whole number"),
        ({"batch_size": 0}, "`batch_size` must lie between 1 and the number of rows, 12; got 0"),
        ({"seed": 1.5}, "`seed` must be a whole number"),
        ({"seed": None}, "`seed` must be a whole number"),
        ({"seed": 2**63}, "`seed` must lie between"),
        ({"clip_upper": -1.0}, "`clip_upper` must be positive, got -1.0"),
        ({"clip_upper": 0}, "`clip_upper` must be positive, got 0"),
        ({"clip_lower": float("nan")}, "`clip_lower` must be positive, got nan"),
        ({"clip_lower": float("inf")}, "`clip_lower` must be positive and finite"),
        ({"clip_lower": "1"}, "`clip_lower` must be positive: a number, got '1'"),
        ({"clip_lower": True}, "`clip_lower` must be positive: a number, got True"),
        ({"ema": 1.0}, "`ema` must lie between 0 and 1"),
        ({"ema": -0.5}, "`ema` must be positive"),
        ({"ema": True}, "`ema` must be positive: a number"),
        ({"throw": "no"}, "`throw` must be `True` or `False`, got 'no'"),
        ({"compile": 1}, "`compile` must be `True` or `False`, got 1"),
        ({"order": None}, "`order` must be"),
        ({"resume": True}, "`resume` must be the path of a checkpoint .*, got True"),
        ({"resume": b"run.pt"}, "`resume` must be the path of a checkpoint"),
        ({"solver": "implicit"}, r"`solver` must be a solver, got 'implicit'; .*`Implicit\(\)`"),
        ({"solver": Implicit}, r"got the class `Implicit`; give an instance, `Implicit\(...\)`"),
        ({"solver": ConjugateGradient()}, r"`solver=Implicit\(ConjugateGradient\(\)\)`"),
        ({"solver": Implicit(ConjugateGradient)}, r"an instance, `ConjugateGradient\(\)`"),
        ({"solver": nn.Linear(1, 1)}, "`solver` must be a solver, got a `Linear`"),
        (
            {"upper_optimizer": 0.1},
            "`upper_optimizer` must be a `torch.optim` optimizer .* got 0.1",
        ),
        ({"upper_optimizer": torch.optim.SGD}, "got the class `SGD`"),
        ({"upper_optimizer": None}, "there is no `upper_optimizer`"),
        ({"upper_optimizer": []}, "there is no `upper_optimizer`"),
        ({"lower_optimizer": torchopt.sgd(0.1)}, r"torchopt transformation is for `Unrolled\("),
        ({"lower_optimizer": torchopt.sgd}, "`lower_optimizer` must be a `torch.optim` optimizer"),
        ({"upper_scheduler": lr_scheduler.StepLR}, "got the class `StepLR`"),
        ({"upper_scheduler": 0.9}, "`upper_scheduler` must be a scheduler"),
    ],
)
def test_a_bad_argument_is_one_sentence_at_the_call(changes: dict[str, Any], match: str) -> None:
    """Half of these were accepted: 2.5 steps were three, a negative clip climbed uphill."""
    with pytest.raises((TypeError, ValueError), match=match):
        begin(**changes)


def made_of(make: Callable[..., Any]) -> Given:
    return Given(lambda settings, problem: make(settings, problem))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {
                "upper_scheduler": made_of(
                    lambda s, p: lr_scheduler.ReduceLROnPlateau(s["upper_optimizer"])
                )
            },
            "`ReduceLROnPlateau`, whose `step` needs `metrics`",
        ),
        (
            {"upper_scheduler": made_of(lambda s, p: lr_scheduler.StepLR(sgd(Net()), 1))},
            "scheduler of another optimizer than `upper_optimizer`",
        ),
        (
            {"lower_scheduler": made_of(lambda s, p: lr_scheduler.StepLR(s["upper_optimizer"], 1))},
            "scheduler of another optimizer than `lower_optimizer`",
        ),
        (
            {
                "upper_scheduler": made_of(
                    lambda s, p: [lr_scheduler.StepLR(s["upper_optimizer"], 1)] * 2
                )
            },
            "holds the same scheduler twice",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: sgd(p))},
            r"`lower_optimizer` also holds `upper\.l`, which the lower level does not",
        ),
        (
            {
                "upper_optimizer": made_of(
                    lambda s, p: torch.optim.SGD([p.upper["l"], nn.Parameter(torch.ones(2))], 0.1)
                )
            },
            r"`upper_optimizer` also holds 1 tensors \(the first of shape \(2,\)\)",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: [sgd(p.lower), sgd(p.lower)])},
            "two optimizers in `lower_optimizer` hold the same variables",
        ),
        (
            {
                "lower_optimizer": made_of(
                    lambda s, p: sgd(p.lower, torch.tensor(0.1, requires_grad=True))
                )
            },
            "`lr` of `lower_optimizer` is a tensor that is learned",
        ),
        (
            {"lower_optimizer": made_of(lambda s, p: sgd(p.lower, p.upper["l"].data.fill_(0.5)))},
            "`lr` of `lower_optimizer` is a tensor that is learned or belongs to the problem",
        ),
    ],
)
def test_optimizers_and_schedulers_of_something_else(changes: dict[str, Any], match: str) -> None:
    """A scheduler of another optimizer scheduled nothing; a learned rate had gradient 0."""
    with pytest.raises((TypeError, ValueError), match=match):
        begin(**changes)


def test_a_rate_that_is_a_plain_tensor_is_taken() -> None:
    assert_equal(
        end(lower_optimizer=Given(lambda s, p: sgd(p.lower, torch.tensor(0.125)))),
        end(lower_optimizer=Given(lambda s, p: sgd(p.lower, 0.125))),
    )


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_whole_numbers_of_numpy_and_nothing_for_a_scheduler_just_work() -> None:
    assert_equal(
        end(
            num_steps=np.int64(3),
            lower_steps=np.int32(1),
            batch_size=np.int64(12),
            seed=np.uint8(0),
            throw=np.bool_(True),
            clip_upper=np.float32(1e9),
            upper_scheduler=None,
            lower_scheduler=[],
        ),
        end(batch_size=12),
    )


def test_a_stale_gradient_moves_no_frozen_parameter() -> None:
    """`.grad` that a pretraining left on a layer frozen since would be applied in every step."""
    problem = Net()
    problem.lower.bias.grad = torch.ones(1).double()
    problem.lower.bias.requires_grad_(False)
    before = problem.lower.bias.clone()
    end(problem=problem)
    assert torch.equal(problem.lower.bias, before)


def test_under_inference_mode_there_is_one_sentence() -> None:
    with torch.inference_mode():
        for attempt in (begin, lambda: Alternating().hypergradient(Net(), DATA, [DATA])):
            with pytest.raises(
                RuntimeError, match=r"inside `torch.inference_mode\(\)` nothing can be"
            ):
                attempt()
        made = INPUTS.clone(), TARGETS.clone()
    steps = begin()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="nothing can be differentiated"):
        next(steps)
    assert_equal(end(made), end())  # data made there are fine


def test_what_is_no_problem() -> None:
    for wrong in (nn.Linear(1, 1), Net, None):
        with pytest.raises(TypeError, match="`problem` must be a `Problem`, got"):
            Alternating().hypergradient(wrong)  # type: ignore[arg-type]
    levelless = Net()
    del levelless.lower
    with pytest.raises(TypeError, match=r"`Net` has no `self\.lower`"):
        Alternating().hypergradient(levelless, DATA)


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


# ---------------------------------------------------------------------- errors between processes


def failure() -> HypergradientError:
    with pytest.raises(HypergradientError) as caught:
        Implicit(ConjugateGradient(max_steps=1, rtol=1e-12)).hypergradient(Quadratic())
    caught.value.hypergradient.grad["x"].requires_grad_()
    caught.value.hypergradient.stats.direct_norm.requires_grad_()
    caught.value.add_note("at step 1")
    return caught.value


ERRORS: dict[str, Callable[[], BaseException]] = {
    "HypergradientError": failure,
    "DivergenceError": lambda: DivergenceError(3, "loss", float("nan"), "Do less"),
    "CheckpointError": lambda: CheckpointError("truncated"),
    "LostRankError": lambda: LostRankError("gone"),
    "UsageError": lambda: UsageError("no such option"),
}


def test_every_error_that_takes_more_than_a_message_is_among_those_tried() -> None:
    """One whose `__init__` is not that of `Exception` needs a `__reduce__`."""
    root = Path(__file__).resolve().parent.parent
    found = set()
    for path in [*(root / "bilevel").rglob("*.py"), *(root / "methods").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception", "Warning")) for base in node.bases
            ):
                own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                if own & {"__init__", "__new__"}:
                    found.add(node.name)
    assert found
    assert found <= ERRORS.keys()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_travel_with_message_attributes_and_notes(name: str) -> None:
    """They could not be unpickled; a process pool broke and all its results were lost."""
    error = first = ERRORS[name]()
    if not hasattr(error, "__notes__"):
        error.add_note("a note")
    for _ in range(2):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert back.__notes__ == error.__notes__
        for attribute, value in vars(error).items():
            if attribute != "hypergradient":
                assert getattr(back, attribute) == value
        error = back
    if isinstance(first, HypergradientError):
        assert isinstance(back, HypergradientError)
        assert torch.equal(back.hypergradient.grad["x"], first.hypergradient.grad["x"])
        assert back.hypergradient.result is first.hypergradient.result
        assert not back.hypergradient.grad["x"].requires_grad


def test_a_record_that_no_pickle_can_hold_does_not_keep_the_message() -> None:
    error = HypergradientError("no success", {"state": lambda: None})
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == "no success"
    assert back.hypergradient is None


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_pool_survives_a_diverging_worker() -> None:
    """The failing one told nothing and took the results of all others with it."""
    error = failure()
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
    try:
        futures = [pool.submit(fail, e) for e in (error, DivergenceError(7, "loss", float("inf")))]
        last = pool.submit(abs, -2)
        with pytest.raises(HypergradientError) as caught:
            futures[0].result(60)
        with pytest.raises(DivergenceError, match="at step 7"):
            futures[1].result(60)
        assert last.result(60) == 2
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
    assert torch.equal(caught.value.hypergradient.grad["x"], error.hypergradient.grad["x"])
