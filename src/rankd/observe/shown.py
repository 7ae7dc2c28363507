"""What collectors of figures have in common: Prometheus reads what they were shown last. `metrics.py` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from prometheus_client.registry import Collector

Key = tuple[str, str]
"""(model, version)"""
Of = TypeVar("Of", str, Key)
Figures = TypeVar("Figures")


class ShownFigures(Collector, Generic[Of, Figures]):
    """Metrics of all that there is of a kind, as it was last shown."""

    def __init__(self) -> None:
        self._shown: Mapping[Of, Figures] = {}

    def show(self, figures: Mapping[Of, Figures]) -> None:
        """The figures of all that there are now."""
        self._shown = figures
