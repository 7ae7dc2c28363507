"""Tensors on the wire: the JSON of the Open Inference Protocol with the binary tensor data extension.

A body is JSON, followed by the raw data of those inputs that carry `binary_data_size`, in their order; the length of
the JSON stands in a header. Numbers are little-endian; a BYTES element is a 4-byte length and that many bytes:

    ["ab", "c"]  ->  02 00 00 00 61 62 01 00 00 00 63
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from rankd.errors import InvalidRequest
from rankd.types import Array

DTYPES = {
    "BOOL": np.dtype("?"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
MAX_ELEMENTS = 10_000_000
_LENGTH = struct.Struct("<I")

Parameters = Annotated[dict[str, str | int | float | bool], Meta(max_length=64)]


class InputHeader(msgspec.Struct, frozen=True):
    """An input as the JSON part names it; `data` is left out where the data is binary."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)]], Meta(max_length=8)]
    parameters: Parameters = {}
    data: list[Any] | None = None


class OutputHeader(msgspec.Struct, frozen=True):
    """An output that the caller asks for."""

    name: str
    parameters: Parameters = {}


class InferHeader(msgspec.Struct, frozen=True):
    """The JSON part of an infer request."""

    inputs: Annotated[list[InputHeader], Meta(min_length=1, max_length=64)]
    id: Annotated[str, Meta(max_length=128)] = ""
    parameters: Parameters = {}
    outputs: Annotated[list[OutputHeader], Meta(max_length=64)] = []


class OutputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """An output in the JSON part of the answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] = {}
    data: list[Any] | None = None


class InferAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The JSON part of an infer answer."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A decoded input: flat values, a list of str for BYTES and a NumPy array otherwise."""

    datatype: str
    shape: tuple[int, ...]
    values: list[str] | Array


_header_decoder = msgspec.json.Decoder(InferHeader)


