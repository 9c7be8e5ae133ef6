"""Scores, differentiable energies and chains of trained models: closed form, differences, automatic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel.methods import (
    EBLVM,
    RBM,
    AdvIL,
    BiDVL,
    ContrastiveDivergence,
    GaussianDBM,
    GaussianRBM,
    MaximumLikelihood,
    ScoreMatching,
    VaGES,
)
from bilevel.methods.samplers import HamiltonianMonteCarlo, Langevin

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
CHAINS = Langevin(3, 0.01), Langevin(3, 0.01, metropolis=True), HamiltonianMonteCarlo(2, 0.1, 2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def machine(kind: Any, *sizes: Any) -> Any:
    made = kind(*sizes).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(1)) / 2)
    return made


def rows(n: int = 7, width: int = 5) -> Tensor:
    return torch.randn(n, width, generator=rng(2)).double()


def differences(energy: Any, v: Tensor, size: float = 1e-4) -> Tensor:
    """The gradient of every row by central differences of fourth order."""
    with torch.no_grad():
        found = []
        for e in torch.eye(v[0].numel()).double().view(-1, *v.shape[1:]):
            one, two = ((energy(v + k * size * e) - energy(v - k * size * e)) for k in (1, 2))
            found.append((8 * one - two) / (12 * size))
    return torch.stack(found, 1).view_as(v)


def automatic(energy: Any, v: Tensor) -> Tensor:
    leaf = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    return slope


class Well(nn.Module):
    """Somebody's energy, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, v: Tensor) -> Tensor:
        energies: Tensor = self.layers(v).flatten() + v.square().sum(1)
        return energies


def well() -> EBLVM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ScoreMatching(Well()).double()


def pictures() -> EBLVM:
    return BiDVL.for_images((1, 8, 8), latent_dim=2, width=2).double()


# ---------------------------------------------------------------------- score


@pytest.mark.parametrize("learner", [AdvIL, VaGES, ScoreMatching, MaximumLikelihood])
def test_score_of_a_gaussian_rbm_is_its_closed_form(learner: Any) -> None:
    rbm, v = machine(GaussianRBM, 5, 4), rows()
    made = learner(rbm)
    units = torch.sigmoid(rbm.latent_bias + v @ rbm.weight)
    closed = -(v - rbm.visible_bias) / (2 * rbm.log_scale).exp() + units @ rbm.weight.T
    found = made.score(v)
    torch.testing.assert_close(found, closed.detach(), **TIGHT)
    torch.testing.assert_close(found, -automatic(rbm.free_energy, v), **TIGHT)
    torch.testing.assert_close(found, -differences(made.energy, v), **TIGHT)
    assert not found.requires_grad


def test_score_of_a_gaussian_dbm_is_a_mean_over_its_states() -> None:
    dbm, v = machine(GaussianDBM, 5, (3, 2)), rows()
    h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 5)
    with torch.no_grad():
        weight = torch.stack([-dbm(v, one.expand(len(v), -1)) for one in h], 1).softmax(1)
        pull = h[:, :3] @ dbm.weight1.T
        closed = -(v - dbm.visible_bias) / (2 * dbm.log_scale).exp() + weight @ pull
    torch.testing.assert_close(MaximumLikelihood(dbm).score(v), closed, **TIGHT)


def test_score_of_networks_is_their_slope() -> None:
    """Of images, and of modules with batch norm, whose running statistics count."""
    made = pictures()
    v = torch.rand(3, 1, 8, 8, generator=rng()).double() - 0.5
    torch.testing.assert_close(made.score(v), -automatic(made.eval().upper["energy"], v))
    made, v = well(), rows()
    made.fit(v, num_steps=3, batch_size=7)
    made.train()
    before = {name: b.clone() for name, b in made.named_buffers()}
    found = made.score(v)
    torch.testing.assert_close(found, -differences(made.energy, v), **TIGHT)
    torch.testing.assert_close(torch.cat([made.score(row[None]) for row in v]), found, **TIGHT)
    assert made.training
    assert all(torch.equal(b, before[name]) for name, b in made.named_buffers())
    assert all(p.grad is None for p in made.parameters())
    made.float()
    assert made.score(v).dtype == torch.float32
    torch.testing.assert_close(made.score(v), found.float(), rtol=1e-3, atol=1e-3)
    assert made.score(v.tolist()).shape == v.shape


