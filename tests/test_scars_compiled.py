"""Compiled runs that were another run without a word: what tracing freezes is followed or refused."""

import collections
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, ExponentialLR, LambdaLR, OneCycleLR

from bilevel import Alternating, ConjugateGradient, Implicit, Problem, Solver, Step, Unrolled, train
from bilevel.oracles import Oracles

pytestmark = pytest.mark.usefixtures("traced_only")

DATA = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums in another order
SCALE = 1.0  # a global that `Net` reads


class Net(Problem):
    """A network with batch norm and a learned penalty, which reads all that a loss may read."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"decay": torch.ones(3), "shift": torch.ones(())})
        self.lower = nn.Sequential(
            nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.lower.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.double()
        self.beta = 0.3
        self.settings = {"gamma": [0.1, 0.2]}
        self.config = SimpleNamespace(delta=0.05)
        self.center = torch.full((3,), 0.1, dtype=torch.float64)
        self.table = np.array([1.0, 0.5])
        self.calls = 0  # written by the losses: no reason for a new graph

    def penalty(self) -> Tensor:
        weight = self.lower[0].weight
        factor = self.beta + self.settings["gamma"][1] + self.config.delta + float(self.table[1])
        return factor * SCALE * (self.upper["decay"].exp() * (weight - self.center) ** 2).mean()

    def lower_loss(self, batch: Tensor) -> Any:
        self.calls += 1
        error = (self.lower(batch)[:, 0] - batch.sum(1) - self.upper["shift"]).square().mean()
        return error + self.penalty(), {"error": error}

    def upper_loss(self, batch: Tensor) -> Tensor:
        self.calls += 1
        error = (self.lower(batch)[:, 0] - batch.sum(1)).square().mean()
        return error + self.beta * sum(x.square().sum() for x in self.upper.values()) / 10


SOLVERS: dict[str, Solver] = {
    "alternating": Alternating(),
    "unrolled": Unrolled(num_steps=2),
    "implicit": Implicit(ConjugateGradient(max_steps=3, damping=1.0, rtol=None)),
}


class Run(NamedTuple):
    problem: Net
    upper: Optimizer
    lower: Optimizer
    step: Step


def run(
    compile: bool,
    change: Callable[[Run], Any] = lambda run: None,
    *,
    lower: Callable[[Any], Optimizer] = lambda p: SGD(p, 0.02, momentum=0.9, weight_decay=0.01),
    upper: Callable[[Any], Optimizer] = lambda p: Adam(p, 0.1),
    scheduler: Callable[[Optimizer], Any] | None = None,
    solver: str = "alternating",
    at: int = 3,
    num_steps: int = 6,
    **options: Any,
) -> Run:
    """A run, in which `change` happens after step `at` (or after each, for 0)."""
    problem = Net()
    if solver == "implicit":  # which refuses batch norm in training
        problem.lower.eval()
    optimizers = upper(problem.upper.parameters()), lower(problem.lower.parameters())
    if scheduler is not None:
        for level, optimizer in zip(("upper", "lower"), optimizers, strict=True):
            options[f"{level}_scheduler"] = scheduler(optimizer)
    for step in train(
        problem,
        DATA,
        batch_size=8,
        solver=SOLVERS[solver],
        upper_optimizer=optimizers[0],
        lower_optimizer=optimizers[1],
        lower_steps=2,
        num_steps=num_steps,
        throw=False,
        compile=compile,
        **options,
    ):
        taken = Run(problem, *optimizers, step)
        if not at or step.number == at:
            change(taken)
    return taken


def assert_same(a: Run, b: Run) -> None:
    torch.testing.assert_close(dict(a.problem.state_dict()), dict(b.problem.state_dict()), **EXACT)
    torch.testing.assert_close(a.step.upper_loss, b.step.upper_loss, **EXACT)


def _move(p: Tensor) -> None:
    p.data = p.data * 0.5


def _option(level: str, name: str, value: Any) -> Callable[[Run], None]:
    def change(taken: Run) -> None:
        getattr(taken, level).param_groups[0][name] = value

    return change


CHANGES: dict[str, dict[str, Callable[[Run], Any]]] = {
    "modules": {
        "eval": lambda r: r.problem.eval(),
        "train": lambda r: r.problem.train(),
        "eval of one module": lambda r: r.problem.lower[1].eval(),
        "a frozen lower variable": lambda r: r.problem.lower[0].requires_grad_(False),
        "a frozen upper variable": lambda r: r.problem.upper["shift"].requires_grad_(False),
        "a forward hook": lambda r: r.problem.lower[2].register_forward_hook(
            lambda module, inputs, out: out * 0.5
        ),
        "another activation": lambda r: r.problem.lower.__setitem__(2, nn.Sigmoid()),
    },
    "Python values": {
        "a number of the problem": lambda r: setattr(r.problem, "beta", 0.9),
        "a number of a layer of torch": lambda r: setattr(r.problem.lower[1], "eps", 0.5),
        "a number in a container": lambda r: r.problem.settings["gamma"].__setitem__(1, 0.7),
        "a number of an object": lambda r: setattr(r.problem.config, "delta", 0.7),
        "an array written to": lambda r: r.problem.table.__setitem__(1, 0.7),
        "a tensor replaced": lambda r: setattr(r.problem, "center", r.problem.center * 5),
        "a global": lambda r: globals().__setitem__("SCALE", 2.0),
    },
    "tensors": {
        "a tensor written to": lambda r: r.problem.center.fill_(0.7),
        "a tensor's data written to": lambda r: r.problem.center.data.mul_(5),
        "a buffer written to": lambda r: r.problem.lower[1].running_mean.fill_(0.7),
        "variables written to": lambda r: r.problem.lower[0].weight.data.fill_(0.3),
        "variables moved in memory": lambda r: [_move(p) for p in r.problem.parameters()],
    },
    "numbers of optimizers": {
        "the lower rate": _option("lower", "lr", 0.003),
        "a rate of 0": _option("upper", "lr", 0.0),
        "the upper rate": _option("upper", "lr", 0.003),
        "the betas": _option("upper", "betas", (0.5, 0.9)),
        "the weight decay": _option("lower", "weight_decay", 0.3),
        "the momentum": _option("lower", "momentum", 0.2),
    },
    "options of optimizers": {
        "no weight decay": _option("lower", "weight_decay", 0.0),
        "epsilon": _option("upper", "eps", 0.1),
        "nesterov": _option("lower", "nesterov", True),
        "maximize": _option("lower", "maximize", True),
        "no momentum": _option("lower", "momentum", 0.0),
    },
}


@pytest.mark.parametrize(
    ("kind", "first"), [(kind, i) for kind in CHANGES for i in range(0, len(CHANGES[kind]), 3)]
)
def test_changes_in_mid_run_reach_a_compiled_step(
    kind: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python decided while tracing was decided for good: `eval()` changed nothing.

    After each step one change more, three in a run: of the same tensors there are four graphs at most.
    """
    names = list(CHANGES[kind])[first : first + 3]
    changes = [CHANGES[kind][name] for name in names]

    def states(compile: bool, count: int = 99) -> list[dict[str, Tensor]]:
        monkeypatch.setitem(globals(), "SCALE", 1.0)
        found = []

        def note(taken: Run) -> None:
            number = taken.step.number
            state = copy.deepcopy(dict(taken.problem.state_dict()))
            found.append({**state, "loss": taken.step.upper_loss})
            if number <= min(len(changes), count):
                changes[number - 1](taken)

        run(compile, note, at=0, num_steps=len(changes) + 1)
        return found

    eager, compiled = states(False), states(True)
    for name, a, b in zip(["nothing", *names], eager, compiled, strict=True):
        torch.testing.assert_close(b, a, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    for number, name in enumerate(names):  # and each of them changes something
        without = states(False, number)[number + 1]
        assert not all(torch.equal(without[n], t) for n, t in eager[number + 1].items()), name


@pytest.mark.parametrize("solver", ["unrolled", "implicit"])
def test_what_a_solver_of_second_order_read_is_followed_too(solver: str) -> None:
    eager, compiled = (
        run(c, CHANGES["Python values"]["a number of the problem"], solver=solver)
        for c in (False, True)
    )
    assert_same(compiled, eager)


SCHEDULES: dict[str, Any] = {
    "OneCycleLR": lambda o: OneCycleLR(o, 0.05, total_steps=9),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.05, 2),
    "warm-up from 0": lambda o: LambdaLR(o, lambda step: step / 4),
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9),
    "Adam": lambda p: Adam(p, 0.02, betas=(0.8, 0.9)),
    "AdamW": lambda p: AdamW(p, 0.02, weight_decay=0.1, amsgrad=True),
}


