"""Recursive momentum in both levels: what `SUSTAIN` and `MRBO` share."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from bilevel.oracles import Oracles
from bilevel.solvers.answers import Directions
from bilevel.solvers.single_loop.samples import (
    OfLower,
    OfUpper,
    as_scalar,
    at_once,
    kept,
    move_both,
    of_lower,
    of_upper,
    recursive,
    zeros,
)
from bilevel.tree import Tree, leaves

Inverse: TypeAlias = Callable[[tuple[Tree, Tree], Tensor], Tensor]


def begin_momenta(oracles: Oracles) -> dict[str, Any]:
    """The point of the call before, and the estimates."""
    y, x = zeros(oracles.lower), zeros(oracles.upper)
    before = kept(oracles.upper), kept(oracles.lower)
    return {"calls": 0, "before": before, "estimate": [y, x, x]}


def double_momentum(
    oracles: Oracles, key: Any, state: Any, weight: float, inverse: Inverse, num_products: int
) -> Directions:
    """The directions, each with recursive momentum, on the first lower batch.

    Args:
        oracles: the losses.
        key: what tells the solver from others.
        state: as `begin` returns it.
        weight: of the plain sample; the first call has no other.
        inverse: (point, dF/dy there) -> an estimate of the inverse Hessian's product with it.
        num_products: how many products `inverse` takes at one point.
    """
    now = oracles.upper, oracles.lower
    told, of_f, old_f = at_once(oracles, (key, "upper"), _of_uppers, state["before"])
    vector = -inverse(now, of_f.by_lower)
    old = -inverse(state["before"], old_f.by_lower)
    share = as_scalar(oracles, weight if state["calls"] else 1.0)
    given = (
        state["before"],
        [vector, old],
        [of_f.by_upper, old_f.by_upper],
        state["estimate"],
        share,
    )
    estimate = at_once(oracles, (key, "lower"), _mixed, *given)
    gradient, cross, direct = estimate
    after = state | {
        "calls": state["calls"] + 1,
        "before": tuple(map(kept, now)),
        "estimate": estimate,
    }
    parts = OfLower(gradient, gradient[:0], cross), OfUpper(of_f.by_lower, direct)
    return move_both(oracles, told, *parts, after, num_products=2 * num_products)


def _of_uppers(here: Oracles, upper: Tree, lower: Tree, before: Any) -> Any:
    told, of_f = of_upper(here, upper, lower)
    return told, of_f, of_upper(here, leaves(before[0]), leaves(before[1]))[1]


def _mixed(
    here: Oracles,
    upper: Tree,
    lower: Tree,
    before: Any,
    vectors: list[Tensor],
    direct: list[Tensor],
    estimate: list[Tensor],
    weight: Tensor,
) -> list[Tensor]:
    x, y = leaves(before[0]), leaves(before[1])
    new = of_lower(here, upper, lower, vectors[0], product=False)
    old = of_lower(here, x, y, vectors[1], product=False)
    news, olds = (new.gradient, new.cross, direct[0]), (old.gradient, old.cross, direct[1])
    triples = zip(news, estimate, olds, strict=True)
    return [recursive(g, d, was, weight) for g, d, was in triples]
