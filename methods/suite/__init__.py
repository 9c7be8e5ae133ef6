"""The benchmark suite of Boltzmann machines: every method judged alike, from one configuration."""

from bilevel.methods.suite.comparing import compare, load_suite
from bilevel.methods.suite.config import SuiteConfig, load_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.runner import run_suite
from bilevel.methods.suite.workers import CrashError

__all__ = [
    "CrashError",
    "SuiteConfig",
    "SuiteFolder",
    "compare",
    "load_config",
    "load_suite",
    "run_suite",
]
