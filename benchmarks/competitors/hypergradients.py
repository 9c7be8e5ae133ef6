"""The competitors in PyTorch: the same hypergradient by hand, by us and by our peers.

Each competitor is a function of a `Setting` that returns another function, the one that is timed; what
a library prepares once per training run is prepared outside it. Answers are the gradients in
the upper variables, in the setting's order.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import higher
import torch
import torchopt
from torch import Tensor

from benchmarks.cases import compiled, regression
from bilevel import ConjugateGradient, Implicit, Solver, Unrolled

Setting: TypeAlias = regression.Setting | compiled.Setting
Answer = list[Tensor]
Competitor = Callable[[Setting], Callable[[], Answer]]
SGD = {"lr": 0.05, "momentum": 0.9}
ADAM = {"lr": 0.01}
SGD_STEPS, ADAM_STEPS, CG_STEPS = 20, 10, 20
DAMPING = 1.0  # away from a minimum the Hessian of an MLP is indefinite


def ours(solver: Solver, running: Callable[[Any], torch.optim.Optimizer] | None) -> Competitor:
    """This library; `running` makes the lower optimizer that `Unrolled` branches from."""

    def prepare(s: Setting) -> Callable[[], Answer]:
        optimizer = running(s.problem.lower.parameters()) if running else None

        def run() -> Answer:
            answer = solver.hypergradient(s.problem, s.batch, [s.batch], lower_optimizer=optimizer)
            return [answer.grad[name] for name in s.names]

        return run

    return prepare


def by_hand_sgd(s: Setting) -> Callable[[], Answer]:
    def run() -> Answer:
        x, y = s.leaves()
        momentum = None
        for _ in range(SGD_STEPS):
            grads = torch.autograd.grad(s.lower_loss(x, y), y, create_graph=True)
            if momentum is None:
                momentum = list(grads)
            else:
                pairs = zip(momentum, grads, strict=True)
                momentum = [SGD["momentum"] * m + g for m, g in pairs]
            y = [p - SGD["lr"] * m for p, m in zip(y, momentum, strict=True)]
        return list(torch.autograd.grad(s.upper_loss(y), x))

    return run


def by_hand_adam(s: Setting, higher_epsilon: bool = False) -> Callable[[], Answer]:
    """Adam by torch's formula, or with epsilon before the bias correction, as higher has it."""

    def run() -> Answer:
        x, y = s.leaves()
        m, v = [torch.zeros_like(p) for p in y], [torch.zeros_like(p) for p in y]
        for t in range(1, ADAM_STEPS + 1):
            grads = torch.autograd.grad(s.lower_loss(x, y), y, create_graph=True)
            m = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
            v = [0.999 * a + 0.001 * g * g for a, g in zip(v, grads, strict=True)]
            scale = (1 - 0.999**t) ** 0.5
            epsilon = 1e-8 / scale if higher_epsilon else 1e-8
            y = [
                p - ADAM["lr"] / (1 - 0.9**t) * a / (b.sqrt() / scale + epsilon)
                for p, a, b in zip(y, m, v, strict=True)
            ]
        return list(torch.autograd.grad(s.upper_loss(y), x))

    return run


