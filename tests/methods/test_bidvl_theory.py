"""BiDVL's identities (A1-A12) on a model of 6 x 4 states, where every expectation is exact."""

import pytest
import torch
import torchopt
from torch import nn

from bilevel import Alternating, ConjugateGradient, Implicit, Oracles, Unrolled, check_hypergradient
from bilevel.check import solve_lower
from bilevel.methods import BiDVL, GeneralBiDVL
from bilevel.methods.variational import (
    DecoupledEnergy,
    Draws,
    TabularEnergy,
    TabularJoint,
    TabularPosterior,
    VariationalJoint,
    enumerated,
)

V, H = 6, 4
COUNTS = torch.tensor([3, 1, 4, 1, 5, 2])
DATA = torch.arange(V).repeat_interleave(COUNTS)
Q = COUNTS.double() / COUNTS.sum()


def table(seed):
    return torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Marginal(nn.Module):
    """E(v) as a table."""

    def __init__(self, seed):
        super().__init__()
        self.values = nn.Parameter(table(seed)[:, 0])

    def forward(self, v):
        return self.values[v]


class IndependentJoint(VariationalJoint):
    """p2(v) p2(h): too small a family to realise the model."""

    def __init__(self, seed):
        super().__init__()
        self.rows = nn.Parameter(table(seed)[:, 0])
        self.columns = nn.Parameter(table(seed)[0])

    def log_table(self):
        return self.rows.log_softmax(0)[:, None] + self.columns.log_softmax(0)

    def noise(self, n, generator, like):
        return self.rows.new_zeros(n, 0)

    def draws(self, noise) -> Draws:
        return enumerated(self.log_table())

    def log_prob(self, v, h):
        return self.log_table()[v, h]

    def sample(self, n, generator):
        raise NotImplementedError


def undecoupled(divergence="kl", joint=None):
    joint = TabularJoint(table(2)) if joint is None else joint
    return GeneralBiDVL(
        TabularEnergy(table(0)), TabularPosterior(table(1)), joint, divergence=divergence
    )


def realised(divergence="kl"):
    """The general problem with q1 = p(h|v) and p2 = p(v, h)."""
    log_joint = TabularEnergy(table(0)).log_joint().detach()
    return GeneralBiDVL(
        TabularEnergy(table(0)),
        TabularPosterior(log_joint.clone()),
        TabularJoint(log_joint.clone()),
        divergence=divergence,
    )


def decoupled():
    posterior = TabularPosterior(table(1))
    energy = DecoupledEnergy(Marginal(3), posterior, table_size=(V, H))
    return GeneralBiDVL(energy, posterior, TabularJoint(table(2)), divergence="symmetric")


def batch(problem):
    return problem.draw(DATA, torch.Generator().manual_seed(0))


def energy_of(problem):
    return problem.upper["energy"]


def likelihood_gradient(problem):
    """The exact gradient of J(psi) = KL(q || p_psi) in the energy table."""
    energy = energy_of(problem)
    log_visible = energy.log_joint().logsumexp(dim=1)
    return torch.autograd.grad(-(Q * log_visible).sum(), energy.table)[0]


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def gaps(problem):
    """K1 = E_q KL(q1 || p(h|v)) and K2 = KL(p2 || p)."""
    log_joint = energy_of(problem).log_joint()
    log_q1 = problem.lower["posterior"].logits.log_softmax(1)
    per_row = (log_q1.exp() * (log_q1 - log_joint.log_softmax(1))).sum(1)
    p2 = problem.lower["joint"].draws(problem.lower["joint"].noise(1, None, DATA))
    return (Q * per_row).sum(), kl(p2.log_prob, log_joint.flatten())


def upper_partial(problem):
    return Alternating().hypergradient(problem, batch(problem), [batch(problem)]).grad


def test_a1_estimate_equals_likelihood_gradient_when_realised():
    problem = realised()
    grad = upper_partial(problem)["energy.table"]
    torch.testing.assert_close(grad, likelihood_gradient(problem), rtol=0, atol=1e-12)


