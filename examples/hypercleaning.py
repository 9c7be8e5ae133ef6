r"""Data hyper-cleaning: finding wrong labels with the help of a few right ones.

Forty percent of the training labels in scikit-learn's digits are replaced by a wrong class. What is
learned (upper level) is one logit $x_i$ per training example, and sigmoid(x_i) says how much that
example may count; the classifier $y$ answers (lower level):

    min over x  of  loss(y*(x); small clean set)
    where y*(x)  =  argmin over y  of  mean_i sigmoid(x_i) loss_i(y; noisy set) + decay/2 |y|^2

Examples whose labels pull the classifier away from the clean set lose their weight.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel import ConjugateGradient, Implicit, Problem, train

DECAY = 1e-3
Data = tuple[Tensor, Tensor]


class Cleaning(Problem):
    upper: nn.ParameterDict

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        self.upper = nn.ParameterDict({"logits": torch.zeros(num_examples)})
        self.lower = nn.Linear(64, 10)

    def upper_loss(self, batch: Data) -> Tensor:
        return cross_entropy(self.lower(batch[0]), batch[1])

    def lower_loss(self, batch: Data) -> Tensor:
        each = cross_entropy(self.lower(batch[0]), batch[1], reduction="none")
        weighted: Tensor = (self.upper["logits"].sigmoid() * each).mean()
        return weighted + sum(DECAY / 2 * p.square().sum() for p in self.lower.parameters())


def load(seed: int) -> tuple[Data, Data, Data, Tensor]:
    """Noisy training set, clean validation and test sets, and which labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    parts = torch.randperm(len(x), generator=generator).split((1000, 200, 597))
    training, validation, test = ((x[rows].float() / 16, y[rows]) for rows in parts)
    wrong = torch.rand(1000, generator=generator) < 0.4
    other = training[1] + torch.randint(1, 10, (1000,), generator=generator)
    return (training[0], torch.where(wrong, other % 10, training[1])), validation, test, wrong


def accuracy(weights: Tensor, training: Data, test: Data) -> float:
    """Test accuracy of the classifier that answers to fixed weights."""
    problem = Cleaning(len(weights))
    problem.upper["logits"].data = weights.logit(1e-6)
    adam = torch.optim.Adam(problem.lower.parameters(), lr=0.05)
    for _ in range(300):
        adam.zero_grad()
        problem.lower_loss(training).backward()
        adam.step()
    return float((problem.lower(test[0]).argmax(1) == test[1]).float().mean())


def main(num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The weight of every example, and which labels are wrong."""
    torch.manual_seed(seed)  # first weights of the classifiers
    training, validation, test, wrong = load(seed)
    problem = Cleaning(len(wrong))
    for step in train(
        problem,
        training,
        upper_data=validation,
        solver=Implicit(ConjugateGradient(max_steps=50, rtol=1e-2)),
        upper_optimizer=torch.optim.Adam(problem.upper.parameters(), lr=0.3),
        lower_optimizer=torch.optim.Adam(problem.lower.parameters(), lr=0.05),
        lower_steps=10,
        num_steps=num_steps,
        seed=seed,
    ):
        if step.number % (num_steps // 5) == 0:
            print(f"step {step.number:4}: loss on the clean set {step.upper_loss:.4f}")
    weights = problem.upper["logits"].detach().sigmoid()
    found = weights < 0.5
    precision, recall = wrong[found].float().mean(), found[wrong].float().mean()
    print(f"wrong labels found: precision {precision:.1%}, recall {recall:.1%}")
    cases = (torch.ones_like(weights), weights, (~wrong).float())
    everything, cleaned, oracle = (accuracy(case, training, test) for case in cases)
    print(
        f"Cleaning finds {recall:.0%} of the wrong labels and lifts the test accuracy from "
        f"{everything:.1%} to {cleaned:.1%}; knowing every wrong label would give {oracle:.1%}."
    )
    return weights, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(20 if options.small else 150, options.seed)
