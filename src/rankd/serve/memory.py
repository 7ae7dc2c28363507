"""Keeping the garbage collector away from what stays: a loaded model, its catalogue, the machine code of its kernels.

A full collection walks every object there is: 75 to 150 ms for one model, and as much longer as the processor has other
work, in which nobody is answered (docs/log.md). What was loaded to stay is not walked any more.
"""

from __future__ import annotations

import gc


def keep_loaded() -> None:
    """Leave all that there is now out of future collections."""
    gc.freeze()


def let_go() -> None:
    """Collect what was kept and is needed no more, and keep the rest."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
