"""The families made for a model: architectures, types, devices, and what is refused."""

import math

import pytest
import torch
from torch import nn

from bilevel.methods.models import DBM, RBM, GaussianDBM, GaussianRBM
from bilevel.methods.variational import BernoulliPosterior, HierarchicalJoint
from tests.devices import DEVICES
from tests.methods.variational.cases import NV, every, joint, net, posterior

# ---------------------------------------------------------------------- for a model


@pytest.mark.parametrize(
    ("model", "prior", "latent_dim", "hidden", "activation"),
    [
        (RBM(64, 50), "gaussian", 15, 25, nn.ReLU),
        (RBM(500, 200), "gaussian", 50, 100, nn.ReLU),
        (RBM(300, 100), "gaussian", 25, 50, nn.ReLU),
        (RBM(64, 15), "bernoulli", 10, 15, nn.ReLU),
        (DBM(64, (50, 50)), "gaussian", 15, 25, nn.Sigmoid),
    ],
)
def test_published_architectures(model, prior, latent_dim, hidden, activation) -> None:
    p = HierarchicalJoint.for_model(model, prior=prior)
    first, middle, last = p.networks[0]
    assert (first.in_features, first.out_features) == (latent_dim, hidden)
    assert isinstance(middle, activation)
    assert last.out_features == model.latent_dims[-1]
    assert p.networks[-1].out_features == model.visible_dim
    shapes = [layer.weight.shape for layer in p.auxiliary if isinstance(layer, nn.Linear)]
    heads = 2 if prior == "gaussian" else 1
    assert shapes == [(hidden, model.latent_dims[-1]), (heads * latent_dim, hidden)]
    assert isinstance(p.auxiliary[1], nn.Sigmoid)
    largest = 4 * math.sqrt(6 / (hidden + model.latent_dims[-1]))
    assert 0.9 * largest < p.auxiliary[0].weight.abs().max() <= largest
    assert all(not bias.any() for name, bias in p.named_parameters() if name.endswith("bias"))


def test_frey_faces_have_a_linear_sampler() -> None:
    p = HierarchicalJoint.for_model(GaussianRBM(560, 200))
    assert [layer.weight.shape for layer in p.networks] == [(200, 50), (2 * 560, 200)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "model",
    [RBM(6, 3), DBM(6, (4, 3)), GaussianRBM(6, 4), GaussianDBM(6, (4, 3))],
    ids=["RBM", "DBM", "GaussianRBM", "GaussianDBM"],
)
def test_families_follow_their_model(model, dtype, device) -> None:
    model = model.to(device, dtype)
    before = torch.get_rng_state()
    q = BernoulliPosterior.for_model(model)
    generator = torch.Generator(device).manual_seed(0)
    for prior in ("gaussian", "bernoulli"):
        p = HierarchicalJoint.for_model(model, prior=prior)
        hard = p.hard(5, generator)
        draws = p.draws(p.noise(5, generator, hard.visible))
        up = q.draws(hard.visible, q.noise(5, generator, hard.visible))
        bound = p.bound(hard.visible, hard.latent, p.code_noise(5, generator, hard.visible))
        results = [*hard, *draws, *up, bound, q.hard(hard.visible, generator)]
        assert model(draws.visible, up.latent).shape == (5,)
        for result in results:
            assert result.dtype == dtype
            assert result.device.type == device
            assert result.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())
    again = HierarchicalJoint.for_model(model)
    first, second = (HierarchicalJoint.for_model(model).state_dict(), again.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature) -> None:
    for make in (posterior, joint):
        with pytest.raises(ValueError, match="`temperature` must be positive"):
            make(temperature=temperature)


def test_log_prob_that_cannot_be_enumerated_says_what_to_use() -> None:
    for q in (joint(prior="gaussian"), joint(bits=16)):
        with pytest.raises(NotImplementedError, match=r"use `bound\(v, h, noise\)`"):
            q.log_prob(every(NV)[:1], every(2)[:1])


def test_networks_and_widths_must_match() -> None:
    with pytest.raises(ValueError, match="one width per network, got 1 networks"):
        BernoulliPosterior([net(NV, 2, 0)], (2, 2))
    with pytest.raises(ValueError, match="one module per hidden layer"):
        HierarchicalJoint(
            [net(2, 2, 0)], net(2, 4, 1), visible_dim=3, latent_dims=(2,), latent_dim=2
        )
    with pytest.raises(ValueError, match="prior"):
        joint(prior="cauchy")
