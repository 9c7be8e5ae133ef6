"""Two estimates of an expectation under a Boltzmann machine, against its exact value.

    python -m benchmarks.reverse_kl

BiDVL's symmetric KL needs E_p[log p2(v, h)] under the machine p. `GeneralBiDVL` estimates it from draws
of the sampler p2: with self-normalised importance weights, or after a few Gibbs sweeps of the machine.
Here the same weighted samples estimate the moments E_p[v h^T] of an RBM whose states can be enumerated,
with the sampler untrained, half trained and trained. The error of a batch of 100 is split into its bias
(what is left after averaging 400 batches) and its spread, both relative to the norm of the moments.

Records go to `benchmarks/results/reverse_kl.jsonl`; `python -m benchmarks.table` prints them.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.records import append, command
from bilevel.methods import RBM, GeneralBiDVL

VISIBLES, LATENTS, SCALE = 9, 6, 1.5
STAGES = (0, 300, 1700)  # steps of the sampler between two looks
BATCH, BATCHES = 100, 400
ESTIMATES: list[tuple[str, dict[str, Any]]] = [
    ("importance", {"reverse": "importance"}),
    *((f"gibbs, {k} sweeps", {"reverse": "gibbs", "sweeps": k}) for k in (1, 5, 20)),
]


def machine() -> RBM:
    """A machine with strong weights, so that its Gibbs chains are not quick."""
    model = RBM(VISIBLES, LATENTS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(SCALE * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.requires_grad_(False)


def exact_moments(model: RBM) -> Tensor:
    h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * LATENTS)
    probability = model.log_unnormalized_first(h).softmax(0)
    means = model.visible_mean(h)
    return torch.einsum("n,ni,nj->ij", probability, means, h)


def train_sampler(learner: GeneralBiDVL, steps: int, generator: torch.Generator) -> None:
    """Lower steps alone: the machine stands still."""
    optimizer = torch.optim.Adam(learner.lower.parameters(), lr=3e-3)
    data = torch.zeros(BATCH, VISIBLES, dtype=torch.float64)
    for _ in range(steps):
        loss: Any = learner.lower_loss(learner.draw(data, generator))
        optimizer.zero_grad()
        loss[0].backward()
        optimizer.step()


def errors(learner: GeneralBiDVL, exact: Tensor, generator: torch.Generator) -> dict[str, float]:
    data = torch.zeros(BATCH, VISIBLES, dtype=torch.float64)
    moments = []
    for _ in range(BATCHES):
        batch = learner.draw_lower(learner.draw(data, generator), generator, 0)
        assert batch.proposals is not None
        v, h, log_density, *_ = batch.proposals
        weight = (-learner.joint_energy(v, h) - log_density).softmax(0)
        moments.append(torch.einsum("n,ni,nj->ij", weight, v, h))
    stack = torch.stack(moments)
    spread = (stack - stack.mean(0)).square().sum((1, 2)).mean().sqrt()
    bias = (stack.mean(0) - exact).norm()
    return {"bias": float(bias / exact.norm()), "spread": float(spread / exact.norm())}


def main() -> None:
    options = command("reverse_kl", __doc__).parse_args()
    model = machine()
    exact, generator = exact_moments(model), torch.Generator().manual_seed(1)
    rows, steps = [], 0
    trained = GeneralBiDVL.for_model(model).double()
    for more in STAGES:
        train_sampler(trained, more, generator)
        steps += more
        for name, how in ESTIMATES:
            learner = GeneralBiDVL.for_model(model, divergence="symmetric", **how).double()
            learner.lower.load_state_dict(trained.lower.state_dict())
            rows.append(
                {"sampler_steps": steps, "estimate": name, **errors(learner, exact, generator)}
            )
            print(rows[-1])
    append(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
