"""What the doubles of a `TableSource` say of shards."""

from __future__ import annotations

from collections.abc import Mapping


class StillSource:
    """There are none, and nothing moves."""

    def calls(self) -> Mapping[str, int]:
        return {}

    def replicas_up(self) -> Mapping[str, int]:
        return {}

    def rows(self) -> Mapping[str, int]:
        return {}

    def kept_bytes(self) -> int:
        return 0

    def generation(self) -> int:
        return 0

    def contents(self) -> Mapping[str, str]:
        return {}

    def wait_up(self, within_s: float) -> None:
        pass
