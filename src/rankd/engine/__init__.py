"""Computing: what an artifact's graphs say, on the processor at hand. `backend.py` is the protocol."""
