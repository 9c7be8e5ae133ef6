"""What annealed chains say about log Z, with error bars."""

import math
from dataclasses import dataclass, field
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True)
class LogPartition:
    """An estimate of log Z from independent annealed chains.

    Attributes:
        log_weights: log w of every chain, float64, shape (num_chains,); the mean of w estimates Z, or
            1/Z if `reverse`.
        num_temperatures: inverse temperatures from 0 to 1, both counted.
        reverse: whether the chains ran from the model down to the base.

    Raises:
        ValueError: if weights are NaN or infinite, or all of them zero.
    """

    log_weights: Tensor = field(repr=False)
    num_temperatures: int
    reverse: bool = False

    def __post_init__(self) -> None:
        if not len(self.log_weights):
            raise ValueError("there are no chains: `log_weights` is empty")
        # -inf is a weight of zero, which a mean can take as long as others have some
        bad = self.log_weights.isnan() | (self.log_weights == math.inf)
        if bad.any() or not (self.log_weights > -math.inf).any():
            count = int(bad.sum()) or len(self.log_weights)
            raise ValueError(
                f"{count} of {len(self.log_weights)} chains have weights that are NaN, infinite "
                "or all zero, so they say nothing about log Z; look for NaN or very large numbers among "
                "the machine's weights and biases, and in `base`"
            )

    @property
    def num_chains(self) -> int:
        """How many chains there were."""
        return len(self.log_weights)

    def __float__(self) -> float:
        return self.value

    @property
    def value(self) -> float:
        """Log Z: too low on average, or too high if `reverse`."""
        log_mean = float(self.log_weights.logsumexp(0)) - math.log(self.num_chains)
        return -log_mean if self.reverse else log_mean

    @property
    def standard_error(self) -> float:
        """Of `value`, by the delta method: the mean weight's over the mean; infinite for one chain.

        It knows only the weights that were met: where the chains miss a mode, or `effective_sample_size`
        is a few, the error is larger.
        """
        if self.num_chains == 1:
            return math.inf
        return float(self._weights().std()) / math.sqrt(self.num_chains)

    @property
    def effective_sample_size(self) -> float:
        r"""$(\sum w)^2 / \sum w^2$: from 1 (one chain has all the weight) to `num_chains`."""
        return self.num_chains / float(self._weights().square().mean())

    @property
    def degenerate(self) -> bool:
        """Whether so few chains carry the weight that neither value nor error can be believed.

        That is, an effective sample size below a tenth of the chains, or below two.
        """
        return self.effective_sample_size < max(2.0, self.num_chains / 10)

    def interval(self, width: float = 3.0) -> tuple[float, float]:
        """Log of the mean weight plus or minus `width` standard errors of that mean, as bounds of log Z.

        One end is infinite where the standard error is too large to say anything.
        """
        spread = width * self.standard_error
        low = math.log1p(-spread) if spread < 1 else -math.inf
        ends = low, math.log1p(spread)
        return (
            (self.value - ends[1], self.value - ends[0])
            if self.reverse
            else (self.value + ends[0], self.value + ends[1])
        )

    def _weights(self) -> Tensor:
        """The weights, scaled to a mean of one."""
        return self.log_weights.softmax(0) * self.num_chains


@final
@dataclass(frozen=True)
class Bracket:
    """Log Z from below and from above.

    Attributes:
        forward: from the base up to the model.
        backward: from the model down to the base.
        exact: whether the downward chains started at exact samples of the model. Where they started at
            the end of long Gibbs chains, `upper` is a bound only as far as those had mixed.
    """

    forward: LogPartition
    backward: LogPartition
    exact: bool

    @property
    def lower(self) -> float:
        """The lower end of the forward estimate's interval."""
        return self.forward.interval()[0]

    @property
    def upper(self) -> float:
        """The upper end of the backward estimate's interval."""
        return self.backward.interval()[1]

    @property
    def gap(self) -> float:
        """Backward less forward estimate; at least zero on average."""
        return self.backward.value - self.forward.value

    @property
    def width(self) -> float:
        """`upper` less `lower`: how well log Z is known, if the two meet."""
        return self.upper - self.lower

    @property
    def meet(self) -> bool:
        """Whether the gap is within three of its standard errors, so that nothing speaks against either.

        Estimates whose errors are too large to bound log Z, an infinite `width`, do not meet. How much
        it says otherwise, `width` tells: estimates with large errors meet easily.
        """
        error = math.hypot(self.forward.standard_error, self.backward.standard_error)
        return math.isfinite(self.width) and abs(self.gap) <= 3 * error
