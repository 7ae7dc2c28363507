"""Filling a store from files: rows atomically and resumably, histories event by event."""
