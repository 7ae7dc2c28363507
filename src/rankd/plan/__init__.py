"""Where embedding tables live on shards, and what that costs. In the order of the work:

    table_statistics.py, sampling.py     how a table is asked; counted in a sample of requests
    declaration.py                       tables and nets of a model, from a file or packaged
    table_plan.py, plan_file.py        a plan, and when it is right; its file
    strategies.py                        plans made, by part_packing.py and hot_rows.py
    cost_model.py, request_work.py       what calls, rows and bytes take; what a request takes under a plan
    prediction.py, choice.py             latency by formulas (queueing.py); the best plan, and why
    cluster_simulation.py                latency by events, on cores of shared_cores.py
    cluster_sizes.py, cluster_shape.py   plans on 1 to many servers; which server is what
    plan_report.py                       tables and pictures for people

`rankd.cli.planning` calls them.
"""
