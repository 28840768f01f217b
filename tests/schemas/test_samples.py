"""The release contract of version 1: what was once sent is understood for ever.

Each message is stored as it was encoded when its sample was made. To add one: describe it in `SAMPLES`, then run
`python tests/schemas/make_samples.py`, which writes what is missing and never touches what is there. A stored sample
that no longer decodes is a broken wire: mend the Struct, not the sample.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from narsil_stream.schemas import codec, internal
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.internal import (
    Answers,
    Ask,
    Asking,
    Batch,
    BatcherBeat,
    Bundle,
    Cancel,
    Control,
    Demand,
    Done,
    ExecutorBeat,
    Grant,
    Lease,
    Look,
    ModelCard,
    ModelRef,
    Report,
    Result,
    Slot,
    ToBatcher,
    ToExecutor,
    ToRepository,
    Waiting,
)
from narsil_stream.schemas.model import DlrmDot, ModelSpec, Preprocessing, Table
from narsil_stream.schemas.oip import (
    BatchStatistics,
    Duration,
    InferStatistics,
    ModelStatistics,
    RepositoryEntry,
    StatisticsReport,
)
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor

FOLDER = Path(__file__).parent / "samples" / "v1"


class Sample(NamedTuple):
    encode: Callable[[], bytes]
    """Used once, by make_samples.py."""
    decode: Callable[[bytes], Any]
    """As the receiver does it."""
    value: Any


def tensor(name: str, dtype: str, shape: tuple[int, ...], numbers: list[float]) -> Tensor:
    code = {"FP32": "f", "INT32": "i", "INT64": "q"}[dtype]
    return Tensor(name, dtype, shape, memoryview(struct.pack(f"<{len(numbers)}{code}", *numbers)))


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DENSE = tensor("dense", "FP32", (2, 3), [0.5, -0.0, 1e-45, 3.4028234663852886e38, 0.10000000149011612, -7.0])
ONE_HOT = InferRequest(
    id="req-1",
    inputs=(DENSE, tensor("sparse", "INT64", (2, 2), [0, 1, 2_147_483_648, 5])),
    budget_us=50_000,
    sent_us=1_767_225_600_000_000,
    priority=3,
    traceparent=TRACE,
)
MULTI_HOT = InferRequest(
    id="Größe 42 €",
    inputs=(
        DENSE,
        tensor("values", "INT32", (4,), [7, 0, 2_147_483_646, 9]),
        tensor("lengths", "INT32", (2, 2), [1, 0, 0, 3]),
    ),
    budget_us=1,
)
BY_HAND = InferRequest(
    id="", inputs=(tensor("dense", "FP32", (1, 2), [1, 0.25]), tensor("sparse", "INT32", (1, 1), [4]))
)
BY_HAND_JSON = b"""{"inputs": [
  {"name": "dense", "shape": [1, 2], "datatype": "FP32", "data": [[1, 0.25]]},
  {"name": "sparse", "shape": [1, 1], "datatype": "INT32", "data": [4]}
]}
"""
LEAST = InferRequest(id="", inputs=())

SCORED = InferAnswer(
    id="req-1",
    outputs=(tensor("scores", "FP32", (2,), [0.25, 0.8999999761581421]),),
    model="dlrm",
    version="7",
)
OVERLOADED = InferAnswer(id="req-1", fault="OVERLOADED", detail="the queue is full", retry_after_us=1_500)
WRONG = InferAnswer(id="", fault="INVALID_ARGUMENT", detail="input 'dense' [0, 1] is nan; expected a finite number")

SLOT = Slot(index=1, generation=300)
DEMAND = Demand(batcher="batcher-1", rows=64, slack_us=900, returned=(Slot(index=0, generation=2), SLOT))
REF = ModelRef(name="dlrm", version="7", digest="0123456789abcdef")
BATCH = Batch(
    batch=70_000,
    batcher="batcher-1",
    slot=SLOT,
    model="dlrm",
    version="7",
    digest="0123456789abcdef",
    rows=2,
    dense=DENSE.data,
    ids=tensor("", "INT32", (4,), [0, 1, 6, 5]).data,
    lengths=memoryview(b""),
    budget_us=40_000,
    demand=DEMAND,
)
SPEC = ModelSpec(
    name="dlrm",
    architecture=DlrmDot(dense=13, dim=4, bottom=(8, 4), top=(8, 1)),
    tables=tuple(Table(name=f"C{i}", rows=10 * i, dtype="INT8" if i % 2 else "FP32") for i in range(1, 27)),
    files={"weights.safetensors": "ab" * 32},
    version="7",
    preprocessing=Preprocessing(),
    metrics={"auc": 0.8125},
)


def public() -> dict[str, Sample]:
    """Requests and answers in both spellings."""
    samples = {}
    for spelling, suffix in ((Spelling.MSGPACK, "bin"), (Spelling.JSON, "json")):
        for name, request in {"one-hot": ONE_HOT, "multi-hot": MULTI_HOT, "least": LEAST}.items():
            encode = lambda request=request, spelling=spelling: codec.encode_request(request, spelling)  # noqa: E731
            samples[f"request-{name}.{suffix}"] = Sample(encode, codec.decode_request, request)
        for name, answer in {"scored": SCORED, "overloaded": OVERLOADED, "wrong": WRONG}.items():
            encode = lambda answer=answer, spelling=spelling: codec.encode_answer(answer, spelling)  # noqa: E731
            samples[f"answer-{name}.{suffix}"] = Sample(encode, codec.decode_answer, answer)
    samples["request-by-hand.json"] = Sample(lambda: BY_HAND_JSON, codec.decode_request, BY_HAND)
    return samples


def between_actors() -> dict[str, Sample]:
    return {
        f"{name}.bin": Sample(lambda value=value: msgspec.msgpack.encode(value), reader(kind), value)
        for kind, values in {
            Asking: {
                "bundle": Bundle(
                    reply="_INBOX.narsil.0011223344556677",
                    asks=(
                        Ask(slot=0, model="dlrm", version="", request=ONE_HOT),
                        Ask(slot=2**40, model="dlrm", version="7", request=MULTI_HOT),
                    ),
                ),
                "cancel": Cancel(reply="_INBOX.narsil.0011223344556677", slots=(0, 2**40)),
            },
            ToBatcher: {
                "result": Result(
                    batch=70_000,
                    executor="executor-1",
                    scores=SCORED.outputs[0].data,
                    service_us=412,
                    grant=Slot(index=1, generation=301),
                ),
                "result-void": Result(batch=70_000, executor="executor-1", scores=memoryview(b""), service_us=0),
                "result-failed": Result(
                    batch=70_000,
                    executor="executor-1",
                    scores=memoryview(b""),
                    service_us=0,
                    fault="INTERNAL",
                    detail="the forward pass failed",
                ),
                "grant": Grant(executor="executor-1", slot=SLOT),
            },
            ToExecutor: {
                "demand": DEMAND,
                "batch": BATCH,
                "batch-multi-hot": msgspec.structs.replace(
                    BATCH, lengths=tensor("", "INT32", (2, 2), [1, 0, 0, 3]).data
                ),
            },
            Answers: {
                "answers": Answers(batcher="batcher-1", slots=(2**40, 0, 3), answers=(SCORED, OVERLOADED, WRONG)),
                "answers-by-deadline": Answers("batcher-1", (2**40, 0), (SCORED, OVERLOADED), by_deadline=(0,)),
            },
            ExecutorBeat: {
                "executor-beat": ExecutorBeat(
                    executor="executor-1",
                    models=(REF,),
                    slots=2,
                    leases=(Lease(batcher="batcher-1", slot=SLOT, busy=True),),
                    state="leaving",
                ),
                "executor-beat-control": ExecutorBeat(
                    executor="executor-1", models=(), slots=2, leases=(), retiring=(REF,), unloaded=("dlrm", "old")
                ),
                "executor-beat-waiting": ExecutorBeat(
                    executor="executor-1",
                    models=(REF,),
                    slots=2,
                    leases=(),
                    waiting=(Waiting("batcher-1", 64), Waiting("batcher-2", 2**40)),
                ),
                "executor-beat-lanes": ExecutorBeat(
                    executor="executor-1", models=(REF,), slots=3, leases=(), lanes=(2,)
                ),
            },
            BatcherBeat: {
                "batcher-beat": BatcherBeat(
                    batcher="batcher-1", models=(REF,), wait_us=800, demand_rows=64, slack_us=900, state="gone"
                ),
                "batcher-beat-control": BatcherBeat(
                    batcher="batcher-1", models=(), wait_us=0, finishing=(REF.digest,), unloaded=True
                ),
                "batcher-beat-paired": BatcherBeat(batcher="batcher-1", models=(REF,), wait_us=0, paired=True),
            },
            ToRepository: {
                "control": Control(reply="_INBOX.narsil.0011223344556677", slot=3, verb="load", model="dlrm"),
                "look": Look(reply="_INBOX.narsil.0011223344556677", slot=2**40),
            },
            Done: {
                "done": Done(executor="executor-1", slot=3),
                "done-index": Done(
                    executor="executor-1",
                    slot=2**40,
                    entries=(
                        RepositoryEntry("dlrm", "7", "READY"),
                        RepositoryEntry("dlrm", "8", "UNAVAILABLE", "no such tensor"),
                    ),
                ),
                "done-refused": Done(executor="executor-1", slot=4, fault="NOT_FOUND", detail="no model 'x'"),
            },
            Report: {
                "report": Report(
                    kind="executor",
                    actor="executor-1",
                    pid=4_711,
                    state="ready",
                    detail="dlrm 7 on cpu (reference, fp32)",
                    metrics="narsil_slots 2.0\n",
                ),
            },
        }.items()
        for name, value in values.items()
    }


def reader(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.msgpack.Decoder(kind).decode


CARDS = [ModelCard(digest=REF.digest, spec=SPEC, backend="reference", device="cpu", precision="fp32")]
STATISTICS = StatisticsReport(
    (
        ModelStatistics(
            name="dlrm",
            version="7",
            last_inference=1_767_225_600_000,
            inference_count=70,
            execution_count=2,
            inference_stats=InferStatistics(
                success=Duration(3, 9_000_000),
                fail=Duration(1, 500),
                queue=Duration(3, 1_000_000),
                compute_input=Duration(3, 60_000),
                compute_infer=Duration(3, 2_400_000),
                compute_output=Duration(3, 30_000),
            ),
            batch_stats=[BatchStatistics(6, Duration(1, 10_000), Duration(1, 400_000), Duration(1, 5_000))],
        ),
    )
)
SAMPLES = {
    **public(),
    **between_actors(),
    "statistics.json": Sample(
        lambda: msgspec.json.encode(STATISTICS), msgspec.json.Decoder(StatisticsReport).decode, STATISTICS
    ),
    "model-cards.json": Sample(lambda: msgspec.json.encode(CARDS), msgspec.json.Decoder(list[ModelCard]).decode, CARDS),
}

each_sample = pytest.mark.parametrize("name", SAMPLES)


def array_like(value: object) -> bool:
    return isinstance(value, msgspec.Struct) and value.__struct_config__.array_like


def grown(value: Any) -> Any:
    """A message as a newer sender writes it: every array has a field more at its end."""
    if array_like(value):
        tag = value.__struct_config__.tag
        fields = [grown(getattr(value, field)) for field in value.__struct_fields__]
        return [*([] if tag is None else [tag]), *fields, {"newer": [1, "two", b"3"]}]
    return [grown(item) for item in value] if isinstance(value, tuple) else value


def grown_json(value: Any) -> Any:
    """The same in JSON. A model's description is left alone: one that this version cannot serve must be refused."""
    if isinstance(value, dict):
        fields = {key: item if key == "spec" else grown_json(item) for key, item in value.items()}
        return {"newer": {"a": [1, None]}, **fields}
    return [grown_json(item) for item in value] if isinstance(value, list) else value


