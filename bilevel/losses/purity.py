"""Whether a loss is what a hypergradient takes it for: a function of its variables and its batch.

This is examined once for each problem, before its first hypergradient or training step. Every loss is
evaluated twice, at copies of its variables and at the module's own parameters, and the two values and
gradients must be the same. While the first gradient is taken, the module holds other numbers: this
shows code that runs again then and reads the module.
"""

import contextlib
import random
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bilevel.autodiff import fill, gradients
from bilevel.devices import widest
from bilevel.losses.answers import scalar
from bilevel.losses.references import reached, refuse_overlaps, tensors
from bilevel.losses.substitution import undisturbed
from bilevel.oracles import Oracles
from bilevel.pieces import pieces_of
from bilevel.problem import Level, Problem
from bilevel.tree import Tree, norm

# for the losses looked at: the variables of each level that they do not use
_Unused: TypeAlias = dict[Level, frozenset[str]]
_examined: MutableMapping[Problem, dict[Level, _Unused]] = weakref.WeakKeyDictionary()


@torch.enable_grad()
def examine(oracles: Oracles, levels: Sequence[Level], *, whole: bool) -> list[Level]:
    """Refuse, once for each problem, variables that share memory and losses that are not functions.

    Args:
        oracles: the problem and its first batches.
        levels: the losses that will be evaluated.
        whole: take the gradients in the variables of both levels, not of the loss's own level only.

    Returns:
        The levels whose loss was evaluated now.

    Raises:
        ValueError: naming the loss, what differed or was written, and where it belongs.
    """
    if any(isinstance(p, FakeTensor) for p in oracles.problem.parameters()):
        return []  # costs are being counted: nothing has values
    with undisturbed():
        done = _examined.setdefault(oracles.problem, {})
        if not done:
            refuse_overlaps(oracles.problem)
            if oracles.problem.constrains_lower:
                upper, lower = oracles.upper, oracles.lower
                inside = "begin inside of it, for example at `constraint.prox(variable, 1.0)`"
                oracles.constraints(upper, lower).refuse_violated(lower, "at the start", inside)
        new = [level for level in levels if level not in done]
        for level in new:
            examination = _Examination(oracles, level, whole)
            examination.run()
            done[level] = examination.unused()
    return new


def examined(problem: Problem, levels: Sequence[Level]) -> bool:
    """Whether these losses of the problem were examined before."""
    done = _examined.get(problem, {})
    return all(level in done for level in levels)


def unused(problem: Problem, level: Level, of: Level = "upper") -> frozenset[str]:
    """The variables of a level that a loss did not use when it was examined; empty if it was not."""
    return _examined.get(problem, {}).get(level, {}).get(of, frozenset())


def refuse_shared_upper(oracles: Oracles) -> None:
    """Refuse a `share` that depends on the upper variables: the upper loss gets it as a constant.

    Raises:
        ValueError: naming the variable.
    """
    upper = oracles.upper
    with torch.enable_grad():
        common, _ = oracles.share(upper, oracles.lower)
    names = reached([t for _, t in tensors(common)], upper)
    if names:
        name = type(oracles.problem).__name__
        raise ValueError(
            f"what `{name}.share` returns depends on the upper variable `{names[0]}`, and the upper "
            "loss receives it as a constant: compute what depends on upper variables in the losses"
        )


@final
@dataclass(frozen=True)
class _Trial:
    """A loss and its gradient."""

    loss: Tensor
    grads: list[Tensor]

    def same(self, other: "_Trial", tolerance: float) -> bool:
        """Whether value and gradient agree; NaN agrees with NaN, it is found elsewhere."""
        return self.off(other.loss) <= tolerance and self._distance(other) <= tolerance

    def off(self, loss: Tensor) -> float:
        """The relative difference to another value."""
        a, b = float(self.loss), float(loss)
        difference = abs(a - b)
        return difference / max(abs(a), abs(b)) if difference > 0 else 0.0

    def _distance(self, other: "_Trial") -> float:
        difference = norm([a - b for a, b in zip(self.grads, other.grads, strict=True)])
        scale = max(float(norm(self.grads)), float(norm(other.grads)))
        return float(difference) / scale if difference > 0 else 0.0


