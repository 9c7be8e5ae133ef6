"""The learners of `benchmarks.learner_speed`: this library's, and the same by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from benchmarks.competitors.one_level import (
    Contrastive,
    Denoising,
    Likelihood,
    Noise,
    OneLevel,
    Sliced,
)
from benchmarks.competitors.plain import Machine, Plain
from benchmarks.competitors.posteriors import DAMPING, bism, bism_implicit, vages
from benchmarks.competitors.samplers import advil, bidvl
from bilevel import Alternating, Cholesky, Implicit, Solver, Unrolled
from bilevel.methods import (
    EBLVM,
    RBM,
    AdvIL,
    BiSM,
    ContrastiveDivergence,
    GaussianRBM,
    GeneralBiDVL,
    MaximumLikelihood,
    NoiseContrastive,
    ScoreMatching,
    VaGES,
)
from bilevel.methods.data.densities import density


@final
@dataclass(frozen=True)
class Entry:
    """A learner of this library and the same by hand."""

    name: str
    learner: Callable[[], EBLVM]
    plain: Callable[[], Plain]
    solver: Solver = Alternating()  # noqa: RUF009 - frozen
    binary: bool = False
    rate: float = 1e-3
    lower_steps: int | None = None  # the method's own

    def data(self) -> Tensor:
        """Training data; their values do not matter."""
        generator = torch.Generator().manual_seed(0)
        if self.binary:
            return torch.rand(5000, 64, generator=generator).round()
        return density("checkerboard").sample(5000, generator)


def gaussian() -> GaussianRBM:
    return GaussianRBM(2, 4)


def by_hand() -> Machine:
    return Machine(2, 4, gaussian=True)


def binary() -> Machine:
    return Machine(64, 15, gaussian=False)


IMPLICIT = Implicit(Cholesky(damping=DAMPING))
ENTRIES = (
    Entry("DSM", lambda: ScoreMatching(gaussian()), lambda: OneLevel(by_hand(), Denoising())),
    Entry(
        "SSM",
        lambda: ScoreMatching(gaussian(), objective="sliced"),
        lambda: OneLevel(by_hand(), Sliced()),
    ),
    Entry(
        "CD-1",
        lambda: ContrastiveDivergence(gaussian()),
        lambda: OneLevel(by_hand(), Contrastive()),
    ),
    Entry(
        "PCD-1",
        lambda: ContrastiveDivergence(gaussian(), persistent=True),
        lambda: OneLevel(by_hand(), Contrastive(persistent=True)),
    ),
    Entry(
        "exact ML", lambda: MaximumLikelihood(gaussian()), lambda: OneLevel(by_hand(), Likelihood())
    ),
    Entry("NCE", lambda: NoiseContrastive(gaussian()), lambda: OneLevel(by_hand(), Noise())),
    Entry("VaGES, K = 5, L = 2", lambda: VaGES(gaussian()), lambda: vages(by_hand())),
    Entry("BiSM, K = 5, N = 0", lambda: BiSM(gaussian()), lambda: bism(by_hand())),
    Entry("BiSM, K = 5, N = 5", lambda: BiSM(gaussian()), lambda: bism(by_hand(), 5), Unrolled(5)),
    Entry(
        "BiSM, K = 5, Implicit",
        lambda: BiSM(gaussian(), expectation="exact"),
        lambda: bism_implicit(by_hand()),
        IMPLICIT,
    ),
    Entry(
        "BiDVL, KL, K = 5",
        lambda: GeneralBiDVL.for_model(gaussian()),
        lambda: bidvl(by_hand()),
    ),
    Entry(
        "CD-1, RBM(64, 15)",
        lambda: ContrastiveDivergence(RBM(64, 15)),
        lambda: OneLevel(binary(), Contrastive()),
        binary=True,
    ),
    Entry(
        "AdvIL, RBM(64, 15)",
        lambda: AdvIL(RBM(64, 15)),
        lambda: advil(binary()),
        binary=True,
        rate=3e-4,
        lower_steps=100,
    ),
)
