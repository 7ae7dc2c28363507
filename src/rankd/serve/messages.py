"""The messages of the gRPC protocols, as classes. In: `protocol/descriptors.binpb`. Next: `grpc_server.py`.

They live in a pool of their own: another package in the same process may bring the same protocol (tritonclient does).
After a change of a .proto file: `python -m rankd.serve.messages` (extra dev) writes the descriptors anew.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FOLDER = files("rankd.serve.protocol")
PROTOS = ("open_inference.proto", "rankd.proto")
DESCRIPTORS = "descriptors.binpb"


@cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString((FOLDER / DESCRIPTORS).read_bytes()).file:
        pool.Add(file)
    return pool


@cache
def message(name: str) -> Any:
    """A message's class by its full name ("inference.ModelInferRequest")."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@cache
def methods(service: str) -> dict[str, tuple[Any, Any, bool]]:
    """The methods of a service by name: classes of request and response, and whether they are streams."""
    found = _pool().FindServiceByName(service).methods
    return {
        one.name: (message(one.input_type.full_name), message(one.output_type.full_name), one.server_streaming)
        for one in found
    }


def compiled() -> bytes:
    """What protoc makes of the .proto files.

    Raises:
        ImportError: grpcio-tools is not installed (extra dev).
        RuntimeError: protoc refuses them.
    """
    protoc: Any = importlib.import_module("grpc_tools.protoc")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / DESCRIPTORS
        arguments = ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={out}", *PROTOS]
        if protoc.main(arguments):
            raise RuntimeError(f"protoc refuses {', '.join(PROTOS)} of {FOLDER}")
        return out.read_bytes()


if __name__ == "__main__":
    Path(str(FOLDER / DESCRIPTORS)).write_bytes(compiled())
