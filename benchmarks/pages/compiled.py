"""The tables of `benchmarks.compiled_speed`: goals beside what was measured, then everybody's times."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

from benchmarks.measuring.records import Record, read
from benchmarks.pages.markdown import formatted, where

Key: TypeAlias = tuple[str, str, str]  # problem, kind, dtype
OURS, DTYPES = "ours, compiled", ("float32", "float64")
TITLES = {
    ("small", "implicit"): "small MLP, implicit, 20 CG steps",
    ("small", "unrolled"): "small MLP, unrolled, 20 steps",
    ("middle", "implicit"): "middle MLP, implicit, 20 CG steps",
    ("middle", "unrolled"): "middle MLP, unrolled, 20 steps",
    ("logistic", "implicit"): "logistic regression, implicit, 10 CG steps",
    ("logistic", "unrolled"): "logistic regression, unrolled, 20 steps",
}
GOALS = (
    ("goal", "{goal}"),
    ("dtype", "{dtype}"),
    ("at most", "{limit:g}"),
    ("measured", "{value:.3g}"),
    ("beside", "{beside}"),
    ("reached", "{reached}"),
)
TIMES = (
    ("", "{title}"),
    ("", "{name}"),
    ("ms, float32", "{float32}"),
    ("ours = 1", "{ratio32}"),
    ("first run, s", "{first}"),
    ("ms, float64", "{float64}"),
    ("ours = 1", "{ratio64}"),
    ("difference", "{difference}"),
)
COLD = (
    ("first hypergradient, small MLP", "{title}"),
    ("first, s", "{first:.1f}"),
    ("a later one, ms", "{later_ms:.2f}"),
)


@final
class Goal(NamedTuple):
    """What was to be reached, and what was measured."""

    goal: str
    dtype: str
    limit: float
    value: float
    beside: str

    @property
    def reached(self) -> str:
        return (
            "yes" if self.value <= self.limit else f"no: {self.value / self.limit:.2g} x the goal"
        )


def compiled_table(path: Path) -> str:
    """The page from a file of records."""
    return compiled_text(read(path))


def compiled_text(records: Sequence[Record]) -> str:
    """The page from records, the newest of each kind."""
    timed: dict[Key, Record] = {}
    cold: dict[tuple[str, int], Record] = {}
    for record in records:
        if "cold_steps" in record:
            cold[record["kind"], record["cold_steps"]] = record
        else:
            timed[record["problem"], record["kind"], record["dtype"]] = record
    if not timed:
        return "Nothing was timed."
    versions: dict[str, str] = {}
    for record in timed.values():
        versions |= {**record["versions"], **record["jax_versions"]}
    loads = [record["load"] for record in records]
    commits = sorted({str(record["commit"]) for record in records})
    lines = [
        f"{where(records[-1])}, {', '.join(f'{n} {v}' for n, v in versions.items() if n != 'torch')}; "
        f"commit {', '.join(commits)}; load average {min(loads):.1f} to {max(loads):.1f}.",
        "",
        *formatted(GOALS, map(_shown, goals(timed, cold)), left=(0, 1, 4, 5)),
        "",
        *formatted(TIMES, _times(timed), left=(0, 1)),
    ]
    if cold:
        lines += ["", *formatted(COLD, map(_cold, cold.values()))]
    return "\n".join(lines)


def goals(timed: Mapping[Key, Record], cold: Mapping[tuple[str, int], Record]) -> Iterator[Goal]:
    """Every goal that the records say something of."""
    for (problem, kind, dtype), record in timed.items():
        title = TITLES[problem, kind]
        rivals = [n for n in record["numbers"] if not n["name"].startswith("ours")]
        if problem == "small":
            limits: dict[str, float] = {"JAX": 1.2, "torchopt": 0.15}
            for name, limit in limits.items():
                best = fastest(n for n in rivals if n["name"].split(",")[0] == name)
                share = 1 / best["ratio"]
                yield Goal(f"{title}: time / {name}'s", dtype, limit, share, best["name"])
        if problem == "middle":
            best = fastest(rivals)
            share = 1 / best["ratio"]
            yield Goal(f"{title}: time / best rival's", dtype, 1.0, share, best["name"])
        if (problem, kind) == ("logistic", "implicit"):
            own = next(n for n in record["numbers"] if n["name"] == OURS)
            yield Goal(f"{title}: ms", dtype, 0.2, own["ms"], "")
    for (kind, steps), record in cold.items():
        yield Goal(f"first of {kind}, {steps:,} steps: s", record["dtype"], 20, record["first"], "")
    unrolled = {n: r["first"] - r["later"] for (kind, n), r in cold.items() if kind == "unrolled"}
    if len(unrolled) > 1:
        steps = ", ".join(f"{n:,}" for n in unrolled)
        spread = max(unrolled.values()) / min(unrolled.values())
        dtype = next(iter(cold.values()))["dtype"]
        yield Goal(f"compiling for {steps} steps: longest / shortest", dtype, 1.1, spread, "")


def fastest(numbers: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(numbers, key=lambda n: float(n["ratio"]))


def _shown(goal: Goal) -> dict[str, Any]:
    return {**goal._asdict(), "reached": goal.reached}


def _times(timed: Mapping[Key, Record]) -> Iterator[dict[str, Any]]:
    """A row for each competitor of each problem, both precisions beside each other."""
    for (problem, kind), title in TITLES.items():
        found = {
            dtype: {n["name"]: n for n in timed[problem, kind, dtype]["numbers"]}
            for dtype in DTYPES
            if (problem, kind, dtype) in timed
        }
        names = dict.fromkeys(name for numbers in found.values() for name in numbers)
        for name in names:
            single, double = (found.get(dtype, {}).get(name, {}) for dtype in DTYPES)
            either = single or double
            yield {
                "title": title,
                "name": name,
                "float32": _cell(single.get("ms"), ".3f"),
                "ratio32": _cell(single.get("ratio"), ".2f"),
                "first": _cell(either["first_seconds"], ".1f"),
                "float64": _cell(double.get("ms"), ".3f"),
                "ratio64": _cell(double.get("ratio"), ".2f"),
                "difference": " / ".join(f"{n['difference']:.0e}" for n in (single, double) if n),
            }


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cold(record: Record) -> dict[str, Any]:
    title = f"{record['kind']}, {record['cold_steps']:,} steps, {record['dtype']}"
    return {"title": title, "first": record["first"], "later_ms": 1e3 * record["later"]}
