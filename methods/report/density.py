"""The picture of a density on the plane: shaded, with samples and data on it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bilevel.extras import MISSING
from bilevel.methods.data.containers import as_tensor
from bilevel.methods.likelihood.plane import Box, plane_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARGIN = 0.2  # of the points' width, on each side
_DOTS = 1000  # of each kind


def plot_density(
    model: Any,
    *,
    data: Any = None,
    samples: Any = None,
    box: Box | None = None,
    size: int = 300,
) -> "Figure":
    """The density of a model of two real visibles, and data and samples on it, side by side.

    It is exp(-F) over its sum on a grid of the box: see `plane_density`.

    Args:
        model: a learner, or any energy (n, 2) -> (n,).
        data: points for a panel of their own, shape (n, 2); the first 1,000 are drawn.
        samples: likewise.
        box: ((low, high), (low, high)); around data and samples by default, or the range of the model.
        size: cells along a side.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: if there is nothing to take the box from, or points are not on the plane.
        ImportError: if matplotlib is not installed.

    Example:
        >>> figure = plot_density(lambda v: v.square().sum(1) / 2, box=((-4, 4), (-4, 4)))
        >>> len(figure.axes)  # the density and its scale
        2
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING.format("matplotlib")) from None
    dots = {"data": data, "samples": samples}
    panels = {name: as_tensor(points) for name, points in dots.items() if points is not None}
    for name, points in panels.items():
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"`{name}` must be of shape (n, 2), got {tuple(points.shape)}")
    box = _box(model, panels) if box is None else box
    shade = plane_density(model, box, size=size).log_density.exp().T.cpu().numpy()
    (left, right), (low, high) = box
    figure = Figure(
        figsize=(3.4 * (1 + len(panels)) + 0.6, _height(box)), dpi=150, layout="constrained"
    )
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    extent = (left, right, low, high)
    for each in axes:
        image = each.imshow(shade, origin="lower", extent=extent, cmap="Blues", vmin=0)
        each.set(xlim=(left, right), ylim=(low, high), aspect="equal")
        each.tick_params(labelsize=8)
    axes[0].set_title("density", fontsize=11, loc="left")
    for each, (name, points) in zip(axes[1:], panels.items(), strict=True):
        _scatter(each, name, points)
    figure.colorbar(image, ax=axes[-1], shrink=0.85).ax.tick_params(labelsize=8)
    return figure


def _height(box: Box) -> float:
    """Inches of a panel and its title, as high as the box is."""
    (left, right), (low, high) = box
    return min(8.0, max(1.5, 3.0 * (high - low) / (right - left) + 0.5))


def _scatter(axes: "Axes", name: str, points: Tensor) -> None:
    x, y = points.detach()[:_DOTS].float().cpu().unbind(1)
    axes.scatter(x.numpy(), y.numpy(), s=4, color="#e2601c", alpha=0.9, linewidths=0)
    shown = f"{name}, {min(_DOTS, len(points)):,} points"
    axes.set_title(shown, fontsize=11, loc="left")


def _box(model: Any, panels: dict[str, Tensor]) -> Box:
    """The range of the model, or a box around points."""
    limits: tuple[float, float] | None = getattr(model, "visible_range", None)
    if limits is not None:
        return limits, limits
    if not panels:
        raise ValueError(
            "there is nothing to tell where the density is; give `box=((low, high), (low, high))`, "
            "`data` or `samples`"
        )
    low = [min(float(p[:, i].min()) for p in panels.values()) for i in (0, 1)]
    high = [max(float(p[:, i].max()) for p in panels.values()) for i in (0, 1)]
    space = _MARGIN * max(b - a for a, b in zip(low, high, strict=True))
    return (low[0] - space, high[0] + space), (low[1] - space, high[1] + space)
