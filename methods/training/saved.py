"""A saved model: `model.json`, what it is, and `weights.safetensors` beside it."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

from torch import nn

from bilevel.arguments import explained
from bilevel.methods.machines import from_recipe
from bilevel.methods.training.json_lines import read_document, write_document
from bilevel.methods.training.schemas import Model
from bilevel.methods.training.weights import fill_module, read_weights, write_weights
from bilevel.refusals import path_of

ABOUT, WEIGHTS = "model.json", "weights.safetensors"


AnyModel = TypeVar("AnyModel", bound="Saved")


class Saved(Protocol):
    """A model that can be made of plain values.

    Attributes:
        recipe: these values; `None` if it was made of the caller's own modules.
        standardised: whether it was trained on standardised rows.
        visible_shape: shape of one visible, if it is known.
    """

    recipe: dict[str, Any] | None
    standardised: bool
    visible_shape: tuple[int, ...] | None

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Self:
        """Build what a recipe describes."""
        ...


def write_model(model: Saved, folder: str | os.PathLike[str]) -> None:
    """Write both files.

    Raises:
        WriteError: if the disk is full, say; what was there before is whole.
    """
    about: dict[str, Any] = {"method": type(model).__name__, "recipe": model.recipe}
    if model.standardised:
        about["standardised"] = True
    if model.recipe is None and model.visible_shape is not None:  # a recipe tells it
        about["visible_shape"] = list(model.visible_shape)
    folder = path_of("folder", folder)
    write_weights(folder / WEIGHTS, cast(nn.Module, model).state_dict(), about)
    write_document(folder / ABOUT, about)


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the saved model is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged.
    """
    path = path_of("folder", folder) / ABOUT
    if not path.exists():
        raise FileNotFoundError(f"there is no saved model in `{folder}` (no `{ABOUT}`)")
    return read_document(path, Model)


def read_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Take the weights that a model of the same method and settings saved, in their precision.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are damaged, or of another model.
    """
    path = Path(folder) / WEIGHTS
    weights = read_weights(path, read_about(folder))
    for name, own in (*model.named_parameters(), *model.named_buffers()):
        saved = weights.get(name)
        if saved is not None and own.is_floating_point() and own.dtype != saved.dtype:
            own.data = own.data.to(saved.dtype)
    fill_module(model, weights, path)


def built(kind: type[AnyModel], recipe: dict[str, Any]) -> AnyModel:
    """A model by the constructor whose arguments its recipe holds."""
    options, make = dict(recipe), cast(Any, kind)
    if "shape" in options:
        options["shape"] = tuple(options["shape"])
        return cast(AnyModel, make.for_images(**options))
    if "model" in options:
        return cast(AnyModel, make(from_recipe(options.pop("model")), **options))
    return cast(AnyModel, make.for_table(**options))


def rebuilt(kind: type[AnyModel], recipe: dict[str, Any], source: Path) -> AnyModel:
    """A model from its recipe.

    Args:
        kind: the method.
        recipe: plain values.
        source: the file they are from.

    Raises:
        ValueError: if no model can be made of them.
    """
    try:
        return kind.from_recipe(recipe)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"no `{kind.__name__}` can be made of the settings in `{source}`: {error}"
        ) from None


def loaded(
    kind: type[AnyModel], folder: str | os.PathLike[str], modules: Mapping[str, Any]
) -> AnyModel:
    """A saved model of a method, in evaluation mode.

    Args:
        kind: the method.
        folder: where it was saved.
        modules: constructor arguments, needed if the model was made of the caller's own modules.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if it is another method's, its modules are needed, or the weights are damaged.
    """
    about, name = read_about(folder), kind.__name__
    if about["method"] != name:
        other = about["method"]
        raise ValueError(f"`{folder}` holds a `{other}`; load it with `{other}.load`")
    if modules:
        model = cast(AnyModel, explained(cast(Any, kind))(**modules))
    elif about["recipe"] is not None:
        model = rebuilt(kind, about["recipe"], Path(folder) / ABOUT)
    else:
        raise ValueError(
            f"the model in `{folder}` was made of your own modules; pass them again: "
            f"`{name}.load(folder, {_needed(kind)})`"
        )
    return restored_into(model, folder)


def _needed(kind: type[Saved]) -> str:
    """The arguments of a constructor that have no default, as they are written in a call.

    Example:
        >>> class Own:
        ...     def __init__(self, energy, latent_dim, *, width=3): ...
        >>> _needed(Own)
        'energy=..., latent_dim=...'
    """
    parameters = inspect.signature(kind).parameters.values()
    named = [p.name for p in parameters if p.default is p.empty and p.kind.name != "VAR_KEYWORD"]
    return ", ".join(f"{name}=..." for name in named)


def restored_into(model: AnyModel, folder: str | os.PathLike[str]) -> AnyModel:
    """The model, untrained before, as it was saved, in evaluation mode.

    Args:
        model: of the same method and networks as the saved one.
        folder: where that was saved.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is another method's, or the weights are damaged or of other networks.
    """
    about, name = read_about(folder), type(model).__name__
    if about["method"] != name:
        raise ValueError(f"`{folder}` holds a `{about['method']}`, and what was made is a `{name}`")
    module = cast(nn.Module, model)
    read_into(module, folder)
    model.standardised = bool(about.get("standardised", False))
    if about.get("visible_shape") is not None and model.visible_shape is None:
        model.visible_shape = tuple(about["visible_shape"])
    module.eval()
    return model
