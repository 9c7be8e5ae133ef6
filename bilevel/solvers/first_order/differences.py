"""Weights of finite differences."""

from fractions import Fraction


def difference_weights(order: int) -> dict[int, float]:
    """The weights c_j of the first derivative at 0 that are exact for polynomials of a degree.

    Example:
        >>> difference_weights(1), difference_weights(2)
        ({0: -1.0, 1: 1.0}, {-1: -0.5, 1: 0.5})
    """
    nodes = range(-(order // 2), order - order // 2 + 1)
    found = {j: Fraction(0) for j in nodes}
    for j in nodes:  # the derivative at 0 of Lagrange's polynomial that is 1 at j
        for left in set(nodes) - {j}:
            term = Fraction(1, j - left)
            for k in set(nodes) - {j, left}:
                term *= Fraction(-k, j - k)
            found[j] += term
    return {j: float(c) for j, c in found.items() if c}
