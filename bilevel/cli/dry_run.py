"""What a training would cost, printed before it is paid: `bilevel train ... --dry-run`."""

import copy
import time

import torch

from bilevel import Step
from bilevel.cli.progress import duration
from bilevel.cli.running import Plan
from bilevel.methods.training.footprint import (
    Footprint,
    available,
    bytes_in_words,
    footprint,
    largest_batch,
)
from bilevel.methods.training.preconditions import refuse_small

_LONG = 30.0  # seconds of a first step after which no other is taken
_SPEEDS = (
    0.1,
    1,
    10,
    100,
    400,
)  # TFLOP/s: a laptop's processor ... what an H200 keeps up in bfloat16


def dry_run(plan: Plan, *, there: int | None = None) -> int:
    """Print configuration, data, parameters, operations and memory, time two steps; write nothing.

    Args:
        plan: what would be trained.
        there: bytes there are for it; by default what the system says.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: if there are fewer images than in a batch.
    """
    training, images = plan.training, plan.images
    refuse_small(images.train, training)
    shape = tuple(images.train.shape[1:])
    cost = footprint(
        plan.model, training.batch_size, training=training, solver=plan.solver, shape=shape
    )
    _show("method", f"{type(plan.model).__name__}, {plan.solver!r}")
    _show("model", _pairs(plan.model.recipe or {}))
    _show("training", _pairs(training.model_dump()))
    _show(
        "data",
        f"{images.name}: {len(images.train):,} of {'x'.join(map(str, shape))}, {images.note}",
    )
    bytes_of_data = images.train.numel() * images.train.element_size()
    _show(
        "", f"{bytes_in_words(bytes_of_data)} on the device, {_epochs(plan):,.1f} passes over them"
    )
    for name, count in cost.parameters.items():
        _show("parameters" if name == next(iter(cost.parameters)) else "", f"{count:>13,}  {name}")
    _show("operations", f"{cost.operations:.3g} a step, {_all(plan, cost):.2g} the whole run")
    there = available(plan.model.device) if there is None else there
    if _memory(plan, cost, bytes_of_data, there):
        _timed(plan)
    for speed in _SPEEDS:
        seconds = _all(plan, cost) / (speed * 1e12)
        _show(
            "elsewhere" if speed == _SPEEDS[0] else "",
            f"{duration(seconds):>13}  at {speed:g} TFLOP/s",
        )
    if training.max_seconds is not None:
        _show("", f"{duration(training.max_seconds):>13}  at most (`max_seconds`)")
    print("nothing was trained and nothing was written")
    return 0


def _timed(plan: Plan) -> None:
    """Take a first step, then two more by the clock, of a copy; say how long all would take."""
    print("timing two steps on a copy of the model ...", flush=True)
    moments = [time.perf_counter()]

    def look(step: Step) -> bool:
        float(step.upper_loss)  # waits for the device
        moments.append(time.perf_counter())
        return moments[-1] - moments[0] > _LONG

    idle = ("evaluate_every", "best", "max_seconds", "num_steps")
    settings = {name: value for name, value in plan.settings.items() if name not in idle}
    copy.deepcopy(plan.model).fit(
        plan.images.train,
        num_steps=3,
        solver=plan.solver,
        callbacks=[look],
        progress=False,
        **settings,
    )
    steps = (
        len(moments) - 2 or 1
    )  # without the first, unless it took so long that it is all there is
    seconds = (moments[-1] - moments[-1 - steps]) / steps
    whole = seconds * plan.training.num_steps
    device = plan.model.device
    where = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    _show("time", f"{duration(whole):>13}  here ({where}), at {seconds:.3g} s a step")


def _memory(plan: Plan, cost: Footprint, bytes_of_data: int, there: int | None) -> bool:
    """Say what memory it takes; whether there is enough."""
    parts = {
        "weights": cost.weights,
        "the optimizers' averages": cost.optimizer,
        "gradients": cost.gradients,
        "activations": cost.activations,
    }
    _show(
        "memory",
        f"{bytes_in_words(cost.total):>13}  at the worst moment of a step, data not counted",
    )
    for name, size in parts.items():
        _show("", f"{bytes_in_words(size):>13}  {name}")
    if there is None:
        return True
    room = int(0.9 * there) - bytes_of_data
    text = f"{bytes_in_words(there):>13}  there is on {plan.model.device}"
    if cost.total > room:
        shape = tuple(plan.images.train.shape[1:])
        most = largest_batch(
            plan.model, room, training=plan.training, solver=plan.solver, shape=shape
        )
        text += f": too little; a `--batch-size` of {most} would fit"
    _show("", text)
    return cost.total <= room


def _all(plan: Plan, cost: Footprint) -> float:
    return float(cost.operations) * plan.training.num_steps


def _epochs(plan: Plan) -> float:
    return plan.training.num_steps * plan.training.batch_size / len(plan.images.train)


def _pairs(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _show(label: str, text: str) -> None:
    print(f"{label:<12}{text}")
