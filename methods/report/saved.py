"""What lies in the folder of a run beside its records: the evaluation at its end, and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.methods.training.json_lines import read_document, write_document
from bilevel.methods.training.run import Run
from bilevel.methods.training.schemas import Evaluated


def save_results(run: Run, results: Mapping[str, float], **how: Any) -> Path:
    """Keep what `evaluate` returned, and how it was asked, in the run's `evaluation.json`.

    Args:
        run: the run that was evaluated.
        results: what `evaluate` returned.
        **how: plain values; `features`, the label of the feature network, is shown beside the numbers.
    """
    path = run.folder / "evaluation.json"
    write_document(path, {**how, "results": dict(results)})
    return path


def saved_results(run: Run) -> dict[str, float] | None:
    """What `save_results` kept, `None` if the run was not evaluated yet."""
    saved = _evaluation(run)
    return saved["results"] if saved else None


def feature_space(run: Run) -> str | None:
    """The label of the feature network its samples were judged by, if it is known."""
    label: str | None = _evaluation(run).get("features")
    return label


def saved_pictures(run: Run) -> dict[str, Path]:
    """The PNG files in the run's folder, by title: samples first, curves last."""
    folder = run.folder
    order = {"samples": 0, "reconstructions": 1, "evaluations": 8, "curves": 9}
    found = sorted(folder.glob("*.png"), key=lambda p: (order.get(p.stem, 5), p.stem))
    return {path.stem.replace("_", " "): path for path in found}


def _evaluation(run: Run) -> dict[str, Any]:
    path = run.folder / "evaluation.json"
    return read_document(path, Evaluated) if path.exists() else {}