@pytest.mark.parametrize(
    ("schedule", "optimizer"),
    [("OneCycleLR", "Adam"), ("CyclicLR", "SGD"), ("warm-up from 0", "AdamW")],
)
def test_schedules_move_momenta_too(schedule: str, optimizer: str) -> None:
    """`OneCycleLR` and `CyclicLR` move momentum or beta1 in every step."""
    make = OPTIMIZERS[optimizer]
    eager, compiled = (
        run(c, lower=make, upper=make, scheduler=SCHEDULES[schedule]) for c in (False, True)
    )
    assert_same(compiled, eager)


def test_a_rate_that_is_a_tensor_is_read_in_every_step() -> None:
    """Schedulers fill it in place, so that it stays the same object."""

    def make(parameters: Any) -> Optimizer:
        return SGD(parameters, torch.tensor(0.05, dtype=torch.float64), momentum=0.9)

    eager, compiled = (
        run(c, lower=make, upper=make, scheduler=lambda o: ExponentialLR(o, 0.5))
        for c in (False, True)
    )
    assert_same(compiled, eager)


@pytest.mark.parametrize("lower", ["SGD", "Adam"])
def test_a_state_loaded_in_the_loop_is_the_one_that_moves(lower: str, tmp_path: Path) -> None:
    """Optimizers hold other tensors and other groups then."""

    def there_and_back(taken: Run) -> None:
        if taken.step.number == 2:
            taken.step.state.save(tmp_path / "two.pt")
        if taken.step.number == 4 and (tmp_path / "two.pt").exists():
            taken.step.state.load(tmp_path / "two.pt")
            (tmp_path / "two.pt").unlink()

    eager, compiled = (
        run(
            c,
            there_and_back,
            at=0,
            lower=OPTIMIZERS[lower],
            scheduler=lambda o: ExponentialLR(o, 0.9),
        )
        for c in (False, True)
    )
    assert_same(compiled, eager)


