"""Pictures of reports and plans, with matplotlib and without a display."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rankd.errors import ConfigError, MissingExtra

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse, before anything is measured, what cannot be drawn after it.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: not a kind of picture, or no folder for it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("--picture", "bench")
    if path.suffix not in FORMATS or not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: give a file that ends in {', '.join(FORMATS)} in a folder that is there")


def new_picture(path: Path, panels: int) -> tuple[Any, Any]:
    """A figure with panels side by side; raises as `check_picture`."""
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)
