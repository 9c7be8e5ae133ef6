"""Things of the wrong kind, in Python: each is answered by one sentence that says what to give."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bilevel import (
    GMRES,
    Alternating,
    Batches,
    Cholesky,
    ConjugateGradient,
    Implicit,
    Neumann,
    Oracles,
    Problem,
    Unrolled,
    check_hypergradient,
    train,
)
from bilevel.methods import RBM, VAE, BiDVL, ContrastiveDivergence, History, VaGES
from bilevel.methods.data.densities import density
from bilevel.methods.data.images import load_images
from bilevel.methods.data.tables import load_table
from bilevel.methods.likelihood import annealed_importance_sampling, exact_samples, log_likelihood
from bilevel.methods.report import plot_density
from bilevel.methods.samplers import Langevin
from tests.problems import NetProblem, Quadratic, normal, regression

BITS = torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 6)


def functions(**changes: Any) -> Problem:
    parts: dict[str, Any] = {
        "upper_loss": lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        "lower_loss": lambda x, y, _: (y["y"] - x["x"]).square().sum(),
        "upper": {"x": normal(2)},
        "lower": {"y": normal(2)},
    }
    return Problem.from_functions(**{**parts, **changes})


def net() -> NetProblem:
    return NetProblem(nn.Linear(3, 1).double())


def run(problem: Problem | None = None, data: Any = None, **changes: Any) -> None:
    problem = Quadratic() if problem is None else problem
    settings: dict[str, Any] = {
        "upper_optimizer": torch.optim.SGD(problem.upper.parameters(), 0.1),
        "lower_optimizer": torch.optim.SGD(problem.lower.parameters(), 0.1),
        "num_steps": 1,
    }
    for _ in train(problem, data, **{**settings, **changes}):
        pass


CHAINS = Langevin(2, 0.1)


def square(v: torch.Tensor) -> torch.Tensor:
    return v.square().sum(1)


def learner() -> ContrastiveDivergence:
    return ContrastiveDivergence(RBM(4, 3))


def fit(**changes: Any) -> None:
    learner().fit(BITS, **{"num_steps": 1, "batch_size": 3, **changes})


def once(batch: Any = None) -> None:
    Alternating().hypergradient(net(), batch, [batch])


def vector(operator: Any, rhs: Any) -> Any:
    return ConjugateGradient().solve(operator, rhs)


CASES: list[tuple[Callable[[], Any], str]] = [
    # classes for instances, strings for objects
    (lambda: Implicit(ConjugateGradient), r"is the class `ConjugateGradient`; give an instance"),  # type: ignore[arg-type]
    (lambda: check_hypergradient(Quadratic(), Implicit), r"give an instance, `Implicit\(\.\.\.\)`"),  # type: ignore[arg-type]
    (lambda: check_hypergradient(Quadratic(), "implicit"), "`solver` must be a solver, got 'impl"),  # type: ignore[arg-type]
    (lambda: check_hypergradient(nn.Linear(2, 2), Implicit()), "`problem` must be a `Problem`"),  # type: ignore[arg-type]
    (
        lambda: check_hypergradient(Quadratic(), Unrolled(2), lower_optimizer="adam"),  # type: ignore[arg-type]
        "`lower_optimizer` must be a `torch.optim` optimizer",
    ),
    (lambda: check_hypergradient(Quadratic(), Implicit(), seed=1.5), "`seed` must be a whole"),  # type: ignore[arg-type]
    (lambda: BiDVL(nn.Linear, nn.Linear(2, 4), nn.Linear(2, 2)), "`energy` must be an `nn.Module`"),  # type: ignore[arg-type]
    (lambda: fit(optimizers="adam"), r"`optimizers` must be a pair, `\(upper, lower\)`"),
    (lambda: fit(callbacks=print), "`callbacks` must be a list of functions"),
    (lambda: fit(callbacks=["print"]), "`callbacks` must be functions"),
    (lambda: fit(evaluate="fid", evaluate_every=1), "`evaluate` must be a function"),
    (lambda: fit(evaluate=lambda _: 1.0, evaluate_every=1), "`evaluate` must return a dict"),
    (lambda: fit(notes={"a": torch.zeros(2)}), "`notes` go into `config.json`"),
    (lambda: fit(num_steps="10"), "`num_steps`: input should be a number, got '10'"),
    (lambda: fit(num_steps=True), "`num_steps`: input should be a number, got True"),
    (lambda: fit(betas=(0.9, 1.5)), "`betas`: input should be less than 1"),
    (lambda: annealed_importance_sampling(RBM, generator=torch.Generator()), "must be a Boltzmann"),  # type: ignore[arg-type]
    (lambda: exact_samples(learner(), 3, torch.Generator()), "of a learner is `learner.model`"),  # type: ignore[arg-type]
    (lambda: log_likelihood(RBM(4, 3), BITS, "3"), "`log_partition` must be a number"),  # type: ignore[arg-type]
    # settings of solvers
    (lambda: Unrolled(2.0), "`num_steps` must be a whole number, got 2.0"),  # type: ignore[arg-type]
    (lambda: ConjugateGradient(warm_start="yes"), "`warm_start` must be `True` or `False`"),  # type: ignore[arg-type]
    (lambda: ConjugateGradient(preconditioner=torch.eye(2)), "`preconditioner` must be a function"),  # type: ignore[arg-type]
    (lambda: vector(torch.eye(2), torch.ones(2)), "`operator` must be a function"),
    (lambda: vector(lambda v: v, [1.0, 2.0]), "`rhs` must be a floating-point tensor"),
    (lambda: vector(lambda v: v, torch.ones(2, 2)), r"got torch.float32 of shape \(2, 2\)"),
    # names of other libraries
    (lambda: Implicit(damping=0.1), "`Implicit` has no argument `damping`"),  # type: ignore[call-arg]
    (lambda: ConjugateGradient(max_iter=5), "did you mean `max_steps`?"),  # type: ignore[call-arg]
    (lambda: Neumann(max_steps=5), "did you mean `num_steps`?"),  # type: ignore[call-arg]
    (lambda: GMRES(tol=1e-3), "did you mean `rtol`?"),  # type: ignore[call-arg]
    (lambda: Cholesky(ridge=1.0), "did you mean `damping`?"),  # type: ignore[call-arg]
    (lambda: Alternating(5), "`Alternating` takes nothing by position; got 1 arguments"),  # type: ignore[call-arg]
    (lambda: Unrolled(), "`Unrolled` needs `num_steps`"),  # type: ignore[call-arg]
    (lambda: run(lr=0.1), "no argument `lr`; the learning rates are the optimizers'"),
    (lambda: run(epochs=3), "no argument `epochs`; give `num_steps`"),
    (lambda: run(callbacks=[print]), "the loop is yours"),
    (lambda: train(Quadratic(), num_steps=3), "`train` needs `upper_optimizer`"),  # type: ignore[call-arg]
    (lambda: Batches(torch.zeros(4), 2, shuffle=True), "every epoch are in a new order"),  # type: ignore[call-arg]
    (lambda: fit(lr=0.1), "did you mean `upper_lr`?"),
    (lambda: fit(optimizer="adam"), r"`optimizers=\(upper, lower\)`"),
    (lambda: fit(device="cuda"), r"move the model there, `model.to\(...\)`"),
    (lambda: fit(batch=10), "did you mean `batch_size`?"),
    (
        lambda: BiDVL.for_images((1, 8, 8), ratios=0.1),
        "no argument `ratios`; did you mean `ratio`?",
    ),
    (lambda: RBM(4, 3, seed=0), r"give `generator=torch.Generator\(\).manual_seed\(0\)`"),  # type: ignore[call-arg]
    (lambda: learner().sample(3, seed=0), "has no argument `seed`; give `generator="),  # type: ignore[call-arg]
    (lambda: BiDVL.fit(BITS), "it is called on an object, not on the class"),  # type: ignore[call-arg, arg-type]
    # dicts, tensors, numbers
    (lambda: functions(upper=[normal(2)]), "`upper` must be a dict of tensors, got list"),
    (lambda: functions(lower=nn.Linear(2, 1)), r"give `dict\(module.named_parameters\(\)\)`"),
    (lambda: functions(upper_loss="f"), "`upper_loss` must be a function"),
    (lambda: functions().variables("Upper"), 'a level is "upper" or "lower"'),  # type: ignore[arg-type]
    (lambda: functions(upper={}, lower={}).device, "has no parameters, so it lies on no device"),
    (lambda: Oracles(functions(), None, [None], seed=1.5), "`seed` must be a whole number"),  # type: ignore[arg-type]
    (
        lambda: Alternating().hypergradient(
            functions(upper_loss=lambda x, y, _: (y["y"] * 1j).sum())
        ),
        "is complex; return a real number",
    ),
    (lambda: run(Quadratic().to("meta")), "is on the meta device, which holds no numbers"),
    (lambda: learner().sample(3, 0), r"`generator` must be a `torch.Generator`, got 0"),  # type: ignore[arg-type]
    (lambda: RBM(4, 3, generator=0), r"write `Generator\(\).manual_seed\(0\)`"),  # type: ignore[arg-type]
    (lambda: RBM(4, 3, grey="no"), "`grey` must be `True` or `False`"),  # type: ignore[arg-type]
    (lambda: VAE.for_table(4, 2, hidden=20), r"`\(20,\)` for one layer"),  # type: ignore[arg-type]
    (lambda: ContrastiveDivergence(nn.Linear(4, 1)), r"`ScoreMatching` \(v -> \(n,\)\), and `Gen"),
    # samplers, pictures, functions that `fit` calls
    (lambda: CHAINS.run(learner(), BITS), "got a learner; give `model.energy_function`"),
    (
        lambda: CHAINS.run(learner().energy, BITS),
        "which has no gradient; give `model.energy_function`",
    ),
    (lambda: next(CHAINS.steps("energy", BITS)), "`energy` must be a function .*'energy'"),  # type: ignore[arg-type]
    (lambda: CHAINS.run(square, [[0.0, 1.0]]), "`start` must be a tensor"),  # type: ignore[arg-type]
    (lambda: CHAINS.run(square, torch.zeros(())), "`start` must be floating-point rows"),
    (lambda: CHAINS.run(square, BITS, "0"), "`generator` must be a `torch.Generator`"),  # type: ignore[arg-type]
    (
        lambda: CHAINS.run(lambda v: square(v.detach()), BITS),
        "of a learner that is `model.energy_f",
    ),
    (lambda: plot_density(square, box=(0, 1)), r"`box` must be \(\(low, high\)"),  # type: ignore[arg-type]
    (
        lambda: plot_density(learner(), box=((0, 1), (0, 1))),
        r"`ContrastiveDivergence` have shape \(4,\)",
    ),
    (
        lambda: fit(evaluate=lambda m: {"mine": "good"}, evaluate_every=1),
        "one number by each name, got 'good' for 'mine'",
    ),
    (lambda: fit(augment=lambda v: v), r"called as `augment\(visibles, generator\)`"),
    (lambda: fit(augment=nn.Identity()), r"called as `augment\(visibles, generator\)`"),
    (lambda: History().plot("x"), "`History.plot` takes nothing by position"),  # type: ignore[call-arg]
    (lambda: VaGES(RBM(4, 3), num_samples="2"), "`num_samples` must be a whole number"),  # type: ignore[arg-type]
    (lambda: BiDVL.for_images(32), r"`shape` must be three whole numbers"),  # type: ignore[arg-type]
    (lambda: BiDVL.for_images(torch.zeros(5, 1, 8, 8)), r"of these images it is `\(1, 8, 8\)`"),  # type: ignore[arg-type]
    (lambda: BiDVL.for_images((1, 8, 8), seed=None), "`seed` must be a whole number, got None"),  # type: ignore[arg-type]
    (
        lambda: BiDVL.for_images((1, 8, 8), width=4, ratio=float("nan")),
        "`ratio` must be zero or more",
    ),
    (lambda: learner().joint_energy(BITS, torch.zeros(2, 3)), "each visible has one latent, got 6"),
    (lambda: RBM(4, 3).free_energy(BITS.numpy()), "`visibles` must be a tensor"),  # type: ignore[arg-type]
    (lambda: learner().save(3), r"`folder` must be a path \(`str` or `Path`\), got 3"),  # type: ignore[arg-type]
    (lambda: BiDVL.load(None), "`folder` must be a path"),  # type: ignore[arg-type]
    (lambda: load_images(np.zeros((3, 8, 8))), "`source` must be a path"),  # type: ignore[arg-type]
    (lambda: load_images("digits", limit=2.5), "`limit` must be a whole number, got 2.5"),  # type: ignore[arg-type]
    (lambda: load_table("checkerboard", size="a"), "`size` must be a whole number"),  # type: ignore[arg-type]
    (lambda: density("moons").sample(3, 0), "`generator` must be a `torch.Generator`"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_thing_of_the_wrong_kind_is_one_sentence(number: int) -> None:
    wrong, words = CASES[number]
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: once(tuple(t.float() for t in regression())),
            "the variables are float64: convert",
        ),
        (lambda: once(tuple(t.numpy() for t in regression())), "arrays with `torch.as_tensor`"),
        (lambda: once((torch.zeros(4, 5), torch.zeros(4, 1))), r"float32 \(4, 5\) on cpu"),
        (lambda: once(), "the batch is `None`, because no data were given"),
        (
            lambda: run(functions(upper_loss=lambda x, y: y["y"].sum())),
            r"is called as `upper_loss\(upper, lower, batch\)`: `upper` is a dict with `x`",
        ),
        (lambda: run(functions(lower_loss=lambda x, y, _: x["y"].sum())), "`lower` one with `y`"),
    ],
)
def test_an_error_inside_a_loss_keeps_its_words_and_says_what_the_batch_was(
    wrong: Callable[[], Any], words: str
) -> None:
    with pytest.raises((RuntimeError, TypeError, KeyError)) as caught:
        wrong()
    notes = caught.value.__notes__
    assert any(re.search(words, note) for note in notes)
    assert len(set(notes)) == len(notes)


def test_a_run_cannot_be_in_a_file(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/run"):
        with pytest.raises(FileExistsError, match="is a file, so no run can be in"):
            fit(run=tmp_path / name)
