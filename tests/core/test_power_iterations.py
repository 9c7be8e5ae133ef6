"""Power iterations rest while second derivatives are taken, whoever wrote them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bilevel.methods.networks.spectral_norm import normed
from bilevel.second_order import check_second_order, second_order_context
from tests.problems import old_spectral_norm


class Norm(nn.Module):
    """Somebody's own: one step of the power method on W^T W per forward pass in training mode."""

    v: Tensor
    n_power_iterations = 1

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("v", torch.ones(size))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                v = weight.mT @ (weight @ self.v)
                self.v.copy_(v / v.norm())
        return weight / (weight @ self.v).norm()


def own(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Norm(layer.in_features))


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torch's": parametrizations.spectral_norm,
    "torch's older hook": old_spectral_norm,
    "that of the methods": normed,
    "somebody's own": own,
}


def advanced(layer: nn.Module) -> bool:
    """Whether a forward pass moved the singular vectors."""
    before = [b.clone() for b in layer.buffers()]
    layer(torch.zeros(1, 3))
    return not all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated:FutureWarning")
def test_a_power_iteration_rests_while_second_derivatives_are_taken(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(3, 4)).train()
    assert advanced(layer)
    with second_order_context(layer):
        assert not advanced(layer)
    assert advanced(layer)
    (finding,) = check_second_order(layer)
    assert "u and v are constants" in str(finding)
    assert not finding.wrong


def test_what_does_not_iterate_is_not_reported() -> None:
    assert not check_second_order(nn.Linear(3, 4))
    vector = nn.LayerNorm(3)  # torch divides a vector by its own length, without an iteration
    assert not check_second_order(parametrizations.spectral_norm(vector))
