"""Tabular families and energies: finitely many states, so that every expectation is exact."""

from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from bilevel.methods.variational.base import Draws, VariationalJoint, VariationalPosterior


@final
class TabularPosterior(VariationalPosterior):
    """Every state h = 0, ..., H-1 of every v = 0, ..., V-1 with its own probability, enumerated.

    Args:
        logits: initial logits, shape (V, H).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return self.logits.new_zeros(n, 0)

    def draws(self, v: Tensor, noise: Tensor) -> Draws:
        states = self.logits.shape[1]
        log_prob = self.logits.log_softmax(dim=1)[v].flatten()
        h = torch.arange(states, device=v.device).repeat(len(v))
        return Draws(v.repeat_interleave(states), h, log_prob, log_prob.exp() / len(v))

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self.logits.log_softmax(dim=1)[v, h]

    def distribution(self, v: Tensor) -> Distribution:
        return Categorical(logits=self.logits[v])


@final
class TabularJoint(VariationalJoint):
    """Every pair (v, h) with its own probability, enumerated.

    Args:
        logits: initial logits, shape (V, H).
    """

    enumerates: ClassVar[bool] = True

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def noise(self, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
        return self.logits.new_zeros(n, 0)

    def draws(self, noise: Tensor) -> Draws:
        return enumerated(self._log_table())

    def log_prob(self, v: Tensor, h: Tensor) -> Tensor:
        return self._log_table()[v, h]

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        visible = self._log_table().exp().sum(dim=1)
        return torch.multinomial(visible, n, replacement=True, generator=generator)

    def _log_table(self) -> Tensor:
        return self.logits - self.logits.flatten().logsumexp(0)


@final
class TabularEnergy(nn.Module):
    """E(v, h) as a table of shape (V, H); its distribution can be enumerated.

    Args:
        table: initial energies, shape (V, H).
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,)."""
        return self.table[v, h]

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states, shape (V, H)."""
        return -self.table - (-self.table).flatten().logsumexp(0)

    def free_energy(self, v: Tensor) -> Tensor:
        """-log sum_h exp(-E(v, h)), shape (n,)."""
        return -(-self.table).logsumexp(dim=1)[v]


@final
class DecoupledEnergy(nn.Module):
    r"""$E(v, h) = E(v) - \log q_1(h|v)$ (Eq. 8): its posterior is q1, its marginal energy E(v).

    Args:
        marginal: module v -> (n,).
        posterior: q1, shared with the lower level.
        table_size: (V, H) if both are tabular, so that the joint can be enumerated.
    """

    def __init__(
        self,
        marginal: nn.Module,
        posterior: VariationalPosterior,
        table_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.marginal = marginal
        self.posterior = posterior
        self.table_size = table_size

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h), shape (n,)."""
        return self.free_energy(v) - self.posterior.log_prob(v, h)

    def free_energy(self, v: Tensor) -> Tensor:
        """E(v), shape (n,)."""
        energies: Tensor = self.marginal(v)
        return energies.flatten()

    def log_joint(self) -> Tensor:
        """Log p(v, h) of all states, shape (V, H).

        Raises:
            ValueError: if the model is not tabular.
        """
        if self.table_size is None:
            raise ValueError("this model cannot be enumerated; it has no `table_size`")
        v, h = (
            i.flatten() for i in torch.meshgrid(*map(torch.arange, self.table_size), indexing="ij")
        )
        log_weights: Tensor = -self(v, h).view(self.table_size)
        return log_weights - log_weights.flatten().logsumexp(0)


def enumerated(log_table: Tensor) -> Draws:
    """All states of a normalised log-table of shape (V, H)."""
    rows, columns = log_table.shape
    v = torch.arange(rows, device=log_table.device).repeat_interleave(columns)
    h = torch.arange(columns, device=log_table.device).repeat(rows)
    log_prob = log_table.flatten()
    return Draws(v, h, log_prob, log_prob.exp())
