"""What default settings reach on small binary tables in a minute, beside independent columns.

    python -m benchmarks.small_tables FILE.npz [--seconds 60] [--sets dna nips] [--hidden 16]

Every set of the file (arrays `NAME_train` and `NAME_test` or `NAME_valid`) is trained on by AdvIL and
GeneralBiDVL, each with an RBM and nothing but defaults, for so many seconds of one thread, compared with
the exact test log-likelihood of independent columns (Laplace's rule). Likelihoods are exact: the hidden
units are enumerated.

Records go to `benchmarks/results/small_tables.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import json
import warnings

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import RESULTS, environment
from bilevel.methods import RBM, AdvIL, GeneralBiDVL
from bilevel.methods.data.tables import load_table

PATH = RESULTS.with_name("small_tables.jsonl")
FOREVER = 10**6  # steps; the clock ends the run


def independent(train: Tensor, test: Tensor) -> float:
    """Mean test log-likelihood of independent columns, in nats."""
    rate = (train.double().sum(0) + 1) / (len(train) + 2)
    likelihoods = torch.distributions.Bernoulli(rate).log_prob(test.double()).sum(1)
    return float(likelihoods.mean())


def trained(name: str, columns: int, train: Tensor, seconds: float, hidden: int) -> tuple[RBM, int]:
    """A machine after so many seconds with the defaults of a method, and its number of steps."""
    torch.manual_seed(0)
    machine = RBM(columns, hidden)
    learner = AdvIL(machine) if name == "AdvIL" else GeneralBiDVL.for_model(machine)
    history = learner.fit(train, num_steps=FOREVER, max_seconds=seconds)
    return machine, history.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sets", nargs="*")
    parser.add_argument("--hidden", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.file) as file:
        found = sorted({name.rpartition("_")[0] for name in file.files if "_train" in name})
    rows = []
    for name in options.sets or found:
        table = load_table(f"{options.file}:{name}")
        row: dict[str, object] = {
            "set": name,
            "columns": table.train.shape[1],
            "independent": independent(table.train, table.test),
        }
        for method in ("AdvIL", "GeneralBiDVL"):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                machine, steps = trained(
                    method, table.train.shape[1], table.train, options.seconds, options.hidden
                )
            with torch.no_grad():
                row[method] = float(machine.log_likelihood(table.test).double().mean())
            row[f"{method} steps"] = steps
            row[f"{method} warnings"] = sorted({str(w.message)[:80] for w in said})
        print(json.dumps(row), flush=True)
        rows.append(row)
    record = {**environment(), "seconds": options.seconds, "hidden": options.hidden, "sets": rows}
    with PATH.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
