"""The protobuf messages: ours are those that Triton's and KServe's clients speak, in a pool of their own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor_pool import Default

from narsil_stream.schemas import oip
from narsil_stream.schemas.protobuf import POOL, SERVICE, filled
from tests.schemas.make_protos import SCHEMAS, compiled

OTHERS: dict[str, set[str]] = {
    "tritonclient.grpc.service_pb2": set(),
    "kserve.protocol.grpc.grpc_predict_v2_pb2": {
        # Fields that KServe's repository messages number otherwise; its client has no such verbs.
        "RepositoryModelLoadRequest", "RepositoryModelLoadResponse",
        "RepositoryModelUnloadRequest", "RepositoryModelUnloadResponse",
    },
}  # fmt: skip
"""Modules, and messages in which they are known to differ."""
DUMP = """
import importlib, json, sys
from google.protobuf import descriptor_pb2
module = importlib.import_module(sys.argv[1])
files = {module.DESCRIPTOR.name: module.DESCRIPTOR} | {d.name: d for d in module.DESCRIPTOR.dependencies}
protos = [descriptor_pb2.FileDescriptorProto.FromString(f.serialized_pb) for f in files.values()]
print(json.dumps([proto.SerializeToString().hex() for proto in protos]))
"""


def fields(messages: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, int, int, str]]]:
    """Each field of these messages and of those inside them: its number, type, label and type's name."""
    for message in messages:
        name = f"{prefix}{message.name}"
        for field in message.field:
            yield f"{name}.{field.name}", (field.number, field.type, field.label, field.type_name)
        yield from fields(message.nested_type, f"{name}.")


def methods(protos: Any) -> dict[str, tuple[str, str, bool, bool]]:
    return {
        f"{proto.package}.{service.name}/{m.name}": (
            m.input_type,
            m.output_type,
            m.client_streaming,
            m.server_streaming,
        )
        for proto in protos
        for service in proto.service
        for m in service.method
    }


def enums(messages: Any) -> Iterator[tuple[str, int]]:
    for message in messages:
        for enum in message.enum_type:
            yield from ((f"{message.name}.{value.name}", value.number) for value in enum.value)


def ours() -> list[Any]:
    names = (SERVICE.file.name, *(dependency.name for dependency in SERVICE.file.dependencies))
    return [descriptor_pb2.FileDescriptorProto.FromString(POOL.FindFileByName(name).serialized_pb) for name in names]


@pytest.fixture(scope="module", params=OTHERS)
def theirs(request: pytest.FixtureRequest) -> tuple[str, list[Any]]:
    """Read in another process: protobuf refuses to hold both in one."""
    done = subprocess.run([sys.executable, "-c", DUMP, request.param], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    raw = [bytes.fromhex(one) for one in json.loads(done.stdout.splitlines()[-1])]
    return request.param, [descriptor_pb2.FileDescriptorProto.FromString(one) for one in raw]


def test_every_field_has_the_number_and_the_type_that_clients_use(theirs: tuple[str, list[Any]]) -> None:
    """A field of another number is read as missing, without a word."""
    name, protos = theirs
    mine = {path: kind for proto in ours() for path, kind in fields(proto.message_type)}
    known = {path: kind for proto in protos for path, kind in fields(proto.message_type)}
    differing = {path for path in mine.keys() & known.keys() if mine[path] != known[path]}
    assert {path.partition(".")[0] for path in differing} <= OTHERS[name]
    service_file = protos[0]
    missing = {path for path, _ in fields(service_file.message_type)} - mine.keys()
    assert {path.partition(".")[0] for path in missing} <= OTHERS[name]


def test_every_method_is_there_with_its_messages(theirs: tuple[str, list[Any]]) -> None:
    """The same for the verbs."""
    mine, known = methods(ours()), methods(theirs[1])
    spelled = {path.replace("inference.GRPCInferenceService", SERVICE.full_name): kind for path, kind in known.items()}
    assert spelled.items() <= mine.items()


def test_enumerations_have_tritons_numbers() -> None:
    """TYPE_FP32 travels as a number."""
    done = subprocess.run(
        [sys.executable, "-c", DUMP, "tritonclient.grpc.model_config_pb2"], capture_output=True, text=True, timeout=60
    )
    (raw,) = json.loads(done.stdout.splitlines()[-1])
    known = descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(raw))
    (mine,) = (proto for proto in ours() if proto.name == "model_config.proto")
    data_types = {value.name: value.number for enum in known.enum_type for value in enum.value}
    assert {value.name: value.number for enum in mine.enum_type for value in enum.value} == data_types
    assert set(enums(mine.message_type)) <= set(enums(known.message_type))


def test_the_compiled_descriptors_are_those_of_the_proto_files() -> None:
    """Whoever changes one and forgets the other ships a document that lies."""
    stored = descriptor_pb2.FileDescriptorSet.FromString((SCHEMAS / "inference.binpb").read_bytes())
    assert stored == descriptor_pb2.FileDescriptorSet.FromString(compiled()), "run python -m tests.schemas.make_protos"


def test_nothing_of_ours_is_in_the_pool_that_all_share() -> None:
    """There it would clash with the client libraries of whoever imports us."""
    code = (
        "from narsil_stream.schemas import protobuf; from google.protobuf.descriptor_pool import Default;"
        "Default().FindMessageTypeByName('inference.ModelInferRequest')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyError" in done.stderr
    assert POOL is not Default()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ServerMetadataResponse", oip.ServerMetadata("narsil-stream", "1")),
        ("ModelMetadataResponse", oip.ModelMetadata("m", ("1",), "p", (oip.TensorMetadata("x", "FP32", (-1, 2)),), ())),
        (
            "ModelConfig",
            oip.ModelConfig(
                "m", "p", "b", 9, (oip.InputConfig("x", "TYPE_FP32", (2,), optional=True),),
                (oip.OutputConfig("y", "TYPE_INT64", ()),), (oip.InstanceGroup("g", "KIND_GPU"),),
                oip.DynamicBatching(7), parameters={"k": oip.ConfigParameter("v")},
            ),
        ),
        (
            "ModelStatisticsResponse",
            oip.StatisticsReport((oip.ModelStatistics(
                "m", "1", 3, 4, 5, oip.InferStatistics(queue=oip.Duration(1, 2**40)), [oip.BatchStatistics(8)]
            ),)),
        ),
    ],
)  # fmt: skip
def test_a_document_fills_the_message_of_its_name(name: str, value: msgspec.Struct) -> None:
    """One value serves both doors, so every name in it has to be a field."""
    content = msgspec.to_builtins(value)
    message = filled(name, content)
    back = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert contains(back, content)


def contains(found: Any, wanted: Any) -> bool:
    """JSON of protobuf spells 64 bits as text, and leaves out messages that are empty."""
    if isinstance(wanted, dict):
        return all(contains(found.get(name, {}), value) for name, value in wanted.items())
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(contains, found, wanted))
    return bool(found == wanted or found == str(wanted))


def test_the_proto_files_belong_to_the_distribution() -> None:
    """Users generate clients from them, and the gateway loads the compiled ones."""
    pyproject = (SCHEMAS.parent / "pyproject.toml").read_text()
    assert '"*.proto"' in pyproject and '"*.binpb"' in pyproject
