"""`hypergradients`: hypergradients of one problem at many variables, all at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.batches import refuse_no_list
from bilevel.cards import digits
from bilevel.errors import Result
from bilevel.losses.purity import examine, examined
from bilevel.losses.substitution import attentive
from bilevel.lower.tasks import Tasks
from bilevel.oracles import Oracles
from bilevel.problem import Level, Loss, Problem, refuse_no_problem
from bilevel.refusals import SEEDS, a_tensor, flag, nearest, whole
from bilevel.solvers import Hypergradient, Solver
from bilevel.solvers.given import given_solver
from bilevel.tree import Tree, leaves


@final
@dataclass(frozen=True)
class Hypergradients:
    """What `hypergradients` returns; the first dimension counts the members.

    Attributes:
        values: the upper loss of each member, shape (m,).
        grad: the hypergradients, a tree over the upper variables, each of shape (m, ...).
        result: how the worst of the computations ended.
        lower_residuals: norm of each member's lower gradient at the lower variables given, shape (m,).
        num_products: Hessian-vector products, each one for all members (in turn: the largest number).
        at_once: whether the members were computed at once, or one after the other.
    """

    values: Tensor
    grad: Tree
    result: Result
    lower_residuals: Tensor
    num_products: int
    at_once: bool

    def __repr__(self) -> str:
        how = "at once" if self.at_once else "in turn"
        return (
            f"Hypergradients: {len(self.values)} members {how}; {self.result.value}; upper loss "
            f"{digits(self.values.min())} to {digits(self.values.max())}"
        )


def hypergradients(
    problem: Problem,
    upper_batch: Any = None,
    lower_batches: Sequence[Any] = (None,),
    *,
    solver: Solver,
    upper: Mapping[str, Tensor] | None = None,
    lower: Mapping[str, Tensor] | None = None,
    share_batches: bool = True,
    vectorize: bool = True,
    seed: int = 0,
    throw: bool = True,
) -> Hypergradients:
    r"""The hypergradients of one problem at $m$ pairs of variables, $d F(x_i, \hat y_i(x_i)) / d x_i$.

    What `torch.vmap` over a hypergradient would be: the losses are evaluated for all members at once,
    and their sum is differentiated, whose gradient is every member's own. The linear systems of
    `Implicit` stand side by side in one block diagonal matrix; conjugate gradients have inner products,
    step sizes and an end for each block, so that each gets the iterates it would have alone.

    `Alternating` and `Implicit` with `ConjugateGradient` (without a preconditioner), `Cholesky` or
    `Identity` are computed at once, every other solver in turn: the same answer, without the speed.

    Args:
        problem: the problem; it is left as it was.
        upper_batch: batch of the upper loss.
        lower_batches: list of batches of the lower loss.
        solver: how a hypergradient is computed.
        upper: upper variables by name, with a first dimension m more than the problem's; those that are
            missing are the problem's own for all members.
        lower: lower variables, given in the same way.
        share_batches: whether all members see the same batches; otherwise the first dimension of every
            tensor in them counts members.
        vectorize: evaluate the losses at once; for operations without a batched form, see `Tasks`.
        seed: seed of the random numbers drawn inside the losses.
        throw: raise if a computation did not succeed.

    Returns:
        Values, gradients and how it ended.

    Raises:
        ValueError: if neither `upper` nor `lower` is given, for unknown names or wrong shapes.
        TypeError: if an argument is of the wrong kind.
        HypergradientError: if `throw` and a computation did not succeed.

    Example:
        >>> from bilevel import Implicit
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: (y["y"] - 3) ** 2 / 2, lambda x, y, _: (y["y"] - x["x"]) ** 2,
        ...     {"x": torch.zeros(())}, {"y": torch.zeros(())},
        ... )
        >>> x = torch.tensor([0.0, 1.0, 2.0])
        >>> hypergradients(problem, solver=Implicit(), upper={"x": x}, lower={"y": x}).grad["x"]
        tensor([-3., -2., -1.])
    """
    refuse_no_problem(problem)
    solver = given_solver(solver)
    refuse_no_list(lower_batches, upper_batch)
    flag("throw", throw)
    tasks = Tasks(
        problem,
        _members(problem, upper, lower),
        share_upper=False,
        share_batch=share_batches,
        vectorize=vectorize,
    )
    members = _Members(tasks)
    given = _stacked(problem, "upper", upper, tasks), _stacked(problem, "lower", lower, tasks)
    seed = whole("seed", seed, *SEEDS)
    levels: tuple[Level, ...] = ("upper", "lower") if solver.num_lower_batches() else ("upper",)
    with attentive:
        if not examined(problem, levels):
            first = [tasks.apart(batch)[0] for batch in (upper_batch, *lower_batches)]
            examine(Oracles(problem, first[0], first[1:], seed=seed), levels, whole=len(levels) > 1)
        oracles = Oracles(members, upper_batch, lower_batches, seed=seed).at(*given)
        residuals = _residuals(oracles, tasks.num_tasks)
        if solver.separates():
            found = solver.solve(oracles, throw=throw)
            return _record([found], found.logs["values"], found.grad, residuals, True)
        batches = [tasks.apart(batch) for batch in (upper_batch, *lower_batches)]
        each = []
        for i in range(tasks.num_tasks):
            alone = Oracles(problem, batches[0][i], [b[i] for b in batches[1:]], seed=seed)
            upper_i, lower_i = ({n: t[i] for n, t in tree.items()} for tree in given)
            each.append(solver.solve(alone.at(upper_i, lower_i), throw=throw))
    grad = {name: torch.stack([one.grad[name] for one in each]) for name in each[0].grad}
    return _record(each, torch.stack([one.value for one in each]), grad, residuals, False)


@final
class _Members(Problem):
    """Independent problems side by side, which tell the upper loss of each."""

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.tasks, self.separate = tasks, tasks.separate
        self.upper, self.lower = tasks.upper, tasks.lower
        self.stops_lower_gradient = tasks.stops_lower_gradient

    def upper_loss(self, batch: Any) -> Loss:
        values = self.tasks.losses("upper", batch)[0]
        return values.sum(), {"values": values}

    def lower_loss(self, batch: Any) -> Loss:
        return self.tasks.losses("lower", batch)[0].sum()


def _members(
    problem: Problem, upper: Mapping[str, Tensor] | None, lower: Mapping[str, Tensor] | None
) -> int:
    """How many members there are."""
    for level, tree in (("upper", upper), ("lower", lower)):
        for name, tensor in ({} if tree is None else tree).items():
            a_tensor(f"{level}[{name!r}]", tensor)
            if tensor.ndim:
                return len(tensor)
    raise ValueError(
        f"neither `upper` nor `lower` says how many members of `{type(problem).__name__}` there are; "
        "give variables with a first dimension that counts them"
    )


def _stacked(
    problem: Problem, level: Level, given: Mapping[str, Tensor] | None, tasks: Tasks
) -> Tree:
    """The variables of a level for all members."""
    own = problem.variables(level)
    found = {n: p.detach().expand(tasks.num_tasks, *p.shape) for n, p in own.items()}
    for name, tensor in ({} if given is None else given).items():
        if name not in own:
            raise ValueError(
                f"`{type(problem).__name__}` has no {level} variable `{name}`; {nearest(name, own)}"
            )
        a_tensor(f"{level}[{name!r}]", tensor)
        wanted = (tasks.num_tasks, *own[name].shape)
        if tensor.shape != wanted:
            raise ValueError(
                f"`{level}[{name!r}]` has shape {tuple(tensor.shape)}; for {tasks.num_tasks} members "
                f"it must have {tuple(wanted)}"
            )
        found[name] = tensor.detach().to(own[name])
    return found


def _residuals(oracles: Oracles, num: int) -> Tensor:
    """The norm of each member's lower gradient, of the mean over the lower batches."""
    points = leaves(oracles.lower)
    with torch.enable_grad():
        grads = [
            fill(
                list(oracles.lower_gradient(oracles.upper, points, i)[1].values()),
                [*points.values()],
            )
            for i in range(len(oracles.lower_batches))
        ]
    mean = [torch.stack(parts).mean(dim=0) for parts in zip(*grads, strict=True)]
    rows = torch.cat([g.reshape(num, -1) for g in mean], dim=1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _record(
    found: Sequence[Hypergradient], values: Tensor, grad: Tree, residuals: Tensor, at_once: bool
) -> Hypergradients:
    ended = [one.result for one in found]
    worst = next((r for r in ended if r is not Result.SUCCESS), Result.SUCCESS)
    products = max(one.stats.num_products for one in found)
    return Hypergradients(values.detach(), grad, worst, residuals, products, at_once)
