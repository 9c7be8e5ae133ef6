r"""How methods rank over data sets and seeds, and which differences between ranks mean something.

Trial by trial (one data set, one model, one seed) the method of the highest test log-likelihood has
rank 1, equal ones share the mean of their ranks, and one that failed comes last. The mean rank of a
method is the mean over data sets of its mean over the trials on each, so that a data set with many seeds
counts no more than one with few. Two things make it uncertain, and each has a number of its own.

*Other seeds*: an interval in which 95% of the mean ranks lie when the trials of every data set are drawn
again with replacement (1,000 times).

*Other data*: two of k methods differ over N data sets, with five percent of error among all pairs, if
their mean ranks are at least the critical difference of Nemenyi's test apart,

$$ \mathrm{CD} = q_{0.05} \sqrt{\frac{k (k + 1)}{6 N}}, $$

where $q_{0.05}$ is the quantile of the studentised range of k independent normals, divided by
$\sqrt{2}$. Seeds do not count as data sets: they repeat one.

References: Statistical Comparisons of Classifiers over Multiple Data Sets (Demsar, JMLR 7, 2006),
https://www.jmlr.org/papers/v7/demsar06a.html
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from bilevel.cards import as_plain
from bilevel.methods.suite.tables import CellRecord

_Ranks: TypeAlias = NDArray[np.float64]
_DRAWS = 1000
_ERROR = 0.05


@final
@dataclass(frozen=True)
class Standing:
    """A method and its mean rank.

    Attributes:
        method: short name.
        rank: mean over data sets, 1 is the best.
        low: where the interval over other seeds begins; `None` where no data set has two trials.
        high: where it ends.
    """

    method: str
    rank: float
    low: float | None
    high: float | None


@final
@dataclass(frozen=True)
class Ranking:
    """Methods that were run on the same data and models, the best first.

    Attributes:
        data: names of the data sets.
        trials: how many trials all of these methods ended, in all.
        standings: one per method.
        difference: the critical difference over data sets.
    """

    data: tuple[str, ...]
    trials: int
    standings: tuple[Standing, ...]
    difference: float

    @property
    def alike(self) -> tuple[str, ...]:
        """Methods whose ranks do not differ significantly from the best one's."""
        best, *others = self.standings
        return tuple(o.method for o in others if o.rank - best.rank < self.difference)

    @property
    def verdict(self) -> str:
        """What the ranks say about other data, in words."""
        best, count = self.standings[0], len(self.standings)
        sets = f"{len(self.data)} data set{'s' if len(self.data) > 1 else ''}"
        if self.difference > count - 1:
            return (
                f"With {sets} no difference between {count} methods is significant: ranks would have to "
                f"be {self.difference:.2f} apart, and {count - 1} is the most there can be."
            )
        apart = f"(over {sets} ranks have to be {self.difference:.2f} apart)"
        if len(self.alike) == count - 1:
            return f"No method differs significantly from {best.method} {apart}."
        if self.alike:
            return f"Not significantly worse than {best.method}: {', '.join(self.alike)} {apart}."
        return f"{best.method} is significantly better than all others {apart}."


def rankings(records: Iterable[CellRecord]) -> list[Ranking]:
    """A ranking for every set of methods that were run on the same data and models.

    Args:
        records: of `records.jsonl`; trials that not all of the methods ended are left out.
    """
    cells: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for record in records:
        place = record["data"]["name"], record["model"]["name"]
        value = record["test"]["value"] if record["status"] == "finished" else -math.inf
        cells.setdefault(place, {}).setdefault(record["seed"], {})[record["method"]["name"]] = value
    alike: dict[tuple[str, ...], dict[str, list[Mapping[str, float]]]] = {}
    for (data, _), seeds in cells.items():
        methods = tuple(dict.fromkeys(name for values in seeds.values() for name in values))
        whole = [values for values in seeds.values() if len(values) == len(methods)]
        if len(methods) > 1 and whole:
            key = next((key for key in alike if set(key) == set(methods)), methods)
            alike.setdefault(key, {}).setdefault(data, []).extend(whole)
    return [_ranking(methods, trials) for methods, trials in alike.items()]


