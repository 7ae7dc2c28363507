"""Embedding tables that are too large for the graph of a model, and maybe for a machine.

table_spec.py   what a table is: rows, width, how it is stored; and a part of one, as a shard owns it
jagged.py       ids of many samples in many tables, as they are looked up
pooling.py      whoever looks up and pools: tables here, or shards elsewhere
"""
