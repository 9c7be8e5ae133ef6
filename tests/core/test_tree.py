"""Laws of tree arithmetic and of `Layout`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel.tree import Layout, add, dot, norm

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64])
few = settings(max_examples=40, deadline=None)


@st.composite
def tensors(draw: st.DrawFn, dtype: st.SearchStrategy[torch.dtype] = DTYPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return [torch.randn(s, generator=generator, dtype=draw(dtype)) for s in draw(SHAPES)]


def tree(parts: list[Tensor]) -> dict[str, Tensor]:
    return {f"v{i}": t for i, t in enumerate(parts)}


@few
@given(tensors())
def test_unravel_inverts_ravel(parts: list[Tensor]) -> None:
    layout = Layout(parts)
    vector = layout.ravel(parts)
    assert vector.shape == (layout.size,)
    back = layout.unravel(vector)
    assert [t.dtype for t in back] == [t.dtype for t in parts]
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


@few
@given(tensors())
def test_mixed_dtypes_share_the_promoted_one(parts: list[Tensor]) -> None:
    wanted = max((t.dtype for t in parts), key=lambda d: d.itemsize)
    assert Layout(parts).ravel(parts).dtype == wanted


@few
@given(tensors(st.just(torch.float64)), st.integers(0, 1000))
def test_unravel_is_the_adjoint_of_ravel(parts: list[Tensor], seed: int) -> None:
    """<ravel(a), v> = <a, unravel(v)>, by value and by automatic differentiation."""
    layout = Layout(parts)
    v = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pieces = layout.unravel(v)
    left = torch.dot(layout.ravel(parts), v)
    right = sum((a * b).sum() for a, b in zip(parts, pieces, strict=True))
    torch.testing.assert_close(left, torch.as_tensor(right), rtol=0, atol=1e-12)
    leaves = [t.requires_grad_() for t in parts]
    grads = torch.autograd.grad(torch.dot(layout.ravel(leaves), v), leaves)
    assert all(torch.equal(g, b) for g, b in zip(grads, pieces, strict=True))


@few
@given(tensors(st.just(torch.float64)), st.floats(-3, 3))
def test_arithmetic_is_that_of_the_vector(parts: list[Tensor], scale: float) -> None:
    layout, a = Layout(parts), tree(parts)
    b = {name: t.cos() for name, t in a.items()}
    va, vb = layout.ravel(parts), layout.ravel(list(b.values()))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(dot(a, b), va @ vb, **close)
    torch.testing.assert_close(norm(a), va.norm(), **close)
    torch.testing.assert_close(norm(parts), va.norm(), **close)
    sums = add(a, b, scale)
    torch.testing.assert_close(layout.ravel(list(sums.values())), va + scale * vb, **close)


def test_norm_of_nothing_and_of_two_dtypes() -> None:
    assert norm({}) == 0
    mixed = norm([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    torch.testing.assert_close(mixed, torch.tensor(2.0).double(), rtol=1e-6, atol=0)  # float32


def test_nan_stays_nan() -> None:
    bad = {"a": torch.tensor([1.0, float("nan")])}
    assert norm(bad).isnan()
    assert dot(bad, bad).isnan()


def test_different_names_are_named() -> None:
    with pytest.raises(ValueError, match="`b` is in one of them only"):
        add({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="several devices"):
        Layout([torch.ones(1), torch.ones(1, device="meta")])
