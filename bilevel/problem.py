"""`Problem`: what is optimized - two levels of variables and a loss for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from bilevel.cards import Card, parameters_of, whereabouts
from bilevel.constraints import Constraint
from bilevel.distributed import share_of
from bilevel.refusals import shown
from bilevel.tree import Tree

Level = Literal["upper", "lower"]
Question = Literal["upper", "lower", "share", "initial_lower", "condition", "constraints"]
Loss: TypeAlias = Tensor | tuple[Tensor, Mapping[str, Tensor]]
TensorDict: TypeAlias = Mapping[str, Any]


class Problem(nn.Module, ABC):
    r"""A bilevel problem: $\min_x F(x, y^*(x))$ with $y^*(x) \in \arg\min_y G(x, y)$.

    A subclass sets `self.upper` and `self.lower` (modules that hold $x$ and $y$) and defines the
    losses $F$ and $G$ in ordinary stateful PyTorch. A level's variables are the parameters of its
    module that require grad: frozen, tied and partly shared ones need no special care.

    The losses must be deterministic in (upper, lower, batch): noise is drawn *into the batch* by
    `draw` (and by `draw_lower` where every lower step has its own). Dropout is the one exception; it
    sees a fixed seed within one hypergradient.

    A subclass may annotate its levels with their own classes (`lower: nn.Linear`), so that a type
    checker knows them.

    Attributes:
        upper: module that holds the upper-level variables $x$.
        lower: module that holds the lower-level variables $y$. Without any, the problem has a single
            level: `Alternating` and `train(lower_steps=0)` still take it.
        stops_lower_gradient: `None`, or why only first-order solvers can be used: a clause that says
            where the lower loss stops a gradient, and what to do ("it is stopped at the posterior;
            use variant='complete'"; a refusal adds ", or `Alternating()`"). The lower gradient is
            then not the gradient of any function, and `Implicit` and `Unrolled` refuse the problem.
        separate: how many independent lower levels stand side by side (`Tasks`).
        proximal_step: step size of the proximal map, for `lower_constraints`. The answer does not depend
            on it. With that of a plain `torch.optim.SGD` here, each lower step is a proximal step,
            which ends exactly on bounds and zeros.

    Example:
        >>> class Ridge(Problem):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.upper = nn.ParameterDict({"log_l2": torch.zeros(())})
        ...         self.lower = nn.Linear(features, 1).double()
        ...     def upper_loss(self, batch):
        ...         inputs, targets = batch
        ...         return (self.lower(inputs) - targets).square().mean()
        ...     def lower_loss(self, batch):
        ...         l2 = self.upper["log_l2"].exp() * self.lower.weight.square().sum()
        ...         return self.upper_loss(batch) + l2
        >>> list(Ridge(3).variables("lower"))
        ['weight', 'bias']
    """

    upper: nn.Module
    lower: nn.Module
    stops_lower_gradient: str | None = None
    separate: int = 1
    proximal_step: float = 1.0

    @abstractmethod
    def upper_loss(self, batch: Any) -> Loss:
        """The upper loss $F$: a scalar, or a scalar and a dict of scalars to log."""

    @abstractmethod
    def lower_loss(self, batch: Any) -> Loss:
        """The lower loss $G$: a scalar, or a scalar and a dict of scalars to log."""

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        """Add to `data` the noise the losses need; the default adds none.

        Args:
            data: one minibatch, as the data source gave it.
            generator: the only source of randomness, on the problem's device.

        Returns:
            The batch that `upper_loss` and `lower_loss` receive.
        """
        return data

    def begin_draw(self, data: Any, generator: torch.Generator) -> Any:
        """What `draw` takes from the generator, for `finish_draw`; `None` if `draw` is one piece.

        A `draw` that computes a lot can be cut in two. It is then `finish_draw(begin_draw(...))`, and a
        compiled run of a problem with a single level has the second part in the graph of its step.
        """
        return None

    def finish_draw(self, begun: Any) -> Any:
        """The batch; deterministic, without gradients. It may write to buffers in place."""
        return begun

    def share(self, batch: Any) -> Any:
        """The batch together with what both losses compute alike; the default adds nothing.

        Where a turn's upper loss and its first lower loss see the same batch at the same lower
        variables, `train` calls this once: the lower loss receives the result with its graph, the
        upper loss without. Everywhere else the losses receive batches that did not pass through
        here, and must compute what is missing by themselves.

        Args:
            batch: what `draw` returned.

        Returns:
            A batch of the same kind. What was added may depend on the lower variables, not on the
            upper ones.
        """
        return batch

    def draw_lower(self, batch: Any, generator: torch.Generator, step: int) -> Any:
        """The batch of one lower step, made from the turn's; the default is that batch itself.

        Override it where the lower steps see fresh noise, or where blocks of lower variables move a
        different number of times.

        Args:
            batch: what `draw` returned.
            generator: the only source of randomness, on the problem's device.
            step: number of the loop's lower step, from 0. The hypothetical steps of a solver are all
                0: step 0 must move every lower variable.

        Returns:
            The batch that `lower_loss` receives in this step.
        """
        return batch

    def best_response(self, batch: Any) -> Tree | None:
        """The lower solution y*(x) in closed form, where the problem has one; `None` otherwise.

        What `bilevel.best_response`, `LowerLevel.solution` and the checks take for the truth.
        """
        return None

    def lower_condition(self, batch: Any) -> Mapping[str, Tensor] | None:
        """An equation in place of the lower loss; see `ConditionProblem`, which defines it."""
        return None

    def lower_constraints(self) -> Mapping[str, Constraint]:
        """What lower variables must obey besides, by name; the default is nothing.

        A constraint may depend on upper variables, as in `{"w": L1(self.upper["log_l1"].exp())}`.
        """
        return {}

    @final
    @property
    def gives_lower_condition(self) -> bool:
        """Whether the lower level is an equation, whose Jacobian need not be symmetric."""
        return type(self).lower_condition is not Problem.lower_condition

    @final
    @property
    def constrains_lower(self) -> bool:
        """Whether lower variables have constraints."""
        return type(self).lower_constraints is not Problem.lower_constraints

    def initial_lower(self) -> Tree | None:
        """The lower variables a turn begins with, by name, differentiable in the upper ones.

        Every turn of `train` begins there, with fresh lower optimizers; `None`: where the last ended.
        """
        return None

    @property
    def gives_initial_lower(self) -> bool:
        """Whether turns begin with lower variables made of the upper ones."""
        return type(self).initial_lower is not Problem.initial_lower

    @final
    @property
    def draws_every_lower_step(self) -> bool:
        """Whether the lower steps of a turn see different batches."""
        return type(self).draw_lower is not Problem.draw_lower

    @final
    @property
    def draws_in_parts(self) -> bool:
        """Whether `draw` is cut in two, and not replaced on this object."""
        return type(self).begin_draw is not Problem.begin_draw and "draw" not in vars(self)

    @final
    @property
    def shares(self) -> bool:
        """Whether the two losses have a computation in common."""
        return type(self).share is not Problem.share

    def forward(self, what: Question, batch: Any) -> Any:
        """The loss of one level; what the oracles call."""
        if what in ("constraints", "initial_lower"):
            return self.lower_constraints() if what == "constraints" else self.initial_lower()
        if what == "condition":
            return self.lower_condition(batch)
        answers = {"upper": self.upper_loss, "lower": self.lower_loss, "share": self.share}
        return answers[what](batch)

    def shard(self, batch: Any, rank: int, ranks: int) -> Any:
        """One rank's share of a batch, where several processes train together.

        The default cuts the rows of every tensor into `ranks` equal parts; tensors without dimensions
        go to every rank. A batch that holds tensors with another first dimension needs an override.

        Args:
            batch: what `draw` or `draw_lower` returned.
            rank: number of the process.
            ranks: number of processes.

        Raises:
            ValueError: if the tensors differ in their number of rows, or it is not a multiple of
                `ranks`.
        """
        return share_of(batch, rank, ranks, type(self).__name__)

    def __repr__(self) -> str:
        return str(self._card())

    def _repr_html_(self) -> str:
        return self._card().html()

    def _card(self) -> Card:
        """What it says of itself; a subclass adds lines `name: value` by torch's `extra_repr`."""
        modules = vars(self).get("_modules")
        if modules is None:
            return Card(f"{type(self).__name__}, before `super().__init__()`")
        lines = [line.partition(": ") for line in self.extra_repr().splitlines()]
        rows = [(name, value) if colon else ("settings", name) for name, colon, value in lines]
        for name, module in ((name, modules.get(name)) for name in ("upper", "lower")):
            rows.append((name, parameters_of(module) if module is not None else "not set yet"))
        if self.stops_lower_gradient is not None:
            rows.append(("solvers", f"first order only: {self.stops_lower_gradient}"))
        rows += [("on", whereabouts(self)), ("layers", "print its `.upper` and `.lower`")]
        return Card(self._get_name(), rows)  # type: ignore[no-untyped-call]  # torch's

    @final
    def variables(self, level: Level) -> Tree:
        """The variables of a level by name: the parameters of its module that require grad."""
        if level not in ("upper", "lower"):
            raise ValueError(f'a level is "upper" or "lower", got {shown(level)}')
        module = self.upper if level == "upper" else self.lower
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    @final
    @property
    def device(self) -> torch.device:
        """The device of the problem's first parameter.

        Raises:
            ValueError: if it has none.
        """
        first = next(self.parameters(), None)
        if first is None:
            raise ValueError(
                f"`{type(self).__name__}` has no parameters, so it lies on no device; put the variables "
                "in `self.upper` and `self.lower`"
            )
        return first.device

    @staticmethod
    def from_functions(
        upper_loss: Callable[[Any, Any, Any], Loss],
        lower_loss: Callable[[Any, Any, Any], Loss],
        upper: TensorDict,
        lower: TensorDict,
        *,
        constraints: Callable[[Any], Mapping[str, Constraint]] | None = None,
        proximal_step: float = 1.0,
    ) -> "Problem":
        """A problem from two functions `(upper, lower, batch) -> scalar` and two dicts of tensors.

        The dicts may be nested. Every floating-point tensor becomes a variable that shares its
        memory with the tensor given (an `nn.Parameter` with `requires_grad=False` stays frozen),
        every other tensor a constant.

        Args:
            upper_loss: the upper loss F.
            lower_loss: the lower loss G.
            upper: initial upper variables, possibly nested dicts of tensors.
            lower: initial lower variables, given in the same way.
            constraints: a function `upper -> {name: constraint}` for lower variables that have one.
            proximal_step: step size of the constraints' proximal map, see `Problem.proximal_step`.

        Returns:
            The problem; its variables are named by their path, as in `encoder.weight`.

        Raises:
            TypeError: if `upper` or `lower` is not a dict, or a leaf of it not a real tensor.
            ValueError: if a name is not a string, is empty or holds a dot.

        Example:
            >>> problem = Problem.from_functions(
            ...     upper_loss=lambda x, y, batch: (y["w"] - 1).square().sum(),
            ...     lower_loss=lambda x, y, batch: (y["w"] - x["a"]).square().sum(),
            ...     upper={"a": torch.zeros(2)},
            ...     lower={"w": torch.zeros(2)},
            ... )
            >>> problem.lower_loss(None)
            tensor(0., grad_fn=<SumBackward0>)
        """
        from bilevel.functions import ConstrainedFunctions, FunctionProblem  # made of this

        if constraints is None:
            return FunctionProblem(upper_loss, lower_loss, upper, lower)
        what = upper_loss, lower_loss, upper, lower
        return ConstrainedFunctions(constraints, proximal_step, *what)

    @staticmethod
    def from_condition(
        upper_loss: Callable[[Any, Any, Any], Loss],
        lower_condition: Callable[[Any, Any, Any], TensorDict],
        upper: TensorDict,
        lower: TensorDict,
    ) -> "Problem":
        """A problem whose lower level is an equation c(x, y) = 0; see `ConditionProblem`.

        Args:
            upper_loss: the upper loss F, a function `(upper, lower, batch) -> scalar`.
            lower_condition: a function `(upper, lower, batch) -> c`, a dict like `lower` with an
                equation for each entry.
            upper: initial upper variables, as for `from_functions`; `lower` likewise.
            lower: initial lower variables.

        Returns:
            The problem.

        Example:
            >>> problem = Problem.from_condition(
            ...     lambda x, y, batch: y["w"].sum(),
            ...     lambda x, y, batch: {"w": y["w"].exp() - x["a"]},
            ...     {"a": torch.ones(2)}, {"w": torch.zeros(2)},
            ... )
            >>> problem.lower_condition(None)["w"].detach()
            tensor([0., 0.])
        """
        from bilevel.functions import FunctionCondition

        return FunctionCondition(upper_loss, lower_condition, upper, lower)

    @staticmethod
    def from_map(
        upper_loss: Callable[[Any, Any, Any], Loss],
        lower_map: Callable[[Any, Any, Any], TensorDict],
        upper: TensorDict,
        lower: TensorDict,
    ) -> "Problem":
        """A problem whose lower answer is a fixed point y = Phi(x, y): the condition y - Phi(x, y).

        `ConditionProblem` says which map may be used where. `torch.optim.SGD` with learning rate 1
        iterates it.

        Args:
            upper_loss: the upper loss F, a function `(upper, lower, batch) -> scalar`.
            lower_map: a function `(upper, lower, batch) -> Phi`, a dict like `lower`.
            upper: initial upper variables, as for `from_functions`; `lower` likewise.
            lower: initial lower variables.

        Returns:
            The problem.

        Example:
            >>> problem = Problem.from_map(
            ...     lambda x, y, batch: y["z"].sum(),
            ...     lambda x, y, batch: {"z": (x["w"] * y["z"] + 1).tanh()},
            ...     {"w": torch.zeros(2)}, {"z": torch.zeros(2)},
            ... )
            >>> problem.lower_condition(None)["z"].detach()
            tensor([-0.7616, -0.7616])
        """
        from bilevel.functions import FunctionCondition

        return FunctionCondition(upper_loss, lower_map, upper, lower, is_map=True)


def refuse_no_problem(problem: Any) -> None:
    """Refuse what is not a problem, for example a class or a plain module.

    Raises:
        TypeError: with what to give instead; if the problem lacks a level.
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"`problem` must be a `Problem`, got {shown(problem)}; subclass `Problem`, or make one from "
            "two losses with `Problem.from_functions`"
        )
    for level in ("upper", "lower"):
        if not isinstance(problem._modules.get(level), nn.Module):
            raise TypeError(
                f"`{type(problem).__name__}` has no `self.{level}`; set it to the module that holds the "
                f"{level} variables (`nn.ParameterDict()` where there are none)"
            )
