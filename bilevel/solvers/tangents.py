"""Forward mode of `Unrolled`: tangents carried through the steps, nothing kept."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.distributed import mean_over_ranks
from bilevel.losses.initial import initial_lower
from bilevel.problem import Problem
from bilevel.solvers.base import ResponseProduct
from bilevel.tree import Tree
from bilevel.twins.moments import map_moments, moments_of, replace_moments

if TYPE_CHECKING:
    from bilevel.solvers.unrolling import Unrolling

Start: TypeAlias = tuple[int, list[Tensor], Any]

_VERIFIED_STEPS = 3
# settings whose forward mode was compared with reverse mode, for each problem
_VERIFIED: WeakKeyDictionary[Problem, set[tuple[str, int]]] = WeakKeyDictionary()


def tangent_product(steps: "Unrolling", start: Start) -> Callable[[Tree], ResponseProduct]:
    """The vector-Jacobian product by forward mode, an entry of x at a time.

    Args:
        steps: the unrolling.
        start: its first differentiated step, the points and the state there.
    """

    def vjp(cotangent: Tree) -> ResponseProduct:
        target, last = steps.twin.pack(cotangent), steps.settings.num_steps
        # flat: `zeros_like` would take over the strides of a transposed variable
        product = {name: x.new_zeros(x.numel()) for name, x in steps.upper.items()}
        verify(steps, start)
        for name, x in steps.upper.items():
            for i in range(x.numel()):
                direction = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
                direction[i] = 1
                tangents = _tangents(steps, start, {name: direction.view(x.shape)}, last)
                product[name][i] = inner(tangents, target)
        return steps.product([product[n].view(x.shape) for n, x in steps.upper.items()])

    return vjp


def verify(steps: "Unrolling", start: Start) -> None:
    """Compare forward mode with reverse mode, <v, J d> = <J^T v, d>, once per problem.

    torch has operations (and scripted and compiled modules have more) whose backward pass ignores
    tangents without a word. A few steps show that: in the first, x moves, in the next y and the
    optimizer's state.
    """
    done = _VERIFIED.setdefault(steps.oracles.problem, set())
    key = repr(steps.settings), len(steps.upper)
    if key in done:
        return
    first, points, state = start
    last = min(first + _VERIFIED_STEPS, steps.settings.num_steps)
    generator = torch.Generator().manual_seed(0)
    target = [random_like(p, generator) for p in points]
    path = [start]
    for t in range(first, last):
        points = [p.detach().requires_grad_() for p in points]
        after, state = steps.step(steps.upper, points, state, t, create_graph=False)
        points, state = [p.detach() for p in after], map_moments(Tensor.detach, state)
        path.append((t + 1, points, state))
    try:
        product = mean_over_ranks(
            steps.through_start(*steps.adjoint(path[:-1], target))
        )  # as `_product` does
    except (NotImplementedError, RuntimeError):  # no second derivative in reverse mode
        return
    for (name, x), reverse in zip(steps.upper.items(), product, strict=True):
        direction = random_like(x, generator)
        tangents = mean_over_ranks(_tangents(steps, start, {name: direction}, last))
        one, other = inner(tangents, target), inner([reverse], [direction])
        size = inner([t.abs() for t in tangents], [v.abs() for v in target])
        size = size + inner([reverse.abs()], [direction.abs()])
        if bool((one - other).abs() > size * roundoff(steps) ** 0.4):
            raise ValueError(
                f"`{steps.settings}`: torch's forward mode gives another derivative of this lower "
                f"loss in `{name}` than its reverse mode ({float(one):.3g} and {float(other):.3g} "
                'along one direction); use `mode="recompute"`'
            )
    done.add(key)


def roundoff(steps: "Unrolling") -> float:
    """The coarsest machine epsilon among the variables and the losses."""
    dtypes = [v.dtype for v in (*steps.upper.values(), *steps.oracles.lower.values())]
    dtypes += [steps.oracles.precision] if steps.oracles.precision else []
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _tangents(steps: "Unrolling", start: Start, directions: Tree, last: int) -> list[Tensor]:
    """d(points before step `last`) along directions of upper variables."""
    try:
        return _push_forward(steps, start, directions, last)
    except (NotImplementedError, RuntimeError) as error:  # e.g. `F.mse_loss`
        raise RuntimeError(
            "torch cannot differentiate this lower loss in forward mode "
            f"({str(error).splitlines()[0]}); use `mode='recompute'`"
        ) from error


def _push_forward(steps: "Unrolling", start: Start, directions: Tree, last: int) -> list[Tensor]:
    first, points, state = start
    if steps.oracles.units.compiled:  # one graph for the directions of all variables
        still = {n: torch.zeros_like(x) for n, x in steps.upper.items()}
        directions = {**still, **directions}
    nothing: list[Tensor | None] = [None] * (len(points) + len(moments_of(state)))
    tangents = [*_start(steps, directions), *nothing][: len(nothing)] if steps.made else nothing
    for t in range(first, last):
        given = points, state, tangents, directions
        points, state, tangents = steps.unit("tangent", pushed, t, *given)
    final = zip(tangents, points, strict=False)
    return [torch.zeros_like(p) if d is None else d for d, p in final]


def _start(steps: "Unrolling", directions: Tree) -> list[Tensor]:
    """The tangents of initial values that are made of the upper variables."""
    still = {n: torch.zeros_like(y) for n, y in steps.lower.items()}
    with forward_ad.dual_level():
        upper = {
            n: _dual(x.detach().requires_grad_(), directions.get(n)) for n, x in steps.upper.items()
        }
        pairs = {
            n: forward_ad.unpack_dual(y) for n, y in initial_lower(steps.oracles, upper).items()
        }
    moved = {n: d.detach() for n, (_, d) in pairs.items() if d is not None}
    return steps.twin.pack({**still, **moved})


def pushed(
    steps: "Unrolling",
    points: list[Tensor],
    state: Any,
    tangents: list[Tensor | None],
    directions: Tree,
) -> tuple[list[Tensor], Any, list[Tensor | None]]:
    """A step that carries tangents."""
    with forward_ad.dual_level():  # a level keeps its tangents, so one for each step
        upper = {
            n: _dual(x.detach().requires_grad_(), directions.get(n)) for n, x in steps.upper.items()
        }
        carried = iter(tangents)
        points = [_dual(p.detach().requires_grad_(), next(carried)) for p in points]
        duals = [_dual(s, next(carried)) for s in moments_of(state)]
        state = replace_moments(state, duals)
        # with its graph: torch's backward of a determinant (or a solve, a product) uses what
        # the forward pass kept, without tangents, unless it is to be differentiated itself
        points, state = steps.step(upper, points, state, 0, create_graph=True)
        pairs = [forward_ad.unpack_dual(d) for d in (*points, *moments_of(state))]
        tangents = [None if d is None else d.detach() for _, d in pairs]
        points = [p.detach() for p, _ in pairs[: len(points)]]
        state = replace_moments(state, [p.detach() for p, _ in pairs[len(points) :]])
    return points, state, tangents


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of a tensor's kind."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _dual(tensor: Tensor, tangent: Tensor | None) -> Tensor:
    dual: Tensor = tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
    return dual
