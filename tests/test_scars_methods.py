"""Models and their inputs: what once gave a wrong number without a word, or advice that did not help."""

import json
import math
import warnings
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
    DBM,
    EBLVM,
    RBM,
    VAE,
    AdvIL,
    BiDVL,
    BiSM,
    ContrastiveDivergence,
    GaussianDBM,
    GaussianRBM,
    GeneralBiDVL,
    MaximumLikelihood,
    NoiseContrastive,
    ScoreMatching,
    VaGES,
)
from bilevel.methods.data.images import Images, load_images
from bilevel.methods.data.visibles import as_tensor
from bilevel.methods.evaluation.evaluate import evaluate, ood_auroc, pca_rmse, reconstruction_rmse
from bilevel.methods.evaluation.features import principal_components
from bilevel.methods.evaluation.fidelity import fid, frechet_distance, kid, neighbourhoods
from bilevel.methods.likelihood import (
    Bracket,
    LogPartition,
    annealed_importance_sampling,
    bracket,
    exact_samples,
    gibbs_samples,
    linear_schedule,
    log_likelihood,
    sampler_lower_bound,
    variational_lower_bound,
)
from bilevel.methods.training.best import higher_is_better, read_criterion
from bilevel.methods.variational import TabularEnergy, TabularJoint, TabularPosterior
from bilevel.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm

SHAPE, WIDTH, QUICK = (1, 8, 8), 6, (1, 1, 1)
NAN, INF = float("nan"), float("inf")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(n: int = 8, width: int = WIDTH) -> Tensor:
    return torch.bernoulli(torch.full((n, width), 0.4), generator=rng())


def normals(n: int = 8, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=rng())


def pictures(n: int = 8) -> Tensor:
    return torch.rand(n, *SHAPE, generator=rng()) * 2 - 1