@final
class _Examination:
    """One loss of a problem, evaluated twice, and more often where the two do not agree."""

    def __init__(self, oracles: Oracles, level: Level, whole: bool) -> None:
        self.oracles = oracles
        self.level = level
        self.who = f"`{type(oracles.problem).__name__}.{level}_loss`"
        batch = oracles.upper_batch if level == "upper" else oracles.lower_batches[0]
        self.batch = (pieces_of(batch) or [(1.0, batch)])[0][1]
        own = {
            "upper": oracles.slots.variables("upper"),
            "lower": oracles.slots.variables("lower"),
        }
        self.own: Tree = {f"{n}.{k}": p for n, tree in own.items() for k, p in tree.items()}
        # gradients are not compared where a user's hook changes those of the module's parameters
        mine = [p for n, tree in own.items() if whole or n == level for p in tree.values()]
        self.wanted = [p for p in dict.fromkeys(mine) if not p._backward_hooks]
        half = torch.finfo(torch.float32).eps
        if self.own:
            half = max(torch.finfo(p.dtype).eps for p in self.own.values())
        if oracles.precision is not None:
            half = max(half, torch.finfo(oracles.precision).eps)
        # half the digits; a sum of atomic additions on a GPU loses some of the others
        self.tolerance = half**0.5
        self.digits = 100 * half
        self._missing: list[Tensor] = []

    def run(self) -> None:
        """Compare, and say what is wrong.

        Raises:
            ValueError: if anything is.
        """
        outside = _Outside(self.oracles.problem, self.own)
        first = self._at_copies(outside)
        second = self._at_own()
        moved = outside.moved()
        if first.same(second, 0.0 if moved and not second.loss.is_cuda else self.digits):
            return
        again = self._at_own()
        known = self.tolerance if second.loss.is_cuda and not moved else 0.0
        if second.off(again.loss) > known or not second.same(again, self.tolerance):
            raise ValueError(self._no_function(second, again, moved))
        if not first.same(second, self.tolerance):
            raise ValueError(self._another_place(first, second))

    def _no_function(self, one: _Trial, two: _Trial, moved: str) -> str:
        a, b = float(one.loss), float(two.loss)
        values = f"the values {a:.9g} and {b:.9g}" if a != b else "two different gradients"
        return (
            f"{self.who} is not a function of its variables and its batch: evaluated twice it gave "
            f"{values}{moved}. Draw noise in `draw` (from the generator it is given), and change "
            "what changes in the loop between the steps, or keep it in a buffer (`register_buffer`)"
        )

    def _another_place(self, first: _Trial, second: _Trial) -> str:
        with torch.enable_grad():
            loss, _ = self._evaluate(self._copies())
        if names := reached([loss], self.own):
            return (
                f"{self.who} uses `{names[0]}` by a reference of its own (a list of parameters made "
                "in `__init__`, a closure, an optimizer's groups), where no other values can be put; "
                "take it from its module whenever the loss is evaluated"
            )
        if first.off(second.loss) <= self.tolerance and self._at_copies(None).same(
            second, self.tolerance
        ):
            return (
                f"{self.who} has code that runs again when its gradient is taken and then does not "
                "find the values it was evaluated at (a hook on a node of the graph?); use "
                "`torch.utils.checkpoint.checkpoint(use_reentrant=False)`, a "
                "`torch.autograd.Function` or a hook on a tensor"
            )
        a, b = float(second.loss), float(first.loss)
        values = f"({a:.9g} and {b:.9g})" if a != b else "(its gradient)"
        return (
            f"{self.who} differs {values} between the module's parameters and other tensors of the "
            "same values in their places, as a hypergradient needs them; do not tell variables by "
            "`isinstance(p, nn.Parameter)`, `id(p)` or `p.is_leaf`, tell them by name"
        )

    def _at_copies(self, outside: "_Outside | None") -> _Trial:
        """At copies of the variables.

        With `outside`, look at what was written, and hold garbage in the module while the gradient is
        taken.
        """
        copies, before = self._copies(), self._versions()
        loss, leaves = self._evaluate(copies)
        if outside is None:
            return self._trial(loss, leaves)
        self._refuse_writing(copies, before, outside)
        with self._garbage():
            return self._trial(loss, leaves)

    def _versions(self) -> dict[str, int]:
        return {path: _version(tensor) for path, tensor in tensors(self.batch)}

    def _refuse_writing(self, copies: Tree, before: dict[str, int], outside: "_Outside") -> None:
        for path, version in self._versions().items():
            if before.get(path) != version:
                raise ValueError(
                    f"{self.who} writes into its batch (`{path}`), so its next evaluation sees "
                    "another one; write into a copy (`.clone()`), or change the batch in `draw`"
                )
        if name := outside.written():
            raise ValueError(
                f"{self.who} writes into `{name}`, a parameter that is not its to change; update it "
                "in the loop between the steps, or make it a buffer (`register_buffer`), which "
                "advances once a step"
            )
        for (name, own), copy in zip(self.own.items(), copies.values(), strict=True):
            if copy._version or not torch.equal(copy.nan_to_num(), own.nan_to_num()):
                raise ValueError(
                    f"{self.who} writes into the variable `{name}` (`max_norm` of an embedding?), "
                    "which a hypergradient must not; compute what you need from it in the loss "
                    "(`w * (max_norm / w.norm(dim=1, keepdim=True)).clamp(max=1)`), or write in the "
                    "loop between the steps"
                )

    def _at_own(self) -> _Trial:
        """At the module's own parameters: as the user wrote it."""
        values = self.oracles.slots.substitute()
        out, _ = self.oracles.run(values, self.level, self.batch)
        return self._trial(scalar(out, self.level, self.oracles.problem)[0], self.wanted)

    def _copies(self) -> Tree:
        made = {id(p): p.detach().clone().requires_grad_() for p in self.own.values()}
        return {name: made[id(p)] for name, p in self.own.items()}

    def _evaluate(self, copies: Tree) -> tuple[Tensor, list[Tensor]]:
        values = self.oracles.slots.substitute((self.own, copies))
        out, _ = self.oracles.run(values, self.level, self.batch)
        of = {id(p): copies[name] for name, p in self.own.items()}
        loss = scalar(out, self.level, self.oracles.problem)[0]
        return loss, [of[id(p)] for p in self.wanted]

    def _trial(self, loss: Tensor, leaves: list[Tensor]) -> _Trial:
        try:
            found = gradients(loss, leaves)
            if self.level == "lower":
                self.oracles.refuse_unused(found)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise ValueError(
                f"{self.who} uses `checkpoint(use_reentrant=True)`, which works with `.backward()` "
                "only; give it `use_reentrant=False`"
            ) from error
        self._missing = [p for p, g in zip(self.wanted, found, strict=True) if g is None]
        return _Trial(loss.detach().to(widest(loss.device)), fill(found, leaves))

    def unused(self) -> _Unused:
        """The names of each level's variables without a gradient in the last trial."""
        missing = {id(p) for p in self._missing}
        levels: tuple[Level, ...] = ("upper", "lower")
        of = {level: self.oracles.slots.variables(level) for level in levels}
        return {
            level: frozenset(name for name, p in variables.items() if id(p) in missing)
            for level, variables in of.items()
        }

    @contextlib.contextmanager
    def _garbage(self) -> Iterator[None]:
        moved = {n: p.detach() * (1 + 2**-6) + 2**-6 for n, p in self.own.items()}
        with self.oracles.slots.substitute((self.own, moved)).in_place():
            yield


