"""Configuration of a suite: which methods, on which models and data, from which seeds; plain values.

A suite is a list of blocks, a block a grid: every method on every model on every data set, once per
seed. One such combination is a cell. In JSON:

    {
      "name": "board",
      "note": "what is compared here, in a sentence",
      "blocks": [
        {
          "data": ["checkerboard"],
          "models": [{"kind": "GaussianRBM", "options": {"latent_dim": 4}}],
          "methods": [
            "ml",
            {"preset": "dsm", "training": {"upper_lr": 0.002}},
            {
              "name": "bism-dsm-3",
              "method": "BiSM",
              "options": {"objective": "denoising", "sigma": 0.05},
              "solver": {"kind": "unrolled", "num_steps": 3},
              "training": {"lower_steps": 5}
            }
          ],
          "training": {"num_steps": 30000},
          "seeds": [0, 1, 2]
        }
      ]
    }

A method's short name stands for a whole entry, see `METHOD_PRESETS`; with `preset` some of it is
changed. `training` holds fields of `Training`: those of the method's paper count where neither the
block nor the method says otherwise. All fields are those of the classes below. `bilevel bench eblvm
--config FILE.json --out FOLDER` runs it; FOLDER then holds the whole configuration, every short name
spelled out (`suite.json`), and the records (`records.jsonl`): these two are enough for
`bilevel report FOLDER` to make tables and curves, so commit them and leave `cells/` out.

A `source`, a `kind`, a `method` or the `kind` of a solver may be one that is not of this package: the
address of an object, `package.module:Name`, or the name under which it is given as `own`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from bilevel.methods.machines import MACHINES
from bilevel.methods.suite.presets import BISM_EXACT, BISM_UNROLLED, METHOD_PRESETS, SUITES
from bilevel.plugins import entry_points, is_address
from bilevel.refusals import nearest

_NAME = r"^[A-Za-z0-9][\w.+-]*$"


@final
class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Rows to train and test on. A string stands for `{"source": ...}`."""

    source: str = Field(
        description="what `load_table` takes: a name, PATH.npz, PATH.npz:NAME, PATH.csv or PATH.parquet;"
        " or rows of your own"
    )
    name: str = Field("", description="short name; by default the last part of the source")
    options: dict[str, Any] = Field(
        {}, description="further arguments of `load_table`, or of your own function"
    )
    image: tuple[int, int] | None = Field(
        None, description="height and width, if a row is an image; known for digits"
    )
    checksum: str = Field("", description="of rows given as an object, so that others are noticed")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        value = {"source": value} if isinstance(value, str) else dict(value)
        source = str(value.get("source", ""))
        inside = ".npz:" in source or is_address(source)
        value.setdefault("name", source.rpartition(":")[2] if inside else Path(source).stem)
        if source == "digits":
            value.setdefault("image", (8, 8))
        return value


@final
class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """A Boltzmann machine; the width of its visibles is that of the data.

    A string such as `RBM-15` or `DBM-20-10` stands for a kind and the sizes of its hidden layers.
    """

    kind: str = Field(description="RBM, GaussianRBM, DBM or GaussianDBM, or one of your own")
    name: str = Field(
        "", description="short name; by default the kind and the sizes among the options"
    )
    options: dict[str, Any] = Field({}, description="further arguments of its constructor")

    @model_validator(mode="before")
    @classmethod
    def _label(cls, value: Any) -> Any:
        value = _sized(value) if isinstance(value, str) else dict(value)
        if "options" not in value and "-" in str(value.get("kind")):
            value |= _sized(str(value["kind"]))
        sizes = [size for size in value.get("options", {}).values() if not isinstance(size, bool)]
        flat = [n for size in sizes for n in (size if isinstance(size, list | tuple) else [size])]
        kind = str(value.get("kind")).rpartition(":")[2]
        value.setdefault("name", "-".join(map(str, [kind, *flat])))
        return value


