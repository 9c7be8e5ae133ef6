"""`Compiled`: the same hypergradients as the solver it wraps, and no graph more than needed."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor
import torchopt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW

from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    Compiled,
    ConjugateGradient,
    Hypergradient,
    HypergradientError,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Solver,
    Unrolled,
    train,
)
from bilevel.compile.lowering import trace
from tests.problems import ROWS, Quadratic, normal
from tests.solver_rows import ROWS as SOLVER_ROWS
from tests.test_contract_solvers import SOLVERS, build, snapshot

EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
SCALE = 1.0  # a global that `Everything` reads


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were given to the compiler, which runs them as they are."""
    made: list[Any] = []

    def compile(graph: Any, inputs: Any, options: Any) -> Any:
        made.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return made


def assert_same(found: Hypergradient, wanted: Hypergradient, tolerance: float = 1e-12) -> None:
    size = float(torch.stack([g.abs().max() for g in wanted.grad.values()]).max())
    a, b = (
        {name: getattr(h, name) for name in ("value", "grad", "logs", "buffers", "state")}
        for h in (found, wanted)
    )
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, size))
    assert found.result is wanted.result
    assert found.stats.num_products == wanted.stats.num_products
    assert found.stats.negative_curvature == wanted.stats.negative_curvature
    assert found.stats.unreached == wanted.stats.unreached


# ------------------------------------------------------------------ the contract table

# each solver once on a small problem, and each problem once with a solver
PAIRS = [
    ("tanh network" if "quadratic" in SOLVER_ROWS[name].refuses else "quadratic", name)
    for name in SOLVERS
] + [
    ("ridge", "implicit cg"),
    ("logistic with logs", "unrolled running adamw"),
    ("tanh network", "recompute running adam"),
    ("spectral norm (parametrization)", "unrolled running sgd"),
    ("spectral norm (old style)", "implicit identity"),
    ("tied weights", "implicit neumann"),
    ("frozen and unused", "truncated"),
    ("attention", "implicit identity"),
    ("lstm", "unrolled running sgd"),
    ("two networks", "unrolled torchopt sgd"),
    ("nested dicts", "forward running sgd"),
    ("mixed dtypes", "implicit cholesky"),
]


@pytest.mark.parametrize(("row_name", "solver_name"), PAIRS)
def test_the_contract(row_name: str, solver_name: str, graphs: list[Any]) -> None:
    """Answer, result, statistics and logs; the problem is left alone; the second call makes no graph."""
    row, solver = ROWS[row_name], SOLVERS[solver_name][0]
    problem, optimizer = build(row, solver_name, "cpu")
    compiled = Compiled(solver)

    def answer(solver: Solver) -> Hypergradient:
        return solver.hypergradient(
            problem,
            row.upper_batch,
            [row.lower_batch],
            lower_optimizer=optimizer,
            seed=3,
            throw=False,
        )

    wanted, before = answer(solver), snapshot(problem, optimizer)
    tolerance = 1e-12 if row_name != "mixed dtypes" else 1e-6  # float32
    assert_same(answer(compiled), wanted, tolerance)
    count = len(graphs)
    assert count
    assert_same(answer(compiled), wanted, tolerance)
    assert len(graphs) == count
    torch.testing.assert_close(snapshot(problem, optimizer), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("graphs")
def test_dropout_runs_as_it_is_with_one_warning() -> None:
    row = ROWS["batch norm, in-place relu, dropout"]
    problem, optimizer = build(row, "unrolled running sgd", "cpu")
    solver = Unrolled(2)
    given: Any = row.upper_batch, [row.lower_batch]
    wanted = solver.hypergradient(problem, *given, lower_optimizer=optimizer, seed=3)
    compiled = Compiled(solver)
    with pytest.warns(RuntimeWarning, match="a loss draws random numbers") as said:
        found = compiled.hypergradient(problem, *given, lower_optimizer=optimizer, seed=3)
    assert len(said) == 1
    torch.testing.assert_close(found.grad, wanted.grad, **EXACT)


# ------------------------------------------------------------------ optimizers and states

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: SGD(p, 0.1, weight_decay=0.1, maximize=True),
    "nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.5),
    "amsgrad": lambda p: Adam(p, 0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, 0.1, betas=(0.0, 0.9)),
    "groups": lambda p: [
        SGD([{"params": list(p)[:1]}, {"params": list(p)[1:], "lr": 0.2}], 0.1, momentum=0.5)
    ],
    "one of two": lambda p: Adam(list(p)[:1], 0.1),
}


