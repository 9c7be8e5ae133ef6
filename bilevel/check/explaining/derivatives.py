r"""Whether the losses depend on a variable where autograd says they do.

A `.detach()`, a `float(...)` or a `torch.no_grad()` on the way changes no value, only derivatives. So
each derivative is compared with a difference quotient along a random direction: that of a loss itself,

$$ \nabla L \cdot d \quad\text{and}\quad \frac{L(\cdot + h d) - L(\cdot - h d)}{2h} , $$

and, because an implicit or unrolled hypergradient differentiates the lower gradient, that of
$v^\top \nabla_y G$ in each upper variable and in the lower ones.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel.autodiff import fill, gradients
from bilevel.check.differences import sizes
from bilevel.check.explaining.page import Diagnosis
from bilevel.check.explaining.scene import Scene
from bilevel.problem import Level
from bilevel.tree import Tree

_MOST = 24  # variables of a level that are looked at one by one; the others together
_CAUSES = (
    "look for a `.detach()`, a `float(...)` or `.item()`, a `torch.no_grad()` or a rounding between "
    "it and the loss, and take it away"
)
TOPIC = "stopped gradient"


@final
class Quotient(NamedTuple):
    """A directional derivative by autograd and by differences.

    Attributes:
        autograd: the derivative.
        differences: the difference quotient, at the smaller of two steps.
        noise: how far the difference quotient may be off.
    """

    autograd: float
    differences: float
    noise: float

    def off(self, tolerance: float) -> float:
        """By how much the two differ, relative to the larger; 0 where it is within the noise."""
        gap = abs(self.autograd - self.differences)
        size = max(abs(self.autograd), abs(self.differences))
        return gap / size if gap > tolerance * size + 3 * self.noise else 0.0


@final
class Slopes:
    """Derivatives of the losses of a scene's copy along random directions."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._oracles = scene.oracles
        self._generator = torch.Generator().manual_seed(scene.seed)
        self.step = scene.rounding**0.25
        self.tolerance = 0.02 if scene.double else 0.2

    def direction(self, tree: Tree) -> Tree:
        """A random direction in which each entry moves in proportion to its size."""
        found = {}
        for name, point in tree.items():
            drawn = torch.randn(point.shape, generator=self._generator, dtype=torch.float64)
            found[name] = drawn.to(point) * sizes(point.detach().reshape(-1)).view(point.shape)
        return found

    def of_loss(self, level: Level, where: Level, names: list[str]) -> Quotient:
        """Of a loss in variables of one level."""
        upper, lower = self._oracles.upper, self._oracles.lower
        own = upper if where == "upper" else lower
        direction = self.direction({n: own[n] for n in names})

        def value(t: float) -> float:
            at = _moved(own, direction, t)
            pair = (at, lower) if where == "upper" else (upper, at)
            return sum(self._losses(level, *pair)) / self._count(level)

        losses = [
            self._oracles.evaluate(level, upper, lower, i).loss for i in range(self._count(level))
        ]
        leaves = [own[n] for n in names]
        grads = fill(gradients(torch.stack(losses).mean(), leaves), leaves)
        slope = sum(float((g * direction[n]).sum()) for n, g in zip(names, grads, strict=True))
        return self._quotient(value, slope, 0.0)

    def of_lower_gradient(self, where: Level, names: list[str]) -> Quotient:
        """Of the lower gradient, along a random vector, in variables of one level."""
        upper, lower = self._oracles.upper, self._oracles.lower
        own = upper if where == "upper" else lower
        direction = self.direction({n: own[n] for n in names})
        linear = self._oracles.linearize_lower(upper, lower)
        vector = torch.randn(linear.layout.size, generator=self._generator, dtype=torch.float64)
        vector = vector.to(linear.gradient)

        def value(t: float) -> float:
            at = _moved(own, direction, t)
            pair = (at, lower) if where == "upper" else (upper, at)
            return float(vector @ self._oracles.linearize_lower(*pair).gradient)

        if where == "upper":
            product = linear.cross(vector)
        else:
            parts = linear.layout.unravel(linear.hessian(vector))
            product = dict(zip(lower, parts, strict=True))
        slope = sum(float((product[n] * direction[n]).sum()) for n in names)
        # a gradient that vanishes is a sum of terms that do not, and has their rounding
        spectrum, point = (
            self._scene.spectrum,
            linear.layout.ravel([y.detach() for y in lower.values()]),
        )
        reach = 0.0 if spectrum is None else spectrum.reach
        terms = float(linear.gradient.norm()) + reach * float(point.norm() + len(point) ** 0.5)
        return self._quotient(value, slope, float(vector.norm()) * terms)

    def _count(self, level: Level) -> int:
        return len(self._oracles.lower_batches) if level == "lower" else 1

    def _losses(self, level: Level, upper: Tree, lower: Tree) -> Iterator[float]:
        for index in range(self._count(level)):
            yield float(self._oracles.evaluate(level, upper, lower, index).loss.detach())

    def _quotient(self, value: Callable[[float], float], slope: float, largest: float) -> Quotient:
        """The quotient; `largest` is the size of what is added up in a value."""
        quotients = []
        for step in (self.step, self.step / 4):
            ends = value(step), value(-step)
            largest = max(largest, *map(abs, ends))
            quotients.append((ends[0] - ends[1]) / (2 * step))
        rounding = 4 * self._scene.rounding * largest / self.step
        return Quotient(slope, quotients[1], abs(quotients[1] - quotients[0]) + rounding)


