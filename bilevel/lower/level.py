"""`LowerLevel`: the lower level at given upper variables, as whoever solves it sees it."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from bilevel.autodiff import fill
from bilevel.check.lower_solution import solve_closely
from bilevel.oracles import Oracles
from bilevel.problem import Problem
from bilevel.refusals import flag, nearest, shown, whole
from bilevel.tree import Layout, Tree, leaves


@final
class LowerLevel:
    r"""The lower level $\min_y G(x, y)$ at one $x$: what a lower solver of your own is given.

    A lower solver is a function that takes this and returns $y$, however it finds it: a dict of
    tensors or arrays by the names of the lower variables, or one vector with all their numbers (a
    tensor or an array). A single lower variable may come as it is. Nothing is differentiated through
    the solver, and nothing is written into the problem.

    Args:
        oracles: the problem, bound to one lower batch.

    Attributes:
        upper: the upper variables x, detached.
        start: the current lower variables, copies to start from.
        batch: the batch of the lower loss.
        problem: the problem, for what is not a variable.
        seed: what to seed randomness of the solver with: the same whenever a run is repeated.

    Example:
        >>> from bilevel import best_response
        >>> problem = Problem.from_functions(
        ...     lambda x, y, _: y["y"].sum(), lambda x, y, _: (y["y"] - x["x"]).cosh().sum(),
        ...     {"x": torch.ones(2)}, {"y": torch.zeros(2)},
        ... )
        >>> def descend(level):
        ...     y = level.start
        ...     for _ in range(6):
        ...         y = {"y": y["y"] - level.gradient(y)["y"]}
        ...     return y
        >>> best_response(problem, solve=descend)["y"].detach()
        tensor([1., 1.])
    """

    def __init__(self, oracles: Oracles) -> None:
        self._oracles = oracles
        self.problem: Problem = oracles.problem
        self.batch: Any = oracles.lower_batches[0]
        self.seed = oracles.seed
        self.upper: Tree = {name: x.detach() for name, x in oracles.upper.items()}
        self.start: Tree = {
            name: y.detach().clone(memory_format=torch.contiguous_format)
            for name, y in oracles.lower.items()
        }
        self._layout = Layout(list(self.start.values()))

    def loss(self, lower: Tree) -> Tensor:
        """The lower loss G(x, y), with its graph if y has one."""
        return self._oracles.evaluate("lower", self.upper, lower).loss

    def gradient(self, lower: Tree) -> Tree:
        """The gradient dG/dy, a tree as `lower`."""
        with torch.enable_grad():
            points = leaves(lower)
            grads = self._oracles.lower_gradient(self.upper, points)[1]
        return dict(zip(points, fill(list(grads.values()), list(points.values())), strict=True))

    @property
    def start_vector(self) -> "np.ndarray[Any, Any]":
        """`start` as one float64 array, for solvers of vectors."""
        return self._layout.ravel(list(self.start.values())).double().cpu().numpy()

    def value_and_gradient(
        self, vector: "np.ndarray[Any, Any]"
    ) -> tuple[float, "np.ndarray[Any, Any]"]:
        """Lower loss and gradient at an array: `scipy.optimize.minimize(..., jac=True)` takes it."""
        points = leaves(self.tree(np.array(vector)))
        with torch.enable_grad():
            evaluation, grads = self._oracles.lower_gradient(self.upper, points)
        flat = self._layout.ravel(fill(list(grads.values()), list(points.values())))
        return float(evaluation.loss.detach()), flat.double().cpu().numpy()

    def minimize(
        self,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        num_steps: int,
        *,
        start: Tree | None = None,
    ) -> Tree:
        """Steps of a `torch.optim` optimizer, L-BFGS included.

        Args:
            optimizer: makes it, `lambda variables: torch.optim.SGD(variables, 0.1)`.
            num_steps: how many.
            start: where to begin; `self.start` by default.
        """
        begun = self.start if start is None else self.tree(start)
        points = leaves({name: y.detach().clone() for name, y in begun.items()})
        made = optimizer(list(points.values()))

        def closure() -> Tensor:
            evaluation, grads = self._oracles.lower_gradient(self.upper, points)
            for name, y in points.items():
                y.grad = grads[name]
            return evaluation.loss.detach()

        for _ in range(whole("num_steps", num_steps)):
            with torch.enable_grad():
                made.step(closure)  # type: ignore[arg-type]  # a loss is what torch's text asks for
        return {name: y.detach() for name, y in points.items()}

    def solution(self, max_steps: int = 500, *, near: bool = False) -> Tree:
        """The lower minimum to about machine precision.

        In closed form where the problem has one (`Problem.best_response`), else by L-BFGS and
        Newton steps from `start`.

        Args:
            max_steps: most steps of L-BFGS.
            near: whether `start` is nearly a solution, so that a few Newton steps find it (L-BFGS
                steps in if they do not).

        Raises:
            ValueError: if no minimum was found.
        """
        return solve_closely(self._oracles, whole("max_steps", max_steps), near=flag("near", near))[
            0
        ]

    def tree(self, answer: Any) -> Tree:
        """What a lower solver answered as a dict of tensors, detached, kinds as the variables'.

        Raises:
            TypeError: if it is no dict, tensor or array.
            ValueError: for wrong names or shapes, or if a number in it is not finite.
        """
        if not isinstance(answer, Mapping):
            answer = self._of_vector(answer)
        for name in (*answer.keys(), *self.start):
            if name not in self.start:
                raise ValueError(
                    f"the lower solver returned `{name}`, which is no lower variable; "
                    f"{nearest(str(name), self.start)}"
                )
            if name not in answer:
                raise ValueError(
                    f"the lower solver returned nothing for the lower variable `{name}`; return a "
                    "dict with all of them"
                )
        found = {n: _like(n, answer[n], y) for n, y in self.start.items()}
        for name, y in found.items():
            if not bool(y.isfinite().all()):
                raise ValueError(
                    f"the lower solver returned NaN or infinite numbers for `{name}`: it diverged; "
                    "take smaller steps, or look at the lower loss at these upper variables"
                )
        return found

    def _of_vector(self, answer: Any) -> Tree:
        if not isinstance(answer, (Tensor, np.ndarray)):
            raise TypeError(
                "a lower solver must return a dict of tensors by the names of the lower variables, "
                f"or all numbers as one vector (a tensor or an array), got {shown(answer)}"
            )
        vector = torch.as_tensor(answer).detach()
        only = next(iter(self.start.values()))
        if len(self.start) == 1 and vector.shape == only.shape:
            return dict.fromkeys(self.start, vector)
        if vector.shape != (self._layout.size,):
            names = ", ".join(f"`{n}` {tuple(y.shape)}" for n, y in self.start.items())
            raise ValueError(
                f"the lower solver returned shape {tuple(vector.shape)}; the lower variables are "
                f"{names}: return them by name, or a vector of shape ({self._layout.size},)"
            )
        parts = self._layout.unravel(vector.to(only.device))
        return dict(zip(self.start, parts, strict=True))


LowerSolver: TypeAlias = Callable[[LowerLevel], Any]


def _like(name: str, value: Any, variable: Tensor) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(
            f"the lower solver returned {shown(value)} for `{name}`; return a tensor or an array"
        )
    tensor = torch.as_tensor(value).detach()
    if tensor.shape != variable.shape:
        raise ValueError(
            f"the lower solver returned shape {tuple(tensor.shape)} for `{name}`, which has shape "
            f"{tuple(variable.shape)}"
        )
    return tensor.to(variable)  # a copy where dtype or device differ


def checked_solver(name: str, solve: Any) -> LowerSolver:
    """The lower solver that was given.

    Raises:
        TypeError: if it is no function.
    """
    if not callable(solve) or isinstance(solve, type):
        raise TypeError(
            f"`{name}` must be a function of a `LowerLevel` that returns y, got {shown(solve)}; "
            "`LowerLevel.solution` is one"
        )
    answer: LowerSolver = solve
    return answer
