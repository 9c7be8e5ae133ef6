"""A product with the mixed second derivative of the lower loss, by two of its gradients."""

import torch

from bilevel.oracles import Oracles
from bilevel.tree import Tree, add, norm


def cross_difference(
    oracles: Oracles, upper: Tree, lower: Tree, direction: Tree, length: float
) -> Tree:
    r"""The product of a direction with d2G/(dy dx), by a central difference.

    $$ (\partial^2_{yx} G)^\top w \approx \frac{|w|}{2 r} \Big( \partial_x G(x, y + r w / |w|)
       - \partial_x G(x, y - r w / |w|) \Big) $$

    Exact where G is at most quadratic in y, else with an error of $O(r^2)$; a direction that is 0 has
    the product 0.

    Args:
        oracles: the losses.
        upper: the upper variables x.
        lower: the lower variables y.
        direction: the direction w, a tree over lower variables.
        length: how far from y the two gradients are taken, r.

    Raises:
        ValueError: if lower variables are in half precision, whose rounding is larger than r.
    """
    for name, y in lower.items():
        if y.dtype.itemsize < 4:
            raise ValueError(
                f"a difference of two gradients needs lower variables in float32 or float64, but "
                f"`{name}` is in {y.dtype}, and displacements of {length:g} over all variables are lost "
                f"in its rounding; make it `.float()`, or use `Unrolled(1)`"
            )
    size = norm(direction)
    unit = length / torch.where(size == 0, torch.ones_like(size), size)
    whole = {n: direction.get(n, torch.zeros_like(y)) for n, y in lower.items()}
    there = {n: w * unit.to(w.dtype) for n, w in whole.items()}
    plus, minus = (
        oracles.partials("lower", upper, add(lower, there, sign))[1] for sign in (1.0, -1.0)
    )
    scale = size / (2 * length)
    return {n: (g - minus[n]) * scale.to(g.dtype) for n, g in plus.items()}
