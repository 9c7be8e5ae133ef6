r"""Annealed importance sampling of log Z, in both directions: the truth is bracketed.

Between the base machine ($\beta = 0$, all units independent, $Z_0$ known) and the model ($\beta = 1$)
stand inverse temperatures $0 = \beta_0 < \dots < \beta_K = 1$. With $\tilde p_k$ the unnormalised
marginal of the first hidden layer at $\beta_k$ and $T_k$ a block Gibbs step that leaves it invariant,

$$ h_0 \sim p_0, \quad h_k \sim T_k(\cdot | h_{k-1}), \qquad
   w = Z_0 \prod_{k=0}^{K-1} \frac{\tilde p_{k+1}(h_k)}{\tilde p_k(h_k)}, \qquad \mathbb{E}[w] = Z . $$

$T_k$ is reversible, so the same chain run downwards from $h_K \sim p_K$ has weights with
$\mathbb{E}[w'] = 1 / Z$. By Jensen's inequality $\log \overline{w}$ is below log Z on average and
$-\log \overline{w'}$ above it; when both agree, both are right.
"""

import math
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from bilevel.arguments import explained
from bilevel.methods.likelihood.annealing import AnnealedChains
from bilevel.methods.likelihood.log_partition import Bracket, LogPartition
from bilevel.methods.machines.base import BoltzmannMachine
from bilevel.methods.machines.enumeration import MAX_UNITS, states
from bilevel.methods.machines.given import refuse_no_machine
from bilevel.refusals import a_generator, whole
from bilevel.reporting import Report, silent

_CHUNK = 2**20  # states of a first hidden layer weighed at a time


def salakhutdinov_schedule() -> Tensor:
    """1000 inverse temperatures in [0, 0.5), 4000 in [0.5, 0.9), 10,000 in [0.9, 1), then 1; float64.

    References:
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov and Murray, ICML 2008),
        https://www.cs.toronto.edu/~rsalakhu/papers/dbn_ais.pdf. The numbers are those of the code of
        "To Relieve Your Headache of Training an MRF, Take AdVIL" (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400.
    """
    pieces = ((0.0, 0.5, 1000), (0.5, 0.9, 4000), (0.9, 1.0, 10_000))
    grids = [torch.linspace(a, b, n + 1, dtype=torch.float64)[:-1] for a, b, n in pieces]
    return torch.cat([*grids, torch.ones(1, dtype=torch.float64)])


def linear_schedule(n: int) -> Tensor:
    """N equally spaced inverse temperatures from 0 to 1, float64.

    Raises:
        ValueError: if n is less than 2.
    """
    if whole("n", n) < 2:
        raise ValueError(f"a schedule needs at least 2 temperatures, 0 and 1, got {n!r}")
    return torch.linspace(0, 1, n, dtype=torch.float64)


@explained
@torch.no_grad()
def annealed_importance_sampling(
    model: BoltzmannMachine,
    *,
    temperatures: Tensor | int | None = None,
    num_chains: int = 100,
    base: Tensor | None = None,
    generator: torch.Generator,
    chunk: int = 2000,
    report: Report = silent,
) -> LogPartition:
    """Estimate log Z by chains from the base up to the model.

    Args:
        model: the machine.
        temperatures: inverse temperatures, increasing from 0 to 1, shape (K + 1,); a number for
            `linear_schedule`; `salakhutdinov_schedule()` by default.
        num_chains: independent chains.
        base: logits of a binary visible's base rate, shape (visible_dim,), such as
            `model.base_rate(data)`; zeros by default. The closer the base, the smaller the error.
        generator: on the model's device.
        chunk: chains that run at a time; memory grows with it, and the answer depends on it only by
            which random numbers go where.
        report: told how far it is.

    Returns:
        The estimate, with its standard error and its effective sample size.

    Raises:
        ValueError: for less than one chain, a schedule that does not increase from 0 to 1, a base rate
            of the wrong width or for Gaussian visibles, or chains whose weights are no numbers.

    Example:
        >>> from bilevel.methods.machines import RBM
        >>> model, generator = RBM(8, 6), torch.Generator().manual_seed(0)
        >>> found = annealed_importance_sampling(model, temperatures=500, generator=generator)
        >>> abs(found.value - model.log_partition().item()) < 0.1
        True

    References:
        Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008.
        On the Quantitative Analysis of Deep Belief Networks (Salakhutdinov and Murray, ICML 2008),
        https://www.cs.toronto.edu/~rsalakhu/papers/dbn_ais.pdf.
        Differs from the paper in: the base's hidden units are part of the annealed path, with their
        biases scaled by the inverse temperature.
    """
    refuse_no_machine(model)
    a_generator("generator", generator)
    _check_positive("`num_chains`", num_chains)
    _check_positive("`chunk`", chunk)
    betas = _schedule(temperatures)
    _check_base(model, base)
    way = _Way("annealing to the model", math.ceil(num_chains / chunk) * (len(betas) - 1), report)
    parts = []
    for done in range(0, num_chains, chunk):
        start = model.initial(min(chunk, num_chains - done), generator)
        parts.append(_anneal(model, start, betas, base, generator, way))
    log_weights = torch.cat(parts) + model.log_partition_base(base).double()
    return LogPartition(log_weights, len(betas))


