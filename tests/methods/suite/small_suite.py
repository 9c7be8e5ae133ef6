"""A suite of seconds."""

from typing import Any

from bilevel import Step
from bilevel.methods.suite import SuiteConfig
from bilevel.methods.suite.config import parse_config

BLOCK: dict[str, Any] = {
    "note": "for <tests>",
    "data": [{"source": "checkerboard", "options": {"size": 200}}],
    "models": [{"kind": "GaussianRBM", "options": {"latent_dim": 2}}],
    "methods": ["dsm", "bism-dsm"],
    "training": {"num_steps": 20, "batch_size": 50, "checkpoint_every": 5},
}


def suite(**changes: Any) -> SuiteConfig:
    return parse_config({"name": "tiny", "blocks": [{**BLOCK, **changes}]}, "tiny")


def no_steps(step: Step) -> None:
    raise AssertionError(f"step {step.number} was taken again")
