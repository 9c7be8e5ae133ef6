"""What one of several processes does in `test_distributed.py`, and the one it is compared with.

python -m tests.distributed_worker RANK RANKS RENDEZVOUS FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import optree
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel import GMRES, Batches, Implicit, Problem, Solver, Unrolled, train
from bilevel.methods import BiDVL
from bilevel.sync_batch_norm import synchronise_batch_norm
from tests.solver_rows import ROWS as SOLVER_ROWS
from tests.solver_rows import Optimizer

SOLVERS: dict[str, Solver] = {
    "implicit": Implicit(GMRES(max_steps=25, damping=1.0)),
    "unrolled": Unrolled(num_steps=3),
    "recompute": Unrolled(num_steps=3, mode="recompute"),
    "truncated": Unrolled(num_steps=3, truncate=2),
    "forward": Unrolled(num_steps=3, mode="forward"),
}
OF_THE_CONTRACT = {f"contract: {name}": row for name, row in SOLVER_ROWS.items() if not row.alone}
IMAGES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()


class Cleaning(Problem):
    """A non-quadratic problem whose batches weigh rows differently, so that shares differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.upper = nn.Linear(3, 1).double()
        self.lower = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def upper_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        loss = (self.lower(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss, {"sum": batch.sum(), "rows": len(batch)}

    def lower_loss(self, batch: Tensor) -> Tensor:
        weights = self.upper(batch).exp()
        error = (self.lower(batch) - batch.prod(1, keepdim=True)).square()
        ridge = sum(p.square().sum() for p in self.lower.parameters())
        return (weights * error).mean() + 0.1 * ridge


def adam(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.Adam(problem.lower.parameters(), 0.01)


def cleaned(
    solver: Solver, *, optimizer: Optimizer | None = None, compile: bool = False
) -> dict[str, Any]:
    """The variables after two steps, and what the solver kept."""
    problem = Cleaning()
    steps_taken = train(
        problem,
        Batches(ROWS, 6, seed=0),
        solver=solver,
        upper_optimizer=torch.optim.SGD(problem.upper.parameters(), 0.1),
        lower_optimizer=(optimizer or adam)(problem),
        num_steps=2,
        compile=compile,
        throw=False,
    )
    *_, last = steps_taken
    mean = last.logs["sum"] / last.logs["rows"]
    kept = [
        leaf for leaf in optree.tree_leaves(last.state.solver_state) if isinstance(leaf, Tensor)
    ]
    mine = {f"auxiliary {i}": leaf for i, leaf in enumerate(kept) if leaf.is_floating_point()}
    return {**problem.state_dict(), "loss": last.upper_loss, "mean": mean, **mine}


def trained(folder: Path | None, steps: int, resume: Path | None = None) -> dict[str, Any]:
    """A small BiDVL with synchronised batch norm; a checkpoint after two steps."""
    model = BiDVL.for_images((1, 8, 8), latent_dim=3, width=4).double().train()
    synchronise_batch_norm(model)
    adam = {"lr": 1e-3, "betas": (0.0, 0.9)}
    steps_taken = train(
        model,
        Batches(IMAGES, 8, seed=0),
        upper_optimizer=torch.optim.Adam(model.upper.parameters(), **adam),
        lower_optimizer=torch.optim.Adam(model.lower.parameters(), **adam),
        num_steps=steps,
        order="upper_first",
        ema=0.5,
        resume=resume,
    )
    for step in steps_taken:
        if folder is not None and step.number == 2:
            step.state.save(folder / "two.pt")
    assert step.state.average is not None
    average = {f"average.{n}": t for n, t in step.state.average.state_dict().items()}
    return {**model.state_dict(), **average}


def everything(folder: Path | None) -> dict[str, dict[str, Any]]:
    """All that is compared, by name."""
    return {
        "bidvl": trained(folder, 4),
        **{name: cleaned(solver) for name, solver in SOLVERS.items()},
        **{n: cleaned(r.solver, optimizer=r.optimizer) for n, r in OF_THE_CONTRACT.items()},
        "compiled": cleaned(Unrolled(num_steps=1), compile=True),
    }


def main() -> None:
    rank, ranks, rendezvous, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(ranks)
    )
    torch.save(everything(Path(folder)), Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo may abort at the interpreter's exit


if __name__ == "__main__":
    main()
