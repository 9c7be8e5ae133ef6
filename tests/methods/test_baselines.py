"""What all single-level baselines share: a run, a file, purity, tracing, refusals."""

from collections.abc import Callable

import pytest
import torch

from bilevel.methods.contrastive_divergence import ContrastiveDivergence
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.maximum_likelihood import MaximumLikelihood
from bilevel.methods.models import DBM, RBM, GaussianDBM, GaussianRBM
from bilevel.methods.noise_contrastive import NoiseContrastive
from bilevel.methods.vae import VAE
from tests.methods.small_models import loss_of, rows, small_vae
from tests.problems import generator

# ---------------------------------------------------------------------- use


LEARNERS: dict[str, Callable[[], EBLVM]] = {
    "CD": lambda: ContrastiveDivergence(RBM(6, 3), steps=2),
    "PCD": lambda: ContrastiveDivergence(RBM(6, 3), persistent=True, num_chains=30),
    "PCD, two layers": lambda: ContrastiveDivergence(DBM(6, (3, 2)), persistent=True),
    "ML": lambda: MaximumLikelihood(GaussianRBM(6, 3)),
    "NCE": lambda: NoiseContrastive(RBM(6, 3), ratio=2),
    "NCE, Gaussian": lambda: NoiseContrastive(GaussianRBM(6, 3)),
    "VAE": lambda: VAE.for_table(6, 2, hidden=[8]),
    "VAE, Gaussian": lambda: VAE.for_table(6, 2, hidden=[8], visible="gaussian"),
}
SETTINGS = {"num_steps": 4, "batch_size": 20, "seed": 1}


@pytest.mark.parametrize("name", LEARNERS)
def test_fit_save_load(name: str, tmp_path) -> None:
    learner = LEARNERS[name]().double()
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    history = learner.fit(rows(), **SETTINGS)
    assert history.steps == 4
    after = learner.state_dict()
    variables = set(learner.variables("upper"))
    moved = {key for key in variables if not after[f"upper.{key}"].equal(before[f"upper.{key}"])}
    assert moved == variables
    learner.save(tmp_path)
    again = type(learner).load(tmp_path).double()
    assert after.keys() == again.state_dict().keys()
    assert all(value.float().equal(again.state_dict()[key].float()) for key, value in after.items())
    v = rows(5)
    assert learner.energy(v).shape == (5,)
    torch.testing.assert_close(again.energy(v), learner.energy(v), rtol=1e-5, atol=1e-5)
    assert learner.sample(3, generator()).shape == (3, 6)
    if name != "PCD, two layers":
        assert learner.posterior(v).sample().shape[0] == 5
        assert learner.reconstruct(v).shape == (5, 6)


@pytest.mark.parametrize("name", LEARNERS)
def test_losses_are_pure_and_same_seed_is_same_run(name: str) -> None:
    runs = []
    for _ in range(2):
        learner = LEARNERS[name]()
        learner.fit(rows().float(), **SETTINGS)
        runs.append(learner.state_dict())
    assert all(runs[0][key].equal(runs[1][key]) for key in runs[0])
    batch = learner.draw(rows().float(), generator())
    assert loss_of(learner, batch).equal(loss_of(learner, batch))
    with pytest.raises(NotImplementedError, match="single level"):
        learner.lower_loss(batch)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("name", LEARNERS)
def test_traced_run_equals_the_eager_one(name: str) -> None:
    runs = []
    for compiled in (False, True):
        learner = LEARNERS[name]().double()
        learner.fit(rows(), compile=compiled, **SETTINGS)
        runs.append(learner.state_dict())
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_train_on_a_gpu(name: str) -> None:
    learner = LEARNERS[name]().to("cuda")
    learner.fit(rows().float(), **SETTINGS)
    assert learner.energy(rows(5).float()).device.type == "cuda"
    assert all(buffer.device.type == "cuda" for buffer in learner.buffers())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ContrastiveDivergence(RBM(4, 3), steps=0), ValueError, "`steps` must be positive"),
        (lambda: ContrastiveDivergence(RBM(4, 3), steps=1.5), TypeError, "`steps` must be an int"),
        (
            lambda: ContrastiveDivergence(RBM(4, 3), persistent=True, num_chains=0),
            ValueError,
            "`num_chains` must be positive, got 0",
        ),
        (
            lambda: ContrastiveDivergence(RBM(4, 3), num_chains=10),
            ValueError,
            "`num_chains` is for `persistent=True`",
        ),
        (
            lambda: MaximumLikelihood(RBM(64, 50)),
            ValueError,
            r"log Z of this `RBM` \(64 visibles, latents \(50,\)\).*`ContrastiveDivergence",
        ),
        (
            lambda: MaximumLikelihood(DBM(4, (30, 2))),
            ValueError,
            "free energy, and that of this `DBM` is a sum over the 30 units.*`ContrastiveDivergence",
        ),
        (lambda: NoiseContrastive(RBM(4, 3), ratio=0), ValueError, "`ratio` must be positive"),
        (lambda: NoiseContrastive(RBM(4, 3), ratio=0.5), TypeError, "`ratio` must be an integer"),
        (
            lambda: NoiseContrastive(GaussianDBM(4, (30, 2))),
            ValueError,
            "`NoiseContrastive` needs the free energy.*this `GaussianDBM`.*`ContrastiveDivergence",
        ),
        (lambda: VAE.for_table(4, 0), ValueError, "`latent_dim` must be positive"),
        (lambda: VAE.for_table(4, 2, hidden=[8, 0]), ValueError, r"`hidden\[1\]` must be positive"),
        (lambda: VAE.for_table(4, 2, visible="gausian"), ValueError, "did you mean `gaussian`"),
        (
            lambda: VAE.for_table(4, 2, visible="gaussian", grey=True),
            ValueError,
            "`grey` is for Bernoulli visibles",
        ),
        (lambda: small_vae(statistics="bach"), ValueError, "did you mean `batch`"),
        (lambda: VAE.for_images((1, 8, 6)), ValueError, "square images"),
        (
            lambda: VAE.for_table(4, 2).log_likelihood(torch.ones(3, 4), num_samples=0),
            ValueError,
            "`num_samples` must be positive",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_data_the_model_cannot_take_are_refused() -> None:
    grey = torch.full((60, 6), 0.5)
    for name in ("CD", "NCE", "VAE"):
        with pytest.raises(ValueError, match=r"exactly 0 or 1.*grey=True"):
            LEARNERS[name]().fit(grey, num_steps=1, batch_size=20)
    VAE.for_table(6, 2, grey=True).fit(grey, num_steps=1, batch_size=20)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        LEARNERS["PCD"]().fit(3 * grey, num_steps=1, batch_size=20)
