"""What the presets cost: counted once by `footprint`, so that a list of them need not build each.

`counted(preset)` is what the table was made with, and what a test compares some of its rows with.
"""

from collections.abc import Mapping
from typing import NamedTuple, final

from bilevel.methods.presets.base import Preset
from bilevel.methods.training.footprint import footprint


@final
class Cost(NamedTuple):
    """The size of a preset's networks and the work of a step.

    Attributes:
        parameters: of all its networks.
        operations: of one upper step with its lower steps, as `footprint` counts them.
    """

    parameters: int
    operations: float


COSTS: Mapping[str, Cost] = {
    "digits": Cost(59_198, 5.518e8),
    "mnist": Cost(947_310, 1.888e10),
    "vae-mnist": Cost(485_117, 6.059e9),
    "advil-mnist": Cost(1_030_222, 1.633e10),
    "bism-mnist-small": Cost(209_548, 8.37e9),
    "cifar10": Cost(14_618_652, 4.695e11),
    "cifar10-r0.01": Cost(14_618_652, 4.695e11),
    "cifar10-r0.1": Cost(14_618_652, 4.695e11),
    "cifar10-r0.5": Cost(14_618_652, 4.695e11),
    "cifar10-r1": Cost(14_618_652, 4.695e11),
    "cifar10-complete": Cost(14_618_652, 5.167e11),
    "cifar10-without": Cost(14_618_652, 4.459e11),
    "svhn": Cost(14_618_652, 4.695e11),
    "celeba32": Cost(14_618_652, 4.695e11),
    "celeba64": Cost(55_266_076, 1.27e12),
    "cifar10-resnet": Cost(6_417_284, 2.958e12),
    "celeba128-resnet": Cost(90_447_620, 6.949e12),
    "vae-cifar10": Cost(7_232_987, 1.504e11),
    "advil-cifar10": Cost(15_934_620, 4.062e11),
    "bism-mnist": Cost(10_638_614, 1.05e12),
    "bism-cifar10": Cost(64_717_078, 6.195e12),
    "bism-celeba": Cost(64_717_078, 6.195e12),
    "vages-mnist": Cost(10_638_614, 1.331e12),
    "vages-cifar10": Cost(64_717_078, 7.886e12),
    "vages-celeba64": Cost(70_885_654, 3.19e13),
}
"""By the name of the preset."""


def counted(preset: Preset) -> Cost:
    """Build the preset's model and count a step of it: seconds to minutes."""
    model, training = preset.build(), preset.settings()
    step = footprint(model, training.batch_size, training=training, shape=preset.shape)
    return Cost(sum(p.numel() for p in model.parameters()), float(step.operations))
