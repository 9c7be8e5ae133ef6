"""What a hypergradient costs here, in torchopt, in higher and in plain PyTorch, in one run.

    python -m benchmarks.peers [--quick]

All competitors get the same problem, dtype and threads; they take turns, so that a busy machine slows
all of them alike. First their answers are compared in float64, then the time is taken in float32.
Adam's epsilon stands elsewhere in higher than in torch, and the derivative of the first steps is
proportional to it, so higher is compared with its own formula by hand. betty is missing: it cannot be
installed beside a current Python.

Records go to `benchmarks/results/peers.jsonl`; `python -m benchmarks.table` prints them.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.regression import SIZES, Setting, Size, setting
from benchmarks.competitors.hypergradients import CASES, HAND, Answer, Competitor, reference, units
from benchmarks.measuring.records import append, command
from benchmarks.measuring.saved_bytes import SavedBytes
from benchmarks.measuring.turns import in_turns
from benchmarks.pages.peers import peers_table


def differences(case: str, size: Size) -> dict[str, float]:
    """Relative difference of every answer from its reference by hand, in float64."""
    s = setting(size, torch.float64)

    def vector(competitor: Competitor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in competitor(s)()])

    found = {}
    for name, competitor in CASES[case].items():
        truth = vector(reference(case, name))
        found[name] = float((vector(competitor) - truth).norm() / truth.norm())
    return found


def gradient_once(s: Setting) -> Callable[[], Answer]:
    """The unit of cost: one plain gradient of the lower loss."""

    def run() -> Answer:
        x, y = s.leaves()
        return list(torch.autograd.grad(s.lower_loss([p.detach() for p in x], y), y))

    return run


def compare(case: str, size: Size, repeats: int) -> list[dict[str, Any]]:
    """Check the answers of one case, then time it: one entry per competitor."""
    apart = differences(case, size)
    for name, difference in apart.items():
        print(f"{case}, {size.name}: {name} differs by {difference:.1e}")
        # torchopt corrects Adam's bias in float32, whatever the dtype
        assert difference < (1e-2 if "Adam" in case else 1e-8), f"{name} computes something else"
    s = setting(size, torch.float32)
    runs = {name: make(s) for name, make in CASES[case].items()}
    memory = {name: SavedBytes().measure(run) for name, run in runs.items()}
    unit = "unit"
    seconds = in_turns({**runs, unit: gradient_once(s)}, repeats, warm_up=2, shuffle=True)
    taken = {name: [1e3 * one for one in found] for name, found in seconds.items()}
    one = median(taken[unit])
    return [
        {
            "case": case,
            "size": size.name,
            "name": name,
            "ms": median(taken[name]),
            "ratio": median(a / b for a, b in zip(taken[name], taken[HAND], strict=True)),
            "saved_bytes": memory[name],
            "difference": apart[name],
            "units": units(case, name),
            "multiple": median(taken[name]) / (one * units(case, name)),
        }
        for name in runs
    ]


def main() -> None:
    parser = command("peers", __doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 15 if options.quick else options.repeats
    numbers = [n for size in SIZES.values() for case in CASES for n in compare(case, size, repeats)]
    config = {"dtype": "float32", "repeats": repeats, "quick": options.quick}
    append(options.output, {"config": config, "numbers": numbers})
    print(peers_table(options.output))


if __name__ == "__main__":
    main()
