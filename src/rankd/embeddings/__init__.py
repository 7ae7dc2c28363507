"""Embedding tables that are too large for the graph of a model, and maybe for a machine.

What is said of tables everywhere:

    table_spec.py       what a table is: rows, width, how it is stored; and a part of one, as a shard owns it
    jagged.py           ids of many samples in many tables, as they are looked up
    pooling.py          whoever looks up and pools: tables here, or shards elsewhere

A table on disk:

    row_storage.py      rows of floats as they are kept, and back
    table_format.py     the header of a table's file
    table_writing.py    written block by block, whole or a part
    table_file.py       opened: mapped into memory

Tables looked up here:

    local_tables.py     many tables
    lookup_threads.py   several threads, that share a look-up (`shared_lookup_kernels.py`, `atomic_cells.py`)
    model_tables.py     those of a model version
    table_layout.py     what the loops know of a table
    table_kernels.py    the loops over bags
    row_sums.py         the sum of a bag, in vectors
"""
