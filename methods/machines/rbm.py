r"""Restricted Boltzmann machines: one hidden layer of binary units under binary or Gaussian visibles.

$$ \text{RBM:}\quad E(v, h) = -(b^T v + c^T h + v^T W h), \qquad
   \text{GaussianRBM:}\quad E(v, h) = \tfrac12 \sum_i \frac{(v_i - b_i)^2}{s_i^2} - c^T h - v^T W h . $$
"""

import math
from typing import final

import torch
from torch import nn

from bilevel.arguments import explained
from bilevel.methods.machines.base import check_dim
from bilevel.methods.machines.hidden import OneHidden
from bilevel.methods.machines.visible import BinaryVisible, GaussianVisible
from bilevel.methods.machines.weights import seeded, uniform
from bilevel.refusals import flag


@final
class RBM(BinaryVisible, OneHidden):
    r"""The restricted Boltzmann machine, $E(v, h) = -(b^T v + c^T h + v^T W h)$, v and h binary.

    $p(h|v) = \sigma(c + W^T v)$ and $p(v|h) = \sigma(b + W h)$, unit by unit. Parameters:
    `visible_bias` b, `latent_bias` c, `weight` W of shape (visible_dim, latent_dim).

    Args:
        visible_dim: number of visibles.
        latent_dim: number of hidden units.
        grey: take data anywhere in [0, 1] (its grey values stand for probabilities of a 1), as the
            RBM literature does with images. The model's distribution stays one on {0, 1}.
        generator: draws the initial weights.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is not positive.

    Example:
        >>> model = RBM(6, 3)
        >>> model.free_energy(torch.zeros(1, 6)).item(), model.log_partition().item()
        (-2.079..., 8.16...)

    References:
        "A Practical Guide to Training Restricted Boltzmann Machines" (Hinton, 2010),
        https://www.cs.toronto.edu/~hinton/absps/guideTR.pdf. Initial weights as in "To Relieve Your
        Headache of Training an MRF, Take AdVIL" (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400: U(-r, r), r = 4 sqrt(6 / (visible_dim + latent_dim)).
    """

    @explained
    def __init__(
        self,
        visible_dim: int,
        latent_dim: int,
        *,
        grey: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        nv, nh = check_dim("visible_dim", visible_dim), check_dim("latent_dim", latent_dim)
        self.visible_dim, self.latent_dims = nv, (nh,)
        self.visible_range, self.binary = (0.0, 1.0), not grey
        self.recipe = {
            "kind": "RBM",
            "visible_dim": nv,
            "latent_dim": nh,
            "grey": flag("grey", grey),
        }
        self.weight = uniform(4 * math.sqrt(6 / (nv + nh)), nv, nh, generator=seeded(generator))
        self.visible_bias = nn.Parameter(self.weight.new_zeros(nv))
        self.latent_bias = nn.Parameter(self.weight.new_zeros(nh))


@final
class GaussianRBM(GaussianVisible, OneHidden):
    r"""The RBM with real visibles, $E(v, h) = \frac12 \sum_i (v_i-b_i)^2/s_i^2 - c^T h - v^T W h$.

    $p(h|v) = \sigma(c + W^T v)$ and $p(v|h) = N(b + s^2 \odot W h,\ s^2)$, so p(v) is a mixture of
    $2^{\text{latent\_dim}}$ Gaussians. Parameters: `visible_bias` b, `latent_bias` c, `weight` W of
    shape (visible_dim, latent_dim), `log_scale` log s.

    This is BiSM's convention: v enters the interaction undivided. AdvIL's, with $v^T W' h / s$, is
    the same machine at $W_{ij} = W'_{ij} / s_i$; they agree where s = 1.

    Args:
        visible_dim: number of visibles.
        latent_dim: number of hidden units.
        learn_scale: train log s; otherwise it is a frozen parameter, at s = 1.
        generator: draws the initial weights.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is not positive.

    Example:
        >>> model = GaussianRBM(2, 4)
        >>> model.log_likelihood(torch.zeros(3, 2)).shape
        torch.Size([3])

    References:
        Bi-level Score Matching for Learning Energy-based Latent Variable Models (Bao et al., NeurIPS
        2020), https://arxiv.org/abs/2010.07856; weights and biases start as there, in
        U(-r, r), r = 1 / sqrt(latent_dim), and s at 1.
        To Relieve Your Headache of Training an MRF, Take AdVIL (Li et al., ICLR 2020),
        https://arxiv.org/abs/1901.08400: the other convention.
    """

    @explained
    def __init__(
        self,
        visible_dim: int,
        latent_dim: int,
        *,
        learn_scale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        nv, nh = check_dim("visible_dim", visible_dim), check_dim("latent_dim", latent_dim)
        self.visible_dim, self.latent_dims = nv, (nh,)
        self.visible_range, self.binary = None, False
        self.recipe = {
            "kind": "GaussianRBM",
            "visible_dim": nv,
            "latent_dim": nh,
            "learn_scale": flag("learn_scale", learn_scale),
        }
        generator, bound = seeded(generator), 1 / math.sqrt(nh)
        self.weight = uniform(bound, nv, nh, generator=generator)
        self.visible_bias = uniform(bound, nv, generator=generator)
        self.latent_bias = uniform(bound, nh, generator=generator)
        self.log_scale = nn.Parameter(self.weight.new_zeros(nv), requires_grad=learn_scale)
