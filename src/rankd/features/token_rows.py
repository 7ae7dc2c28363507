"""Rows of tables beside the graph for the tokens of one request's history: asked for as soon as it is known which are
missing, written when a state is computed of them.

In: the packed tokens, and from which on each block's are needed: those that a kept state was not made of. Out:
`history_embedded`, and whether a state of it may be kept. Whoever computes states (`states/`) asks for it; an executor
never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np

from rankd.features.assembly import appended_tokens
from rankd.features.embedded import EmbeddedInputs, EmbeddedLookUp
from rankd.types import Array

EMBEDDED = "history_embedded"
Begin = Callable[[Mapping[str, Array], Mapping[str, Array]], EmbeddedLookUp]
"""`EmbeddedInputs.begin` for this request."""


class RowsAway(Exception):
    """Rows are on their way: `when_there` calls when they have come, and then it is to be tried again."""

    def __init__(self, when_there: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.when_there = when_there


class TokenRows:
    """A `states.lending.TokenTables`. One thread at a time. `contents` are those of the tables when they were asked;
    `lost` names the tables that could not be had."""

    def __init__(self, inputs: EmbeddedInputs, begin: Begin) -> None:
        self._inputs, self._begin = inputs, begin
        self.contents, self.lost = inputs.token_contents(), tuple[str, ...]()
        self.looking: EmbeddedLookUp | None = None
        self._asked: Mapping[str, Array] = {}
        self._first: Sequence[int] = ()
        self._waits = False

    def again(self, waits: bool) -> Self:
        """For another try, with the tables as they are now; one that `waits` is the last and waits for its rows."""
        contents = self._inputs.token_contents()
        if contents != self.contents:
            self.contents, self.looking = contents, None
        self._waits = waits
        return self

    def lacking(self, tokens: Mapping[str, Array], first: Sequence[int]) -> dict[str, Array]:
        """The tokens (1, N, T) from `first[n]` on of block n, in arrays of their own, to be looked up and given to
        `take`; nothing if there are none."""
        most = int((tokens["history_length"][0] - np.asarray(first)).max())
        return appended_tokens(tokens, first, (most,)) if most else {}

    def take(self, asked: Mapping[str, Array], first: Sequence[int], looking: EmbeddedLookUp) -> None:
        """Those tokens, from `first` on, are being looked up."""
        self._asked, self._first, self.looking = asked, first, looking

    def write(self, tokens: Mapping[str, Array], first: Sequence[int]) -> bool:
        """Write `history_embedded` of `tokens`, which are the history's from `first[n]` on in block n; whether it is as
        `contents` have it. If not, defaults stand in for a table, or it has changed.

        Raises:
            RowsAway: they are on their way.
            DeadlineExceeded, Unavailable: see `LookUp.finish`.
        """
        counts = tokens["history_length"][0].tolist()
        if not any(counts):
            tokens[EMBEDDED][...], self.lost = 0, ()
            return self._as_it_is()
        if self._inputs.local:
            self.lost = self._begin(tokens, tokens).finish()
            return self._as_it_is()
        if self.looking is None or any(want < have for want, have in zip(first, self._first, strict=True)):
            asked = {name: array.copy() for name, array in tokens.items()}
            self.take(asked, first, self._begin(asked, asked))
        looking = self.looking
        assert looking is not None  # noqa: S101 - it was taken
        if not self._waits and not looking.there():
            raise RowsAway(looking.when_there)
        self.lost = looking.finish()
        into, rows = tokens[EMBEDDED], self._asked[EMBEDDED]
        into[...] = 0
        for block, count in enumerate(counts):
            begin = first[block] - self._first[block]
            into[0, block, :count] = rows[0, block, begin : begin + count]
        return self._as_it_is()

    def _as_it_is(self) -> bool:
        if not self.contents or any(name in self._inputs.token_tables for name in self.lost):
            return False
        return self._inputs.token_contents() == self.contents