def test_a2_three_terms_sum_to_the_exact_gradient():
    problem = undecoupled()
    log_joint = energy_of(problem).log_joint().detach()
    q1 = problem.lower["posterior"].logits.softmax(1).detach()
    p2 = problem.lower["joint"].logits.flatten().softmax(0).view(V, H).detach()
    posterior_gap = Q[:, None] * (log_joint.softmax(1) - q1)  # (3b)
    joint_gap = p2 - log_joint.exp()  # (3c)
    total = upper_partial(problem)["energy.table"] + posterior_gap + joint_gap
    torch.testing.assert_close(total, likelihood_gradient(problem), rtol=0, atol=1e-12)


def test_a3_upper_partial_is_the_estimate():
    problem = undecoupled()
    q1 = problem.lower["posterior"].logits.softmax(1).detach()
    p2 = problem.lower["joint"].logits.flatten().softmax(0).view(V, H).detach()
    expected = Q[:, None] * q1 - p2
    torch.testing.assert_close(upper_partial(problem)["energy.table"], expected, rtol=0, atol=1e-12)


def test_a4_upper_loss_minus_likelihood_is_the_difference_of_the_gaps():
    problem = undecoupled()
    upper, _ = problem.upper_loss(batch(problem))
    upper = upper + (Q * Q.log()).sum()  # the entropy of q, which the loss leaves out
    likelihood = kl(Q.log(), energy_of(problem).log_joint().logsumexp(1))
    k1, k2 = gaps(problem)
    torch.testing.assert_close(upper - likelihood, k1 - k2, rtol=0, atol=1e-12)
    assert abs(upper - likelihood) <= k1 + k2


@pytest.mark.parametrize("divergence", ["kl", "symmetric"])
def test_a5_response_vanishes_when_realised(divergence):
    problem = realised(divergence)
    made = batch(problem)
    truth = likelihood_gradient(problem)
    solvers = [
        Alternating(),
        # logits are shift-invariant, so the condition number is 1e9 and rounding leaves 1e-8
        Implicit(ConjugateGradient(rtol=1e-7, damping=1e-9)),
        Unrolled(20, torchopt.sgd(0.5)),
    ]
    for solver in solvers:
        answer = solver.hypergradient(problem, made, [made])
        torch.testing.assert_close(answer.grad["energy.table"], truth, rtol=0, atol=1e-9)
        assert answer.stats.response_norm < 1e-9


def test_a5_response_vanishes_at_any_canonical_optimum_but_not_at_a_symmetric_one():
    norms = {}
    for divergence in ("kl", "symmetric"):
        problem = undecoupled(divergence, IndependentJoint(4))
        made = batch(problem)
        oracles = Oracles(problem, made, [made])
        solution = solve_lower(oracles)
        leaves = {name: y.requires_grad_() for name, y in solution.items()}
        loss = oracles.evaluate("upper", oracles.upper, leaves).loss
        grads = oracles.gradient(loss, leaves)
        norms[divergence] = max(float(g.abs().max()) for g in grads.values())
    assert norms["kl"] < 1e-8
    assert norms["symmetric"] > 1e-2


@pytest.mark.parametrize("steps", [5, 60])
def test_a6_unrolled_equals_finite_differences(steps):
    problem = undecoupled()
    made = batch(problem)
    check = check_hypergradient(
        problem,
        Unrolled(steps, torchopt.sgd(0.5)),
        made,
        [made],
        tolerance=1e-9,
        num_directions=8,
    )
    assert check.passed, check


def test_a6_first_order_gradient_tends_to_the_unrolled_one():
    """The neglected response shrinks as the lower level is solved (canonical KL)."""
    norms = []
    for steps in (10, 60, 240):
        problem = undecoupled()
        made = batch(problem)
        answer = Unrolled(steps, torchopt.sgd(4.0)).hypergradient(problem, made, [made])
        norms.append(float(answer.stats.response_norm))
    assert norms[0] > 0.01
    assert norms[0] > 2 * norms[1] > 4 * norms[2]


