"""Where rows and histories are kept: one protocol (`feature_store.py`), in memory, on disk (LMDB), or in Redis."""
