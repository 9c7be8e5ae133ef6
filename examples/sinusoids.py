r"""Few-shot regression: features in which every sine wave is a ridge regression on ten points.

A task is a sine wave of random amplitude and phase, known at ten points. Its own weights (lower level)
are a ridge regression on features; the features, a network, and the penalty are what all tasks share
(upper level):

    min over features, penalty  of  mean_i loss(w_i; new points of task i)
    where w_i  minimises  loss(w; ten points of task i) + penalty |w|^2

The lower level has a closed form, which is all that is needed of its solution: nothing differentiates
through it. The implicit function theorem gives the hypergradient, with conjugate gradients that treat
each task by itself. One task is written down; `Tasks` puts 25 of them side by side.

Meta-Learning with Differentiable Closed-form Solvers (Bertinetto, Henriques, Torr, Vedaldi, 2019),
https://arxiv.org/abs/1805.08136, which differentiates the closed form itself.
"""

import argparse

import torch
from torch import Tensor, nn

from bilevel import Implicit, LowerLevel, Problem, Tasks, hyperobjective, train

FEATURES = 40
Points = tuple[Tensor, Tensor]


class Sinusoid(Problem):
    """One task."""

    def __init__(self, shots: int = 10) -> None:
        super().__init__()
        self.shots = shots
        layers = nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, FEATURES), nn.Tanh()
        penalty = nn.ParameterDict({"log": torch.tensor(-3.0)})
        self.upper = nn.ModuleDict({"features": nn.Sequential(*layers), "penalty": penalty})
        self.lower = nn.ParameterDict({"w": torch.zeros(FEATURES)})

    def draw(self, data: None, generator: torch.Generator) -> dict[str, Points]:
        amplitude, phase = torch.rand(2, generator=generator) * torch.tensor([4.9, torch.pi])
        inputs = 10 * torch.rand(3 * self.shots, 1, generator=generator) - 5
        targets = (amplitude + 0.1) * (inputs - phase)[:, 0].sin()
        known, new = slice(self.shots), slice(self.shots, None)
        return {"known": (inputs[known], targets[known]), "new": (inputs[new], targets[new])}

    def predict(self, inputs: Tensor) -> Tensor:
        prediction: Tensor = self.upper["features"](inputs) @ self.lower["w"]
        return prediction

    def error(self, points: Points) -> Tensor:
        inputs, targets = points
        return (self.predict(inputs) - targets).square().mean()

    def upper_loss(self, batch: dict[str, Points]) -> Tensor:
        return self.error(batch["new"])

    def lower_loss(self, batch: dict[str, Points]) -> Tensor:
        penalty = self.upper["penalty"]["log"].exp() * self.lower["w"].square().sum()
        return self.error(batch["known"]) + penalty

    @torch.no_grad()
    def best_response(self, batch: dict[str, Points]) -> dict[str, Tensor]:
        inputs, targets = batch["known"]
        features = self.upper["features"](inputs)
        gram = features.T @ features / len(inputs)
        gram += self.upper["penalty"]["log"].exp() * torch.eye(FEATURES)
        return {"w": torch.linalg.solve(gram, features.T @ targets / len(inputs))}


@torch.no_grad()
def error_on_new_tasks(problem: Sinusoid, seed: int) -> float:
    """The squared error on 200 new tasks, each fitted to its ten points."""
    tasks = Tasks(problem, 200)
    batch = tasks.draw(None, torch.Generator().manual_seed(10_000 + seed))
    return hyperobjective(tasks, batch, batch).item()


def main(num_steps: int, seed: int) -> tuple[Sinusoid, Sinusoid]:
    """A problem with learned features, and one with random ones."""
    torch.manual_seed(seed)
    random, problem = Sinusoid(), Sinusoid()
    adam = torch.optim.Adam(problem.upper.parameters(), lr=0.01)
    run = {"solver": Implicit(), "lower_solver": LowerLevel.solution, "upper_optimizer": adam}
    for step in train(Tasks(problem, 25), num_steps=num_steps, seed=seed, **run):  # type: ignore[arg-type]
        if step.number % (num_steps // 4) == 0:
            print(f"step {step.number:4}: loss {step.upper_loss:.3f}", flush=True)
    learned, unlearned = (error_on_new_tasks(p, seed) for p in (problem, random))
    print(
        f"Squared error on new tasks from ten points: {learned:.3f} with learned features, "
        f"{unlearned:.2f} with random ones."
    )
    return problem, random


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(12 if options.small else 400, options.seed)
