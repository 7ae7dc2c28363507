"""Offline: an interaction log becomes a trained ranker. interactions -> snapshots -> samples -> trainer, evaluation."""
