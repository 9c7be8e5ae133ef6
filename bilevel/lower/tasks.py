"""`Tasks`: a problem for each of several tasks, side by side, as one problem for any solver."""

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, final

import optree
import torch
from torch import Tensor, nn

from bilevel.arguments import explained_settings
from bilevel.functions import Variables
from bilevel.losses.answers import scalar
from bilevel.losses.slots import Slots
from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.problem import Level, Loss, Problem, refuse_no_problem
from bilevel.refusals import flag, whole
from bilevel.tree import Tree

_places: MutableMapping[Problem, Slots] = weakref.WeakKeyDictionary()


@final
@explained_settings
class Tasks(Problem):
    r"""Tasks with lower variables of their own, and one upper level for all of them.

    With a batch that holds the data of $T$ tasks along the first dimension of its tensors,

    $$ \min_x \frac{1}{T} \sum_{i=1}^T F_i(x, y_i^*(x)) \quad\text{with}\quad
       y_i^*(x) \in \arg\min_{y_i} G_i(x, y_i). $$

    The lower variables are those of the problem with a first dimension $T$ more. The lower loss is
    the *sum* over tasks, so that a lower step moves each task as if it were alone, and the Hessian is
    block diagonal: `ConjugateGradient` solves each task's system by itself. The upper loss is the mean.

    With `share_upper=False` every task has upper variables of its own, too: an ensemble of independent
    problems (several seeds, several penalties), trained in one go. The upper loss is then the sum.

    The losses are vectorised by `torch.vmap`, with a different dropout mask for each task. Where an
    operation has no batched form (a batch norm in training, a look at a value), `vectorize=False` runs
    the tasks in a loop: the same numbers, more slowly. Buffers are read, and stay as they are.

    Args:
        problem: the problem of one task. Its lower variables are where every task starts; they stay.
        num_tasks: T, how many tasks a batch holds.
        share_upper: whether the tasks have the upper variables in common.
        share_batch: whether all tasks see the same batch, without a first dimension for them.
        vectorize: evaluate all tasks at once.

    Raises:
        TypeError: if `problem` is not a problem.
        ValueError: if a variable belongs to both of its levels, `num_tasks` is not positive, or (in a
            loss) a tensor of the batch holds another number of tasks.

    Example:
        >>> one = Problem.from_functions(
        ...     lambda x, y, t: (y["w"] - t).square().sum(),
        ...     lambda x, y, t: (y["w"] - t).square().sum() + (y["w"] - x["start"]).square().sum(),
        ...     {"start": torch.zeros(2)}, {"w": torch.zeros(2)},
        ... )
        >>> tasks = Tasks(one, num_tasks=5)
        >>> tasks.variables("lower")["w"].shape, tasks.losses("lower", torch.ones(5, 2))[0].tolist()
        (torch.Size([5, 2]), [2.0, 2.0, 2.0, 2.0, 2.0])

    References:
        Meta-Learning with Implicit Gradients (Rajeswaran, Finn, Kakade, Levine, 2019),
        https://arxiv.org/abs/1909.04630, equation (1).
    """

    def __init__(
        self,
        problem: Problem,
        num_tasks: int,
        *,
        share_upper: bool = True,
        share_batch: bool = False,
        vectorize: bool = True,
    ) -> None:
        super().__init__()
        refuse_no_problem(problem)
        refuse_no_lower_loss(problem, "`Tasks`", "solve its tasks one by one")
        self.num_tasks = self.separate = whole("num_tasks", num_tasks)
        self.share_upper = flag("share_upper", share_upper)
        self.share_batch = flag("share_batch", share_batch)
        self.vectorize = flag("vectorize", vectorize)
        both = {id(p) for p in problem.variables("upper").values()}
        for name, p in problem.variables("lower").items():
            if id(p) in both:
                raise ValueError(
                    f"`{name}` of `{type(problem).__name__}` belongs to both levels, so the tasks "
                    "cannot have their own; give the levels variables of their own"
                )
        self.problem = problem
        _slots(problem)  # now, while it holds variables of its own
        self.upper = problem.upper if share_upper else self._stacked("upper")
        self.lower = self._stacked("lower")
        self.stops_lower_gradient = problem.stops_lower_gradient

    def _stacked(self, level: Level) -> nn.Module:
        nested: dict[str, Any] = {}
        for name, p in self.problem.variables(level).items():
            *path, last = name.split(".")
            inner = nested
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = p.detach().expand(self.num_tasks, *p.shape).clone()
        return Variables(nested, level)

    def extra_repr(self) -> str:
        shared = "in common" if self.share_upper else "one each"
        return (
            f"of: {type(self.problem).__name__}\ntasks: {self.num_tasks}, upper variables {shared}"
        )

    def upper_loss(self, batch: Any) -> Loss:
        losses, logs = self.losses("upper", batch)
        return losses.mean() if self.share_upper else losses.sum(), logs

    def lower_loss(self, batch: Any) -> Loss:
        losses, logs = self.losses("lower", batch)
        return losses.sum(), logs

    def losses(self, level: Level, batch: Any) -> tuple[Tensor, Tree]:
        """The loss of each task, shape (num_tasks,), and the means of what they logged."""
        own: list[tuple[Level, Tree]] = [("lower", self.variables("lower"))]
        if not self.share_upper:
            own.append(("upper", self.variables("upper")))
        slots = _slots(self.problem)
        places = [slots.variables(which) for which, _ in own]

        def one(values: list[list[Tensor]], batch: Any) -> tuple[Tensor, Tree]:
            pairs = [
                (place, dict(zip(place, parts, strict=True)))
                for place, parts in zip(places, values, strict=True)
            ]
            with slots.substitute(*pairs).in_place():
                answer = self.problem(level, batch)
            return scalar(answer, level, self.problem)

        values = [list(tree.values()) for _, tree in own]
        run = self._at_once if self.vectorize else self._in_turn
        losses, logs = run(one, values, batch)
        return losses, {name: v.to(losses.dtype).mean() for name, v in logs.items()}

    def _at_once(
        self, one: Callable[..., Any], values: list[list[Tensor]], batch: Any
    ) -> tuple[Tensor, Tree]:
        parts, structure = optree.tree_flatten(batch, none_is_leaf=True)
        cut = [self._is_cut(part) for part in parts]

        def call(values: list[list[Tensor]], *tensors: Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if c else p for c, p in zip(cut, parts, strict=True)]
            return one(values, optree.tree_unflatten(structure, filled))

        tensors = [part for c, part in zip(cut, parts, strict=True) if c]
        try:
            found: tuple[Tensor, Tree] = torch.vmap(call, randomness="different")(values, *tensors)
        except RuntimeError as error:
            error.add_note(
                "raised while `Tasks` evaluated all tasks at once; if an operation has no batched "
                "form, `vectorize=False` runs them in a loop"
            )
            raise
        return found

    def _in_turn(
        self, one: Callable[..., Any], values: list[list[Tensor]], batch: Any
    ) -> tuple[Tensor, Tree]:
        found = [
            one([[v[i] for v in parts] for parts in values], task)
            for i, task in enumerate(self.apart(batch))
        ]
        losses, logs = zip(*found, strict=True)
        return torch.stack(losses), {n: torch.stack([log[n] for log in logs]) for n in logs[0]}

    # ------------------------------------------------------------------ what the problem has

    def draw(self, data: Any, generator: torch.Generator) -> Any:
        if type(self.problem).draw is Problem.draw:
            return data
        if self.share_batch:
            return self.problem.draw(data, generator)
        return self._each(lambda task: self.problem.draw(task, generator), data)

    def draw_lower(self, batch: Any, generator: torch.Generator, step: int) -> Any:
        if not self.problem.draws_every_lower_step:
            return batch
        if self.share_batch:
            return self.problem.draw_lower(batch, generator, step)
        return self._each(lambda task: self.problem.draw_lower(task, generator, step), batch)

    def shard(self, batch: Any, rank: int, ranks: int) -> Any:
        if self.share_batch:
            return self.problem.shard(batch, rank, ranks)
        return self._each(lambda task: self.problem.shard(task, rank, ranks), batch)

    @property
    def gives_initial_lower(self) -> bool:
        return self.problem.gives_initial_lower

    def initial_lower(self) -> Tree | None:
        if self.share_upper:
            made = self.problem.initial_lower()
            return made and {n: y.expand(self.num_tasks, *y.shape) for n, y in made.items()}
        slots, found = _slots(self.problem), []
        own, mine = slots.variables("upper"), self.variables("upper")
        for i in range(self.num_tasks):
            with slots.substitute((own, {name: x[i] for name, x in mine.items()})).in_place():
                made = self.problem.initial_lower()
            if not made:
                return None
            found.append(made)
        return {name: torch.stack([made[name] for made in found]) for name in found[0]}

    def best_response(self, batch: Any) -> Tree | None:
        slots, found = _slots(self.problem), []
        own, mine = slots.variables("upper"), self.variables("upper")
        for i, task in enumerate(self.apart(batch)):
            here = {name: x if self.share_upper else x[i] for name, x in mine.items()}
            pairs = [] if self.share_upper else [(own, here)]
            with slots.substitute(*pairs).in_place():
                answer = self.problem.best_response(task)
            if answer is None:
                return None
            found.append(answer)
        return {name: torch.stack([answer[name] for answer in found]) for name in found[0]}

    # ------------------------------------------------------------------ batches of tasks

    def _each(self, function: Callable[[Any], Any], batch: Any) -> Any:
        """The answers for the tasks, stacked."""
        found = [function(task) for task in self.apart(batch)]
        return optree.tree_map(_together, *found, none_is_leaf=True)

    def apart(self, batch: Any) -> list[Any]:
        """The batch of each task."""
        return [
            optree.tree_map(
                lambda part, i=i: part[i] if self._is_cut(part) else part, batch, none_is_leaf=True
            )
            for i in range(self.num_tasks)
        ]

    def _is_cut(self, part: Any) -> bool:
        """Whether a part of a batch holds one row for each task; numbers belong to all."""
        if self.share_batch or not isinstance(part, Tensor) or not part.ndim:
            return False
        if len(part) != self.num_tasks:
            raise ValueError(
                f"a tensor of the batch has shape {tuple(part.shape)}, but its first dimension must "
                f"count the {self.num_tasks} tasks; stack the tasks' data, or make `Tasks` with "
                f"`num_tasks={len(part)}`"
            )
        return True


def _slots(problem: Problem) -> Slots:
    """Where the problem of one task holds its variables, found once."""
    if problem not in _places:
        _places[problem] = Slots(problem)
    return _places[problem]


def _together(*parts: Any) -> Any:
    return torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0]
