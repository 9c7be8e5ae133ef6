r"""AdvIL on a machine small enough to know its likelihood: what an adversary costs, in nats.

A restricted Boltzmann machine of the handwritten digits has $p(v) = e^{-F(v)} / Z$. With ten hidden
units log Z is a sum over 1,024 states, so the test log-likelihood is exact, whatever trained the
machine. Three ways to train it, each for the same processor time from the same weights:

    AdvIL               the upper level moves the machine; the lower level fits an encoder, which
                        bounds the free energy, and a sampler, which bounds log Z
    contrastive div.    ten persistent Gibbs steps stand for samples of the machine
    maximum likelihood  the exact gradient, log Z enumerated in every step: the ceiling

AdvIL needs neither a sum over states nor a Markov chain, which is what it is for; on a machine that has
both, this is its price. The sampler's bound on log Z is printed beside the exact value: the machine
learns against that bound.
"""

import argparse
import time
from typing import Any

import torch

from bilevel import Step
from bilevel.methods import EBLVM, RBM, AdvIL, ContrastiveDivergence, MaximumLikelihood
from bilevel.methods.data.tables import Table, load_table
from bilevel.methods.likelihood import sampler_lower_bound

HIDDEN = 10


def machine(digits: Table, seed: int) -> RBM:
    """One whose visible biases are the log-odds of the pixels, so that none has to find them."""
    rbm = RBM(64, HIDDEN, grey=True, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rbm.visible_bias.copy_(rbm.base_rate(digits.train))
    return rbm


def independent_pixels(digits: Table) -> float:
    """Test log-likelihood of pixels that know nothing of each other."""
    rates = digits.train.mean(0).clamp(1e-4, 1 - 1e-4)
    v = digits.test
    return float((v * rates.log() + (1 - v) * (1 - rates).log()).sum(1).mean())


def train(
    name: str, learner: EBLVM, digits: Table, seconds: float, seed: int, **settings: Any
) -> float:
    """Exact test log-likelihood after so much processor time, which other jobs do not change."""
    began, looked = time.process_time(), 0

    def look(step: Step) -> bool:
        nonlocal looked
        spent = time.process_time() - began
        if spent >= (looked + 1) * seconds / 4:
            looked = int(4 * spent / seconds)
            reached = learner.model.log_likelihood(digits.test).mean()
            print(f"{name:22} {spent:5.1f} s, step {step.number:5}: {reached:7.2f} nats")
        return spent >= seconds

    learner.fit(digits.train, callbacks=[look], num_steps=10**6, seed=seed, **settings)
    return learner.model.log_likelihood(digits.test).mean().item()


def main(seconds: float, seed: int) -> dict[str, float]:
    """Exact test log-likelihoods by name."""
    torch.set_num_threads(1)  # processor time is then that of one core
    digits = load_table("digits")
    floor = independent_pixels(digits)
    print(f"independent pixels: {floor:.2f} nats on {len(digits.test)} test images")

    advil = AdvIL(machine(digits, seed))
    rates = {"upper_lr": 1e-2, "lower_lr": 1e-2, "lower_steps": 2}
    adversarial = train("AdvIL", advil, digits, seconds, seed, **rates)
    chains = ContrastiveDivergence(machine(digits, seed), steps=10, persistent=True)
    contrastive = train("contrastive divergence", chains, digits, seconds, seed, upper_lr=5e-3)
    exact = MaximumLikelihood(machine(digits, seed))
    ceiling = train("maximum likelihood", exact, digits, seconds, seed, upper_lr=5e-3)

    generator = torch.Generator().manual_seed(seed)
    bound = sampler_lower_bound(advil.model, advil.sampler, generator=generator, num_samples=10_000)
    log_partition = advil.model.log_partition().item()
    print(f"AdvIL's sampler: log Z is at least {bound.value:.2f}; exact {log_partition:.2f}")
    print(
        f"Exact test log-likelihood after {seconds:g} s on one core each: {adversarial:.2f} nats by "
        f"AdvIL, {contrastive:.2f} by contrastive divergence, {ceiling:.2f} by maximum likelihood; "
        f"{floor:.2f} for independent pixels."
    )
    return {
        "independent pixels": floor,
        "AdvIL": adversarial,
        "contrastive divergence": contrastive,
        "maximum likelihood": ceiling,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(0.5 if options.small else 20.0, options.seed)
