"""The Climber on CUDA GPUs: Triton kernels, captured graphs, a stream an executor. Needs the extra `cuda`.

`kernels/` holds the kernels; whatever they compute is held against plain torch in tests/engine/cuda. Without a GPU they
run in Triton's interpreter (`TRITON_INTERPRET=1` before Triton is imported).
"""
