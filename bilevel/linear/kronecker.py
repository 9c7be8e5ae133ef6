r"""Kronecker factors of the curvature of a network, from one evaluation of the lower loss.

Let z be what the network's last layer returns, and $H_z = \sum_k s_k s_k^\top$ the Hessian of the loss
in it, its negative part left out. The Gauss-Newton matrix is $\sum_k J^\top s_k s_k^\top J$. In the
weights of a layer that takes a to W a, one row of the batch adds $\sum_k (g_k a^\top)(g_k a^\top)^\top$
to it, where $g_k$ is $s_k$ taken back to the layer's output.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bilevel.distributed import mean_over_ranks
from bilevel.linear.base import (
    LinearSolution,
    LinearSolver,
    Operator,
    in_own_units,
    outcome,
    refuse_no_system,
    relative,
)
from bilevel.losses.true_gradient import refuse_no_lower_loss
from bilevel.pieces import pieces_of
from bilevel.refusals import positive
from bilevel.tree import Tree

if TYPE_CHECKING:
    from bilevel.oracles import Oracles

Found: TypeAlias = dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]]
"""Weight -> bias (or "") -> eigenvectors of the two factors, and eigenvalues (out, in)."""


@dataclass(frozen=True)
class Kronecker(LinearSolver):
    """Abstract base of the damped inverses made of a network's Kronecker factors.

    Args:
        damping: added to all eigenvalues.
    """

    needs_symmetry: ClassVar[bool] = True
    approximate: ClassVar[bool] = True

    damping: float = 0.01

    def __post_init__(self) -> None:
        positive("damping", self.damping)

    @abstractmethod
    def eigenvalues(self, mine: Tensor, theirs: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The eigenvalues of a layer's block in the eigenbasis of its factors, shape (out, in).

        Args:
            mine: eigenvalues of the factor of the outputs, shape (out,).
            theirs: eigenvalues of the factor of the inputs, shape (in,).
            inputs: rows, places and numbers of what the layer took, in that basis.
            outputs: directions, rows, places and numbers of what came back, in that basis.
        """

    @final
    def prepared(self, oracles: "Oracles") -> LinearSolver:
        what = f"`{type(self).__name__}`"
        refuse_no_lower_loss(oracles.problem, what, "use `GMRES()`, which needs products alone")
        lower, units = oracles.lower, oracles.units
        several = oracles.lower_batches
        parts = [(w / len(several), b) for s in several for w, b in pieces_of(s) or [(1.0, s)]]
        weights = tuple(weight for weight, _ in parts)
        given = ([batch for _, batch in parts], oracles.upper, lower)
        key = type(self).__name__, weights, oracles.precision
        found = units.call(key, partial(self._found, oracles, weights), *map(units.ready, given))
        start, slices = 0, {}
        for name, y in lower.items():
            slices[name] = (start, y.numel())
            start += y.numel()
        places = [(*slices[w], *slices.get(b, (0, 0))) for w, of in found.items() for b in of]
        blocks = [t for of in found.values() for parts in of.values() for t in parts]
        return _Inverse(self.damping, tuple(places), tuple(blocks))

    @final
    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        raise TypeError(
            f"`{type(self).__name__}` reads the layers of a network: it needs the problem, and not only "
            f"products with a matrix; use it as `Implicit({type(self).__name__}())`"
        )

    def _found(
        self,
        oracles: "Oracles",
        weights: Sequence[float],
        batches: Sequence[Any],
        upper: Tree,
        lower: Tree,
    ) -> Found:
        lower = {name: y.detach().requires_grad_() for name, y in lower.items()}
        rows: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        for weight, batch in zip(weights, batches, strict=True):
            here = oracles.on(None, [batch])
            calls = _Calls(lower)
            with calls:
                loss = weight * here.evaluate("lower", upper, lower).loss
            if not calls.made:
                raise ValueError(
                    f"`{type(self).__name__}` found no layer: the lower loss of "
                    f"`{type(oracles.problem).__name__}` calls neither `nn.Linear` nor `nn.Conv2d` with "
                    "a lower variable as its weight; use `Nystrom(rank=...)`, which needs none"
                )
            for call, back in zip(calls.made, _taken_back(loss, calls.made), strict=True):
                rows.setdefault((call.weight, call.bias), []).append((call.inputs, back))
        found: Found = {}
        for (kernel, bias), pairs in rows.items():
            a, g = torch.cat([x for x, _ in pairs]), torch.cat([x for _, x in pairs], dim=1)
            a, g = _wide(a), _wide(g)
            count, places = a.shape[:2]
            factors = [
                torch.einsum("bti,btj->ij", a, a) / count,
                torch.einsum("kbti,kbtj->ij", g, g) / places,
            ]
            first, second = (torch.linalg.eigh(f) for f in mean_over_ranks(factors))
            values = self.eigenvalues(second[0], first[0], a @ first[1], g @ second[1])
            (values,) = mean_over_ranks([values])
            found.setdefault(kernel, {})[bias] = (first[1], second[1], values.clamp_min(0))
        return found


