"""What users do with a BiDVL: fit, resume, save, evaluate; and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from bilevel.errors import CheckpointError, DivergenceError
from bilevel.methods import BiDVL
from bilevel.methods.networks.convolutional import Energy, Generator, Posterior
from tests.methods.test_bidvl import SHAPE, VARIANTS, images


def test_same_seed_same_run():
    def run():
        model = BiDVL.for_images(SHAPE, latent_dim=3, width=4, seed=1)
        model.fit(images(40).float(), num_steps=4, batch_size=20, seed=2)
        return model.state_dict()

    first, second = run(), run()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    "options", [*({"variant": variant} for variant in VARIANTS), {"family": "resnet"}]
)
def test_a_resumed_run_equals_the_uninterrupted_one(options, tmp_path):
    settings = {"batch_size": 20, "seed": 2, "checkpoint_every": 3, "log_every": 1}
    models = []
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for part, stop in enumerate(stops):
            model = BiDVL.for_images(SHAPE, latent_dim=3, width=4, **options)
            model.fit(
                images(50).float(),
                num_steps=6,
                run=tmp_path / name,
                resume=part > 0,
                callbacks=[lambda step, stop=stop: step.number == stop],
                **settings,
            )
        models.append(model.state_dict())
    assert all(models[0][name].equal(models[1][name]) for name in models[0])
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")
    ]
    assert len(lines[0]) == len(lines[1]) == 6


def test_save_and_load(tmp_path):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4, variant="complete", ratio=0.2)
    model.save(tmp_path / "model")
    again = BiDVL.load(tmp_path / "model")
    v = images().float()
    assert again.energy(v).equal(model.energy(v))
    assert again.reconstruct(v).equal(model.reconstruct(v))
    assert (again.ratio, again.variant) == (0.2, "complete")


def test_a_residual_model_is_saved_with_its_settings(tmp_path):
    model = BiDVL.for_images(SHAPE, family="resnet", latent_dim=3, width=4, seed=5)
    model.save(tmp_path)
    again = BiDVL.load(tmp_path)
    v = images().float()
    assert again.energy(v).equal(model.energy(v))
    assert again.reconstruct(v).equal(model.reconstruct(v))
    assert again.recipe == {**model.recipe, "shape": SHAPE}
    kept = (again.upper_kind, again.latent_weight, again.ratio, again.fresh_latent)
    assert kept == ("hinge", 1e-4, 0.05, True)


@pytest.mark.parametrize("family", ["conv", "resnet"])
def test_mixed_precision_trains_float32_weights(family):
    model = BiDVL.for_images(SHAPE, family=family, latent_dim=3, width=4)
    history = model.fit(
        images(40).float(), num_steps=3, batch_size=20, precision="bfloat16", log_every=1
    )
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert len(history.records) == 3


@pytest.mark.parametrize("family", ["conv", "resnet"])
def test_convolutions_lie_channels_last(family):
    model = BiDVL.for_images(SHAPE, family=family, latent_dim=3, width=8)
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert model.latent_model.generate(torch.zeros(2, 3)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_load_asks_for_the_modules_it_cannot_build(tmp_path):
    def modules():
        return {
            "energy": nn.Sequential(nn.Flatten(), nn.Linear(64, 1)),
            "posterior": Posterior(SHAPE, 3, 4),
            "generator": Generator(SHAPE, 3, 4),
            "latent_dim": 3,
        }

    model = BiDVL(**modules())
    model.save(tmp_path)
    with pytest.raises(ValueError, match="made of your own modules"):
        BiDVL.load(tmp_path)
    v = images().float()
    assert BiDVL.load(tmp_path, **modules()).energy(v).equal(model.energy(v))


def test_batch_norm_policy_is_explicit_and_leaves_no_trace():
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)
    model.fit(images(40).float(), num_steps=3, batch_size=20)
    before = copy.deepcopy(model.state_dict())
    v = images().float()
    with model.evaluating("batch"):
        with_batch = model.latent_model.generate(torch.ones(4, 3) * torch.arange(4)[:, None])
    running = model.reconstruct(v)
    assert not with_batch.requires_grad
    torch.testing.assert_close(running[:2], model.reconstruct(v[:2]), rtol=1e-5, atol=1e-6)
    model.statistics = "batch"
    assert not torch.allclose(model.reconstruct(v)[:2], model.reconstruct(v[:2]), atol=1e-4)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (torch.zeros(10, 1, 9, 8), ValueError, r"shape \(n, 1, 8, 8\), got \(10, 1, 9, 8\)"),
        (torch.zeros(0, 1, 8, 8), ValueError, "there are no visibles"),
        (torch.zeros(10, 1, 8, 8, dtype=torch.int32), TypeError, "127.5"),
        (torch.full((10, 1, 8, 8), 2.0), ValueError, r"\[-1, 1\], got values from 2 to 2"),
        (
            torch.tensor(float("nan")).expand(10, 1, 8, 8),
            ValueError,
            r"index 0, 1, 2, 3, 4, \.\.\.",
        ),
        ("digits", TypeError, "must be a tensor"),
        (torch.zeros(3, 1, 8, 8), ValueError, "`batch_size` is 100, but there are only 3"),
    ],
)
def test_bad_data_are_refused_before_anything_is_written(data, error, words, tmp_path):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)
    with pytest.raises(error, match=words):
        model.fit(data, num_steps=1, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "ofset"}, "did you mean `offset`"),
        ({"ratio_bias": "sigmod"}, "did you mean `sigmoid`"),
        ({"statistics": "batches"}, "did you mean `batch`"),
        ({"ratio": -1.0}, "`ratio` must be zero or more"),
        ({"family": "resnets"}, "did you mean `resnet`"),
        ({"family": "resnet", "width": 0}, "`width` must be positive"),
    ],
)
def test_unknown_options_name_the_nearest(options, words):
    with pytest.raises(ValueError, match=words):
        BiDVL.for_images(SHAPE, **options)


def test_unknown_settings_name_the_nearest():
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)
    with pytest.raises(ValueError, match="no setting `num_step`; did you mean `num_steps`"):
        model.fit(images().float(), num_step=3)
    with pytest.raises(ValueError, match=r"`upper_lr`.*greater than 0, got -1"):
        model.fit(images().float(), upper_lr=-1)


def test_a_run_is_never_overwritten_unasked(tmp_path):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)
    data, settings = images(20).float(), {"num_steps": 1, "batch_size": 10}
    model.fit(data, run=tmp_path, **settings)
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(FileExistsError, match="already holds a run"):
        model.fit(data, run=tmp_path, **settings)
    assert (tmp_path / "config.json").read_text() == config
    model.fit(data, run=tmp_path, overwrite=True, **settings)


def test_divergence_stops_names_the_term_and_keeps_the_good_checkpoint(tmp_path):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)

    def poison(step):
        if step.number == 3:
            with torch.no_grad():
                next(model.upper["energy"].parameters()).fill_(float("nan"))

    with pytest.raises(DivergenceError, match="step 4: `energy_data` is nan"):
        model.fit(
            images(20).float(),
            num_steps=30,
            batch_size=10,
            run=tmp_path,
            checkpoint_every=1,
            callbacks=[poison],
        )
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert checkpoint["step"] == 2
    assert all(t.isfinite().all() for t in checkpoint["problem"].values())


def test_a_run_that_ends_in_nan_is_not_saved_as_a_model(tmp_path):
    model = BiDVL.for_images(SHAPE, latent_dim=3, width=4)

    def poison(step):
        if step.number == 3:
            with torch.no_grad():
                next(model.upper["energy"].parameters()).fill_(float("nan"))

    settings = {"num_steps": 3, "batch_size": 10, "checkpoint_every": 1, "callbacks": [poison]}
    with pytest.raises(CheckpointError, match="NaN or infinite numbers after step 3"):
        model.fit(images(20).float(), run=tmp_path, **settings)
    assert not (tmp_path / "model").exists()
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["step"] == 2


def test_the_dimension_of_the_latent_is_found_from_the_posterior():
    model = BiDVL(Energy(SHAPE, 4), Posterior(SHAPE, 3, 4), Generator(SHAPE, 3, 4))
    with pytest.raises(ValueError, match="not known before the model has seen data"):
        model.sample(2)
    model.fit(images().float(), num_steps=1, batch_size=2)
    assert model.latent_dim == 3
    assert model.latent_weight == pytest.approx(1 / 3)
    assert model.sample(2).shape == (2, *SHAPE)


def test_modules_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="the generator maps 3 latents to visibles of shape"):
        BiDVL(
            Energy(SHAPE, 4), Posterior(SHAPE, 3, 4), Generator((1, 16, 16), 3, 4), latent_dim=3
        ).fit(images().float(), batch_size=2)
    with pytest.raises(ValueError, match="the posterior must give a mean and a log-variance"):
        BiDVL(Energy(SHAPE, 4), Posterior(SHAPE, 4, 4), Generator(SHAPE, 3, 4), latent_dim=3).fit(
            images().float(), batch_size=2
        )
