"""What the losses are evaluated in: precision, batches, batch statistics, dropout."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bilevel.check.explaining.page import Diagnosis, Severity, graded
from bilevel.check.explaining.scene import Scene, angle, apart
from bilevel.check.explaining.terms import LOOK, WRONG
from bilevel.losses.references import tensors
from bilevel.sync_batch_norm import BatchNorm
from bilevel.tree import Tree

PRECISION, SAME, STATISTICS, MASKS = "precision", "same batch", "batch statistics", "dropout"


def precision(scene: Scene) -> Iterator[Diagnosis]:
    """How far rounding moves the hypergradient."""
    name = " and ".join(sorted(_kinds(scene)))
    if name == "float64":
        yield Diagnosis(PRECISION, "fine", 0.0, "everything is computed in float64")
        return
    if not scene.double:
        yield Diagnosis(
            PRECISION,
            "fine",
            None,
            f"not measured: the losses cannot be computed in float64 (constants in {name}?)",
        )
        return
    own = {n: g.double() for n, g in scene.given.grad.items()}
    error, cosine = apart(own, scene.answer.grad), angle(own, scene.answer.grad)
    if scene.oracles.lower and not scene.solver.drops_response and not math.isfinite(error):
        error = math.inf
    severity: Severity = graded(error, LOOK, WRONG)
    if scene.negligible(own, scene.answer.grad):
        severity = "fine"
    meaning = (
        f"in {name} the hypergradient is off by {error:.2g} of its length (cosine {cosine:.2f}) from "
        "the same computation in float64"
    )
    change = (
        "keep variables and the linear solve in float32 or float64 (`precision=torch.bfloat16` of "
        "`train` computes the losses alone in it), or damp the system"
    )
    yield Diagnosis(PRECISION, severity, error, meaning, change if severity != "fine" else "")


def _kinds(scene: Scene) -> set[str]:
    kinds = {p.dtype for p in scene.problem.parameters() if p.requires_grad}
    kinds |= {scene.precision} if scene.precision is not None else set()
    return {str(kind).removeprefix("torch.") for kind in kinds}


def same_batch(scene: Scene) -> Iterator[Diagnosis]:
    """Whether both levels see the same data although the upper one only judges the lower one."""
    if not scene.oracles.lower or bool(sum(g.any() for g in scene.direct.values())):
        return
    theirs = [
        t for batch in scene.oracles.lower_batches for _, t in tensors(batch) if t.numel() > 1
    ]
    mine = [t for _, t in tensors(scene.oracles.upper_batch) if t.numel() > 1]
    shared = [t for t in mine if any(_equal(t, other) for other in theirs)]
    if not shared or len(shared) < len(mine):
        return
    yield Diagnosis(
        SAME,
        "look",
        float(len(shared)),
        "both levels see the same rows, and the upper loss judges the lower variables alone: it "
        "learns what fits the data they were fitted to",
        "give the upper level rows of its own (`train(upper_data=...)`)",
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))


def batch_statistics(scene: Scene) -> Iterator[Diagnosis]:
    """Batch norms that see too few numbers, or statistics that no step has ever written."""
    norms = {n: m for n, m in scene.copy.named_modules() if isinstance(m, BatchNorm)}
    seen: dict[str, float] = {}

    def look(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            count = given[0].numel() / given[0].shape[1]
            seen[name] = min(count, seen.get(name, math.inf))

        return hook

    handles = [m.register_forward_pre_hook(look(n)) for n, m in norms.items()]  # type: ignore[arg-type]
    try:
        upper, lower = scene.oracles.upper, scene.oracles.lower
        with scene.twice():
            scene.oracles.evaluate("upper", upper, lower)
            if lower:
                scene.oracles.evaluate("lower", upper, lower)
    finally:
        for handle in handles:
            handle.remove()
    for name, count in seen.items():
        module = norms[name]
        if module.training or module.running_mean is None:
            yield from _few(name, count)
        elif module.num_batches_tracked is not None and not bool(module.num_batches_tracked):
            yield Diagnosis(
                STATISTICS,
                "wrong",
                0.0,
                f"`{name}` normalises by running statistics that no step has written yet (mean 0, "
                "variance 1): it is in `eval()` mode",
                "train in `train()` mode first, or load the statistics with the weights",
            )
            return


def _few(name: str, count: float) -> Iterator[Diagnosis]:
    noise = math.sqrt(2 / max(count - 1, 1e-3))  # of a variance estimated from so many numbers
    severity = graded(noise, 0.36, 0.5)
    if severity == "fine":
        return
    yield Diagnosis(
        STATISTICS,
        severity,
        noise,
        f"`{name}` normalises by the statistics of {count:.0f} numbers, which are uncertain by "
        f"{noise:.0%}: each row's loss, and the lower Hessian, depends on which rows are beside it",
        "use larger batches, `nn.GroupNorm`, or `.eval()` with statistics that were trained",
    )


def dropout(scene: Scene) -> Iterator[Diagnosis]:
    """How far the hypergradient depends on dropout masks."""
    active = [
        n
        for n, m in scene.copy.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    if not active:
        return
    answers: list[Tree] = [scene.given.grad]
    for seed in (scene.seed + 1, scene.seed + 2):
        answer = scene.solver.hypergradient(
            scene.problem,
            scene.upper_batch,
            scene.lower_batches,
            lower_optimizer=scene.rates.lower or None,
            seed=seed,
            throw=False,
        )
        answers.append(answer.grad)
    error = max(apart(other, answers[0]) for other in answers[1:])
    severity = "fine" if error < 1 else "look"
    yield Diagnosis(
        MASKS,
        "look" if severity == "look" else "fine",
        error,
        f"with other masks in `{active[0]}` the hypergradient changes by {error:.2g} of its length",
        "use larger batches or less dropout, or `.eval()` for the hypergradient" * (error >= 1),
    )
