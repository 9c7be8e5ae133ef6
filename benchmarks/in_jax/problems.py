"""The three problems of `benchmarks.compiled_speed` as one writes them in JAX.

Imports JAX alone, so that it runs in JAX's own environment. A problem is a pair of losses; weights lie
as (inputs, outputs), as JAX's own libraries have them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

Variables: TypeAlias = Any  # a tree of arrays


@final
@dataclass(frozen=True)
class Problem:
    """Losses, upper and lower variables and data of one problem.

    Args:
        lower_loss: a function (upper, lower, data) -> number.
        upper_loss: a function (lower, data) -> number.
        upper: upper variables, a list in the order of the answers.
        lower: lower variables.
        data: both batches.
    """

    lower_loss: Callable[[Variables, Variables, Any], jax.Array]
    upper_loss: Callable[[Variables, Any], jax.Array]
    upper: list[jax.Array]
    lower: list[jax.Array]
    data: Any


def mlp(lower: list[jax.Array], h: jax.Array) -> jax.Array:
    for i in range(0, len(lower), 2):
        h = h if i == 0 else jnp.tanh(h)
        h = h @ lower[i] + lower[i + 1]
    return h


def squared(lower: list[jax.Array], data: Any, part: str) -> jax.Array:
    return jnp.square(mlp(lower, data[part][0])[:, 0] - data[part][1])


def cross_entropy(lower: list[jax.Array], data: Any, part: str) -> jax.Array:
    logs = jax.nn.log_softmax(mlp(lower, data[part][0]))
    return -jnp.take_along_axis(logs, data[part][1][:, None], axis=1)[:, 0]


def logistic(lower: list[jax.Array], data: Any, part: str) -> jax.Array:
    return -jax.nn.log_sigmoid(data[part][1] * (data[part][0] @ lower[0]))


def per_example(each: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The lower loss with a weight per example and one weight decay."""

    def loss(upper: list[jax.Array], lower: list[jax.Array], data: Any) -> jax.Array:
        logits, log_decay = upper
        decay = sum(jnp.sum(jnp.square(w)) for w in lower) * jnp.exp(log_decay) / 2
        return jnp.mean(jax.nn.sigmoid(logits) * each(lower, data, "lower")) + decay

    return loss


def per_feature(upper: list[jax.Array], lower: list[jax.Array], data: Any) -> jax.Array:
    """The lower loss with a weight decay per feature."""
    decay = jnp.sum(jnp.exp(upper[0]) * jnp.square(lower[0])) / 2
    return jnp.mean(logistic(lower, data, "lower")) + decay


LOSSES = {
    "small": (squared, per_example(squared)),
    "middle": (cross_entropy, per_example(cross_entropy)),
    "logistic": (logistic, per_feature),
}


def problem(name: str, arrays: Mapping[str, np.ndarray]) -> Problem:
    """The problem of a name from the arrays that came with it."""

    def of(prefix: str) -> list[jax.Array]:
        return [jnp.asarray(a) for key, a in arrays.items() if key.startswith(f"{prefix}.")]

    each, lower_loss = LOSSES[name]
    lower = [a.T if a.ndim == 2 else a for a in of("lower")]
    if name == "logistic":
        lower = [a[:, 0] for a in lower]
    data = {part: tuple(of(f"batch.{part}")) for part in ("lower", "upper")}
    return Problem(
        lower_loss,
        lambda lower, data: jnp.mean(each(lower, data, "upper")),
        of("upper"),
        lower,
        data,
    )
