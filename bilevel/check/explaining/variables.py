"""Which upper variables get no gradient, and why."""

from collections.abc import Iterator
from typing import final

import torch

from bilevel.autodiff import gradients
from bilevel.check.explaining.page import Diagnosis
from bilevel.check.explaining.scene import Scene
from bilevel.problem import Problem

UNUSED, FROZEN, STILL = "unused variable", "frozen parameter", "zero gradient"


def still_variables(scene: Scene) -> Iterator[Diagnosis]:
    """Upper variables whose hypergradient is exactly 0, and parameters that are no variables."""
    used = _Uses(scene)
    reached = {n for n, g in (scene.here or scene.answer).grad.items() if bool(torch.any(g != 0))}
    without = [n for n in scene.oracles.names if not used.upper(n) and not used.lower(n)]
    for name in (n for n in without if n not in scene.cut):
        yield _unused(scene.problem, name)
    still = [n for n in scene.oracles.names if n not in reached and n not in (*without, *scene.cut)]
    if still:
        names = ", ".join(f"`{n}`" for n in still[:3]) + (", ..." if len(still) > 3 else "")
        many = len(still) == len(scene.oracles.names)
        yield Diagnosis(
            STILL,
            "look",
            float(len(still)),
            f"a loss uses {names}, but the hypergradient there is exactly 0, response included",
            "move away from this point (a dead unit, a clamp, all zeros?)"
            + (", unless it is an optimum" if many else ""),
        )
    yield from _frozen(scene)
    if not without and not still and not scene.cut:
        count = len(scene.oracles.names)
        said = "the one upper variable gets" if count == 1 else f"all {count} upper variables get"
        yield Diagnosis("variables", "fine", 0.0, f"{said} a gradient")


@final
class _Uses:
    """Which upper variables the graph of each loss leads to."""

    def __init__(self, scene: Scene) -> None:
        oracles = scene.oracles
        upper, lower = oracles.upper, oracles.lower
        with scene.twice():
            losses = [oracles.evaluate("upper", upper, lower).loss]
            if lower:
                losses += [
                    oracles.evaluate("lower", upper, lower, i).loss
                    for i in range(len(oracles.lower_batches))
                ]
            found = [gradients(loss, list(upper.values())) for loss in losses]
        names = list(upper)
        used = [{n for n, g in zip(names, grads, strict=True) if g is not None} for grads in found]
        self._upper = used[0] | set(oracles.shared)
        self._lower = set().union(*used[1:])

    def upper(self, name: str) -> bool:
        """Whether the upper loss uses it."""
        return name in self._upper

    def lower(self, name: str) -> bool:
        """Whether the lower loss uses it."""
        return name in self._lower


def _unused(problem: Problem, name: str) -> Diagnosis:
    drawn = _read_in_draw(problem, name)
    why = (
        f"`{type(problem).__name__}.draw` reads it, and a batch carries no gradient back"
        if drawn
        else "no loss depends on it"
    )
    change = (
        "draw plain noise in `draw` and scale it in the loss"
        if drawn
        else "use it in a loss (`.detach()`, `float(...)` and `torch.no_grad()` hide it), or take it "
        "out of `self.upper`"
    )
    return Diagnosis(
        UNUSED, "wrong", 0.0, f"the upper variable `{name}` never moves: {why}", change
    )


def _read_in_draw(problem: Problem, name: str) -> bool:
    """Whether the problem's own code that draws batches names the variable."""
    last = name.rpartition(".")[2]
    for function in (type(problem).draw, type(problem).draw_lower):
        if function in (Problem.draw, Problem.draw_lower):
            continue
        code = getattr(function, "__code__", None)
        if code is not None and (last in code.co_consts or last in code.co_names):
            return True
    return False


def _frozen(scene: Scene) -> Iterator[Diagnosis]:
    """Parameters of the upper module that do not require grad, though the losses use them."""
    module = scene.copy.upper
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    frozen = {n: p for n, p in frozen.items() if p.is_floating_point()}
    if not frozen:
        return
    upper, lower = scene.oracles.upper, scene.oracles.lower
    with scene.twice():
        for parameter in frozen.values():
            parameter.requires_grad_()
        try:
            losses = [scene.oracles.evaluate("upper", upper, lower).loss]
            losses += [scene.oracles.evaluate("lower", upper, lower).loss] if lower else []
            found = [gradients(loss, list(frozen.values())) for loss in losses]
        finally:
            for parameter in frozen.values():
                parameter.requires_grad_(False)
    size = [
        max((float(g.norm()) for grads in found if (g := grads[i]) is not None), default=0.0)
        for i in range(len(frozen))
    ]
    used = [n for n, s in zip(frozen, size, strict=True) if s > 0]
    if used:
        names = ", ".join(f"`{n}`" for n in used[:3]) + (", ..." if len(used) > 3 else "")
        yield Diagnosis(
            FROZEN,
            "look",
            max(size),
            f"{names} of `self.upper` would get a gradient (of norm {max(size):.2g}) but never "
            f"move{'s' * (len(used) == 1)}: `requires_grad` is off",
            "if it is to be learned, `.requires_grad_()` before the optimizer is made; if not, this is "
            "as it should be",
        )
