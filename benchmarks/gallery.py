"""The pictures of the examples' page and of what compares solvers, from full runs.

    python -m benchmarks.gallery [--only NAME ...] [--into FOLDER]

draws `NAME.png` into `docs/images/examples/`. All of them take about five minutes of a processor core.
"""

import argparse
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.measuring.records import RESULTS
from bilevel import Tasks
from examples import (
    advil_rbm,
    bidvl_rings,
    hypercleaning,
    lasso,
    maml,
    regularization,
    sinusoids,
    two_moons,
)

IMAGES = RESULTS.parent.parent / "docs" / "images" / "examples"
BLUE, ORANGE, GREY = "#1f6fb4", "#d9652b", "#777777"


def draw_regularization(axes: Axes) -> None:
    measured, decoys = (part.sort().values for part in regularization.main(60, 0).split(30))
    axes.semilogy(measured, "o", color=BLUE, markersize=4, label="measurements")
    axes.semilogy(decoys, "s", color=ORANGE, markersize=4, label="decoys")
    axes.set(xlabel="features, sorted", ylabel="tuned penalty", xticks=[])
    axes.legend(frameon=False)


def draw_hypercleaning(axes: Axes) -> None:
    weights, wrong = hypercleaning.main(150, 0)
    parts = [weights[~wrong].tolist(), weights[wrong].tolist()]
    axes.hist(parts, bins=20, color=[BLUE, ORANGE], label=["right labels", "wrong labels"])
    axes.set(xlabel="learned weight of an example", ylabel="examples")
    axes.legend(frameon=False, loc="upper center")


def draw_lasso(axes: Axes) -> None:
    """The validation error over the L1 penalty, and where the gradient steps went."""
    way, curve = lasso.main(40, 12, 0)
    axes.plot(*zip(*curve, strict=True), color=GREY, label="grid, at the tuned L2 penalty")
    axes.plot(*zip(*way, strict=True), "o-", color=BLUE, markersize=3, label="gradient steps")
    axes.set(xlabel="logarithm of the L1 penalty", ylabel="validation error")
    axes.legend(frameon=False, fontsize=8)


def draw_maml(axes: Axes) -> None:
    """One new task: its ten points, and what five steps make of them from either start."""
    starts = maml.main(2000, 0)
    for learned, name, colour in zip(starts, ("MAML", "pre-trained"), (BLUE, ORANGE), strict=True):
        problem, batch = maml.adapted(learned, 0)
        task = int(batch["known"][1].abs().amax((1, 2)).gt(3).nonzero()[0])  # of some amplitude
        line = torch.linspace(-5, 5, 200).expand(problem.tasks, 200)[..., None]
        with torch.no_grad():
            axes.plot(line[task], problem.predict(line)[task], color=colour, label=name)
    known = [part[task].flatten() for part in batch["known"]]
    axes.plot(*known, "o", color="black", markersize=4, label="ten points")
    new = torch.stack([part[task].flatten() for part in batch["new"]], 1)
    axes.plot(*new.T, "x", color=GREY, markersize=5, label="new points")
    axes.set(xlabel="input", ylabel="target")
    axes.legend(frameon=False, fontsize=8)


def draw_sinusoids(axes: Axes) -> None:
    """One new task, fitted in learned features and in random ones."""
    starts = sinusoids.main(400, 0)
    tasks = Tasks(starts[0], 50)
    drawn = tasks.draw(None, torch.Generator().manual_seed(10_000))
    task = int(drawn["known"][1].abs().amax(1).gt(3).nonzero()[0])  # of some amplitude
    batch = tasks.apart(drawn)[task]
    line = torch.linspace(-5, 5, 200)[:, None]
    with torch.no_grad():
        for problem, name, colour in zip(
            starts, ("learned", "random"), (BLUE, ORANGE), strict=True
        ):
            problem.lower["w"].copy_(problem.best_response(batch)["w"])
            axes.plot(line, problem.predict(line), color=colour, label=f"{name} features")
    known = [part.flatten() for part in batch["known"]]
    axes.plot(*known, "o", color="black", markersize=4, label="ten points")
    new = [part.flatten() for part in batch["new"]]
    axes.plot(*new, "x", color=GREY, markersize=5, label="new points")
    axes.set(xlabel="input", ylabel="target", ylim=(-6, 6))
    axes.legend(frameon=False, fontsize=8)


def draw_advil(axes: Axes) -> None:
    found = advil_rbm.main(20.0, 0)
    colours = [GREY, ORANGE, BLUE, BLUE]
    bars = axes.barh(
        list(found), [value - min(found.values()) for value in found.values()], color=colours
    )
    axes.bar_label(bars, [f" {value:.1f} nats" for value in found.values()])
    axes.set(xlabel="nats above independent pixels")
    axes.margins(x=0.35)
    axes.invert_yaxis()


DRAWN: dict[str, Callable[[Axes], None]] = {
    "regularization": draw_regularization,
    "hypercleaning": draw_hypercleaning,
    "lasso": draw_lasso,
    "maml": draw_maml,
    "sinusoids": draw_sinusoids,
    "advil_rbm": draw_advil,
}


def from_notebook(name: str, which: int, path: Path) -> None:
    """One of the pictures among the outputs of a notebook."""
    notebook = json.loads((IMAGES.parents[2] / "examples" / f"{name}.ipynb").read_text("utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    found = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    path.write_bytes(base64.b64decode("".join(found[which])))


def from_page(name: str, found: str, path: Path) -> None:
    """The figure of what a page's Python blocks, run one after the other, leave under a name."""
    text = (IMAGES.parents[1] / f"{name}.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, f"{name}.md", "exec"), names)
    names[found].plot().savefig(path)


WHOLE: dict[str, Callable[[Path], None]] = {  # they draw their own, larger than a page
    "bidvl_rings": lambda path: bidvl_rings.main(800, 0, path),
    "two_moons": lambda path: two_moons.main(2000, 50, path),
    "train_an_eblvm": lambda path: from_notebook("train_an_eblvm", 2, path),
    "trust": lambda path: from_page("trust", "found", path),
    "tune_a_regulariser": lambda path: from_notebook("tune_a_regulariser", 0, path),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*DRAWN, *WHOLE]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--into", type=Path, default=IMAGES, metavar="FOLDER")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.into / f"{name}.png"
        if name in DRAWN:
            figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            DRAWN[name](axes)
            figure.savefig(path)
        else:
            WHOLE[name](path)
            picture = Image.open(path)
            picture = picture.reduce(2) if picture.width > 1500 else picture
            picture.quantize(128).save(path)


if __name__ == "__main__":
    main()
