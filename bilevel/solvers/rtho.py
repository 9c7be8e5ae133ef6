r"""`RTHO`: forward mode along the real lower run, a step at a time.

The solver carries $J_t = dy_t / dx$ (and the same of the lower optimizer's state) beside the run itself.
At each call the upper variables get $\partial_x F + J_t^\top \partial_y F$ at the current y, the lower
optimizer its gradient, and the tangents follow that very step,

$$ J_{t+1} = \partial_y \Phi \, J_t + \partial_x \Phi . $$

Nothing is unrolled and nothing is kept per step: memory and time are those of d tangents, for d upper
variables. While x stands still the answer is the exact derivative of the whole run so far; as x moves,
old contributions belong to old values of x.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bilevel.arguments import explained_settings
from bilevel.optimizers import Optimizers
from bilevel.oracles import Oracles
from bilevel.solvers.answers import Directions
from bilevel.solvers.base import Solver
from bilevel.solvers.tangents import inner, pushed, verify
from bilevel.solvers.unrolled import Unrolled
from bilevel.solvers.unrolling import Unrolling
from bilevel.tree import Tree, norm
from bilevel.twins.moments import moments_of


@final
@explained_settings
@dataclass(frozen=True)
class RTHO(Solver):
    """Real-time hyperparameter optimization: online forward mode for few upper variables.

    Moves both levels, one step of each at a call. The running lower optimizer must have a
    differentiable twin (`torch.optim` SGD, Adam, AdamW, RMSprop, Adagrad).

    Args:
        max_grad_norm: clip the lower gradient in the tangents' step; give the same number to
            `train(clip_lower=...)`.

    Raises:
        ValueError: if the setting is out of range.

    Example:
        >>> RTHO().moves_lower
        True

    References:
        Forward and Reverse Gradient-Based Hyperparameter Optimization (Franceschi, Donini, Frasconi,
        Pontil, 2017), https://arxiv.org/abs/1703.01785, section 3.3. Differs from the paper in:
        any optimizer with a twin, its state's tangents included.
    """

    moves_lower: ClassVar[bool] = True

    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        self._step()

    def num_lower_batches(self) -> int:
        return 1

    def approximates(self) -> bool:
        return True

    def begin(self, oracles: Oracles) -> list[list[Tensor]]:
        return []  # y does not depend on x yet

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        return self._step().context(oracles)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        self._step().check(oracles, lower_optimizer)

    def respond(
        self, oracles: Oracles, state: list[list[Tensor]], lower_optimizer: Optimizers | None
    ) -> Directions:
        step = self._step()
        steps = Unrolling(step, oracles, step.running(oracles, lower_optimizer))
        points, optimizer_state = steps.prepared()
        verify(steps, (0, points, optimizer_state))
        upper, lower = oracles.upper, oracles.lower
        evaluation, direct, by_lower = oracles.partials("upper", upper, lower)
        _, _, grads = oracles.partials("lower", upper, lower)
        target, still = steps.twin.pack(by_lower), [*points, *moments_of(optimizer_state)]
        response = {name: x.new_zeros(x.numel()) for name, x in upper.items()}
        after: list[list[Tensor]] = []
        count = sum(map(len, response.values()))
        if len(state) not in (0, count):
            raise ValueError(
                f"`state` is no state of `RTHO` for this problem, got {len(state)} tangents for {count} "
                "upper entries; give `Hypergradient.state` of this solver's previous call on this "
                "problem, or leave it out to begin afresh"
            )
        given = iter(state or [[torch.zeros_like(s) for s in still]] * count)
        for name, x in upper.items():
            for i in range(x.numel()):
                tangents = next(given)
                response[name][i] = inner(tangents[: len(points)], target)
                direction = torch.zeros_like(response[name])
                direction[i] = 1
                directions = {name: direction.view(x.shape)}
                ends, moments, new = pushed(
                    steps, points, optimizer_state, list(tangents), directions
                )
                like = [*ends, *moments_of(moments)]
                pairs = zip(new, like, strict=True)
                after.append([torch.zeros_like(s) if t is None else t for t, s in pairs])
        terms: Tree = {name: response[name].view(x.shape) for name, x in upper.items()}
        return Directions(
            evaluation, direct, terms, grads, after, lower_residual=norm(grads), num_products=1
        )

    def _step(self) -> Unrolled:
        return Unrolled(1, mode="forward", max_grad_norm=self.max_grad_norm)
