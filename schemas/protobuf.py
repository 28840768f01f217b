"""The gRPC service's messages, made from `inference.proto` in a descriptor pool of their own.

Triton's and KServe's clients register the same names in protobuf's default pool, in two versions that clash: messages
of ours there would keep both from being imported in one process with narsil_stream.
"""

from importlib.resources import files
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

__all__ = ["POOL", "SERVICE", "DecodeError", "Message", "filled", "message_class"]

POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString((files(__package__) / "inference.binpb").read_bytes()).file:
    POOL.AddSerializedFile(_file.SerializeToString())

SERVICE: ServiceDescriptor = POOL.FindServiceByName("inference.GRPCInferenceService")


def message_class(name: str) -> Any:
    """The class of a message of the protocol, e.g. "ModelInferRequest"."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"{SERVICE.file.package}.{name}"))


def filled(name: str, content: dict[str, Any]) -> Message:
    """A message of that name with the content of a JSON object, whose names are the fields' own."""
    message: Message = message_class(name)()
    return json_format.ParseDict(content, message, descriptor_pool=POOL)
