r"""Training on standardised rows, and models rewritten in the units of the data afterwards.

With $z_i = (v_i - m_i) / d_i$, the mean and deviation of each column, a machine of z is one of v too:

$$ b' = m + d \odot b, \quad \log s' = \log s + \log d, \quad W' = W / d, \quad
   c' = c - W^T (m / d) , $$

with the division row by row. Its log Z holds the Jacobian: $\log p(v) = \log p(z) - \sum_i \log d_i$.
So nothing has to be undone later: energies, likelihoods and samples of the rewritten model are those of
the data as they came. The layers of posteriors, samplers and autoencoders next to the visibles are
rewritten alike.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar, final

import torch
from torch import Tensor

from bilevel.devices import widest
from bilevel.methods.networks.units import Change

_FAR, _NARROW = 5.0, 0.01  # means and deviations beyond these are remarked

AnyModel = TypeVar("AnyModel", bound="Standardised")


@final
class UnitsWarning(UserWarning):
    """Rows are far from standard, or lie in half of the model's range."""


class Standardised(Protocol):
    """What training on standardised rows asks of a model.

    Attributes:
        units: those of the rows it is being trained on.
        standardised: whether it was trained so and is now one of the data's units.
    """

    units: "Units | None"
    standardised: bool

    @property
    def visible_range(self) -> tuple[float, float] | None:
        """Smallest and largest value of a visible, `None` if unbounded."""
        ...

    def rewritings(self) -> list[Change] | None:
        """How each part next to the visibles is rewritten; `None` if one is not known."""
        ...

    def in_data_units(self) -> None:
        """Rewrite it as a model of the rows as they came."""
        ...


@final
@dataclass(frozen=True)
class Units:
    """Mean and deviation of every column, float64, shape (d,)."""

    mean: Tensor
    deviation: Tensor

    def standard(self, rows: Tensor) -> Tensor:
        """Rows in standard units."""
        return ((rows.double() - self.mean) / self.deviation).to(rows.dtype)

    def leave(self, model: Standardised) -> None:
        """Rewrite a model of standardised rows as one of the rows as they came."""
        _rewrite(model, self.mean, self.deviation)

    def enter(self, model: Standardised) -> None:
        """The inverse."""
        _rewrite(model, -self.mean / self.deviation, 1 / self.deviation)

    def refuse_visibles(self) -> NoReturn:
        """Refuse to look at rows of the data with a model of standardised ones.

        Raises:
            RuntimeError: always, with what to do instead.
        """
        raise RuntimeError(
            "the model is being trained on standardised rows; look at a copy in the data's units, "
            "`other = copy.deepcopy(model); other.in_data_units()`, or give `fit` the function "
            "`evaluate`, which gets one"
        )


def in_units_of_data(model: AnyModel) -> AnyModel:
    """The model, or, if it is being trained on standardised rows, a copy in the units of the data."""
    if model.units is None:
        return model
    copied = copy.deepcopy(model)
    copied.in_data_units()
    return copied


@contextmanager
def standardised(model: Standardised, rows: Tensor, wanted: bool) -> Iterator[Tensor]:
    """The rows to train on: standardised, if that is wanted, and the model in their units meanwhile.

    A model that was standardised before is taken over to the new units. The parameters of any other are
    taken for those of standardised rows, for which they are made.

    Warns if rows are far from standard and it is not wanted.

    Raises:
        ValueError: if it is wanted and a column is constant, or the model has parts of which it is not
            known how to rewrite them.
    """
    if not wanted:
        remark_units(model, rows)
        yield rows
        return
    if model.rewritings() is None:
        raise ValueError(
            f"`standardise` is for rows of real numbers and models whose layers next to them are known, "
            f"and it is not known how to rewrite this `{type(model).__name__}`; leave it out and scale "
            "the rows yourself"
        )
    if widest(rows.device) != torch.float64:
        raise ValueError(
            f"`standardise` computes in float64, which `{rows.device}` has not; leave it out and scale "
            "the rows yourself, or train on the processor"
        )
    units = _units(rows)
    constant = (units.deviation == 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(
            f"{_columns(constant)} constant, so there is no density to learn of it; leave it out of the "
            "data"
        )
    if model.standardised:
        units.enter(model)
    model.units = units
    try:
        yield units.standard(rows)
    finally:
        model.in_data_units()


def _units(rows: Tensor) -> Units:
    exact = rows.flatten(1).to(widest(rows.device))
    deviation, mean = torch.std_mean(exact, dim=0, correction=0)
    still = exact.amin(dim=0) == exact.amax(dim=0)  # rounding leaves a deviation of a constant
    return Units(mean, deviation.masked_fill(still, 0.0))


def remark_units(
    model: Standardised,
    rows: Tensor,
    *,
    whole: bool = True,
    advice: str | None = None,
    caller: int | None = None,
) -> None:
    """Say what was seen where rows are far from standard, a column is constant, or a half is unused.

    Args:
        model: that is to be trained.
        rows: of the data.
        whole: whether they are all of them; a column may be constant in one batch by chance.
        advice: what to do about rows far from standard, if not what `fit` offers.
        caller: how many frames up the warning points; by default at who called `fit`.
    """
    if not rows.is_floating_point():
        return
    if caller is None:
        caller = 8 if whole else 7  # rows in memory come through one frame more
    if model.visible_range == (-1, 1) and 0 <= float(rows.min()) < float(rows.max()):
        warnings.warn(
            f"the model's visibles lie in [-1, 1], and none of these is negative (they lie in "
            f"[{float(rows.min()):.3g}, {float(rows.max()):.3g}]): if they are images in [0, 1], scale "
            "them with `2 * images - 1`",
            UnitsWarning,
            stacklevel=caller,
        )
    if model.visible_range is not None or rows.ndim != 2:
        return
    units = _units(rows)
    moving = units.deviation[units.deviation > 0]
    seen = []
    if float(units.mean.abs().max()) > _FAR or (
        len(moving) and (float(moving.max()) > _FAR or float(moving.min()) < _NARROW)
    ):
        mean, deviation = units.mean, units.deviation
        seen.append(
            f"the columns have means from {mean.min():.3g} to {mean.max():.3g} and standard deviations "
            f"from {deviation.min():.3g} to {deviation.max():.3g}, and models start as for 0 and 1"
        )
    constant = (units.deviation == 0).nonzero()[:, 0].tolist()
    if constant and whole:
        seen.append(
            f"{_columns(constant)} constant, whose density grows without bound; leave it out"
        )
    if not seen:
        return
    if advice is None:
        known = whole and model.rewritings() is not None
        advice = "train with `standardise=True`" if known else "scale the rows"
    warnings.warn(f"{'; '.join(seen)}: {advice}", UnitsWarning, stacklevel=caller)


def _columns(which: list[int]) -> str:
    listed = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
    return f"column {listed} is" if len(which) == 1 else f"columns {listed} are each"


# ---------------------------------------------------------------------- rewriting


@torch.no_grad()
def _rewrite(model: Standardised, shift: Tensor, scale: Tensor) -> None:
    """From a model of z to that of shift + scale z."""
    for change in model.rewritings() or []:
        change(shift, scale)
