"""Tables of likelihoods and of their estimates: suites, annealing, the reverse KL, small tables."""

from pathlib import Path

from benchmarks.measuring.records import read
from benchmarks.pages.markdown import formatted, where
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
    columns = (
        ("steps of the sampler", "{sampler_steps}"),
        ("estimate", "{estimate}"),
        ("bias", "{bias:.3f}"),
        ("spread", "{spread:.3f}"),
    )
    return "\n".join(formatted(columns, read(path)[-1]["rows"], left=(1,)))


def ais_table(path: Path) -> str:
    """The newest record of `benchmarks.ais`."""
    record = read(path)[-1]
    config = record["config"]
    columns = (
        ("", "{name}"),
        ("seconds", "{seconds:.2f}"),
        ("chain-steps per second", "{chain_steps_per_second:,.0f}"),
        ("times NumPy", "{times_numpy:.2f}"),
        ("log Z", "{log_z:.2f}"),
        ("its standard error", "{standard_error:.3f}"),
    )
    lines = [
        f"RBM {config['visible']} x {config['latent']}, {config['chains']} chains, "
        f"{config['steps']:,} temperatures; {record['device']}, {record['threads']} thread(s), median "
        f"of {config['rounds']}, commit {record['commit']}",
        "",
        *formatted(columns, record["numbers"]),
    ]
    return "\n".join(lines)


def small_tables_table(path: Path) -> str:
    """Test log-likelihoods of default settings beside independent columns, each set's newest."""
    records = read(path)
    some = records[-1]
    sets = {row["set"]: row for record in records for row in record["sets"]}
    columns = [("set", "{set}"), ("columns", "{columns}"), ("independent", "{independent:.2f}")]
    for method in ("AdvIL", "GeneralBiDVL"):
        columns += [(method, f"{{{method}:.2f}}"), ("steps", f"{{{method} steps}}")]
    lines = [
        f"{some['seconds']:g} seconds a method, {some['hidden']} hidden units; {where(some)}, commit "
        f"{some['commit']}",
        "",
        *formatted(columns, sets.values()),
    ]
    return "\n".join(lines)
