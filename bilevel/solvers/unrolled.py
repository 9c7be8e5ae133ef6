r"""`Unrolled`: differentiate through the steps of the lower optimizer.

With $(y_{t+1}, s_{t+1}) = \Phi_t(x, y_t, s_t)$ one step of the lower optimizer and its state $s$, the
answer is $\hat y(x) = y_T$ and its derivative comes from the chain rule,

$$ \Big(\frac{dy_T}{dx}\Big)^{\!\top} v = \sum_{t} (\partial_x \Phi_t)^\top \lambda_{t+1}, \qquad
   \lambda_t = (\partial_{(y,s)} \Phi_t)^\top \lambda_{t+1}, \quad \lambda_T = (v, 0). $$

Reverse mode keeps the graph of all steps; *recompute* keeps the iterates only and runs each step
again on the way back; *checkpoint* keeps about $\sqrt T$ states and the graph of about $\sqrt T$ steps;
*mixed* keeps as few states and no second-order graph, its products are gradients with a tangent;
*truncate* differentiates the last steps only; *forward* carries tangents instead and needs no memory
per step, once per upper variable.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Literal, final

import torch

from bilevel.arguments import explained_settings
from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.optimizers import Optimizers, learned_options, listed
from bilevel.oracles import Oracles
from bilevel.refusals import positive, whole
from bilevel.solvers.base import AtOnce, Response, Solver, UnrolledSteps
from bilevel.solvers.unrolling import Unrolling
from bilevel.twins import (
    NOT_LEARNED,
    as_transformation,
    describe,
    learns,
    makes_transformation,
    refuse_learned,
    rule_of,
    transformation_at,
)

AT_ONCE = 8  # steps up to which a compiled hypergradient is one graph: each takes time to compile
MODES = ("reverse", "recompute", "checkpoint", "mixed", "forward")


@final
@explained_settings
@dataclass(frozen=True)
class Unrolled(Solver):
    """Differentiates through `num_steps` steps of the lower optimizer, taken from the current y.

    The unrolled steps are hypothetical: the problem's lower variables and the running optimizer stay
    where they are.

    Args:
        num_steps: number T of unrolled steps.
        optimizer: a torchopt transformation, started afresh; or `None` to branch from the running
            `lower_optimizer` (`torch.optim` SGD, Adam, AdamW, RMSprop, Adagrad) with its state.
        truncate: differentiate the last `truncate` steps only.
        mode: "reverse"; "recompute" (reverse with each step run again on the way back); "checkpoint"
            (the same, segment by segment: memory grows as the square root of the steps); "mixed"
            (checkpoints, and products by forward-over-reverse: no second-order graph; compared with
            reverse mode over one step once per problem); or "forward" (tangents; for few upper
            variables; compared with reverse mode over three steps once per problem).
        max_grad_norm: clip the lower gradient in every unrolled step; give the same number to
            `train(clip_lower=...)`.

    Raises:
        ValueError: if a setting is out of range, or the optimizer has one that is to be learned.
        TypeError: if `optimizer` is not a transformation.

    Example:
        >>> Unrolled(num_steps=10, truncate=5, mode="recompute").num_lower_batches()
        10

    References:
        Gradient-based Hyperparameter Optimization through Reversible Learning (Maclaurin, Duvenaud,
        Adams, 2015), https://arxiv.org/abs/1502.03492
        Truncated Back-propagation for Bilevel Optimization (Shaban, Cheng, Hatch, Boots, 2019),
        https://arxiv.org/abs/1810.10667
        Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin, 2016),
        https://arxiv.org/abs/1604.06174, section 3 (checkpoint)
        Scalable Meta-Learning via Mixed-Mode Differentiation (Kemaev, Calian, Zintgraf, Farquhar, van
        Hasselt, 2025), https://arxiv.org/abs/2505.00793, section 3 (mixed)
    """

    num_steps: int
    optimizer: Any = None
    truncate: int | None = None
    mode: Literal["reverse", "recompute", "checkpoint", "mixed", "forward"] = "reverse"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps)
        if self.truncate is not None:
            whole("truncate", self.truncate)
        if self.truncate is not None and not 1 <= self.truncate <= self.num_steps:
            raise ValueError(
                f"`truncate` must lie between 1 and `num_steps` = {self.num_steps}, "
                f"got {self.truncate!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.optimizer is not None and not makes_transformation(self.optimizer):
            refuse_learned(as_transformation(self.optimizer))
        if self.max_grad_norm is not None:
            positive("max_grad_norm", self.max_grad_norm)

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        settings = [f"{name}={value!r}" for name, value in shown.items() if name != "optimizer"]
        if self.optimizer is not None:
            settings.insert(1, f"optimizer=[{describe(self.optimizer)}]")
        return f"Unrolled({', '.join(settings)})"

    def num_lower_batches(self) -> int:
        return self.num_steps

    def unrolled_steps(self) -> UnrolledSteps:
        return UnrolledSteps(self.num_steps, self.optimizer, self.max_grad_norm)

    def approximates(self) -> bool:
        return self.truncate is not None

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        count = len(oracles.lower_batches)
        if count != 1 and count < self.num_steps:
            raise ValueError(
                f"`Unrolled` takes one lower batch for all steps or one per step: {self.num_steps} "
                f"are needed, got {count}"
            )
        if (
            self.mode == "mixed"
        ):  # products with the lower loss's Hessian, for which no field will do
            refuse_no_lower_loss(
                oracles.problem, '`Unrolled(mode="mixed")`', 'use `mode="checkpoint"`'
            )
        return oracles.differentiated_twice(type(self).__name__)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self.running(oracles, lower_optimizer)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        return Unrolling(self, oracles, self.running(oracles, lower_optimizer)).run()

    def at_once(
        self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None
    ) -> AtOnce | None:
        alone = self.mode != "reverse" or oracles.problem.gives_initial_lower
        if self.num_steps > AT_ONCE or alone:  # others are there to save memory
            return None
        return Unrolling(self, oracles, self.running(oracles, lower_optimizer)).at_once()

    def running(
        self, oracles: Oracles, lower_optimizer: Optimizers | None
    ) -> list[torch.optim.Optimizer]:
        """The optimizers to branch from, if it is they that are unrolled; all must have a twin."""
        if self.optimizer is not None:
            as_transformation(transformation_at(self.optimizer, oracles.upper))
            if makes_transformation(self.optimizer):
                refuse_learned_in_graphs(oracles)
            return []
        if not lower_optimizer:
            raise ValueError(
                "`Unrolled` without `optimizer` branches from the running lower optimizer; pass it "
                "as `lower_optimizer`, or give `Unrolled` a torchopt transformation"
            )
        running = listed(lower_optimizer)
        for optimizer in running:
            rule_of(optimizer)
            if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
                raise ValueError(
                    f"`{type(optimizer).__name__}` has step hooks (a projection?), which `Unrolled` "
                    "does not follow; remove them, or choose `Implicit`"
                )
            learned = learns(optimizer, oracles.slots.variables("upper"))
            if learned:
                refuse_learned_in_graphs(oracles)
            for option in learned_options(optimizer, oracles.problem.parameters()):
                if option in learned:
                    continue
                raise ValueError(
                    f"`{option}` of the lower optimizer is a tensor that is learned or belongs to the "
                    f"problem, and `Unrolled` would take it for a constant: {NOT_LEARNED}"
                )
        return running


def refuse_learned_in_graphs(oracles: Oracles) -> None:
    """Refuse to make graphs of an optimizer with learned settings.

    Raises:
        ValueError: if pieces of work are compiled.
    """
    if oracles.units.compiled:
        raise ValueError(
            "settings of the lower optimizer are learned, and a compiled step takes them for numbers; "
            "use `Unrolled` without `Compiled`, and `train(compile=False)`"
        )
