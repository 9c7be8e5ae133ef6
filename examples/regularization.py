r"""One penalty per feature: tuning sixty regularization weights of a logistic regression at once.

A grid cannot search sixty dimensions; a hypergradient moves in all of them. The data are the thirty
measurements of scikit-learn's breast-cancer set and, as decoys, the same thirty columns shuffled.
What is learned (upper level) is $x_i$, the logarithm of a feature's L2 penalty above a common floor;
the weights $y$ of the classifier answer (lower level):

    min over x  of  loss(y*(x); validation)
    where y*(x)  =  argmin over y  of  loss(y; training) + 1/2 sum_i (floor + exp(x_i)) y_i^2

The lower problem is small and convex: `Implicit(ConjugateGradient())`.
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bilevel import ConjugateGradient, Implicit, Problem, train

Data = tuple[Tensor, Tensor]
Variables = dict[str, Tensor]
FEATURES, UNTUNED = 60, 1e-3
FLOOR = 1e-2  # without one, a few features that suit the validation patients get weights at will


def load(seed: int) -> list[Data]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(a).double() for a in load_breast_cancer(return_X_y=True))
    x = torch.stack([*x.T, *(c[torch.randperm(len(y), generator=generator)] for c in x.T)], 1)
    parts = torch.randperm(len(y), generator=generator).split((100, 269, 200))
    mean, std = x[parts[0]].mean(0), x[parts[0]].std(0)
    return [((x[rows] - mean) / std, y[rows]) for rows in parts]


def loss(y: Variables, data: Data) -> Tensor:
    return binary_cross_entropy_with_logits(data[0] @ y["weight"] + y["bias"], data[1])


def penalized(penalty: Tensor | float, y: Variables, data: Data) -> Tensor:
    return loss(y, data) + (penalty * y["weight"].square()).sum() / 2


def fit(penalty: Tensor | float, data: Data) -> Variables:
    y = {"weight": torch.zeros(FEATURES).double(), "bias": torch.zeros(()).double()}
    leaves = [tensor.requires_grad_() for tensor in y.values()]
    lbfgs = torch.optim.LBFGS(leaves, max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        lbfgs.zero_grad()
        (value := penalized(penalty, y, data)).backward()
        return value.item()

    lbfgs.step(closure)
    return {name: tensor.detach() for name, tensor in y.items()}


def main(num_steps: int, seed: int) -> Tensor:
    """The tuned penalties: thirty of measurements, then thirty of decoys."""
    training, validation, test = load(seed)
    problem = Problem.from_functions(
        upper_loss=lambda x, y, data: loss(y, data),
        lower_loss=lambda x, y, data: penalized(FLOOR + x["excess"].exp(), y, data),
        upper={"excess": torch.full((FEATURES,), FLOOR).double().log()},
        lower=fit(2 * FLOOR, training),
    )
    for step in train(
        problem,
        training,
        upper_data=validation,
        solver=Implicit(ConjugateGradient(max_steps=200)),
        upper_optimizer=torch.optim.Adam(problem.upper.parameters(), lr=0.1),
        lower_optimizer=torch.optim.Adam(problem.lower.parameters(), lr=0.02),
        lower_steps=20,
        num_steps=num_steps,
    ):
        if step.number % (num_steps // 5) == 0:
            print(f"step {step.number:3}: validation loss {step.upper_loss:.4f}")
    grid = torch.logspace(-4, 0, 13).tolist()
    best = min(grid, key=lambda common: float(loss(fit(common, training), validation)))
    tuned = FLOOR + problem.variables("upper")["excess"].detach().exp()
    errors = []
    for name, penalty in [("untuned", UNTUNED), ("best common", best), ("tuned", tuned)]:
        y = fit(penalty, training)
        right = (test[0] @ y["weight"] + y["bias"] > 0) == test[1].bool()
        errors.append(float(loss(y, test)))
        print(f"{name:12} test log-loss {errors[-1]:.4f}, accuracy {right.double().mean():.1%}")
    text = "Sixty tuned penalties: test log-loss {2:.4f}; untuned {0:.4f}, best common one {1:.4f}."
    print(text.format(*errors))
    return tuned


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(15 if options.small else 60, options.seed)
