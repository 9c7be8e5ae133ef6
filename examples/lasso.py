r"""The elastic net: two penalties tuned by gradients, one of them with a corner.

The data are the ten measurements of scikit-learn's diabetes set with their squares and products, 65
columns of which most are of no use. What is learned (upper level) is the logarithm of an L1 and of an
L2 penalty; the weights $y$ of a linear model answer (lower level), most of them with exact zeros:

    min over x  of  |A' y*(x) - b'|^2 / 2m                                     (validation)
    where y*(x)  =  argmin over y  of  |A y - b|^2 / 2n + exp(x_2)/2 |y|^2 + exp(x_1) |y|_1

The L1 penalty is a constraint `L1(weight)`. Its proximal map is the soft threshold, a lower step of
`SGD` with the rate `proximal_step` is a step of iterative soft thresholding, and `Implicit` solves its
linear system on the weights that are not 0: `Implicit(ConjugateGradient())`.
"""

import argparse
import itertools
import math

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from bilevel import L1, ConjugateGradient, Implicit, Problem, train

Data = tuple[Tensor, Tensor]
Path = list[tuple[float, float]]
START = {"log_l1": -1.0, "log_l2": -1.0}


def load(seed: int) -> list[Data]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(a).double() for a in load_diabetes(return_X_y=True))
    products = [x[:, i] * x[:, j] for i, j in itertools.combinations_with_replacement(range(10), 2)]
    x = torch.cat([x, torch.stack(products, 1)], 1)
    parts = torch.randperm(len(y), generator=generator).split((150, 150, 142))
    (mean, std), (centre, spread) = ((t[parts[0]].mean(0), t[parts[0]].std(0)) for t in (x, y))
    return [((x[rows] - mean) / std, (y[rows] - centre) / spread) for rows in parts]


def error(y: Tensor, data: Data) -> Tensor:
    """Half the mean squared error; of normalised targets, so that 0.5 is that of the mean."""
    return (data[0] @ y - data[1]).square().mean() / 2


def elastic_net(data: Data, log_l1: float, log_l2: float) -> Problem:
    inputs = data[0]
    curvature = float(torch.linalg.matrix_norm(inputs, 2)) ** 2 / len(inputs)
    return Problem.from_functions(
        upper_loss=lambda x, y, data: error(y["w"], data),
        lower_loss=lambda x, y, data: (
            error(y["w"], data) + x["log_l2"].exp() / 2 * y["w"].square().sum()
        ),
        upper={"log_l1": torch.tensor(log_l1).double(), "log_l2": torch.tensor(log_l2).double()},
        lower={"w": torch.zeros(inputs.shape[1]).double()},
        constraints=lambda x: {"w": L1(x["log_l1"].exp())},
        proximal_step=1 / (curvature + 1),
    )


def fit(data: Data, log_l1: float, log_l2: float, steps: int = 500) -> Tensor:
    """The weights at given penalties, by as many proximal steps (accelerated)."""
    inputs, targets = data
    step = elastic_net(data, log_l1, log_l2).proximal_step
    gram, moment = inputs.mT @ inputs / len(inputs), inputs.mT @ targets / len(inputs)
    penalty, l2 = L1(math.exp(log_l1)), math.exp(log_l2)
    w = ahead = torch.zeros(inputs.shape[1]).double()
    for k in range(steps):
        before, w = w, penalty.prox(ahead - step * (gram @ ahead - moment + l2 * ahead), step)
        ahead = w + k / (k + 3) * (w - before)
    return w


def main(num_steps: int, grid: int, seed: int) -> tuple[Path, Path]:
    """L1 penalties and validation errors: on the way, and on a grid at the tuned L2 penalty."""
    training, validation, test = load(seed)
    problem = elastic_net(training, **START)
    optimizer = torch.optim.Adam(problem.upper.parameters(), lr=0.2)
    way: Path = []
    for step in train(
        problem,
        training,
        upper_data=validation,
        solver=Implicit(ConjugateGradient()),
        upper_optimizer=optimizer,
        upper_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
        lower_optimizer=torch.optim.SGD(problem.lower.parameters(), lr=problem.proximal_step),
        lower_steps=100,
        num_steps=num_steps,
    ):
        found = {name: float(x.detach()) for name, x in problem.variables("upper").items()}
        way.append((found["log_l1"], float(step.upper_loss)))
        if step.number % (num_steps // 5) == 0:
            used = int((problem.variables("lower")["w"] != 0).sum())
            print(f"step {step.number:3}: validation error {step.upper_loss:.4f}, {used} weights")
    tuned = fit(training, **found)
    lattice = torch.linspace(-6, 0, grid).tolist()
    tried = {pair: fit(training, *pair) for pair in itertools.product(lattice, lattice)}
    best = min(tried, key=lambda pair: float(error(tried[pair], validation)))
    curve = [(l1, float(error(fit(training, l1, found["log_l2"]), validation))) for l1 in lattice]
    for name, w in [("tuned", tuned), (f"best of {grid}x{grid}", tried[best])]:
        print(
            f"{name:14} validation {error(w, validation):.4f}, test {error(w, test):.4f}, "
            f"{int((w != 0).sum())} of {len(w)} weights are not 0"
        )
    text = "Two penalties tuned in {} steps: validation error {:.4f}; best of {} on a grid {:.4f}."
    numbers = error(tuned, validation), len(tried), error(tried[best], validation)
    print(text.format(num_steps, *numbers))
    return way, curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(*((10, 4) if options.small else (40, 12)), options.seed)
