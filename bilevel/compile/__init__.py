"""A step of tensors traced once, compiled, and on a GPU captured as a CUDA graph.

It knows torch alone. `Compiled` is what the loop calls; whatever branches on a tensor's value asks
`is_tracing` first. Behind `Compiled`: `guards` (what a graph takes for granted), `settings` (the
optimizers' numbers), `lowering` (tracing and compiling) and `cuda_graph`.
"""

from bilevel.compile.compiled import Compiled
from bilevel.compile.compiled_units import CompiledUnits
from bilevel.compile.tracing import is_tracing, known, traced
from bilevel.compile.units import EagerUnits, Stage, Units

__all__ = [
    "Compiled",
    "CompiledUnits",
    "EagerUnits",
    "Stage",
    "Units",
    "is_tracing",
    "known",
    "traced",
]
