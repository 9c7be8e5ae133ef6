"""`UnitRunner`: how a solver's pieces of work run, as they are or compiled.

A *unit* is a pure function of tensors that a solver repeats: a step of the lower level, its adjoint, a
step of a linear solver, an evaluation of the upper loss. The solver's own loop stays in Python, so what
compiling costs does not depend on how long the loop is.

A *stage* is a unit in two parts. `function(*fixed)` returns `(early, rest)`, and `rest(*moving)` is
called later, maybe often: what does not depend on the moving arguments is computed once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeAlias, final

Rest: TypeAlias = Callable[..., Any]


class Stage(ABC):
    """A unit of which the first part has run."""

    @property
    @abstractmethod
    def early(self) -> Any:
        """What does not depend on the moving arguments."""

    @abstractmethod
    def follow(self) -> "Stage":
        """The same unit where the first part has led: a step after a step.

        The answer of the first part takes the places of the last arguments, all but its own last
        entry, which is a report.
        """

    @abstractmethod
    def __call__(self, *moving: Any) -> Any:
        """The rest."""

    @abstractmethod
    def then(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(rest, *tensors) -> tensors`, to be called many times with tensors of the same kinds.

        Args:
            key: what tells this step from others; it holds all that the step depends on besides its
                arguments and the functions it closes over.
            step: a function of tensors that calls the rest.
        """


class UnitRunner(ABC):
    """How a solver's pieces of work run.

    Attributes:
        compiled: whether they run as graphs, each for itself: autograd sees none of them.
    """

    compiled: ClassVar[bool]

    @abstractmethod
    def call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, which writes nothing and returns tensors without a graph.

        Args:
            key: what tells this function from others; it holds all that the function depends on
                besides the arguments and the problem.
            function: a function of trees of tensors.
            arguments: trees, as `ready` returns them.
        """

    @abstractmethod
    def attempt(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """`call` if that runs as a graph, else `None`, without a warning: there is another way.

        Args:
            key: as in `call`.
            function: as in `call`.
            arguments: as in `call`.
        """

    @abstractmethod
    def stage(
        self,
        key: Hashable,
        function: Callable[..., tuple[Any, Rest]],
        fixed: Sequence[Any],
        like: Sequence[Any],
    ) -> Stage:
        """The first part of `function(*fixed) -> (early, rest)`.

        Args:
            key: as in `call`.
            function: a function of trees of tensors.
            fixed: its arguments, as `ready` returns them.
            like: tensors of the kinds that the rest will be called with.
        """

    @abstractmethod
    def ready(self, tree: Any) -> Any:
        """A tree as `call` and `stage` take it: what it is made of is found once."""

    @abstractmethod
    def prepared(
        self, context: Callable[[], AbstractContextManager[Any]]
    ) -> AbstractContextManager[Any]:
        """What to enter around a hypergradient.

        Args:
            context: what pieces of work that run as they are need around them.
        """

    @final
    def again(
        self, key: Hashable, function: Callable[..., Any], fixed: Sequence[Any], like: Sequence[Any]
    ) -> Callable[..., Stage]:
        """The same stage with other last arguments."""

        def run(*last: Any) -> Stage:
            first = fixed[: len(fixed) - len(last)]
            return self.stage(key, function, [*first, *map(self.ready, last)], like)

        return run

    @abstractmethod
    def once(self, key: Hashable, function: Callable[[], Any], given: Any = None) -> Any:
        """What a function found, kept as long as the graphs are good.

        Args:
            key: what tells this function from others.
            function: a function that decides something.
            given: a tree that it reads, as `ready` returns it; its structure, shapes, dtypes and
                constants decide.
        """


@final
class EagerStage(Stage):
    """A stage as it is."""

    def __init__(
        self,
        early: Any,
        rest: Rest,
        again: Callable[..., Stage],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._early = early
        self._rest = rest
        self._again = again
        self._context = context

    @property
    def early(self) -> Any:
        return self._early

    def follow(self) -> Stage:
        return self._again(*self._early[:-1])

    def __call__(self, *moving: Any) -> Any:
        with self._context():
            return self._rest(*moving)

    def then(self, key: Hashable, step: Callable[..., Any]) -> Callable[..., Any]:
        return partial(step, self)


@final
class EagerUnits(UnitRunner):
    """Units as they are."""

    compiled = False

    def call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def attempt(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        return None

    def stage(
        self,
        key: Hashable,
        function: Callable[..., tuple[Any, Rest]],
        fixed: Sequence[Any],
        like: Sequence[Any],
    ) -> Stage:
        return EagerStage(*function(*fixed), self.again(key, function, fixed, like))

    def ready(self, tree: Any) -> Any:
        return tree

    def prepared(
        self, context: Callable[[], AbstractContextManager[Any]]
    ) -> AbstractContextManager[Any]:
        return context()

    def once(self, key: Hashable, function: Callable[[], Any], given: Any = None) -> Any:
        return function()