class Two(Problem):
    """Two lower variables, one of them transposed in memory; the batch scales the target."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(3, seed=1)})
        self.lower = nn.ParameterDict(
            {"a": nn.Parameter(normal(2, 3, seed=2).mT), "b": nn.Parameter(normal(6)[::2])}
        )

    def lower_loss(self, batch: Any) -> Any:
        a, b, x = self.lower["a"], self.lower["b"], self.upper["x"]
        target = 1.0 if batch is None else batch
        loss = ((a.sum(1) - x * b).tanh() - target).square().sum() + b.cosh().sum() / 9
        return loss + (a.mT @ x).square().sum() / 5, {"rows": 3, "positive": (b > 0).sum()}

    def upper_loss(self, batch: Any) -> Any:
        a, b = self.lower["a"], self.lower["b"]
        loss = (a.mT @ b - 1).square().sum() + (self.upper["x"] * a.exp().mT).sum() / 9
        return loss, {"positive": (b > 0).sum(), "any": (a > 0).any(), "half": 0.5}


@pytest.mark.parametrize("mode", ["reverse", "recompute", "forward"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_fresh_and_advanced(name: str, mode: Any, graphs: list[Any]) -> None:
    """Odd strides, logs of all kinds, several lower batches."""
    if mode != "reverse" and name in ("sgd", "nesterov", "one of two"):
        pytest.skip("one mode is enough")
    problem = Two()
    optimizer = OPTIMIZERS[name](problem.lower.parameters())
    steps = optimizer if isinstance(optimizer, list) else [optimizer]
    batches: list[Any] = [torch.tensor(b).double() for b in (0.5, 1.0, 1.5)]
    solver = Unrolled(3, mode=mode, max_grad_norm=0.5)
    compiled = Compiled(solver)
    for _ in range(2):
        wanted, found = (
            s.hypergradient(problem, None, batches, lower_optimizer=optimizer)
            for s in (solver, compiled)
        )
        assert_same(found, wanted)
        for p in problem.lower.parameters():
            p.grad = torch.ones_like(p)
        for one in steps:
            one.step()
        problem.zero_grad()


@pytest.mark.slow
def test_strides_reach_the_compiler_as_they_are() -> None:
    """Through the real compiler, whose code reads memory as it lay when the graph was made."""
    problem = Two()
    solvers: list[Solver] = [
        Unrolled(2, torchopt.sgd(0.1, momentum=0.5)),
        Implicit(ConjugateGradient(damping=5.0, rtol=None, max_steps=3)),
    ]
    for solver in solvers:
        compiled = Compiled(solver)
        assert_same(compiled.hypergradient(problem), solver.hypergradient(problem))
    with torch.no_grad():  # the same numbers, laid out otherwise
        problem.lower["a"].data = problem.lower["a"].data.contiguous()
    assert_same(compiled.hypergradient(problem), solver.hypergradient(problem))


def test_a_schedule_of_a_transformation_is_followed(graphs: list[Any]) -> None:
    """What it closes over is Python's, and torchopt's functions hide it."""
    rate = [0.1]
    transformation = torchopt.sgd(lambda count: rate[0] / (1 + count), momentum=0.5)
    problem, solver = Quadratic(), Unrolled(3, transformation)
    compiled = Compiled(solver)
    assert_same(compiled.hypergradient(problem), solver.hypergradient(problem))
    rate[0] = 0.05
    assert_same(compiled.hypergradient(problem), solver.hypergradient(problem))


# ------------------------------------------------------------------ linear solvers


def test_warm_starts_go_on_from_the_state(graphs: list[Any]) -> None:
    for linear in (
        ConjugateGradient(max_steps=2, rtol=None, warm_start=True),
        Neumann(3, 0.1, warm_start=True),
        GMRES(max_steps=2, rtol=None, warm_start=True),
    ):
        problem, solver = Quadratic(), Implicit(linear)
        compiled, states = Compiled(solver), [None, None]
        for _ in range(3):
            wanted, found = (
                s.hypergradient(problem, state=state, throw=False)
                for s, state in zip((solver, compiled), states, strict=True)
            )
            assert_same(found, wanted)
            states = [wanted.state, found.state]


class Scaling:
    """A preconditioner with an equality of its own, and with no hash."""

    def __init__(self) -> None:
        self.scale, self.diagonal = 1.0, torch.ones(4, dtype=torch.float64)

    def __call__(self, residual: Tensor) -> Tensor:
        return self.scale * residual / self.diagonal

    def method(self, residual: Tensor) -> Tensor:
        return self(residual)

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Hashed(Scaling):
    """The same, which a key can hold."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _watching(residual: Tensor) -> Tensor:
    return residual / 2 if float(residual[0]) > 0 else residual / 3


