"""`rankd bench serve`: the server's latency over what the model takes."""
