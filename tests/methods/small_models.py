"""Small machines of every kind, and the enumeration of their states."""

import torch
from torch import Tensor

from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines.enumeration import states
from bilevel.methods.models import DBM, RBM, BoltzmannMachine, GaussianDBM, GaussianRBM
from bilevel.methods.vae import VAE
from tests.problems import generator, normal

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def bits(n: int) -> Tensor:
    """All states of n units, float64."""
    return states(n, 0, 2**n, torch.zeros((), dtype=torch.float64))


def machine(kind: type, *sizes: object, seed: int = 0) -> BoltzmannMachine:
    """A machine in float64 with every parameter drawn from N(0, 0.7^2)."""
    model = kind(*sizes).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=seed + number))
    return model


MACHINES = {
    "RBM": lambda: machine(RBM, 4, 3),
    "RBM, more latents": lambda: machine(RBM, 3, 4),
    "GaussianRBM": lambda: machine(GaussianRBM, 2, 3),
    "DBM": lambda: machine(DBM, 4, (3, 2)),
    "GaussianDBM": lambda: machine(GaussianDBM, 2, (3, 2)),
}
BINARY = ["RBM", "RBM, more latents", "DBM"]


def data_for(model: BoltzmannMachine, n: int = 7) -> Tensor:
    v = normal(n, model.visible_dim, seed=9)
    return v if model.visible_range is None else (v > 0).double()


def gradient(learner: EBLVM, loss: Tensor) -> dict[str, Tensor]:
    variables = learner.variables("upper")
    grads = torch.autograd.grad(loss, list(variables.values()))
    return dict(zip(variables, grads, strict=True))


def loss_of(learner: EBLVM, batch: object) -> Tensor:
    return learner.upper_loss(batch)[0]


def joint_states(model: BoltzmannMachine) -> tuple[Tensor, Tensor, Tensor]:
    """All (v, h) of a binary machine and their probabilities."""
    v, h = bits(model.visible_dim), bits(sum(model.latent_dims))
    rows, columns = v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)
    with torch.no_grad():
        return rows, columns, (-model(rows, columns)).softmax(0)


def draws(probabilities: Tensor, n: int, seed: int = 0) -> Tensor:
    """N indices drawn with the given probabilities."""
    return torch.multinomial(probabilities, n, replacement=True, generator=generator(seed))


def frequencies(rows: Tensor) -> Tensor:
    """How often each state of binary rows occurs."""
    numbers = (rows.long() * 2 ** torch.arange(rows.shape[1])).sum(1)
    return torch.bincount(numbers, minlength=2 ** rows.shape[1]) / len(rows)


def assert_distributed(rows: Tensor, probabilities: Tensor) -> None:
    """Frequencies within 4.5 standard errors of the probabilities, each of them."""
    error = (probabilities * (1 - probabilities) / len(rows)).sqrt()
    assert bool(((frequencies(rows) - probabilities).abs() < 4.5 * error + 1e-9).all())


# ---------------------------------------------------------------------- VAE of images


def small_vae(**options: object) -> VAE:
    return VAE.for_images((1, 8, 8), latent_dim=3, width=4, **options)


# ---------------------------------------------------------------------- use


def rows(n: int = 60) -> Tensor:
    return (normal(n, 6, seed=2) > 0.3).double()
