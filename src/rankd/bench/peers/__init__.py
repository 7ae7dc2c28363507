"""General model servers as contestants, each in its own recommended way, around the model as rankd serves it.

peer_plan.py      what a peer's process is told
peer_worker.py    what each of their handlers runs: rankd's request path, a batch at a time, without its schedule
mosec_server.py, litserve_server.py, ray_server.py, pytriton_server.py    programs, one for each peer
peer_process.py   such a program as a contestant
"""
