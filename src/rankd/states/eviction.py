"""Which state leaves first when there is no room: orders of users from the coldest to the warmest.

Pure bookkeeping, no clock and no lock. `rankd bench states` replays a trace against each of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from rankd.states.state_config import Policy

PROTECTED_SHARE = 0.8


class Order(Protocol):
    """Users by how soon their states should go."""

    def add(self, user: str) -> None:
        """A state was made."""
        ...

    def touch(self, user: str) -> None:
        """A state was used again."""
        ...

    def remove(self, user: str) -> None:
        """A state has gone."""
        ...

    def coldest_first(self) -> Iterator[str]:
        """All users; whoever removes one has to ask anew."""
        ...


class Lru:
    """The least recently used first."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, None] = OrderedDict()

    def add(self, user: str) -> None:
        """A state was made."""
        self._users[user] = None

    def touch(self, user: str) -> None:
        """A state was used again."""
        self._users.move_to_end(user)

    def remove(self, user: str) -> None:
        """A state has gone."""
        del self._users[user]

    def coldest_first(self) -> Iterator[str]:
        """All users, the least recently used first."""
        return iter(self._users)


class SegmentedLru:
    """Users who came once, least recently used first; then those who came again (at most 80% of all), likewise.

    A crowd of one-time visitors pushes out one another and not the regulars.
    """

    def __init__(self) -> None:
        self._once: OrderedDict[str, None] = OrderedDict()
        self._again: OrderedDict[str, None] = OrderedDict()

    def add(self, user: str) -> None:
        """A state was made."""
        self._once[user] = None

    def touch(self, user: str) -> None:
        """A state was used again: its user is a regular now."""
        self._once.pop(user, None)
        self._again[user] = None
        self._again.move_to_end(user)
        if len(self._again) > PROTECTED_SHARE * (len(self._again) + len(self._once)):
            coldest, _ = self._again.popitem(last=False)
            self._once[coldest] = None

    def remove(self, user: str) -> None:
        """A state has gone."""
        if user in self._once:
            del self._once[user]
        else:
            del self._again[user]

    def coldest_first(self) -> Iterator[str]:
        """All users, those who came once first."""
        return chain(self._once, self._again)


def make_order(policy: Policy) -> Order:
    """An empty order of the given kind."""
    return Lru() if policy is Policy.LRU else SegmentedLru()
