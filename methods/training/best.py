"""Which of several evaluated models is the best: the number that counts, and its direction."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from bilevel.methods.training.measures import direction_of
from bilevel.methods.training.settings import Training
from bilevel.refusals import nearest

_ASIDE = ("step", "seconds")  # of a record, beside the numbers of the evaluation
_FIRST = ("frechet", "rmse")  # what counts if nothing is said, where it was measured
_HIGH = re.compile(
    r"accuracy|acc|ap|auc|auprc|auroc|coverage|density|elbo|f1|likelihoods?|ll|loglik(elihood)?|"
    r"precision|psnr|r2|recall|ssim"
)
_LOW = re.compile(
    r"bpd|deviance|distance|divergence|errors?|fid|frechet|kid|kl|loss(es)?|mae|mmd|mse|nll|"
    r"perplexity|rmse"
)
_TURNED = frozenset(("negative", "neg", "minus"))
_WAYS = {"highest": True, "lowest": False}


@final
@dataclass(frozen=True)
class Criterion:
    """The number that counts.

    Attributes:
        name: of the number.
        higher: whether the highest is the best, or the lowest.
    """

    name: str
    higher: bool

    def __str__(self) -> str:
        return f"{'highest' if self.higher else 'lowest'} `{self.name}`; of equal ones the first"

    def better(self, found: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether an evaluation is the best so far.

        Args:
            found: numbers by name.
            best: those of the best one before, if there is one.

        Example:
            >>> Criterion("frechet", higher=False).better({"frechet": 9.0}, {"frechet": 12.0})
            True
            >>> Criterion("frechet", higher=False).better({"frechet": float("nan")}, None)
            False
        """
        value = found.get(self.name)
        if value is None or not math.isfinite(value):
            return False
        before = None if best is None else best.get(self.name)
        if before is None:
            return True
        return bool(value > before if self.higher else value < before)


def higher_is_better(name: str) -> bool | None:
    """Whether high values of a number are good, by its name; `None` if that does not tell.

    Example:
        >>> higher_is_better("test_log_likelihood"), higher_is_better("negative_log_likelihood")
        (True, False)
        >>> higher_is_better("nll"), higher_is_better("temperature")
        (False, None)
    """
    known = direction_of(name)
    if known is not None:
        return known == "high"
    words = re.split(r"[^a-z0-9]+", name.lower())
    high, low = any(map(_HIGH.fullmatch, words)), any(map(_LOW.fullmatch, words))
    if high == low:
        return None
    return high != any(word in _TURNED for word in words)


def read_criterion(text: str) -> Criterion:
    """The criterion that `best` states: "NAME", "highest NAME" or "lowest NAME".

    Raises:
        ValueError: if it does not say which values are good.

    Example:
        >>> str(read_criterion("log_likelihood"))
        'highest `log_likelihood`; of equal ones the first'
    """
    way, _, rest = text.strip().partition(" ")
    if way in _WAYS and rest.strip():
        return Criterion(rest.strip(), _WAYS[way])
    higher = higher_is_better(text.strip())
    if higher is None:
        raise ValueError(
            f"`best` is {text!r}, which does not tell whether high or low values are good; say "
            f"'highest {text}' or 'lowest {text}'"
        )
    return Criterion(text.strip(), higher)


def criterion_of(best: str | None, found: Iterable[str]) -> Criterion | None:
    """The criterion for evaluations that have these numbers; `None` if none of them is known.

    Args:
        best: what was asked for: see `read_criterion`. Without it `frechet` counts, without that
            `rmse`, else the first number whose name tells which values are good.
        found: names of the numbers.

    Raises:
        ValueError: if there is no number of the name that was asked for.
    """
    names = [name for name in found if name not in _ASIDE]
    if best is not None:
        rule = read_criterion(best)
        if rule.name not in names:
            raise ValueError(
                f"`best` asks for the number `{rule.name}`, which `evaluate` does not return; "
                f"{nearest(rule.name, names) if names else 'it returns none'}"
            )
        return rule
    known = [(name, higher_is_better(name)) for name in (*_FIRST, *names) if name in names]
    return next((Criterion(name, higher) for name, higher in known if higher is not None), None)


def check_evaluation(training: Training, *, evaluated: bool, kept: bool) -> None:
    """Refuse settings of evaluations that do not go together.

    Args:
        training: the settings.
        evaluated: whether there is a function that evaluates.
        kept: whether there is a folder to keep the best model in.

    Raises:
        ValueError: naming what is missing, or a `best` that cannot be read.
    """
    if (training.evaluate_every is None) == evaluated:
        given, missing = "`evaluate`", "`evaluate_every`, the steps between two evaluations"
        if not evaluated:
            given, missing = "`evaluate_every`", "`evaluate`, a function of the model"
        raise ValueError(f"{given} is given, but not {missing}; give both or neither")
    if training.best is None:
        return
    read_criterion(training.best)
    if not (evaluated and kept):
        raise ValueError(
            "`best` says which evaluated model is kept in the run's folder; give `run`, `evaluate` and "
            "`evaluate_every` with it"
        )


def unknown(found: Iterable[str]) -> str:
    """What to say where no number is known, so that no best model can be kept."""
    names = [name for name in found if name not in _ASIDE]
    if not names:
        return "`evaluate` returns no number, so no best model is kept"
    listed = ", ".join(f"`{name}`" for name in names[:8])
    return (
        f"no best model is kept: it is not known whether high or low values of {listed} are good; say "
        f"so with `best='highest {names[0]}'` or `best='lowest {names[0]}'`"
    )
