"""Maximum likelihood by enumeration: its gradient, and what it fits."""

import pytest
import torch

from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.models import RBM
from tests.methods.small_models import (
    BINARY,
    EXACT,
    MACHINES,
    bits,
    data_for,
    draws,
    frequencies,
    gradient,
    joint_states,
    loss_of,
    machine,
)


@pytest.mark.parametrize("name", BINARY)
def test_likelihood_gradient_is_model_moments_minus_data_moments(name: str) -> None:
    """Assertion 6: dNLL/dW = E_p[v h^T] - E_data,p(h|v)[v h^T], and so for every parameter."""
    model = MACHINES[name]()
    learner = MaximumLikelihood(model)
    data = data_for(model)
    found = gradient(learner, loss_of(learner, data))
    v, h, joint = joint_states(model)
    posterior = joint.view(2**model.visible_dim, -1)
    posterior = posterior / posterior.sum(1, keepdim=True)
    numbers = (data.long() * 2 ** torch.arange(model.visible_dim)).sum(1)
    observed = torch.zeros(len(posterior), dtype=torch.float64)
    observed.index_add_(0, numbers, torch.full((len(data),), 1 / len(data), dtype=torch.float64))
    change = joint - (observed[:, None] * posterior).flatten()  # model minus data
    layers = (v, *h.split(model.latent_dims, dim=1))
    weights = [name for name in found if "weight" in name]
    for name_, below, above in zip(weights, layers, layers[1:], strict=False):
        moments = torch.einsum("s,si,sj->ij", change, below, above)
        torch.testing.assert_close(found[name_], moments, **EXACT)
    biases = ["model.visible_bias", *(n for n in found if "latent_bias" in n)]
    for name_, layer in zip(biases, layers, strict=True):
        torch.testing.assert_close(found[name_], change @ layer, **EXACT)


@pytest.mark.parametrize("name", MACHINES)
def test_likelihood_gradient_by_finite_differences(name: str) -> None:
    learner = MaximumLikelihood(MACHINES[name]())
    data = data_for(learner.model)
    found = gradient(learner, loss_of(learner, data))
    step = 1e-5
    for key, parameter in learner.variables("upper").items():
        flat = parameter.detach().view(-1)
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(-learner.model.log_likelihood(data).mean().item())
                flat[i] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            # central differences: rounding 1e-16 / 1e-5 and curvature (1e-5)^2
            assert found[key].view(-1)[i].item() == pytest.approx(difference, abs=1e-8)


def test_maximum_likelihood_fits_a_distribution_within_reach() -> None:
    """Data of an RBM: the likelihood ends at the data's own entropy."""
    truth = machine(RBM, 4, 2, seed=3)
    with torch.no_grad():
        p = truth.log_likelihood(bits(4)).exp()
    data = bits(4)[draws(p, 4000)]
    observed = frequencies(data)
    learner = MaximumLikelihood(RBM(4, 4).double())
    learner.fit(data, num_steps=600, batch_size=4000, upper_lr=0.05)
    with torch.no_grad():
        reached = float(learner.model.log_likelihood(data).mean())
    assert reached == pytest.approx(-float(torch.special.entr(observed).sum()), abs=2e-3)
