"""What a hypergradient costs here, in torchopt, in higher and in plain PyTorch, in one run.

    python -m benchmarks.peers [--quick]

All competitors get the same problem, dtype and threads; they take turns, so that a busy machine slows
all of them alike. First their answers are compared in float64, then the time is taken in float32.
Adam's epsilon stands elsewhere in higher than in torch, and the derivative of the first steps is
proportional to it, so higher is compared with its own formula by hand. betty is missing: it cannot be
installed beside a current Python.

Records go to `benchmarks/results/peers.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import json
import platform
import random
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_cases import CASES, HAND, Competitor, reference, units
from benchmarks.peer_problem import SIZES, Setting, Size, setting
from benchmarks.table import peers_table

RESULTS = Path(__file__).resolve().parent / "results" / "peers.jsonl"
Run = Callable[[], list[Tensor]]


class SavedBytes:
    """Peak of the bytes that autograd keeps for the backward pass, each storage counted once."""

    def __init__(self) -> None:
        self.peak = self._live = 0
        self._holders: dict[int, int] = {}

    def measure(self, run: Run) -> int | None:
        """The peak during one run; `None` where torch refuses to look (inside `torch.func`)."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor):
                run()
        except RuntimeError:
            return None
        return self.peak

    def _pack(self, tensor: Tensor) -> "_Box":
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self._holders[key] = self._holders.get(key, 0) + 1
        self._live += size if self._holders[key] == 1 else 0
        self.peak = max(self.peak, self._live)
        # detached: an output that its own node holds would never be freed
        return _Box(tensor.detach(), lambda: self._release(key, size))

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self._live -= size if self._holders[key] == 0 else 0


class _Box:
    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        self._release()


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


def gradient_once(s: Setting) -> Run:
    """The unit of cost: one plain gradient of the lower loss."""

    def run() -> list[Tensor]:
        x, y = s.leaves()
        return list(torch.autograd.grad(s.lower_loss([p.detach() for p in x], y), y))

    return run


def times(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every run; in each round all of them take a turn, in random order."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for round_ in range(repeats + 2):
        random.Random(round_).shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            if round_ >= 2:  # the first two rounds warm up
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


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
    taken = times({**runs, unit: gradient_once(s)}, repeats)
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


def environment() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": done.stdout.strip() or None,
        "device": f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("bilevel", "torch", "torchopt", "higher")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 15 if options.quick else options.repeats
    config = {"dtype": "float32", "repeats": repeats, "quick": options.quick}
    record: dict[str, Any] = {"config": config, **environment(), "numbers": []}
    for size in SIZES.values():
        for case in CASES:
            record["numbers"] += compare(case, size, repeats)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(peers_table(options.output))


if __name__ == "__main__":
    main()
