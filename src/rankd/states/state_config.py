"""How user states are kept."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

MIB = 1 << 20


class Storage(Enum):
    """How the floats of a state are kept.

    AUTO is what the engine computes with: nothing is converted, and a state is read where it lies. BF16 halves float32.
    INT8 keeps a byte a number and a float32 scale for each row of D; its error stands in docs/log.md.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class Policy(Enum):
    """Which state goes when there is no room; see `eviction.py`.

    The default hits more often at every budget, on Zipf users and in the order of a real shop's log (docs/log.md).
    """

    LRU = "lru"
    SEGMENTED_LRU = "segmented-lru"


class StateConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """User states of one model version. Memory is taken as it is needed, up to `budget_mib`; 0 keeps none.
    On a GPU it is page-locked, and all of it taken at the start (docs/gpu.md).

    `spill` is a folder for the states that had to leave memory, at most `spill_mib` a version; they are read back
    when their users return, and on a stop all states in memory go there too. Empty: no such folder.
    """

    budget_mib: Annotated[int, msgspec.Meta(ge=0)] = 1024
    storage: Storage = Storage.AUTO
    policy: Policy = Policy.SEGMENTED_LRU
    spill: str = ""
    spill_mib: Annotated[int, msgspec.Meta(ge=0)] = 8192