def test_a7_gradient_error_obeys_the_pinsker_bound():
    for seed in range(20):
        problem = GeneralBiDVL(
            TabularEnergy(table(seed)),
            TabularPosterior(table(seed + 50)),
            TabularJoint(table(seed + 99)),
        )
        error = upper_partial(problem)["energy.table"] - likelihood_gradient(problem)
        k1, k2 = gaps(problem)
        # dE/dpsi of a table is a unit vector, so B = 1
        assert error.norm() <= (2 * k1).sqrt() + (2 * k2).sqrt()


def test_a8_decoupled_energy_has_marginal_and_posterior():
    problem = decoupled()
    energy, posterior = energy_of(problem), problem.lower["posterior"]
    log_joint = energy.log_joint()
    close = {"rtol": 0, "atol": 1e-12}
    marginal = (-energy.marginal.values).log_softmax(0)
    torch.testing.assert_close(log_joint.logsumexp(1), marginal, **close)
    torch.testing.assert_close(log_joint.log_softmax(1), posterior.logits.log_softmax(1), **close)
    v, h = enumerated(log_joint)[:2]
    log_z_joint = (-energy(v, h)).logsumexp(0)
    torch.testing.assert_close(log_z_joint, (-energy.marginal.values).logsumexp(0), **close)


def test_a9_decoupled_upper_gradient():
    problem = decoupled()
    grad = upper_partial(problem)
    log_p2 = problem.lower["joint"].logits.flatten().log_softmax(0).view(V, H)
    expected = Q - log_p2.exp().sum(1)
    torch.testing.assert_close(grad["energy.marginal.values"], expected, rtol=0, atol=1e-12)
    logits = problem.lower["posterior"].logits
    kl_p2_q1 = (log_p2.exp() * (log_p2 - logits.log_softmax(1))).sum()
    (expected,) = torch.autograd.grad(-kl_p2_q1, logits)
    torch.testing.assert_close(grad["energy.posterior.logits"], expected, rtol=0, atol=1e-12)


def assembled_terms(problem):
    """The three terms of Eq. 11 as functions of (omega1, omega2)."""
    log_q1 = problem.lower["posterior"].logits.log_softmax(1)
    log_p2 = problem.lower["joint"].logits.flatten().log_softmax(0).view(V, H)
    energies = energy_of(problem).marginal.values.detach()
    ratio = (-energies).softmax(0) / Q
    weighted = (Q * ratio)[:, None] * log_q1.exp() * (Q.log()[:, None] + log_q1 - log_p2)
    energy = (log_p2.exp() * energies[:, None]).sum()
    latent = (log_p2.exp() * (log_p2 - log_q1)).sum()
    return weighted.sum(), energy, latent


def lower_parameters(problem):
    return [problem.lower["posterior"].logits, problem.lower["joint"].logits]


def test_a10_lower_gradient_equals_the_assembled_one():
    problem = decoupled()
    loss, _ = problem.lower_loss(batch(problem))
    grads = torch.autograd.grad(loss, lower_parameters(problem))
    expected = torch.autograd.grad(sum(assembled_terms(problem)), lower_parameters(problem))
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=1e-12)


def test_a11_opposite_terms_cancel():
    problem = decoupled()
    omega1 = problem.lower["posterior"].logits
    (lower,) = torch.autograd.grad(problem.lower_loss(batch(problem))[0], omega1)
    upper = upper_partial(problem)["energy.posterior.logits"]
    (weighted,) = torch.autograd.grad(assembled_terms(problem)[0], omega1)
    torch.testing.assert_close(lower + upper, weighted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", ["none", "sigmoid"])
def test_a12_the_ratio_the_loss_uses(bias):
    model = BiDVL.for_images((1, 8, 8), latent_dim=2, width=4, ratio=0.05, ratio_bias=bias)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    energies = model.latent_model.free_energy(images)
    expected = 0.05 * torch.sigmoid(energies.mean() - energies) if bias == "sigmoid" else 0.05
    ratio = model.eval().importance_ratio(images)
    torch.testing.assert_close(ratio, torch.as_tensor(expected), rtol=1e-3, atol=0)
