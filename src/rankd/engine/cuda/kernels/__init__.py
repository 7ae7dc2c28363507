"""Triton kernels, and for each the function that launches it. Each is held against plain torch in the interpreter."""
