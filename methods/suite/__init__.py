"""The benchmark suite of Boltzmann machines: every method judged alike, from one configuration."""

from bilevel.methods.suite.comparing import compare_methods, load_suite
from bilevel.methods.suite.config import SuiteConfig, load_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.runner import run_suite
from bilevel.methods.suite.workers import CrashError

compare = compare_methods  # its name before there was `bilevel.compare`

__all__ = [
    "CrashError",
    "SuiteConfig",
    "SuiteFolder",
    "compare_methods",
    "load_config",
    "load_suite",
    "run_suite",
]
