"""`AsInTraining`: what torch is set to while a loss is evaluated, whoever asks."""

from typing import final

import torch


@final
class AsInTraining:
    """Gradients are on and draws come from a fixed seed; the global generators are left as they were.

    A class, for it is entered for every evaluation, and `contextlib`'s generators take longer.

    Args:
        seed: the seed.
        generators: the global generators.
    """

    def __init__(self, seed: int, generators: list[torch.Generator]) -> None:
        self._seed = seed
        self._generators = generators

    def __enter__(self) -> None:
        self._before = [g.get_state() for g in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)
        self._had_grad = torch.is_grad_enabled()
        if not self._had_grad:
            torch.set_grad_enabled(True)

    def __exit__(self, *error: object) -> None:
        if not self._had_grad:
            torch.set_grad_enabled(False)
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)
