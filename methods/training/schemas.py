"""What the files of a run and of a suite hold, field by field: checked whenever one is read."""

from typing import Any, Literal, Self, final

from pydantic import BaseModel, Field, model_validator

from bilevel.methods.training.json_lines import Line, check_fields
from bilevel.methods.training.settings import Training, validated


@final
class DataShape(BaseModel, extra="allow", strict=True):
    """Of the training data."""

    shape: list[int] = Field(min_length=1)


@final
class Notes(BaseModel, extra="allow", strict=True):
    """What the caller of `fit` noted of the run."""

    data: str | None = None
    data_options: dict[str, bool | int | float | str | None] = Field({})
    name: str | None = None
    note: str | None = None
    solver: dict[str, bool | int | float | str | None] = Field({})
    device: str | None = None
    command: str | None = None
    evaluations: dict[str, Any] = Field({})
    log_to: list[str] = Field([])


@final
class Stopped(BaseModel, extra="allow", strict=True):
    """A training that ended before its last step."""

    step: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    by: str


@final
class Config(BaseModel, extra="allow", strict=True):
    """`config.json` of a run: all that `fit` writes, or only notes."""

    method: str | None = None
    model: dict[str, Any] | None = None
    training: dict[str, Any] = Field({})
    solver: str | None = None
    data: DataShape | None = None
    notes: Notes = Field(Notes())
    compiled: str | None = None
    began: str | None = None
    resumed: list[int] = Field([])
    commit: str | None = None
    versions: dict[str, str] = Field({})
    stopped: Stopped | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        wanted = {"method", "model", "training", "solver"}
        missing = wanted - self.model_fields_set
        if missing and missing != wanted:
            raise ValueError(f"`{min(missing)}` is missing")
        if not missing:
            if self.method is None or self.solver is None or self.data is None:
                raise ValueError("`method`, `solver` and `data` cannot be null")
            validated(Training, self.training)
        return self


@final
class Evaluated(BaseModel, extra="allow", strict=True):
    """`evaluation.json` of a run."""

    results: dict[str, float]
    features: str | None = None
    statistics: str | None = None


@final
class Best(BaseModel, extra="allow", strict=True):
    """`best.json` of a run."""

    step: int = Field(ge=1)
    rule: str
    evaluation: Line


@final
class Model(BaseModel, extra="allow", strict=True):
    """`model.json` of a saved model."""

    method: str
    recipe: dict[str, Any] | None
    visible_shape: list[int] | None = None


@final
class Classifier(BaseModel, strict=True):
    """What a file of feature weights says of itself."""

    name: str
    accuracy: float = Field(ge=0, le=1)
    sizes: list[Any] = Field(min_length=3, max_length=3)


@final
class NamedPart(BaseModel, extra="allow", strict=True):
    """A part of a cell that a record spells out."""

    name: str


@final
class MethodPart(BaseModel, extra="allow", strict=True):
    """The method of a cell."""

    name: str
    method: str
    options: dict[str, Any]


@final
class Judged(BaseModel, extra="allow", strict=True):
    """How a trained cell was judged."""

    known: str
    value: float
    standard_error: float | None
    lower: float | None
    upper: float | None


@final
class CellLine(BaseModel, extra="allow", strict=True):
    """A line of a suite's `records.jsonl`."""

    cell: str
    status: Literal["finished", "failed"]
    data: NamedPart
    model: NamedPart
    method: MethodPart
    seed: int
    solver: str
    training: dict[str, Any]
    commit: str | None
    versions: dict[str, str]
    device: str
    threads: int
    ceiling: float | None
    steps: int = Field(ge=0)
    seconds: float
    startup_seconds: float
    steps_per_second: float | None
    trace: list[list[float | None]]
    test: dict[str, Any] | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.status == "finished":
            check_fields(Judged, self.test or {})
        elif self.reason is None:
            raise ValueError("a cell failed, but `reason` is missing")
        return self


@final
class TraceLine(BaseModel, extra="allow", strict=True):
    """A line of a cell's `trace.jsonl`."""

    step: int = Field(ge=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    startup_seconds: float = Field(ge=0, allow_inf_nan=False)
    starts: int = Field(ge=0)
    log_likelihood: float | None = None
