"""Whether this machine has a GPU that the target `cuda` runs on. Asks the driver itself: no torch, nothing heavy.

In: nothing. Out: a reason against it, or none. `targets.py` asks before anything of CUDA is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from rankd.engine.even_layers import why_uneven
from rankd.features.schema import FeatureSchema

DRIVER = "libcuda.so.1"
LEAST = (8, 0)  # bfloat16 in the matrix units
LEAST_OF_FP8 = (8, 9)  # for states in e4m3
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
WIDEST_HEAD = 256
CLIMBER, HSTU = "climber", "hstu"
"""The models that the target computes, by their names in `models.protocol`."""


def why_not(open_driver: Callable[[str], Any] = ctypes.CDLL, least: tuple[int, int] = LEAST) -> str:
    """What this machine lacks for the target, or for a GPU of `least`, in words; empty if nothing."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; install rankd[cuda]"
    try:
        driver = open_driver(DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({DRIVER} is not found)"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver shows no GPU to this process; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    capability = tuple(_attribute(driver, which) for which in (MAJOR, MINOR))
    if capability < least:
        return f"the GPU has compute capability {_dotted(capability)}; {_dotted(least)} or newer is needed"
    return ""


def why_not_model(model: str, options: Mapping[str, Any], schema: FeatureSchema) -> str:
    """What of a model the target does not compute; empty if it computes all of it."""
    if model not in (CLIMBER, HSTU):
        return f"the model is {model!r}; {CLIMBER} and {HSTU} run on the target cuda"
    shape = options.get("shape")
    if shape is not None and (reason := why_uneven(shape)):
        return reason
    head = shape["blocks"][0][0]["head_width"] if shape else _even_head(options)
    return f"a head is {head} wide; at most {WIDEST_HEAD}" if head > WIDEST_HEAD else ""


def fusion_heads(options: Mapping[str, Any]) -> int:
    """Attention heads of a Climber's fusion."""
    shape = options.get("shape")
    return int(shape["fusion"]["heads"] if shape else options.get("heads", 4))


def _even_head(options: Mapping[str, Any]) -> int:
    return int(options.get("width", 64)) // int(options.get("heads", 4))


def _attribute(driver: Any, which: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
    return value.value


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
