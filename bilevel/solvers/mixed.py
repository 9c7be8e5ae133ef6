"""One step back in the mixed mode of `Unrolled`: a gradient that carries a tangent."""

from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.autodiff import fill, gradients, vector_jacobian_product
from bilevel.distributed import mean_over_ranks
from bilevel.problem import Problem
from bilevel.solvers.tangents import random_like, roundoff
from bilevel.twins.base import Gradients
from bilevel.twins.moments import map_moments, moments_of

if TYPE_CHECKING:
    from bilevel.solvers.unrolling import Unrolling

Here: TypeAlias = tuple[int, list[Tensor], Any, Gradients]
Adjoint: TypeAlias = tuple[list[Tensor], list[Tensor] | None, list[Tensor]]

# settings whose products were compared with those of reverse mode, for each problem
_VERIFIED: WeakKeyDictionary[Problem, set[str]] = WeakKeyDictionary()


def mixed_back(steps: "Unrolling", here: Here, adjoint: Adjoint) -> Adjoint:
    """The adjoint before a step from the one after it.

    Raises:
        RuntimeError: if torch has no forward derivative of an operation of the lower loss.
        ValueError: if torch's forward derivative is another one than its reverse.
    """
    t, *given = here
    _verify(steps, here)
    try:
        back: Adjoint = steps.unit("mixed", _pulled, t, *given, *adjoint)
    except (NotImplementedError, RuntimeError) as error:  # e.g. `F.mse_loss`
        raise RuntimeError(
            "torch cannot differentiate the gradient of this lower loss in forward mode "
            f"({str(error).splitlines()[0]}); use `mode='checkpoint'`"
        ) from error
    return back


def _verify(steps: "Unrolling", here: Here) -> None:
    """Compare the adjoint of one step with that of reverse mode, once per problem.

    torch has operations whose backward pass ignores tangents without a word.
    """
    done = _VERIFIED.setdefault(steps.oracles.problem, set())
    key = repr(steps.settings)
    if key in done:
        return
    t, points, state, _ = here
    generator = torch.Generator().manual_seed(0)
    adjoint = [random_like(p, generator) for p in points]
    nothing = [torch.zeros_like(x) for x in steps.upper.values()]
    try:
        reverse = steps.unit(
            "adjoint", type(steps).pull_back, t, points, state, adjoint, None, nothing
        )
    except (NotImplementedError, RuntimeError):  # no second derivative in reverse mode
        return
    done.add(key)  # before the first use: there is no way back into it
    mixed = mixed_back(steps, here, (adjoint, None, nothing))
    parts = (mixed[0], reverse[0]), (mixed[2], reverse[2])
    for name, (found, truth) in zip(("lower", "upper"), parts, strict=True):
        means = mean_over_ranks(found), mean_over_ranks(truth)
        apart = sum(float((a - b).abs().sum()) for a, b in zip(*means, strict=True))
        size = sum(float(a.abs().sum()) + float(b.abs().sum()) for a, b in zip(*means, strict=True))
        if apart > size * roundoff(steps) ** 0.4:
            done.discard(key)
            raise ValueError(
                f"`{steps.settings}`: torch's forward mode gives another second derivative of this "
                f"lower loss in the {name} variables than its reverse mode (they differ by "
                f'{apart / size:.1e}); use `mode="checkpoint"`'
            )


def _pulled(
    steps: "Unrolling",
    points: list[Tensor],
    state: Any,
    grads: Gradients,
    of_y: list[Tensor],
    of_s: list[Tensor] | None,
    total: list[Tensor],
) -> Adjoint:
    """The adjoint before the step: through the optimizer, then through the gradient."""
    points = [p.detach() for p in points]
    lower = {n: y.detach() for n, y in steps.twin.unpack(points).items()}
    leaves = {n: g if g is None else g.detach().requires_grad_() for n, g in grads.items()}
    sources = {n: g for n, g in leaves.items() if g is not None}
    points = [p.requires_grad_() for p in points]
    state = map_moments(lambda s: s.detach().requires_grad_(), state)
    after, next_state = steps.moved(points, state, leaves)
    of_s = of_s or [torch.zeros_like(s) for s in moments_of(next_state)]
    moments = moments_of(state)
    inputs = [*points, *moments, *steps.upper.values(), *sources.values()]
    outputs = [*after, *moments_of(next_state)]
    found = iter(vector_jacobian_product(outputs, inputs, [*of_y, *of_s], retain_graph=False))
    back_y = [next(found) for _ in points]
    back_s = [next(found) for _ in moments]
    of_x = [next(found) for _ in total]
    products = _products(steps, lower, dict(zip(sources, found, strict=True)))
    through = steps.twin.pack(products[0])
    back_y = [a + b for a, b in zip(back_y, through, strict=True)]
    total = [a + b + c for a, b, c in zip(total, of_x, products[1], strict=True)]
    return back_y, back_s, total


def _products(
    steps: "Unrolling", lower: dict[str, Tensor], directions: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The second derivatives in (y, y) and (x, y) times a direction, from one gradient."""
    with forward_ad.dual_level():
        upper = {n: x.detach().requires_grad_() for n, x in steps.upper.items()}
        at = {n: y.detach().requires_grad_() for n, y in lower.items()}
        at.update({n: forward_ad.make_dual(at[n], v) for n, v in directions.items()})
        loss = steps.oracles.evaluate("lower", upper, at, 0).loss
        found = gradients(loss, [*upper.values(), *at.values()])
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
        tangents = [None if t is None else t.detach() for t in tangents]
    of_x = fill(tangents[: len(upper)], list(upper.values()))
    of_y = fill(tangents[len(upper) :], list(at.values()))
    # the adjoint is the same on all ranks; what x is given is averaged at the end
    return dict(zip(at, mean_over_ranks(of_y), strict=True)), [x.detach() for x in of_x]