def _moved(tree: Tree, direction: Tree, t: float) -> Tree:
    def at(name: str, point: Tensor) -> Tensor:
        if name not in direction:
            return point
        return (point.detach() + t * direction[name]).requires_grad_()

    return {name: at(name, point) for name, point in tree.items()}


def stopped_gradients(scene: Scene) -> Iterator[Diagnosis]:
    """Derivatives that autograd does not see, by name of the variable."""
    with scene.twice():
        slopes = Slopes(scene)
        found = list(_stopped(scene, slopes))
    if found:
        yield from found
        return
    yield Diagnosis(
        TOPIC,
        "fine",
        0.0,
        "autograd and difference quotients of both losses agree in every variable",
    )


def _stopped(scene: Scene, slopes: Slopes) -> Iterator[Diagnosis]:
    levels: tuple[Level, ...] = ("upper", "lower")
    declared = scene.problem.stops_lower_gradient is not None
    twice, most = scene.second_order is None and not declared, slopes.tolerance
    for level in levels:
        if level == "lower" and (declared or not scene.oracles.lower):
            continue
        for where in levels:
            if (level, where) == ("lower", "upper") and twice:
                continue  # its derivative does not count, that of the lower gradient does
            if names := _guilty(scene, where, partial(slopes.of_loss, level, where), most):
                scene.cut.update(names if where == "upper" else ())
                yield _in_loss(level, where, names, meant=declared)
    for where in levels if twice else ():
        if names := _guilty(scene, where, partial(slopes.of_lower_gradient, where), most):
            scene.cut.update(names if where == "upper" else ())
            yield _in_lower_gradient(where, names)


def _groups(names: list[str]) -> list[list[str]]:
    single, rest = names[:_MOST], names[_MOST:]
    return [*([name] for name in single), *([rest] if rest else [])]


def _guilty(
    scene: Scene, where: Level, quotient: Callable[[list[str]], Quotient], most: float
) -> list[str]:
    """The variables of a level along which the derivative is off, in two directions each."""
    tree = scene.oracles.upper if where == "upper" else scene.oracles.lower
    groups = _groups(list(tree))
    return [
        name
        for group in groups
        if all(quotient(group).off(most) > 0 for _ in range(2))
        for name in group
    ]


def _in_loss(level: Level, where: Level, names: list[str], *, meant: bool) -> Diagnosis:
    """`meant`: the problem says that it stops gradients; its losses may be surrogates."""
    said = _listed(names)
    return Diagnosis(
        TOPIC,
        "look" if meant else "wrong",
        float(len(names)),
        f"the {level} loss changes with the {where} {said} otherwise than autograd says, so part of "
        "its gradient is cut off",
        f"in `{level}_loss`, {_CAUSES}" + ", unless only its gradient is meant" * meant,
    )


def _in_lower_gradient(where: Level, names: list[str]) -> Diagnosis:
    said = _listed(names)
    effect = (
        "no response, or a wrong one, arrives there"
        if where == "upper"
        else "products with the lower Hessian are wrong"
    )
    return Diagnosis(
        TOPIC,
        "wrong",
        float(len(names)),
        f"the lower gradient changes with the {where} {said} otherwise than autograd says: {effect}",
        f"in `lower_loss`, {_CAUSES}",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"variable{'s' if len(names) > 1 else ''} {shown}{more}"
