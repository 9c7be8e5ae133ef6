"""Training steps and a solver's pieces of work as compiled graphs; it knows torch alone.

`CompiledStep` is a step that writes: variables, buffers, an optimizer's state. A `UnitRunner` runs what
a solver repeats, functions that write nothing. Behind them: `guards` (what a graph takes for granted),
`settings` (the optimizers' numbers), `lowering` (tracing and compiling), `split` (what is computed once
and what is repeated) and `cuda_graph`. What would look at a tensor's value asks `known`.
"""

from bilevel.compile.compiled_step import CompiledStep
from bilevel.compile.compiled_units import CompiledUnits
from bilevel.compile.tracing import is_tracing, known, traced
from bilevel.compile.units import EagerUnits, Stage, UnitRunner

__all__ = [
    "CompiledStep",
    "CompiledUnits",
    "EagerUnits",
    "Stage",
    "UnitRunner",
    "is_tracing",
    "known",
    "traced",
]
