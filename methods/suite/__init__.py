"""The benchmark suite of Boltzmann machines: every method judged alike, from one configuration."""

from bilevel.methods.suite.config import SuiteConfig, load_config
from bilevel.methods.suite.folder import SuiteFolder
from bilevel.methods.suite.runner import run_suite

__all__ = ["SuiteConfig", "SuiteFolder", "load_config", "run_suite"]