def decode_infer(body: bytes, header_length: str | None) -> tuple[InferHeader, dict[str, InputTensor]]:
    """An infer body as its header and inputs by name.

    Args:
        header_length: the Inference-Header-Content-Length header; None if the whole body is JSON.

    Raises:
        InvalidRequest: anything about it does not fit; the message names the input.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isdigit() or not 0 < int(header_length) <= len(body):
            raise InvalidRequest(
                f"Inference-Header-Content-Length is '{header_length[:40]}'; the body has {len(body)} bytes"
            )
        end = int(header_length)
    try:
        header = _header_decoder.decode(memoryview(body)[:end])
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the JSON part of the body is not valid JSON: {error}") from error
    inputs: dict[str, InputTensor] = {}
    position = end
    for one in header.inputs:
        if one.name in inputs:
            raise InvalidRequest(f"input '{one.name}' is given twice")
        size = one.parameters.get("binary_data_size")
        if size is None:
            inputs[one.name] = _from_json(one)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - position:
            raise InvalidRequest(
                f"input '{one.name}': binary_data_size is {size!r}, {len(body) - position} bytes are left in the body"
            )
        if one.data is not None:
            raise InvalidRequest(f"input '{one.name}' has both data and binary_data_size; give one of them")
        inputs[one.name] = tensor_of(one, body[position : position + size])
        position += size
    if position != len(body):
        raise InvalidRequest(f"{len(body) - position} bytes after the last input belong to none")
    return header, inputs


def encode_outputs(
    answer: tuple[str, str, str], tensors: Mapping[str, Array | Sequence[str]], binary: Iterable[str]
) -> tuple[bytes, int | None]:
    """An infer answer (model, version, id) with its outputs, those named in `binary` as raw data.

    Returns:
        The body, and the length of its JSON part if data follows it.
    """
    outputs, chunks = [], []
    raw = set(binary)
    for name, values in tensors.items():
        datatype, shape = type_of(values)
        if name in raw:
            chunk = pack_bytes(values) if datatype == "BYTES" else np.ascontiguousarray(values).tobytes()
            chunks.append(chunk)
            outputs.append(OutputTensor(name, datatype, shape, {"binary_data_size": len(chunk)}))
        else:
            flat = list(values) if datatype == "BYTES" else np.asarray(values).ravel().tolist()
            outputs.append(OutputTensor(name, datatype, shape, data=flat))
    header = msgspec.json.encode(InferAnswer(answer[0], answer[1], outputs, answer[2]))
    return (header + b"".join(chunks), len(header)) if chunks else (header, None)


def pack_bytes(texts: Iterable[str]) -> bytes:
    """BYTES elements on the wire."""
    parts: list[bytes] = []
    for text in texts:
        raw = text.encode()
        parts += (_LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def unpack_bytes(data: bytes) -> list[str]:
    """BYTES elements from the wire.

    Raises:
        InvalidRequest: a length that leads out of the data, or bytes that are not UTF-8.
    """
    texts: list[bytes] = []
    position, end = 0, len(data)
    while position < end:
        start = position + 4
        if start > end:
            raise InvalidRequest(f"BYTES data ends within the length of element {len(texts)}")
        position = start + _LENGTH.unpack_from(data, position)[0]
        if position > end:
            raise InvalidRequest(f"BYTES element {len(texts)} claims more bytes than the data has")
        texts.append(data[start:position])
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"a BYTES element is not UTF-8: {error}") from error


def tensor_of(header: InputHeader, data: bytes) -> InputTensor:
    """An input from its raw data.

    Raises:
        InvalidRequest: the data does not fit its type and shape.
    """
    if header.datatype == "BYTES":
        return tensor_of_values(header, unpack_bytes(data))
    dtype = _dtype(header)
    if len(data) % dtype.itemsize:
        raise InvalidRequest(f"input '{header.name}': {len(data)} bytes are no whole number of {header.datatype}")
    return tensor_of_values(header, np.frombuffer(data, dtype))


def _from_json(header: InputHeader) -> InputTensor:
    if header.data is None:
        raise InvalidRequest(f"input '{header.name}' has neither data nor binary_data_size")
    flat = list(_flatten(header.data, header.name))
    if header.datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise InvalidRequest(f"input '{header.name}': BYTES data has to be texts")
        return tensor_of_values(header, flat)
    dtype = _dtype(header)
    kinds = (bool,) if dtype.kind == "b" else (int, float) if dtype.kind == "f" else (int,)
    if not all(type(value) in kinds for value in flat):
        raise InvalidRequest(f"input '{header.name}': data of {header.datatype} has to be {kinds[0].__name__}s")
    try:
        return tensor_of_values(header, np.asarray(flat, dtype))
    except OverflowError as error:
        raise InvalidRequest(f"input '{header.name}': a value does not fit {header.datatype}") from error


def _flatten(data: list[Any], name: str, depth: int = 0) -> Iterable[Any]:
    if depth > 8:
        raise InvalidRequest(f"input '{name}': data is nested more than 8 deep")
    for value in data:
        if isinstance(value, list):
            yield from _flatten(value, name, depth + 1)
        else:
            yield value


def tensor_of_values(header: InputHeader, values: list[str] | Array) -> InputTensor:
    """An input from its flat values.

    Raises:
        InvalidRequest: they are not as many as its shape says, or not finite.
    """
    if math.prod(header.shape) != len(values):
        raise InvalidRequest(f"input '{header.name}' has shape {header.shape} and {len(values)} elements")
    if isinstance(values, np.ndarray) and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidRequest(f"input '{header.name}' holds numbers that are not finite")
    return InputTensor(header.datatype, tuple(header.shape), values)


def _dtype(header: InputHeader) -> np.dtype[Any]:
    if header.datatype not in DTYPES:
        raise InvalidRequest(
            f"input '{header.name}' is of datatype '{header.datatype}'; read are BYTES, {', '.join(DTYPES)}"
        )
    return DTYPES[header.datatype]


def type_of(values: Array | Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of an output."""
    if not isinstance(values, np.ndarray):
        return "BYTES", (len(values),)
    return next(name for name, dtype in DTYPES.items() if dtype == values.dtype), values.shape
