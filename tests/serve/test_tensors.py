"""The binary tensor extension: hand-packed bytes, round trips, and any bytes at all."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.errors import InvalidRequest
from rankd.serve.tensors import decode_infer, encode_outputs, pack_bytes, unpack_bytes

HAND_PACKED = b"\x02\x00\x00\x00ab\x01\x00\x00\x00c"


def message(inputs: list[dict[str, Any]], tail: bytes = b"") -> tuple[bytes, str]:
    head = json.dumps({"inputs": inputs}).encode()
    return head + tail, str(len(head))


def test_bytes_elements_by_hand() -> None:
    assert pack_bytes(["ab", "c"]) == HAND_PACKED
    assert unpack_bytes(HAND_PACKED) == ["ab", "c"]


@given(st.lists(st.text(max_size=20), max_size=30))
def test_bytes_elements_round_trip(texts: list[str]) -> None:
    assert unpack_bytes(pack_bytes(texts)) == texts


def test_a_hand_packed_request() -> None:
    times = struct.pack("<2q", 5, -6)
    body, length = message(
        [
            {"name": "a", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(HAND_PACKED)}},
            {"name": "b", "datatype": "INT64", "shape": [1, 2], "parameters": {"binary_data_size": 16}},
            {"name": "c", "datatype": "FP32", "shape": [2, 1], "data": [[1.5], [2]]},
        ],
        HAND_PACKED + times,
    )
    _, inputs = decode_infer(body, length)
    assert inputs["a"].values == ["ab", "c"]
    assert np.asarray(inputs["b"].values).tolist() == [5, -6]
    assert np.asarray(inputs["c"].values).tolist() == [1.5, 2.0]
    assert inputs["b"].shape == (1, 2)


def test_a_hand_read_answer() -> None:
    scores = np.asarray([[1.0, -2.0]], np.float32)
    body, length = encode_outputs(("m", "1", "id7"), {"scores": scores, "candidates": ["ab"]}, ["scores"])
    assert length is not None
    head = json.loads(body[:length])
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "1", "id7")
    assert head["outputs"][0] == {
        "name": "scores", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8},
    }  # fmt: skip
    assert head["outputs"][1] == {"name": "candidates", "datatype": "BYTES", "shape": [1], "data": ["ab"]}
    assert body[length:] == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"


ONE = {"name": "a", "datatype": "INT64", "shape": [1]}


@pytest.mark.parametrize(
    ("inputs", "tail", "words"),
    [
        ([], b"", "length >= 1"),
        ([{**ONE, "data": [1]}, {**ONE, "data": [1]}], b"", "given twice"),
        ([ONE], b"", "neither data nor binary_data_size"),
        ([{**ONE, "data": [1], "parameters": {"binary_data_size": 8}}], bytes(8), "has both"),
        ([{**ONE, "parameters": {"binary_data_size": 9}}], bytes(8), "8 bytes are left"),
        ([{**ONE, "parameters": {"binary_data_size": -1}}], bytes(8), "binary_data_size is -1"),
        ([{**ONE, "parameters": {"binary_data_size": True}}], bytes(8), "binary_data_size is True"),
        ([{**ONE, "parameters": {"binary_data_size": 7}}], bytes(7), "no whole number"),
        ([{**ONE, "parameters": {"binary_data_size": 8}}], bytes(9), "belong to none"),
        ([{**ONE, "shape": [2], "data": [1]}], b"", "1 elements"),
        ([{**ONE, "shape": [-1], "data": [1]}], b"", "shape"),
        ([{**ONE, "data": [1.5]}], b"", "has to be ints"),
        ([{**ONE, "data": [2**63]}], b"", "does not fit"),
        ([{**ONE, "data": ["1"]}], b"", "has to be ints"),
        ([{**ONE, "datatype": "FP16", "data": [1]}], b"", "datatype 'FP16'"),
        ([{**ONE, "datatype": "BYTES", "data": [1]}], b"", "has to be texts"),
        ([{**ONE, "datatype": "BYTES", "parameters": {"binary_data_size": 3}}], b"\x01\x00\x00", "ends within"),
        ([{**ONE, "datatype": "BYTES", "parameters": {"binary_data_size": 4}}], b"\xff\xff\xff\xff", "more bytes than"),
        ([{**ONE, "datatype": "BYTES", "parameters": {"binary_data_size": 5}}], b"\x01\x00\x00\x00\xff", "not UTF-8"),
        ([{**ONE, "datatype": "FP32", "parameters": {"binary_data_size": 4}}], b"\x00\x00\xc0\x7f", "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: list[dict[str, Any]], tail: bytes, words: str) -> None:
    body, length = message(inputs, tail)
    with pytest.raises(InvalidRequest, match=words):
        decode_infer(body, length)


@pytest.mark.parametrize("length", ["", "-1", "0", "999", "1e3", "x" * 100])
def test_a_wrong_header_length_is_refused(length: str) -> None:
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length"):
        decode_infer(b'{"inputs": []}', length)


GOOD, GOOD_LENGTH = message(
    [
        {"name": "a", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(HAND_PACKED)}},
        {"name": "c", "datatype": "INT64", "shape": [1], "data": [3]},
    ],
    HAND_PACKED,
)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 250).map(str))
def test_any_bytes_give_tensors_or_a_refusal(body: bytes, length: str | None) -> None:
    with suppress(InvalidRequest):
        decode_infer(body, length)


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_message_gives_tensors_or_a_refusal(data: st.DataObject) -> None:
    body = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(InvalidRequest):
        decode_infer(bytes(body), GOOD_LENGTH)
