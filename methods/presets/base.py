"""`Preset`: one experiment as a typed configuration that names its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from bilevel.methods.catalogue import METHODS
from bilevel.methods.eblvm import EBLVM
from bilevel.methods.training.settings import Training, validated


@final
@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        name: by which it is chosen.
        about: what it is, in a few words.
        method: the class of the model.
        data: the source of the images it was made for, as `load_images` takes it.
        shape: (channels, side, side) of the images.
        source: where the settings are from.
        model: options of the method's `for_images`.
        training: fields of `Training`.
        loading: options of `load_images`.
        note: what is ours, and what was published.
        meant_for: the device on which its length makes sense.

    Example:
        >>> from bilevel.methods.presets import PRESETS
        >>> preset = PRESETS["cifar10-r0.1"]
        >>> preset.method.__name__, preset.model["ratio"], preset.settings().num_steps
        ('BiDVL', 0.1, 300000)
    """

    name: str
    about: str
    method: type[EBLVM]
    data: str
    shape: tuple[int, int, int]
    source: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    loading: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    meant_for: Literal["cpu", "cuda"] = "cuda"

    def build(self, **options: Any) -> EBLVM:
        """The untrained model.

        Args:
            **options: of the method's `for_images`, instead of the preset's or beside them.
        """
        make = METHODS[self.method.__name__].for_images
        assert make is not None  # there are presets of nothing else
        return make(self.shape, **{**self.model, **options})

    def settings(self, **options: Any) -> Training:
        """The training settings, all of them.

        Args:
            **options: fields of `Training`, instead of the preset's or beside them.

        Raises:
            ValueError: for a bad setting.
        """
        return validated(Training, {**self.method.training_defaults, **self.training, **options})


def steps(epochs: int, images: int, batch_size: int) -> int:
    """Steps of so many passes over so many images; what is left of a pass is dropped."""
    return epochs * (images // batch_size)


RGB32, RGB64, RGB128, GREY32 = (3, 32, 32), (3, 64, 64), (3, 128, 128), (1, 32, 32)
OFTEN: Mapping[str, Any] = {"log_every": 500, "checkpoint_every": 5000}
"""What a run of days writes down; ours, the codes save every 25 or 50 epochs."""
