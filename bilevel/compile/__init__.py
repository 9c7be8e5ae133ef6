"""A step of tensors traced once, compiled, and on a GPU captured as a CUDA graph.

It knows torch alone. `Compiled` is what the loop calls; whatever branches on a tensor's value asks
`is_tracing` first. Behind `Compiled`: `guards` (what a graph takes for granted), `settings` (the
optimizers' numbers), `lowering` (tracing and compiling) and `cuda_graph`.
"""

from bilevel.compile.compiled import Compiled
from bilevel.compile.tracing import is_tracing, traced

__all__ = ["Compiled", "is_tracing", "traced"]
