"""Problems that are made from functions and dicts of tensors."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast, final

from torch import Tensor, nn

from bilevel.condition import ConditionProblem
from bilevel.constraints import Constraint
from bilevel.problem import Loss, Problem, TensorDict
from bilevel.refusals import callable_or_none, positive, shown

Function: TypeAlias = Callable[[Any, Any, Any], Any]


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


class _TwoLosses(Problem):
    """Abstract base of problems whose losses are two functions of the variables."""

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
        self._losses = _Functions(upper_loss, "lower_loss", lower_loss)
        self.upper = Variables(upper, "upper")
        self.lower = Variables(lower, "lower")

    def _get_name(self) -> str:
        return "Problem.from_functions"

    @abstractmethod
    def extra_repr(self) -> str:
        """The functions, and what there is besides."""

    def upper_loss(self, batch: Any) -> Loss:
        return cast(Loss, self._losses("upper_loss", self.upper, self.lower, batch))

    def lower_loss(self, batch: Any) -> Loss:
        return cast(Loss, self._losses("lower_loss", self.upper, self.lower, batch))


@final
class FunctionProblem(_TwoLosses):
    """What `Problem.from_functions` returns."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        losses = state["_losses"]
        if isinstance(losses, dict):  # a pickle of an earlier version
            losses = _Functions(losses["upper"], "lower_loss", losses["lower"])
        super().__setstate__({**state, "_losses": losses})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return str(self._losses)


@final
class ConstrainedFunctions(_TwoLosses):
    """What `Problem.from_functions` returns where there are constraints."""

    def __init__(
        self,
        constraints: Callable[[Any], Mapping[str, Constraint]],
        proximal_step: float,
        *functions_and_variables: Any,
    ) -> None:
        callable_or_none("constraints", constraints, "constraints(upper) -> {name: constraint}")
        positive("proximal_step", proximal_step)
        super().__init__(*functions_and_variables)
        self._constraints = constraints
        self.proximal_step = float(proximal_step)

    def extra_repr(self) -> str:
        return f"{self._losses}\nconstraints: by a function of the upper variables"

    def lower_constraints(self) -> Mapping[str, Constraint]:
        return self._constraints(self.upper.tensors())


@final
class FunctionCondition(ConditionProblem):
    """What `Problem.from_condition` and `Problem.from_map` return."""

    upper: Variables
    lower: Variables

    def __init__(
        self,
        upper_loss: Callable[[Any, Any, Any], Loss],
        function: Callable[[Any, Any, Any], TensorDict],
        upper: TensorDict,
        lower: TensorDict,
        *,
        is_map: bool = False,
    ) -> None:
        super().__init__()
        self._is_map = is_map
        self._name = "lower_map" if is_map else "lower_condition"
        self._functions = _Functions(upper_loss, self._name, function)
        self.upper = Variables(upper, "upper")
        self.lower = Variables(lower, "lower")

    def _get_name(self) -> str:
        return "Problem.from_map" if self._is_map else "Problem.from_condition"

    def extra_repr(self) -> str:
        return str(self._functions)

    def upper_loss(self, batch: Any) -> Loss:
        return cast(Loss, self._functions("upper_loss", self.upper, self.lower, batch))

    def lower_condition(self, batch: Any) -> Mapping[str, Tensor]:
        answer = self._functions(self._name, self.upper, self.lower, batch)
        if not isinstance(answer, Mapping):
            raise TypeError(
                f"`{self._name}` must return a dict like `lower`, with {_listed(self.lower.tensors())}; "
                f"got {shown(answer)}"
            )
        given = _flat(answer)
        if not self._is_map:
            return given
        points = dict(self.lower.named_parameters())
        if odd := given.keys() ^ points.keys():
            raise ValueError(
                f"`lower_map` must return a dict like `lower`, with {_listed(points)}; "
                f"`{min(odd)}` is in one of the two only"
            )
        for name, point in points.items():
            if isinstance(given[name], Tensor) and given[name].shape != point.shape:
                raise ValueError(
                    f"`lower_map` gives `{name}` the shape {tuple(given[name].shape)}, but the variable "
                    f"has {tuple(point.shape)}: a map leads from y to another y"
                )
        return {name: point - given[name] for name, point in points.items()}


@final
class _Functions:
    """The two functions of a problem, called with its variables as they were given: as nested dicts."""

    def __init__(self, upper: Function, lower_name: str, lower: Function) -> None:
        self._by_name = {"upper_loss": upper, lower_name: lower}
        for name, function in self._by_name.items():
            if not callable(function):
                result = "scalar" if name.endswith("loss") else "dict"
                raise TypeError(
                    f"`{name}` must be a function `(upper, lower, batch) -> {result}`, "
                    f"got {shown(function)}"
                )

    def __call__(self, name: str, upper: Variables, lower: Variables, batch: Any) -> Any:
        x, y = upper.tensors(), lower.tensors()
        try:
            return self._by_name[name](x, y, batch)
        except (TypeError, KeyError) as error:
            said = (
                f"`{name}` is called as `{name}(upper, lower, batch)`: `upper` is a dict with "
                f"{_listed(x)}, `lower` one with {_listed(y)}"
            )
            if said not in getattr(error, "__notes__", []):
                error.add_note(said)
            raise

    def __str__(self) -> str:
        names = [getattr(f, "__name__", type(f).__name__) for f in self._by_name.values()]
        return "losses: {} (upper), {} (lower)".format(*names)


def _flat(nested: TensorDict, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, named by path as the variables are."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
        found.update(inner)
    return found


def _listed(tensors: TensorDict) -> str:
    return ", ".join(f"`{name}`" for name in tensors) or "nothing"