@explained
@torch.no_grad()
def reverse_annealed_importance_sampling(
    model: BoltzmannMachine,
    samples: Tensor,
    *,
    temperatures: Tensor | int | None = None,
    base: Tensor | None = None,
    generator: torch.Generator,
    chunk: int = 2000,
    report: Report = silent,
) -> LogPartition:
    """Estimate log Z by chains from the model down to the base: too high on average, never too low.

    Args:
        model: the machine.
        samples: first hidden layers drawn from the model, one chain each, shape (n, latent_dims[0]):
            `exact_samples` where they can be had, else `gibbs_samples`, from which it is a bound only
            as far as those chains have mixed.
        temperatures: as for `annealed_importance_sampling`.
        base: as for `annealed_importance_sampling`.
        generator: on the model's device.
        chunk: as for `annealed_importance_sampling`.
        report: told how far it is.

    Raises:
        ValueError: as `annealed_importance_sampling`; for samples of the wrong width.

    References:
        Accurate and Conservative Estimates of MRF Log-likelihood using Reverse Annealing (Burda, Grosse
        and Salakhutdinov, AISTATS 2015), https://arxiv.org/abs/1412.8566.
        Differs from the paper in: it is the model itself that is annealed, not an approximation built
        from a chain at the data; so starts that are not exact samples give no strict bound.
    """
    refuse_no_machine(model)
    a_generator("generator", generator)
    if samples.ndim != 2 or samples.shape[1] != model.latent_dims[0]:
        raise ValueError(
            f"`samples` must be first hidden layers, shape (n, {model.latent_dims[0]}), got "
            f"{tuple(samples.shape)}"
        )
    _check_positive("the number of samples", len(samples))
    _check_positive("`chunk`", chunk)
    betas = _schedule(temperatures)
    _check_base(model, base)
    samples = samples.to(model.visible_bias.dtype)
    starts = samples.split(chunk)
    way = _Way("annealing back to the base", len(starts) * (len(betas) - 1), report)
    parts = [_anneal(model, h1, betas[::-1], base, generator, way) for h1 in starts]
    log_weights = torch.cat(parts) - model.log_partition_base(base).double()
    return LogPartition(log_weights, len(betas), reverse=True)


@explained
def bracket(
    model: BoltzmannMachine,
    *,
    data: Tensor | None = None,
    temperatures: Tensor | int | None = None,
    num_chains: int = 100,
    base: Tensor | None = None,
    generator: torch.Generator,
    burn_in: int = 10_000,
    report: Report = silent,
) -> Bracket:
    """Log Z from below and from above.

    Args:
        model: the machine.
        data: visibles at which Gibbs chains start, shape (n, visible_dim); needed only where the first
            hidden layer cannot be enumerated.
        temperatures: as for `annealed_importance_sampling`.
        num_chains: chains in each direction.
        base: as for `annealed_importance_sampling`.
        generator: on the model's device.
        burn_in: Gibbs steps from the data to where the downward chains start.
        report: told which stage it is at and how far.

    Returns:
        Both estimates; whether they meet, and how far apart their outer error bars are.

    Raises:
        ValueError: as `annealed_importance_sampling`; if `data` is needed and missing.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani and
        Adams, 2015), https://arxiv.org/abs/1511.02543.
    """
    refuse_no_machine(model)
    exact = model.latent_dims[0] <= MAX_UNITS
    if not exact and data is None:
        raise ValueError(
            f"the {model.latent_dims[0]} units of the first hidden layer are too many to draw exact "
            "samples from; pass `data`, at which long Gibbs chains can start"
        )
    forward = annealed_importance_sampling(
        model,
        temperatures=temperatures,
        num_chains=num_chains,
        base=base,
        generator=generator,
        report=report,
    )
    report("drawing from the model where chains start", 0, 0)
    if exact:
        samples = exact_samples(model, num_chains, generator)
    else:
        assert data is not None
        samples = gibbs_samples(model, data, num_chains, burn_in, generator)
    backward = reverse_annealed_importance_sampling(
        model, samples, temperatures=temperatures, base=base, generator=generator, report=report
    )
    return Bracket(forward, backward, exact)


