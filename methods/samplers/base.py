r"""What every sampler of visibles is: settings that are frozen, one step, and what came of its chains.

All of them draw from $p(v) \propto e^{-E(v)}$, and need nothing but E and its gradient. Many chains run
side by side, one per row. Where visibles have a range [a, b], p is the density on that box: a chain that
comes to a wall is reflected by it.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from bilevel.methods.samplers.slopes import Energy, energies_and_slopes
from bilevel.refusals import a_generator, a_tensor, shown

CHECK_EVERY = 100
"""Steps between two looks for chains that left all bounds: each look waits for a GPU."""

_RARELY, _MANY = 0.05, 50  # a share of proposals; steps in which a chain should have taken one


@final
class ChainState(NamedTuple):
    """Chains after a step.

    Attributes:
        visible: where they are, shape (n, ...).
        energy: there, shape (n,).
        slope: the gradient of the energy there, shape (n, ...).
        accepted: which of them took what the step proposed, shape (n,).
    """

    visible: Tensor
    energy: Tensor
    slope: Tensor
    accepted: Tensor


@final
@dataclass(frozen=True)
class ChainEnds:
    """The ends of chains, and how they came there.

    Attributes:
        visible: the ends, shape (n, ...).
        energy: there, shape (n,).
        acceptance: share of the proposals that each chain took, shape (n,); 1 where none is refused.
    """

    visible: Tensor
    energy: Tensor
    acceptance: Tensor

    def __repr__(self) -> str:
        shape, rate = tuple(self.visible.shape), float(self.acceptance.mean())
        return f"ChainEnds({shape}, energy={float(self.energy.mean()):.4g}, acceptance={rate:.1%})"


@final
@dataclass(frozen=True)
class Target:
    """The density that chains are of.

    Attributes:
        energy: (n, ...) -> (n,), row by row.
        limits: smallest and largest value of a visible, `None` if unbounded.
    """

    energy: Energy
    limits: tuple[float, float] | None = None

    def at(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and their gradients."""
        return energies_and_slopes(self.energy, v)

    def reflected(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where straight paths to v end in the box, and the signs by which its walls turned them."""
        if self.limits is None:
            return v, None
        low, high = self.limits
        width = high - low
        place = torch.remainder(v - low, 2 * width)
        turned = place > width
        inside = low + torch.where(turned, 2 * width - place, place)
        return inside.clamp(low, high), 1 - 2 * turned.to(v)


class Sampler(ABC):
    """A frozen record of settings that moves chains.

    Attributes:
        num_steps: of a chain.
    """

    num_steps: int

    @abstractmethod
    def step(
        self, target: Target, state: ChainState, generator: torch.Generator | None
    ) -> ChainState:
        """One step of every chain.

        Args:
            target: the density.
            state: the chains.
            generator: draws all that is random, on their device; torch's own by default.
        """

    @final
    def steps(
        self,
        energy: Energy,
        start: Tensor,
        generator: torch.Generator | None = None,
        *,
        limits: tuple[float, float] | None = None,
    ) -> Iterator[ChainState]:
        """The chains after each of `num_steps` steps: for trajectories, averages, a stop of your own.

        Args:
            energy: (n, ...) -> (n,), row by row; only its gradient in the rows is taken.
            start: where the chains begin, shape (n, ...).
            generator: on their device; torch's own by default.
            limits: smallest and largest value of a visible, if there are any.

        Raises:
            TypeError: if `energy` is no function, or one without a gradient, `start` no tensor, or
                `generator` none.
            ValueError: if `start` is no floating-point tensor of rows, or the energy gives other than
                one number per row.
            FloatingPointError: if a chain left all bounds.
        """
        _refuse_kinds(energy, start, generator)
        if not start.is_floating_point() or start.ndim < 2 or len(start) == 0:
            raise ValueError(
                f"`start` must be floating-point rows, shape (n, ...), got {start.dtype} of shape "
                f"{tuple(start.shape)}"
            )
        target = Target(energy, limits)
        visible = target.reflected(start.detach())[0]
        accepted = torch.ones(len(start), dtype=torch.bool, device=start.device)
        state = ChainState(visible, *target.at(visible), accepted)
        self._refuse_lost(state, 0)
        for number in range(1, self.num_steps + 1):
            with torch.no_grad():
                state = self.step(target, state, generator)
            if number % CHECK_EVERY == 0 or number == self.num_steps:
                self._refuse_lost(state, number)
            yield state

    @final
    def run(
        self,
        energy: Energy,
        start: Tensor,
        generator: torch.Generator | None = None,
        *,
        limits: tuple[float, float] | None = None,
    ) -> ChainEnds:
        """The ends of the chains; arguments and errors are those of `steps`.

        Warns if chains hardly moved.
        """
        _refuse_kinds(energy, start, generator)
        taken = torch.zeros(len(start) if start.ndim else 0, device=start.device)
        for state in self.steps(energy, start, generator, limits=limits):
            taken += state.accepted
        draws = ChainEnds(state.visible, state.energy, taken / self.num_steps)
        self._remark(draws)
        return draws

    def _refuse_lost(self, state: ChainState, number: int) -> None:
        lost = ~(state.visible.flatten(1).isfinite().all(1) & state.energy.isfinite())
        count = int(lost.sum())
        if count and number == 0:
            raise FloatingPointError(
                f"the energy is NaN or infinite where {count} of {len(lost)} chains begin (the first is "
                f"row {int(lost.nonzero()[0])}); start them elsewhere"
            )
        if count:
            raise FloatingPointError(
                f"{count} of {len(lost)} chains left all bounds by step {number} of `{self}`: the "
                "energy is not bounded below there, or the step is too long; take a smaller "
                "`step_size`, start nearer to the data, or let proposals be refused (`metropolis=True`)"
            )

    def _remark(self, draws: ChainEnds) -> None:
        rate, stuck = float(draws.acceptance.mean()), int((draws.acceptance == 0).sum())
        if rate >= _RARELY and (not stuck or self.num_steps < _MANY):
            return
        warnings.warn(
            f"the chains of `{self}` took {rate:.1%} of the proposals, and {stuck} of "
            f"{len(draws.acceptance)} never moved; take a smaller `step_size`, or start them nearer to "
            "the data",
            stacklevel=3,
        )


def _refuse_kinds(energy: Any, start: Any, generator: Any) -> None:
    """Refuse what is no energy, no tensor or no generator; a learner and its `energy` by name."""
    owner = getattr(energy, "__self__", energy)
    if getattr(owner, "energy_function", None) is not None and energy in (owner, owner.energy):
        what = "a learner" if energy is owner else "its `energy`, which has no gradient"
        raise TypeError(
            f"`energy` must be a differentiable function (n, ...) -> (n,), got {what}; give "
            "`model.energy_function`, or draw with `model.sample(n, sampler=...)`"
        )
    if not callable(energy) or isinstance(energy, type):
        raise TypeError(
            f"`energy` must be a function (n, ...) -> (n,), such as `model.energy_function`, got "
            f"{shown(energy)}"
        )
    a_tensor("start", start)
    a_generator("generator", generator)