@final
class _Call(NamedTuple):
    weight: str
    bias: str
    inputs: Tensor  # rows, places, numbers; with a 1 for the bias
    output: Tensor


@final
class _Calls(TorchFunctionMode):
    """Notes the layers whose weights are lower variables as they are called."""

    def __init__(self, lower: Tree) -> None:
        super().__init__()
        self._names = {id(y): name for name, y in lower.items()}
        self.made: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is not F.linear and func is not F.conv2d:
            return out
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        weight = self._names.get(id(given["weight"]), "")
        if not weight or given.get("groups", 1) != 1 or isinstance(given.get("padding"), str):
            return out
        bias = self._names.get(id(given.get("bias")), "")
        a = given["input"].detach()
        if func is F.conv2d:
            how = {name: given.get(name, usual) for name, usual in _USUAL.items()}
            a = F.unfold(a, given["weight"].shape[2:], **how).mT
        a = a.reshape(len(a), -1, a.shape[-1])
        if bias:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        self.made.append(_Call(weight, bias, a, out))
        return out.clone()  # what works in place on the output must not reach what is noted


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_USUAL = {"dilation": 1, "padding": 0, "stride": 1}


def _wide(t: Tensor) -> Tensor:
    """The tensor in a dtype that eigenvalues are computed in: a layer may run in bfloat16."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _taken_back(loss: Tensor, calls: Sequence[_Call]) -> list[Tensor]:
    """For each call the vectors g_k: directions, rows, places and numbers.

    Rows of a batch must not reach each other's outputs, or the vectors of one are mixed with another's.
    """
    z = calls[-1].output
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    flat = slope.reshape(len(z), -1)
    bent = [
        torch.autograd.grad(column.sum(), z, retain_graph=True, allow_unused=True)[0]
        if column.requires_grad
        else None
        for column in flat.unbind(dim=1)
    ]
    columns = [torch.zeros_like(flat) if b is None else b.reshape(flat.shape) for b in bent]
    hessian = torch.stack(columns, dim=1).detach()
    values, vectors = torch.linalg.eigh(_wide(hessian + hessian.mT) / 2)
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]
    outputs = [call.output for call in calls]
    parts: list[list[Tensor]] = [[] for _ in calls]
    for direction in roots.unbind(dim=2):
        backs = torch.autograd.grad(
            z, outputs, direction.reshape(z.shape).to(z.dtype), retain_graph=True, allow_unused=True
        )
        for part, output, back in zip(parts, outputs, backs, strict=True):
            back = torch.zeros_like(output) if back is None else back
            if back.ndim == 4:  # of a convolution: its channels are the numbers
                back = back.flatten(2).mT
            part.append(back.reshape(len(back), -1, back.shape[-1]).detach())
    return [torch.stack(part) for part in parts]


@final
@dataclass(frozen=True)
class _Inverse(LinearSolver):
    """The inverse for one linearization.

    Args:
        damping: added to all eigenvalues.
        places: where weight and bias of each block begin in a vector, and how long they are.
        blocks: of each block the eigenvectors of both factors, and its eigenvalues.
    """

    damping: float
    places: tuple[tuple[int, int, int, int], ...]
    blocks: tuple[Tensor, ...] = field(compare=False)

    def solve(
        self, operator: Operator, rhs: Tensor, *, guess: Tensor | None = None
    ) -> LinearSolution:
        refuse_no_system(operator, rhs)
        b, unit = in_own_units(rhs)
        w = self.apply(b, *self.prepare(operator, b, 0.0)[0])
        missing = torch.linalg.vector_norm(b - operator(w) - self.damping * w)
        residual = relative(missing, torch.linalg.vector_norm(b))
        note = ""
        if bool(residual > 1):
            note = (
                "the Hessian differs from its Kronecker factors by more than the damping "
                f"{self.damping:g}; raise it if the Hessian is meant and not a Gauss-Newton matrix"
            )
        return LinearSolution(unit * w, outcome(residual, None), residual, 1, note=note)

    def prepare(
        self, operator: Operator, like: Tensor, damping: float
    ) -> tuple[tuple[Tensor, ...], int]:
        """The preconditioner for `A + damping I`: what it is made of."""
        total = self.damping + damping
        parts = [b + total if i % 3 == 2 else b for i, b in enumerate(self.blocks)]
        return (*parts, torch.full_like(like[0], total)), 0

    def apply(self, r: Tensor, *made: Tensor) -> Tensor:
        """The product with the inverse; variables of no layer are divided by the damping."""
        w = r / made[-1]
        for place, start in zip(self.places, range(0, len(made) - 1, 3), strict=True):
            inward, outward, values = made[start : start + 3]
            weight, size, bias, length = place
            whole = r[weight : weight + size].reshape(len(outward), -1)
            if length:
                whole = torch.cat([whole, r[bias : bias + length, None]], dim=1)
            turned = (outward.mT @ whole @ inward) / values
            whole = outward @ turned @ inward.mT
            parts = [(weight, whole[:, :-1] if length else whole)] + [(bias, whole[:, -1])] * bool(
                length
            )
            for begin, part in parts:
                w = torch.cat([w[:begin], part.reshape(-1), w[begin + part.numel() :]])
        return w