@each_sample
def test_a_stored_message_means_what_it_meant(name: str):
    """Clients, gateways and actors of two releases share a broker during every upgrade."""
    assert SAMPLES[name].decode((FOLDER / name).read_bytes()) == SAMPLES[name].value


@each_sample
def test_a_message_of_a_newer_sender_is_understood(name: str):
    """Structs grow at their end, each one that is nested too; an old receiver passes over what it does not know."""
    sample = SAMPLES[name]
    if name.endswith(".json"):
        newer = json.dumps(grown_json(json.loads((FOLDER / name).read_bytes()))).encode()
    else:
        newer = msgspec.msgpack.encode(grown(sample.value))
        assert len(newer) > len((FOLDER / name).read_bytes())
    assert sample.decode(newer) == sample.value


def test_every_message_has_a_sample():
    """A message that is not stored can change without anybody noticing."""
    messages = {
        kind
        for kind in vars(internal).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None
    }
    assert messages - {type(sample.value) for sample in SAMPLES.values()} == set()


def test_every_sample_is_read():
    """A file that nobody decodes proves nothing."""
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(SAMPLES)


def test_no_two_messages_share_a_tag():
    """The first element of a message is all that tells a batcher what it got."""
    kinds = {type(sample.value) for sample in SAMPLES.values()}
    tags = [kind.__struct_config__.tag for kind in kinds if issubclass(kind, msgspec.Struct)]
    tags = [tag for tag in tags if tag is not None]
    assert sorted(tags) == list(range(1, len(tags) + 1))
