r"""iMAML: weights near which every sine wave can be learned from ten points.

A task is a sine wave of random amplitude and phase, known at ten points. Its own weights (lower level)
fit these points and stay near the weights that all tasks share (upper level):

    min over x  of  mean_i loss(y_i(x); new points of task i)
    where y_i(x)  minimises  loss(y; ten points of task i) + strength / 2 |y - x|^2

`MAML` differentiates through the steps that find y_i (`examples/maml.py`). Here they are not
differentiated, so any lower solver will do, and its memory does not grow with its steps: the implicit
function theorem needs the answer alone. One task is written down; `Tasks` puts 25 of them side by side.
"""

import argparse

import torch
from torch import Tensor, nn

from bilevel import ConjugateGradient, Implicit, LowerLevel, Problem, Tasks, hyperobjective, train

STEPS, RATE, STRENGTH = 16, 0.02, 0.5
Points = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    )


class Sinusoid(Problem):
    """One task."""

    def __init__(self, shots: int = 10) -> None:
        super().__init__()
        self.shots = shots
        self.upper, self.lower = network(), network()

    def draw(self, data: None, generator: torch.Generator) -> dict[str, Points]:
        amplitude, phase = torch.rand(2, generator=generator) * torch.tensor([4.9, torch.pi])
        inputs = 10 * torch.rand(3 * self.shots, 1, generator=generator) - 5
        targets = (amplitude + 0.1) * (inputs - phase).sin()
        known, new = slice(self.shots), slice(self.shots, None)
        return {"known": (inputs[known], targets[known]), "new": (inputs[new], targets[new])}

    def error(self, points: Points) -> Tensor:
        inputs, targets = points
        return nn.functional.mse_loss(self.lower(inputs), targets)

    def upper_loss(self, batch: dict[str, Points]) -> Tensor:
        return self.error(batch["new"])

    def lower_loss(self, batch: dict[str, Points]) -> Tensor:
        pairs = zip(self.lower.parameters(), self.upper.parameters(), strict=True)
        away = torch.stack([(y - x).square().sum() for y, x in pairs]).sum()
        return self.error(batch["known"]) + STRENGTH / 2 * away


def adapt(level: LowerLevel) -> dict[str, Tensor]:
    """Every task by gradient steps from the shared weights."""
    start = {name: level.upper[name].expand_as(y) for name, y in level.start.items()}
    return level.minimize(
        lambda weights: torch.optim.SGD(weights, RATE, momentum=0.9), STEPS, start=start
    )


@torch.no_grad()
def error_on_new_tasks(problem: Sinusoid, seed: int) -> float:
    """The squared error on 200 new tasks, each adapted from the problem's shared weights."""
    tasks = Tasks(problem, 200)
    batch = tasks.draw(None, torch.Generator().manual_seed(10_000 + seed))
    # what a few steps give is the answer here, solution or not
    return hyperobjective(tasks, batch, batch, solve=adapt, tolerance=None).item()


def main(num_steps: int, seed: int) -> tuple[Sinusoid, Sinusoid]:
    """A problem with what iMAML learned, and one with random weights."""
    torch.manual_seed(seed)
    random, problem = Sinusoid(), Sinusoid()
    adam = torch.optim.Adam(problem.upper.parameters(), lr=5e-3)
    solver = Implicit(ConjugateGradient(max_steps=5, rtol=None, damping=1.0))
    run = {"solver": solver, "lower_solver": adapt, "upper_optimizer": adam, "throw": False}
    for step in train(Tasks(problem, 25), num_steps=num_steps, seed=seed, **run):  # type: ignore[arg-type]
        if step.number % (num_steps // 4) == 0:
            print(f"step {step.number:4}: loss {step.upper_loss:.3f}", flush=True)
    learned, unlearned = (error_on_new_tasks(p, seed) for p in (problem, random))
    print(
        f"Squared error on new tasks after {STEPS} steps on ten points: {learned:.2f} from iMAML's "
        f"weights, {unlearned:.2f} from random ones."
    )
    return problem, random


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(12 if options.small else 300, options.seed)
