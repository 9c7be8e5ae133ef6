"""Settings of a fit, the best model it keeps, and what is saved and loaded again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.methods import EBLVM, RBM, AdvIL, BiDVL, ContrastiveDivergence
from bilevel.methods.training.best import higher_is_better, read_criterion
from tests.small_learners import MODELS, NAN, WIDTH, bits, pictures, rng

# ---------------------------------------------------------------------- the best model


def counted(name: str, values: list[float]) -> Callable[[EBLVM], dict[str, float]]:
    left = iter(values)
    return lambda _: {name: next(left)}


def kept(folder: Path, name: str, values: list[float], **settings: Any) -> int:
    """The step of the best model of three evaluations, one a step."""
    learner = ContrastiveDivergence(RBM(WIDTH, 3))
    learner.fit(
        bits(),
        num_steps=3,
        batch_size=4,
        run=folder,
        evaluate=counted(name, values),
        evaluate_every=1,
        **settings,
    )
    return int(json.loads((folder / "best" / "best.json").read_text())["step"])


@pytest.mark.parametrize(
    ("name", "settings", "step"),
    [
        ("log_likelihood", {}, 2),
        ("test_nll", {}, 3),
        ("log_likelihood", {"best": "lowest log_likelihood"}, 3),
        ("temperature", {"best": "highest temperature"}, 2),
    ],
)
def test_the_best_model_is_kept_by_any_number(
    name: str, settings: dict[str, Any], step: int, tmp_path: Path
) -> None:
    """It was kept only if the number was called `frechet` or `rmse`."""
    assert kept(tmp_path / "run", name, [2.0, 3.0, 1.0], **settings) == step


def test_a_number_nobody_knows_is_remarked(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="best='highest temperature'"), pytest.raises(OSError):
        kept(tmp_path / "run", "temperature", [2.0, 3.0, 1.0])
    learner = ContrastiveDivergence(RBM(WIDTH, 3))
    common: dict[str, Any] = {"num_steps": 1, "batch_size": 4, "evaluate_every": 1}
    for settings, words in (
        ({"best": "temperature", "run": tmp_path / "a"}, "'highest temperature' or 'lowest"),
        ({"best": "rmse"}, "give `run`"),
        ({"best": "acuracy_", "run": tmp_path / "c"}, "'highest acuracy_'"),
        ({"best": "accuracy", "run": tmp_path / "b"}, "did you mean `acuracy`"),
    ):
        told = {"evaluate": counted("acuracy", [1.0]), **common, **settings}
        with pytest.raises(ValueError, match=words):
            learner.fit(bits(), **told)


def test_which_values_are_good_is_read_off_the_name() -> None:
    for name in ("auroc_shuffled", "accuracy", "val-accuracy", "Log_Likelihood", "recall"):
        assert higher_is_better(name) is True, name
    for name in ("frechet", "frechet_batch", "kid", "rmse_running", "val_loss", "neg_loglik", "kl"):
        assert higher_is_better(name) is False, name
    for name in ("seconds", "loss_ratio_recall", "temperature"):
        assert higher_is_better(name) is None, name
    assert str(read_criterion("lowest x")).startswith("lowest `x`")


# ---------------------------------------------------------------------- settings


def two_levels() -> AdvIL:
    return AdvIL(RBM(WIDTH, 3))


def one_level() -> ContrastiveDivergence:
    return ContrastiveDivergence(RBM(WIDTH, 3))


@pytest.mark.parametrize("make", [one_level, two_levels])
@pytest.mark.parametrize(
    "name", ["lr", "learning_rate", "weight_decay", "clip", "random_state", "n_iter", "lwer_lr"]
)
def test_a_setting_that_is_suggested_has_an_effect(make: Callable[[], EBLVM], name: str) -> None:
    """`weight_decay` of a method with one level was corrected to `lower_weight_decay`: no effect."""
    if name == "lwer_lr" and make is one_level:
        name = "uper_lr"
    settings: dict[str, Any] = {"num_steps": 3, "batch_size": 4, "upper_lr": 0.05}
    value: Any = 2 if name in ("random_state", "n_iter") else 1e-2
    with pytest.raises(ValueError, match="did you mean") as refusal:
        make().fit(bits(), **{**settings, name: value})
    hinted = str(refusal.value).split("`")[3::2]
    assert hinted
    plain = fitted(make, settings)
    for each in hinted:
        assert not equal(fitted(make, {**settings, each: value}), plain), each


def fitted(make: Callable[[], EBLVM], settings: dict[str, Any]) -> dict[str, Tensor]:
    model = make()
    model.fit(bits(), **settings)
    return model.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"lower_lr": 0.5},
        {"lower_steps": 7},
        {"lower_weight_decay": 10.0},
        {"clip_lower": 1.0},
        {"order": "upper_first"},
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` does nothing here"):
        one_level().fit(bits(), num_steps=1, batch_size=4, **settings)
    two_levels().fit(bits(), num_steps=1, batch_size=4, **settings)


def test_rates_beside_own_optimizers_are_refused() -> None:
    learner = one_level()
    own = torch.optim.SGD(learner.upper.parameters(), 0.1)
    with pytest.raises(ValueError, match="`upper_lr` does nothing beside `optimizers`"):
        learner.fit(bits(), num_steps=1, batch_size=4, optimizers=(own, []), upper_lr=0.3)
    learner.fit(bits(), num_steps=1, batch_size=4, optimizers=(own, []))


def test_epochs_and_strangers_are_answered_in_a_line() -> None:
    for name, words in (("num_epochs", "n // batch_size"), ("zzzz", "the most used are")):
        with pytest.raises(ValueError, match=words) as refusal:
            one_level().fit(bits(), **{name: 3})
        assert len(str(refusal.value)) < 200
        assert "lower_" not in str(refusal.value)


def test_weight_decay_of_the_upper_level_is_adams() -> None:
    learner, by_hand = one_level(), one_level()
    learner.fit(bits(), num_steps=5, batch_size=4, upper_weight_decay=0.3, upper_lr=0.01)
    parameters = list(by_hand.upper.parameters())
    adam = torch.optim.Adam(parameters, 0.01, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    by_hand.fit(bits(), num_steps=5, batch_size=4, optimizers=(adam, []))
    assert equal(learner.state_dict(), by_hand.state_dict())


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", ["cd", "bism", "vae", "bidvl"])
def test_a_loaded_model_is_the_saved_one(name: str, tmp_path: Path) -> None:
    """`load` gave float32 and training mode: what a loaded model decoded changed its later samples."""
    make, good = MODELS[name]
    model, v = make().double().eval(), good().double()
    model.save(tmp_path)
    again = type(model).load(tmp_path)
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert torch.equal(again.energy(v), model.energy(v))
    assert again.energy(v).dtype == torch.float64


@pytest.mark.parametrize("make", [MODELS["bidvl"][0], MODELS["vae of images"][0]])
def test_decoding_changes_nothing(make: Callable[[], Any], tmp_path: Path) -> None:
    made = make()
    made.fit(pictures(), num_steps=3, batch_size=4)
    made.save(tmp_path)
    for model in (made, type(made).load(tmp_path), make()):
        before = model.sample(4, rng())
        h = torch.randn(300, 2, generator=rng())
        decoded = model.decode(h)
        if isinstance(model, BiDVL) and not model.training:
            model.latent_model.generate(h)
            model.latent_model.encode(pictures())
        assert torch.equal(model.sample(4, rng()), before)
        assert torch.equal(model.decode(h), decoded)
        torch.testing.assert_close(model.decode(h[:5]), decoded[:5], rtol=1e-4, atol=1e-5)
    for bad, words in ((torch.randn(3, 5), r"\(n, 2\)"), (torch.full((2, 2), NAN), "NaN")):
        with pytest.raises(ValueError, match=words):
            made.decode(bad)


@pytest.mark.parametrize("damage", [b"xx", b"", None])
def test_damaged_weights_are_one_sentence(damage: bytes | None, tmp_path: Path) -> None:
    model = one_level()
    model.save(tmp_path)
    file = tmp_path / "weights.safetensors"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises((ValueError, FileNotFoundError), match=r"weights"):
        ContrastiveDivergence.load(tmp_path)
