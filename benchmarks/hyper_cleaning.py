"""Data hyper-cleaning on MNIST by the protocol of PBGD, with every solver that applies.

    python -m benchmarks.hyper_cleaning --data mnist.npz [--seeds N ...] [--only NAME ...]

5,000 items to clean, 5,000 clean ones, 10,000 test items, all from the training images; half of the
labels are drawn anew. `bilevel.check.problems.cleaning` has the protocol, its released slips among it.

The published trainings are far longer: 40,000 upper steps of V-PBGD, 100 of RHG with 500 lower steps
each. These here take some seconds of one core, so that the weights move by Adam. RHG alone keeps the
published optimizer. Two trainings without weights are the floor: on the noisy items (`no cleaning`), and
on the clean items of the upper level alone.

Records go to `benchmarks/results/hyper_cleaning.jsonl`; `python -m benchmarks.table` prints them.
"""

import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.cases.cleaning import ENTRANTS, Entrant
from benchmarks.measuring.records import Record, append, command
from bilevel import train
from bilevel.check.costs import peak_bytes_of
from bilevel.check.problems.case import Case
from bilevel.check.problems.cleaning import cleaning

CLEAN_ONLY = "clean items alone"
CLEAN_STEPS = 300  # of SGD


def trained(entrant: Entrant, case: Case) -> Record:
    """A training, and what came of it."""
    problem, [lower] = case.problem, case.lower_batches
    upper_kind = torch.optim.Adam if entrant.adam else torch.optim.SGD
    lower_optimizer = torch.optim.SGD(problem.lower.parameters(), entrant.lower_rate)
    steps = train(
        problem,
        lower,
        upper_data=case.upper_batch,
        solver=entrant.solver,
        lower_steps=entrant.lower_steps,
        upper_optimizer=upper_kind(problem.upper.parameters(), entrant.upper_rate),
        lower_optimizer=lower_optimizer,
        num_steps=entrant.steps,
        throw=False,
    )
    begun = time.process_time()
    for step in steps:
        last = step
    seconds = time.process_time() - begun
    loss = float(last.upper_loss)
    peak = peak_bytes_of(
        lambda: entrant.solver.hypergradient(
            problem,
            case.upper_batch,
            case.lower_batches,
            lower_optimizer=lower_optimizer,
            throw=False,
        ),
        problem.device,
    )
    _descend(case, "lower", entrant.retrained, lower_optimizer)
    return {"seconds": seconds, "peak_bytes": peak, "upper_loss": loss, **measured(case)}


def measured(case: Case) -> Record:
    """Accuracy and F1."""
    return {} if case.measures is None else dict(case.measures(case.problem))


def _descend(case: Case, what: str, steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Steps of the lower optimizer on the loss of a level."""
    batch = case.upper_batch if what == "upper" else case.lower_batches[0]
    for _ in range(steps):
        optimizer.zero_grad()
        case.problem(what, batch).backward()
        optimizer.step()


def clean_only(case: Case) -> Record:
    """The classifier trained on the clean items of the upper level, without the others."""
    optimizer = torch.optim.SGD(case.problem.lower.parameters(), 0.1)
    begun = time.process_time()
    _descend(case, "upper", CLEAN_STEPS, optimizer)
    return {"seconds": time.process_time() - begun, "accuracy": measured(case)["accuracy"]}


def main() -> None:
    parser = command("hyper_cleaning", __doc__)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="an .npz file with `train_images` and `train_labels`, such as MNIST (default: the digits "
        "of scikit-learn)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="solvers (default: all)")
    parser.add_argument("--network", choices=("linear", "mlp"), default="linear")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # `no cleaning` moves no weight, on purpose
    for seed in options.seeds:
        chosen = [e for e in ENTRANTS if e.network == options.network]
        names = [CLEAN_ONLY, *(e.name for e in chosen)]
        for name in names if options.only is None else options.only:
            case = cleaning(seed, options.data, network=options.network)
            about: Record = {"name": name, "seed": seed, "network": options.network}
            about["data"] = "digits" if options.data is None else Path(options.data).stem
            if name == CLEAN_ONLY:
                found = {**about, "steps": CLEAN_STEPS, **clean_only(case)}
            else:
                entrant = next(e for e in chosen if e.name == name)
                settings = asdict(entrant) | {"solver": repr(entrant.solver)}
                found = {**settings, **about, **trained(entrant, case)}
            numbers = {n: v for n, v in found.items() if isinstance(v, float)}
            print(name, seed, {n: round(v, 2) for n, v in numbers.items()}, flush=True)
            append(options.output, found)


if __name__ == "__main__":
    main()