def test_preconditioners_are_followed(graphs: list[Any]) -> None:
    problem = Quadratic()
    for one, preconditioner in [(h := Hashed(), h), (m := Hashed(), m.method)]:
        solver = Implicit(ConjugateGradient(max_steps=2, rtol=None, preconditioner=preconditioner))
        compiled = Compiled(solver)
        for change in (
            lambda: None,
            lambda one=one: one.diagonal.mul_(problem.H.diagonal()),
            lambda one=one: setattr(one, "scale", 3.0),
            lambda one=one: setattr(one, "diagonal", problem.H.diagonal() + 1),
        ):
            change()
            wanted = solver.hypergradient(problem, throw=False)
            assert_same(compiled.hypergradient(problem, throw=False), wanted)
    for odd in (Scaling(), _watching):
        solver = Implicit(ConjugateGradient(max_steps=2, rtol=None, preconditioner=odd))
        wanted = solver.hypergradient(problem, throw=False)
        with pytest.warns(RuntimeWarning, match="runs as without `compile`"):
            found = Compiled(solver).hypergradient(problem, throw=False)
        assert_same(found, wanted)


def test_functions_of_the_users_own_and_matrices(graphs: list[Any]) -> None:
    def richardson(operator: Any, rhs: Tensor) -> Tensor:
        w = torch.zeros_like(rhs)
        for _ in range(30):
            w = w + 0.2 * (rhs - operator(w))
        return w

    problem = Quadratic()
    for solver in (Implicit(richardson), Implicit(Cholesky(damping=0.1)), Implicit(Identity())):
        wanted = solver.hypergradient(problem, None, [None, None])
        assert_same(Compiled(solver).hypergradient(problem, None, [None, None]), wanted)


# ------------------------------------------------------------------ everything a loss reads


class Config:
    """A record of the user's own."""

    def __init__(self) -> None:
        self.delta = 0.05


class Everything(Problem):
    """A problem which reads what a loss may read."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2, seed=1), "shift": torch.ones(()).double()})
        layer = parametrizations.spectral_norm(nn.Linear(2, 2))
        self.lower = nn.Sequential(layer, nn.Dropout(0.5), nn.Tanh(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            for i, p in enumerate(self.lower.parameters()):
                p.copy_(normal(*p.shape, seed=10 + i) / 2)
        self.lower[1].eval()
        self.register_buffer("center", normal(2, seed=3))
        self.plain = normal(2, seed=4)
        self.beta, self.entries, self.config = 0.3, {"gamma": [0.1, 0.2]}, Config()
        self.table = np.array([1.0, 0.5])
        closed = [0.7]
        self.closed, self.function = closed, lambda t: closed[0] * t.sin()
        teacher = nn.Linear(2, 1).double()
        with torch.no_grad():
            teacher.weight.fill_(0.3)
        self.teacher = [teacher]  # not a submodule

    def lower_loss(self, batch: Any) -> Any:
        rows, factor = batch
        rows = rows.to(self.center.dtype)
        out = self.lower(rows)[:, 0]
        number = self.beta + self.entries["gamma"][1] + self.config.delta + float(self.table[1])
        near = ((self.upper["x"].exp() * (self.lower[3].weight[0] - self.center)) ** 2).sum()
        error = (out - self.function(rows.sum(1)) - self.upper["shift"] * self.plain[0]) ** 2
        learned = (out - self.teacher[0](rows)[:, 0]).square().mean()
        made = torch.full((), 0.1).to(rows.dtype)
        return factor * error.mean() + SCALE * number * near + learned + made * out.sum(), {"n": 3}

    def upper_loss(self, batch: Any) -> Tensor:
        rows, factor = batch
        out = self.lower(rows.to(self.center.dtype))[:, 0]
        return (out - self.upper["x"].sum()).square().mean() * factor + self.upper["shift"] ** 2


class Small(Problem):
    """A layer, a number, a mode and a number made in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2, seed=1)})
        self.lower = nn.Linear(2, 1).double()
        with torch.no_grad():
            self.lower.weight.fill_(0.3)
            self.lower.bias.fill_(0.2)
        self.beta = 0.3

    def lower_loss(self, batch: Any) -> Tensor:
        made = torch.full((), 0.1) * (2 if self.training else 1)
        return (self.lower(batch * self.upper["x"]).exp() * made).mean() * self.beta

    def upper_loss(self, batch: Any) -> Tensor:
        return self.lower(batch).square().mean() + self.beta * self.upper["x"].square().sum()


