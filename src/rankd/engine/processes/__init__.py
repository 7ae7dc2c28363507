"""Executors in processes of their own, behind the same protocol: what crashes or hangs there takes nobody with it.

shared_file.py      memory that both sides map: states and inputs lie there, and nothing of them is sent
engine_messages.py  what is said: which call, and where its arrays lie
engine_process.py   the process: one executor of any target
process_executor.py the executor that the request path sees
process_backend.py  starts them, and starts them again
"""
