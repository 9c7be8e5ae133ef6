"""BiSM on Gaussian RBMs, where its best response is known, and on a linear Gaussian energy.

Numbers in brackets are those of the assertions in the paper's fact sheet.
"""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import Alternating, Batches, Implicit, Solver, Unrolled, check_hypergradient, train
from bilevel.linear import Cholesky, ConjugateGradient
from bilevel.methods.bism import Batch, BiSM
from bilevel.methods.models import DBM, GaussianDBM, GaussianRBM
from bilevel.methods.objectives.score import Noised
from bilevel.methods.score_matching import ScoreMatching
from bilevel.methods.variational import BernoulliPosterior, GaussianPosterior
from bilevel.oracles import Oracles
from bilevel.tree import Layout, Tree
from tests.devices import DEVICES, generator
from tests.method_rows import ROWS

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
TEMPERATURE = 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def machine() -> GaussianRBM:
    """A Gaussian RBM far from its initial weights, in float64."""
    model = GaussianRBM(2, 4).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.7 * normal(*p.shape, seed=i))
    return model


def learner(*, exact: bool = True, at_the_posterior: bool = True, **options: Any) -> BiSM:
    made = BiSM(machine(), expectation="exact" if exact else "sampled", **options)
    if at_the_posterior:
        put_at_the_posterior(made)
    return made


def put_at_the_posterior(made: BiSM) -> None:
    logits = made.encoder.networks[0]
    with torch.no_grad():
        logits.weight.copy_(made.model.weight.mT)
        logits.bias.copy_(made.model.latent_bias)


def data(n: int = 12) -> Tensor:
    return 0.8 * normal(n, 2, seed=50)


def marginal_gradient(made: BiSM, points: Any, objective: str = "denoising") -> Tree:
    """The gradient of the same objective on the exact free energy."""
    single = ScoreMatching(made.model, objective=objective)  # type: ignore[arg-type]
    single.objective = made.objective
    names, leaves = zip(*single.upper.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(single.upper_loss(points), leaves), strict=True))


def hypergradient(made: BiSM, solver: Solver, batch: Batch, lower: Any = None, **more: Any) -> Tree:
    lower = [made.draw_lower(batch, generator(7), 0)] if lower is None else lower
    return solver.hypergradient(made, batch, lower, **more).grad


def assert_same(a: Tree, b: Tree, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def all_latents(n: int, units: int) -> Tensor:
    """Every state of the latents for each of n visibles, shape (states, n, units)."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)
    return states[:, None].expand(-1, n, -1)


# ---------------------------------------------------------------- the theory


@pytest.mark.parametrize("objective", ["denoising", "multiscale", "sliced"])
def test_4_at_the_exact_posterior_the_loss_is_the_marginals_for_every_draw(objective: str) -> None:
    made = learner(objective=objective)
    batch = made.draw(data(), generator())
    single = ScoreMatching(made.model)
    single.objective = made.objective
    expected = single.upper_loss(batch.points)
    extremes = [1e4 * (2 * h - 1) for h in all_latents(12, 4)]  # noise that makes h this state
    for noise in [*extremes, *(made.draw(data(), generator(s)).latent for s in range(5))]:
        loss = made.upper_loss(batch._replace(latent=noise))
        torch.testing.assert_close(loss, expected, **TIGHT)


def test_5_best_response_is_the_machines_own_weights() -> None:
    made = learner(at_the_posterior=False)
    lower = made.draw_lower(made.draw(data(), generator()), generator(1), 0)
    logits, model = made.encoder.networks[0], made.model
    assert (logits.weight - model.weight.mT).abs().max() > 0.1
    optimizer = torch.optim.LBFGS(
        made.lower.parameters(),
        max_iter=3000,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = made.lower_loss(lower)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = made.variables("lower")
    closed = made.best_response(lower)
    assert closed is not None
    assert_same({n: found[n] for n in closed}, closed, 1e-6)  # where L-BFGS stops
    put_at_the_posterior(made)
    gradient = torch.autograd.grad(made.lower_loss(lower), list(made.lower.parameters()))
    assert max(g.abs().max() for g in gradient) < 1e-14


@pytest.mark.parametrize("objective", ["denoising", "multiscale", "sliced"])
def test_5_implicit_at_the_best_response_is_the_exact_gradient(objective: str) -> None:
    """Its Jacobian is the identity, whatever noise the two levels saw."""
    made = learner(objective=objective)
    batch = made.draw(data(), generator())
    answer = hypergradient(made, Implicit(Cholesky()), batch)
    assert_same(answer, marginal_gradient(made, batch.points, objective), 1e-9)
    conjugate = hypergradient(made, Implicit(ConjugateGradient(rtol=1e-13)), batch)
    assert_same(conjugate, answer, 1e-8)


def test_5_implicit_agrees_with_finite_differences_of_the_solution() -> None:
    made = learner()
    batch = made.draw(data(), generator())
    lower = made.draw_lower(batch, generator(7), 0)
    check = check_hypergradient(made, Implicit(Cholesky()), batch, [lower], tolerance=1e-8)
    assert check.passed, check
    assert not check_hypergradient(made, Alternating(), batch, [lower]).passed


def test_6_partial_derivative_misses_weights_and_hidden_biases_only() -> None:
    """At latents of the posterior's mean: the gradient is affine in h, so that is its expectation."""
    made = learner()
    batch = made.draw(data(), generator())
    logits = made.encoder.logits(batch.points.visible).detach()
    batch = batch._replace(latent=(TEMPERATURE - 1) * logits)
    partial = hypergradient(made, Alternating(), batch)
    exact = marginal_gradient(made, batch.points)
    for name in ("model.visible_bias", "model.log_scale"):
        torch.testing.assert_close(partial[name], exact[name], **TIGHT)
    for name in ("model.weight", "model.latent_bias"):
        assert (partial[name] - exact[name]).norm() > 0.1 * exact[name].norm()
    assert partial["model.latent_bias"].abs().max() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["denoising", "multiscale", "sliced"])
