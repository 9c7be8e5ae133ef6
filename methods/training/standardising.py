r"""Training on standardised rows, and models rewritten in the units of the data afterwards.

With $z_i = (v_i - m_i) / d_i$, the mean and deviation of each column, a machine of z is one of v too:

$$ b' = m + d \odot b, \quad \log s' = \log s + \log d, \quad W' = W / d, \quad
   c' = c - W^T (m / d) , $$

with the division row by row. Its log Z holds the Jacobian: $\log p(v) = \log p(z) - \sum_i \log d_i$.
So nothing has to be undone later: energies, likelihoods and samples of the rewritten model are those of
the data as they came. The layers of posteriors, samplers and autoencoders next to the visibles are
rewritten alike.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from bilevel.methods.eblvm import EBLVM

Change: TypeAlias = Callable[[Tensor, Tensor], None]
_FAR, _NARROW = 5.0, 0.01  # means and deviations beyond these are remarked


@dataclass(frozen=True)
class Units:
    """Mean and deviation of every column, float64, shape (d,)."""

    mean: Tensor
    deviation: Tensor

    def standard(self, rows: Tensor) -> Tensor:
        """Rows in standard units."""
        return ((rows.double() - self.mean) / self.deviation).to(rows.dtype)

    def leave(self, model: "EBLVM") -> None:
        """Rewrite a model of standardised rows as one of the rows as they came."""
        _rewrite(model, self.mean, self.deviation)

    def enter(self, model: "EBLVM") -> None:
        """The inverse."""
        _rewrite(model, -self.mean / self.deviation, 1 / self.deviation)


@contextmanager
def standardised(model: "EBLVM", rows: Tensor, wanted: bool) -> Iterator[Tensor]:
    """The rows to train on: standardised, if that is wanted, and the model in their units meanwhile.

    A model that was standardised before is taken over to the new units. The parameters of any other are
    taken for those of standardised rows, for which they are made.

    Warns if rows are far from standard and it is not wanted.

    Raises:
        ValueError: if it is wanted and a column is constant, or the model has parts of which it is not
            known how to rewrite them.
    """
    if not wanted:
        _remark(model, rows)
        yield rows
        return
    if _parts(model) is None:
        raise ValueError(
            f"`standardise` is for rows of real numbers and models whose layers next to them are known, "
            f"and it is not known how to rewrite this `{type(model).__name__}`; leave it out and scale "
            "the rows yourself"
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
    exact = rows.flatten(1).double()
    deviation, mean = torch.std_mean(exact, dim=0, correction=0)
    still = exact.amin(dim=0) == exact.amax(dim=0)  # rounding leaves a deviation of a constant
    return Units(mean, deviation.masked_fill(still, 0.0))


def _remark(model: "EBLVM", rows: Tensor) -> None:
    """Say what was seen where rows are far from standard or a column is constant."""
    if model.visible_range is not None or rows.ndim != 2 or not rows.is_floating_point():
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
    if constant:
        seen.append(
            f"{_columns(constant)} constant, whose density grows without bound; leave it out"
        )
    if not seen:
        return
    known = _parts(model) is not None
    advice = "train with `standardise=True`" if known else "scale the rows"
    warnings.warn(f"{'; '.join(seen)}: {advice}", stacklevel=5)


def _columns(which: list[int]) -> str:
    listed = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
    return f"column {listed} is" if len(which) == 1 else f"columns {listed} are each"


# ---------------------------------------------------------------------- rewriting


@torch.no_grad()
def _rewrite(model: "EBLVM", shift: Tensor, scale: Tensor) -> None:
    """From a model of z to that of shift + scale z."""
    for change in _parts(model) or []:
        change(shift, scale)


def _parts(model: "EBLVM") -> list[Change] | None:
    """How each part that touches the visibles is rewritten; `None` if one is not known."""
    from bilevel.methods.machines.visible import GaussianVisible
    from bilevel.methods.vae import VAE
    from bilevel.methods.variational import BernoulliPosterior, HierarchicalJoint
    from bilevel.methods.variational.base import VariationalJoint, VariationalPosterior

    if model.visible_range is not None:
        return None
    if isinstance(model, VAE):
        return _of_autoencoder(model)
    name = "energy" if "energy" in model.upper._modules else "model"
    machine = model.upper._modules.get(name)
    if not type(model).__module__.startswith("bilevel.methods.") or not isinstance(
        machine, GaussianVisible
    ):
        return None
    found: list[Change | None] = [lambda shift, scale: _machine(machine, shift, scale)]
    for module in model.lower.children():
        if isinstance(module, BernoulliPosterior):
            found.append(_input(module.networks[0]))
        elif isinstance(module, HierarchicalJoint) and module.visible == "gaussian":
            found.append(_output(module.networks[-1], moments=True))
        elif isinstance(module, (VariationalPosterior, VariationalJoint)):
            return None
    normalizer = model.upper._parameters.get("log_normalizer")
    if normalizer is not None:
        found.append(lambda _, scale: cast(None, normalizer.add_(scale.log().sum())))
    return None if any(part is None for part in found) else cast(list[Change], found)


def _of_autoencoder(model: Any) -> list[Change] | None:
    from bilevel.methods.networks.perceptron import LearnedVariance, Moments

    encoder, decoder = model.network("encoder"), model.network("decoder")
    if not isinstance(encoder, Moments) or not isinstance(decoder, LearnedVariance):
        return None
    if not all(isinstance(part.network, nn.Sequential) for part in (encoder, decoder)):
        return None
    inward, outward = (cast(nn.Sequential, part.network) for part in (encoder, decoder))
    first, last = _input(inward[0]), _output(outward[-1], moments=False)
    if first is None or last is None:
        return None
    variance = decoder.log_variance
    return [first, last, lambda _, scale: cast(None, variance.add_(2 * scale.log()))]


def _machine(machine: Any, shift: Tensor, scale: Tensor) -> None:
    """A Gaussian machine, in double precision on the way."""
    deep = len(machine.latent_dims) > 1
    weight = machine.weight1 if deep else machine.weight
    bias = machine.latent_bias1 if deep else machine.latent_bias
    bias.copy_(bias.double() - (shift / scale) @ weight.double())
    weight.copy_(weight.double() / scale[:, None])
    machine.visible_bias.copy_(shift + scale * machine.visible_bias.double())
    machine.log_scale.copy_(machine.log_scale.double() + scale.log())


def _input(layer: nn.Module) -> Change | None:
    """A linear layer that takes the visibles."""
    if not _plain(layer):
        return None
    linear = cast(nn.Linear, layer)

    def change(shift: Tensor, scale: Tensor) -> None:
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias.double() - weight @ (shift / scale))
        linear.weight.copy_(weight / scale)

    return change


def _output(layer: nn.Module, *, moments: bool) -> Change | None:
    """A linear layer that gives the visibles' means, and with `moments` their log-variances."""
    if not _plain(layer):
        return None
    linear = cast(nn.Linear, layer)

    def change(shift: Tensor, scale: Tensor) -> None:
        d = len(scale)
        weight, bias = linear.weight.double(), linear.bias.double()
        linear.weight[:d] = (scale[:, None] * weight[:d]).to(linear.weight)
        linear.bias[:d] = (shift + scale * bias[:d]).to(linear.bias)
        if moments:
            linear.bias[d:] = (bias[d:] + 2 * scale.log()).to(linear.bias)

    return change


def _plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.bias is not None
        and not parametrize.is_parametrized(layer)
        and not layer._forward_pre_hooks  # such as the older spectral norm
    )
