"""`SideBySide` and conjugate gradients for systems side by side, each with steps of its own.

The Hessian of independent problems side by side is block diagonal. One recursion for the whole of it
would need as many steps as the blocks have eigenvalues together. Here every block has its own inner
products, stops by itself, and gets the iterates it would have alone; a product is one for all.
"""

from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import Result
from bilevel.linear.base import LinearSolution, Operator
from bilevel.linear.scalars import OnDevice, bent_or_flat


@final
class SideBySide:
    """How the vectors of several equal systems lie in one vector.

    Args:
        num: how many systems.
        sizes: sizes of the tensors that make the vector; the first dimension of each counts systems.
    """

    def __init__(self, num: int, sizes: list[int]) -> None:
        self.num = num
        self._sizes = sizes

    def split(self, vector: Tensor) -> Tensor:
        """One row for each system, shape (num, n)."""
        return torch.cat([part.view(self.num, -1) for part in vector.split(self._sizes)], dim=1)

    def join(self, rows: Tensor) -> Tensor:
        """The vector whose rows these are."""
        parts = rows.split([size // self.num for size in self._sizes], dim=1)
        return torch.cat([part.reshape(-1) for part in parts])


def solve_blocks(
    blocks: SideBySide,
    solver: Any,
    goal: float,
    operator: Operator,
    rhs: Tensor,
    guess: Tensor | None,
) -> LinearSolution:
    """`ConjugateGradient.solve` of each block, without a preconditioner.

    The residual is that of the block that is worst off, and so is the result.
    """

    def product(rows: Tensor) -> Tensor:
        out = blocks.split(operator(blocks.join(rows)))
        return out + solver.damping * rows if solver.damping else out

    tiny = torch.finfo(rhs.dtype).tiny
    b = blocks.split(rhs)
    unit = b.abs().amax(dim=1, keepdim=True).clamp_min(tiny).log2().floor().exp2()
    b = b / unit
    scale = _norm(b).clamp_min(tiny)
    w, r, products = torch.zeros_like(b), b, 0
    if guess is not None and guess.shape == rhs.shape:
        start = blocks.split(guess) / unit
        left = b - product(start)
        better = _norm(left) < _norm(b)
        w, r, products = torch.where(better, start, w), torch.where(better, left, b), 1
    here = _Walk(solver, goal, product, scale, w, r / scale)
    steps = 0
    while True:
        walked = here.walk(solver.max_steps - steps)
        steps, products = steps + walked, products + walked + 1
        result = here.settle(b)
        if result is not Result.NOT_CONVERGED or steps >= solver.max_steps or not here.helped:
            worst = here.length.amax()
            value = blocks.join(unit * here.w)
            return LinearSolution(value, result, worst, products, bool(here.negative.any()))
        here = _Walk(solver, goal, product, scale, here.w, here.r, here.length)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    return norms


@final
class _Walk:
    """The recursion of all blocks from iterates w with relative residuals r."""

    def __init__(
        self,
        solver: Any,
        goal: float,
        product: Operator,
        scale: Tensor,
        w: Tensor,
        r: Tensor,
        last: Tensor | None = None,
    ) -> None:
        self._solver, self._goal, self._product, self._scale = solver, goal, product, scale
        self.w, self.r, self._p = w, r, r
        self._start, self._start_r = w, r
        self._rz = _dot(r, r)
        self.length = self._rz.sqrt()
        self._last = torch.full_like(self.length, torch.inf) if last is None else last
        self._best, self._least, self._reach = w, self.length, torch.zeros_like(self.length)
        self.negative = self._flat = torch.zeros_like(self.length, dtype=torch.bool)
        self._enough = max(goal, torch.finfo(r.dtype).eps)
        self.helped = False

    @property
    def _stopped(self) -> Tensor:
        ended = (self.length <= self._enough) | ~self.length.isfinite()
        return ended | self.negative | self._flat

    def walk(self, most: int) -> int:
        """Steps until all blocks have stopped; how many."""
        steps = 0
        while steps < most:
            if steps % self._solver.check_every == 0 and bool(self._stopped.all()):  # waits
                break
            steps += 1
            self._step()
        return steps

    def _step(self) -> None:
        stopped, p, s = self._stopped, self._p, OnDevice()
        Ap = self._product(p)
        curvature, pp, stretched = _dot(p, Ap), _dot(p, p), _dot(Ap, Ap)
        self._reach = torch.maximum(self._reach, stretched / pp)
        eps = torch.finfo(p.dtype).eps
        bent, level = bent_or_flat(s, curvature, pp, stretched, self._reach, eps)
        self.negative = self.negative | (bent & ~stopped)
        self._flat = self._flat | (level & ~stopped)
        frozen = stopped | self.negative | self._flat
        alpha = torch.where(frozen, 0, self._rz / curvature)
        self.w = self.w + self._scale * alpha * p
        self.r = self.r - alpha * torch.where(frozen, 0, Ap)
        rz = _dot(self.r, self.r)
        beta = torch.where(self._rz == 0, 0, rz / self._rz)
        self._p, self._rz, self.length = self.r + beta * p, rz, rz.sqrt()
        self._best = torch.where(self.length < self._least, self.w, self._best)
        self._least = torch.minimum(self.length, self._least)

    def settle(self, b: Tensor) -> Result:
        """Take the iterates that count and their true residuals, and say how the worst one ended."""
        w = torch.where(self._flat, self._best, self.w)
        r = (b - self._product(w)) / self._scale
        length = _norm(r)
        worse = length > self._last  # a restart that did harm
        self.helped = bool(((length < self._last / 2) & (length > self._goal)).any())
        self.w, self.r = torch.where(worse, self._start, w), torch.where(worse, self._start_r, r)
        self.length = torch.where(worse, self._last, length)
        missed = self.length > self._goal
        for broken, result in (
            (~self.length.isfinite(), Result.NOT_FINITE),
            (self.negative, Result.NEGATIVE_CURVATURE),
            (missed & self._flat, Result.SINGULAR),
        ):
            if bool(broken.any()):
                return result
        exact = self._solver.rtol is None
        return Result.SUCCESS if exact or not bool(missed.any()) else Result.NOT_CONVERGED