def test_a_group_added_in_mid_run_moves() -> None:
    def half(parameters: Any) -> Optimizer:
        return SGD(list(parameters)[:1], 0.05, momentum=0.9)

    def rest(taken: Run) -> None:
        taken.lower.add_param_group({"params": list(taken.problem.lower.parameters())[1:]})

    eager, compiled = (run(c, rest, lower=half) for c in (False, True))
    assert_same(compiled, eager)


class Inherits(SGD):
    """As far as anybody can tell, another optimizer."""


def _hooked(taken: Run) -> None:
    def project(optimizer: Optimizer, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.data.clamp_(-0.3, 0.3)

    taken.lower.register_step_post_hook(project)


def _own_step(taken: Run) -> None:
    step = taken.lower.step
    taken.lower.step = lambda: [step(), step()]  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("words", "change", "lower"),
    [
        ("`SGD` has step hooks", _hooked, SGD),
        ("`SGD` has a `step` of its own", _own_step, SGD),
        ("`Inherits` has no twin", lambda r: None, Inherits),
    ],
    ids=["hook", "step", "class"],
)
def test_what_is_hung_to_an_optimizer_is_not_forgotten(words: str, change: Any, lower: Any) -> None:
    """A graph never calls `step`; a projection in a hook was left out without a word."""
    eager = run(False, change, lower=lambda p: lower(p, 0.05))
    with pytest.warns(RuntimeWarning, match=f"runs as without `compile`: {words}"):
        compiled = run(True, change, lower=lambda p: lower(p, 0.05))
    assert_same(compiled, eager)


# ---------------------------------------------------------------------- batches


@dataclasses.dataclass
class Record:
    rows: Tensor
    weight: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    rows: Tensor
    weight: Any = None


class Encoding(collections.UserDict[str, Any]):
    """As Hugging Face's `BatchEncoding`."""

    @property
    def rows(self) -> Any:
        return self["rows"]

    @property
    def weight(self) -> Any:
        return self["weight"]


class Named(NamedTuple):
    rows: Tensor
    weight: Any = None


class Simple(Problem):
    """Least squares whose batch `pack` makes of rows and a weight that changes from step to step."""

    def __init__(self, pack: Callable[[Tensor, float], Any]) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"shift": torch.ones(3, dtype=torch.float64)})
        self.lower = nn.ParameterDict({"y": torch.zeros(3, dtype=torch.float64)})
        self.pack, self.count = pack, 0

    def draw(self, data: Tensor, generator: torch.Generator) -> Any:
        self.count += 1  # which no loss reads
        return self.pack(data, 1 + self.count / 10)

    def upper_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - batch.rows).square().mean() + self.upper["shift"].square().sum()

    def lower_loss(self, batch: Any) -> Tensor:
        weight = batch.weight if isinstance(batch.weight, float) else _tensor(batch.weight)
        return ((self.lower["y"] - self.upper["shift"] - batch.rows).square() * weight).mean()


def _tensor(weight: Any) -> Tensor:
    weight = weight.weight if isinstance(weight, Bag) else weight
    return torch.as_tensor(1.0 if weight is None else weight)