def _ranking(
    methods: Sequence[str], trials: Mapping[str, Sequence[Mapping[str, float]]]
) -> Ranking:
    from scipy.stats import rankdata, studentized_range  # a second that no other command needs

    ranks: list[_Ranks] = [
        rankdata([[-values[name] for name in methods] for values in found], axis=1)
        for found in trials.values()
    ]
    mean = np.mean([part.mean(0) for part in ranks], axis=0)
    ends: Sequence[tuple[float | None, float | None]]
    ends = _interval(ranks) or [(None, None)] * len(methods)
    standings = [
        Standing(name, float(rank), *between)
        for name, rank, between in zip(methods, mean, ends, strict=True)
    ]
    count = len(methods)
    quantile = float(studentized_range.ppf(1 - _ERROR, count, np.inf)) / math.sqrt(2)
    return Ranking(
        tuple(trials),
        sum(map(len, trials.values())),
        tuple(sorted(standings, key=lambda standing: standing.rank)),
        quantile * math.sqrt(count * (count + 1) / (6 * len(trials))),
    )


def _interval(ranks: Sequence[_Ranks]) -> list[tuple[float, float]] | None:
    """For each method, where its mean rank lies when trials are drawn again."""
    if max(map(len, ranks)) < 2:
        return None
    generator = np.random.default_rng(0)
    drawn = [
        part[generator.integers(len(part), size=(_DRAWS, len(part)))].mean(1) for part in ranks
    ]
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975), axis=0).tolist()
    return list(zip(low, high, strict=True))


_HEAD = ["method", "mean rank", "95% over seeds"]
_MEANING = (
    "Rank 1 is the highest test log-likelihood of a trial: one data set, model and seed. The interval "
    "is what other seeds would give; the sentence with it is about other data (Nemenyi's test). "
    "Bounds and estimates are ranked by their values."
)


def _lines(ranking: Ranking) -> list[list[str]]:
    return [
        [
            one.method,
            f"{one.rank:.2f}",
            "" if one.low is None else f"{one.low:.2f} to {one.high:.2f}",
        ]
        for one in ranking.standings
    ]


def _title(ranking: Ranking) -> str:
    return f"Ranks over {', '.join(ranking.data)} (trials: {ranking.trials})"


def rankings_markdown(found: Iterable[Ranking]) -> str:
    """All rankings as Markdown."""
    parts = []
    for ranking in found:
        rows = [_HEAD, ["---", "---:", "---:"], *_lines(ranking)]
        drawn = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"\n**{_title(ranking)}**\n\n{drawn}\n\n{ranking.verdict} {_MEANING}\n")
    return "".join(parts)


def rankings_html(found: Sequence[Ranking]) -> str:
    """All rankings as a section of a page; nothing if there are none."""
    parts = []
    for ranking in found:
        top = "".join(f'<th scope="col">{title}</th>' for title in _HEAD)
        body = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th>'
            + "".join(f'<td class="number">{text}</td>' for text in rest)
            + "</tr>"
            for name, *rest in _lines(ranking)
        )
        parts.append(
            f"<h3>{html.escape(_title(ranking))}</h3>"
            f'<div class="wide" role="region" tabindex="0" aria-label="Ranking">'
            f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<p>{html.escape(ranking.verdict)}</p>"
        )
    return f"<h2>Ranking</h2><p>{_MEANING}</p>{''.join(parts)}" if parts else ""


def rankings_plain(found: Iterable[Ranking]) -> str:
    """All rankings for a terminal."""
    return "\n".join(
        f"\n{_title(ranking)}\n{as_plain(_HEAD, _lines(ranking))}\n{ranking.verdict}"
        for ranking in found
    )
