r"""Contrastive divergence, CD-k, and its persistent form, PCD-k.

The gradient of the negative log-likelihood of an energy-based model is

$$ \nabla_\theta (E_q[F(v)] + \log Z)
   = E_q[\nabla_\theta F(v)] - E_{p_\theta}[\nabla_\theta F(v)] . $$

The samples of the model in the second term are replaced by $v_k$, what k steps of block Gibbs sampling
make of the state they start from: the data (CD), or where the last step left the chains (PCD). With
the samples held constant the loss is

$$ L(\theta) = E_q[F(v)] - E[F(v_k)] . $$

It has a single level. L is no objective: its value says nothing, its gradient is all there is.

With two hidden layers F is not tractable. Its gradient is $E_{p(h|v)}[\nabla_\theta E(v, h)]$, and the
posterior becomes its mean field $\mu(v)$, a fixed point of
$\mu_j = \sigma(-\partial E(v, \mu) / \partial \mu_j)$; the chains' hidden units are samples already:

$$ L(\theta) = E_q[E(v, \mu(v))] - E[E(v_k, h_k)] , $$

so PCD climbs the variational bound $E_q[-E(v, \mu) + H(\mu)] - \log Z$.
"""

from typing import Any, ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from bilevel.arguments import explained
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.machines import BoltzmannMachine
from bilevel.methods.machines.base import check_dim
from bilevel.methods.machines.chance import Begun, Chance, Drawn, Given, uniforms
from bilevel.methods.models.machine import MachineModel, require_machine
from bilevel.methods.training.settings import MACHINE_DEFAULTS
from bilevel.problem import Loss
from bilevel.refusals import flag

_MOST_IN_A_GRAPH = 10  # Gibbs steps; compiling takes longer with each


@final
class Batch(NamedTuple):
    """Visibles and what the chains drew; the latents only of a machine with two hidden layers."""

    visible: Tensor
    mean_field: Tensor | None  # of p(h|v), shape (n, sum(latent_dims))
    sampled_visible: Tensor
    sampled_latent: Tensor | None