MODELS: dict[str, tuple[Callable[[], EBLVM], Callable[[], Tensor]]] = {
    "cd": (lambda: ContrastiveDivergence(RBM(WIDTH, 3)), bits),
    "cd of a dbm": (lambda: ContrastiveDivergence(DBM(WIDTH, (3, 2))), bits),
    "cd of a grey rbm": (lambda: ContrastiveDivergence(RBM(WIDTH, 3, grey=True)), bits),
    "cd of real visibles": (lambda: ContrastiveDivergence(GaussianRBM(WIDTH, 3)), normals),
    "maximum likelihood": (lambda: MaximumLikelihood(GaussianDBM(WIDTH, (3, 2))), normals),
    "nce": (lambda: NoiseContrastive(RBM(WIDTH, 3)), bits),
    "advil": (lambda: AdvIL(RBM(WIDTH, 3)), bits),
    "advil of a dbm": (lambda: AdvIL(DBM(WIDTH, (3, 2))), bits),
    "general bidvl": (lambda: GeneralBiDVL.for_model(RBM(WIDTH, 3)), bits),
    "general bidvl of a dbm": (lambda: GeneralBiDVL.for_model(DBM(WIDTH, (3, 2))), bits),
    "general bidvl of reals": (lambda: GeneralBiDVL.for_model(GaussianRBM(WIDTH, 3)), normals),
    "bism": (lambda: BiSM(GaussianRBM(WIDTH, 3)), normals),
    "vages": (lambda: VaGES(GaussianRBM(WIDTH, 3)), normals),
    "score matching": (lambda: ScoreMatching(GaussianRBM(WIDTH, 3)), normals),
    "vae": (lambda: VAE.for_table(WIDTH, 2, hidden=[4]), bits),
    "vae of reals": (lambda: VAE.for_table(WIDTH, 2, hidden=[4], visible="gaussian"), normals),
    "bidvl": (lambda: BiDVL.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "vae of images": (lambda: VAE.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "advil of images": (lambda: AdvIL.for_images(SHAPE, latent_dim=2, width=4), pictures),
    "bism of images": (
        lambda: BiSM.for_images(SHAPE, latent_dim=2, width=2, langevin=QUICK),
        pictures,
    ),
    "score matching of images": (
        lambda: ScoreMatching.for_images(SHAPE, width=2, langevin=QUICK),
        pictures,
    ),
}


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
    "a loader": (MODELS["cd"][0], DataLoader(TensorDataset(bits()), 4)),
    "a loader of rows": (MODELS["cd"][0], DataLoader(bits(), 4)),  # type: ignore[arg-type]
    "a data set": (MODELS["cd"][0], TensorDataset(bits())),
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
    with pytest.raises(TypeError, match=r"`data\.train`"):
        BiDVL.for_images(SHAPE, latent_dim=2, width=4).fit(load_images("digits"), num_steps=1)


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


# ---------------------------------------------------------------------- metrics


def spoilt(value: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    rows[7, 2] = value
    return rows


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_no_metric_takes_features_that_are_no_numbers(value: float) -> None:
    """The FID of features with one NaN was 0.0, the best there is: `max(0.0, nan)` is 0.0."""
    good, bad = np.random.default_rng(1).normal(size=(60, 3)), spoilt(value)
    for metric in (fid, frechet_distance, kid, neighbourhoods):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=r"in 1 of 60 rows \(index 7\)"):
                metric(*pair)  # type: ignore[operator]


def test_features_too_large_to_be_squared_have_no_distance() -> None:
    rows = np.random.default_rng(0).normal(size=(10, 2)) * 1e160
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="too large"):
        frechet_distance(rows, rows * 2)


def images_of(v: Tensor) -> Images:
    return Images("made", "made", v, v.flip(0), None, None, "")


def test_an_evaluation_says_that_samples_are_no_numbers() -> None:
    """A model whose samples are NaN was told to have a perfect Fréchet distance."""
    images = images_of(pictures(60))
    model = BiDVL.for_images(SHAPE, latent_dim=2, width=4).eval()
    seen = principal_components(images)
    with torch.no_grad():
        for p in model.lower["generator"].parameters():
            p.mul_(1e20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few images for a covariance
        with pytest.raises(
            ValueError, match="the model's samples hold NaN or infinity in 20 of 20"
        ):
            evaluate(model, images, features=seen, samples=20)
    with pytest.raises(ValueError, match="the reconstructions hold NaN"):
        reconstruction_rmse(model, images.test)
    with torch.no_grad():
        next(model.upper["energy"].parameters()).fill_(NAN)
    with pytest.raises(ValueError, match="the energies hold NaN"):
        ood_auroc(model, images.test, images.train)
    broken = images.train.clone()
    broken[3, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="the training images hold NaN"):
        pca_rmse(broken, images.test, 2)
    with pytest.raises(ValueError, match="the images hold NaN"):
        seen(broken)


# ---------------------------------------------------------------------- likelihoods


def test_estimates_that_say_nothing_do_not_meet() -> None:
    """A bracket of infinite width was said to meet."""
    vague = LogPartition(torch.tensor([0.0] * 9 + [9.0]).double(), 10)
    assert vague.effective_sample_size < 2
    assert vague.degenerate
    found = Bracket(vague, LogPartition(-vague.log_weights, 10, reverse=True), exact=True)
    assert found.width == INF
    assert not found.meet
    even = LogPartition(torch.zeros(20).double(), 10)
    assert not even.degenerate
    assert Bracket(even, LogPartition(torch.zeros(20).double(), 10, reverse=True), exact=True).meet


def test_chains_without_weights_are_refused() -> None:
    """NaN among the weights of a machine became NaN for log Z, silently."""
    for weights in ([0.0, NAN], [INF, 0.0], [-INF, -INF]):
        with pytest.raises(ValueError, match=r"of 2 chains have weights"):
            LogPartition(torch.tensor(weights).double(), 10)
    assert LogPartition(torch.tensor([-INF, 0.0]).double(), 10).value == pytest.approx(-math.log(2))
    machine, v = RBM(WIDTH, 3), bits()
    with torch.no_grad():
        machine.weight[1, 1] = NAN
    settings: dict[str, Any] = {"temperatures": linear_schedule(5), "generator": rng()}
    with pytest.raises(ValueError, match="look for NaN"):
        annealed_importance_sampling(machine, num_chains=4, **settings)
    with pytest.raises(ValueError, match="look for NaN"):
        bracket(machine, num_chains=4, **settings)
    with pytest.raises(ValueError, match="look for NaN"):
        exact_samples(machine, 3, rng())
    with pytest.raises(ValueError, match="the log-likelihood is nan"):
        log_likelihood(machine, v)
    advil = AdvIL(machine)
    with pytest.raises(ValueError, match="the bound is nan"):
        variational_lower_bound(machine, advil.encoder, v, 0.0, generator=rng())
    with pytest.raises(ValueError, match=r"log-ratio .* is nan"):
        sampler_lower_bound(machine, advil.sampler, generator=rng(), num_samples=5)


def test_chains_start_at_visibles_of_the_machine_only() -> None:
    machine = RBM(WIDTH, 3)
    for rows in (torch.full((2, WIDTH), 7.0), torch.full((2, WIDTH), NAN)):
        with pytest.raises(ValueError, match="visibles"):
            gibbs_samples(machine, rows, 3, 2, rng())


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
