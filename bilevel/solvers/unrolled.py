r"""`Unrolled`: differentiate through the steps of the lower optimizer.

With $(y_{t+1}, s_{t+1}) = \Phi_t(x, y_t, s_t)$ one step of the lower optimizer and its state $s$, the
answer is $\hat y(x) = y_T$ and its derivative comes from the chain rule,

$$ \Big(\frac{dy_T}{dx}\Big)^{\!\top} v = \sum_{t} (\partial_x \Phi_t)^\top \lambda_{t+1}, \qquad
   \lambda_t = (\partial_{(y,s)} \Phi_t)^\top \lambda_{t+1}, \quad \lambda_T = (v, 0). $$

Reverse mode keeps the graph of all steps; *recompute* keeps the iterates only and runs each step
again on the way back (a third more time, a fraction of the memory); *truncate* differentiates the
last steps only; *forward* carries tangents instead and needs no memory per step, once per upper
variable.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.autodiff import vector_jacobian_product
from bilevel.distributed import average
from bilevel.linear.base import positive
from bilevel.optimizers import Optimizers, listed
from bilevel.oracles import Oracles
from bilevel.solvers.base import Response, ResponseProduct, Solver
from bilevel.tree import Tree, norm
from bilevel.twins import (
    Gradients,
    RunningTwin,
    TransformationTwin,
    Twin,
    as_transformation,
    clip,
    describe,
    rule_of,
)


@dataclass(frozen=True)
class Unrolled(Solver):
    """Differentiates through `num_steps` steps of the lower optimizer, taken from the current y.

    The unrolled steps are hypothetical: the problem's lower variables and the running optimizer stay
    where they are.

    Args:
        num_steps: number T of unrolled steps.
        optimizer: a torchopt transformation, started afresh; or `None` to branch from the running
            `lower_optimizer` (`torch.optim` SGD, Adam, AdamW) with its state.
        truncate: differentiate the last `truncate` steps only.
        mode: "reverse", "recompute" (reverse with the steps run again on the way back) or "forward"
            (tangents; for few upper variables).
        max_grad_norm: clip the lower gradient in every unrolled step; give the same number to
            `train(clip_lower=...)`.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if `optimizer` is not a transformation.

    Example:
        >>> Unrolled(num_steps=10, truncate=5, mode="recompute").num_lower_batches()
        10

    References:
        Gradient-based Hyperparameter Optimization through Reversible Learning (Maclaurin, Duvenaud,
        Adams, 2015), https://arxiv.org/abs/1502.03492
        Truncated Back-propagation for Bilevel Optimization (Shaban, Cheng, Hatch, Boots, 2019),
        https://arxiv.org/abs/1810.10667
    """

    num_steps: int
    optimizer: Any = None
    truncate: int | None = None
    mode: Literal["reverse", "recompute", "forward"] = "reverse"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        positive("num_steps", self.num_steps)
        if self.truncate is not None and not 1 <= self.truncate <= self.num_steps:
            raise ValueError(
                f"`truncate` must lie between 1 and `num_steps` = {self.num_steps}, "
                f"got {self.truncate!r}"
            )
        if self.mode not in ("reverse", "recompute", "forward"):
            raise ValueError(
                f'`mode` must be "reverse", "recompute" or "forward", got {self.mode!r}'
            )
        if self.optimizer is not None:
            as_transformation(self.optimizer)
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

    def context(self, oracles: Oracles) -> AbstractContextManager[None]:
        count = len(oracles.lower_batches)
        if count != 1 and count < self.num_steps:
            raise ValueError(
                f"`Unrolled` takes one lower batch for all steps or one per step: {self.num_steps} "
                f"are needed, got {count}"
            )
        return oracles.differentiated_twice(type(self).__name__)

    def check(self, oracles: Oracles, lower_optimizer: Optimizers | None) -> None:
        with self.context(oracles):
            self._running(lower_optimizer)

    def respond(self, oracles: Oracles, state: Any, lower_optimizer: Optimizers | None) -> Response:
        return _Unroll(self, oracles, self._running(lower_optimizer)).run()

    def _running(self, lower_optimizer: Optimizers | None) -> list[torch.optim.Optimizer]:
        """The optimizers to branch from, if it is they that are unrolled; all must have a twin."""
        if self.optimizer is not None:
            return []
        if not lower_optimizer:
            raise ValueError(
                "`Unrolled` without `optimizer` branches from the running lower optimizer; pass it "
                "as `lower_optimizer`, or give `Unrolled` a torchopt transformation"
            )
        running = listed(lower_optimizer)
        for optimizer in running:
            rule_of(optimizer)
        return running


class _Unroll:
    """One unrolling: the iterates of a twin at the oracles' upper variables."""

    def __init__(
        self, settings: Unrolled, oracles: Oracles, running: list[torch.optim.Optimizer]
    ) -> None:
        self.settings = settings
        self.oracles = oracles
        self.running = running
        self.upper = oracles.upper
        self.one_batch = len(oracles.lower_batches) == 1

    def run(self) -> Response:
        steps, reverse = self.settings.num_steps, self.settings.mode == "reverse"
        first = steps - (self.settings.truncate or steps)
        lower = self.oracles.lower
        grads = self._gradients(self.upper, lower, 0, create_graph=reverse and first == 0)
        self.twin = self._make_twin(lower, grads)
        points = self.twin.pack(lower)
        state = self.twin.start(points)
        saved = []
        for t in range(steps):
            graph = reverse and t >= first
            if t <= first or not reverse:
                points = [p.detach().requires_grad_() for p in points]
                state = _map_moments(Tensor.detach, state)
            if t == first or (t > first and self.settings.mode == "recompute"):
                saved.append((t, points, state))
            if t > 0:
                at = self.twin.unpack(points)
                grads = self._gradients(self.upper, at, t, create_graph=graph)
            with torch.set_grad_enabled(graph):
                points, state = self.twin.step(points, self._clipped(grads), state)
        residual = norm([g.detach() for g in grads.values() if g is not None])
        if reverse:
            vjp = self._reverse(points)
        else:
            vjp = (self._recompute if self.settings.mode == "recompute" else self._forward)(saved)
        return Response(self.twin.unpack(points), vjp, residual)

    def _make_twin(self, lower: Tree, gradients: Gradients) -> Twin:
        # torch's optimizers skip variables without a gradient, so the twin must know them
        used = {name for name, g in gradients.items() if g is not None}
        if self.settings.optimizer is not None:
            return TransformationTwin(as_transformation(self.settings.optimizer), lower, used)
        return RunningTwin(self.running, self.oracles.wiring.variables("lower"), lower, used)

    def _gradients(self, upper: Tree, lower: Tree, t: int, *, create_graph: bool) -> Gradients:
        index = 0 if self.one_batch else t
        # variables that no optimizer moves are constants, yet must be differentiable like the rest
        lower = {n: y if y.requires_grad else y.requires_grad_() for n, y in lower.items()}
        _, grads = self.oracles.lower_gradient(upper, lower, index, create_graph=create_graph)
        return grads

    def _step(
        self, upper: Tree, points: list[Tensor], state: Any, t: int, *, create_graph: bool
    ) -> tuple[list[Tensor], Any]:
        """A step that is differentiated in reverse (`create_graph`) or carries tangents."""
        grads = self._gradients(upper, self.twin.unpack(points), t, create_graph=create_graph)
        return self.twin.step(points, self._clipped(grads), state)

    def _clipped(self, gradients: Gradients) -> Gradients:
        most = self.settings.max_grad_norm
        return gradients if most is None else clip(gradients, most)

    def _reverse(self, points: list[Tensor]) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            upper, target = list(self.upper.values()), self.twin.pack(cotangent)
            product = vector_jacobian_product(points, upper, target)
            return self._product(product)

        return vjp

    def _recompute(
        self, saved: list[tuple[int, list[Tensor], Any]]
    ) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            upper = list(self.upper.values())
            total = [torch.zeros_like(x) for x in upper]
            adjoint: list[Tensor] = self.twin.pack(cotangent)
            for t, points, state in reversed(saved):
                grads = self._pull_back(t, points, state, adjoint)
                total = [a + g for a, g in zip(total, grads, strict=False)]
                adjoint = grads[len(upper) :]
            return self._product(total)

        return vjp

    def _pull_back(
        self, t: int, points: list[Tensor], state: Any, adjoint: list[Tensor]
    ) -> list[Tensor]:
        """The adjoint of step t in (x, y, s); the step's graph ends with this call."""
        points = [p.detach().requires_grad_() for p in points]
        state = _map_moments(lambda s: s.detach().requires_grad_(), state)
        after, next_state = self._step(self.upper, points, state, t, create_graph=True)
        outputs = [*after, *_moments(next_state)]
        # after the last step nothing depends on the optimizer's state
        adjoint = adjoint + [torch.zeros_like(s) for s in outputs[len(adjoint) :]]
        inputs = [*self.upper.values(), *points, *_moments(state)]
        return vector_jacobian_product(outputs, inputs, adjoint)

    def _forward(
        self, saved: list[tuple[int, list[Tensor], Any]]
    ) -> Callable[[Tree], ResponseProduct]:
        def vjp(cotangent: Tree) -> ResponseProduct:
            target = self.twin.pack(cotangent)
            product = {name: torch.zeros_like(x) for name, x in self.upper.items()}
            for name, x in self.upper.items():
                for i in range(x.numel()):
                    direction = torch.zeros_like(x).view(-1)
                    direction[i] = 1
                    try:
                        tangents = self._tangents(saved, name, direction.view_as(x))
                    except (NotImplementedError, RuntimeError) as error:  # e.g. `F.mse_loss`
                        raise RuntimeError(
                            "torch cannot differentiate this lower loss in forward mode "
                            f"({str(error).splitlines()[0]}); use `mode='recompute'`"
                        ) from error
                    pairs = zip(tangents, target, strict=True)
                    product[name].view(-1)[i] = sum((a * b).sum() for a, b in pairs)
            return self._product(list(product.values()))

        return vjp

    def _tangents(
        self, saved: list[tuple[int, list[Tensor], Any]], name: str, direction: Tensor
    ) -> list[Tensor]:
        """d(points after the last step) along one direction of the upper variables."""
        first, points, state = saved[0]
        tangents: list[Tensor | None] = [None] * (len(points) + len(_moments(state)))
        for t in range(first, self.settings.num_steps):
            with forward_ad.dual_level():  # a level keeps its tangents, so one for each step
                x = forward_ad.make_dual(self.upper[name].detach().requires_grad_(), direction)
                carried = iter(tangents)
                points = [_dual(p.detach().requires_grad_(), next(carried)) for p in points]
                duals = [_dual(s, next(carried)) for s in _moments(state)]
                state = _replace_moments(state, duals)
                upper = {**self.upper, name: x}
                points, state = self._step(upper, points, state, t, create_graph=False)
                pairs = [forward_ad.unpack_dual(d) for d in (*points, *_moments(state))]
                tangents = [None if d is None else d.detach() for _, d in pairs]
                points = [p.detach() for p, _ in pairs[: len(points)]]
                state = _replace_moments(state, [p.detach() for p, _ in pairs[len(points) :]])
        final = zip(tangents, points, strict=False)
        return [torch.zeros_like(p) if d is None else d for d, p in final]

    def _product(self, product: list[Tensor]) -> ResponseProduct:
        steps = self.settings.truncate or self.settings.num_steps
        # the cotangents that the ranks sent back differ, their average is the adjoint
        product = average(product)
        return ResponseProduct(dict(zip(self.upper, product, strict=True)), num_products=steps)


def _dual(tensor: Tensor, tangent: Tensor | None) -> Tensor:
    dual: Tensor = tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
    return dual


def _is_moment(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _moments(state: Any) -> list[Tensor]:
    """The floating-point tensors of an optimizer state, in a fixed order."""
    leaves: list[Any] = optree.tree_leaves(state)
    return [leaf for leaf in leaves if _is_moment(leaf)]


def _map_moments(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return optree.tree_map(lambda s: function(s) if _is_moment(s) else s, state)


def _replace_moments(state: Any, moments: list[Tensor]) -> Any:
    new = iter(moments)
    return _map_moments(lambda _: next(new), state)
