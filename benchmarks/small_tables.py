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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.records import append, command
from bilevel.methods import RBM, AdvIL, GeneralBiDVL
from bilevel.methods.data.tables import load_table

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


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What every method reaches on one set."""
    table = load_table(f"{options.file}:{name}")
    columns = table.train.shape[1]
    found: dict[str, Any] = {
        "set": name,
        "columns": columns,
        "independent": independent(table.train, table.test),
    }
    for method in ("AdvIL", "GeneralBiDVL"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            machine, steps = trained(method, columns, table.train, options.seconds, options.hidden)
        with torch.no_grad():
            found[method] = float(machine.log_likelihood(table.test).double().mean())
        found[f"{method} steps"] = steps
        found[f"{method} warnings"] = sorted({str(w.message)[:80] for w in said})
    return found


def main() -> None:
    parser = command("small_tables", __doc__)
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
        rows.append(row(name, options))
        print(json.dumps(rows[-1]), flush=True)
    content = {"seconds": options.seconds, "hidden": options.hidden, "sets": rows}
    append(options.output, content)


if __name__ == "__main__":
    main()