def _sized(text: str) -> dict[str, Any]:
    """The entry of a model that is written as its name: `RBM-15`."""
    kind, *sizes = text.split("-")
    if kind not in MACHINES or not sizes:
        if is_address(text) or text in entry_points("model") or kind not in MACHINES:
            return {"kind": text}
        raise ValueError(f"`{text}` does not say how large it is; write it as `{text}-15`")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"`{text}` is no model; write its kind and sizes, such as `{kind}-15`")
    widths = [int(size) for size in sizes]
    deep = kind.endswith("DBM")
    if deep != (len(widths) == 2):
        raise ValueError(
            f"a `{kind}` has {'two hidden layers' if deep else 'one hidden layer'}, and `{text}` gives "
            f"{len(widths)}"
        )
    return {"kind": kind, "options": {"latent_dims": widths} if deep else {"latent_dim": widths[0]}}


@final
class MethodConfig(BaseModel, frozen=True, extra="forbid"):
    """A method with all it needs. A string is an entry of `METHOD_PRESETS`, or one of your own."""

    name: str = Field(pattern=_NAME, description="short name, unique in a block")
    method: str = Field(description="name of the class, such as BiSM, or one of your own")
    options: dict[str, Any] = Field({}, description="further arguments of its constructor")
    solver: dict[str, Any] = Field(
        {"kind": "alternating"},
        description="by default what `fit` takes: alternating for all methods but BiSM. Otherwise its "
        "kind: alternating, unrolled, implicit or one of your own; beside it its arguments, and for "
        "implicit `linear_solver`: cholesky, conjugate_gradient, neumann, gmres or identity, and its",
    )
    training: dict[str, Any] = Field({}, description="fields of `Training`")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        value = {"preset": value} if isinstance(value, str) else dict(value)
        if "preset" not in value:
            if value.get("method") == "BiSM":
                exact = value.get("options", {}).get("expectation") == "exact"
                value.setdefault("solver", BISM_EXACT if exact else BISM_UNROLLED)
            return value
        short = value.pop("preset")
        if is_address(str(short)) or (
            short not in METHOD_PRESETS and short in entry_points("method")
        ):
            return {"name": str(short).rpartition(":")[2], "method": short, **value}
        if ":" in str(short):
            raise ValueError(f"`{short}` is no address of a method; write `package.module:Name`")
        if short not in METHOD_PRESETS:
            raise ValueError(f"there is no method `{short}`; {nearest(str(short), METHOD_PRESETS)}")
        preset = {"name": short, **METHOD_PRESETS[short]}
        for field in ("options", "training"):
            value[field] = {**preset.get(field, {}), **value.get(field, {})}
        return {**preset, **value}


@final
class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """How a model is judged where its partition function cannot be enumerated."""

    points: int = Field(20, gt=1, description="evaluations during training, at log-spaced steps")
    chains: int = Field(100, gt=1, description="annealed chains in each direction")
    temperatures: int | None = Field(
        None, gt=1, description="equally spaced; by default the published 15,000, dense near 1"
    )
    trace_temperatures: int = Field(1000, gt=1, description="likewise, during training")
    burn_in: int = Field(
        10_000, gt=0, description="Gibbs steps from the data to where downward chains start"
    )
    seed: int = Field(0, ge=0, description="seed of all chains and draws")


@final
class Block(BaseModel, frozen=True, extra="forbid"):
    """A grid of cells with common settings."""

    note: str = Field("", description="what is compared, what files it needs and where they go")
    data: list[DataConfig] = Field(min_length=1, description="data sets")
    models: list[ModelConfig] = Field(min_length=1, description="models")
    methods: list[MethodConfig] = Field(min_length=1, description="methods")
    training: dict[str, Any] = Field({}, description="fields of `Training`, for all methods")
    seeds: list[int] = Field([0], min_length=1, description="seeds of weights, batches and noise")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how models are judged")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different and not negative")
        return seeds


