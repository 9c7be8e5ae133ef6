"""`split`: a traced function cut in two, what does not depend on some of its inputs and the rest.

A solver repeats a piece of work with some inputs fixed: products with one Hessian, at many vectors. What
depends on the fixed inputs alone (the loss, its gradient) is computed once, and what the rest needs of
it, the *residuals*, is handed over.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

from torch import Tensor

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

_VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "expand",
    "permute",
    "select.int",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unsqueeze",
    "unbind",
    "view",
    "_unsafe_view",
}


@final
@dataclass(frozen=True)
class TwoParts:
    """A function of (fixed, moving) in two parts.

    Attributes:
        before: fixed inputs -> early outputs, then residuals.
        after: residuals, then moving inputs -> late outputs.
        count: number of early outputs.
        kept: where each residual comes from: fixed input number i, or `None` for the next one that
            `before` returns.
    """

    before: "GraphModule"
    after: "GraphModule"
    count: int
    kept: tuple[int | None, ...]

    def residuals(self, fixed: Sequence[Tensor], computed: Sequence[Tensor]) -> list[Tensor]:
        """What `after` takes first."""
        new = iter(computed)
        return [next(new) if place is None else fixed[place] for place in self.kept]


def split(graph: "GraphModule", moving: Sequence[bool], early: int) -> TwoParts:
    """Cut a traced function.

    Args:
        graph: the function; its outputs are the early ones, then the late ones.
        moving: for each input whether it is a moving one.
        early: number of outputs that do not depend on moving inputs.

    Raises:
        ValueError: if an early output depends on a moving input.
    """
    from torch.fx import GraphModule

    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    outputs: list[Any] = list(nodes[-1].args[0])
    late = _reached({n for n, moves in zip(inputs, moving, strict=True) if moves}, nodes)
    if any(out in late for out in outputs[:early]):
        raise ValueError("an early output depends on what moves")
    fixed = {n: i for i, n in enumerate(n for n in inputs if n not in late)}
    after, crossing = _after(graph, late, outputs[early:])
    kept = tuple(fixed.get(node) for node in crossing)
    computed = [node for node in crossing if node not in fixed]
    before = _before(nodes, late, [*outputs[:early], *computed])
    return TwoParts(GraphModule(graph, before), GraphModule(graph, after), early, kept)


def _reached(start: set["Node"], nodes: Sequence["Node"]) -> set["Node"]:
    late = set(start)
    for node in nodes:
        if node.op != "output" and any(n in late for n in node.all_input_nodes):
            late.add(node)
    return late


def _before(nodes: Sequence["Node"], late: set["Node"], outputs: Sequence["Node"]) -> "Graph":
    from torch.fx import Graph

    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in nodes:
        if node.op != "output" and node not in late:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return graph


def _after(
    whole: "GraphModule", late: set["Node"], outputs: Sequence["Node"]
) -> tuple["Graph", list["Node"]]:
    """The graph of the rest, and the nodes of the first part that it takes."""
    from torch.fx import Graph

    wanted = _needed(whole, late, outputs)
    crossing = [node for node in whole.graph.nodes if node in wanted and not _cheap(node, late)]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for i, node in enumerate(crossing):
        copies[node] = graph.placeholder(f"residual_{i}")
    moving = [n for n in whole.graph.nodes if n.op == "placeholder" and n in late]
    for node in (*moving, *whole.graph.nodes):
        if node not in copies and node.op != "output" and (node in late or node in wanted):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return graph, crossing


def _needed(whole: "GraphModule", late: set["Node"], outputs: Sequence["Node"]) -> set["Node"]:
    """The nodes of the first part that the rest takes, or computes again because they cost nothing."""
    waiting = [n for node in late for n in node.all_input_nodes if n not in late]
    waiting += [node for node in outputs if node not in late]
    wanted: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in wanted:
            wanted.add(node)
            if _cheap(node, late):
                waiting += node.all_input_nodes
    return wanted


def _cheap(node: "Node", late: set["Node"]) -> bool:
    """Whether a node is computed again rather than handed over: a view, or no tensor goes in."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node in late:
        return False
    if node.target is operator.getitem:
        return _cheap(cast(Any, node.args[0]), late)
    name = str(node.target).removeprefix("aten.").removesuffix(".default")
    views = name in _VIEWS or name.partition(".")[0] in _VIEWS
    return views or (not node.all_input_nodes and not _mutable(node))


def _mutable(node: "Node") -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)
