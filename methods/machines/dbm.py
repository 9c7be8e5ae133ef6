r"""Deep Boltzmann machines with two hidden layers, v - h1 - h2, under binary or Gaussian visibles.

$$ \text{DBM:}\quad E(v, h) = -(b^T v + c_1^T h_1 + c_2^T h_2 + v^T W_1 h_1 + h_1^T W_2 h_2), $$

$$ \text{GaussianDBM:}\quad E(v, h) = \tfrac12 \sum_i \frac{(v_i - b_i)^2}{s_i^2}
   - c_1^T h_1 - c_2^T h_2 - v^T W_1 h_1 - h_1^T W_2 h_2 . $$
"""

import math
from typing import final

import torch
from torch import nn

from bilevel.arguments import explained
from bilevel.methods.machines.base import check_dim, check_layers
from bilevel.methods.machines.hidden import TwoHidden
from bilevel.methods.machines.visible import BinaryVisible, GaussianVisible
from bilevel.methods.machines.weights import seeded, uniform
from bilevel.refusals import flag


@final
class DBM(BinaryVisible, TwoHidden):
    r"""The deep Boltzmann machine with two hidden layers, all units binary.

    $E(v, h) = -(b^T v + c_1^T h_1 + c_2^T h_2 + v^T W_1 h_1 + h_1^T W_2 h_2)$. Parameters:
    `visible_bias` b, `latent_bias1` and `latent_bias2`, `weight1` of shape (visible_dim, n1),
    `weight2` of shape (n1, n2).

    Args:
        visible_dim: number of visibles.
        latent_dims: sizes (n1, n2) of the hidden layers.
        grey: take data anywhere in [0, 1] (its grey values stand for probabilities of a 1).
        generator: draws the initial weights.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is not positive, or there are not two.

    Example:
        >>> DBM(6, (3, 2)).log_likelihood(torch.zeros(4, 6)).shape
        torch.Size([4])

    References:
        Deep Boltzmann Machines (Salakhutdinov and Hinton, AISTATS 2009),
        https://proceedings.mlr.press/v5/salakhutdinov09a.html. Initial weights as in "To Relieve Your
        Headache of Training an MRF, Take AdVIL" (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400: U(-r, r), r = 4 sqrt(6 / (rows + columns)).
    """

    @explained
    def __init__(
        self,
        visible_dim: int,
        latent_dims: tuple[int, int],
        *,
        grey: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        nv, (n1, n2) = check_dim("visible_dim", visible_dim), check_layers(latent_dims)
        self.visible_dim, self.latent_dims = nv, (n1, n2)
        self.visible_range, self.binary = (0.0, 1.0), not grey
        self.recipe = {
            "kind": "DBM",
            "visible_dim": nv,
            "latent_dims": [n1, n2],
            "grey": flag("grey", grey),
        }
        generator = seeded(generator)
        self.weight1 = uniform(4 * math.sqrt(6 / (nv + n1)), nv, n1, generator=generator)
        self.weight2 = uniform(4 * math.sqrt(6 / (n1 + n2)), n1, n2, generator=generator)
        self.visible_bias = nn.Parameter(self.weight1.new_zeros(nv))
        self.latent_bias1 = nn.Parameter(self.weight1.new_zeros(n1))
        self.latent_bias2 = nn.Parameter(self.weight1.new_zeros(n2))


@final
class GaussianDBM(GaussianVisible, TwoHidden):
    r"""The deep Boltzmann machine with real visibles and two hidden layers of binary units.

    $E(v, h) = \frac12 \sum_i (v_i-b_i)^2/s_i^2 - c_1^T h_1 - c_2^T h_2 - v^T W_1 h_1 - h_1^T W_2 h_2$,
    so $p(v|h_1) = N(b + s^2 \odot W_1 h_1,\ s^2)$. Parameters: those of a `DBM` and `log_scale` log s.

    Args:
        visible_dim: number of visibles.
        latent_dims: sizes (n1, n2) of the hidden layers.
        learn_scale: train log s; otherwise it is a frozen parameter, at s = 1.
        generator: draws the initial weights.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is not positive, or there are not two.

    Example:
        >>> GaussianDBM(2, (4, 3)).log_likelihood(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Deep Boltzmann Machines (Salakhutdinov and Hinton, AISTATS 2009),
        https://proceedings.mlr.press/v5/salakhutdinov09a.html.
        Differs from the paper in: the visibles are `GaussianRBM`'s, and so is the start:
        U(-r, r) with r = 1 / sqrt(n1) for b, c1 and W1, 1 / sqrt(n2) for c2 and W2.
    """

    @explained
    def __init__(
        self,
        visible_dim: int,
        latent_dims: tuple[int, int],
        *,
        learn_scale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        nv, (n1, n2) = check_dim("visible_dim", visible_dim), check_layers(latent_dims)
        self.visible_dim, self.latent_dims = nv, (n1, n2)
        self.visible_range, self.binary = None, False
        self.recipe = {
            "kind": "GaussianDBM",
            "visible_dim": nv,
            "latent_dims": [n1, n2],
            "learn_scale": flag("learn_scale", learn_scale),
        }
        generator = seeded(generator)
        bound1, bound2 = 1 / math.sqrt(n1), 1 / math.sqrt(n2)
        self.weight1 = uniform(bound1, nv, n1, generator=generator)
        self.weight2 = uniform(bound2, n1, n2, generator=generator)
        self.visible_bias = uniform(bound1, nv, generator=generator)
        self.latent_bias1 = uniform(bound1, n1, generator=generator)
        self.latent_bias2 = uniform(bound2, n2, generator=generator)
        self.log_scale = nn.Parameter(self.weight1.new_zeros(nv), requires_grad=learn_scale)
