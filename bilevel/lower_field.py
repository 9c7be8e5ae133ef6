r"""The lower level as a vector field whose zero is its answer: a gradient, a condition, or constrained.

All that a solver needs of the lower level is a field $c(x, y)$ with $c(x, y^*(x)) = 0$; the implicit
function theorem asks for nothing else. Without constraints it is $\partial_y G$ or what
`Problem.lower_condition` returns. With constraints there are two fields with the same zeros. The one
that optimizers step along is the proximal gradient,

$$ c(x, y) = \tfrac1s \big( y - \operatorname{prox}_s(y - s\, g(x, y)) \big), $$

so that a plain step of rate $s$ is a proximal step and no optimizer has to know of constraints. Its
derivative is not symmetric. Solvers of linear systems get the same equations reduced to the face of the
answer: near $u = y - s g$ the prox is $D u + k$ with a projector $D$, and with
$\bar y = D y + (I - D) k$, the point of the face that belongs to $y$,

$$ \bar c(x, y) = D \big( g(x, \bar y) - \tfrac1s k \big) + y - \bar y , \qquad
   \partial_y \bar c = D\, \partial_y g\, D + (I - D), $$

which is symmetric and positive definite where $G$ is strictly convex: conjugate gradients apply.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel.compile import known
from bilevel.constraints import Constraint
from bilevel.problem import Problem
from bilevel.refusals import shown
from bilevel.tree import Tree

if TYPE_CHECKING:
    from bilevel.oracles import Oracles

Gradients = dict[str, Tensor | None]


@final
@dataclass(frozen=True)
class Face:
    """The face of the constraints that the answer lies on, as far as the current variables tell.

    Attributes:
        at: the point of the face that belongs to the lower variables, differentiable.
        complete: the gradient there as a list -> the reduced field as a list.
    """

    at: Tree
    complete: Callable[[list[Tensor]], list[Tensor]]


@final
class Constraints:
    """The constraints on the lower variables, at given upper variables.

    Args:
        records: what `Problem.lower_constraints` returned.
        problem: the problem.
        lower: its lower variables.

    Raises:
        TypeError: if a value is no constraint.
        ValueError: if a name is that of no lower variable.
    """

    def __init__(self, records: Any, problem: Problem, lower: Tree) -> None:
        what = f"`{type(problem).__name__}.lower_constraints`"
        if not isinstance(records, Mapping):
            raise TypeError(
                f"{what} must return a dict from names of lower variables to constraints, got "
                f"{shown(records)}"
            )
        for name, record in records.items():
            if name not in lower:
                names = ", ".join(f"`{n}`" for n in lower)
                raise ValueError(f"{what} names `{name}`; the lower variables are {names}")
            if not isinstance(record, Constraint):
                raise TypeError(
                    f"{what} must give a constraint such as `Box(0.0)` or `L1(0.1)` for `{name}`, "
                    f"got {shown(record)}"
                )
        self._records: dict[str, Constraint] = dict(records)
        self._step = float(problem.proximal_step)

    def condition(self, lower: Tree, grads: Gradients) -> Gradients:
        """The proximal gradient, differentiable if the gradient and the variables are."""
        found = dict(grads)
        for name, record in self._records.items():
            point = lower[name]
            moved = self._ahead(point, grads[name])
            found[name] = (point - record.prox(moved, self._step)) / self._step
        return found

    def face(self, lower: Tree, grads: Mapping[str, Tensor | None]) -> Face:
        """The face that a step along the gradient ends on."""
        at = dict(lower)
        projectors: dict[str, Callable[[Tensor], Tensor]] = {}
        pulls: dict[str, Tensor] = {}
        for name, record in self._records.items():
            moved = self._ahead(lower[name], grads[name]).detach()
            if known(partial(self._at_kink, record, moved)):
                _warn(name, record)
            project = record.tangent(moved, self._step)
            shift = record.prox(moved, self._step) - project(moved)  # k
            pulls[name] = project(shift) / self._step
            at[name] = project(lower[name]) + shift - project(shift)
            projectors[name] = project

        def complete(gradient: list[Tensor]) -> list[Tensor]:
            found = []
            for name, g in zip(lower, gradient, strict=True):
                if name in projectors:
                    g = projectors[name](g - pulls[name]) + lower[name] - at[name]
                found.append(g)
            return found

        return Face(at, complete)

    def projected(self, lower: Tree) -> Tree:
        """The variables that have a set to stay in, put back into it; differentiable."""
        bounded = {n: record for n, record in self._records.items() if record.bounds}
        return {n: record.prox(lower[n], self._step) for n, record in bounded.items()}

    def refuse_violated(self, lower: Tree, when: str, advice: str) -> None:
        """Refuse variables that lie outside of their set by more than rounding.

        Args:
            lower: the lower variables.
            when: when that was found, such as "at the start".
            advice: what to do.

        Raises:
            ValueError: naming the variable and the distance.
        """
        for name, record in self._records.items():
            point = lower[name].detach()
            most = 100 * torch.finfo(point.dtype).eps * (1 + float(point.abs().max()))
            if not (off := float(record.violation(point).detach())) <= most:
                raise ValueError(
                    f"the lower variable `{name}` violates its constraint `{type(record).__name__}` by "
                    f"{off:.3g} {when}; {advice}"
                )

    def _ahead(self, point: Tensor, grad: Tensor | None) -> Tensor:
        return point if grad is None else point - self._step * grad

    def _at_kink(self, record: Constraint, moved: Tensor) -> Tensor:
        rounding = torch.finfo(moved.dtype).eps ** 0.75 * moved.abs().amax()
        near: Tensor = record.margin(moved, self._step).detach() <= rounding
        return near


def _warn(name: str, record: Constraint) -> None:
    warnings.warn(
        f"the lower level is at a kink: an entry of `{name}` is just held by `{type(record).__name__}`, "
        "with no force to spare, so the answer has two one-sided derivatives; the one given is that "
        "with the entry held",
        RuntimeWarning,
        stacklevel=2,
    )


def field(out: Any, problem: Problem, lower: Tree) -> Tree:
    """What `Problem.lower_condition` returned, in the order of the lower variables.

    Raises:
        TypeError: if it is no dict of real tensors.
        ValueError: if names or shapes are not those of the lower variables.
    """
    what = f"`{type(problem).__name__}.lower_condition`"
    if not isinstance(out, Mapping):
        raise TypeError(
            f"{what} must return a dict with a tensor for each lower variable, got {shown(out)}"
        )
    missing = [n for n in lower if n not in out]
    frozen = dict(problem.lower.named_parameters())
    more = [n for n in out if n not in lower and n not in frozen]
    if missing or more:
        odd = f"lacks `{missing[0]}`" if missing else f"has `{more[0]}`, which is no lower variable"
        raise ValueError(
            f"{what} {odd}: there must be one equation for each entry of each lower variable "
            f"({', '.join(f'`{n}`' for n in lower)}), under its name"
        )
    for name, point in lower.items():
        part = out[name]
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got = f"{part.dtype}" if isinstance(part, Tensor) else shown(part)
            raise TypeError(f"{what} must give a tensor of floating point for `{name}`, got {got}")
        if part.shape != point.shape:
            raise ValueError(
                f"{what} gives `{name}` the shape {tuple(part.shape)}, but the variable has "
                f"{tuple(point.shape)}: as many equations as unknowns are needed, so that the answer is "
                "one point"
            )
    return {name: out[name].to(point.dtype) for name, point in lower.items()}


def half_square(parts: Mapping[str, Tensor]) -> Tensor:
    """Half the squared norm of a condition: what stands for the lower loss in logs."""
    return torch.stack([part.square().sum() for part in parts.values()]).sum() / 2


def hold(oracles: "Oracles") -> None:
    """Put the problem's lower variables back into the sets that they must stay in, if there are any."""
    if not oracles.problem.constrains_lower:
        return
    lower, variables = oracles.lower, oracles.slots.variables("lower")
    inside = oracles.constraints(oracles.upper, lower).projected(lower)
    with torch.no_grad():
        for name, value in inside.items():
            variables[name].copy_(value)
