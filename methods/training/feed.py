"""`Feed`: what a training reads its batches from, whatever the data came as."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from bilevel import Batches
from bilevel.batches import Source
from bilevel.distributed import world_size
from bilevel.errors import CheckpointError
from bilevel.global_random import reseeded
from bilevel.methods.data.streams import Stream, as_stream
from bilevel.methods.training.preconditions import refuse_small
from bilevel.methods.training.run import Destination
from bilevel.methods.training.settings import Training
from bilevel.methods.training.standardising import Standardised, remark_units, standardised
from bilevel.methods.training.trainable import Trainable
from bilevel.refusals import shown

Augment: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Makes of a batch of visibles another one of the same shape, with a generator to draw from."""


@final
@dataclass(frozen=True)
class Feed:
    """What a training reads.

    Attributes:
        source: endless batches as the networks take them.
        some: a few visibles, as the networks take them.
        training: the settings; where data come in batches, with their size.
        epoch: the number of epochs that have ended after so many steps.
        about: plain values on the data, for the configuration of a run.
    """

    source: Source
    some: Tensor
    training: Training
    epoch: Callable[[int], int]
    about: dict[str, Any]


@contextmanager
def feeding(
    model: Trainable,
    data: Any,
    training: Training,
    destination: Destination,
    augment: Augment | None = None,
    sized: bool = False,
) -> Iterator[Feed]:
    """Data as they came, as what a training reads; with `standardise` the model is in their units.

    Args:
        model: what is trained.
        data: rows in memory, a data set, a loader or another iterable of batches.
        training: the settings.
        destination: where the run goes; one in a folder must be resumable.
        augment: changes each batch.
        sized: whether the caller gave `batch_size`.

    Raises:
        TypeError: for what is no data, or rows that are no visibles.
        ValueError: for data the model does not take, and settings that do not fit them.
        CheckpointError: if the data could not be read again in the same order, and have to be.
    """
    if augment is not None:
        _refuse_augment(augment, training)
    if isinstance(part := getattr(data, "train", None), Tensor):
        data = part  # of `Images`, of a `Table`
    stream = as_stream(data, training.batch_size, training.seed, model.admit, model.as_visibles)
    if stream is not None:
        try:
            yield _augmented(_streamed(model, stream, training, destination, sized), model, augment)
        finally:
            stream.close()
        return
    with standardised(cast(Standardised, model), model.admit(data), training.standardise) as rows:
        refuse_small(rows, training)
        source = Batches(rows, training.batch_size, seed=training.seed, convert=model.as_visibles)
        per_epoch = len(rows) // training.batch_size
        spread = torch.linspace(0, len(rows) - 1, min(len(rows), 32)).long()
        some = model.as_visibles(rows[spread.to(rows.device)])
        about = {"shape": list(rows.shape)}
        feed = Feed(source, some, training, lambda step: step // per_epoch, about)
        yield _augmented(feed, model, augment)


def _streamed(
    model: Trainable, stream: Stream, training: Training, destination: Destination, sized: bool
) -> Feed:
    if training.standardise:
        raise ValueError(
            f"`standardise` needs the means of all rows, which the {stream.kind} gives one batch at a "
            "time; leave it out and scale the rows where they are read, or give them as one tensor"
        )
    first = stream.peek()
    if destination.run is not None or world_size() > 1:
        stream.refuse_unresumable()
    if stream.batches:
        size = len(first)
        if sized and training.batch_size != size:
            raise ValueError(
                f"`batch_size` is {training.batch_size}, but the {stream.kind} gives batches of {size}; "
                "set it where they are made (`DataLoader(..., batch_size=...)`) and leave it out here"
            )
        training = training.model_copy(update={"batch_size": size})
    remark_units(cast(Standardised, model), first, whole=False)
    about = {"shape": [stream.rows or 0, *first.shape[1:]], "kind": stream.kind.strip("`")}
    steps = stream.per_epoch
    epoch = (lambda step: step // steps) if steps else (lambda step: stream.epochs)
    return Feed(stream, first[:32], training, epoch, about)


# ---------------------------------------------------------------------- augmentation


def _augmented(feed: Feed, model: Trainable, augment: Augment | None) -> Feed:
    if augment is None:
        return feed
    source = Augmented(feed.source, augment, feed.training.seed, model.device)
    changed = source.changed(feed.some)
    try:
        model.admit(changed)
    except ValueError as error:
        raise ValueError(f"`augment` returned what the model does not take: {error}") from error
    return Feed(source, feed.some, feed.training, feed.epoch, feed.about)


def _refuse_augment(augment: Any, training: Training) -> None:
    if not callable(augment):
        raise TypeError(
            "`augment` must be a function `(visibles, generator) -> visibles`, got "
            f"{shown(augment)}"
        )
    try:
        called = augment.forward if isinstance(augment, nn.Module) else augment
        inspect.signature(called).bind(None, None)
    except TypeError:
        raise TypeError(
            "`augment` is called as `augment(visibles, generator)`, and what was given does not take "
            "these two; write `lambda v, generator: ...` around it"
        ) from None
    except ValueError:  # written in C, say, with no signature to look at
        pass
    if training.standardise:
        raise ValueError(
            "`augment` is given visibles in the data's units, and `standardise` trains in others; leave "
            "one of them out, or scale the rows yourself"
        )


@final
class Augmented:
    """A source whose batches pass through a function; what it draws is seeded batch by batch.

    Args:
        source: of visibles.
        augment: the function.
        seed: from which, and from the number of the batch, its generator starts, and torch's, NumPy's
            and Python's global ones.
        device: of the visibles.
    """

    def __init__(self, source: Source, augment: Augment, seed: int, device: torch.device) -> None:
        self._source = source
        self._augment = augment
        self._seed = seed
        self._generator = torch.Generator(device)
        self._taken = 0

    def __next__(self) -> Tensor:
        batch = self.changed(next(self._source))
        self._taken += 1
        return batch

    def changed(self, batch: Tensor) -> Tensor:
        """What the function makes of a copy of a batch.

        Raises:
            TypeError: if that is no tensor.
            ValueError: if it has another shape, dtype or device.
        """
        self._generator.manual_seed(hash((self._seed, self._taken, 3)) % 2**62)
        with reseeded(self._seed, self._taken, 2):
            new = self._augment(batch.clone(), self._generator)
        if not isinstance(new, Tensor):
            raise TypeError(f"`augment` must return a tensor of visibles, got {shown(new)}")
        had, has = ((tuple(v.shape), v.dtype, str(v.device)) for v in (batch, new))
        if had != has:
            raise ValueError(
                f"`augment` must return visibles as it got them, of shape {had[0]}, {had[1]} on "
                f"{had[2]}; got {has[0]}, {has[1]} on {has[2]}"
            )
        return new.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"augmented": self._taken, "source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "augmented" not in state:
            raise CheckpointError(
                "the run was begun without `augment`; leave it out to resume it, or start a new run"
            )
        self._source.load_state_dict(state["source"])
        self._taken = state["augmented"]
