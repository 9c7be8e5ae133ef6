"""What a BiDVL step costs at the published width, beside the straightforward loop, in one run.

    python -m benchmarks.image_speed [--device cpu] [--batch 32] [--rounds 7]
    python -m benchmarks.image_speed --device cuda --batch 100 --peak 990 [--profile FILE]

The yardstick is `benchmarks.transcription` in eager float32, on the same networks as one would write
them: every convolution a convolution, torch's spectral norm, contiguous images, Adam with its
defaults. That both move the variables alike is a test (`tests/methods/test_bidvl_parity.py`); here
a step is compared once more, in float64.
Competitors take turns; times are medians of rounds. On CUDA the clock waits for the device at both ends
of a round.

`--peak` is the device's dense bfloat16 rate in TFLOP/s. `--profile` writes where the time goes, by
kernel.

Records go to `benchmarks/results/image_speed.jsonl`; `python -m benchmarks.table` prints them.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.image_page import image_speed_table
from benchmarks.peers import RESULTS, environment
from benchmarks.transcription import PlainBiDVL
from bilevel import Batches, Step, train
from bilevel.methods import BiDVL
from bilevel.methods.presets import CIFAR10
from bilevel.methods.training.footprint import footprint

Run = Callable[[], None]
TRAINING = CIFAR10.settings()


def plain(model: BiDVL, *, one_pass: bool = False) -> PlainBiDVL:
    """The straightforward loop on a copy of the networks, written out plainly."""
    copied = CIFAR10.build()  # not a deep copy, which shares the classes that torch parametrizes
    assert isinstance(copied, BiDVL)
    copied.to(next(model.parameters())).train()
    copied.load_state_dict(model.state_dict())
    for module in copied.modules():
        if type(module).__name__ == "_WholeConv2d" or hasattr(module, "parametrizations"):
            _write_out(module)
        elif type(module).__name__ == "_WholeConvTranspose2d":
            module.forward = partial(nn.ConvTranspose2d.forward, module)
    copied.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    networks = (copied.network(name) for name in ("energy", "posterior", "generator"))
    upper = torch.optim.Adam(copied.upper.parameters(), TRAINING.upper_lr, TRAINING.betas)
    decay = TRAINING.lower_weight_decay
    lower = torch.optim.Adam(
        copied.lower.parameters(), TRAINING.lower_lr, TRAINING.betas, weight_decay=decay
    )
    return PlainBiDVL(*networks, upper, lower, copied.ratio, copied.latent_weight, one_pass)


def _write_out(module: nn.Module) -> None:
    """A convolution that is computed as one, under torch's own spectral norm if under any."""
    if isinstance(module, nn.Conv2d):
        module.forward = partial(nn.Conv2d.forward, module)
    if not hasattr(module, "parametrizations"):
        return
    ours = module.parametrizations.weight[0]
    u, v = ours._u.clone(), ours._v.clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    nn.utils.parametrizations.spectral_norm(module)
    if isinstance(module, nn.Conv2d):  # theirs has the channels before the pixels
        _, inputs, height, width = module.weight.shape
        v = v.view(height, width, inputs).permute(2, 0, 1).flatten()
    theirs = module.parametrizations.weight[0]
    with torch.no_grad():
        theirs._u.copy_(u)
        theirs._v.copy_(v)


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
    loop, steps = plain(model, one_pass=True), library(model, images, 4)
    state = next(steps).state
    drawn = model.draw(next(Batches(images, 4, seed=0)), torch.Generator().manual_seed(1))
    loop.step(drawn.visible, drawn.latent, drawn.noise)
    ours = state.problem.upper.parameters()
    theirs = loop.energy.parameters()
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def competitors(model: BiDVL, batch: int, device: str) -> dict[str, Run]:
    """One step of each, by name; the first is the yardstick."""
    images = torch.rand(10 * batch, *CIFAR10.shape, device=device) * 2 - 1
    loop = plain(model)

    def straightforward() -> None:
        rows = torch.randint(len(images), (batch,), device=device)
        latent, noise = torch.randn(2, batch, model.latent_dim, device=device)
        loop.step(images[rows], latent, noise)

    runs: dict[str, Run] = {"straightforward, eager float32": straightforward}
    kinds: dict[str, dict[str, Any]] = {"this library, eager float32": {}}
    if device == "cuda":
        kinds["this library, eager bfloat16"] = {"precision": torch.bfloat16}
        kinds["this library, compiled float32"] = {"compile": True}
        kinds["this library, compiled bfloat16"] = {"precision": torch.bfloat16, "compile": True}
    for name, options in kinds.items():
        steps = library(model, images, batch, **options)
        runs[name] = partial(_advance, steps)
    return runs


def _advance(steps: Iterator[Step]) -> None:
    next(steps)


def times(runs: dict[str, Run], steps: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per step of every competitor in every round, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(steps):
                run()
            _wait(device)
            if number:
                taken[name].append((time.perf_counter() - start) / steps)
    return taken


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def profile(run: Run, device: str) -> str:
    """Where a step's time goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(5):
            run()
        _wait(device)
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="per round")
    parser.add_argument("--peak", type=float, help="of the device, in TFLOP/s")
    parser.add_argument("--profile", help="file to write")
    options = parser.parse_args()
    device, batch = options.device, options.batch
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # for all competitors
    model = CIFAR10.build().to(device).train()
    assert isinstance(model, BiDVL)
    apart = difference(model)
    runs = competitors(model, batch, device)
    taken = times(runs, options.steps, options.rounds, device)
    first = next(iter(runs))
    numbers = [
        {
            "name": name,
            "ms": 1e3 * median(seconds),
            "speedup": median(a / b for a, b in zip(taken[first], seconds, strict=True)),
        }
        for name, seconds in taken.items()
    ]
    record = {
        **environment(),
        "device_kind": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "batch": batch,
        "rounds": options.rounds,
        "operations": footprint(model, batch, training=TRAINING).operations,
        "peak_tflops": options.peak,
        "difference": apart,
        "numbers": numbers,
    }
    path = RESULTS.with_name("image_speed.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if options.profile:
        with open(options.profile, "w", encoding="utf-8") as file:
            file.write(profile(list(runs.values())[-1], device))
    print(image_speed_table(path))


if __name__ == "__main__":
    main()