def test_bits_have_no_score() -> None:
    made, v = ContrastiveDivergence(RBM(5, 3)), torch.zeros(2, 5)
    with pytest.raises(NotImplementedError, match="those of this `ContrastiveDivergence` are bits"):
        made.score(v)
    grey = ContrastiveDivergence(RBM(5, 3, grey=True))
    with pytest.raises(NotImplementedError, match="`Langevin` needs a density over real visibles"):
        grey.sample(2, sampler=Langevin())
    with pytest.raises(ValueError, match=r"shape \(n, 5\)"):
        made.score(torch.zeros(2, 4))


# ---------------------------------------------------------------------- energies with gradients


def test_energy_has_gradients_where_they_are_asked_for() -> None:
    made, v = well().train(), rows().requires_grad_()
    assert not made.energy(v).requires_grad
    energies = made.energy(v, grad=True)
    assert torch.equal(energies.detach(), made.energy(v))
    (slope,) = torch.autograd.grad(energies.sum(), v, create_graph=True)
    torch.testing.assert_close(-slope.detach(), made.score(v))
    (second,) = torch.autograd.grad(slope.square().sum(), v)
    assert second.abs().max() > 0
    of_parameters = made.energy(v.tolist(), grad=True).mean()
    grads = torch.autograd.grad(of_parameters, list(made.parameters()))
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)
    assert made.training
    with pytest.raises(ValueError, match="7 of 7 visibles hold NaN"):
        made.energy(v * torch.nan, grad=True)
    with pytest.raises(TypeError, match="`grad` must be `True` or `False`"):
        made.energy(v, grad=v)


def test_the_energy_function_is_a_module_for_other_samplers() -> None:
    made = pictures()
    energy, far = made.energy_function, torch.full((2, 1, 8, 8), 3.0).double()
    assert isinstance(energy, nn.Module)
    assert {id(p) for p in energy.parameters()} == {id(p) for p in made.parameters()}
    with pytest.raises(ValueError, match="this model takes visibles in"):
        made.energy(far)
    assert energy(far).shape == (2,)
    assert energy(far).requires_grad
    with torch.no_grad():
        assert not energy(far).requires_grad


# ---------------------------------------------------------------------- chains


@pytest.mark.parametrize("sampler", CHAINS, ids=repr)
def test_chains_of_a_model_are_those_of_its_energy(sampler: Any) -> None:
    made = well()
    v = rows(3)
    found = made.sample(5, rng(1), sampler=sampler, start=v)
    whole = v[torch.tensor([0, 1, 2, 0, 1])]
    assert torch.equal(found, sampler.run(made.energy_function, whole, rng(1)).visible)


def test_chains_begin_anywhere() -> None:
    """At visibles, noise, the model's own draws; images stay where images lie."""
    still = Langevin(1, 1e-12, temperature=0.0)
    made = pictures()
    own = made.sample(4, rng(3))
    torch.testing.assert_close(made.sample(4, rng(3), sampler=still), own)
    torch.testing.assert_close(made.sample(4, rng(3), sampler=still, start="model"), own)
    noise = made.sample(500, rng(3), sampler=still, start="noise")
    assert noise.min() >= -1
    assert noise.max() <= 1
    assert noise.var().item() == pytest.approx(1 / 3, rel=0.05)
    moved = made.sample(4, rng(3), sampler=Langevin(20, 0.5), start="noise")
    assert moved.min() >= -1
    assert moved.max() <= 1
    plain = well()
    with pytest.raises(NotImplementedError, match=r"`visible_shape`.* or give visibles as `start`"):
        plain.sample(4, sampler=still)
    plain.visible_shape = (5,)
    assert plain.sample(2000, rng(), sampler=still).var().item() == pytest.approx(1, rel=0.1)
    rbm = ContrastiveDivergence(machine(GaussianRBM, 5, 3))
    exact = rbm.sample(4, rng(5), start="exact")
    torch.testing.assert_close(rbm.sample(4, rng(5), start="exact", sampler=still), exact)


