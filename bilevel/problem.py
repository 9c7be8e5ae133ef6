"""`Problem`: what is optimized - two levels of variables and a loss for each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, cast, final

import optree
import torch
from torch import Tensor, nn

from bilevel.cards import Card, parameters_of, whereabouts
from bilevel.refusals import shown
from bilevel.tree import Tree

Level = Literal["upper", "lower"]
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

    def forward(self, what: Level | Literal["share"], batch: Any) -> Any:
        """The loss of one level; what the oracles call."""
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
        leaves: list[Any] = optree.tree_leaves(batch)
        rows = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim} - {0}
        if len(rows) > 1:
            raise ValueError(
                f"the tensors of a batch of `{type(self).__name__}` have {sorted(rows)} rows, so they "
                "cannot be shared out among processes; override `shard`"
            )
        if rows and (n := rows.pop()) % ranks:
            raise ValueError(
                f"a batch of {n} rows cannot be shared out equally among {ranks} processes; use "
                f"a batch size of {max(n // ranks, 1) * ranks}"
            )

        def share(leaf: Any) -> Any:
            cut = isinstance(leaf, Tensor) and leaf.ndim and len(leaf)
            return leaf.chunk(ranks)[rank] if cut else leaf

        return optree.tree_map(share, batch)

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
        return FunctionProblem(upper_loss, lower_loss, upper, lower)


@final
class Variables(nn.Module):
    """A module made of a (nested) dict of tensors; `tensors()` gives the dict back.

    The tensors lie in the module's own dicts, so that a name may be that of one of its methods, too.
    """

    def __init__(self, tensors: TensorDict, path: str) -> None:
        super().__init__()
        if not isinstance(tensors, Mapping):
            module = isinstance(tensors, nn.Module)
            advice = "; give `dict(module.named_parameters())`" if module else ""
            raise TypeError(
                f"`{path}` must be a dict of tensors, got {type(tensors).__name__}{advice}"
            )
        self._order = list(tensors)
        for key, value in tensors.items():
            where = f"{path}.{key}"
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"a variable of `{path}` is named {key!r}; a name must be a string without dots "
                    'that is not empty (nested dicts make paths: `{"a": {"b": ...}}` gives `a.b`)'
                )
            if isinstance(value, Mapping):
                self._modules[key] = Variables(value, where)
            elif isinstance(value, nn.Parameter):
                self._parameters[key] = value
            elif isinstance(value, Tensor) and value.is_floating_point():
                self._parameters[key] = nn.Parameter(value.detach())
            elif isinstance(value, Tensor) and value.is_complex():
                raise TypeError(
                    f"variable `{where}` is complex; keep it as pairs of reals "
                    "(`torch.view_as_real`) and make it complex in the losses "
                    "(`torch.view_as_complex`), or let the losses close over a constant"
                )
            elif isinstance(value, Tensor):
                self._buffers[key] = value
            else:
                raise TypeError(
                    f"variable `{where}` must be a tensor or a dict of tensors, "
                    f"got {type(value).__name__}"
                )

    def tensors(self) -> dict[str, Any]:
        """The tensors as they are now, nested as they were given."""
        nested = {key: cast(Variables, module).tensors() for key, module in self._modules.items()}
        held = {**nested, **self._parameters, **self._buffers}
        return {key: held[key] for key in self._order}


@final
class FunctionProblem(Problem):
    """What `Problem.from_functions` returns."""

    upper: Variables
    lower: Variables

    def __init__(
        self,
        upper_loss: Callable[[Any, Any, Any], Loss],
        lower_loss: Callable[[Any, Any, Any], Loss],
        upper: TensorDict,
        lower: TensorDict,
    ) -> None:
        super().__init__()
        for name, loss in (("upper_loss", upper_loss), ("lower_loss", lower_loss)):
            if not callable(loss):
                raise TypeError(
                    f"`{name}` must be a function `(upper, lower, batch) -> scalar`, got {shown(loss)}"
                )
        self.upper = Variables(upper, "upper")
        self.lower = Variables(lower, "lower")
        self._losses = {"upper": upper_loss, "lower": lower_loss}

    def _get_name(self) -> str:
        return "Problem.from_functions"

    def extra_repr(self) -> str:
        names = [getattr(f, "__name__", type(f).__name__) for f in self._losses.values()]
        return "losses: {} (upper), {} (lower)".format(*names)

    def upper_loss(self, batch: Any) -> Loss:
        return self._loss("upper", batch)

    def lower_loss(self, batch: Any) -> Loss:
        return self._loss("lower", batch)

    def _loss(self, level: Level, batch: Any) -> Loss:
        upper, lower = self.upper.tensors(), self.lower.tensors()
        try:
            return self._losses[level](upper, lower, batch)
        except (TypeError, KeyError) as error:
            name = f"{level}_loss"
            said = (
                f"`{name}` is called as `{name}(upper, lower, batch)`: `upper` is a dict with "
                f"{_listed(upper)}, `lower` one with {_listed(lower)}"
            )
            if said not in getattr(error, "__notes__", []):
                error.add_note(said)
            raise


def _listed(tensors: TensorDict) -> str:
    return ", ".join(f"`{name}`" for name in tensors) or "nothing"


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