@final
class SuiteConfig(BaseModel, frozen=True, extra="forbid"):
    """A whole suite."""

    name: str = Field(pattern=_NAME, description="short name")
    note: str = Field("", description="what is compared, in a sentence")
    blocks: list[Block] = Field(min_length=1, description="the grids")

    def cells(self, only: Iterable[str] = ()) -> "list[Cell]":
        """All cells in order.

        Args:
            only: names of data, models and methods to restrict the suite to. Where it names no data, all
                data are meant; models and methods likewise.

        Raises:
            ValueError: for a name that nothing has, or two cells of the same name.
        """
        found = [
            Cell(data, model, method, seed, block)
            for block in self.blocks
            for data in block.data
            for model in block.models
            for method in block.methods
            for seed in block.seeds
        ]
        names = [cell.name for cell in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two cells are called `{name}`; give one a `name` of its own")
        parts = [{cell.parts[i] for cell in found} for i in range(3)]
        known, wanted = sorted(parts[0] | parts[1] | parts[2]), set(only)
        for name in wanted.difference(known):
            raise ValueError(f"nothing in this suite is called `{name}`; {nearest(name, known)}")
        chosen = [kind & wanted or kind for kind in parts]
        return [c for c in found if all(p in k for p, k in zip(c.parts, chosen, strict=False))]

    def with_seeds(self, seeds: list[int]) -> Self:
        """The same suite from other seeds."""
        content = self.model_dump(mode="json")
        for block in content["blocks"]:
            block["seeds"] = seeds
        return type(self)(**content)


@final
@dataclass(frozen=True)
class Cell:
    """One training: a method on a model on a data set from a seed, and the block it is in."""

    data: DataConfig
    model: ModelConfig
    method: MethodConfig
    seed: int
    block: Block

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Names of data, model and method, and the seed."""
        return self.data.name, self.model.name, self.method.name, f"seed{self.seed}"

    @property
    def name(self) -> str:
        """The parts, joined by slashes: also the cell's folder."""
        return "/".join(self.parts)


def load_config(source: str | os.PathLike[str]) -> SuiteConfig:
    """A suite by the name of a preset, or from a JSON file.

    Raises:
        ValueError: naming what is wrong, with the nearest valid name; if there is no such preset.
        FileNotFoundError: if there is no such file.

    Example:
        >>> suite = load_config("small")
        >>> suite.cells()[0].name
        'checkerboard/GaussianRBM-4/ml/seed0'
    """
    path = SUITES.get(os.fspath(source), Path(source))
    if not path.suffix and not path.exists():
        raise ValueError(f"there is no preset `{source}`; {nearest(str(source), SUITES)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` holds a {type(content).__name__}, not a configuration: {{...}}")
    return parse_config(content, str(source))


def parse_config(content: Mapping[str, Any], source: str) -> SuiteConfig:
    """A suite from plain values.

    Args:
        content: fields of `SuiteConfig`.
        source: what to call it in a refusal.

    Raises:
        ValueError: naming every bad field, what was got, and the nearest valid name if unknown.
    """
    try:
        return SuiteConfig(**content)
    except ValidationError as error:
        sentences = "; ".join(_complaint(e) for e in error.errors())
    except TypeError as error:
        sentences = str(error)
    raise ValueError(f"`{source}`: {sentences}")


_KINDS: dict[str, type[BaseModel]] = {
    "blocks": Block,
    "data": DataConfig,
    "models": ModelConfig,
    "methods": MethodConfig,
    "evaluation": EvaluationConfig,
}


def _complaint(error: Any) -> str:
    location = error["loc"]
    where = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        owners = [part for part in location[:-1] if isinstance(part, str)]
        fields = (_KINDS[owners[-1]] if owners else SuiteConfig).model_fields
        return f"there is no field `{where}`; {nearest(str(location[-1]), fields)}"
    if error["type"] == "missing":
        return f"`{where}` is missing"
    if error["type"] == "value_error":
        return f"`{where}`: {error['ctx']['error']}"
    return f"`{where}`: {error['msg'].lower()}, got {error['input']!r}"