def test_the_shape_of_the_first_data_is_kept_and_saved(tmp_path: Path) -> None:
    still, made = Langevin(1, 1e-12, temperature=0.0), ScoreMatching(Well(), objective="exact")
    made.double().langevin = (1, 0, 0)
    with pytest.warns(
        RuntimeWarning, match=r"bias`, so it never moves. That is no harm to a bias that cancels"
    ) as seen:
        made.fit(rows(), num_steps=1, batch_size=7)
    assert "solver=" not in str(seen[0].message)  # none but the default fits a single level
    assert made.visible_shape == (5,)
    made.save(tmp_path)
    loaded = ScoreMatching.load(tmp_path, model=Well())
    for model in (made, loaded):
        assert model.sample(3, rng(), sampler=still, start="noise").shape == (3, 5)
        assert model.sample(3, rng()).shape == (3, 5)
    about = json.loads((tmp_path / "model.json").read_text())
    assert (about["recipe"], about["visible_shape"]) == (None, [5])
    chosen = ScoreMatching(Well(), objective="exact").double()
    chosen.visible_shape = (1, 5)
    with pytest.raises(ValueError, match=r"takes visibles of shape \(n, 1, 5\)"):
        chosen.fit(rows(), num_steps=1, batch_size=7)
    for arguments, message in (
        ({}, r"`ScoreMatching.load\(folder, model=...\)`"),
        ({"energy": Well()}, "`ScoreMatching` has no argument `energy`; choose one of `model`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ScoreMatching.load(tmp_path, **arguments)
    with pytest.raises(TypeError, match=r"takes `folder` by position, the others by name"):
        ScoreMatching.load(tmp_path, Well())  # type: ignore[call-arg]


def test_chains_of_a_machine_are_of_its_distribution() -> None:
    """Its moments are known: a mixture of Gaussians with the probabilities of the hidden states."""
    rbm, n = machine(GaussianRBM, 2, 2), 4000
    with torch.no_grad():
        h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 2)
        share = rbm.log_unnormalized_first(h).softmax(0)
        mean = share @ rbm.visible_mean(h)
    made = MaximumLikelihood(rbm)
    sampler = HamiltonianMonteCarlo(15, 0.5, 4)
    v = made.sample(n, rng(1), sampler=sampler, start=torch.zeros(1, 2).double())
    assert bool(((v.mean(0) - mean).abs() < 4 * v.std(0) / n**0.5).all())


def test_what_is_no_sampler_or_no_start_is_refused() -> None:
    made = well()
    made.visible_shape = (5,)
    with pytest.raises(TypeError, match="such as `Langevin"):
        made.sample(2, sampler="langevin")
    with pytest.raises(TypeError, match="such as `Langevin"):
        made.sample(2, sampler=Langevin)
    with pytest.raises(ValueError, match="did you mean"):
        made.sample(2, sampler=Langevin(), start="nois")
    with pytest.raises(ValueError, match="`sweeps` are of the Gibbs chains"):
        made.sample(2, sampler=Langevin(), sweeps=3)
    with pytest.raises(ValueError, match="give a `sampler` such as `Langevin"):
        made.sample(2, start=rows())
    with pytest.raises(ValueError, match="is for the Gibbs chains of a Boltzmann machine"):
        made.sample(2, start="coins", sampler=Langevin())