def simple(compile: bool, pack: Any, num_steps: int = 7) -> list[Tensor]:
    problem = Simple(pack)
    for _ in train(
        problem,
        DATA,
        batch_size=8,
        upper_optimizer=SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=SGD(problem.lower.parameters(), 0.1),
        num_steps=num_steps,
        compile=compile,
    ):
        pass
    return [p.detach() for p in problem.parameters()]


@pytest.mark.parametrize("kind", [Record, Frozen, Named, Encoding])
def test_records_of_tensors_are_taken_apart(kind: Any) -> None:
    def pack(rows: Tensor, weight: float) -> Any:
        return kind(rows=rows, weight=torch.tensor(weight, dtype=torch.float64))

    torch.testing.assert_close(simple(True, pack), simple(False, pack), **EXACT)


class Bag:
    """A class that nobody can look into, with an equality of its own."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("words", "pack"),
    [
        (
            r"the batch holds a constant that changes \(1\.2, 1\.3\); make it a tensor",
            lambda rows, weight: Named(rows, weight),
        ),
        ("a NumPy array; make it a tensor", lambda rows, weight: Named(rows, np.full(3, weight))),
        ("holds a `Bag`, which a graph cannot look", lambda r, w: Named(r, Bag(w))),
    ],
    ids=["number", "array", "object"],
)
def test_what_no_graph_can_hold_runs_eagerly_with_a_word(words: str, pack: Any) -> None:
    """A number that changed compiled a new graph in every step, an array was a `TypeError`."""
    eager = simple(False, pack)
    with pytest.warns(RuntimeWarning, match=words) as warned:
        compiled = simple(True, pack)
    assert len(warned) == 1
    torch.testing.assert_close(compiled, eager, **EXACT)


def test_one_tensor_given_twice_is_two_arguments() -> None:
    """Traced with inputs and targets that are one tensor, a graph took the one for the other."""

    def pack(rows: Tensor, weight: float) -> Any:
        return Named(rows, rows if weight < 1.15 else rows.square())  # twice in the first step

    torch.testing.assert_close(simple(True, pack), simple(False, pack), **EXACT)


def test_a_value_taken_out_of_torch_is_not_frozen() -> None:
    """`.numpy()` gave the numbers of the first step to all others."""

    class Looks(Simple):
        def upper_loss(self, batch: Any) -> Tensor:
            weight = torch.from_numpy(np.exp(-self.lower["y"].detach().numpy()))
            return (weight * (self.upper["shift"] - batch.rows)).square().mean()

    def losses(compile: bool) -> list[Tensor]:
        problem = Looks(lambda rows, weight: Named(rows))
        optimizers = {
            f"{level}_optimizer": SGD(getattr(problem, level).parameters(), 0.1)
            for level in ("upper", "lower")
        }
        taken = train(problem, DATA, num_steps=3, compile=compile, **optimizers)
        return [step.upper_loss for step in taken]

    with pytest.warns(RuntimeWarning, match="it looks at the value of a tensor"):
        compiled = losses(True)
    torch.testing.assert_close(compiled, losses(False), **EXACT)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        (torch.float16, "must be `torch.bfloat16`.*underflow to 0 without loss scaling"),
        (torch.int8, "`precision` must be `torch.bfloat16`"),
        (torch.float64, "`precision` must be `torch.bfloat16`"),
        ("bf16", "`precision` must be `torch.bfloat16`"),
    ],
    ids=str,
)
def test_a_precision_that_would_go_wrong_is_refused_at_the_call(precision: Any, words: str) -> None:
    """float16 gradients underflow to 0 without loss scaling; the others failed at the first step."""
    with pytest.raises(ValueError, match=words):
        run(False, precision=precision)
    problem = Net()
    with pytest.raises(ValueError, match=words):
        Oracles(problem, DATA, [DATA], precision=precision)


def test_a_pruned_layer_has_a_moving_average() -> None:
    """It keeps a tensor with a graph, which `deepcopy` refuses in torch's words."""

    def pruned(ema: float | None) -> Any:
        problem = Net()
        prune.l1_unstructured(problem.lower[0], "weight", 0.4)
        *_, step = train(
            problem,
            DATA,
            upper_optimizer=SGD(problem.upper.parameters(), 0.1),
            lower_optimizer=SGD(problem.lower.parameters(), 0.1),
            num_steps=3,
            ema=ema,
        )
        return problem, step.state.average

    plain, _ = pruned(None)
    trained, average = pruned(0.5)
    torch.testing.assert_close(dict(trained.state_dict()), dict(plain.state_dict()))
    layer = average.lower[0]
    average.upper_loss(DATA)  # the layer computes its weight anew, from the averaged one
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert not torch.equal(layer.weight_orig, trained.lower[0].weight_orig)
    assert (layer.weight == 0).sum() == 5
