"""`Marginal`: an energy of visibles alone, sampled by Langevin dynamics; it has no latent."""

from dataclasses import dataclass, field
from typing import ClassVar, NoReturn, Self, final

import torch
from torch import Tensor, nn

from bilevel.methods.models.chunks import chunked
from bilevel.methods.models.langevin import AnnealedLangevin
from bilevel.methods.models.model import Chains, LatentModel, attempt


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Marginal(LatentModel):
    """An energy that is any module v -> (n,)."""

    network: nn.Module
    langevin: AnnealedLangevin = field()
    draws_by_chains: ClassVar[bool] = True

    def abilities(self) -> tuple[str, ...]:
        return ("energy", "sample")

    def joint_energy(self, v: Tensor, h: Tensor) -> NoReturn:
        raise self._no_latent()

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), differentiable, shape (n,)."""
        energies: Tensor = self.network(v)
        return energies

    def energy(self, v: Tensor) -> Tensor:
        return chunked(self.network, v)

    def sample(self, n: int, generator: torch.Generator | None, chains: Chains) -> Tensor:
        chains.refuse()
        nothing = next(self.network.parameters()).new_empty(n, 0)
        return self.langevin.visibles(
            lambda v, h: self.network(v), nothing, self.visibles, generator, given=True
        )

    def posterior(self, v: Tensor) -> NoReturn:
        raise self._no_latent()

    def decode(self, h: Tensor) -> NoReturn:
        raise self._no_latent()

    def reconstruct(self, v: Tensor) -> NoReturn:
        raise self._no_latent()

    def _no_latent(self) -> NotImplementedError:
        return NotImplementedError(
            f"this needs a latent, and `{type(self.network).__name__}` is an energy of visibles alone; "
            "use `BiSM` or `VaGES`, whose energies have one"
        )

    def probe(self, v: Tensor) -> Self:
        energies = attempt("model", self.network, v)
        if not isinstance(energies, Tensor) or energies.shape != (len(v),):
            raise ValueError("the model must give one number per visible, shape (n,)")
        return self

    def rewritings(self) -> None:
        return None
