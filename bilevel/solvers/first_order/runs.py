"""What the solvers of this room share: gradient steps on a copy of the lower variables, penalties."""

from bilevel.oracles import Oracles
from bilevel.refusals import positive, whole
from bilevel.solvers.step_sizes import Rates, check_step_size
from bilevel.tree import Tree, add


def fresh_copy(oracles: Oracles) -> Tree:
    """The lower variables as they are now, in memory of their own."""
    return {name: y.detach().clone() for name, y in oracles.lower.items()}


def stepped(points: Tree, grads: Tree, step_sizes: Rates) -> Tree:
    """A step of gradient descent, in new tensors; variables without a step size stay."""
    moved = {n: points[n].detach() - rate * grads[n] for n, rate in step_sizes.items()}
    # a learning rate that is a tensor may have another dtype
    return {n: moved[n].to(y.dtype) if n in moved else y.detach() for n, y in points.items()}


def lower_run(
    oracles: Oracles,
    points: Tree,
    step_sizes: Rates,
    num_steps: int,
    *,
    pull: float = 0.0,
    upper: Tree | None = None,
) -> tuple[Tree, Tree]:
    """Gradient descent from `points` on G(x, .), or on G(x, .) + pull F(x, .), in the lower variables.

    Args:
        oracles: the losses, at the upper variables x.
        points: where it begins.
        step_sizes: of each variable.
        num_steps: how many; step t sees lower batch t, from the first again where there are fewer.
        pull: the weight of the upper loss, in units of the lower one.
        upper: other upper variables than those that the problem has now.

    Returns:
        Where it ended, and dF/dy where it began (nothing without pull).
    """
    upper = oracles.upper if upper is None else upper
    first: Tree = {}
    for t in range(num_steps):
        _, _, grads = oracles.partials("lower", upper, points, t % len(oracles.lower_batches))
        if pull:
            _, _, of_upper = oracles.partials("upper", upper, points)
            grads, first = add(grads, of_upper, pull), first or of_upper
        points = stepped(points, grads, step_sizes)
    return points, first


def last_batch(oracles: Oracles) -> int:
    """The number of the lower batch that a hypergradient is taken on."""
    return len(oracles.lower_batches) - 1


def check_run(num_steps: int, step_size: float | None) -> None:
    """Refuse settings of gradient steps that could not be.

    Raises:
        ValueError: if one is out of range.
        TypeError: if one is not a number.
    """
    whole("num_steps", num_steps)
    check_step_size(step_size)


def check_penalty(penalty: float, growth: float, max_penalty: float | None, *, zero: bool) -> None:
    """Refuse penalties that could not be: `growth` is what one grows by at each call.

    Raises:
        ValueError: if one is out of range.
        TypeError: if one is not a number.
    """
    positive("penalty", penalty, zero=zero)
    positive("growth", growth, zero=True)
    if max_penalty is not None:
        positive("max_penalty", max_penalty)
        if max_penalty < penalty:
            raise ValueError(
                f"`max_penalty` must not be below `penalty` = {penalty!r}, got {max_penalty!r}"
            )


def grown(penalty: float, growth: float, max_penalty: float | None, calls: int) -> float:
    """The penalty at a call, after so many before it."""
    now = penalty + growth * calls
    return now if max_penalty is None else min(now, max_penalty)
