r"""The update rules of `torch.optim` as differentiable functions of variable, gradient and moments.

They follow torch's own conventions to the last digit. `higher`'s Adam does not: it adds epsilon to
$\sqrt{v_t}$ before the bias correction, torch adds it after,

$$ y_{t+1} = y_t - \frac{\alpha}{1-\beta_1^t}\,
   \frac{m_t}{\sqrt{v_t}\,/\sqrt{1-\beta_2^t} + \epsilon}. $$

Epsilon stands outside of the root in RMSprop and Adagrad, too: torchopt's RMSprop has it inside.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from bilevel.compile import known
from bilevel.twins.base import safe_sqrt

Moments: TypeAlias = dict[str, Any]
Rule: TypeAlias = Callable[[Tensor, Tensor, Moments, dict[str, Any]], tuple[Tensor, Moments]]
First: TypeAlias = Callable[[Tensor, Moments, dict[str, Any]], Moments | None]


def _on(setting: Any) -> bool:
    """Whether an option is not 0; a tensor stands for one that is not."""
    return isinstance(setting, Tensor) or bool(setting)


def _sgd(y: Tensor, g: Tensor, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Moments]:
    """torch.optim.SGD: momentum, dampening, Nesterov, weight decay, maximize."""
    g = -g if group["maximize"] else g
    if _on(group["weight_decay"]):
        g = g + group["weight_decay"] * y
    if _on(group["momentum"]):
        buffer = state.get("momentum_buffer")
        mu = group["momentum"]
        fresh = (1 - group["dampening"]) * g if _on(group["dampening"]) else g
        buffer = g if buffer is None else mu * buffer + fresh
        state = {"momentum_buffer": buffer}
        g = g + mu * buffer if group["nesterov"] else buffer
    return y - group["lr"] * g, state


def _adam(y: Tensor, g: Tensor, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Moments]:
    """torch.optim.Adam and AdamW: coupled or decoupled weight decay, AMSGrad, maximize."""
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    step = state.get("step", 0.0) + 1
    count = step.double() if isinstance(step, Tensor) else step
    g = -g if group["maximize"] else g
    if _on(decay) and group.get("decoupled_weight_decay", False):
        y = y * (1 - lr * decay)
    elif _on(decay):
        g = g + decay * y
    fresh = 1 - beta1
    fresh = fresh.to(y.dtype) if isinstance(fresh, Tensor) else fresh
    m = torch.lerp(state.get("exp_avg", torch.zeros_like(y)), g, fresh)
    v = beta2 * state.get("exp_avg_sq", torch.zeros_like(y)) + (1 - beta2) * g * g
    new: Moments = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    if group["amsgrad"]:
        v = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(v)), v)
        new["max_exp_avg_sq"] = v
    denominator = safe_sqrt(v) / (1 - beta2**count) ** 0.5 + group["eps"]
    return y - lr / (1 - beta1**count) * m / denominator, new


def _rmsprop(y: Tensor, g: Tensor, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Moments]:
    """torch.optim.RMSprop: centred or not, momentum, weight decay, maximize."""
    alpha, zero = group["alpha"], torch.zeros_like(y)
    g = -g if group["maximize"] else g
    if _on(group["weight_decay"]):
        g = g + group["weight_decay"] * y
    v = alpha * state.get("square_avg", zero) + (1 - alpha) * g * g
    new: Moments = {"step": state.get("step", 0.0) + 1, "square_avg": v}
    if group["centered"]:
        fresh = 1 - alpha
        fresh = fresh.to(y.dtype) if isinstance(fresh, Tensor) else fresh
        new["grad_avg"] = torch.lerp(state.get("grad_avg", zero), g, fresh)
        root = _deviation(v, new["grad_avg"])
    else:
        root = safe_sqrt(v)
    denominator = root + group["eps"]
    if not _on(group["momentum"]):
        return y - group["lr"] * g / denominator, new
    buffer = group["momentum"] * state.get("momentum_buffer", zero) + g / denominator
    return y - group["lr"] * buffer, {**new, "momentum_buffer": buffer}


def _deviation(v: Tensor, m: Tensor) -> Tensor:
    """The root of v - m^2, with derivative 0 where all gradients so far were 0.

    Where it is 0 for another reason there is no derivative, and none is made up.
    """
    if known(v.all):
        return (v - m * m).sqrt()
    never = v == 0
    return (v - m * m).masked_fill(never, 1).sqrt().masked_fill(never, 0)


def _adagrad(y: Tensor, g: Tensor, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Moments]:
    """torch.optim.Adagrad: a rate that decays, weight decay, maximize."""
    step = state.get("step", 0.0) + 1
    g = -g if group["maximize"] else g
    if _on(group["weight_decay"]):
        g = g + group["weight_decay"] * y
    start = torch.full_like(y, group["initial_accumulator_value"])
    total = state.get("sum", start) + g * g
    rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
    return y - rate * g / (safe_sqrt(total) + group["eps"]), {"step": step, "sum": total}


def _first_sgd(y: Tensor, state: Moments, group: dict[str, Any]) -> Moments | None:
    if not _on(group["momentum"]):
        return {}
    if group["dampening"] and "momentum_buffer" not in state:
        return None
    return {"momentum_buffer": torch.zeros_like(y), **state}


def _first_adam(y: Tensor, state: Moments, group: dict[str, Any]) -> Moments:
    names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])]
    return {"step": 0.0, **{name: torch.zeros_like(y) for name in names}, **state}


def _first_rmsprop(y: Tensor, state: Moments, group: dict[str, Any]) -> Moments:
    names = ["square_avg", *["grad_avg"] * bool(group["centered"])]
    names += ["momentum_buffer"] * _on(group["momentum"])
    return {"step": 0.0, **{name: torch.zeros_like(y) for name in names}, **state}


def _first_adagrad(y: Tensor, state: Moments, group: dict[str, Any]) -> Moments:
    start = torch.full_like(y, group["initial_accumulator_value"])
    return {"step": 0.0, "sum": start, **state}


RULES: Mapping[type, Rule] = MappingProxyType(
    {SGD: _sgd, Adam: _adam, AdamW: _adam, RMSprop: _rmsprop, Adagrad: _adagrad}
)
"""The rule of an optimizer, by its class."""

FIRST: Mapping[Rule, First] = MappingProxyType(
    {_sgd: _first_sgd, _adam: _first_adam, _rmsprop: _first_rmsprop, _adagrad: _first_adagrad}
)
"""The state with all that a rule keeps, by the rule; `None` if the first step is of another kind."""
