r"""One truth for several hypergradients of a problem.

The truth $t$ is measured along an orthonormal basis $q_1, \dots, q_m$ of the space that the
hypergradients span, and along random directions across it, once for all of them. For one of
them, $g = \sum_j a_j q_j$, this is everything that `bilevel.check.interval` asks for: the derivative
along it is $b_0 = \sum_j a_j t_j / |a|$, what the basis knows across it is $(t_j) - b_0 a / |a|$,
and the rest is across all of them. In few dimensions the basis is that of the coordinates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.check.interval import Measured, Ranged, estimates
from bilevel.check.probing import Probe
from bilevel.check.witness import Stand

_ACCURACY = 1e-6  # of a derivative, relative to the hypergradient, where it can be resolved so
_APART = 1e-12  # what is left of a hypergradient that others span, by rounding
_CONFIDENCE = 0.95  # of the intervals


@final
@dataclass(frozen=True)
class CommonTruth:
    """Derivatives of the truth along directions that every hypergradient lies in.

    Attributes:
        basis: orthonormal directions, shape (m, n).
        along: derivatives along them.
        along_noise: their uncertainties.
        across: derivatives along random directions across them; an orthonormal basis of all that is
            left where `complete`.
        across_noise: their uncertainties.
        complete: whether nothing of the truth is left to chance.
        bend: how much the derivative changes within its step.
    """

    basis: Tensor
    along: Tensor
    along_noise: Tensor
    across: Tensor
    across_noise: Tensor
    complete: bool
    bend: float

    def judge(self, answer: Tensor) -> tuple[Ranged, Ranged, Ranged]:
        """Cosine, norm ratio and relative error of a hypergradient in the span of the basis."""
        parts = self.basis @ answer
        size = float(answer.norm())
        unit = parts / size if size > 0 else parts
        ahead = unit @ self.along
        side = (self.along - ahead * unit).norm()
        measured = Measured(
            size,
            torch.stack([ahead, side]),
            torch.stack([unit.abs() @ self.along_noise, self.along_noise.norm()]),
            self.across,
            self.across_noise,
            self.complete,
        )
        return estimates(measured, _CONFIDENCE, self.bend)


def measure_truth(
    stand: Stand, answers: Mapping[str, Tensor], num_directions: int, seed: int
) -> CommonTruth:
    """The truth along what the hypergradients span, and along random directions.

    Args:
        stand: the problem's copy at the lower level's answer.
        answers: hypergradients, each a finite vector in float64.
        num_directions: random directions; the coordinates instead if there are no more of them.
        seed: of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(stand.site, _ACCURACY, stand.error, generator)
    probe.scale = min((s for a in answers.values() if (s := float(a.norm())) > 0), default=0.0)
    if few := probe.size <= num_directions:
        basis = list(torch.eye(probe.size, dtype=torch.float64))
    else:
        basis = _orthonormal(answers)
    left = 0 if few else probe.size - len(basis)
    complete = left <= num_directions
    others: list[Tensor] = []
    for _ in range(min(left, num_directions)):
        z = torch.randn(probe.size, generator=generator, dtype=torch.float64)
        z = _across(z, [*basis, *others] if complete else basis)
        others.append(z / z.norm() if complete else z)
    along, along_noise = _derivatives(probe, basis, "along")
    across, across_noise = _derivatives(probe, others, "across")
    spanned = torch.stack(basis) if basis else torch.zeros(0, probe.size, dtype=torch.float64)
    return CommonTruth(spanned, along, along_noise, across, across_noise, complete, probe.bend)


def _orthonormal(answers: Mapping[str, Tensor]) -> list[Tensor]:
    basis: list[Tensor] = []
    for answer in answers.values():
        left = _across(answer, basis)
        if float(left.norm()) > _APART * float(answer.norm()):
            basis.append(left / left.norm())
    return basis


def _across(vector: Tensor, basis: list[Tensor]) -> Tensor:
    left = vector.clone()
    for _ in range(2):  # once more for what rounding left
        for q in basis:
            left -= (q @ left) * q
    return left


def _derivatives(probe: Probe, directions: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    # each is a kind of its own: a step that is good for one coordinate is not for the next
    pairs = [probe.derivative(d, f"{kind} {k}") for k, d in enumerate(directions)]
    values, noises = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    return values, noises
