"""Tables of likelihoods and of their estimates: suites, annealing, the reverse KL, small tables."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import table, where
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.tables import groups, markdown


def suite_table(folder: Path) -> str:
    """A suite's note and tables."""
    home = SuiteFolder(folder)
    config, records = home.config(), home.records()
    commits = ", ".join(sorted({record["commit"] for record in records}))
    tables = markdown(groups(records, [cell.name for cell in config.cells()]))
    notes = [config.note, *(block.note for block in config.blocks)]
    return "\n\n".join([" ".join(filter(None, notes)), f"Commit {commits}.", tables.strip()])


def reverse_table(path: Path) -> str:
    """Bias and spread of the two estimates of the reverse KL's moments."""
    rows = [
        (str(r["sampler_steps"]), r["estimate"], f"{r['bias']:.3f}", f"{r['spread']:.3f}")
        for r in read(path)[-1]["rows"]
    ]
    columns = ("steps of the sampler", "estimate", "bias", "spread")
    return "\n".join(table(columns, rows, left=(1,)))


def ais_table(path: Path) -> str:
    """The newest record of `benchmarks.ais`."""
    record = read(path)[-1]
    config = record["config"]
    rows = [
        (
            n["name"],
            f"{n['seconds']:.2f}",
            f"{n['chain_steps_per_second']:,.0f}",
            f"{n['times_numpy']:.2f}",
            f"{n['log_z']:.2f}",
            f"{n['standard_error']:.3f}",
        )
        for n in record["numbers"]
    ]
    columns = ("", "seconds", "chain-steps per second", "times NumPy", "log Z")
    lines = [
        f"RBM {config['visible']} x {config['latent']}, {config['chains']} chains, "
        f"{config['steps']:,} temperatures; {record['device']}, {record['threads']} thread(s), median "
        f"of {config['rounds']}, commit {record['commit']}",
        "",
        *table((*columns, "its standard error"), rows),
    ]
    return "\n".join(lines)


def small_tables_table(path: Path) -> str:
    """Test log-likelihoods of default settings beside independent columns, each set's newest."""
    records = read(path)
    some = records[-1]
    sets = {row["set"]: row for record in records for row in record["sets"]}
    methods = ("AdvIL", "GeneralBiDVL")
    rows = [
        (
            row["set"],
            str(row["columns"]),
            f"{row['independent']:.2f}",
            *(cell for m in methods for cell in (f"{row[m]:.2f}", str(row[f"{m} steps"]))),
        )
        for row in sets.values()
    ]
    columns = [column for method in methods for column in (method, "steps")]
    lines = [
        f"{some['seconds']:g} seconds a method, {some['hidden']} hidden units; {where(some)}, commit "
        f"{some['commit']}",
        "",
        *table(("set", "columns", "independent", *columns), rows),
    ]
    return "\n".join(lines)