class Here(SimpleNamespace):
    """A problem, its optimizer and the batch of the next call."""

    problem: Everything
    optimizer: SGD
    batch: Any


def here() -> Here:
    problem = Everything()
    optimizer = SGD(problem.lower.parameters(), 0.1, momentum=0.5)
    return Here(problem=problem, optimizer=optimizer, batch=(normal(3, 2, seed=9), 1.0))


def _group(name: str, value: Any) -> Callable[[Here], Any]:
    return lambda h: h.optimizer.param_groups[0].__setitem__(name, value)


def _hook(module: nn.Module, inputs: Any, out: Any) -> Any:
    return out * 0.5 if isinstance(module, nn.Linear) else out


def _moved(h: Here) -> None:
    for p in h.problem.parameters():
        p.data = p.data * 1.1


def _buffer(h: Here) -> None:
    h.problem.center = h.problem.center + 0.1


FLIPS: dict[str, Callable[[Here], Any]] = {
    "eval": lambda h: h.problem.eval(),
    "train without dropout": lambda h: h.problem.train() and h.problem.lower[1].eval(),
    "frozen lower": lambda h: h.problem.lower[0].requires_grad_(False),
    "frozen upper": lambda h: h.problem.upper["shift"].requires_grad_(False),
    "thawed": lambda h: h.problem.requires_grad_(True),
    "module": lambda h: h.problem.lower.__setitem__(2, nn.Sigmoid()),
    "module back": lambda h: h.problem.lower.__setitem__(2, nn.Tanh()),
    "buffer": _buffer,
    "buffer written": lambda h: h.problem.center.mul_(1.1),
    "tensor": lambda h: setattr(h.problem, "plain", h.problem.plain * 2),
    "tensor written": lambda h: h.problem.plain.add_(0.1),
    "moved": _moved,
    "attribute": lambda h: setattr(h.problem, "beta", h.problem.beta + 0.1),
    "entry": lambda h: h.problem.entries["gamma"].__setitem__(1, 0.7),
    "record": lambda h: setattr(h.problem.config, "delta", 0.4),
    "array": lambda h: h.problem.table.__setitem__(1, 0.9),
    "closure": lambda h: h.problem.closed.__setitem__(0, 0.2),
    "function": lambda h: setattr(h.problem, "function", torch.cos),
    "teacher": lambda h: setattr(h.problem.teacher[0], "weight", nn.Parameter(normal(1, 2))),
    "global": lambda h: globals().__setitem__("SCALE", 2.0),
    "hook": lambda h: h.problem.lower[3].register_forward_hook(_hook),
    "rate": _group("lr", 0.05),
    "rate of 0": _group("lr", 0.0),
    "momentum": _group("momentum", 0.8),
    "no momentum": _group("momentum", 0.0),
    "decay": _group("weight_decay", 0.1),
    "maximize": _group("maximize", True),
    "dampening": _group("dampening", 0.3),
    "rows": lambda h: setattr(h, "batch", (normal(5, 2, seed=8), 1.0)),
    "dtype of the batch": lambda h: setattr(h, "batch", (h.batch[0].float(), 1.0)),
    "layout of the batch": lambda h: setattr(h, "batch", (normal(2, 4, seed=8).mT, 1.0)),
    "constant of the batch": lambda h: setattr(h, "batch", (h.batch[0], 2.0)),
    "integer in the batch": lambda h: setattr(h, "batch", (h.batch[0], 2)),
    "another loss": lambda h: setattr(
        h.problem, "lower_loss", lambda b: Everything.lower_loss(h.problem, b)[0] * 2
    ),
    "state": lambda h: h.optimizer.load_state_dict(
        SGD(h.problem.lower.parameters(), 0.2, momentum=0.3).state_dict()
    ),
    "another lower level": lambda h: setattr(h.problem, "lower", copy.deepcopy(h.problem.lower)),
}
FLIPPED: list[Solver] = [Unrolled(1), Implicit(Neumann(2, 0.1))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the step is not compiled:RuntimeWarning")
@settings(
    max_examples=3,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.sampled_from(sorted(FLIPS)), min_size=2, max_size=4), st.sampled_from(FLIPPED))
