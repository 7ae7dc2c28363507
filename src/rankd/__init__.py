"""rankd, the online ranking server for recommenders: a user and candidates in, scores out in milliseconds.

In process: `Ranker.load("models/shop")`. Over HTTP: `Client("http://localhost:8000")`. Both offer
`rank(RankRequest) -> Scores` and `append_events`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankd.errors import RankdError

if TYPE_CHECKING:
    from rankd.client import Client
    from rankd.models.protocol import RankingModel
    from rankd.ranker import Ranker
    from rankd.types import Event, RankRequest, Scores

__version__ = "0.1.0"
__all__ = ["Client", "Event", "RankRequest", "RankdError", "Ranker", "RankingModel", "Scores"]

_LAZY = {
    "Ranker": "rankd.ranker",
    "Client": "rankd.client",
    "RankingModel": "rankd.models.protocol",
    **dict.fromkeys(("Event", "RankRequest", "Scores"), "rankd.types"),
}


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that `rankd --help` answers at once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'rankd' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