@final
class _Outside:
    """What a loss may use besides its arguments, as it was before the loss ran."""

    def __init__(self, problem: Problem, own: Tree) -> None:
        self._problem = problem
        variables = {id(p) for p in own.values()}
        self._frozen = [
            (n, p, p._version) for n, p in problem.named_parameters() if id(p) not in variables
        ]
        self._kept: list[Tensor] = []  # or a new tensor could have the identity of an old one
        self._attributes = dict(self._state())
        self._numpy, self._python = _numpy(), random.getstate()

    def written(self) -> str:
        """The first parameter that was written into although it is not a variable."""
        return next((name for name, p, version in self._frozen if p._version != version), "")

    def moved(self) -> str:
        """A clause about what else changed, empty if nothing did."""
        after = dict(self._state())
        changed = [name for name, now in after.items() if now != self._attributes.get(name, now)]
        if changed:
            return f" (`{changed[0]}` changed)"
        if _numpy() != self._numpy:
            return " (NumPy's random generator was used)"
        if random.getstate() != self._python:
            return " (Python's random generator was used)"
        return ""

    def _state(self) -> Iterator[tuple[str, Any]]:
        """Plain attributes of the modules that can change: tensors, numbers and generators."""
        for path, module in self._problem.named_modules():
            for name, value in list(vars(module).items()):
                full = f"{path}.{name}".lstrip(".")
                if name.startswith("__") or isinstance(value, bool):
                    continue
                if isinstance(value, Tensor):
                    self._kept.append(value)
                    yield full, (id(value), _version(value))
                elif isinstance(value, torch.Generator):
                    yield full, value.get_state().tolist()
                elif isinstance(value, np.random.Generator):
                    yield full, str(value.bit_generator.state)
                elif isinstance(value, (int, float)):
                    yield full, value


def _numpy() -> str:
    return str([str(part) for part in np.random.get_state()])  # noqa: NPY002 - the global one


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
