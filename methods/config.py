"""Settings of a training run: plain values, the same in Python, JSON and on the command line."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bilevel.refusals import nearest as nearest
from bilevel.refusals import one_of as one_of


class Training(BaseModel):
    r"""How a model is trained; everything `fit` accepts by keyword.

    Steps are upper-level steps. The defaults are BiDVL's for 32 pixel images (Kan et al., 2022,
    official code), which has neither moving average nor mixed precision.

    With `ema` the trained model, like the ones evaluated on the way, has averaged weights; batch-norm
    statistics are those of the last step. The average looks back over some 1 / (1 - ema) steps and
    begins at the initial weights, so it is for runs of many times that length. Checkpoints hold both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(3000, gt=0, description="upper-level steps")
    batch_size: int = Field(100, gt=1, description="images per batch")
    lower_steps: int = Field(1, ge=0, description="lower-level steps per upper-level step")
    order: Literal["upper_first", "lower_first"] = Field(
        "upper_first", description="which level moves first"
    )
    upper_lr: float = Field(1e-4, gt=0, description="learning rate of the upper level (energy)")
    lower_lr: float = Field(3e-4, gt=0, description="learning rate of the lower level")
    betas: tuple[float, float] = Field((0.0, 0.9), description="Adam's two decay rates")
    lower_weight_decay: float = Field(1e-4, ge=0, description="weight decay of the lower level")
    schedule: Literal["exponential", "cosine"] = Field(
        "exponential", description="learning rates: a factor per epoch, or half a cosine down to 0"
    )
    decay: float = Field(
        0.998, gt=0, le=1, description="learning-rate factor per epoch of the exponential schedule"
    )
    final_lr: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the learning rates left at the end of the cosine schedule",
    )
    clip_upper: float | None = Field(None, gt=0, description="largest norm of the hypergradient")
    clip_lower: float | None = Field(None, gt=0, description="largest norm of the lower gradient")
    seed: int = Field(0, ge=0, description="seed of everything random")
    max_seconds: float | None = Field(None, gt=0, description="stop after this much training time")
    compile: bool = Field(
        False, description="compile the steps: needs a C++ compiler, pays on small models"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="arithmetic of the losses (bfloat16: mixed, for GPUs)"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which becomes the model"
    )
    sync_batch_norm: bool = Field(
        False, description="with several processes: batch norm over the whole batch"
    )
    evaluate_every: int | None = Field(
        None, gt=0, description="steps between two evaluations of a copy; the best one is kept"
    )
    log_every: int = Field(50, gt=0, description="steps between two lines of metrics")
    checkpoint_every: int = Field(500, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(1, gt=0, description="newest checkpoints kept on disk")


def validated(kind: type[Training], values: dict[str, Any]) -> Training:
    """`kind(**values)` with errors a person can act on.

    Raises:
        ValueError: naming each bad setting, what was got, and the nearest valid name if unknown.

    Example:
        >>> validated(Training, {"num_step": 5})
        Traceback (most recent call last):
            ...
        ValueError: there is no setting `num_step`; did you mean `num_steps`?
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_sentence(kind, e) for e in error.errors())) from None


def _sentence(kind: type[BaseModel], error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no setting `{name}`; {nearest(name, kind.model_fields)}"
    return f"`{name}`: {error['msg'].lower()}, got {error['input']!r}"
