"""The catalogue: every name there is, and the two spellings of solvers in use."""

import inspect
from typing import Any

import pytest
import torch

import bilevel.methods
from bilevel import (
    GMRES,
    Alternating,
    Cholesky,
    ConjugateGradient,
    Identity,
    Implicit,
    Neumann,
    Solver,
    Unrolled,
    solvers,
)
from bilevel.cli.solver import solver_of
from bilevel.methods import EBLVM, RBM, VAE, GaussianRBM
from bilevel.methods.catalogue import (
    LINEAR_SOLVERS,
    METHODS,
    SOLVERS,
    make_for_machine,
    make_solver,
)
from bilevel.methods.machines import MACHINES, BoltzmannMachine

# As the command line writes them into the folder of a run, and as a suite's configuration does.
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any], Solver]] = [
    ({}, {}, Alternating()),
    ({"solver": "alternating"}, {"kind": "alternating"}, Alternating()),
    ({"solver": "unrolled"}, {"kind": "unrolled", "num_steps": 5}, Unrolled(5)),
    (
        {"solver": "unrolled", "unroll_steps": 2},
        {"kind": "unrolled", "num_steps": 2},
        Unrolled(2),
    ),
    (
        {"solver": "implicit"},
        {"kind": "implicit", "max_steps": 20, "damping": 0.1},
        Implicit(ConjugateGradient(max_steps=20, damping=0.1)),
    ),
    (
        {
            "solver": "implicit",
            "linear_solver": "conjugate-gradient",
            "linear_steps": 7,
            "damping": 0.5,
        },
        {"kind": "implicit", "linear_solver": "conjugate_gradient", "max_steps": 7, "damping": 0.5},
        Implicit(ConjugateGradient(max_steps=7, damping=0.5)),
    ),
    (
        {"solver": "implicit", "linear_solver": "gmres"},
        {"kind": "implicit", "linear_solver": "gmres", "max_steps": 20, "damping": 0.1},
        Implicit(GMRES(max_steps=20, damping=0.1)),
    ),
    (
        {"solver": "implicit", "linear_solver": "neumann", "linear_steps": 3},
        {"kind": "implicit", "linear_solver": "neumann", "num_steps": 3},
        Implicit(Neumann(num_steps=3)),
    ),
    (
        {"solver": "implicit", "linear_solver": "identity"},
        {"kind": "implicit", "linear_solver": "identity"},
        Implicit(Identity()),
    ),
    (
        {"solver": "implicit", "linear_solver": "cholesky", "damping": 1e-4},
        {"kind": "implicit", "linear_solver": "cholesky", "damping": 1e-4},
        Implicit(Cholesky(damping=1e-4)),
    ),
]

OF_SCORES = ("BiSM", "VaGES", "ScoreMatching")  # these need real visibles


@pytest.mark.parametrize(("flags", "settings", "solver"), SPELLINGS)
def test_both_spellings_of_a_solver_are_read(
    flags: dict[str, Any], settings: dict[str, Any], solver: Solver
) -> None:
    assert solver_of(flags) == make_solver(settings) == solver


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"solver": "implict"}, "did you mean `implicit`"),
        ({"solver": "implicit", "linear_solver": "newmann"}, "did you mean `neumann`"),
        ({"solver": "implicit", "linear_solver": "neumann", "damping": 0.1}, "`--damping` has no"),
        (
            {"solver": "implicit", "linear_solver": "identity", "linear_steps": 3},
            "`--linear-steps` has no meaning for `--linear-solver identity`",
        ),
        (
            {"solver": "implicit", "linear_solver": "cholesky", "linear_steps": 3},
            "`--linear-steps` has no meaning for `--linear-solver cholesky`",
        ),
        ({"solver": "unrolled", "unroll_steps": 0}, "`--unroll-steps` must be positive"),
    ],
)
def test_a_solver_that_cannot_be_is_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solver_of(flags)


def test_every_public_method_machine_and_linear_solver_has_a_name() -> None:
    public = [getattr(bilevel.methods, name) for name in bilevel.methods.__all__]
    classes = [member for member in public if inspect.isclass(member)]
    methods = {kind for kind in classes if issubclass(kind, EBLVM) and kind is not EBLVM}
    machines = {kind for kind in classes if issubclass(kind, BoltzmannMachine)}
    assert {method.kind for method in METHODS.values()} == methods
    assert set(MACHINES.values()) == machines
    assert len(LINEAR_SOLVERS) == 12


def test_a_method_can_be_built_for_images_or_for_a_machine() -> None:
    for name, method in METHODS.items():
        assert method.for_images or method.for_machine, name
        if method.for_machine is not None:
            machine = GaussianRBM(6, 3) if name in OF_SCORES else RBM(6, 3)
            assert type(make_for_machine(name, {}, machine, seed=1)) is method.kind


def test_a_vae_has_the_latents_and_visibles_of_the_machine_beside_it() -> None:
    made = make_for_machine("VAE", {"hidden": [5]}, RBM(6, 3, grey=True), seed=1)
    same = make_for_machine("VAE", {"hidden": [5], "latent_dim": 3, "grey": True}, RBM(6, 9), 1)
    assert isinstance(made, VAE)
    assert made.recipe == same.recipe
    assert all(map(torch.equal, made.parameters(), same.parameters()))
    with pytest.raises(ValueError, match="no option `latent_dims`; did you mean `latent_dim`"):
        make_for_machine("VAE", {"latent_dims": 3}, RBM(6, 3))
    with pytest.raises(ValueError, match="there is no method `BiSN`; did you mean `BiSM`"):
        make_for_machine("BiSN", {}, RBM(6, 3))


def test_every_solver_has_a_name() -> None:
    kinds = {make for make in vars(solvers).values() if isinstance(make, type)}
    made = {make for make in kinds if issubclass(make, Solver)} - {Solver, solvers.Compiled}
    assert set(SOLVERS.values()) == made
