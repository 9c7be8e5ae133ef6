"""`Scalars`: where an iteration keeps its numbers - inner products, norms, what it decided.

On a GPU a number that Python looks at must be waited for, so there numbers and decisions stay tensors.
On a processor nothing waits, and Python's arithmetic with two numbers takes a tenth of the time of
torch's with two tensors of one entry. Both round every operation to the dtype of the vectors, so that
iterates are the same to the bit.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

Number: TypeAlias = Any  # a tensor without dimensions, or a number of NumPy's
_KINDS = {torch.float32: np.float32, torch.float64: np.float64}


class Scalars(ABC):
    """How numbers are kept; `+ - * /`, `<`, `|`, `&` and `~` work with all of them."""

    @abstractmethod
    def of(self, tensor: Tensor) -> Number:
        """The number in a tensor without dimensions."""

    @abstractmethod
    def constant(self, value: float) -> Any:
        """A setting, to be compared with numbers and multiplied by them."""

    @abstractmethod
    def times(self, number: Number, vector: Tensor) -> Tensor:
        """The product of a number and a vector."""

    @abstractmethod
    def pick(self, condition: Number, yes: Any, no: Any) -> Any:
        """One of two numbers or vectors."""

    @abstractmethod
    def larger(self, a: Number, b: Number) -> Number:
        """The larger of two numbers; NaN if one is."""

    @abstractmethod
    def smaller(self, a: Number, b: Number) -> Number:
        """The smaller of two numbers; NaN if one is."""

    @abstractmethod
    def root(self, number: Number) -> Number:
        """The square root."""

    @abstractmethod
    def finite(self, number: Number) -> Number:
        """Whether a number is neither infinite nor NaN."""

    @abstractmethod
    def zero(self, like: Number) -> Number:
        """Zero."""

    @abstractmethod
    def false(self, like: Number) -> Number:
        """What is not the case."""

    @abstractmethod
    def read(self, *numbers: Number) -> list[float]:
        """The numbers as Python's, in one wait."""

    @abstractmethod
    def quiet(self) -> AbstractContextManager[Any]:
        """A context in which a division by zero is infinite or NaN, without a warning."""


@final
class OnDevice(Scalars):
    """Numbers are tensors, and nothing is waited for."""

    def of(self, tensor: Tensor) -> Number:
        return tensor

    def constant(self, value: float) -> Any:
        return value

    def times(self, number: Number, vector: Tensor) -> Tensor:
        product: Tensor = number * vector
        return product

    def pick(self, condition: Number, yes: Any, no: Any) -> Any:
        return torch.where(condition, yes, no)

    def larger(self, a: Number, b: Number) -> Number:
        return torch.maximum(a, b)

    def smaller(self, a: Number, b: Number) -> Number:
        return torch.minimum(a, b)

    def root(self, number: Number) -> Number:
        return number.sqrt()

    def finite(self, number: Number) -> Number:
        return number.isfinite()

    def zero(self, like: Number) -> Number:
        return torch.zeros_like(like)

    def false(self, like: Number) -> Number:
        return torch.zeros((), dtype=torch.bool, device=like.device)

    def read(self, *numbers: Number) -> list[float]:
        found: list[float] = torch.stack(numbers).tolist()
        return found

    def quiet(self) -> AbstractContextManager[Any]:
        return nullcontext()


@final
class AtHand(Scalars):
    """Numbers are NumPy's.

    Args:
        dtype: of the vectors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._kind: Any = _KINDS[dtype]
        self._zero = self._kind(0)

    def of(self, tensor: Tensor) -> Number:
        return self._kind(tensor.item())

    def constant(self, value: float) -> Any:
        return self._kind(value)

    def times(self, number: Number, vector: Tensor) -> Tensor:
        return vector * float(number)

    def pick(self, condition: Number, yes: Any, no: Any) -> Any:
        return yes if condition else no

    def larger(self, a: Number, b: Number) -> Number:
        return a if a >= b or a != a else b

    def smaller(self, a: Number, b: Number) -> Number:
        return a if a <= b or a != a else b

    def root(self, number: Number) -> Number:
        return self._kind(math.sqrt(number))

    def finite(self, number: Number) -> Number:
        return np.bool_(math.isfinite(number))

    def zero(self, like: Number) -> Number:
        return self._zero

    def false(self, like: Number) -> Number:
        return np.False_

    def read(self, *numbers: Number) -> list[float]:
        return [float(number) for number in numbers]

    def quiet(self) -> AbstractContextManager[Any]:
        return np.errstate(all="ignore")


def scalars_for(operator: Any, vector: Tensor) -> Scalars:
    """How to keep the numbers of an iteration with products of this operator.

    Args:
        operator: its attribute `at_once` says that products are there when they are asked for and have
            no graph, as those of a graph to be compiled and of a matrix to be learned are not.
        vector: a vector it takes.
    """
    at_once = getattr(operator, "at_once", False) and vector.device.type == "cpu"
    return AtHand(vector.dtype) if at_once and vector.dtype in _KINDS else OnDevice()


def bent_or_flat(
    s: Scalars, curvature: Number, pp: Number, stretched: Number, reach: Number, eps: float
) -> tuple[Number, Number]:
    """Whether the curvature p^T A p is negative, and whether it is zero to rounding.

    The product A p carries an error of about eps |A| |p|, so a smaller |p^T A p| / |p|^2 is zero as
    far as one can tell. If A is positive semidefinite, then |A p|^2 <= |A| p^T A p is about
    eps |A|^2 |p|^2: where A p is far longer than that, some other direction is one of negative
    curvature.
    """
    noise = s.constant(eps) * s.root(reach) * pp
    zero = abs(curvature) <= noise
    short = stretched <= s.constant(100 * eps) * reach * pp
    return (curvature < -noise) | (zero & ~short), zero & short
