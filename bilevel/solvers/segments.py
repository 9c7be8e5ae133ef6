r"""Modes of `Unrolled` that keep few states: the way back goes segment by segment.

The first pass keeps the state at the beginning of every segment; on the way back a segment's steps are
run again from there, the last one first, and the adjoint is carried through it. With S segments the
last has about S steps, and each before it one more, for it may use what one kept state took: then
$T \approx 3 S^2 / 2$, and memory grows as $\sqrt T$, at the price of taking every step (but those of the
last segment) twice (Chen, Xu, Zhang, Guestrin, 2016, https://arxiv.org/abs/1604.06174, section 3, whose
segments are of one length).

*checkpoint* keeps the graph of one segment and differentiates it in reverse. *mixed* keeps no graph of
second order at all. A step is $(y', s') = \Phi(y, s, g)$ with $g = \nabla_y G(x, y)$. The adjoint
$\lambda$ of its answer is pulled back through $\Phi$ alone, with $g$ as a variable, which gives
$\hat g = (\partial_g \Phi)^\top \lambda$. Missing are products with the second derivatives,

$$ \nabla^2_{yy} G \, \hat g = \frac{d}{d\epsilon} \nabla_y G(x, y + \epsilon \hat g), \qquad
   (\nabla^2_{yx} G)^\top \hat g = \frac{d}{d\epsilon} \nabla_x G(x, y + \epsilon \hat g), $$

one gradient that carries a tangent (Kemaev et al., 2025, https://arxiv.org/abs/2505.00793, section 3).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from bilevel.autodiff import vector_jacobian_product
from bilevel.solvers.base import Response, ResponseProduct
from bilevel.solvers.mixed import Here, mixed_back
from bilevel.tree import Tree, norm
from bilevel.twins.moments import map_moments, moments_of

if TYPE_CHECKING:
    from bilevel.solvers.unrolling import Unrolling

Adjoint: TypeAlias = tuple[list[Tensor], list[Tensor] | None, list[Tensor]]  # of y, of s, of x
Back: TypeAlias = Callable[[Adjoint], Adjoint]


@final
class _Checkpoint(NamedTuple):
    """Where a segment begins, and how far it goes."""

    first: int
    last: int
    points: list[Tensor]
    state: Any


@final
class _Taken(NamedTuple):
    """A segment's end, the lower residual one step before, and the way back."""

    points: list[Tensor]
    state: Any
    residual: Tensor
    back: Back


def cuts(first: int, last: int) -> list[tuple[int, int]]:
    """The steps from `first` to `last` in segments, each as long as the one after it and one more."""
    count = max(1, round(math.sqrt(2 * (last - first) / 3)))
    spare = last - first - count * (count - 1) // 2  # what is not needed for the differences
    marks = [last]
    for i in range(count):
        marks.append(marks[-1] - (spare * (i + 1) // count - spare * i // count) - i)
    return list(pairwise(reversed(marks)))


def checkpointed(steps: "Unrolling", *, once: bool = False) -> Response:
    """The answer and its product, with the states at the segments' beginnings in memory.

    Args:
        steps: the unrolling.
        once: make one segment of all steps, which is reverse mode.
    """
    points, state = steps.prepared()
    take = _mixed if steps.settings.mode == "mixed" else _stages if steps.staged else _graph
    for t in range(steps.first):
        points, state, _ = steps.unit("step", type(steps).plain, t, points, state)
    ends = steps.first, steps.settings.num_steps
    *early, (first, last) = [ends] if once else cuts(*ends)
    kept = []
    for a, b in early:
        kept.append(_Checkpoint(a, b, points, state))
        for t in range(a, b):
            points, state, _ = steps.unit("step", type(steps).plain, t, points, state)
    kept.append(_Checkpoint(first, last, points, state))
    end = take(steps, kept.pop())
    ready = [end.back]

    def vjp(cotangent: Tree) -> ResponseProduct:
        if not ready:  # once more: what the way back used up has to be made again
            again = checkpointed(steps, once=once).vjp
            assert again is not None
            return again(cotangent)
        total = [torch.zeros_like(x) for x in steps.upper.values()]
        adjoint = ready.pop()((steps.twin.pack(cotangent), None, total))
        while kept:
            adjoint = take(steps, kept.pop()).back(adjoint)
        return steps.product(adjoint[2], adjoint[0])

    return Response(steps.twin.unpack(end.points), vjp, end.residual)


def _graph(steps: "Unrolling", segment: _Checkpoint) -> _Taken:
    """The segment's steps with one graph, which the way back uses up."""
    steps = steps.afresh()
    points = [p.detach().requires_grad_() for p in segment.points]
    state = map_moments(lambda s: s.detach().requires_grad_(), segment.state)
    inputs = [*steps.upper.values(), *points, *moments_of(state)]
    count = len(steps.upper), len(points)
    for t in range(segment.first, segment.last):
        points, state, grads = steps.taken(points, state, t)
    residual = norm([g.detach() for g in grads.values() if g is not None])
    ends = [[*points, *moments_of(state)]]

    def back(adjoint: Adjoint) -> Adjoint:
        of_y, of_s, total = adjoint
        outputs = ends.pop()
        of_s = of_s or [torch.zeros_like(s) for s in outputs[count[1] :]]
        found = vector_jacobian_product(outputs, inputs, [*of_y, *of_s], retain_graph=False)
        total = [a + g for a, g in zip(total, found[: count[0]], strict=True)]
        return found[count[0] : sum(count)], found[sum(count) :], total

    return _Taken([p.detach() for p in points], map_moments(Tensor.detach, state), residual, back)


def _stages(steps: "Unrolling", segment: _Checkpoint) -> _Taken:
    """The same where every step is a unit of its own."""
    stages: list[Any] = []
    for t in range(segment.first, segment.last):
        given = stages[-1].early[:2] if stages else (segment.points, segment.state)
        again = stages and steps.one_batch
        stages.append(stages[-1].follow() if again else steps.stage(t, *given))
    points, state, residual = stages[-1].early

    def back(adjoint: Adjoint) -> Adjoint:
        of_y, of_s, total = adjoint
        of_s = of_s or [torch.zeros_like(s) for s in moments_of(state)]
        while stages:
            of_y, of_s, total = stages.pop()(of_y, of_s, total)
        return of_y, of_s, total

    return _Taken(points, state, residual, back)


def _mixed(steps: "Unrolling", segment: _Checkpoint) -> _Taken:
    """The segment's states and gradients; a step's adjoint is computed when it is its turn."""
    points, state, residual = segment.points, segment.state, torch.zeros(())
    path: list[Here] = []
    for t in range(segment.first, segment.last):
        here = t, points, state
        points, state, residual, grads = steps.unit("felt", type(steps).felt, t, points, state)
        path.append((*here, grads))

    def back(adjoint: Adjoint) -> Adjoint:
        while path:
            adjoint = mixed_back(steps, path.pop(), adjoint)
        return adjoint

    return _Taken(points, state, residual, back)
