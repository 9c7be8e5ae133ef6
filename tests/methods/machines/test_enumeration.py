"""Enumeration in chunks: the same numbers, less memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.methods.machines.enumeration import CHUNK, log_sum_over_states
from bilevel.methods.models import DBM, RBM, GaussianDBM
from tests.methods.machines.cases import EXACT, likelihood_in_chunks, trained, visibles


@pytest.mark.parametrize(
    "make", [lambda: RBM(9, 6), lambda: DBM(5, (4, 2)), lambda: GaussianDBM(2, (4, 2))]
)
def test_chunks_change_neither_values_nor_gradients(make: Any, device: str):
    model = trained(make(), device)
    v = visibles(model)
    parameters = list(model.parameters())

    def derivatives(at_once: int) -> list[Tensor]:
        value = likelihood_in_chunks(model, v, at_once).sum()
        first = grad(value, parameters, create_graph=True)
        second = grad(sum(g.sin().sum() for g in first), parameters)
        with torch.no_grad():
            return [value, likelihood_in_chunks(model, v, at_once), *first, *second]

    whole = derivatives(64)
    torch.testing.assert_close(whole[1], model.log_likelihood(v), **EXACT)
    # sums over the states in another order; a GPU's own order costs some bits of second derivatives
    bound = EXACT if device == "cpu" else {"rtol": 1e-11, "atol": 1e-11}
    for at_once in (1, 4, 16):  # of 64 states, or of the 16 of a first layer
        for a, b in zip(derivatives(at_once), whole, strict=True):
            torch.testing.assert_close(a, b, **bound)


class _Peak(TorchDispatchMode):
    """The most bytes alive at once among tensors that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                size = tensor.numel() * tensor.element_size()
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(tensor, self.free, size)
        return result

    def free(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("differentiate", [False, True])
def test_chunks_bound_the_memory(differentiate: bool):
    model = trained(DBM(32, (13, 12)))

    def peak(chunk: int) -> int:
        with torch.set_grad_enabled(differentiate), _Peak() as memory:
            first = model.log_unnormalized_first
            value = log_sum_over_states(first, 13, 32, model.visible_bias, chunk=chunk)
            if differentiate:
                grad(value, list(model.parameters()), allow_unused=True)
        return memory.most

    whole, chunked = peak(2**20), peak(2**13)
    assert whole > 2**13 * 32 * 8  # all states at once, 32 wide
    assert chunked < 8 * 2**13 * 8 + 100_000  # a few tensors of a chunk, and the parameters'
    assert chunked < whole / 8


@torch.no_grad()
@pytest.mark.parametrize("quantity", ["log_partition", "free_energy"])
def test_machines_are_enumerated_in_chunks(quantity: str):
    """A machine says how wide its states are; 2^21 of them at once would be 32 wide, 8 bytes each."""
    model = trained(DBM(32, (21, 20)))
    args = (visibles(model, 32),) if quantity == "free_energy" else ()
    with _Peak() as memory:
        getattr(model, quantity)(*args)
    assert memory.most < 8 * CHUNK * 8 <= 2**21 * 32 * 8 / 2
