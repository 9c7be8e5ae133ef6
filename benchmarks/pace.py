"""How long an image preset takes: trained for some minutes, extrapolated to all steps, looked at.

    python -m benchmarks.pace cifar10 --data cifar10_train.zip --device cuda --seconds 180 \
        --compile record --precision bfloat16

The rate is that of the second half of the time: the first step, in which graphs are made, does not
count. The extrapolation says what `--steps` steps take (300,000 by default). Samples and reconstructions
of the model as it is then are drawn beside the record. `--probe N` first times N steps of each way to
make graphs, and takes the fastest; the record has the times and names it.

Records go to `benchmarks/results/pace.jsonl`, pictures to `benchmarks/results/pace/`.
"""

import argparse
from typing import Any

from benchmarks.images import draw, load
from benchmarks.measuring.bounded import NotDoneError, bounded
from benchmarks.measuring.records import append, command
from benchmarks.measuring.turns import waiting_for
from bilevel.choices import HOWS, how_made
from bilevel.methods.data.images import Images
from bilevel.methods.presets import PRESETS

EAGER = "eager"


def probed(options: argparse.Namespace) -> dict[str, float | str]:
    """Milliseconds of a step for each way to make graphs, or why there are none."""
    found: dict[str, float | str] = {}
    for how in (EAGER, *HOWS):
        try:
            found[how] = bounded(pace_of, options, how, seconds=options.compile_seconds)
        except NotDoneError as error:
            found[how] = str(error)
    return found


def pace_of(options: argparse.Namespace, how: str) -> float:
    """Milliseconds of a step."""
    marks: list[float] = []
    clock = waiting_for(options.device)
    preset = PRESETS[options.preset]
    preset.build(seed=0).to(options.device).fit(
        load(options.data or preset.data, preset).train,
        callbacks=[lambda _: marks.append(clock())],
        progress=False,
        **settings_of(options, num_steps=options.probe + 2, compile=how != EAGER and how),
    )
    return 1e3 * (marks[-1] - marks[1]) / options.probe  # without the first step and before


def settings_of(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The preset's settings with those of the command line."""
    given = {"precision": options.precision, "compile": options.compile, **more}
    kept = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = PRESETS[options.preset].settings(**kept).model_dump()
    return settings


def measured(images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a while; the record's content."""
    probe = probed(options) if options.probe else {}
    times = {how: ms for how, ms in probe.items() if isinstance(ms, float)}
    if times:
        best = min(times, key=times.__getitem__)
        options.compile = best != EAGER and best
    model = PRESETS[options.preset].build(seed=0).to(options.device)
    marks: list[tuple[int, float]] = []
    history = model.fit(
        images.train,
        callbacks=[lambda step: marks.append((step.number, step.seconds))],
        **settings_of(options, max_seconds=options.seconds, num_steps=options.steps),
    )
    early, late = next(m for m in marks if m[1] >= marks[-1][1] / 2), marks[-1]
    rate = (late[0] - early[0]) / (late[1] - early[1]) if late[1] > early[1] else float("nan")
    draw(model, images, options.output.with_suffix("") / options.preset, seed=0)
    return {
        "preset": options.preset,
        "compiled": how_made(options.compile or False, model.device) or EAGER,
        "precision": options.precision or "float32",
        "probe": probe,
        "steps": history.steps,
        "seconds": history.seconds,
        "steps_per_second": rate,
        "all_steps": options.steps,
        "minutes": options.steps / rate / 60,
    }


def main() -> None:
    parser = command("pace", __doc__)
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--data", help="instead of the preset's own source")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--precision")
    parser.add_argument("--compile", nargs="?", const=True, choices=HOWS)
    parser.add_argument("--probe", type=int, default=0, metavar="N")
    parser.add_argument("--compile-seconds", type=float, default=120.0)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    record = measured(load(options.data or preset.data, preset), options)
    append(options.output, record, device=options.device.partition(":")[0])
    print(
        f"{record['compiled']}, {record['precision']}: {record['steps_per_second']:.4g} steps per "
        f"second; {record['all_steps']:,} steps take {record['minutes']:.1f} minutes"
    )


if __name__ == "__main__":
    main()
