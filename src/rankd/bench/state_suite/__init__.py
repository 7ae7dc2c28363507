"""`rankd bench states`: hit rate and latency against memory."""
