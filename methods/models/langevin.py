r"""Langevin dynamics on an energy: images from noise by annealing, and latents refined by a few steps.

A step of annealed Langevin dynamics at temperature T, with $\epsilon \sim N(0, I)$, is

$$ x \leftarrow x - \tfrac12 s^2 \nabla_x E(x) + \sqrt{T}\, s\, \epsilon . $$

T stays at its highest value, falls geometrically to 1 and then linearly to 0. A step of size
$\sigma_0^2$ down the gradient ends it: of a density blurred by $N(0, \sigma_0^2)$, that is the mean of
what was blurred, given x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor

from bilevel.methods.data.visibles import Visibles
from bilevel.methods.samplers.langevin import langevin_step
from bilevel.methods.samplers.slopes import slopes
from bilevel.methods.variational.base import normal_like
from bilevel.refusals import shown

Steps: TypeAlias = tuple[int, int, int]

PUBLISHED: Steps = (500, 2000, 200)
"""Steps of BiSM and VaGES at the highest temperature, from there down to 1, and from 1 to 0."""

_CHAINS = 500  # run at a time


def annealed_langevin(
    energy: Callable[..., Tensor],
    start: Sequence[Tensor],
    generator: torch.Generator | None,
    *,
    steps: Steps = PUBLISHED,
    size: float = 0.02,
    hottest: float = 100.0,
    denoise: float = 0.1,
) -> list[Tensor]:
    r"""States after annealed Langevin dynamics, all variables moving together.

    Args:
        energy: from tensors like those of `start` to energies, shape (n,).
        start: the first value of every variable, each of shape (n, ...).
        generator: draws the noise, on the device of `start`; torch's own by default.
        steps: at the highest temperature, from there to 1, and from 1 to 0.
        size: step s. The default and the next two are those of BiSM and VaGES for images in [0, 1].
        hottest: the highest temperature.
        denoise: $\sigma_0$ of the last step.

    Returns:
        The last value of every variable.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(4, 2, generator=generator)
        >>> (x,) = annealed_langevin(
        ...     lambda x: x.square().sum(1) / 2, [x], generator, steps=(5, 20, 5), size=0.5
        ... )
        >>> x.shape
        torch.Size([4, 2])

    References:
        Learning Energy-Based Models in High-Dimensional Spaces with Multi-scale Denoising Score
        Matching (Li, Chen, Sommer, 2019), https://arxiv.org/abs/1910.07762; numbers from the official
        code of Bi-level Score Matching (Bao et al., 2020), https://arxiv.org/abs/2010.07856
    """
    state = list(start)
    for temperature in temperatures(steps, hottest):
        noise = math.sqrt(temperature) * size
        state = [
            langevin_step(x, slope, normal_like(x, generator), 0.5 * size**2, noise)
            for x, slope in zip(state, slopes(energy, state), strict=True)
        ]
    return [x - denoise**2 * g for x, g in zip(state, slopes(energy, state), strict=True)]


@final
@dataclass(frozen=True)
class AnnealedLangevin:
    r"""How an energy is sampled: annealed Langevin dynamics in units of the visibles' range.

    Args:
        steps: at the highest temperature, from there to 1, and from 1 to 0.
        denoise: $\sigma_0$ of the last step, in the units of the visibles.

    Raises:
        ValueError: if the steps are not three whole numbers, none negative.
    """

    steps: Steps = PUBLISHED
    denoise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", three_numbers(self.steps))

    def visibles(
        self,
        energy: Callable[[Tensor, Tensor], Tensor],
        latent: Tensor,
        visibles: Visibles,
        generator: torch.Generator | None,
        *,
        given: bool,
    ) -> Tensor:
        """Visibles from noise; a range [a, b] becomes [0, 1], where steps and temperatures belong.

        All variables start at N(1/2, 1).

        Args:
            energy: E(v, h), shape (n,).
            latent: h, shape (n, d): what the visibles are drawn given; otherwise only its shape counts.
            visibles: their shape and range.
            generator: draws the noise, on the device of `latent`.
            given: hold h where it is, instead of moving it along from noise.

        Returns:
            Visibles, shape (n, *shape), cut to their range.

        Raises:
            NotImplementedError: if the shape is not known.
        """
        shape = visibles.shape
        if shape is None:
            raise NotImplementedError(
                "the shape of a visible is not known before training; fit the model, or set "
                "`visible_shape`"
            )
        low, high = visibles.range or (0.0, 1.0)
        denoise = self.denoise / (high - low)

        def chains(h: Tensor) -> Tensor:
            start = [normal_like(h.new_empty(len(h), *shape), generator) + 0.5]
            if not given:
                start.append(normal_like(h, generator) + 0.5)

            def scaled(x: Tensor, *free: Tensor) -> Tensor:
                return energy(low + (high - low) * x, *(free or (h,)))

            x = annealed_langevin(scaled, start, generator, steps=self.steps, denoise=denoise)[0]
            return low + (high - low) * x

        v = torch.cat([chains(part) for part in latent.split(_CHAINS)])
        return v if visibles.range is None else v.clamp(low, high)


class _Holds(Protocol):
    latent_model: Any


@final
class LangevinSteps:
    """A learner's `langevin`: the steps by which its model is sampled; may be set."""

    def __get__(self, learner: _Holds | None, owner: type | None = None) -> Any:
        """The steps."""
        if learner is None:
            return self
        langevin = learner.latent_model.langevin
        return None if langevin is None else langevin.steps

    def __set__(self, learner: _Holds, steps: Sequence[int]) -> None:
        """Sample by these from here on."""
        model = learner.latent_model
        hot, falling, cold = three_numbers(steps)
        langevin = replace(model.langevin or AnnealedLangevin(), steps=(hot, falling, cold))
        learner.latent_model = replace(model, langevin=langevin)


def temperatures(steps: Steps, hottest: float = 100.0) -> list[float]:
    """The temperature of every step of `annealed_langevin`.

    Example:
        >>> temperatures((2, 2, 3), 100.0)
        [100.0, 100.0, 100.0, 10.0, 1.0, 0.5, 0.0]
    """
    hot, falling, cold = steps
    fall = [hottest ** (1 - i / falling) for i in range(falling)]
    return [hottest] * hot + fall + [1 - i / max(1, cold - 1) for i in range(cold)]


def three_numbers(steps: Sequence[float]) -> Steps:
    """Three whole numbers of steps, none negative.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise TypeError(f"`langevin` is three numbers of steps, got {shown(steps)}")
    if len(steps) != 3 or any(count != int(count) or count < 0 for count in steps):
        raise ValueError(
            "`langevin` is three numbers of steps (at the highest temperature, from there to 1, from "
            f"1 to 0), got {steps!r}"
        )
    hot, falling, cold = map(int, steps)
    return hot, falling, cold


def refined(
    energy: Callable[[Tensor], Tensor], h: Tensor, noise: Tensor, rate: float, scale: float
) -> Tensor:
    r"""Latents after steps $h - \tfrac12 \alpha \nabla_h E + \sigma \epsilon$; no gradient is kept.

    With $\sigma^2 = \alpha$ these would be Langevin dynamics at temperature 1; here the two are free.

    Args:
        energy: of latents like `h`.
        h: where they start.
        noise: the $\epsilon$ of every step, (steps, *h.shape).
        rate: $\alpha$.
        scale: $\sigma$.
    """
    h = h.detach()
    for epsilon in noise:
        (slope,) = slopes(energy, [h])
        h = langevin_step(h, slope, epsilon, 0.5 * rate, scale)
    return h