def by_hand_cg(steps: int, damping: float) -> Competitor:
    def prepare(s: Setting) -> Callable[[], Answer]:
        def run() -> Answer:
            x, y = s.leaves()
            v = torch.cat([g.flatten() for g in torch.autograd.grad(s.upper_loss(y), y)])
            sizes, shapes = [p.numel() for p in y], [p.shape for p in y]
            grads = torch.autograd.grad(s.lower_loss(x, y), y, create_graph=True)

            def product(p: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
                parts = [a.view(shape) for a, shape in zip(p.split(sizes), shapes, strict=True)]
                return torch.autograd.grad(grads, wrt, parts, retain_graph=True)

            w, r, p = torch.zeros_like(v), v, v
            rr = r @ r
            for _ in range(steps):
                hp = torch.cat([h.flatten() for h in product(p, y)]) + damping * p
                alpha = rr / (p @ hp)
                w, r = w + alpha * p, r - alpha * hp
                rr, before = r @ r, rr
                p = r + rr / before * p
            return [-g for g in product(w, x)]

        return run

    return prepare


def torchopt_functional(transformation: Callable[[], Any], steps: int) -> Competitor:
    """torchopt's `init` and `update` on a tuple of tensors."""

    def prepare(s: Setting) -> Callable[[], Answer]:
        def run() -> Answer:
            x, y = s.leaves()
            rule = transformation()
            state = rule.init(y)
            for _ in range(steps):
                grads = torch.autograd.grad(s.lower_loss(x, y), y, create_graph=True)
                updates, state = rule.update(list(grads), state, params=y, inplace=False)
                y = torchopt.apply_updates(y, updates, inplace=False)
            return list(torch.autograd.grad(s.upper_loss(y), x))

        return run

    return prepare


def torchopt_meta(optimizer: Callable[[Any], Any], steps: int) -> Competitor:
    """torchopt's `MetaOptimizer` on the module, put back afterwards as its documentation does."""

    def prepare(s: Setting) -> Callable[[], Answer]:
        net = s.module()

        def run() -> Answer:
            x, _ = s.leaves()
            meta = optimizer(net)
            before = torchopt.extract_state_dict(net, by="reference", device=None)
            for _ in range(steps):
                meta.step(s.module_lower_loss(x, net))
            answer = list(torch.autograd.grad(s.module_upper_loss(net), x))
            torchopt.recover_state_dict(net, before)
            return answer

        return run

    return prepare


def by_higher(optimizer: Callable[[Any], torch.optim.Optimizer], steps: int) -> Competitor:
    def prepare(s: Setting) -> Callable[[], Answer]:
        net = s.module()
        running = optimizer(net.parameters())

        def run() -> Answer:
            x, _ = s.leaves()
            with higher.innerloop_ctx(net, running, copy_initial_weights=False) as (f, rule):
                for _ in range(steps):
                    rule.step(s.module_lower_loss(x, f))
                return list(torch.autograd.grad(s.module_upper_loss(f), x))

        return run

    return prepare


def torchopt_implicit(steps: int, damping: float) -> Competitor:
    """`custom_root` with `solve_cg`; the solver function has nothing left to solve."""
    solve = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=0.0, atol=0.0, ridge=damping)

    def prepare(s: Setting) -> Callable[[], Answer]:
        def optimality(y: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Any:
            return torch.func.grad(lambda p: s.lower_loss(list(x), list(p)))(y)

        @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)  # type: ignore[untyped-decorator]
        def answer(y: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Any:
            return tuple(p.detach().clone().requires_grad_() for p in y)

        def run() -> Answer:
            x, y = s.leaves()
            return list(torch.autograd.grad(s.upper_loss(list(answer(tuple(y), tuple(x)))), x))

        return run

    return prepare


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, **ADAM)


def _torchopt_sgd() -> Any:
    return torchopt.sgd(**SGD, moment_requires_grad=True)


def _torchopt_adam() -> Any:
    return torchopt.adam(**ADAM, moment_requires_grad=True)


CG = ConjugateGradient(max_steps=CG_STEPS, rtol=None, damping=DAMPING)
HAND, REVERSE, RECOMPUTE = "by hand", "ours, reverse", "ours, recompute"
CASES: dict[str, dict[str, Competitor]] = {
    f"unrolled SGD, {SGD_STEPS} steps": {
        HAND: by_hand_sgd,
        REVERSE: ours(Unrolled(SGD_STEPS), _sgd),
        RECOMPUTE: ours(Unrolled(SGD_STEPS, mode="recompute"), _sgd),
        "ours, torchopt.sgd": ours(Unrolled(SGD_STEPS, optimizer=_torchopt_sgd()), None),
        "torchopt functional": torchopt_functional(_torchopt_sgd, SGD_STEPS),
        "torchopt MetaSGD": torchopt_meta(lambda net: torchopt.MetaSGD(net, **SGD), SGD_STEPS),
        "higher": by_higher(_sgd, SGD_STEPS),
    },
    f"unrolled Adam, {ADAM_STEPS} steps": {
        HAND: by_hand_adam,
        REVERSE: ours(Unrolled(ADAM_STEPS), _adam),
        RECOMPUTE: ours(Unrolled(ADAM_STEPS, mode="recompute"), _adam),
        "ours, torchopt.adam": ours(Unrolled(ADAM_STEPS, optimizer=_torchopt_adam()), None),
        "torchopt functional": torchopt_functional(_torchopt_adam, ADAM_STEPS),
        "torchopt MetaAdam": torchopt_meta(lambda net: torchopt.MetaAdam(net, **ADAM), ADAM_STEPS),
        "higher": by_higher(_adam, ADAM_STEPS),
    },
    f"implicit, {CG_STEPS} CG steps": {
        HAND: by_hand_cg(CG_STEPS, DAMPING),
        "ours": ours(Implicit(CG), None),
        "torchopt custom_root": torchopt_implicit(CG_STEPS, DAMPING),
    },
}


def reference(case: str, name: str) -> Competitor:
    """Whose answer a competitor's must equal: the one by hand, in the competitor's convention."""
    if "Adam" in case and name == "higher":
        return lambda s: by_hand_adam(s, higher_epsilon=True)
    return CASES[case][HAND]


def units(case: str, name: str) -> int:
    """Plain lower gradients that a hypergradient costs by the usual count.

    A product with a derivative of the gradient counts as two: a convention, not a bound, for what a
    product shares with the gradient it differentiates is computed once. Unrolling takes a gradient
    and a product per step, and recomputation one more gradient; an implicit one takes a gradient, a
    product per step of the linear solver and the cross product. The upper gradient is one more.
    """
    if case.startswith("implicit"):
        return 1 + 2 * (CG_STEPS + 1) + 1
    steps = SGD_STEPS if "SGD" in case else ADAM_STEPS
    return (4 if name == RECOMPUTE else 3) * steps + 1