@explained
@torch.no_grad()
def exact_samples(model: BoltzmannMachine, n: int, generator: torch.Generator) -> Tensor:
    """Independent first hidden layers of the model, all states enumerated, shape (n, latent_dims[0]).

    Raises:
        ValueError: if the first hidden layer has more than `MAX_UNITS` units, or weights are NaN.
    """
    refuse_no_machine(model)
    a_generator("generator", generator)
    whole("n", n)
    units = model.latent_dims[0]
    if units > MAX_UNITS:
        raise ValueError(
            f"exact samples need all states of the first hidden layer, which has {units} units; at most "
            f"{MAX_UNITS} can be enumerated. Use `gibbs_samples`"
        )
    like = model.visible_bias
    starts = range(0, 2**units, _CHUNK)
    chunks = (states(units, start, min(start + _CHUNK, 2**units), like) for start in starts)
    log_weights = torch.cat([model.log_unnormalized_first(h1).double() for h1 in chunks])
    if log_weights.isnan().any():
        raise ValueError(
            "the weights of the machine's states are no numbers; look for NaN or infinite numbers among "
            "its parameters"
        )
    # not torch.multinomial: it takes at most 2^24 categories
    steps = log_weights.softmax(0).cumsum(0)
    coins = torch.rand(n, generator=generator, dtype=steps.dtype, device=steps.device)
    found = torch.searchsorted(steps, coins * steps[-1], right=True).clamp(max=len(steps) - 1)
    digits = torch.arange(units, device=found.device)
    return ((found[:, None] >> digits) & 1).to(like.dtype)


@explained
def gibbs_samples(
    model: BoltzmannMachine, data: Tensor, n: int, burn_in: int, generator: torch.Generator
) -> Tensor:
    """First hidden layers at the end of Gibbs chains from data, shape (n, latent_dims[0]).

    Samples of the model only as far as the chains have mixed: the rows of `data` are used in turn.

    Raises:
        TypeError: for data the machine does not take.
        ValueError: for less than one chain or step, or data the machine does not take.
    """
    _check_positive("`n`", n)
    _check_positive("the number of rows of `data`", len(data))
    data = model.visibles.admitted(data, model.visible_bias)
    rows = torch.arange(n, device=data.device) % len(data)
    h1 = model.first_layer(data[rows], generator)
    return model.gibbs(h1, generator, burn_in)[1][:, : model.latent_dims[0]]


@final
class _Way:
    """How far all chains of an estimate are.

    Args:
        what: the name of the stage.
        total: steps from one temperature to the next.
        report: who is told.
    """

    def __init__(self, what: str, total: int, report: Report) -> None:
        self.what, self.total, self.report, self.done = what, total, report, 0

    def step(self) -> None:
        """Say that one more step is done."""
        self.done += 1
        self.report(self.what, self.done, self.total)


def _anneal(
    model: BoltzmannMachine,
    h1: Tensor,
    betas: list[float],
    base: Tensor | None,
    generator: torch.Generator,
    way: _Way,
) -> Tensor:
    """Log-weights of chains from h1 through `betas`, less log Z at the first; float64."""
    chains = AnnealedChains(model.neighbours(base), h1)
    log_weights = torch.zeros(len(h1), dtype=torch.float64, device=h1.device)
    for start, end in pairwise(betas):
        if start != betas[0]:
            chains.move(generator)
        log_weights += chains.weigh(start, end)
        way.step()
    return log_weights


def _schedule(temperatures: Tensor | int | None) -> list[float]:
    if temperatures is None:
        grid = salakhutdinov_schedule()
    elif isinstance(temperatures, int):
        grid = linear_schedule(temperatures)
    else:
        grid = temperatures.double()
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1:
        ends = f"from {grid[0]:g} to {grid[-1]:g}" if grid.ndim == 1 and len(grid) else "nothing"
        raise ValueError(
            f"`temperatures` must be inverse temperatures from 0 to 1 in one dimension, got {ends}, "
            f"shape {tuple(grid.shape)}"
        )
    rising = grid.diff() > 0
    if not rising.all():
        at = int((~rising).nonzero()[0])
        raise ValueError(
            f"`temperatures` must increase, got {grid[at]:g} and then {grid[at + 1]:g} at position {at}"
        )
    betas: list[float] = grid.tolist()
    return betas


def _check_base(model: BoltzmannMachine, base: Tensor | None) -> None:
    if base is None:
        return
    if model.visible_range is None:
        raise ValueError(
            f"a base rate is for binary visibles, and those of a `{type(model).__name__}` are Gaussian; "
            "leave `base` out"
        )
    if base.shape != (model.visible_dim,):
        raise ValueError(
            f"`base` must be one logit per visible, shape ({model.visible_dim},), got "
            f"{tuple(base.shape)}"
        )


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
