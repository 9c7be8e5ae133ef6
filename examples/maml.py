r"""MAML: initial weights from which a sine wave is learned in a few gradient steps.

A task is a sine wave of random amplitude and phase, known at ten points. What is learned (upper
level) are initial weights $x$ that all tasks share; a task's own answer (lower level) is a
displacement $y_i$ from them, found by $T$ gradient steps from zero on its ten points:

    min over x  of  mean_i loss(x + y_i(x); new points of task i)
    where y_i(x)  =  T gradient steps from y_i = 0 on  loss(x + y_i; ten points of task i)

The lower level is not to be solved, so the solver that fits is `Unrolled`, from displacements that
stay at zero. `Alternating` ignores that tasks will adapt: ordinary pre-training on all of them.
"""

import argparse

import torch
import torchopt
from torch import Tensor, nn

from bilevel import Alternating, Problem, Solver, Unrolled, train

STEPS, RATE = 5, 0.01
Batch = dict[str, tuple[Tensor, Tensor]]


class Sinusoids(Problem):
    def __init__(self, tasks: int, shots: int = 10) -> None:
        super().__init__()
        self.tasks, self.shots = tasks, shots
        self.upper: nn.ParameterList = nn.ParameterList()
        self.lower: nn.ParameterList = nn.ParameterList()
        for m, n in ((1, 40), (40, 40), (40, 1)):
            self.upper.extend([torch.randn(m, n) / m**0.5, torch.zeros(1, n)])
            self.lower.extend([torch.zeros(tasks, m, n), torch.zeros(tasks, 1, n)])

    def draw(self, data: None, generator: torch.Generator) -> Batch:
        def uniform(low: float, high: float, points: int = 1) -> Tensor:
            unit = torch.rand(self.tasks, points, 1, generator=generator)
            return low + (high - low) * unit

        amplitude, phase = uniform(0.1, 5), uniform(0, torch.pi)
        known, new = uniform(-5, 5, self.shots), uniform(-5, 5, 2 * self.shots)
        return {n: (x, amplitude * (x - phase).sin()) for n, x in (("known", known), ("new", new))}

    def predict(self, h: Tensor) -> Tensor:
        """What every task says, each with its own displaced weights."""
        weights = [self.upper[i] + self.lower[i] for i in range(len(self.upper))]
        for i in range(0, len(weights), 2):
            h = torch.baddbmm(weights[i + 1], h if i == 0 else h.relu(), weights[i])
        return h

    def losses(self, points: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error of every task."""
        inputs, targets = points
        return (self.predict(inputs) - targets).square().mean((1, 2))

    def upper_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch["new"]).mean()

    def lower_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch["known"]).sum()  # the tasks do not feel one another


def learn(solver: Solver, num_steps: int, seed: int) -> Sinusoids:
    torch.manual_seed(seed)
    problem = Sinusoids(tasks=25)
    adam = torch.optim.Adam(problem.upper.parameters(), lr=2e-3)
    run = {"solver": solver, "upper_optimizer": adam, "lower_steps": 0, "seed": seed}
    for step in train(problem, num_steps=num_steps, **run):  # type: ignore[arg-type]
        if step.number % (num_steps // 4) == 0:
            print(f"{type(solver).__name__:11} step {step.number:5}: loss {step.upper_loss:.3f}")
    return problem


def adapted(learned: Sinusoids, seed: int) -> tuple[Sinusoids, Batch]:
    """New tasks, each after its gradient steps from the learned weights."""
    problem = Sinusoids(tasks=600)
    problem.upper.load_state_dict(learned.upper.state_dict())
    batch = problem.draw(None, torch.Generator().manual_seed(10_000 + seed))
    sgd = torch.optim.SGD(problem.lower.parameters(), lr=RATE)
    for _ in range(STEPS):
        sgd.zero_grad()
        problem.lower_loss(batch).backward()
        sgd.step()
    return problem, batch


def test_error(learned: Sinusoids, seed: int) -> float:
    problem, batch = adapted(learned, seed)
    return problem.upper_loss(batch).item()


def main(num_steps: int, seed: int) -> tuple[Sinusoids, Sinusoids]:
    """What MAML learned, and what pre-training did."""
    unrolled = learn(Unrolled(STEPS, optimizer=torchopt.sgd(RATE)), num_steps, seed)
    ours = test_error(unrolled, seed)
    alternating = learn(Alternating(), num_steps, seed)
    joint = test_error(alternating, seed)
    random = test_error(Sinusoids(tasks=25), seed)
    print(
        f"Squared error on new tasks after {STEPS} steps on ten points: {ours:.2f} from MAML's weights,"
        f" {joint:.2f} from pre-trained ones, {random:.2f} from random ones."
    )
    return unrolled, alternating


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(100 if options.small else 2000, options.seed)
