"""What optional packages give: figures by matplotlib, data frames by pandas."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

MISSING = "drawing needs {}; install it with `pip install 'bilevel[report]'`"


def shown_figure() -> "type[Figure]":
    """Figures that a notebook shows also where `pyplot`, which would see to that, is not imported.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING.format("matplotlib")) from None

    @final
    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=72)  # saved in a notebook, too: keep it small
            return file.getvalue()

    return ShownFigure


def data_frame(lines: Sequence[dict[str, Any]]) -> "DataFrame":
    """One row for each line, one column for each name.

    Raises:
        ImportError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError(
            "a data frame needs pandas; install it with `pip install 'bilevel[tables]'`"
        ) from None
    return pandas.DataFrame(lines)
