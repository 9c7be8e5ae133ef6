r"""How likely a trained model makes the test rows, and how that is known.

A machine whose partition function can be enumerated is judged exactly. Of another, log Z is estimated by
annealed chains, from below and from above, and the likelihood with it; where the free energy is not
tractable either (two hidden layers), the mean field $\mu(v)$ of the posterior bounds it,

$$ \log p(v) \ge -E(v, \mu) + H(\mu) - \log Z , $$

the same for every method, whether or not it learned a posterior of its own. A VAE, which has no machine,
is judged by its importance-weighted bound, a method of somebody's own without one by what its
`log_likelihood` says.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, cast, final

import torch
from torch import Tensor

from bilevel.methods.catalogue import METHODS
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.likelihood import annealed_importance_sampling, bracket, linear_schedule
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.models.chunks import chunked
from bilevel.methods.suite.config import EvaluationConfig
from bilevel.methods.suite.job import Job
from bilevel.reporting import Report, silent

Known: TypeAlias = Literal[
    "exact",
    "annealed estimate",
    "variational lower bound",
    "importance-weighted lower bound",
    "told by the method",
]
_FREE_ENERGY_UNITS = 15  # of a first hidden layer that is summed out for every row


@final
@dataclass(frozen=True)
class Judgement:
    """A mean test log-likelihood in nats.

    Attributes:
        known: how: "exact", "annealed estimate" (log Z from annealed chains), "variational lower bound",
            "importance-weighted lower bound" or "told by the method", by its own `log_likelihood`.
        value: the number.
        standard_error: of the annealed log Z in it, `None` without one.
        lower: a bound from below: log Z from chains that start at the model, plus three standard errors.
        upper: a bound from above, from chains that start at the base; `None` for a variational bound.
        starts: what the former start at: "exact" samples, or the end of long "gibbs" chains, from which
            `lower` is a bound as far as these had mixed.
    """

    known: Known
    value: float
    standard_error: float | None = None
    lower: float | None = None
    upper: float | None = None
    starts: Literal["exact", "gibbs"] | None = None


def heldout_likelihood(
    job: Job, evaluation: EvaluationConfig, *, final: bool, report: Report = silent
) -> Judgement:
    """Judge the model in its present state.

    Args:
        job: with the learner as far as it is trained.
        evaluation: how.
        final: with all chains in both directions, or quickly, for a point of a curve.
        report: told which stage it is at and how far.
    """
    report("judging", 0, 0)
    learner, machine = job.learner, job.machine
    v = learner.check(job.table.test)
    with learner.evaluating():
        if learner.latent_model.machine is None:
            return _weighted(job, v, evaluation, final)
        tractable = len(machine.latent_dims) == 1 or machine.latent_dims[0] <= _FREE_ENERGY_UNITS
        known: Known = "exact" if tractable else "variational lower bound"
        bound = machine.free_energy if tractable else lambda rows: _mean_field_bound(machine, rows)
        unnormalised = -float(chunked(bound, v).double().mean())
        if machine.enumerable:
            return Judgement(known, unnormalised - float(machine.log_partition()))
        if tractable:
            known = "annealed estimate"
        return _annealed(job, unnormalised, known, evaluation, final, report)


def _annealed(
    job: Job,
    unnormalised: float,
    known: Known,
    evaluation: EvaluationConfig,
    final: bool,
    report: Report,
) -> Judgement:
    machine, data = job.machine, job.learner.check(job.table.train)
    if not math.isfinite(unnormalised):
        return Judgement(known, unnormalised)
    generator = torch.Generator(data.device).manual_seed(evaluation.seed)
    base, chains = machine.base_rate(data), evaluation.chains
    if not final:
        schedule = linear_schedule(evaluation.trace_temperatures)
        log_z = annealed_importance_sampling(
            machine,
            temperatures=schedule,
            num_chains=chains,
            base=base,
            generator=generator,
            report=report,
        )
        return Judgement(known, unnormalised - log_z.value, log_z.standard_error)
    both = bracket(
        machine,
        data=data,
        temperatures=evaluation.temperatures,
        num_chains=chains,
        base=base,
        generator=generator,
        burn_in=evaluation.burn_in,
        report=report,
    )
    return Judgement(
        known,
        unnormalised - both.forward.value,
        both.forward.standard_error,
        lower=unnormalised - both.upper,
        upper=unnormalised - both.lower if known == "annealed estimate" else None,
        starts="exact" if both.exact else "gibbs",
    )


class _Bounded(Protocol):
    """A method without a machine, which bounds its own likelihood."""

    def log_likelihood(self, v: Tensor, *, generator: torch.Generator) -> Tensor: ...


def _weighted(job: Job, v: Tensor, evaluation: EvaluationConfig, final: bool) -> Judgement:
    ours = job.cell.method.method in METHODS
    if final or not ours:
        generator = torch.Generator(v.device).manual_seed(evaluation.seed)
        values = cast(_Bounded, job.learner).log_likelihood(v, generator=generator)
    else:
        values = -job.learner.energy(v)
    known: Known = "importance-weighted lower bound" if ours else "told by the method"
    return Judgement(known, float(values.double().mean()))


def _mean_field_bound(machine: BoltzmannMachine, v: Tensor) -> Tensor:
    """E(v, mu) - H(mu), at least F(v), shape (n,)."""
    mu = machine.mean_field(v)
    entropy = torch.special.entr(mu) + torch.special.entr(1 - mu)
    energies: Tensor = machine(v, mu) - entropy.sum(1)
    return energies


def independent(job: Job) -> float | None:
    r"""The mean test log-likelihood of independent columns fitted to the training rows, exact, in nats.

    What a model has to beat to have learned anything of how columns depend on each other. Binary
    columns have the rate $(\sum_n v_n + 1) / (N + 2)$ (Laplace), so that none is certain; grey rows are
    judged like the machine judges them. Real columns have their mean and variance; `None` where a
    column is constant, because its Gaussian would have no density.
    """
    train, test = job.table.train.double(), job.table.test.double()
    if job.machine.visible_range is not None:
        rates = (train.sum(0) + 1) / (len(train) + 2)
        return float((test * rates.log() + (1 - test) * (1 - rates).log()).sum(1).mean())
    variance, mean = torch.var_mean(train, 0, correction=0)
    if not bool((variance > 0).all()):
        return None
    squares = (test - mean).square() / variance
    return float(-0.5 * (squares + (2 * math.pi * variance).log()).sum(1).mean())


def log_density(job: Job, points: Tensor) -> Tensor:
    """The model's log-density at any points, shape (n,), on the CPU; a bound for a VAE.

    Raises:
        ValueError: if the machine cannot be enumerated.
    """
    learner: EBLVM = job.learner
    v = learner.check(points)
    with learner.evaluating():
        if learner.latent_model.machine is None:
            return -learner.energy(v).cpu()
        return chunked(job.machine.log_likelihood, v, 20_000).cpu()
