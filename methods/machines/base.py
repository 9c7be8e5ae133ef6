r"""What every Boltzmann machine here can do: energy, exact sums, block Gibbs sampling, annealing.

A machine is a bipartite graph: the visibles v and the second hidden layer (if there is one) touch
only the first hidden layer $h_1$. So all of $(v, h_2)$ are independent given $h_1$ and the other way
round, sums over either side factorise, and

$$ p(v, h) = e^{-E(v, h)} / Z, \qquad F(v) = -\log \sum_h e^{-E(v, h)}, \qquad
   \log Z = \log \sum_{h_1} \tilde p(h_1), \quad \tilde p(h_1) = \sum_{v, h_2} e^{-E(v, h)} $$

with $\tilde p(h_1)$ in closed form (an integral over v where the visibles are Gaussian).

The annealed machine at inverse temperature $\beta$ has its interactions and hidden biases multiplied
by $\beta$. A binary visible's bias is $(1-\beta)\, b_0 + \beta\, b$, where $b_0$ are the logits of a
base rate; a Gaussian visible keeps its bias and scale. At $\beta = 0$ all units are independent.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel.cards import plural, whereabouts
from bilevel.methods.data.visibles import Visibles
from bilevel.methods.machines.chance import Chance, Drawn, coin_flips
from bilevel.methods.machines.enumeration import MAX_UNITS, log_sum_over_states
from bilevel.methods.machines.neighbours import Neighbours
from bilevel.methods.networks.units import Change
from bilevel.refusals import a_tensor

MEAN_FIELD_SWEEPS = 10
"""Updates of each hidden layer by `mean_field`."""

VisibleDraw = Callable[[Tensor, Chance], Tensor]


class BoltzmannMachine(nn.Module, ABC):
    """A Boltzmann machine with visibles v and one or two layers of hidden units in {0, 1}.

    Attributes:
        visible_dim: number of visibles.
        latent_dims: sizes of the hidden layers, the one next to the visibles first. A latent h is
            the layers side by side, shape (n, sum(latent_dims)).
        visible_range: (0, 1) for binary visibles, `None` for Gaussian ones.
        binary: whether visibles must be exactly 0 or 1.
        recipe: "kind" and the constructor's arguments; `from_recipe` builds the model again.
    """

    visible_dim: int
    latent_dims: tuple[int, ...]
    visible_range: tuple[float, float] | None
    binary: bool
    recipe: dict[str, Any]
    visible_bias: nn.Parameter

    # ------------------------------------------------------------------ what a machine must write

    @abstractmethod
    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,); a polynomial, so real v and relaxed h in [0, 1] are fine.

        Args:
            v: visibles, shape (n, visible_dim).
            h: latents, shape (n, sum(latent_dims)).
        """

    @abstractmethod
    def free_energy(self, v: Tensor) -> Tensor:
        r"""$F(v) = -\log \sum_h e^{-E(v, h)}$, shape (n,), exact.

        Raises:
            ValueError: if v has the wrong width, or more than `MAX_UNITS` units would have to be
                enumerated (the first hidden layer, of a machine with two).
        """

    @abstractmethod
    def log_unnormalized_first(
        self, h1: Tensor, beta: float = 1.0, base: Tensor | None = None
    ) -> Tensor:
        r"""$\log \tilde p_\beta(h_1)$: v and $h_2$ summed out at inverse temperature beta, shape (n,).

        Args:
            h1: first hidden layer, shape (n, latent_dims[0]).
            beta: inverse temperature.
            base: base-rate logits of binary visibles, shape (visible_dim,); zeros by default.

        Raises:
            ValueError: if h1 has the wrong width, or Gaussian visibles are given a base rate.
        """

    @abstractmethod
    def log_partition_base(self, base: Tensor | None = None) -> Tensor:
        """Log Z at beta = 0, in closed form; a scalar.

        Raises:
            ValueError: if Gaussian visibles are given a base rate.
        """

    @abstractmethod
    def chain(
        self,
        h1: Tensor,
        chance: Chance,
        steps: int = 1,
        beta: float = 1.0,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`gibbs`, with random numbers from anywhere."""

    @abstractmethod
    def chances(self, n: int, generator: torch.Generator, steps: int = 1) -> list[Tensor]:
        """The random numbers of `steps` Gibbs steps of n chains, in the order of `chain`."""

    @abstractmethod
    def neighbours(self, base: Tensor | None = None) -> Neighbours:
        """What the first hidden layer touches, as tensors without gradient: to anneal it fast.

        Args:
            base: base-rate logits of binary visibles, shape (visible_dim,); zeros by default.

        Raises:
            ValueError: if Gaussian visibles are given a base rate.
        """

    @abstractmethod
    def latent_gibbs(self, v: Tensor, generator: torch.Generator, steps: int = 1) -> Tensor:
        """Latents given visibles, without gradients: exact draws from p(h|v) with one hidden layer.

        With two, block Gibbs sampling of (h1, h2) with v held fixed, from `first_layer`.

        Args:
            v: visibles, shape (n, visible_dim).
            generator: on the model's device.
            steps: how often both layers are drawn.

        Raises:
            ValueError: for less than one step, or the wrong width of v.
        """

    @abstractmethod
    def first_probabilities(self, v: Tensor) -> Tensor:
        """Those of `first_layer`, without gradients; the tensor is the caller's."""

    @abstractmethod
    def _visible_chances(self, n: int, generator: torch.Generator) -> Tensor:
        """The random numbers of the visibles in one Gibbs step of n chains."""

    @abstractmethod
    def posterior_logits(self, v: Tensor) -> Tensor:
        """Logits of p(h|v), exact, shape (n, latent_dims[0]).

        Raises:
            NotImplementedError: if there are two hidden layers: the posterior does not factorise.
        """

    @abstractmethod
    def mean_field(self, v: Tensor, sweeps: int = MEAN_FIELD_SWEEPS) -> Tensor:
        r"""Probabilities $\mu(v)$ of the best factorised posterior, without gradients.

        Exact with one hidden layer. With two, from $\mu = 1/2$, each layer in turn becomes
        $\mu_j = \sigma(-\partial E(v, \mu) / \partial \mu_j)$; no update raises the bound
        $E(v, \mu) - H(\mu) \geq F(v)$.

        Args:
            v: visibles, shape (n, visible_dim).
            sweeps: how often each layer is updated, if there are two.

        Returns:
            Shape (n, sum(latent_dims)).

        Raises:
            ValueError: if v has the wrong width.
        """

    @abstractmethod
    def visible_mean(self, h: Tensor) -> Tensor:
        """E[v|h], shape (n, visible_dim)."""

    @abstractmethod
    def base_rate(self, data: Tensor) -> Tensor | None:
        """Logits of the mean of data, clipped to [1e-5, 1 - 1e-5]; `None` if visibles are Gaussian."""

    @property
    @abstractmethod
    def first_weight(self) -> Tensor:
        """Interactions of the visibles with the first hidden layer, (visible_dim, latent_dims[0])."""

    @property
    @abstractmethod
    def first_bias(self) -> Tensor:
        """Biases of the first hidden layer, shape (latent_dims[0],)."""

    @abstractmethod
    def rewriting(self) -> Change | None:
        """How it is rewritten where the visibles change units; `None` if these have none."""

    @abstractmethod
    def _visible_energy(self, v: Tensor, less: Tensor) -> Tensor:
        """The terms of E in v alone, less a tensor of shape (n,)."""

    @abstractmethod
    def _log_sum_visible(self, h1: Tensor, beta: float, base: Tensor | None) -> Tensor:
        """Log of the sum of exp(-E) over v, the terms of E with v only, shape (n,)."""

    @abstractmethod
    def _visible_draw(self, beta: float, base: Tensor | None) -> VisibleDraw:
        """The function that draws v given h1, with all that the steps of a chain share computed."""

    @abstractmethod
    def _visible_neighbours(self, base: Tensor | None) -> Neighbours:
        """`neighbours`, as if the first hidden layer had no biases and touched the visibles only."""

    @abstractmethod
    def _log_unnormalized_rest(self, rest: Tensor) -> Tensor:
        """Log of the sum of exp(-E) over h1 as a function of (v, h2) side by side, shape (n,)."""

    # ------------------------------------------------------------------ what follows

    def __repr__(self) -> str:
        kind = "binary" if self.binary else "real" if self.visible_range is None else "grey"
        hidden = " and ".join(map(str, self.latent_dims))
        size = plural(sum(p.numel() for p in self.parameters()), "parameter")
        return (
            f"{type(self).__name__}({self.visible_dim} {kind} visible, {hidden} hidden; "
            f"{size} on {whereabouts(self)})"
        )

    @final
    def gibbs(
        self,
        h1: Tensor,
        generator: torch.Generator,
        steps: int = 1,
        beta: float = 1.0,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Block Gibbs sampling, without gradients: (v, h2) given h1, then h1 given (v, h2).

        Args:
            h1: first hidden layer to start at, in {0, 1}, shape (n, latent_dims[0]).
            generator: on the model's device.
            steps: how often both blocks are drawn.
            beta: inverse temperature.
            base: base-rate logits of binary visibles, shape (visible_dim,); zeros by default.

        Returns:
            v and h (all layers) as the last step left them.

        Raises:
            ValueError: for less than one step, the wrong width of h1, or Gaussian visibles with a
                base rate.
        """
        return self.chain(h1, Drawn(generator), steps, beta, base)

    @final
    def first_layer(self, v: Tensor, generator: torch.Generator) -> Tensor:
        """A first hidden layer to start a chain at visibles, shape (n, latent_dims[0]).

        With one hidden layer a draw from p(h|v); with two a bottom-up pass with every unit of the
        second at 1/2, which is only a start.

        Raises:
            ValueError: if v has the wrong width.
        """
        return coin_flips(self.first_probabilities(v), generator)

    @property
    def visibles(self) -> Visibles:
        """What visibles it takes."""
        bits = self.visible_range is not None
        return Visibles((self.visible_dim,), self.visible_range, self.binary, bits=bits)

    @property
    def enumerable(self) -> bool:
        """Whether `log_partition` can be computed."""
        return self._cheaper_side()[0] <= MAX_UNITS

    def log_partition(self) -> Tensor:
        r"""$\log Z$, exact, by enumerating the side with fewer units; a scalar, differentiable.

        Raises:
            ValueError: if either side has more than `MAX_UNITS` units.
        """
        units, log_weight = self._cheaper_side()
        if units > MAX_UNITS:
            raise ValueError(
                f"log Z of this `{type(self).__name__}` is a sum over at least {units} binary units, "
                f"and at most {MAX_UNITS} can be enumerated; estimate it with annealed importance "
                "sampling, `bilevel.methods.likelihood.annealed_importance_sampling`"
            )
        width = max(self.visible_dim, *self.latent_dims)
        return log_sum_over_states(log_weight, units, width, self.visible_bias)

    def log_likelihood(self, v: Tensor) -> Tensor:
        """Log p(v) = -F(v) - log Z, exact, shape (n,).

        Raises:
            TypeError: if v are no visibles of this machine.
            ValueError: if v are no visibles of this machine, or F or log Z cannot be enumerated.
        """
        traced = torch.compiler.is_compiling() or _is_transformed(v)  # values cannot be looked at
        if not traced:
            rows = self.visibles.admitted(v, self.visible_bias)
            # what was given, where it is a tensor: it may be part of a graph
            v = v.to(rows) if isinstance(v, Tensor) and v.layout == torch.strided else rows
        return -self.free_energy(v) - self.log_partition()

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """First hidden layers of fair coins, shape (n, latent_dims[0])."""
        half = self.visible_bias.new_full((n, self.latent_dims[0]), 0.5)
        return coin_flips(half, generator)

    def _cheaper_side(self) -> tuple[int, Callable[[Tensor], Tensor]]:
        """How many units to enumerate for log Z, and their log-weight."""
        first, rest = self.latent_dims[0], self.visible_dim + sum(self.latent_dims[1:])
        if self.visible_range is not None and rest < first:
            return rest, self._log_unnormalized_rest
        return first, self.log_unnormalized_first

    def _check_visible(self, v: Tensor) -> None:
        """Refuse the wrong width or dtype. Values are not looked at: every loss comes by here."""
        a_tensor("visibles", v)
        if v.ndim != 2 or v.shape[1] != self.visible_dim:
            raise ValueError(
                f"this model takes visibles of shape (n, {self.visible_dim}), got {tuple(v.shape)}"
            )
        own = self.visible_bias.dtype
        if v.dtype != own and not torch.is_autocast_enabled(v.device.type):
            raise TypeError(
                f"the numbers of this machine are {own}, those of the visibles {v.dtype}; convert them "
                f"with `v.to({own})`"
            )

    def _check_latent(self, h: Tensor) -> None:
        a_tensor("latents", h)
        if h.ndim != 2 or h.shape[1] != sum(self.latent_dims):
            layers = " + ".join(map(str, self.latent_dims))
            raise ValueError(
                f"this model takes latents of shape (n, {layers}), got {tuple(h.shape)}"
            )

    def _check_first(self, h1: Tensor) -> None:
        if h1.ndim != 2 or h1.shape[1] != self.latent_dims[0]:
            raise ValueError(
                f"this model takes first hidden layers of shape (n, {self.latent_dims[0]}), "
                f"got {tuple(h1.shape)}"
            )


def as_machine(module: nn.Module) -> BoltzmannMachine | None:
    """The module, if it is a Boltzmann machine: the one place that tells it from a user's energy."""
    return module if isinstance(module, BoltzmannMachine) else None


def check_steps(steps: int) -> None:
    """Refuse a number of Gibbs steps below one.

    Raises:
        ValueError: naming it.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps!r}")


def check_dim(name: str, value: int) -> int:
    """A number of units.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be positive, got {value}")
    return value


def check_layers(latent_dims: tuple[int, int]) -> tuple[int, int]:
    """The sizes of two hidden layers.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they are not two, or not positive.
    """
    if not isinstance(latent_dims, (tuple, list)) or len(latent_dims) != 2:
        raise ValueError(
            f"`latent_dims` must be the sizes of two hidden layers, (n1, n2), got {latent_dims!r}"
        )
    return check_dim("latent_dims[0]", latent_dims[0]), check_dim("latent_dims[1]", latent_dims[1])


def _is_transformed(v: Tensor) -> bool:
    """Whether a transform of `torch.func` is at work on a tensor."""
    return isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)


LOG_2 = math.log(2)
