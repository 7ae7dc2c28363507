"""Compiles every kernel for an H200 (sm_90) without one, as a script: Triton brings the assembler.

python tests/engine/cuda/compile_kernels.py [all]      a line of JSON for each; `all`: all uses and configurations

In a process of its own, for in the tests' process kernels are interpreted. The sizes are those of workload `base`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from rankd.engine.cuda.kernels import (
    triton_around_product,
    triton_block_fusion,
    triton_candidate_attention,
    triton_feed_forward,
    triton_gated_output,
    triton_history_attention,
    triton_host_states,
    triton_pooled_gather,
    triton_projection,
    triton_state_rows,
)

H200 = GPUTarget("cuda", 90, 32)
INT32 = ("tiles", "known", "row_times", "page_times", "table", "lengths", "now", "counts", "count", "ids", "starts",
         "sizes", "user_of", "arrived_times", "places", "apart")  # fmt: skip
INT64 = ("rows", "homes")  # addresses of the host among them
FLOAT32 = ("scales", "temperature", "positions", "times", "x", "bias", "other", "up_bias", "down_bias", "numbers",
           "added", "users", "norm")  # fmt: skip
NARROW = ("out", "made", "qkv", "attended", "gates", "pool", "fresh", "arrived", "weight", "up", "down", "tables")
ODD = ("layer", "layers", "num_tiles", "blocks", "most_pages", "parts")
"""Integers that are not multiples of 16. Addresses and the others are, which kernels are specialised for."""
HEADS = {"HEADS": 4, "HEAD": 64, "ROOM": 64}
HSTU = {"HEADS": 4, "HEAD": 128, "ROOM": 128}
ATTENTION = {**HEADS, "PAGE": 64, "DISTANCES": 257, "BIASED": True, "block_queries": 64}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (triton_history_attention._attend, {**ATTENTION, "POINTWISE": False, "FP8": False}),
    (triton_candidate_attention._attend, {**ATTENTION, "POINTWISE": False, "FP8": False}),
    (triton_candidate_attention._attend, {**ATTENTION, "POINTWISE": True, "FP8": True}),
    *((one._attend, {**ATTENTION, **HSTU, "DISTANCES": 8193, "POINTWISE": True, "FP8": False})
      for one in (triton_history_attention, triton_candidate_attention)),
    (triton_state_rows._store, {**HEADS, "PAGE": 64, "FP8": True, "block_rows": 64}),
    (triton_state_rows._place, {**HEADS, "PAGE": 64, "FP8": True}),
    (triton_state_rows._place, {**HEADS, "PAGE": 64, "FP8": False}),
    (triton_host_states._fetch,
     {**HEADS, "PAGE": 64, "FP8": False, "KIND": tl.bfloat16, "SIZE": 2, "FIELDS": triton_host_states.ROW}),
    (triton_host_states._fetch,
     {**HEADS, "PAGE": 64, "FP8": True, "KIND": tl.bfloat16, "SIZE": 2, "FIELDS": triton_host_states.ROW}),
    (triton_host_states._deliver,
     {"WIDTH": 256, "KIND": tl.bfloat16, "SIZE": 2, "PIECE": triton_host_states.CHUNK}),
    (triton_projection._project,
     {"INPUTS": 256, "OUTPUTS": 768, "NORMED": True, "ACTIVATION": "", "ACTIVATED_FROM": 0, "RESIDUAL": False,
      "GATED": False}),
    (triton_projection._project,
     {"INPUTS": 128, "OUTPUTS": 512, "NORMED": False, "ACTIVATION": "", "ACTIVATED_FROM": 0, "RESIDUAL": False,
      "GATED": True}),
    (triton_projection._project,
     {"INPUTS": 512, "OUTPUTS": 2048, "NORMED": True, "ACTIVATION": "silu", "ACTIVATED_FROM": 1536, "RESIDUAL": False,
      "GATED": False}),
    (triton_around_product._normalise, {"INPUTS": 512, "ROOM": 512, "NORMED": True}),
    (triton_around_product._finish,
     {"OUTPUTS": 2048, "ACTIVATION": "silu", "ACTIVATED_FROM": 1536, "RESIDUAL": False, "GATED": False}),
    (triton_gated_output._finish, {"WIDTH": 512, "OUTPUTS": 512, "PARTS": 3}),
    (triton_feed_forward._feed_forward,
     {"WIDTH": 256, "ROOM": 256, "HIDDEN": 1024, "ACTIVATION": "gelu", "GATED": False}),
    (triton_feed_forward._feed_forward,
     {"WIDTH": 512, "ROOM": 512, "HIDDEN": 2048, "ACTIVATION": "gelu", "GATED": False}),
    (triton_block_fusion._attend, {**HEADS, "BLOCKS": 2}),
    (triton_pooled_gather._pool, {"WIDTH": 256, "ROOM": 256, "COLUMNS": 3, "NUMBERS": 1, "ADDED": True, "USERS": True,
                                  "NORMED": True, "COPIES": 2}),
]  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], chosen: triton.Config | None) -> dict[str, Any]:
    """What the assembler says of one kernel in one configuration."""
    function = kernel if chosen is None else kernel.fn
    names = function.arg_names
    constants = constants | (chosen.kwargs if chosen else {})
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(INT32, "*i32") | dict.fromkeys(FLOAT32, "*fp32")
    kinds |= dict.fromkeys(NARROW, "*bf16") | dict.fromkeys(("inverse_length", "epsilon", "scale"), "fp32")
    kinds |= dict.fromkeys(INT64, "*i64")
    kinds |= {"pool": "*fp8e4nv"} if constants.get("FP8") else {}
    kinds |= {"weight": "*fp32", "out": "*fp32"} if "COPIES" in constants else {}
    kinds |= {"x": "*bf16"} if constants.get("NORMED") is False else {}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    whole = [n for n in names if signature[n][0] == "*" or (signature[n] == "i32" and n not in ODD)]
    source = ASTSource(function, signature, values, {(names.index(n),): [["tt.divisibility", 16]] for n in whole})
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages} if chosen else {"num_warps": 8}
    made = triton.compile(source, target=H200, options=options)
    return {
        "kernel": f"{Path(sys.modules[function.__module__].__file__ or '').stem}.{function.__name__}",
        "config": {**(chosen.kwargs if chosen else {}), **options},
        "shared_bytes": made.metadata.shared,
        **registers(made.asm["ptx"]),
    }


def registers(ptx: str) -> dict[str, int]:
    """Registers and spilled bytes of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    used = re.search(r"Used (\d+) registers", said)
    return {"registers": int(used[1]) if used else 0, "spilled_bytes": int(spilled[1]) if spilled else 0}


def main() -> None:
    """Compile and say."""
    every, seen = sys.argv[1:] == ["all"], []
    for kernel, constants in KERNELS:
        if kernel in seen and not every:
            continue
        seen.append(kernel)
        configs = getattr(kernel, "configs", [None])
        for chosen in configs if every else configs[1:2] or configs:
            print(json.dumps(compiled(kernel, constants, chosen)), flush=True)


if __name__ == "__main__":
    main()
