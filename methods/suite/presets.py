"""Short names: of methods, for the entries they stand for, and of whole suites, for their files."""

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent

SUITES = {name: _FOLDER / f"{name}.json" for name in ("small", "full")}
"""Suites that come with the package, by name."""

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "ssm": {"objective": "sliced"},
    "dsm": {"objective": "denoising", "sigma": 0.05},
    "mdsm": {"objective": "multiscale", "sigma": 0.05, "sigma_range": [0.05, 1.0]},
}
BISM_UNROLLED = {"kind": "unrolled", "num_steps": 5}
BISM_EXACT = {"kind": "implicit", "linear_solver": "cholesky", "damping": 1e-4}


def _bism() -> dict[str, dict[str, Any]]:
    """BiSM of every objective: as published with N = 5, other N, and the exact best response."""
    found: dict[str, dict[str, Any]] = {}
    for short, options in _OBJECTIVES.items():
        entry = {"method": "BiSM", "options": options}
        found[f"bism-{short}"] = {**entry, "solver": BISM_UNROLLED}
        found[f"bism-{short}-0"] = {**entry, "solver": {"kind": "alternating"}}
        for steps in (1, 2, 10, 20):
            solver = {"kind": "unrolled", "num_steps": steps}
            found[f"bism-{short}-{steps}"] = {**entry, "solver": solver}
        exact = {**options, "expectation": "exact"}
        found[f"bism-{short}-implicit"] = {**entry, "options": exact, "solver": BISM_EXACT}
    return found


def _chains() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for steps in (1, 5, 10):
        for short, persistent in (("cd", False), ("pcd", True)):
            options = {"steps": steps, "persistent": persistent}
            found[f"{short}{steps}"] = {"method": "ContrastiveDivergence", "options": options}
    return {**found, "cd": found["cd1"], "pcd": found["pcd1"]}


METHOD_PRESETS: dict[str, dict[str, Any]] = {
    "ml": {"method": "MaximumLikelihood"},
    **_chains(),
    **{name: {"method": "ScoreMatching", "options": o} for name, o in _OBJECTIVES.items()},
    "nce": {"method": "NoiseContrastive"},
    "vae": {"method": "VAE"},
    "advil": {"method": "AdvIL"},
    "advil-bernoulli": {"method": "AdvIL", "options": {"prior": "bernoulli"}},
    "bidvl-kl": {"method": "GeneralBiDVL", "options": {"divergence": "kl"}},
    "bidvl": {"method": "GeneralBiDVL", "options": {"divergence": "symmetric"}},
    **_bism(),
    "vages-dsm": {"method": "VaGES", "options": {**_OBJECTIVES["dsm"], "num_samples": 2}},
    "vages-mdsm": {"method": "VaGES", "options": {**_OBJECTIVES["mdsm"], "num_samples": 2}},
    "vages-ksd": {"method": "VaGES", "options": {"objective": "stein", "num_samples": 2}},
}
"""Methods by short name: class, arguments, solver. `bism-dsm` unrolls N = 5 steps as published,
`bism-dsm-0` none, `bism-dsm-10` ten; `bism-dsm-implicit` takes the exact best response."""
