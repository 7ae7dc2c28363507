"""User states: what `encode` made of a user's history, kept, extended and found again. `cache.py` is the way in."""
