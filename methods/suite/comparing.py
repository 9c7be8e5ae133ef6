"""A suite from Python: objects and names mixed, records as the answer."""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bilevel.methods.data.containers import as_tensor
from bilevel.methods.suite.config import parse_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.runner import Observer, run_suite
from bilevel.refusals import path_of, shown, whole

Things = Mapping[str, Any] | Sequence[str]


def compare_methods(
    data: Things,
    models: Things,
    methods: Things,
    folder: str | os.PathLike[str],
    *,
    seeds: Iterable[int] = (0,),
    training: Mapping[str, Any] | None = None,
    device: str = "cpu",
    jobs: int = 1,
    observer: Observer = lambda number, total, record: None,
) -> list[dict[str, Any]]:
    """Train and judge every method on every model and data set, from every seed.

    Each of the three is a list of names, as in a configuration, or a mapping of names of your own to
    such names or to objects:

    - data: rows in any container, shape (n, d), of which a fifth is set aside to test on, a pair of
      training and test rows, a `Table`, or a function that returns one of these;
    - a model: a class or function that takes the number of columns, and a `generator` if it draws its
      weights, and returns a Boltzmann machine;
    - a method: a class or function that takes the machine and returns an `EBLVM`. Where that trains
      something else than the machine it needs `log_likelihood(v, generator=...)`, shape (n,);
    - any of them: an entry as in a configuration, such as
      `{"source": "mine.csv", "options": {"standardised": True}}`.

    Args:
        data: what to train and test on.
        models: what is trained.
        methods: what trains it.
        folder: where records and cells are, or will be; the same call goes on there.
        seeds: of weights, batches and noise.
        training: fields of `Training`, for all methods, such as `num_steps`.
        device: where to train, such as "cuda".
        jobs: how many cells are trained at once, each in a process of its own.
        observer: called after each cell with its number, the number of cells and its record.

    Returns:
        A record of plain values for every cell.

    Raises:
        TypeError: if `folder`, `seeds` or `training` is of another kind.
        ValueError: for what does not fit, before the first step.
        CrashError: after all others were run, if some cells crashed.

    Example:
        >>> import tempfile, torch
        >>> from bilevel.methods import GaussianRBM
        >>> rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> records = compare_methods(
        ...     {"mine": rows}, ["GaussianRBM-2"], ["ml", "dsm"], tempfile.mkdtemp(),
        ...     training={"num_steps": 3, "batch_size": 50},
        ... )
        >>> [record["cell"] for record in records]
        ['mine/GaussianRBM-2/ml/seed0', 'mine/GaussianRBM-2/dsm/seed0']
    """
    folder = path_of("folder", folder)
    if not isinstance(training, Mapping | None):
        raise TypeError(
            f'`training` maps settings to values, such as `{{"num_steps": 1000}}`; got {shown(training)}'
        )
    own: dict[str, Any] = {}
    block = {
        "data": [_entry("source", name, thing, own) for name, thing in _items(data)],
        "models": [_entry("kind", name, thing, own) for name, thing in _items(models)],
        "methods": [_entry("method", name, thing, own) for name, thing in _items(methods)],
        "training": dict(training or {}),
        "seeds": _whole_numbers(seeds),
    }
    config = parse_config({"name": "mine", "blocks": [block]}, "compare_methods")
    return run_suite(config, folder, device=device, observer=observer, own=own, jobs=jobs)


def load_suite(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a suite: one mapping of plain values for every cell that finished or failed.

    Raises:
        FileNotFoundError: if the folder holds no suite.
        ValueError: if a record is damaged.
    """
    home = SuiteFolder(folder)
    home.config()
    return home.records()


def _whole_numbers(seeds: Iterable[int]) -> list[int]:
    if isinstance(seeds, str | bytes | Mapping) or not isinstance(seeds, Iterable):
        raise TypeError(f"`seeds` must be whole numbers, such as `[0, 1]`, got {shown(seeds)}")
    return [whole("seeds", seed, 0) for seed in seeds]


def _items(things: Things) -> list[tuple[str | None, Any]]:
    if isinstance(things, Mapping):
        return list(things.items())
    if isinstance(things, str) or not all(isinstance(thing, str) for thing in things):
        raise ValueError(
            "`data`, `models` and `methods` are lists of names, or mappings of a name to each object: "
            '`{"mine": rows}`'
        )
    return [(None, thing) for thing in things]


def _entry(field: str, name: str | None, thing: Any, own: dict[str, Any]) -> Any:
    """The entry of a configuration; an object is put among `own` by its name."""
    if name is None:
        return thing
    if isinstance(thing, Mapping) and {field, "preset"} & set(thing):
        return {**thing, "name": name}
    if not isinstance(thing, str):
        if name in own:
            raise ValueError(f"two of these are called `{name}`; give one another name")
        own[name] = thing
        checked = {"checksum": _checksum(thing)} if field == "source" else {}
        return {"name": name, field: name, **checked}
    return {"name": name, "preset" if field == "method" else field: thing}


def _checksum(rows: Any) -> str:
    """Of the numbers, so that a folder is not continued with others."""
    if callable(rows) and not isinstance(rows, Tensor):
        return "of a function"
    parts = rows if isinstance(rows, tuple) else (getattr(rows, "train", rows),)
    parts = tuple(rows.values()) if isinstance(rows, Mapping) else parts
    total = 0
    for part in parts:
        try:
            total = zlib.crc32(as_tensor(part).float().cpu().contiguous().numpy().tobytes(), total)
        except (TypeError, ValueError):
            return "unknown"  # no rows, which is refused by name when they are loaded
    return f"{total:08x}"
