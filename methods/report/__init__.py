"""Reports of runs: one self-contained page, with tables, pictures and the configuration."""

from bilevel.methods.report.density import plot_density
from bilevel.methods.report.report import save_results, write_comparison, write_report

__all__ = ["plot_density", "save_results", "write_comparison", "write_report"]
