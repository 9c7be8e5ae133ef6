r"""Many annealed Gibbs chains over the first hidden layer, the log-weights of each step beside them.

Given $h = h_1$ all other units are independent (see `Neighbours`): binary ones feel the fields
$a_\beta = a_0 + \beta\,(d - a_0 + h^T W)$, where d is their bias and $a_0$ its value at $\beta = 0$, and
Gaussian ones, in units of their standard deviation, are $N(\beta\, G^T h,\ I)$. Summing them out,

$$ \log \tilde p_\beta(h) = \beta\, c^T h + \sum_i \log\big(1 + e^{a_{\beta, i}}\big)
   + \tfrac12 \beta^2 \lVert G^T h \rVert^2 + \text{const} . $$

A step from $\beta$ to $\gamma$ needs $\log \tilde p_\gamma(h) - \log \tilde p_\beta(h)$ and then a draw
of the neighbours at $\gamma$. Both come from one product $h^T W$ and one sigmoid: with
$q_\beta = \sigma(-a_\beta)$, the probability of a zero,

$$ \sum_i \log \frac{1 + e^{a_{\gamma, i}}}{1 + e^{a_{\beta, i}}}
   = \log \prod_i \frac{q_{\beta, i}}{q_{\gamma, i}}, $$

a logarithm per chain, not per unit. Where the weights are so large that a factor or the product could
leave the range of the dtype, the left side is computed as it stands.
"""

import math
from typing import final

import torch
from torch import Tensor

from bilevel.methods.machines.enumeration import log_one_plus_exp
from bilevel.methods.machines.neighbours import Neighbours


@final
class AnnealedChains:
    """Gibbs chains in preallocated memory; `weigh` and `move` take turns.

    Args:
        layer: the first hidden layer and what touches it.
        start: the first hidden layers to start at, in {0, 1}, shape (n, n1).
    """

    def __init__(self, layer: Neighbours, start: Tensor) -> None:
        self._h = start.clone()
        self._bias = layer.bias
        self._base = -layer.binary_base
        # signs turned: the fields of `off`, not of `on`
        self._weight, self._shift = -layer.binary_weight, layer.binary_base - layer.binary_bias
        self._back = layer.binary_weight.mT.contiguous()
        self._gaussian, self._gaussian_back = layer.gaussian_weight, layer.gaussian_weight.mT
        (n, n1), m, d = start.shape, len(layer.binary_bias), layer.gaussian_weight.shape[1]
        self._slope, self._on = start.new_empty(n, m), start.new_empty(n, m)
        self._off = start.new_empty(2, n, m)
        self._before, self._after = self._off.unbind()
        self._center, self._real = start.new_empty(n, d), start.new_empty(n, d)
        self._logits = start.new_empty(n, n1)
        self._noise = Uniforms(n * (m + n1), start)
        self._coins_binary = self._noise.values[: n * m].view(n, m)
        self._coins_first = self._noise.values[n * m :].view(n, n1)
        self._beta = 0.0
        self._limit = 0.9 * math.log(torch.finfo(start.dtype).max)
        self._highest, self._steepest = _field_bounds(layer)

    def weigh(self, start: float, end: float) -> Tensor:
        """Log p~(h) at inverse temperature `end` less that at `start`, shape (n,)."""
        self._beta = end
        log_ratio = self._binary_log_ratio(start, end)
        if self._center.shape[1]:
            torch.mm(self._h, self._gaussian, out=self._center)
            squares = torch.linalg.vecdot(self._center, self._center)
            log_ratio.add_(squares, alpha=0.5 * (end**2 - start**2))
        return torch.addmv(log_ratio, self._h, self._bias, alpha=end - start)

    def move(self, generator: torch.Generator) -> None:
        """One Gibbs step at the `end` of the last `weigh`: the neighbours given h, then h given them."""
        beta, logits = self._beta, self._logits
        self._noise.draw(generator)
        torch.gt(self._coins_binary, self._after, out=self._on)
        torch.mm(self._on, self._back, out=logits)
        if self._center.shape[1]:
            self._real.normal_(generator=generator).add_(self._center, alpha=beta)
            logits.addmm_(self._real, self._gaussian_back)
        logits.add_(self._bias).mul_(beta).sigmoid_()
        torch.lt(self._coins_first, logits, out=self._h)

    def _binary_log_ratio(self, start: float, end: float) -> Tensor:
        """The binary neighbours' part; leaves their probabilities of a zero at `end` in `_after`."""
        slope, before, after = self._slope, self._before, self._after
        torch.addmm(self._shift, self._h, self._weight, out=slope)
        torch.add(self._base, slope, alpha=start, out=before)
        torch.add(self._base, slope, alpha=end, out=after)
        if self._highest < self._limit and self._steepest * abs(end - start) < self._limit:
            self._off.sigmoid_()
            return torch.div(before, after, out=before).prod(dim=1).log_()
        terms = log_one_plus_exp(-after).sub_(log_one_plus_exp(-before))
        after.sigmoid_()
        return terms.sum(dim=1)


@final
class Uniforms:
    """Uniform numbers in [0, 1) for coins, at half of what torch's own cost on a CPU.

    Of 64 random bits each of four numbers gets 16. The bits below are one fraction that all numbers of
    a draw share: every single number is uniform, and two of them are dependent only within 1/65536 of
    each other's thresholds, less than 2^-32 in a joint probability.

    Args:
        n: how many.
        like: a tensor of the dtype and device they are to have.

    Attributes:
        values: the numbers of the last draw, shape (n,).
    """

    def __init__(self, n: int, like: Tensor) -> None:
        self.values = like.new_empty(n)
        self._bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=like.device)
        self._words = self._bits.view(torch.int16)[:n]
        self._fraction = like.new_empty(())

    def draw(self, generator: torch.Generator) -> None:
        """Replace all values."""
        self._bits.random_(-(2**63), None, generator=generator)
        self._fraction.uniform_(2**15, 2**15 + 1, generator=generator)
        self.values.copy_(self._words).add_(self._fraction).mul_(2**-16)


def _field_bounds(layer: Neighbours) -> tuple[float, float]:
    """The largest field a binary neighbour can feel, and the largest sum of their slopes in beta."""
    if not len(layer.binary_bias):
        return 0.0, 0.0
    up, down = layer.binary_weight.clamp(min=0).sum(0), layer.binary_weight.clamp(max=0).sum(0)
    highest = torch.maximum(layer.binary_base, layer.binary_bias + up).max()
    shift = layer.binary_bias - layer.binary_base
    steepest = torch.maximum((shift + up).abs(), (shift + down).abs()).sum()
    return float(highest), float(steepest)