@final
class ContrastiveDivergence(EBLVM):
    r"""CD-k, or PCD-k with `persistent=True`: $E_q[F(v)] - E[F(v_k)]$, the samples $v_k$ constant.

    Args:
        model: the machine.
        steps: k, the Gibbs steps before each gradient.
        persistent: go on with the chains of the last step instead of starting at the data. They are
            the buffer `chains`, first hidden layers of shape (num_chains, latent_dims[0]), so
            checkpoints and saved models hold them; empty until the first batch, at which they start.
        num_chains: how many, if persistent; by default as many as the first batch has rows.

    Raises:
        TypeError: if `steps` or `num_chains` is not an integer.
        ValueError: if one is not positive, or `num_chains` is given without `persistent=True`.

    Example:
        >>> from bilevel.methods.machines import RBM
        >>> learner = ContrastiveDivergence(RBM(6, 3), persistent=True)
        >>> data = torch.bernoulli(torch.full((200, 6), 0.3))
        >>> history = learner.fit(data, num_steps=2, batch_size=50)
        >>> learner.chains.shape, learner.model.log_likelihood(data).shape
        (torch.Size([50, 3]), torch.Size([200]))

    References:
        Training Products of Experts by Minimizing Contrastive Divergence (Hinton, 2002),
        https://doi.org/10.1162/089976602760128018: CD.
        Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient
        (Tieleman, 2008), https://doi.org/10.1145/1390156.1390290: PCD.
        Deep Boltzmann Machines (Salakhutdinov and Hinton, 2009),
        https://proceedings.mlr.press/v5/salakhutdinov09a.html: mean field for the data, persistent
        chains for the model.
        Differs from the papers in:
        - the hidden units of an RBM are summed out of both terms (F), not sampled in either;
        - CD of a machine with two hidden layers is ours: its chains start at a draw from the mean
          field, not from the posterior, so CD-k is biased even at the true model. Use PCD there.
    """

    latent_model: MachineModel
    training_defaults: ClassVar[dict[str, Any]] = MACHINE_DEFAULTS

    @explained
    def __init__(
        self,
        model: BoltzmannMachine,
        steps: int = 1,
        persistent: bool = False,
        num_chains: int | None = None,
    ) -> None:
        super().__init__()
        machine = require_machine(model, "ContrastiveDivergence")
        self.latent_model = MachineModel.of(machine)
        self.upper, self.lower = nn.ModuleDict({"model": machine}), nn.ModuleDict()
        self.steps = check_dim("steps", steps)
        self.persistent = flag("persistent", persistent)
        if num_chains is not None:
            check_dim("num_chains", num_chains)
            if not persistent:
                raise ValueError(
                    "`num_chains` is for `persistent=True`; CD has one chain per row of the batch"
                )
        self.num_chains = num_chains
        options = {"steps": steps, "persistent": persistent, "num_chains": num_chains}
        self.recipe = {"model": machine.recipe, **options}
        self.chains: Tensor
        if persistent:
            self.register_buffer(
                "chains", machine.visible_bias.new_empty(0, machine.latent_dims[0])
            )
            cast(Any, self).register_load_state_dict_pre_hook(_make_room)

    # ------------------------------------------------------------------ the learning problem

    def draw(self, data: Tensor, generator: torch.Generator) -> Batch:
        """The batch with k Gibbs steps' samples; moves the persistent chains."""
        chance = Drawn(generator)
        self._begin_chains(data, chance)
        return self._drawn(data, chance)

    def begin_draw(self, data: Tensor, generator: torch.Generator) -> Begun | None:
        """The coins of the chains, for few steps: a graph holds one step after the other."""
        if data.is_cuda or self.steps > _MOST_IN_A_GRAPH:
            return None
        self._begin_chains(data, Drawn(generator))
        count, machine = len(self.chains if self.persistent else data), self.model
        size = machine.latent_dims[0]
        start = [] if self.persistent else [uniforms(machine.visible_bias, generator, count, size)]
        return Begun(data, start + machine.chances(count, generator, self.steps))

    def finish_draw(self, begun: Begun) -> Batch:
        return self._drawn(begun.data, Given(begun.numbers))

    def _drawn(self, data: Tensor, chance: Chance) -> Batch:
        model, deep = self.model, len(self.model.latent_dims) > 1
        mean = model.mean_field(data) if deep else None
        first = self.chains if self.persistent else self._start(data, mean, chance)
        v, h = model.chain(first, chance, steps=self.steps)
        if self.persistent:
            self.chains.copy_(h[:, : model.latent_dims[0]])
        return Batch(data, mean, v, h if deep else None)

    def _begin_chains(self, data: Tensor, chance: Chance) -> None:
        """Start the persistent chains, if they have not begun."""
        if self.persistent and not len(self.chains):
            deep = len(self.model.latent_dims) > 1
            self.chains = self._start(data, self.model.mean_field(data) if deep else None, chance)

    def _start(self, data: Tensor, mean: Tensor | None, chance: Chance) -> Tensor:
        """First hidden layers at data: one per row, or for `num_chains` the rows in turn."""
        if self.num_chains is not None:
            rows = torch.arange(self.num_chains, device=data.device) % len(data)
            data, mean = data[rows], None if mean is None else mean[rows]
        if mean is None:
            return chance.coins(self.model.first_probabilities(data))
        return chance.coins(mean[:, : self.model.latent_dims[0]])

    def upper_loss(self, batch: Batch) -> Loss:
        """The mean (free) energy of the data minus that of the samples."""
        with_data = self._mean_energy(batch.visible, batch.mean_field)
        with_samples = self._mean_energy(batch.sampled_visible, batch.sampled_latent)
        logs = {"energy_data": with_data, "energy_samples": with_samples}
        return with_data - with_samples, logs

    def _mean_energy(self, v: Tensor, h: Tensor | None) -> Tensor:
        energies: Tensor = self.model.free_energy(v) if h is None else self.model(v, h)
        return energies.mean()


def _make_room(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take as many chains as the state holds that is about to be loaded."""
    saved = state.get(prefix + "chains")
    if saved is not None:
        chains = cast(ContrastiveDivergence, module).chains
        cast(ContrastiveDivergence, module).chains = chains.new_empty(saved.shape)
