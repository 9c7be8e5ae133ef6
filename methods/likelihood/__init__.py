"""How likely a model makes data: exact, annealed with error bars, or bounded with the gap named."""

from bilevel.methods.likelihood.ais import (
    annealed_importance_sampling,
    bracket,
    exact_samples,
    gibbs_samples,
    linear_schedule,
    reverse_annealed_importance_sampling,
    salakhutdinov_schedule,
)
from bilevel.methods.likelihood.bounds import (
    Estimate,
    VariationalBound,
    chi_square_upper_bound,
    log_likelihood,
    sampler_lower_bound,
    variational_lower_bound,
)
from bilevel.methods.likelihood.fisher import (
    FisherDivergence,
    fisher_divergence,
    fisher_divergence_exact,
    fisher_objective,
    rademacher,
)
from bilevel.methods.likelihood.log_partition import Bracket, LogPartition
from bilevel.methods.likelihood.plane import PlaneDensity, plane_density

__all__ = [
    "Bracket",
    "Estimate",
    "FisherDivergence",
    "LogPartition",
    "PlaneDensity",
    "VariationalBound",
    "annealed_importance_sampling",
    "bracket",
    "chi_square_upper_bound",
    "exact_samples",
    "fisher_divergence",
    "fisher_divergence_exact",
    "fisher_objective",
    "gibbs_samples",
    "linear_schedule",
    "log_likelihood",
    "plane_density",
    "rademacher",
    "reverse_annealed_importance_sampling",
    "salakhutdinov_schedule",
    "sampler_lower_bound",
    "variational_lower_bound",
]
