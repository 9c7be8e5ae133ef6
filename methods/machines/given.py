"""`refuse_no_machine`: a sentence for what was given as a Boltzmann machine and is none."""

from typing import Any

from bilevel.methods.machines.base import as_machine
from bilevel.refusals import shown


def refuse_no_machine(model: Any) -> None:
    """Refuse what is no Boltzmann machine, such as a class, or the learner that trains one.

    Raises:
        TypeError: with what to give.
    """
    if as_machine(model) is None:
        raise TypeError(
            f"`model` must be a Boltzmann machine, such as `RBM(visible_dim, latent_dim)`, got "
            f"{shown(model)}; that of a learner is `learner.model`"
        )