def test_7_hidden_bias_never_moves_without_the_response(objective: Any, device: str) -> None:
    made = BiSM(GaussianRBM(2, 4), objective=objective).to(device)
    before = copy.deepcopy(made.upper.state_dict())
    made.fit(data(64).float(), num_steps=10, batch_size=16, solver=Alternating())
    after = made.upper.state_dict()
    assert torch.equal(before["model.latent_bias"], after["model.latent_bias"])
    for name in ("model.weight", "model.visible_bias", "model.log_scale"):
        assert not torch.equal(before[name], after[name])
    moved = BiSM(GaussianRBM(2, 4), objective=objective).to(device)
    moved.fit(data(64).float(), num_steps=2, batch_size=16, solver=Unrolled(1))
    assert not torch.equal(before["model.latent_bias"], moved.model.latent_bias)


def test_8_unrolling_converges_at_the_rate_of_the_lower_hessian() -> None:
    """From phi* the error of N gradient steps of size 1 is (I - H)^N dJ/dphi; its rate is 1 - min H."""
    made = learner()
    batch = made.draw(data(60), generator())
    lower = made.draw_lower(batch, generator(7), 0)
    exact = marginal_gradient(made, batch.points)
    layout = Layout(list(exact.values()))
    oracles = Oracles(made, batch, [lower])
    linear = oracles.linearize_lower(oracles.upper, oracles.lower)
    hessian = torch.stack([linear.hessian(e) for e in torch.eye(12, dtype=torch.float64)])
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert 0 < eigenvalues[0] < eigenvalues[-1] < 1

    def error(steps: int) -> float:
        solver = Unrolled(steps, torchopt.sgd(1.0)) if steps else Alternating()
        answer = hypergradient(made, solver, batch, [lower])
        return float(layout.ravel([answer[n] - exact[n] for n in exact]).norm())

    counts = [0, 1, 2, 5, 10, 20, 50, 180, 200]
    errors = [error(n) for n in counts]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-3 * errors[0]
    rate = math.exp(math.log(errors[-1] / errors[-2]) / (counts[-1] - counts[-2]))
    assert rate == pytest.approx(1 - float(eigenvalues[0]), abs=1e-3)
    # the whole vector: dJ/dphi shrunk N times by the matrix
    gradient = torch.autograd.grad(made.upper_loss(batch), list(made.lower.parameters()))
    left = Layout(list(gradient)).ravel(list(gradient))
    for _ in range(20):
        left = left - hessian @ left
    assert float(left.norm()) == pytest.approx(error(20), rel=1e-9)


