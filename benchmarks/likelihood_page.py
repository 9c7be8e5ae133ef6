"""Tables of the suites' records and of the benchmarks of likelihood estimation."""

import json
from pathlib import Path

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
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    lines = [
        "| steps of the sampler | estimate | bias | spread |",
        "| ---: | --- | ---: | ---: |",
        *(
            f"| {r['sampler_steps']} | {r['estimate']} | {r['bias']:.3f} | {r['spread']:.3f} |"
            for r in record["rows"]
        ),
    ]
    return "\n".join(lines)


def ais_table(path: Path) -> str:
    """The newest record of `benchmarks.ais`."""
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    config = record["config"]
    lines = [
        f"RBM {config['visible']} x {config['latent']}, {config['chains']} chains, "
        f"{config['steps']:,} temperatures; {record['device']}, {record['threads']} thread(s), median "
        f"of {config['rounds']}, commit {record['commit']}",
        "",
        "| | seconds | chain-steps per second | times NumPy | log Z | its standard error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {n['name']} | {n['seconds']:.2f} | {n['chain_steps_per_second']:,.0f} "
            f"| {n['times_numpy']:.2f} | {n['log_z']:.2f} | {n['standard_error']:.3f} |"
            for n in record["numbers"]
        ),
    ]
    return "\n".join(lines)
