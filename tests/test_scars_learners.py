"""Learners: no default drops a term in silence, no noise serves twice, and nobody loses to coins."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Alternating, Batches, Cholesky, ConjugateGradient, Implicit, Unrolled, train
from bilevel.methods import RBM, AdvIL, BiDVL, BiSM, GaussianRBM, GeneralBiDVL, Training, VaGES
from bilevel.methods.catalogue import make_solver
from bilevel.methods.suite.config import MethodConfig
from bilevel.methods.suite.presets import METHOD_PRESETS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- BiSM on a machine


def bism(expectation: str) -> BiSM:
    """BiSM of a small machine in float64, away from its initial weights, q near its posterior."""
    model = GaussianRBM(2, 4).double()
    learner = BiSM(model, sigma=0.3, expectation=expectation)  # type: ignore[arg-type]
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(0.7 * torch.randn(p.shape, generator=generator(seed), dtype=p.dtype))
        logits = learner.encoder.networks[0]  # type: ignore[union-attr,index]
        logits.weight.copy_(model.weight.mT)
        logits.bias.copy_(model.latent_bias)
    return learner


def points(n: int = 12) -> Tensor:
    return torch.randn(n, 2, generator=generator(50), dtype=torch.float64)


def differences(loss: Any, bias: Tensor, step: float) -> Tensor:
    """Central differences of a loss in the hidden biases, by hand."""
    found = torch.zeros_like(bias)
    start = bias.detach().clone()
    for i in range(len(bias)):
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                bias.copy_(start)
                bias[i] += sign * step
            values.append(float(loss()))
        found[i] = (values[0] - values[1]) / (2 * step)
    with torch.no_grad():
        bias.copy_(start)
    return found


def test_bism_by_default_has_the_exact_gradient_in_the_hidden_biases() -> None:
    """Of the denoising Fisher divergence of the marginal, whose score is a closed form here.

    With the lower expectation in closed form and q at the posterior; `Alternating` gives 0.
    """
    learner = bism("exact")
    model, batch = learner.model, learner.draw(points(), generator())

    def fisher() -> Tensor:
        """Half the mean square of s(v~) + eps / sigma, s = -(v~ - b) / s^2 + W sigmoid(c + W^T v~)."""
        v, noise = batch.points.visible, (batch.points.visible - batch.data) / 0.3
        precision = (-2 * model.log_scale).exp()
        hidden = (model.latent_bias + v @ model.weight).sigmoid()
        score = -(v - model.visible_bias) * precision + hidden @ model.weight.mT
        return 0.5 * (score + noise / 0.3).square().sum(1).mean().detach()

    exact = differences(fisher, model.latent_bias, 1e-5)
    lower = [learner.draw_lower(batch, generator(7), 0)]
    solver = learner.default_solver()
    assert isinstance(solver, Implicit)
    found = solver.hypergradient(learner, batch, lower).grad["model.latent_bias"]
    assert float(exact.abs().min()) > 1e-3
    # 1e-4 of damping in a Hessian whose smallest eigenvalue is some 1e-2
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.norm()))
    undamped = Implicit(Cholesky()).hypergradient(learner, batch, lower)
    torch.testing.assert_close(undamped.grad["model.latent_bias"], exact, rtol=1e-6, atol=1e-8)
    dropped = Alternating().hypergradient(learner, batch, lower).grad["model.latent_bias"]
    assert float(dropped.abs().max()) == 0


def test_bism_by_default_unrolls_five_steps_of_adam_as_published() -> None:
    """The hidden biases' gradient is that of a loop of five steps and the loss after it, by hand."""
    learner = bism("sampled")
    batch = learner.draw(points(), generator())
    lower = [learner.draw_lower(batch, generator(7 + t), t) for t in range(5)]
    optimizer = torch.optim.Adam(learner.lower.parameters(), lr=0.05, betas=(0.9, 0.95))

    def step(net: Any, rule: torch.optim.Adam, at: Any) -> None:
        rule.zero_grad()
        net.lower_loss(at).backward(inputs=list(net.lower.parameters()))
        rule.step()

    step(learner, optimizer, learner.draw_lower(batch, generator(3), 0))  # a running state
    optimizer.zero_grad()
    weights, state = copy.deepcopy(learner.lower.state_dict()), optimizer.state_dict()

    def after_five() -> Tensor:
        learner.lower.load_state_dict(weights)
        again = torch.optim.Adam(learner.lower.parameters(), lr=0.05, betas=(0.9, 0.95))
        again.load_state_dict(copy.deepcopy(state))
        for at in lower:
            step(learner, again, at)
        return learner.upper_loss(batch).detach()

    expected = differences(after_five, learner.model.latent_bias, 1e-6)
    learner.lower.load_state_dict(weights)
    solver = learner.default_solver()
    assert isinstance(solver, Unrolled)
    answer = solver.hypergradient(learner, batch, lower, lower_optimizer=optimizer)
    found = answer.grad["model.latent_bias"]
    assert float(expected.abs().min()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("expectation", ["sampled", "exact"])
def test_bism_trains_hidden_biases_by_default_and_says_with_which_solver(
    tmp_path: Path, expectation: str
) -> None:
    """In `history.solver` and in the run's configuration, which the report shows."""
    learner = bism(expectation)
    before = learner.model.latent_bias.detach().clone()
    history = learner.fit(points(), num_steps=3, batch_size=12, run=tmp_path / "run")
    assert bool((learner.model.latent_bias != before).all())
    assert history.solver == learner.default_solver()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["solver"] == repr(history.solver)
    again = bism(expectation)
    dropped = again.fit(points(), num_steps=3, batch_size=12, solver=Alternating())
    assert torch.equal(again.model.latent_bias, before)
    assert isinstance(dropped.solver, Alternating)


def test_the_default_solver_is_the_papers_and_fits_the_model() -> None:
    """Deep energies of BiSM do not unroll, large exact lower levels are not factorised."""
    assert isinstance(
        BiSM.for_images((1, 8, 8), latent_dim=2, width=2).default_solver(), Alternating
    )
    large = BiSM(GaussianRBM(60, 10), expectation="exact").default_solver()
    assert isinstance(large, Implicit)
    assert isinstance(large.linear_solver, ConjugateGradient)
    assert isinstance(VaGES(GaussianRBM(2, 4)).default_solver(), Alternating)
    assert isinstance(AdvIL(RBM(4, 3)).default_solver(), Alternating)


@pytest.mark.parametrize("expectation", ["sampled", "exact"])
def test_a_suite_gives_bism_the_solver_that_fit_gives_it(expectation: str) -> None:
    """An entry without a solver is not silently the dropped term; the short name with 0 still is."""
    own = {"name": "mine", "method": "BiSM", "options": {"expectation": expectation}}
    entry = MethodConfig(**own)
    learner = BiSM(GaussianRBM(2, 4), expectation=expectation)  # type: ignore[arg-type]
    assert make_solver(entry.solver) == learner.default_solver()
    assert MethodConfig(**own, solver={"kind": "alternating"}).solver == {"kind": "alternating"}
    names = {name: make_solver(MethodConfig.model_validate(name).solver) for name in METHOD_PRESETS}
    assert all(isinstance(names[f"bism-{o}-0"], Alternating) for o in ("ssm", "dsm", "mdsm"))
    assert all(names[f"bism-{o}"] == Unrolled(5) for o in ("ssm", "dsm", "mdsm"))


# ---------------------------------------------------------------------- several lower steps


def images(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=generator(1)) * 2 - 1


def small_bidvl(**options: Any) -> BiDVL:
    return BiDVL.for_images((1, 8, 8), latent_dim=3, width=4, **options)


def spied(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The batches that the upper and the lower losses of `BiDVL` see from now on."""
    seen: dict[str, list[Any]] = {"upper_loss": [], "lower_loss": []}
    for name, batches in seen.items():
        original = getattr(BiDVL, name)

        def spy(self: BiDVL, batch: Any, original: Any = original, batches: Any = batches) -> Any:
            batches.append(batch)
            return original(self, batch)

        monkeypatch.setattr(BiDVL, name, spy)
    return seen["upper_loss"], seen["lower_loss"]


@pytest.mark.parametrize("fresh", [False, True])
def test_every_lower_step_of_bidvl_has_its_own_reparameterisation_noise(
    monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """The official code draws it in each of them, at the same images and the same h_hat.

    Where the lower level has an h_hat of its own (the residual scripts), that is new, too.
    """
    model = small_bidvl(fresh_latent=fresh)
    upper, lower = spied(monkeypatch)
    model.fit(images(), num_steps=2, batch_size=6, lower_steps=3)
    upper, lower = upper[2:], lower[2:]  # the rehearsal evaluates twice
    assert (len(upper), len(lower)) == (2, 6)
    for turn in range(2):
        steps = lower[3 * turn : 3 * turn + 3]
        for batch in steps:
            assert torch.equal(batch.visible, upper[turn].visible)
            assert torch.equal(batch.latent, upper[turn].latent)
        for name in ("noise", "cycle_noise", *(["fresh_latent"] if fresh else [])):
            drawn = torch.stack([getattr(batch, name) for batch in steps])
            assert torch.equal(drawn[0], getattr(upper[turn], name))
            assert len(drawn.flatten(1).unique(dim=0)) == 3
            assert 0.5 < float(drawn.std()) < 1.5


def test_one_lower_step_of_bidvl_takes_the_numbers_it_always_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit those of a model that hands the turn's batch to every lower step."""
    new, old = small_bidvl(), small_bidvl()
    new.fit(images(), num_steps=3, batch_size=6, lower_steps=1)
    monkeypatch.delattr(BiDVL, "draw_lower")
    old.fit(images(), num_steps=3, batch_size=6, lower_steps=1)
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    other = small_bidvl()
    other.fit(images(), num_steps=3, batch_size=6, lower_steps=2)
    theirs = other.state_dict()
    assert any(not torch.equal(p, theirs[name]) for name, p in new.state_dict().items())


def test_bidvl_still_computes_its_samples_once_for_both_levels() -> None:
    """Drawing anew in later lower steps must not cost the first one its shared G(h_hat)."""
    model, calls = small_bidvl(), []
    model.lower["generator"].register_forward_pre_hook(lambda *_: calls.append(None))
    upper, lower = model.optimizers(Training())
    data = Batches(images(), 6, seed=0)
    counts = []
    steps = {"num_steps": 3, "lower_steps": 2, "order": "upper_first"}
    for _ in train(model, data, upper_optimizer=upper, lower_optimizer=lower, **steps):
        counts.append(len(calls))
        calls.clear()
    # a turn: G(h_hat) for both levels, G(h); then both again in the second lower step
    assert counts[1:] == [4, 4]


# ---------------------------------------------------------------------- defaults on a small table


def patterns(n: int, seed: int) -> Tensor:
    """Rows of twelve bits near one of three patterns: columns that depend on each other strongly."""
    codes = torch.rand(3, 12, generator=generator(4)).round()
    rows = codes[torch.randint(3, (n,), generator=generator(seed))]
    flips = torch.rand(n, 12, generator=generator(seed + 1)) < 0.05
    return (rows - flips.float()).abs()


@pytest.mark.parametrize("make", [AdvIL, GeneralBiDVL.for_model], ids=["AdvIL", "GeneralBiDVL"])
def test_default_settings_beat_independent_columns_by_two_nats(make: Any) -> None:
    """All settings but the length are the defaults; likelihoods are exact, on rows not trained on."""
    train_rows, test_rows = patterns(1000, 10), patterns(1000, 20)
    machine = RBM(12, 6)
    make(machine).fit(train_rows, num_steps=500)
    learned = float(machine.log_likelihood(test_rows).mean().detach())
    rates = (train_rows.sum(0) + 1) / (len(train_rows) + 2)
    columns = test_rows * rates.log() + (1 - test_rows) * (1 - rates).log()
    independent = float(columns.sum(1).mean())
    assert learned > independent + 2, (learned, independent)
