"""`explained`: a call whose arguments do not fit is answered with those that do."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from bilevel.refusals import nearest

P = ParamSpec("P")
T = TypeVar("T")
Class = TypeVar("Class", bound=type)

_ELSEWHERE: Mapping[str, tuple[str, ...]] = {  # what arguments are called elsewhere
    **dict.fromkeys(("max_iter", "maxiter", "num_steps", "max_steps"), ("max_steps", "num_steps")),
    **dict.fromkeys(("iterations", "steps", "n_iter", "epochs"), ("num_steps", "max_steps")),
    **dict.fromkeys(("tol", "tolerance", "atol", "eps"), ("rtol", "tolerance")),
    **dict.fromkeys(("lr", "learning_rate", "alpha"), ("step_size",)),
    **dict.fromkeys(("ridge", "regularization", "l2"), ("damping",)),
    **dict.fromkeys(("n_samples", "num_samples", "size", "num"), ("n",)),
    **dict.fromkeys(("n_hidden", "hidden_dim", "num_hidden", "n_components"), ("latent_dim",)),
    **dict.fromkeys(("n_visible", "num_visible", "input_dim"), ("visible_dim",)),
    **dict.fromkeys(("k", "cd_k", "num_sweeps", "sweeps"), ("steps", "sweeps")),
}
_SEEDS = ("seed", "random_state", "rng")


def explained(
    function: Callable[P, T], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> Callable[P, T]:
    """The function, with a sentence where Python has only the name of an argument.

    Nothing is looked at until a call has failed.

    Args:
        function: any function; for a class see `explained_settings`.
        elsewhere: clauses that say what to give instead of an argument there is not.

    Example:
        >>> def solve(*, max_steps=10): return max_steps
        >>> explained(solve)(max_iter=3)
        Traceback (most recent call last):
            ...
        TypeError: `solve` has no argument `max_iter`; did you mean `max_steps`?
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError:
            said = _misfit(function, args, kwargs, elsewhere)
            if said is None:
                raise
        raise TypeError(said)

    return call


def explaining(**elsewhere: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`explained` as a decorator, with clauses for arguments that there are not."""
    return lambda function: explained(function, elsewhere)


def explained_settings(record: Class) -> Class:
    """The class, whose constructor is `explained`."""
    setattr(record, "__init__", explained(cast(Any, record).__init__))  # noqa: B010
    return record


def explained_methods(*names: str) -> Callable[[Class], Class]:
    """A decorator of a class, some of whose methods are `explained`."""

    def put(record: Class) -> Class:
        for name in names:
            method = vars(record)[name]
            of_class = isinstance(method, classmethod)
            told = explained(method.__func__ if of_class else method)
            setattr(record, name, classmethod(told) if of_class else told)
        return record

    return put


def _misfit(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    given: Mapping[str, Any],
    elsewhere: Mapping[str, str],
) -> str | None:
    """What is wrong with the arguments; `None` if they fit, and the error came from inside."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **given)
        return None
    except TypeError:
        pass
    parameters = signature.parameters
    first = next(iter(parameters), "")
    bound = first in ("self", "cls")
    name = function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[2]
    for unknown in (n for n in given if n not in parameters):
        known = [n for n in parameters if n not in ("self", "cls", "args", "kwargs")]
        hint = elsewhere.get(unknown) or _meant(unknown, known)
        return f"`{name}` has no argument `{unknown}`; {hint}"
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    places = [n for n, p in parameters.items() if p.kind in positional]
    if len(args) > len(places):
        rest = [n for n in parameters if n not in places and parameters[n].kind not in several]
        by_name = f", the others by name: {_listed(rest)}" if rest else ""
        if not rest and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            by_name = ", the others by name"
        own = places[1:] if bound else places
        takes = _listed(own) if own else "nothing"
        return f"`{name}` takes {takes} by position{by_name}; got {len(args) - bound} arguments"
    missing = [
        n
        for i, (n, p) in enumerate(parameters.items())
        if p.default is p.empty
        and p.kind not in several
        and n not in given
        and (i >= len(args) or p.kind is p.KEYWORD_ONLY)
    ]
    if not missing:
        return f"`{name}` got {_listed([n for n in places[: len(args)] if n in given])} twice"
    method = first == "self" and not function.__qualname__.endswith("__init__")
    call = " (it is called on an object, not on the class)" if method else ""
    return f"`{name}` needs {_listed(missing)}{call}; `help({name.split('.')[0]})` describes all"


def _meant(unknown: str, known: list[str]) -> str:
    if unknown in _SEEDS and "generator" in known:
        return "give `generator=torch.Generator().manual_seed(0)`"
    for other in _ELSEWHERE.get(unknown, ()):
        if other in known:
            return f"did you mean `{other}`?"
    return nearest(unknown, known) if known else "it takes none"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
