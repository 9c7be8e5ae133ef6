"""What can go wrong, as sentences: outcomes of a numerical procedure and the errors they become."""

import copyreg
import enum
import pickle
from typing import Any

import optree
import torch


class Result(enum.Enum):
    """Outcome of a hypergradient or of a linear solve; the value is the sentence a person reads."""

    SUCCESS = "the computation succeeded"
    NOT_CONVERGED = (
        "the linear solver ended without reaching its tolerance: its steps were used up, or rounding "
        "lets it come no closer (a badly conditioned Hessian, float32); give it more steps, a looser "
        "`rtol`, some `damping` or a `preconditioner`, or ask for the result back with `throw=False`"
    )
    NEGATIVE_CURVATURE = (
        "the lower-level Hessian is not positive definite (a direction of negative curvature was "
        "met), so the lower variables are not at a strict minimum; take more lower steps, add "
        "`damping`, or use `MINRES` or `GMRES` (which take it as it is), `KFAC` (a Gauss-Newton matrix, "
        "which is never negative) or `Unrolled`"
    )
    SINGULAR = (
        "the lower-level Hessian is singular to working precision (the lower loss is flat along some "
        "direction) and no solution of its system was found: the best response is not defined; make the "
        "lower loss strictly convex (a small penalty), add `damping`, or use `Unrolled`"
    )
    DIVERGED = (
        "the iteration diverged: its residual grew beyond the right-hand side; take a smaller "
        "`step_size` (below 2 / largest eigenvalue of the Hessian) or use `ConjugateGradient`"
    )
    BREAKDOWN = (
        "the recursion of the linear solver broke down (it would divide by an inner product that is "
        "zero to rounding), and its best iterate does not meet the tolerance; use `GMRES`, or "
        "`NormalCG` where products with the transposed matrix are there"
    )
    NOT_FINITE = (
        "a NaN or infinite number appeared; look at the losses and their gradients at this point"
    )


class HypergradientError(RuntimeError):
    """A hypergradient whose computation did not succeed; `hypergradient` holds what it got to.

    When it is pickled (as a worker of a process pool does), the tensors of the record come
    without their graphs and on the processor.
    """

    def __init__(self, message: str, hypergradient: Any) -> None:
        super().__init__(message)
        self.hypergradient = hypergradient

    def __reduce__(self) -> tuple[Any, ...]:
        others = {name: value for name, value in vars(self).items() if name != "hypergradient"}
        return _error_with_record, (type(self), self.args, others, _pickled(self.hypergradient))


class DivergenceError(RuntimeError):
    """Training met a NaN or infinite number; `step` and `term` say when and where."""

    def __init__(self, step: int, term: str, value: float, advice: str = "") -> None:
        super().__init__(
            f"training diverged at step {step}: `{term}` is {value}. {advice}".rstrip()
        )
        self.step = step
        self.term = term

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle makes an exception from its message, which is not what `__init__` takes
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another configuration."""


class WriteError(OSError):
    """A file that could not be written: which, why, the space, and what is still whole."""

    def __str__(self) -> str:
        return str(self.args[1])


def _pickled(record: Any) -> bytes:
    """The record as bytes; `None` in its place where a solver keeps what cannot be pickled.

    Bytes, because what is sent between processes otherwise takes tensors by a handle, which is void
    once the sender has ended.
    """

    def plain(leaf: Any) -> Any:
        return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf

    try:
        return pickle.dumps(optree.tree_map(plain, record, namespace="bilevel"))
    except Exception:  # pickle has a dozen ways to refuse; the message must arrive in any case
        return pickle.dumps(None)


def _error_with_record(
    kind: type[HypergradientError], args: tuple[Any, ...], others: dict[str, Any], record: bytes
) -> HypergradientError:
    error = kind.__new__(kind, *args)
    vars(error).update(others, hypergradient=pickle.loads(record))
    return error
