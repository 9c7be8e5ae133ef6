"""Models and their inputs: what once gave a wrong number without a word, or advice that did not help."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel.methods import (
    EBLVM,
    RBM,
    VAE,
    BiDVL,
    ContrastiveDivergence,
    GaussianRBM,
    GeneralBiDVL,
    ScoreMatching,
)
from bilevel.methods.data.images import load_images
from bilevel.methods.data.visibles import as_tensor
from bilevel.methods.likelihood import log_likelihood
from bilevel.methods.variational import TabularEnergy, TabularJoint, TabularPosterior
from bilevel.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from tests.small_learners import INF, MODELS, NAN, SHAPE, WIDTH, bits, normals, pictures, rng


def machine_of(model: EBLVM) -> Any:
    try:
        return getattr(model, "model", None)
    except NotImplementedError:
        return None


def calls(model: EBLVM) -> dict[str, Callable[[Any], Any]]:
    """Everything public that takes visibles and gives numbers; what is refused by name is left out."""
    found: dict[str, Callable[[Any], Any]] = {
        "check": model.check,
        "energy": model.energy,
        "posterior": lambda v: model.posterior(v).mean,
        "reconstruct": model.reconstruct,
        "fit": lambda v: model.fit(v, num_steps=1, batch_size=4),
    }
    if isinstance(model, VAE):
        found["log_likelihood"] = lambda v: model.log_likelihood(v, 3, rng())
    elif machine_of(model) is not None:
        machine = machine_of(model)
        found["machine"] = machine.log_likelihood
        found["mean"] = lambda v: log_likelihood(machine, v)
    if isinstance(model, ScoreMatching) and machine_of(model) is None:  # it has no latent
        del found["posterior"], found["reconstruct"]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_no_call_takes_what_is_no_visible(name: str) -> None:
    """Every public call that takes visibles says so of NaN, of values out of range, of other shapes."""
    make, good = MODELS[name]
    model, v = make(), good()
    nan, inf = v.clone(), v.clone()
    nan[2].view(-1)[1], inf[5].view(-1)[0] = NAN, INF
    bad = {
        "NaN": (nan, ValueError, r"1 of 8 visibles hold NaN or infinity \(index 2\)"),
        "infinity": (inf, ValueError, r"1 of 8 visibles hold NaN or infinity \(index 5\)"),
        "too wide": (torch.cat([v, v], -1), ValueError, "takes visibles of shape"),
        "none": (v[:0], ValueError, "there are no visibles"),
        "complex": (v.to(torch.complex64), TypeError, "real numbers"),
        "text": ("rows.csv", TypeError, "must be a tensor"),
    }
    if model.visible_range is not None:
        bad["sevens"] = (torch.full_like(v, 7), ValueError, "takes visibles")
    if model.binary:
        bad["greys"] = (torch.rand(v.shape, generator=rng()), ValueError, "exactly 0 or 1")
    for call, function in calls(model).items():
        for kind, (rows, error, words) in bad.items():
            print(call, kind)  # shown if it fails
            with pytest.raises(error, match=words):
                function(rows)


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_does_not_depend_on_how_visibles_are_held(name: str) -> None:
    """float64, arrays and lists give what float32 tensors give; whole numbers 0 and 1 where they fit."""
    make, good = MODELS[name]
    model, v = make().eval(), good()
    same: list[Any] = [v.double(), v.numpy(), v.numpy()[::-1].copy()[::-1], v.tolist()]
    if model.visible_range == (0, 1):
        same += [v.bool(), v.long(), v.byte(), v.numpy().astype(bool), v.to_sparse()]
    for call, function in calls(model).items():
        if call == "fit":
            continue
        truth = function(v)
        for rows in same:
            assert torch.equal(torch.as_tensor(function(rows)), torch.as_tensor(truth)), call


def test_many_visibles_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """`energy`, `posterior` and `reconstruct` of the general form hold 500 rows at a time, not all."""
    for name in ("general bidvl", "advil", "bism of images", "general bidvl of a dbm"):
        make, good = MODELS[name]
        model = make().eval()
        v = good(1100) if good is not pictures else pictures(600)  # type: ignore[call-arg]
        seen = [0]

        def watched(self: nn.Linear, x: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(x))
            return nn.functional.linear(x, self.weight, self.bias)

        monkeypatch.setattr(nn.Linear, "forward", watched)
        mean = model.posterior(v).mean
        whole = torch.cat([model.posterior(part).mean for part in v.split(450)])
        monkeypatch.undo()
        assert max(seen) <= 500
        torch.testing.assert_close(mean, whole, rtol=1e-5, atol=1e-6)  # another order of sums


def test_an_energy_that_is_a_table_takes_numbers_of_its_rows() -> None:
    """A row that is not there gave an `IndexError` of torch, or a number counted from the end."""
    zeros = torch.zeros(4, 3)
    model = GeneralBiDVL(TabularEnergy(zeros), TabularPosterior(zeros), TabularJoint(zeros))
    assert model.energy(torch.tensor([0, 3])).tolist() == pytest.approx([-math.log(3)] * 2)
    for rows, error in (
        (torch.tensor([-1]), ValueError),
        (torch.tensor([4]), ValueError),
        (torch.tensor([0.5]), TypeError),
        (torch.tensor([[0]]), TypeError),
    ):
        for call in (model.energy, model.posterior):
            with pytest.raises(error, match="whole numbers from 0 to 3"):
                call(rows)


# ---------------------------------------------------------------------- advice that works


MISTAKES: dict[str, tuple[Callable[[], EBLVM], Any]] = {
    "bytes for a binary machine": (MODELS["cd"][0], (bits() * 255).byte()),
    "bytes for a grey machine": (MODELS["cd of a grey rbm"][0], (bits() * 255).byte()),
    "counts for a binary machine": (MODELS["cd"][0], (bits() * 3).long()),
    "an array of counts": (MODELS["cd"][0], (bits() * 3).long().numpy()),
    "spins": (MODELS["advil"][0], bits() * 2 - 1),
    "spins as whole numbers": (MODELS["advil"][0], (bits() * 2 - 1).long()),
    "greys": (MODELS["cd"][0], torch.rand(8, WIDTH, generator=rng())),
    "images in [0, 255] as floats": (MODELS["cd of a grey rbm"][0], bits() * 255),
    "images in [0, 255] for a deep model": (MODELS["bidvl"][0], (pictures() + 1) * 127.5),
    "wide images as whole numbers": (MODELS["bidvl"][0], ((pictures() + 1) * 127.5).int()),
    "levels 0..16": (MODELS["bidvl"][0], torch.randint(0, 17, (8, *SHAPE), generator=rng())),
    "truth values": (MODELS["bidvl"][0], pictures() > 0),
    "images for a machine": (MODELS["cd"][0], bits().view(8, 2, 3)),
    "one visible": (MODELS["cd"][0], bits()[0]),
    "two tensors": (MODELS["cd"][0], (bits(), torch.zeros(8))),
    "masked values": (MODELS["cd"][0], np.ma.masked_less(bits().numpy(), 1).filled),
    "complex numbers": (MODELS["cd"][0], bits().to(torch.complex64)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_doing_as_told_works(name: str) -> None:
    """Bytes for a binary machine were told to become [-1, 1], which the machine then refused."""
    make, data = MISTAKES[name]
    if name == "masked values":
        data = np.ma.masked_less(bits().numpy(), 1)
    model = make()
    with pytest.raises((TypeError, ValueError)) as refusal:
        model.fit(data, num_steps=1, batch_size=4)
    said = str(refusal.value)
    advice = [part for part in said.split("`")[1::2] if part.startswith(("rows", "data", "torch."))]
    assert advice, said
    mended = eval(
        advice[-1], {"rows": data, "data": data, "torch": torch, "len": len, "value": 0.0}
    )
    if name == "one visible":
        model.energy(mended)  # one row fills no batch
    else:
        model.fit(mended, num_steps=1, batch_size=4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([[0.0, 1.0], [1.0]], "differ in length"),
        (np.array([["a", "b"]]), "no number"),
        (np.array([[1, None]], dtype=object), "no number"),
        (load_images, "must be a tensor"),
        ({"rows": bits()}, "the entry that holds the visibles"),
        (Path("rows.npz"), "load_table"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    ],
)
def test_what_is_no_table_is_refused_in_a_sentence(data: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        ContrastiveDivergence(RBM(WIDTH, 3)).fit(data, num_steps=1)


def test_a_data_set_of_the_library_is_told_its_part() -> None:
    """`fit` takes its training part; elsewhere there are two that could be meant."""
    with pytest.raises(TypeError, match=r"`data\.train`"):
        BiDVL.for_images(SHAPE, latent_dim=2, width=4).energy(load_images("digits"))
    for data in (DataLoader(TensorDataset(bits()), 4), TensorDataset(bits())):
        with pytest.raises(TypeError, match=r"`torch\.stack\(\[row\[0\] for row in data"):
            ContrastiveDivergence(RBM(WIDTH, 3)).energy(data)


def test_other_containers_are_taken_as_they_are() -> None:
    """Sparse matrices, data frames and arrays of any byte order and width were refused or misread."""
    rows = bits()
    array = rows.numpy()

    class Frame:
        def to_numpy(self) -> Any:
            return array

    for data in (
        scipy.sparse.csr_matrix(array),
        Frame(),
        array.astype(">f8"),
        array.astype(np.uint16),
        array.astype(np.longdouble),
        list(rows),
        rows.to_sparse(),
        rows.clone().requires_grad_(),
    ):
        assert torch.equal(as_tensor(data).float(), rows)
        ContrastiveDivergence(RBM(WIDTH, 3)).fit(data, num_steps=1, batch_size=4)


def test_a_number_without_room_in_single_precision_is_named() -> None:
    """1e300 became infinite on its way into a float32 model."""
    v = normals().double()
    v[3, 0] = 1e300
    with pytest.raises(ValueError, match=r"1 of 8 visibles .* as float32, .* \(index 3\)"):
        ContrastiveDivergence(GaussianRBM(WIDTH, 3)).fit(v, num_steps=1)


def test_a_likelihood_keeps_its_graph_and_takes_transforms() -> None:
    """Looking at the values must not cut the visibles off from what they were made of."""
    machine = GaussianRBM(WIDTH, 3)
    v = normals().requires_grad_()
    (slope,) = torch.autograd.grad(machine.log_likelihood(v).sum(), v)
    (truth,) = torch.autograd.grad(-machine.free_energy(v).sum(), v)
    assert torch.equal(slope, truth)
    rows = torch.func.vmap(lambda x: machine.log_likelihood(x[None])[0])(v.detach())
    torch.testing.assert_close(rows, machine.log_likelihood(v), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- batch norm of any kind


class OwnNorm(nn.BatchNorm1d):
    """A batch norm of somebody else."""


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        OwnNorm(4),
        SyncBatchNorm(4),
        nn.LazyBatchNorm1d(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_statistics_of_the_batch_reach_every_batch_norm(norm: nn.Module) -> None:
    """`statistics="batch"` skipped `SyncBatchNorm`, which a run on several devices puts everywhere."""
    body = nn.Sequential(nn.Linear(2, 4), norm, nn.Linear(4, WIDTH))
    body(torch.randn(5, 2))
    posterior = _Moments()
    model = BiDVL(nn.Linear(WIDTH, 1), posterior, body, latent_dim=2, visible_shape=(WIDTH,))
    model.eval()
    h = torch.randn(6, 2, generator=rng()) * 3 + 5
    with model.evaluating("batch"):
        found = model.latent_model.generate(h)
    hidden = body[0](h)
    centred = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found, body[2](centred).detach(), rtol=1e-4, atol=1e-5)


def test_a_synchronised_model_is_evaluated_like_a_plain_one() -> None:
    model = BiDVL.for_images(SHAPE, latent_dim=2, width=4, statistics="batch")
    before = model.reconstruct(pictures())
    synchronise_batch_norm(model)
    assert torch.equal(model.reconstruct(pictures()), before)


class _Moments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 4)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.both(v).chunk(2, dim=1)
        return mean, log_variance
