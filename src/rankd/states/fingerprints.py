"""Fingerprints of histories: a state is only ever used for the history, and the tables, that it was made of.

`contents` is the fingerprint of the tables beside the graph that its tokens were looked up in, empty without such.

128 bits of BLAKE2b: two different histories share one with a probability of 2^-64 after 2^32 users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from rankd.types import Array, UserHistory

BYTES = 16
NOT_OF_TOKENS = ("history_length", "history_embedded")
"""What was looked up follows from the ids and the contents, and may not be there yet."""


def of_history(history: UserHistory, contents: bytes = b"") -> bytes:
    """Of all that a history says: the same history has the same tokens, whatever the sub-sequences."""
    digest = blake2b(history.dropped.to_bytes(8, "little"), digest_size=BYTES, key=contents)
    for array in (history.rows, history.events, history.times, history.values):
        digest.update(array.tobytes())
    return digest.digest()


def of_tokens(tokens: Mapping[str, Array], lengths: Sequence[int], contents: bytes = b"") -> bytes:
    """Of the first `lengths[n]` tokens of each block n: what a state of these lengths was made of."""
    digest = blake2b(np.asarray(lengths, np.int64).tobytes(), digest_size=BYTES, key=contents)
    for name in sorted(tokens):
        if name not in NOT_OF_TOKENS:
            for block, length in enumerate(lengths):
                digest.update(tokens[name][0, block, :length].tobytes())
    return digest.digest()
