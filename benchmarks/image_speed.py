"""What a BiDVL step costs at the published width, beside the straightforward loop, in one run.

    python -m benchmarks.image_speed [--device cpu] [--batch 32] [--rounds 7]
    python -m benchmarks.image_speed --device cuda --batch 100 --steps 50 --peak 990 \
        [--compile-seconds 120] [--profile FILE]

The yardstick is `benchmarks/competitors/transcription.py` in eager float32, on the same networks as one
would write them: every convolution a convolution, torch's spectral norm, contiguous images, Adam with
its defaults. That both move the variables alike is a test (`tests/methods/test_bidvl_parity.py`); here
a step is compared once more, in float64.
Competitors take turns; times are medians of rounds. On CUDA the clock waits for the device at both ends
of a round.

On CUDA the library's step is measured eager, recorded as a CUDA graph and compiled by inductor, each
in float32 and bfloat16. The first step of those two is tried in another process: one that takes longer
than `--compile-seconds`, or runs eager after all, is not timed; the record says why. What inductor has
compiled there comes from its cache here. The goal at batch 100 is at most 5 ms and a fifth of the
straightforward loop's time.

`--peak` is the device's dense bfloat16 rate in TFLOP/s. `--profile` writes where the time of the fastest
step goes, by kernel.

Records go to `benchmarks/results/image_speed.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.competitors.plain_bidvl import same_networks, write_out
from benchmarks.competitors.transcription import PlainBiDVL
from benchmarks.measuring.bounded import NotDoneError, bounded
from benchmarks.measuring.records import append, command
from benchmarks.measuring.turns import Run, in_turns, waiting_for
from benchmarks.pages.images import image_speed_table
from bilevel import Batches, Step, train
from bilevel.choices import Choice
from bilevel.methods import BiDVL
from bilevel.methods.presets import CIFAR10
from bilevel.methods.training.footprint import footprint

TRAINING = CIFAR10.settings()
HOWS: dict[str, Choice] = {"eager": False, "recorded": "record", "compiled": "inductor"}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
GOAL = {"ms": 5.0, "speedup": 5.0}
"""Of a step at batch 100 on CUDA."""


def published() -> BiDVL:
    """A model of the published width."""
    return cast(BiDVL, CIFAR10.build())


def straightforward(model: BiDVL, *, one_pass: bool = False) -> PlainBiDVL:
    """The straightforward loop on a copy of the networks, written out plainly."""
    copied = published()  # not a deep copy, which shares the classes that torch parametrizes
    copied.to(next(model.parameters())).train()
    copied.load_state_dict(model.state_dict())
    write_out(copied)
    return same_networks(copied, TRAINING, one_pass=one_pass)


def library(model: BiDVL, images: Tensor, batch: int, **options: Any) -> Iterator[Step]:
    """The library's training steps on a copy of the model."""
    copied = copy.deepcopy(model).train()
    upper, lower = copied.optimizers(TRAINING)
    return train(
        copied,
        Batches(images, batch, seed=0),
        upper_optimizer=upper,
        lower_optimizer=lower,
        num_steps=10**9,
        order=TRAINING.order,
        check_every=20,
        seed=1,
        **options,
    )


def difference(model: BiDVL) -> float:
    """Largest difference of a variable after one step of both, in float64."""
    model = copy.deepcopy(model).double().cpu().train()
    images = torch.rand(4, *CIFAR10.shape, dtype=torch.double) * 2 - 1
    # one pass, or the power iterations of the two would be at different points
    loop, steps = straightforward(model, one_pass=True), library(model, images, 4)
    state = next(steps).state
    drawn = model.draw(next(Batches(images, 4, seed=0)), torch.Generator().manual_seed(1))
    loop.step(drawn.visible, drawn.latent, drawn.noise)
    ours = state.problem.upper.parameters()
    theirs = loop.energy.parameters()
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def competitors(model: BiDVL, batch: int, device: str) -> dict[str, Run]:
    """One step of each, by name; the first is the yardstick."""
    images = torch.rand(10 * batch, *CIFAR10.shape, device=device) * 2 - 1
    loop = straightforward(model)

    def by_hand() -> None:
        rows = torch.randint(len(images), (batch,), device=device)
        latent, noise = torch.randn(2, batch, model.latent_dim, device=device)
        loop.step(images[rows], latent, noise)

    runs: dict[str, Run] = {"straightforward, eager float32": by_hand}
    for how, precision in kinds(device):
        options = {"compile": HOWS[how], "precision": PRECISIONS[precision]}
        steps = library(model, images, batch, **options)
        runs[named(how, precision)] = partial(next, steps)
    return runs


def kinds(device: str) -> list[tuple[str, str]]:
    """How the library's steps are run on a device, and in which precision."""
    if device == "cuda":
        return list(itertools.product(HOWS, PRECISIONS))
    return [("eager", "float32")]


def named(how: str, precision: str) -> str:
    """The name of the library's step in the table."""
    return f"this library, {how} {precision}"


def first_step(device: str, batch: int, how: str, precision: str) -> float:
    """Seconds of a first step, in which graphs are made."""
    torch.backends.cudnn.benchmark = True
    run = competitors(published().to(device).train(), batch, device)[named(how, precision)]
    clock = waiting_for(device)
    start = clock()
    run()
    return clock() - start


def profile(run: Run, device: str) -> str:
    """Where a step's time goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(5):
            run()
        waiting_for(device)()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a step, then time all competitors; the record's content."""
    device, batch = options.device, options.batch
    model = published().to(device).train()
    apart = difference(model)
    runs = competitors(model, batch, device)
    firsts: dict[str, float] = {}
    not_done: dict[str, str] = {}
    for how, precision in kinds(device):
        name = named(how, precision)
        if how == "eager":
            continue
        try:
            limit = options.compile_seconds
            firsts[name] = bounded(first_step, device, batch, how, precision, seconds=limit)
        except NotDoneError as error:
            not_done[name] = str(error)
            del runs[name]
    taken = in_turns(
        runs, options.rounds, warm_up=1, repeats=options.steps, clock=waiting_for(device)
    )
    first = next(iter(runs))
    numbers = [
        {
            "name": name,
            "ms": 1e3 * median(seconds),
            "speedup": median(a / b for a, b in zip(taken[first], seconds, strict=True)),
            "first": firsts.get(name),
        }
        for name, seconds in taken.items()
    ]
    if options.profile:
        fastest = min(numbers, key=lambda n: float(n["ms"]))["name"]
        options.profile.write_text(profile(runs[str(fastest)], device), encoding="utf-8")
    return {
        "device_kind": device,
        "batch": batch,
        "rounds": options.rounds,
        "operations": footprint(model, batch, training=TRAINING).operations,
        "peak_tflops": options.peak,
        "difference": apart,
        "numbers": numbers,
        "not_done": not_done,
        "goal": GOAL if device == "cuda" and batch == 100 else None,
    }


def main() -> None:
    parser = command("image_speed", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="per round")
    parser.add_argument(
        "--compile-seconds", type=float, default=120.0, help="of a first step (%(default)s)"
    )
    parser.add_argument("--peak", type=float, help="of the device, in TFLOP/s")
    parser.add_argument("--profile", type=Path, help="file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # for all competitors
    append(options.output, measure(options), device=options.device)
    print(image_speed_table(options.output))


if __name__ == "__main__":
    main()
