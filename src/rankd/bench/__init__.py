"""Measuring: workloads as data, contestants in processes of their own, one JSON object at the end. `report.py` has it.

workload.py    a TOML file and a seed become requests
serving.py     suite `serve`: rounds of contestants over a real server, figures, ratios
load.py        the load generator; in_process.py: the ranker without a server; parity.py: equal scores first
"""