def test_whatever_is_changed_between_calls(
    graphs: list[Any], names: list[str], solver: Solver
) -> None:
    """After every change the answer is that of the eager solver, and a repeated call makes no graph."""
    _follow(names, solver, graphs)


@pytest.mark.filterwarnings("ignore:the step is not compiled:RuntimeWarning")
@pytest.mark.parametrize("first", range(0, len(FLIPS), 6))
def test_each_change_is_seen(first: int, graphs: list[Any]) -> None:
    _follow(list(FLIPS)[first : first + 6], FLIPPED[0], graphs)


def _follow(names: list[str], solver: Solver, graphs: list[Any]) -> None:
    now, compiled = here(), Compiled(solver)
    before = globals()["SCALE"]
    try:
        for name in ["nothing", *names]:
            if name in FLIPS:
                FLIPS[name](now)
            call = (now.problem, now.batch, [now.batch])
            options: dict[str, Any] = {"throw": False}
            if isinstance(solver, Unrolled):
                moved = {id(p) for p in now.optimizer.param_groups[0]["params"]}
                held = {id(p) for p in now.problem.lower.parameters() if p.requires_grad}
                if not moved & held:  # the lower level was replaced
                    now.optimizer = SGD(now.problem.lower.parameters(), 0.1, momentum=0.5)
                options["lower_optimizer"] = now.optimizer
            wanted = solver.hypergradient(*call, **options)
            try:
                assert_same(compiled.hypergradient(*call, **options), wanted)
                count = len(graphs)
                assert_same(compiled.hypergradient(*call, **options), wanted)
            except AssertionError as error:
                raise AssertionError(f"after {name}") from error
            assert len(graphs) == count, name
    finally:
        globals()["SCALE"] = before


def test_going_back_makes_no_graph(graphs: list[Any]) -> None:
    problem, solver = Small(), Implicit(Identity())
    compiled, batch = Compiled(solver), normal(3, 2)
    counts = []
    for mode in (True, False, True, False):
        problem.train(mode)
        wanted = solver.hypergradient(problem, batch, [batch])
        assert_same(compiled.hypergradient(problem, batch, [batch]), wanted)
        counts.append(len(graphs))
    assert counts[0] < counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("flag", ["deterministic", "matmul", "default dtype", "autocast", "hook"])
def test_settings_of_torch_are_followed(flag: str, graphs: list[Any]) -> None:
    problem, solver = Small().float(), Implicit(Identity())
    compiled, batch = Compiled(solver), normal(3, 2).float()
    compiled.hypergradient(problem, batch, [batch])
    hook = None
    try:
        if flag == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif flag == "matmul":
            torch.set_float32_matmul_precision("high")
        elif flag == "default dtype":
            torch.set_default_dtype(torch.float64)
        elif flag == "hook":
            hook = nn.modules.module.register_module_forward_hook(_hook)
        with torch.autocast("cpu", torch.bfloat16, enabled=flag == "autocast"):
            wanted = solver.hypergradient(problem, batch, [batch])
            found = compiled.hypergradient(problem, batch, [batch])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        if hook is not None:
            hook.remove()
    tolerance = 1e-2 if flag == "autocast" else 1e-5  # their own precision
    torch.testing.assert_close(found.grad, wanted.grad, rtol=tolerance, atol=tolerance)


def test_a_batch_may_say_which_variables_count(graphs: list[Any]) -> None:
    """Which variables the lower loss uses was decided once for all batches."""

    class Chosen(Two):
        def lower_loss(self, batch: Any) -> Any:
            loss = (self.lower["b"] - self.upper["x"]).square().sum()
            return loss + self.lower["a"].square().sum() if batch == "all" else loss

    problem, solver = Chosen(), Unrolled(2, torchopt.sgd(0.1))
    compiled = Compiled(solver)
    for batch in ("some", "all", "some"):
        wanted = solver.hypergradient(problem, None, [batch])
        assert_same(compiled.hypergradient(problem, None, [batch]), wanted)


