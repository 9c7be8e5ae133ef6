"""Machines for `benchmarks.dropped_term`: BiDVL on bars and stripes, BiSM on the plane."""

import itertools
import math
from typing import Any

import torch
import torchopt
from torch import Tensor

from benchmarks.cases.dropped_case import FIRST, Case, rng
from bilevel import Cholesky, ConjugateGradient, Implicit, Unrolled
from bilevel.methods import RBM, BiSM, GaussianRBM, GeneralBiDVL, ScoreMatching
from bilevel.methods.data.densities import density
from bilevel.methods.variational import BernoulliPosterior, HierarchicalJoint
from bilevel.tree import Tree


def bars_and_stripes(_: int = 0) -> Tensor:
    """The 14 pictures of 3 x 3 pixels, eight of each."""
    lines = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    bars = lines[:, None, :].expand(-1, 3, 3)
    both = torch.cat([bars, bars.mT]).reshape(-1, 9)
    return both.unique(dim=0).repeat(8, 1)


def rbm(divergence: Any) -> Case:
    def make(seed: int) -> GeneralBiDVL:
        model = RBM(9, 5, generator=rng(seed))
        with torch.no_grad():
            model.weight.mul_(0.1)  # AdvIL's initial weights are for hundreds of units
        posterior = BernoulliPosterior.for_model(model, generator=rng(seed + 10))
        joint = HierarchicalJoint.for_model(model, generator=rng(seed + 20))
        return GeneralBiDVL(model, posterior, joint, divergence=divergence)

    def target(problem: GeneralBiDVL, _: Any) -> Tree:
        names, leaves = zip(*problem.upper.named_parameters(), strict=True)
        loss = -problem.upper["energy"].log_likelihood(bars_and_stripes()[:14]).mean()
        return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    def batch(problem: GeneralBiDVL) -> tuple[Any, Any]:
        drawn = problem.draw(bars_and_stripes().repeat(5, 1), rng(0))
        return drawn, problem.draw_lower(drawn, rng(1), 0)

    damped = Implicit(ConjugateGradient(max_steps=10, rtol=None, damping=3.0))
    return Case(
        name=f"rbm-{divergence}",
        title=f"RBM(9, 5), {divergence if divergence == 'symmetric' else 'KL'}, K = 5",
        make=make,
        data=bars_and_stripes,
        judge=lambda p: [p.upper["energy"].log_likelihood(bars_and_stripes()[:14]).mean().item()],
        target=target,
        probe=lambda problem: problem,
        probe_batch=batch,
        solver=Unrolled(num_steps=20, optimizer=torchopt.sgd(0.1)),  # defined at any curvature
        solvers={**{n: FIRST[n] for n in ("Alternating", "Unrolled(5)")}, "Implicit": damped},
        steps=1000,
        lower_steps=5,
        rate=1e-2,
        betas=(0.5, 0.999),
        compile=True,
        ceiling=-math.log(14),
        ahead=True,
    )


def bism(where: str, expectation: Any) -> Case:
    truth = density(where)
    held_out = truth.sample(5000, rng(99))
    probe_rows = truth.sample(1000, rng(98))

    def model(seed: int) -> GaussianRBM:
        return GaussianRBM(2, 4, generator=rng(seed))

    def make(seed: int) -> BiSM:
        machine = model(seed)
        posterior = BernoulliPosterior.for_model(machine, generator=rng(seed + 10))
        return BiSM(machine, posterior, expectation=expectation)

    def target(problem: BiSM, upper_batch: Any) -> Tree:
        single = ScoreMatching(problem.model)
        names, leaves = zip(*single.upper.named_parameters(), strict=True)
        loss = single.upper_loss(upper_batch.points)
        assert isinstance(loss, Tensor)
        return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))

    def batch(problem: BiSM) -> tuple[Any, Any]:
        drawn = problem.draw(probe_rows, rng(0))
        return drawn, problem.draw_lower(drawn, rng(1), 0)

    damping = 1e-3 if expectation == "exact" else 0.1
    solvers = {**FIRST, "Implicit": Implicit(Cholesky(damping=damping))}
    del solvers["Unrolled(20)"]  # minutes of compiling
    return Case(
        name=f"bism-{where}-{expectation}",
        title=f"BiSM, {where}, lower loss {expectation}, K = 5",
        make=make,
        data=lambda seed: truth.sample(5000, rng(seed)),
        judge=lambda problem: [float(problem.model.log_likelihood(held_out).mean())],
        target=target,
        probe=lambda problem: BiSM(
            problem.model, problem.lower.get_submodule("posterior"), expectation="exact"
        ),
        probe_batch=batch,
        solver=Implicit(Cholesky(damping=1e-4)),
        solvers=solvers,
        steps=4000,
        lower_steps=5,
        rate=1e-2,
        betas=(0.9, 0.95),
        batch_size=100,
        compile=True,
        reference=lambda seed: ScoreMatching(model(seed)),
        shares=True,
    )
