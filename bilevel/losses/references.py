"""Where tensors lead: through their graph to variables, through their memory to other tensors."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.losses.substitution import undisturbed
from bilevel.problem import Problem
from bilevel.tree import Tree


def tensors(tree: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested containers and dataclasses, each with its path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{path}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from tensors(value, f"{path}[{i}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name), f"{path}.{field.name}")


def reached(roots: Sequence[Tensor], variables: Tree) -> list[str]:
    """The names of those variables, leaves, that the graph of `roots` leads to."""
    names = {id(p): name for name, p in variables.items()}
    found = {id(t) for t in roots if id(t) in names}
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.add(id(leaf))
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)
    return [name for key, name in names.items() if key in found]


def refuse_graphs(problem: Problem, batch: Any, source: str) -> None:
    """Refuse a batch that depends on a variable: its gradient would be lost on the way.

    Args:
        problem: the problem whose variables are meant.
        batch: what its losses will receive.
        source: who made the batch, as a sentence's subject.

    Raises:
        ValueError: naming the variable.
    """
    roots = [t for _, t in tensors(batch) if t.grad_fn is not None or t.requires_grad]
    if not roots:
        return
    with undisturbed():
        names = reached(roots, dict(problem.named_parameters()))
    if names:
        raise ValueError(
            f"{source} depends on the variable `{names[0]}`, and a hypergradient would miss that: "
            "draw noise and data only, and use the variable where the loss is computed (scale the "
            "noise there)"
        )


def refuse_overlaps(problem: Problem) -> None:
    """Refuse variables that share memory with another parameter or buffer.

    Raises:
        ValueError: naming both.
    """
    levels = (problem.upper, problem.lower)
    variables = {id(p) for m in levels for p in m.parameters() if p.requires_grad}
    held = [*problem.named_parameters(), *problem.named_buffers()]
    spans = sorted((*_span(t), i) for i, (_, t) in enumerate(held) if _has_memory(t))
    open_spans: list[tuple[int, int, int]] = []
    for start, end, i in spans:
        open_spans = [span for span in open_spans if span[1] > start]
        for _, _, j in open_spans:
            (one, a), (two, b) = held[j], held[i]
            if (id(a) in variables or id(b) in variables) and _overlap(a, b):
                raise ValueError(
                    f"`{one}` and `{two}` of `{type(problem).__name__}` share memory, so a step of "
                    "one moves the other; give one of them its own, `.clone()`, or tie them by using "
                    "one `nn.Parameter` at both places"
                )
        open_spans.append((start, end, i))


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and tensor.device.type != "meta"
    return plain and tensor.numel() > 0 and tensor.data_ptr() != 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last number of a tensor."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors with crossing spans have a number in common (columns have none)."""
    if a.is_contiguous() or b.is_contiguous() or a.dtype != b.dtype:
        return True
    return bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(tensor: Tensor) -> Tensor:
    start, end = _span(tensor)
    every = torch.arange(start, end, tensor.element_size())
    return every.as_strided(tensor.shape, tensor.stride()).reshape(-1)
