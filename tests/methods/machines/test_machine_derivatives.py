"""Derivatives of the exact sums of Boltzmann machines: moments, differences, third order, tracing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from tests.methods.machines.cases import (
    BINARY,
    EXACT,
    GAUSSIAN,
    MACHINES,
    by_definition,
    cube,
    likelihood_in_chunks,
    machine,
    normal,
    pairs,
    trained,
    visibles,
)


def binary_moments(model: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    v, h = pairs(cube(model.visible_dim), cube(sum(model.latent_dims)))
    p = (-by_definition(model, v, h)).softmax(0).detach()
    return {"visible_bias": p @ v}, p, v, h


@pytest.mark.parametrize("name", BINARY)
def test_gradient_of_log_partition_is_the_models_moments(name: str):
    """A6, the negative phase."""
    model = machine(name)
    moments, p, v, h = binary_moments(model)
    h1, h2 = h[:, : model.latent_dims[0]], h[:, model.latent_dims[0] :]
    if len(model.latent_dims) == 1:
        moments |= {"latent_bias": p @ h, "weight": torch.einsum("n,ni,nj->ij", p, v, h)}
    else:
        moments |= {"latent_bias1": p @ h1, "latent_bias2": p @ h2}
        moments |= {"weight1": torch.einsum("n,ni,nj->ij", p, v, h1)}
        moments |= {"weight2": torch.einsum("n,nj,nk->jk", p, h1, h2)}
    parameters = dict(model.named_parameters())
    grads = grad(model.log_partition(), list(parameters.values()))
    assert parameters.keys() == moments.keys()
    for key, actual in zip(parameters, grads, strict=True):
        torch.testing.assert_close(actual, moments[key], **EXACT)


def test_gradient_of_the_gaussian_log_partition_is_the_models_moments():
    model = machine("GaussianRBM")
    h = cube(4)
    p = model.log_unnormalized_first(h).softmax(0).detach()
    b, scale = model.visible_bias.detach(), model.log_scale.exp().detach()
    mean = model.visible_mean(h).detach()
    expected = {
        "weight": torch.einsum("n,ni,nj->ij", p, mean, h),
        "visible_bias": (p @ mean - b) / scale**2,
        "latent_bias": p @ h,
        "log_scale": 1 + p @ ((mean - b) / scale).square(),  # E[(v - b)^2 / s^2]
    }
    parameters = dict(model.named_parameters())
    grads = grad(model.log_partition(), list(parameters.values()))
    assert parameters.keys() == expected.keys()
    for key, actual in zip(parameters, grads, strict=True):
        torch.testing.assert_close(actual, expected[key], **EXACT)


def test_gradient_of_the_likelihood_is_positive_minus_negative_phase():
    """A6: d NLL / dW = E_model[v h^T] - E_data,posterior[v h^T]."""
    model, data = machine("RBM"), visibles(machine("RBM"), 11)
    _, p, v, h = binary_moments(model)
    negative = torch.einsum("n,ni,nj->ij", p, v, h)
    positive = data.mT @ model.posterior_logits(data).sigmoid() / len(data)
    (actual,) = grad(-model.log_likelihood(data).mean(), model.weight)
    torch.testing.assert_close(actual, (negative - positive).detach(), **EXACT)


@pytest.mark.parametrize("at_once", [None, 8])
@pytest.mark.parametrize("name", MACHINES)
def test_derivatives_agree_with_finite_differences(name: str, at_once: int | None):
    """Step 1e-5: truncation and rounding are both near 1e-10."""
    model = trained(MACHINES[name](), size=0.3)
    names, values = zip(*model.named_parameters(), strict=True)
    v = visibles(model, 3)

    def of(model: Any, v: Tensor) -> Tensor:
        if at_once is None:
            return model.log_likelihood(v)
        return likelihood_in_chunks(model, v, at_once)

    def log_likelihood(*values: Tensor) -> Tensor:
        module = _Call(model, of)
        named = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(module, named, (v,)).sum()

    inputs = tuple(p.detach().requires_grad_() for p in values)
    tolerances = {"eps": 1e-5, "atol": 1e-9, "rtol": 1e-9}
    assert gradcheck(log_likelihood, inputs, **tolerances)
    assert gradgradcheck(log_likelihood, inputs, **tolerances)


class _Call(nn.Module):
    """A function of a model as `forward`, for `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.model, *args)


def test_score_matching_differentiates_the_free_energy_three_times(device: str):
    """Score and Laplacian of log p(v) in closed form, and the gradient of their loss."""
    model = machine("GaussianRBM", device)
    v = visibles(model).requires_grad_()
    (score,) = grad(-model.free_energy(v).sum(), v, create_graph=True)
    laplacian = sum(
        grad(score[:, i].sum(), v, create_graph=True)[0][:, i] for i in range(model.visible_dim)
    )
    on = (model.latent_bias + v @ model.weight).sigmoid()
    precision = (-2 * model.log_scale).exp()
    closed_score = -(v - model.visible_bias) * precision + on @ model.weight.mT
    spread = (on * (1 - on)) @ model.weight.square().sum(0)
    closed_laplacian = spread - precision.sum()
    torch.testing.assert_close(score, closed_score, **EXACT)
    torch.testing.assert_close(laplacian, closed_laplacian, **EXACT)
    parameters = list(model.parameters())
    actual = grad((score.square().sum(1) / 2 + laplacian).mean(), parameters)
    closed = grad((closed_score.square().sum(1) / 2 + closed_laplacian).mean(), parameters)
    for a, c in zip(actual, closed, strict=True):
        torch.testing.assert_close(a, c, **EXACT)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_energy_can_be_differentiated_in_the_visible_and_then_in_the_parameters(name: str):
    """The gradient in v and its product with itself, as BiSM's upper loss has them."""
    model = machine(name)
    v, h = visibles(model).requires_grad_(), normal(7, sum(model.latent_dims)).sigmoid()

    def loss(energy: Tensor) -> Tensor:
        (slope,) = grad(energy.sum(), v, create_graph=True)
        (curved,) = grad((slope * slope.detach().sign()).sum(), v, create_graph=True)
        return slope.square().sum() + curved.square().sum()

    parameters = list(model.parameters())
    actual = grad(loss(model(v, h)), parameters, allow_unused=True, materialize_grads=True)
    expected = grad(
        loss(by_definition(model, v, h)), parameters, allow_unused=True, materialize_grads=True
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_losses_can_be_traced(name: str):
    model = machine(name)
    v, h = visibles(model), normal(7, sum(model.latent_dims)).sigmoid()

    def loss(parameters: dict[str, Tensor], v: Tensor, h: Tensor) -> Tensor:
        energy = torch.func.functional_call(model, parameters, (v, h))
        named = {f"model.{name}": value for name, value in parameters.items()}
        log_p = torch.func.functional_call(_Call(model, type(model).log_likelihood), named, (v,))
        return energy.sum() + log_p.sum()

    parameters = dict(model.named_parameters())
    traced = make_fx(torch.func.grad(loss))(parameters, v, h)(parameters, v, h)
    energy = model(v, h).sum() + model.log_likelihood(v).sum()
    for key, expected in zip(parameters, grad(energy, list(parameters.values())), strict=True):
        torch.testing.assert_close(traced[key], expected, **EXACT)