def test_9_too_few_points_leave_the_lower_level_degenerate() -> None:
    made = learner(at_the_posterior=False)

    def smallest(n: int) -> float:
        batch = made.draw(data(n), generator())
        oracles = Oracles(made, batch, [made.draw_lower(batch, generator(7), 0)])
        linear = oracles.linearize_lower(oracles.upper, oracles.lower)
        hessian = torch.stack([linear.hessian(e) for e in torch.eye(12, dtype=torch.float64)])
        return float(torch.linalg.eigvalsh(hessian)[0])

    put_at_the_posterior(made)
    assert abs(smallest(1)) < 1e-12
    assert abs(smallest(2)) < 1e-12
    assert smallest(3) > 1e-6


@pytest.mark.parametrize(("points", "converges"), [(1, False), (12, True)])
def test_9_one_point_makes_the_error_plateau(points: int, converges: bool) -> None:
    """Its logits are right in the end, but not their slope in v, which the upper loss sees."""
    made = learner(at_the_posterior=False)
    batch = made.draw(2 * data(points), generator())
    # both levels at the same points, so that more points than one is all that matters
    lower = made.draw_lower(batch, generator(7), 0)._replace(visible=batch.points.visible)
    answer = hypergradient(made, Unrolled(600, torchopt.sgd(1.0)), batch, [lower])
    exact = marginal_gradient(made, batch.points)
    error = sum(float((answer[n] - exact[n]).norm()) for n in exact)
    size = sum(float(exact[n].norm()) for n in exact)
    assert (error < 1e-2 * size) is converges, error / size


def test_10_lower_level_is_untouched_by_the_upper_step() -> None:
    """Whatever the solver: the unrolled steps are thrown away, those of the optimizer too."""
    after = []
    for solver in (Alternating(), Unrolled(1), Unrolled(7), Implicit(Cholesky(damping=1e-3))):
        made = BiSM(GaussianRBM(2, 4).double(), expectation="exact")
        upper = torch.optim.Adam(made.upper.parameters())
        lower = torch.optim.Adam(made.lower.parameters())
        steps = train(
            made,
            Batches(data(16), 16, seed=0),
            upper_optimizer=upper,
            lower_optimizer=lower,
            num_steps=1,
            solver=solver,
            lower_steps=3,
            order="lower_first",
        )
        before = copy.deepcopy(made.upper.state_dict())
        list(steps)
        assert not torch.equal(before["model.weight"], made.model.weight)
        after.append((made.lower.state_dict(), lower.state_dict()["state"]))
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=0, atol=0)


def test_11_lower_steps_share_the_visibles_and_have_their_own_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    original = BiSM.lower_loss

    def spy(self: BiSM, batch: Any) -> Any:
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(BiSM, "lower_loss", spy)
    made = BiSM(GaussianRBM(2, 4), objective="sliced")
    made.fit(data(64).float(), num_steps=1, batch_size=16, solver=Unrolled(2))
    seen = seen[2:]  # the rehearsal, which evaluates twice
    assert len(seen) == 5 + 2
    for one, other in itertools.combinations(seen, 2):
        assert torch.equal(one.visible, other.visible)
        assert not torch.equal(one.latent, other.latent)
    seen.clear()
    made = BiSM(GaussianRBM(2, 4), objective="denoising")
    made.fit(data(64).float(), num_steps=1, batch_size=16)
    for one, other in itertools.combinations(seen[2:], 2):
        assert not torch.equal(one.visible, other.visible)
        assert (one.visible - other.visible).abs().max() < 10 * 0.05


def test_11_without_lower_steps_the_posterior_stays() -> None:
    made = BiSM(GaussianRBM(2, 4))
    before = copy.deepcopy(made.state_dict())
    upper = torch.optim.Adam(made.upper.parameters())
    batches = Batches(data(64).float(), 16, seed=0)
    list(train(made, batches, upper_optimizer=upper, num_steps=5, lower_steps=0))
    for name, value in made.state_dict().items():
        moved = name.startswith("upper") and "latent_bias" not in name
        assert torch.equal(value, before[name]) is not moved, name


# ---------------------------------------------------------------- the losses


