"""Compile the .proto files to the descriptors that the gateway loads: `python -m tests.schemas.make_protos`."""

import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

SCHEMAS = Path(__file__).parents[2] / "schemas"
PROTOS = ("model_config.proto", "inference.proto")


def compiled() -> bytes:
    """A FileDescriptorSet of both, dependencies first, without comments."""
    with tempfile.NamedTemporaryFile() as out:
        well_known = files("grpc_tools") / "_proto"
        arguments = ["protoc", f"-I{SCHEMAS}", f"-I{well_known}", f"--descriptor_set_out={out.name}", *PROTOS]
        assert protoc.main(arguments) == 0
        return out.read()


if __name__ == "__main__":
    (SCHEMAS / "inference.binpb").write_bytes(compiled())
