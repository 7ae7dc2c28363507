"""Bytes to requests and scores to bytes: HTTP, the Open Inference Protocol, the live page, the server's life."""