def test_more_changes_than_graphs_run_as_they_are(graphs: list[Any]) -> None:
    """Each call made new graphs once there were too many."""
    problem, solver = Small(), Alternating()
    compiled, batch = Compiled(solver), normal(3, 2)

    def change(i: int) -> bool:
        problem.beta = i / 10
        count = len(graphs)
        wanted = solver.hypergradient(problem, batch, [batch])
        assert_same(compiled.hypergradient(problem, batch, [batch]), wanted)
        return len(graphs) > count

    with pytest.warns(RuntimeWarning, match=r"`self\.beta` has changed; make what changes") as said:
        made = [change(i) for i in range(10)]
    assert made == [True] * 8 + [False] * 2
    assert len(said) == 1


# ------------------------------------------------------------------ the record itself


def test_copies_and_files_hold_no_graphs(graphs: list[Any]) -> None:
    compiled = Compiled(Unrolled(2, torchopt.sgd(0.1)))
    problem = Quadratic()
    wanted = compiled.hypergradient(problem)
    assert_same(copy.deepcopy(compiled).hypergradient(copy.deepcopy(problem)), wanted)
    alike = Compiled(Implicit(Identity()))
    assert pickle.loads(pickle.dumps(alike)) == alike


def test_an_error_leaves_the_problem_as_it_was(graphs: list[Any]) -> None:
    class Fails(Quadratic):
        def upper_loss(self, batch: Any) -> Tensor:
            if batch == "bad":
                raise KeyError("bad")
            return Quadratic.upper_loss(self, batch)

    problem, compiled = Fails(), Compiled(Unrolled(2, torchopt.sgd(0.1)))
    wanted, before = compiled.hypergradient(problem), snapshot(problem, None)
    with (
        pytest.warns(RuntimeWarning, match="not compiled"),
        pytest.raises(KeyError, match="bad"),
    ):
        compiled.hypergradient(problem, "bad")
    torch.testing.assert_close(snapshot(problem, None), before)
    assert_same(compiled.hypergradient(problem), wanted)
    with pytest.raises(HypergradientError, match="without reaching its tolerance"):
        Compiled(Implicit(ConjugateGradient(max_steps=1, rtol=1e-12))).hypergradient(problem)


def test_an_answer_shares_no_memory_with_the_problem(graphs: list[Any]) -> None:
    row, solver = ROWS["spectral norm (old style)"], Alternating()
    problem, batch = row.make(), row.upper_batch
    found = Compiled(solver).hypergradient(problem, batch, [batch])
    kept = copy.deepcopy((found.buffers, found.grad))
    for tensor in (*problem.parameters(), *problem.buffers()):
        tensor.data.add_(1)
    torch.testing.assert_close((found.buffers, found.grad), kept, rtol=0, atol=0)


# ------------------------------------------------------------------ no compiler


def test_without_a_compiler_one_warning_and_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def compile(graph: Any, inputs: Any, options: Any) -> Any:
        tried.append(graph)
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch._inductor, "compile", compile)
    problem, solver = Quadratic(), Implicit(ConjugateGradient())
    compiled = Compiled(solver)

    def change(value: float) -> None:
        problem.t = problem.t + value
        assert_same(compiled.hypergradient(problem), solver.hypergradient(problem))

    with pytest.warns(RuntimeWarning, match="no C.. compiler was found") as said:
        [change(value) for value in (0.1, 0.2, 0.3)]
    assert len(said) == len(tried) == 1


def _run(problem: Problem, compile: bool, solver: Solver) -> dict[str, Tensor]:
    for _ in train(
        problem,
        (normal(12, 2, seed=9),),
        batch_size=4,
        solver=solver,
        upper_optimizer=Adam(problem.upper.parameters(), 0.05),
        lower_optimizer=SGD(problem.lower.parameters(), 0.05, momentum=0.5),
        lower_steps=2,
        num_steps=3,
        throw=False,
        compile=compile,
    ):
        pass
    return dict(problem.state_dict())


