"""Enumeration in chunks: the same numbers, less memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.methods.models import (
    DBM,
    RBM,
    GaussianDBM,
    enumeration,
)
from tests.methods.machines.cases import EXACT, trained, visibles


@pytest.mark.parametrize(
    "make", [lambda: RBM(9, 6), lambda: DBM(5, (6, 3)), lambda: GaussianDBM(2, (6, 3))]
)
def test_chunks_change_neither_values_nor_gradients(
    make: Any, device: str, monkeypatch: pytest.MonkeyPatch
):
    model = trained(make(), device)
    v = visibles(model)
    parameters = list(model.parameters())

    def derivatives() -> list[Tensor]:
        value = model.log_likelihood(v).sum()
        first = grad(value, parameters, create_graph=True)
        second = grad(sum(g.sin().sum() for g in first), parameters)
        with torch.no_grad():
            return [value, model.log_likelihood(v), *first, *second]

    whole = derivatives()
    # sums over the states in another order; a GPU's own order costs some bits of second derivatives
    bound = EXACT if device == "cpu" else {"rtol": 1e-11, "atol": 1e-11}
    for chunk in (1, 40, 300):  # one state at a time, and several
        monkeypatch.setattr(enumeration, "CHUNK", chunk)
        for a, b in zip(derivatives(), whole, strict=True):
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


@pytest.mark.parametrize("quantity", ["log_partition", "free_energy"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_chunks_bound_the_memory(
    quantity: str, differentiate: bool, monkeypatch: pytest.MonkeyPatch
):
    model = trained(DBM(32, (13, 12)))
    args = (visibles(model, 32),) if quantity == "free_energy" else ()

    def peak(chunk: int) -> int:
        monkeypatch.setattr(enumeration, "CHUNK", chunk)
        with torch.set_grad_enabled(differentiate), _Peak() as memory:
            value = getattr(model, quantity)(*args).sum()
            if differentiate:
                grad(value, list(model.parameters()), allow_unused=True)
        return memory.most

    whole, chunked = peak(2**20), peak(2**13)
    assert whole > 2**13 * 32 * 8  # all states at once, 32 wide
    assert chunked < 8 * 2**13 * 8 + 100_000  # a few tensors of a chunk, and the parameters'
    assert chunked < whole / 8
