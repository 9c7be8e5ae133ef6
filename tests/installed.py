"""What an installed package must do; `make wheel` runs it in a clean environment.

    python tests/installed.py README.md

No extra is installed there, and no test tool. It takes about half a minute.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import bilevel
from bilevel import Implicit, Problem


def origin() -> None:
    """The package is the installed one, and knows its version."""
    assert bilevel.__version__ == version("bilevel"), bilevel.__version__
    assert Path(bilevel.__file__).is_relative_to(sys.prefix), bilevel.__file__


def closed_form() -> None:
    """y*(x) = x of (y - x)^2, so that d/dx (y*)^2 = 2 x."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    problem = Problem.from_functions(
        upper_loss=lambda x, y, batch: y["y"].square().sum(),
        lower_loss=lambda x, y, batch: (y["y"] - x["x"]).square().sum(),
        upper={"x": x},
        lower={"y": x.clone()},
    )
    grad = Implicit().hypergradient(problem, None, [None]).grad["x"]
    assert torch.allclose(grad, 2 * x, rtol=1e-12, atol=0), grad


def readme(page: Path) -> None:
    """Its Python blocks run as they stand."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True)


def command_line() -> None:
    """A training, samples and a measurement, without the extras."""
    train = (
        "train bidvl --data digits --run run --num-steps 3 --batch-size 10 --width 4 --no-report"
    )
    for command in ("--version", train, "sample run -n 4 --out samples.npz", "evaluate run"):
        subprocess.run([sys.executable, "-m", "bilevel", *command.split()], check=True)


if __name__ == "__main__":
    page = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        # a checkout in the working directory would be imported by the commands
        os.chdir(folder)
        origin()
        closed_form()
        readme(page)
        command_line()
    about = f"bilevel {bilevel.__version__}, torch {torch.__version__}"
    print(f"{about}, Python {sys.version.split()[0]}: fine")