def test_exact_lower_loss_is_the_divergence_less_the_free_energy() -> None:
    """E_q[log q + E] = KL(q || p(h|v)) + F(v), with the expectation enumerated."""
    made = learner(at_the_posterior=False)
    v = data()
    lower = made.draw_lower(made.draw(v, generator()), generator(1), 0)
    v, total = lower.visible, torch.zeros((), dtype=torch.float64)
    for h in all_latents(len(v), 4):
        log_q = made.encoder.log_prob(v, h)
        log_p = -made.model(v, h) + made.model.free_energy(v)
        total = total + (log_q.exp() * (log_q - log_p)).mean()
    loss = made.lower_loss(lower)
    torch.testing.assert_close(loss, total + made.model.free_energy(v).mean(), **TIGHT)


@pytest.mark.parametrize("objective", ["denoising", "multiscale", "sliced"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_unrolled_hypergradient_equals_finite_differences(
    objective: str, exact: bool, running: bool
) -> None:
    """Three steps with their own noise; a temperature of 1, or the fifth derivative is too large."""
    model = machine()
    made = BiSM(
        model,
        BernoulliPosterior.for_model(model, temperature=1.0),
        objective=objective,  # type: ignore[arg-type]
        expectation="exact" if exact else "sampled",
        sigma=0.3,
        sigma_range=(0.2, 0.6),
    )
    batch = made.draw(data(), generator())
    lower = [made.draw_lower(batch, generator(1 + t), t) for t in range(3)]
    optimizer = torch.optim.Adam(made.lower.parameters(), lr=0.05)
    for p, g in zip(
        made.lower.parameters(),
        torch.autograd.grad(made.lower_loss(lower[0]), list(made.lower.parameters())),
        strict=True,
    ):
        p.grad = g
    optimizer.step()
    solver = Unrolled(3) if running else Unrolled(3, torchopt.sgd(0.3))
    check = check_hypergradient(
        made, solver, batch, lower, lower_optimizer=optimizer, tolerance=1e-8
    )
    assert check.passed, check


def test_losses_are_functions_of_the_batch() -> None:
    made = learner(exact=False, at_the_posterior=False)
    batch = made.draw(data(), generator())
    again = made.draw(data(), generator())
    assert torch.equal(made.upper_loss(batch), made.upper_loss(again))
    lower = made.draw_lower(batch, generator(3), 0)
    assert torch.equal(made.lower_loss(lower), made.lower_loss(lower))
    with torch.no_grad():
        assert torch.equal(made.upper_loss(batch), made.upper_loss(again))


# ---------------------------------------------------------------- any energy


class LinearEnergy(nn.Module):
    """E(v, h) = |v - A h|^2 / 2 + |h|^2 / 2 with orthogonal columns: p(v) = N(0, I + A A^T)."""

    def __init__(self) -> None:
        super().__init__()
        columns = torch.linalg.qr(normal(3, 2))[0]
        self.matrix = nn.Parameter(columns * torch.tensor([1.0, 2.0]))

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        return 0.5 * ((v - h @ self.matrix.mT).square().sum(1) + h.square().sum(1))


class Moments(nn.Module):
    """Mean and log-variance, linear in v and constant."""

    def __init__(self, energy: LinearEnergy) -> None:
        super().__init__()
        precision = torch.eye(2) + (energy.matrix.mT @ energy.matrix).detach()
        self.gain = nn.Parameter(torch.linalg.solve(precision, energy.matrix.detach().mT))
        self.log_variance = nn.Parameter(-precision.diagonal().log())

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v @ self.gain.mT, self.log_variance.expand(len(v), -1)


def linear(divergence: Any = "fisher", **options: Any) -> BiSM:
    energy = LinearEnergy()
    return BiSM(
        energy, GaussianPosterior(Moments(energy).double(), 2), divergence=divergence, **options
    )


def test_fisher_divergence_vanishes_at_the_exact_posterior_only() -> None:
    made = linear()
    lower = made.draw_lower(made.draw(normal(8, 3), generator()), generator(1), 0)
    assert made.lower_loss(lower).item() < 1e-25
    gradient = torch.autograd.grad(made.lower_loss(lower), list(made.lower.parameters()))
    assert max(g.abs().max() for g in gradient) < 1e-12
    with torch.no_grad():
        made.encoder.network.gain.add_(0.1)
        assert made.lower_loss(lower).item() > 1e-3


def test_fisher_divergence_is_the_closed_form() -> None:
    """0.5 |grad_h log q + grad_h E|^2 with both gradients written out, weighted by 1/sigma_i."""
    made = linear(objective="multiscale", sigma_range=(0.1, 0.5))
    with torch.no_grad():
        made.encoder.network.gain.add_(0.3 * normal(2, 3, seed=3))
        made.encoder.network.log_variance.add_(0.2)
    lower = made.draw_lower(made.draw(normal(8, 3), generator()), generator(1), 0)
    v, a = lower.visible, made.upper["model"].matrix
    mean, log_variance = made.encoder.moments(v)
    h = mean + (log_variance / 2).exp() * lower.latent
    slope = -(h - mean) / log_variance.exp() + h - (v - h @ a.mT) @ a
    levels = torch.logspace(math.log10(0.1), math.log10(0.5), 8, dtype=torch.float64)
    expected = (0.5 * slope.square().sum(1) / levels).mean()
    torch.testing.assert_close(made.lower_loss(lower), expected, **TIGHT)


@pytest.mark.parametrize("divergence", ["kl", "fisher"])
def test_4_holds_for_gaussian_latents(divergence: str) -> None:
    made = linear(divergence, sigma=0.3)
    a = made.upper["model"].matrix
    batch = made.draw(normal(8, 3), generator())
    points = batch.points
    assert isinstance(points, Noised)
    s = -torch.linalg.solve(torch.eye(3) + a @ a.mT, points.visible.mT).mT
    expected = 0.5 * (s - points.target).square().sum(1).mean()
    for seed in range(4):
        noise = normal(8, 2, seed=seed)
        loss = made.upper_loss(batch._replace(latent=noise))
        torch.testing.assert_close(loss, expected, **TIGHT)


@pytest.mark.parametrize("divergence", ["kl", "fisher"])
def test_unrolled_hypergradient_for_gaussian_latents(divergence: str) -> None:
    made = linear(divergence, sigma=0.3)
    with torch.no_grad():
        made.encoder.network.gain.add_(0.3 * normal(2, 3, seed=3))
    batch = made.draw(normal(8, 3), generator())
    lower = [made.draw_lower(batch, generator(1 + t), t) for t in range(3)]
    check = check_hypergradient(made, Unrolled(3, torchopt.sgd(0.05)), batch, lower, tolerance=1e-8)
    assert check.passed, check


def test_an_energy_that_is_no_machine_does_what_it_can() -> None:
    made = linear(langevin=(2, 5, 2))
    v = normal(40, 3)
    with pytest.raises(NotImplementedError, match="the shape of a visible is not known"):
        made.sample(3)
    assert made.fit(v, num_steps=2, batch_size=10).steps == 2
    assert made.visible_shape == (3,)  # of what it was trained on
    assert made.posterior(v).mean.shape == (40, 2)
    assert made.energy(v).shape == (40,)
    assert made.reconstruct(v).shape == v.shape
    assert made.sample(3, generator()).shape == (3, 3)
    with pytest.raises(NotImplementedError, match="`LinearEnergy` is no Boltzmann machine"):
        _ = made.model
    binary = BiSM(LinearEnergy(), BernoulliPosterior([nn.Linear(3, 2).double()], [2]))
    for call in (binary.energy, binary.reconstruct, binary.sample):
        with pytest.raises(NotImplementedError, match="`LinearEnergy` is no Boltzmann machine"):
            call(3 if call == binary.sample else v)  # type: ignore[operator]


def test_energy_at_the_exact_posterior_is_the_free_energy() -> None:
    """Every importance weight is then the same: the bound is tight with any noise."""
    made, v = linear(), normal(40, 3)
    a = made.upper["model"].matrix
    precision = torch.linalg.inv(torch.eye(3) + a @ a.mT)
    determinant = torch.linalg.det(torch.eye(2) + a.mT @ a)
    free = 0.5 * (v @ precision * v).sum(1) + 0.5 * determinant.log() - math.log(2 * math.pi)
    torch.testing.assert_close(made.energy(v), free.detach(), **TIGHT)
    with torch.no_grad():
        made.encoder.network.gain.add_(0.3)
    assert (made.energy(v) >= free - 0.05).all()
    assert made.energy(v).mean() > free.mean() + 0.05


# ---------------------------------------------------------------- the learner


@pytest.mark.parametrize("objective", ["denoising", "multiscale", "sliced"])
def test_fit_save_load(objective: Any, tmp_path: Path) -> None:
    options = {"objective": objective, "sigma": 0.1, "sigma_range": (0.1, 0.5)}
    made = BiSM(GaussianRBM(2, 4), **options, expectation="exact")
    v = data(64).float()
    history = made.fit(v, num_steps=4, batch_size=16, log_every=1)
    assert {"upper_loss", "lower_loss", "lower_residual"} <= history.records[-1].keys()
    made.save(tmp_path)
    loaded = BiSM.load(tmp_path)
    assert loaded.objective == made.objective
    assert loaded.posterior_fit.expectation == "exact"
    torch.testing.assert_close(loaded.state_dict(), made.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.energy(v), made.energy(v))


def test_load_with_a_posterior_of_ones_own(tmp_path: Path) -> None:
    model = GaussianRBM(2, 4)
    posterior = BernoulliPosterior.for_model(model, temperature=0.5)
    BiSM(model, posterior).save(tmp_path)
    with pytest.raises(ValueError, match="made of your own modules"):
        BiSM.load(tmp_path)
    assert BiSM.load(tmp_path, model=GaussianRBM(2, 4), posterior=posterior).encoder is posterior


@pytest.mark.parametrize("solver", [Unrolled(2), Implicit(Cholesky(damping=1e-3))])
def test_resumed_run_equals_the_uninterrupted_one(solver: Solver, tmp_path: Path) -> None:
    v = data(64).float()
    made = [BiSM(GaussianRBM(2, 4), expectation="exact") for _ in range(3)]
    settings: dict[str, Any] = {"num_steps": 6, "batch_size": 16, "solver": solver}
    made[0].fit(v, **settings)
    made[1].fit(v, **settings, run=tmp_path, callbacks=[lambda step: step.number == 3])
    made[2].fit(v, **settings, run=tmp_path, resume=True)
    torch.testing.assert_close(made[2].state_dict(), made[0].state_dict(), rtol=0, atol=0)


def test_two_hidden_layers_are_sampled() -> None:
    made = BiSM(GaussianDBM(2, (3, 2)))
    made.fit(data(64).float(), num_steps=2, batch_size=16, solver=Unrolled(2))
    assert made.best_response(None) is None
    with pytest.raises(ValueError, match="expectation='exact' needs an energy linear in h"):
        BiSM(GaussianDBM(2, (3, 2)), expectation="exact")


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("solver", [Unrolled(2), Implicit(Cholesky(damping=1e-3))])
def test_traced_steps_equal_eager_ones(solver: Solver) -> None:
    made = [BiSM(GaussianRBM(2, 4).double(), expectation="exact") for _ in range(2)]
    for one, compiled in zip(made, (False, True), strict=True):
        one.fit(data(64), num_steps=3, batch_size=16, solver=solver, compile=compiled)
    torch.testing.assert_close(made[1].state_dict(), made[0].state_dict(), rtol=1e-10, atol=1e-12)


def test_refusals() -> None:
    model = GaussianRBM(2, 4)
    with pytest.raises(ValueError, match="`GaussianRBM` with `BernoulliPosterior` are binary"):
        BiSM(model, divergence="fisher")
    with pytest.raises(ValueError, match="`DBM` are binary"):
        BiSM(DBM(4, (3, 2)))
    with pytest.raises(ValueError, match="no default posterior for a `LinearEnergy`"):
        BiSM(LinearEnergy())
    with pytest.raises(ValueError, match="`LinearEnergy` with `GaussianPosterior`"):
        linear("kl", expectation="exact")
    with pytest.raises(ValueError, match="`divergence` cannot be 'fischer'; did you mean `fisher`"):
        BiSM(model, divergence="fischer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`expectation` cannot be"):
        BiSM(model, expectation="closed")  # type: ignore[arg-type]
    energy = nn.Bilinear(3, 2, 1)  # (n, 1) instead of (n,)
    bad = BiSM(energy, GaussianPosterior(Moments(LinearEnergy()).float(), 2))
    with pytest.raises(ValueError, match="one number per pair, shape \\(n,\\); got \\(2, 1\\)"):
        bad.fit(torch.randn(20, 3), num_steps=1, batch_size=5)


def test_a_posterior_of_reals_has_no_best_response_in_closed_form() -> None:
    assert ROWS["bism of images"].make().best_response(None) is None
