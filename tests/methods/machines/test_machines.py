"""Boltzmann machines as users make them: recipes, initial values, and what is refused."""

import json
import math
from typing import Any

import pytest
import torch

from bilevel.methods.models import DBM, MAX_UNITS, RBM, GaussianDBM, GaussianRBM, from_recipe
from tests.devices import generator
from tests.methods.machines.cases import GAUSSIAN, MACHINES, visibles

# ---------------------------------------------------------------------- construction


@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_survives_json_and_builds_the_model_again(name: str):
    model = MACHINES[name]()
    again = from_recipe(json.loads(json.dumps(model.recipe)))
    assert type(again) is type(model)
    assert again.recipe == model.recipe
    assert (again.visible_dim, again.latent_dims) == (model.visible_dim, model.latent_dims)
    for key, value in again.state_dict().items():
        assert value.equal(model.state_dict()[key])


def test_a_recipe_keeps_the_options():
    assert RBM(3, 2).binary
    assert not from_recipe(RBM(3, 2, grey=True).recipe).binary
    assert not from_recipe(DBM(3, (2, 2), grey=True).recipe).binary
    for model in (GaussianRBM(3, 2, learn_scale=False), GaussianDBM(3, (2, 2), learn_scale=False)):
        again: Any = from_recipe(model.recipe)
        assert not again.log_scale.requires_grad
        assert "log_scale" in again.state_dict()
        assert not again.binary


@pytest.mark.parametrize("name", MACHINES)
def test_a_model_starts_the_same_every_time_or_as_its_generator_says(name: str):
    kind, recipe = type(MACHINES[name]()), dict(MACHINES[name]().recipe)
    recipe.pop("kind")
    torch.manual_seed(int(torch.randint(1000, ())))
    first, second, other, same = (
        kind(**recipe, generator=g) for g in (None, None, generator(1), generator(1))
    )
    for key, value in first.state_dict().items():
        assert value.equal(second.state_dict()[key])
        assert other.state_dict()[key].equal(same.state_dict()[key])
        if "weight" in key:
            assert not value.equal(other.state_dict()[key])


def test_models_start_as_the_papers_do():
    model: Any = RBM(64, 50)
    bound = 4 * math.sqrt(6 / (64 + 50))
    assert 0.99 * bound < float(model.weight.abs().max().detach()) <= bound
    assert not model.visible_bias.any()
    assert not model.latent_bias.any()
    model = GaussianRBM(20, 100)
    for p in (model.weight, model.visible_bias, model.latent_bias):
        assert 0.08 < float(p.abs().max().detach()) <= 0.1
    assert not model.log_scale.any()
    model = DBM(64, (50, 30))
    bound = 4 * math.sqrt(6 / (50 + 30))
    assert 0.99 * bound < float(model.weight2.abs().max().detach()) <= bound


def test_visibles_say_what_they_are():
    assert RBM(3, 2).visible_range == DBM(3, (2, 2)).visible_range == (0.0, 1.0)
    assert GaussianRBM(3, 2).visible_range is GaussianDBM(3, (2, 2)).visible_range is None


# ---------------------------------------------------------------------- refusals


def test_enumerable_is_whether_the_cheaper_side_is_small():
    over = MAX_UNITS + 1
    assert RBM(784, MAX_UNITS).enumerable
    assert RBM(MAX_UNITS, 784).enumerable
    assert DBM(10, (500, MAX_UNITS - 10)).enumerable
    assert DBM(500, (MAX_UNITS, 500)).enumerable
    assert not RBM(over, over).enumerable
    assert not DBM(10, (500, MAX_UNITS - 9)).enumerable
    assert not GaussianRBM(2, over).enumerable
    assert not GaussianDBM(2, (over, 2)).enumerable


@pytest.mark.parametrize("make", [lambda: RBM(30, 26), lambda: GaussianRBM(2, 26)])
def test_a_partition_function_too_large_to_enumerate_names_the_alternative(make: Any):
    with pytest.raises(ValueError, match=r"26 binary units.*annealed_importance_sampling"):
        make().log_partition()


def test_a_free_energy_too_large_to_enumerate_names_the_alternative():
    with pytest.raises(ValueError, match=r"26 units.*variational posterior"):
        DBM(4, (26, 2)).free_energy(torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["DBM", "GaussianDBM"])
def test_two_layers_have_no_posterior_logits(name: str):
    model = MACHINES[name]()
    with pytest.raises(NotImplementedError, match=rf"`{name}`.*variational posterior"):
        model.posterior_logits(visibles(model).float())


@pytest.mark.parametrize("name", MACHINES)
def test_wrong_widths_name_both(name: str):
    model = MACHINES[name]()
    d, first, whole = model.visible_dim, model.latent_dims[0], sum(model.latent_dims)
    v, wide_v = torch.zeros(3, d), torch.zeros(3, d + 1)
    wide_h1, draws = torch.zeros(3, first + 1), generator()
    for call in (model.free_energy, model.log_likelihood, lambda v: model.first_layer(v, draws)):
        for wrong in (wide_v, torch.zeros(d)):
            with pytest.raises(ValueError, match=rf"shape \(n, {d}\), got .*{wrong.shape[-1]}"):
                call(wrong)
    for call in (model.log_unnormalized_first, lambda h: model.gibbs(h, draws)):
        with pytest.raises(ValueError, match=rf"shape \(n, {first}\), got \(3, {first + 1}\)"):
            call(wide_h1)
    with pytest.raises(ValueError, match=rf"latents of shape .*got \(3, {whole + 1}\)"):
        model(v, torch.zeros(3, whole + 1))


@pytest.mark.parametrize("name", ["RBM", "GaussianDBM"])
def test_a_chain_has_at_least_one_step(name: str):
    model = MACHINES[name]()
    with pytest.raises(ValueError, match=r"`steps` must be at least 1, got 0"):
        model.gibbs(model.initial(2, generator()), generator(), steps=0)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_visibles_take_no_base_rate(name: str):
    model = MACHINES[name]()
    h1, base = model.initial(2, generator()), torch.zeros(2)
    for call in (
        lambda: model.log_partition_base(base),
        lambda: model.log_unnormalized_first(h1, 0.5, base),
        lambda: model.gibbs(h1, generator(), base=base),
    ):
        with pytest.raises(ValueError, match="leave `base` out"):
            call()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RBM(0, 3), ValueError, "`visible_dim` must be positive, got 0"),
        (lambda: RBM(3, -1), ValueError, "`latent_dim` must be positive, got -1"),
        (lambda: GaussianRBM(2.0, 3), TypeError, "`visible_dim` must be an integer, got 2.0"),
        (lambda: RBM(3, True), TypeError, "`latent_dim` must be an integer, got True"),
        (lambda: DBM(3, 4), ValueError, r"two hidden layers, \(n1, n2\), got 4"),
        (lambda: DBM(3, (4, 4, 4)), ValueError, "two hidden layers"),
        (lambda: GaussianDBM(3, (4, 0)), ValueError, r"`latent_dims\[1\]` must be positive"),
        (lambda: from_recipe({"kind": "SBM"}), ValueError, "kind 'SBM'; choose one of RBM"),
        (lambda: from_recipe({}), ValueError, "kind None"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        make()
