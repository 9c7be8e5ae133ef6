"""Settings of a training run: plain values, the same in Python, JSON and on the command line."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from bilevel.refusals import nearest as nearest
from bilevel.refusals import one_of as one_of

_Share = Annotated[float, Field(ge=0, lt=1)]


@final
class Training(BaseModel):
    r"""How a model is trained; everything `fit` accepts by keyword.

    Steps are upper-level steps. The defaults are BiDVL's for 32 pixel images (Kan et al., 2022,
    official code), which has neither moving average nor mixed precision.

    With `ema` the trained model, like the ones evaluated on the way, has averaged weights; batch-norm
    statistics are those of the last step. The average looks back over some 1 / (1 - ema) steps and
    begins at the initial weights, so it is for runs of many times that length. Checkpoints hold both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_steps: int = Field(3000, gt=0, description="upper-level steps")
    batch_size: int = Field(100, gt=1, description="images per batch")
    lower_steps: int = Field(1, ge=0, description="lower-level steps per upper-level step")
    order: Literal["upper_first", "lower_first"] = Field(
        "upper_first", description="which level moves first"
    )
    upper_lr: float = Field(1e-4, gt=0, description="learning rate of the upper level (energy)")
    lower_lr: float = Field(3e-4, gt=0, description="learning rate of the lower level")
    betas: tuple[_Share, _Share] = Field((0.0, 0.9), description="Adam's two decay rates")
    upper_weight_decay: float = Field(0.0, ge=0, description="weight decay of the upper level")
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
    standardise: bool = Field(
        False,
        description="train on columns of mean 0 and deviation 1; the model ends in the data's units",
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    max_seconds: float | None = Field(
        None, gt=0, allow_inf_nan=True, description="stop after this much training time"
    )
    compile: Literal[False, True, "record", "inductor"] = Field(
        False,
        description="make graphs of the steps: record them (CUDA) or compile them with inductor "
        "(needs a C++ compiler, pays on small models)",
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
    best: str | None = Field(
        None,
        min_length=1,
        description="number of the evaluations that the best model is kept by: a name, or one after "
        "'highest ' or 'lowest ' (default: frechet, else rmse, else the first that is known)",
    )
    certify_every: int | None = Field(
        None,
        gt=0,
        description="steps between two certificates of the hypergradient, which take time and change "
        "nothing",
    )
    log_every: int = Field(50, gt=0, description="steps between two lines of metrics")
    checkpoint_every: int = Field(500, gt=0, description="steps between two checkpoints")
    keep_checkpoints: int = Field(1, gt=0, description="newest checkpoints kept on disk")

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_other_thing(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse texts and truth values for numbers: pydantic would take "10" for 10, `True` for 1."""
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        number = ("int" in wanted or "float" in wanted) and "Literal" not in wanted
        if number and isinstance(value, (str, bool)):
            raise PydanticCustomError("number", "input should be a number")
        return value


MACHINE_DEFAULTS: dict[str, Any] = {
    "upper_lr": 1e-3,
    "lower_lr": 1e-3,
    "betas": (0.9, 0.95),
    "lower_weight_decay": 0.0,
    "decay": 1.0,
    "order": "lower_first",
}
"""Usual settings of the methods that train Boltzmann machines."""

SCORE_DEFAULTS: dict[str, Any] = {**MACHINE_DEFAULTS, "lower_steps": 5}
"""Those of the methods that match scores and fit a posterior on the way."""


LOWER_ONLY = ("lower_lr", "lower_steps", "lower_weight_decay", "clip_lower", "order")
"""Settings that mean nothing to a model with a single level."""

_MOST_USED = ("num_steps", "batch_size", "upper_lr", "lower_lr", "seed")
_RATES, _DECAYS = ("upper_lr", "lower_lr"), ("upper_weight_decay", "lower_weight_decay")
_CLIPS = ("clip_upper", "clip_lower")
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "learning_rate", "rate", "eta", "step_size"), _RATES),
    **dict.fromkeys(("weight_decay", "decay_weight", "l2", "wd"), _DECAYS),
    **dict.fromkeys(("clip", "grad_clip", "clip_grad", "clip_grad_norm", "max_norm"), _CLIPS),
    **dict.fromkeys(("steps", "n_steps", "iterations", "n_iter", "max_steps"), ("num_steps",)),
    **dict.fromkeys(("random_state", "rng", "manual_seed"), ("seed",)),
    **dict.fromkeys(("bs", "batch", "n_batch", "minibatch_size"), ("batch_size",)),
}
"""What settings are called elsewhere."""

_INSTEAD = {
    "device": "move the model there, `model.to(...)`, before `fit`",
    "optimizer": "give both levels' optimizers, `optimizers=(upper, lower)`",
    "scheduler": 'choose a `schedule`, "exponential" or "cosine"',
    "callback": "give a list, `callbacks=[...]`",
    "verbose": "give `progress=True` or `False`",
}
EPOCHS = ("num_epochs", "epochs", "epoch", "n_epochs", "max_epochs")
"""What the length of a training is counted in elsewhere."""


def validated(kind: type[Training], values: dict[str, Any], *, levels: int = 2) -> Training:
    """`kind(**values)` with errors a person can act on.

    Args:
        kind: the class of the settings.
        values: of the settings, by name.
        levels: how many the model has; settings of a level it does not have are not suggested.

    Raises:
        ValueError: naming each bad setting, what was got, and the nearest valid name if unknown.

    Example:
        >>> validated(Training, {"num_step": 5})
        Traceback (most recent call last):
            ...
        ValueError: there is no setting `num_step`; did you mean `num_steps`?
        >>> validated(Training, {"lr": 0.1}, levels=1)
        Traceback (most recent call last):
            ...
        ValueError: there is no setting `lr`; did you mean `upper_lr`?
    """
    try:
        return kind(**values)
    except ValidationError as error:
        sentences = [_sentence(kind, e, levels) for e in error.errors()]
        raise ValueError("; ".join(sentences)) from None


def refuse_idle(
    training: Training,
    given: Iterable[str],
    usual: Training,
    *,
    levels: int,
    own_optimizers: bool = False,
) -> None:
    """Refuse settings that would change nothing: their effect would be waited for in vain.

    One that has its usual value is let pass: a whole configuration may be given.

    Args:
        training: all settings.
        given: names of those that the caller gave.
        usual: all settings where nothing is given.
        levels: how many the model has.
        own_optimizers: whether the caller brought optimizers, whose settings count then.

    Raises:
        ValueError: naming the first.
    """
    made = ("upper_lr", *_DECAYS, "lower_lr", "betas")
    for name in given:
        if getattr(training, name) == getattr(usual, name):
            continue
        if levels == 1 and name in LOWER_ONLY:
            other = name.replace("lower_", "upper_").replace("_lower", "_upper")
            instead = f"; did you mean `{other}`?" if other in Training.model_fields else ""
            raise ValueError(
                f"`{name}` does nothing here, this model has an upper level alone"
                f"{instead if other != name else '; leave it out'}"
            )
        if own_optimizers and name in made:
            raise ValueError(
                f"`{name}` does nothing beside `optimizers`, which have settings of their own; set it "
                "there"
            )


def _sentence(kind: type[BaseModel], error: Any, levels: int) -> str:
    name = str(error["loc"][0])
    if error["type"] != "extra_forbidden":
        return f"`{name}`: {error['msg'].lower()}, got {error['input']!r}"
    said, idle = f"there is no setting `{name}`;", LOWER_ONLY if levels == 1 else ()
    if name in EPOCHS:
        return f"{said} give `num_steps`: an epoch of n rows has n // batch_size of them"
    if name in _INSTEAD:
        return f"{said} {_INSTEAD[name]}"
    if name in ELSEWHERE:
        meant = " or ".join(f"`{each}`" for each in ELSEWHERE[name] if each not in idle)
        return f"{said} did you mean {meant}?"
    working = [each for each in kind.model_fields if each not in idle]
    if difflib.get_close_matches(name, working, n=1):
        return f"{said} {nearest(name, working)}"
    some = ", ".join(f"`{each}`" for each in _MOST_USED if each not in idle)
    return f"{said} the most used are {some}, and `bilevel.methods.Training` describes all"
