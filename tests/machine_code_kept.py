"""Makes the machine code that numba keeps on disk, before processes that run tests each make it: `python -m` this file.

Files of kernels compile when they are imported; so does the native engine, where the processor has what it needs.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import rankd
from rankd.engine.native import support

PACKAGE = Path(rankd.__file__).parent


def main() -> None:
    """Import what compiles."""
    files = [*PACKAGE.rglob("*_kernels.py")]
    if support.machine_lacks() is None:
        files += PACKAGE.glob("engine/native/native_climber.py")
    for file in files:
        importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))


if __name__ == "__main__":
    main()
