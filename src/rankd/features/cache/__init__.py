"""Rows kept next to the model: contiguous memory under a byte budget, looked up a whole request at a time."""
