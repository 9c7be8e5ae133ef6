"""Reports of runs: one self-contained page about a run, or about several."""

from bilevel.methods.report.comparison import write_comparison
from bilevel.methods.report.density import plot_density
from bilevel.methods.report.report import write_report
from bilevel.methods.report.saved import feature_space, save_results, saved_pictures, saved_results

__all__ = [
    "feature_space",
    "plot_density",
    "save_results",
    "saved_pictures",
    "saved_results",
    "write_comparison",
    "write_report",
]
