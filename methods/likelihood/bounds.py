r"""Likelihoods, exact or bounded: by a posterior below log p(v), by a sampler on both sides of log Z.

For any posterior q(h|v) and any sampler q(v, h) with the support of the model, $\tilde p = e^{-E}$,

$$ \log p(v) = \mathbb{E}_{q(h|v)}[-E(v, h) - \log q(h|v)] - \log Z + KL(q(h|v), p(h|v)), $$

$$ \mathbb{E}_q\Big[\log \frac{\tilde p}{q}\Big] \le \log Z \le
   \tfrac12 \log \mathbb{E}_q\Big[\Big(\frac{\tilde p}{q}\Big)^2\Big] . $$

Both are tight where q = p: the left by Jensen's inequality, the right because
$\mathbb{E}_q[\tilde p / q] = Z$ and $\mathbb{E}[w]^2 \le \mathbb{E}[w^2]$. A sampler with a latent z of
its own and an auxiliary r(z|h) stands in the same inequalities with $\tilde p(v, h)\, r(z|h)$ in place
of $\tilde p$, whose sum is Z too. All draws of binary units are exact: with relaxed ones none of this
is a bound.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.likelihood.free_energy import log_weights, one_by_one
from bilevel.methods.likelihood.log_partition import LogPartition
from bilevel.methods.machines import MAX_UNITS, BoltzmannMachine
from bilevel.methods.machines.given import refuse_no_machine
from bilevel.methods.variational import VariationalJoint, VariationalPosterior
from bilevel.refusals import shown

_GAP_UNITS = 15  # of a first hidden layer that is summed out for every visible


@final
@dataclass(frozen=True)
class Estimate:
    """A number from random draws.

    Attributes:
        value: the number.
        standard_error: its own, from the spread of the draws; infinite if one draw cannot tell.
    """

    value: float
    standard_error: float


@final
@dataclass(frozen=True)
class VariationalBound:
    """A lower bound on a mean log-likelihood.

    Attributes:
        value: the bound.
        standard_error: of `value`, from the draws of h (not from the choice of visibles); infinite for
            one draw per visible.
        gap: what is missing to the log-likelihood, the mean of KL(q(h|v), p(h|v)), from the exact free
            energy; `None` where that is not tractable.
    """

    value: float
    standard_error: float
    gap: float | None


@explained
@torch.no_grad()
def log_likelihood(
    model: BoltzmannMachine,
    v: Tensor,
    log_partition: LogPartition | Tensor | float | None = None,
) -> float:
    """Mean log p(v) of visibles, in nats: exact, but for log Z if that was estimated.

    Args:
        model: the machine.
        v: visibles, shape (n, visible_dim).
        log_partition: log Z; enumerated if it is not given. An estimate's error is the result's.

    Raises:
        TypeError: for visibles the machine does not take.
        ValueError: if log Z is needed and cannot be enumerated, or the free energy cannot; for visibles
            the machine does not take, and a result that is no number.

    Example:
        >>> from bilevel.methods.machines import RBM
        >>> model = RBM(8, 4)
        >>> log_likelihood(model, torch.ones(3, 8)) == log_likelihood(
        ...     model, torch.ones(3, 8), model.log_partition()
        ... )
        True
    """
    refuse_no_machine(model)
    if isinstance(log_partition, str):
        raise TypeError(
            f"`log_partition` must be a number or an estimate, got {shown(log_partition)}"
        )
    name = type(model).__name__
    if len(model.latent_dims) > 1 and model.latent_dims[0] > MAX_UNITS:
        raise ValueError(
            f"log p(v) of this `{name}` is a sum over the {model.latent_dims[0]} units of its first "
            f"hidden layer, and at most {MAX_UNITS} can be enumerated; use "
            "`annealed_importance_sampling` for log Z and `variational_lower_bound` with it"
        )
    if log_partition is None and not model.enumerable:
        raise ValueError(
            f"log Z of this `{name}` cannot be enumerated (more than {MAX_UNITS} units on either side); "
            "pass `log_partition`, estimated by `annealed_importance_sampling`, or `bracket` it"
        )
    v = model.visibles.admitted(v, model.visible_bias)
    log_z = model.log_partition() if log_partition is None else log_partition
    return _defined(-float(model.free_energy(v).mean()) - float(log_z), "the log-likelihood")


@explained
@torch.no_grad()
def variational_lower_bound(
    model: BoltzmannMachine,
    posterior: VariationalPosterior,
    v: Tensor,
    log_partition: LogPartition | Tensor | float,
    *,
    generator: torch.Generator,
    num_samples: int = 10,
) -> VariationalBound:
    """Bound the mean log p(v) from below: E_q[-E(v, h) - log q(h|v)] - log Z.

    Args:
        model: the machine.
        posterior: q(h|v).
        v: visibles, shape (n, visible_dim).
        log_partition: log Z, exact or an estimate; if that is too low, this is no lower bound.
        generator: on the model's device.
        num_samples: draws of h per visible.

    Returns:
        The bound and, where it can be computed, its gap.

    Raises:
        ValueError: for less than one draw, or a result that is no number.

    References:
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov and Murray, ICML 2008),
        https://www.cs.toronto.edu/~rsalakhu/papers/dbn_ais.pdf.
        To Relieve Your Headache of Training an MRF, Take AdVIL (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400.
        Differs from the paper in: the draws are exact, those of AdVIL's evaluation are relaxed.
    """
    _check_samples(num_samples)
    v = model.visibles.admitted(v, model.visible_bias)

    def log_ratios() -> Tensor:
        noise = posterior.noise(len(v), generator, v)[None]
        return log_weights(one_by_one(model), posterior, v, noise).double()

    values = torch.cat([log_ratios() for _ in range(num_samples)])
    log_z = float(log_partition)
    unnormalized = _defined(float(values.mean()), "the bound")
    error = math.inf
    if num_samples > 1:
        error = float(values.var(0).sum().sqrt()) / (len(v) * math.sqrt(num_samples))
    gap = None
    if len(model.latent_dims) == 1 or model.latent_dims[0] <= _GAP_UNITS:
        gap = -float(model.free_energy(v).double().mean()) - unnormalized
    return VariationalBound(unnormalized - log_z, error, gap)


@explained
@torch.no_grad()
def sampler_lower_bound(
    model: nn.Module, joint: VariationalJoint, *, generator: torch.Generator, num_samples: int
) -> Estimate:
    """Bound log Z from below: E_q[log p~(v, h) - log q(v, h)].

    Args:
        model: module (v, h) -> E(v, h), shape (n,).
        joint: the sampler q(v, h); one that enumerates its states gives the exact bound.
        generator: on the model's device.
        num_samples: draws from the sampler.

    Raises:
        ValueError: for less than one draw, or a result that is no number.

    References:
        To Relieve Your Headache of Training an MRF, Take AdVIL (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400.
    """
    log_ratio, weight = _log_ratios(model, joint, num_samples, generator)
    mean = (weight * log_ratio).sum()
    # a weighted mean of n draws of equal weight 1/n; enumerated ones leave nothing to chance
    spread = 0.0 if joint.enumerates else float(log_ratio.std()) / math.sqrt(num_samples)
    return Estimate(float(mean), _or_infinite(spread))


@explained
@torch.no_grad()
def chi_square_upper_bound(
    model: nn.Module, joint: VariationalJoint, *, generator: torch.Generator, num_samples: int
) -> Estimate:
    r"""Bound log Z from above: $\frac12 \log E_q[(\tilde p / q)^2]$, tight iff q = p.

    The excess is half of log(1 + chi-square divergence of p from q). The estimate from draws is too low
    on average (the logarithm of a mean), and far too low where the draws miss what dominates the mean:
    a sampler that lags behind its model can report less than log Z.

    Args:
        model: module (v, h) -> E(v, h), shape (n,).
        joint: the sampler q(v, h); one that enumerates its states gives the exact bound.
        generator: on the model's device.
        num_samples: draws from the sampler.

    Raises:
        ValueError: for less than one draw, or a result that is no number.

    References:
        Neural Variational Inference and Learning in Undirected Graphical Models (Kuleshov and Ermon,
        NIPS 2017), https://arxiv.org/abs/1711.02679.
    """
    log_ratio, weight = _log_ratios(model, joint, num_samples, generator)
    log_terms = 2 * log_ratio + weight.log()
    log_square = log_terms.logsumexp(0)
    spread = 0.0
    if not joint.enumerates:
        relative = (log_terms - log_square).exp() * num_samples
        spread = float(relative.std()) / (2 * math.sqrt(num_samples))
    return Estimate(float(log_square) / 2, _or_infinite(spread))


def _log_ratios(
    model: nn.Module, joint: VariationalJoint, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Log p~/q at draws from q and the draws' weights, float64, each (n,)."""
    _check_samples(num_samples)
    v, h, log_q, weight = joint.exact_draws(num_samples, generator)
    log_ratio: Tensor = -model(v, h) - log_q
    _defined(float(log_ratio.sum()), "the mean log-ratio of model and sampler")
    return log_ratio.double(), weight.double()


def _or_infinite(spread: float) -> float:
    return math.inf if math.isnan(spread) else spread


def _defined(value: float, what: str) -> float:
    """A number, or a sentence.

    Raises:
        ValueError: if it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"{what} is {value}: look for NaN or very large numbers among the weights of the model and "
            "of what it is judged with"
        )
    return value


def _check_samples(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples!r}")