class Drops(Problem):
    """Dropout in the upper loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"x": normal(2, seed=1)})
        self.lower = nn.ParameterDict({"y": normal(2, seed=2)})

    def lower_loss(self, batch: Any) -> Tensor:
        return (self.lower["y"] - self.upper["x"] - batch[0]).square().mean()

    def upper_loss(self, batch: Any) -> Tensor:
        dropped = nn.functional.dropout(self.lower["y"] * self.upper["x"], 0.5)
        return (dropped - 1).square().sum()


@pytest.mark.parametrize("solver", [Alternating(), Unrolled(2)], ids=["alternating", "unrolled"])
def test_masks_are_those_of_the_eager_run(solver: Solver, graphs: list[Any]) -> None:
    """Compiled lower steps took no seed, so that later masks were others."""
    wanted = _run(Drops(), False, solver)
    with pytest.warns(RuntimeWarning, match="draws random numbers"):
        found = _run(Drops(), True, solver)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_run_without_a_compiler_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(graph: Any, inputs: Any, options: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    class Plain(Drops):
        def upper_loss(self, batch: Any) -> Tensor:
            return (self.lower["y"] * self.upper["x"] - 1).square().sum()

    monkeypatch.setattr(torch._inductor, "compile", compile)
    wanted = _run(Plain(), False, Unrolled(2))
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found") as said:
        found = _run(Plain(), True, Unrolled(2))
    assert len(said) == 1
    torch.testing.assert_close(found, wanted, **EXACT)


# ------------------------------------------------------------------ short ones as one graph


def test_a_short_hypergradient_is_one_graph(graphs: list[Any]) -> None:
    problem = Quadratic()
    for solver, whole in (
        (Unrolled(8, torchopt.sgd(0.1)), True),
        (Unrolled(9, torchopt.sgd(0.1)), False),
        (Unrolled(2, torchopt.sgd(0.1), mode="recompute"), False),  # it is chosen to save memory
        (Implicit(Cholesky()), True),
    ):
        graphs.clear()
        assert_same(Compiled(solver).hypergradient(problem), solver.hypergradient(problem))
        assert (len(graphs) == 1) is whole


def test_a_solve_without_a_look_is_used_where_it_went_well(graphs: list[Any]) -> None:
    """Negative curvature and a singular matrix: the solver that watches itself says which it was."""
    problem = Quadratic()
    solver = Implicit(Cholesky())
    compiled = Compiled(solver)
    matrix = problem.H.clone()
    for factor in (1.0, -1.0, 0.0, 1.0):
        problem.H.copy_(factor * matrix)
        wanted = solver.hypergradient(problem, throw=False)
        assert_same(compiled.hypergradient(problem, throw=False), wanted)


def test_what_is_no_single_graph_is_several(graphs: list[Any]) -> None:
    """The upper loss draws: the steps are compiled all the same, and one warning says what is not."""
    problem, solver = Drops(), Unrolled(2, torchopt.sgd(0.1))
    batch = normal(4, 2)
    compiled = Compiled(solver)
    wanted = solver.hypergradient(problem, batch, [batch], seed=3)
    with pytest.warns(RuntimeWarning, match="draws random numbers") as said:
        found = [compiled.hypergradient(problem, batch, [batch], seed=3) for _ in range(2)]
    assert len(said) == 1
    assert len(graphs) == 3  # a step, its adjoint, the sum
    torch.testing.assert_close([h.grad for h in found], [wanted.grad] * 2, **EXACT)


def test_what_fails_lets_go_of_its_batches(graphs: list[Any]) -> None:
    class Fails(Quadratic):
        fails = False

        def upper_loss(self, batch: Any) -> Tensor:
            if self.fails:
                raise KeyError("bad")
            return super().upper_loss(batch)

    problem, batch = Fails(), torch.ones(2)
    alive = weakref.ref(batch)
    compiled = Compiled(Unrolled(2, torchopt.sgd(0.1)))
    compiled.hypergradient(problem)
    problem.fails = True
    with pytest.warns(RuntimeWarning, match="not compiled"), pytest.raises(KeyError):
        compiled.hypergradient(problem, batch)
    del batch
    gc.collect()
    assert alive() is None


def test_numbers_made_while_tracing_are_inputs_of_the_graph() -> None:
    """Code in C++ read past its inputs, where it was called without the tensors a graph held."""

    def function(x: Tensor) -> list[Tensor]:
        number = torch.tensor(2.0)
        return [number * x, number, torch.tensor([1.0, 2.0])]

    found = trace(function, [torch.ones(2)], torch.device("cpu"))
    assert not found.graph.graph.find_nodes(op="get_attr")
    assert [tensor.tolist() for tensor in found.extra] == [2.0, [1.0, 2.0]]
