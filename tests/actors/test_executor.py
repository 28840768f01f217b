"""An executor with a broker around it: batches at the same time, each with its own scores, counted as they ended."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from narsil_stream.core.config import Config, ExecutorConfig
from narsil_stream.core.telemetry import text
from narsil_stream.gateways.inference import Inference
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read as read_artifact
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.asking import Rows, metric, some_rows
from tests.door import Door
from tests.doubles import Gate, GatedBackend
from tests.support import PATIENCE_S, NatsServer, System, until


def counted(system: System, name: str, **labels: str) -> float:
    (executor,) = system.actors("executor")
    return metric(text(executor.registry), name, **labels)


def request(rows: Rows) -> InferRequest:
    return InferRequest("", (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids)), 20_000_000)


def ask(door: Door, rows: Rows) -> Future[InferAnswer]:
    return door.ask("ctr", request(rows))


def right(answer: InferAnswer, rows: Rows) -> bool:
    return not answer.fault and bool(np.allclose(codec.array(answer.outputs[0]), rows.scores, rtol=0, atol=1e-6))


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_as_many_batches_compute_at_once_as_the_backend_has_lanes(
    nats_server: NatsServer, criteo_model: Path, lanes: int
) -> None:
    """One more waits at the executor, and no more than that: the rest can still be joined and overtaken."""
    gate = Gate(lanes)
    rows = some_rows(criteo_model, 60)
    with System(nats_server.url, criteo_model, loader=gate.load) as system, Door(nats_server.url) as door:
        with gate.closed():
            asked = []
            for i in range(lanes + 1):
                asked.append(ask(door, rows.part(i)))
                until(lambda i=i: counted(system, "narsil_slots_busy") == i + 1, "the executor has it")  # type: ignore[misc]
            until(lambda: gate.waiting == lanes, "all lanes compute")
            asked += [ask(door, rows.part(i)) for i in range(lanes + 1, 60)]
            assert counted(system, "narsil_slots") == lanes + 1
            assert len(gate.rows) == lanes
        assert all(right(answer.result(PATIENCE_S), rows.part(i)) for i, answer in enumerate(asked))
        assert gate.most == lanes
        assert counted(system, "narsil_rows_total") == 60
        assert counted(system, "narsil_batches_total", outcome="computed") == len(gate.rows)


def test_slots_of_the_configuration_bound_what_computes_at_once(nats_server: NatsServer, criteo_model: Path) -> None:
    """Fewer slots than lanes: somebody wants small batches and low latency."""
    gate = Gate(lanes=3)
    rows = some_rows(criteo_model, 20)
    config = Config(executor=ExecutorConfig(slots=2))
    with System(nats_server.url, criteo_model, loader=gate.load, config=config), Door(nats_server.url) as door:
        with gate.closed():
            asked = []
            for i in range(20):
                asked.append(ask(door, rows.part(i)))
                until(lambda i=i: gate.waiting == min(i + 1, 2), "two compute")  # type: ignore[misc]
        assert all(right(answer.result(PATIENCE_S), rows.part(i)) for i, answer in enumerate(asked))
    assert gate.most == 2


class Two(GatedBackend):
    """Two lanes; a batch that holds the poisoned row fails while its neighbour computes."""

    poison: float

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        if (batch.dense[:, 0] == self.poison).any():
            scores[:] = np.nan
            raise RuntimeError("secret address 0x1234")
        super().run(batch, scores)


def test_a_batch_that_fails_beside_another_fails_alone(nats_server: NatsServer, criteo_model: Path) -> None:
    """The lane is free again, and the other's scores are its own."""
    gate = Gate(lanes=2)
    rows = some_rows(criteo_model, 30)

    def load(artifact: Path) -> Backend:
        backend = Two(reference.load(artifact), gate)
        backend.poison = float(rows.dense[3, 0])
        return backend

    with System(nats_server.url, criteo_model, loader=load) as system, Door(nats_server.url) as door:
        for turn in range(3):
            with gate.closed():
                beside = ask(door, rows.part(10 + turn))
                until(lambda: gate.waiting == 1, "the neighbour computes")
                failed = ask(door, rows.part(3)).result(PATIENCE_S)
                assert failed.fault == Fault.INTERNAL.name and "secret" not in failed.detail
            assert right(beside.result(PATIENCE_S), rows.part(10 + turn))
        answers = [ask(door, rows.part(i)) for i in range(4, 30)]
        assert all(right(answer.result(PATIENCE_S), rows.part(i)) for i, answer in enumerate(answers, 4))
        until(lambda: counted(system, "narsil_slots_busy") == 0, "all slots are free")
        assert counted(system, "narsil_batches_total", outcome="failed") >= 3


def test_draining_waits_for_all_lanes(nats_server: NatsServer, criteo_model: Path) -> None:
    """What was accepted is answered, whichever lane it is on."""
    gate = Gate(lanes=2)
    rows = some_rows(criteo_model, 3)
    with System(nats_server.url, criteo_model, loader=gate.load) as system, Door(nats_server.url) as door:
        with gate.closed():
            asked = []
            for i in range(3):
                asked.append(ask(door, rows.part(i)))
                until(lambda i=i: counted(system, "narsil_slots_busy") == i + 1, "the executor has it")  # type: ignore[misc]
            draining = system.submit(system.actors("executor")[0].drain())
            assert not draining.done()
        draining.result(PATIENCE_S)
        assert all(right(answer.result(PATIENCE_S), rows.part(i)) for i, answer in enumerate(asked))


class Counting(reference.Reference):
    """Tells where its scores go, and of pieces that it was not prepared for."""

    memory: set[int]
    asked: int
    pieces: int

    @property
    def unprepared(self) -> int:
        return self.pieces

    def empty(self, rows: int) -> NDArray[np.float32]:
        self.asked += 1
        return super().empty(rows)

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        self.memory.add(scores.ctypes.data)
        self.pieces += batch.rows == 2
        super().run(batch, scores)


Made = tuple[list[Counting], Callable[[Path], Backend]]


@pytest.fixture
def counting() -> Made:
    made: list[Counting] = []

    def load(artifact: Path) -> Backend:
        backend = Counting(read_artifact(artifact))
        backend.memory, backend.asked, backend.pieces = set(), 0, 0
        made.append(backend)
        return backend

    return made, load


def test_scores_that_somebody_holds_are_never_written_over(
    nats_server: NatsServer, criteo_model: Path, counting: Made
) -> None:
    """In one process an answer is handed over by reference, down to the memory that the device has written."""
    made, load = counting
    rows = some_rows(criteo_model, 200)
    held: list[InferAnswer] = []
    inline = Config(mode="inline")
    with System(nats_server.url, criteo_model, loader=load, config=inline) as system:
        (runtime,) = set(system.runtimes["executor"])

        async def ask_here() -> None:
            inference = Inference(system.config, runtime.bus, CollectorRegistry())
            await inference.start()
            await inference.wait_ready(PATIENCE_S)
            for i, part in enumerate(rows.part(i) for i in range(200)):

                async def read(part: Rows = part) -> InferRequest:
                    return request(part)

                answer = await inference.ask("ctr", "", read)
                assert right(answer, part)
                if i % 10 == 0:
                    held.append(answer)
            await inference.stop()

        system.submit(ask_here()).result(PATIENCE_S)
    assert all(right(answer, rows.part(10 * i)) for i, answer in enumerate(held))
    where = {np.frombuffer(answer.outputs[0].data, np.float32).ctypes.data for answer in held}
    assert where <= made[0].memory and len(where) == len(held), "they were not copied"
    assert made[0].asked < 100, "the others' memory was used again"


def test_scores_for_another_process_are_written_into_the_same_memory_again(
    nats_server: NatsServer, criteo_model: Path, counting: Made
) -> None:
    """What has left as bytes is nobody's any more."""
    made, load = counting
    rows = some_rows(criteo_model, 50)
    with System(nats_server.url, criteo_model, loader=load), Door(nats_server.url) as door:
        for i in range(50):
            assert right(ask(door, rows.part(i)).result(PATIENCE_S), rows.part(i))
    assert made[0].asked == len(made[0].memory) <= 3


def test_pieces_that_nothing_was_prepared_for_are_counted(
    nats_server: NatsServer, criteo_model: Path, counting: Made
) -> None:
    """A graph that is captured for a live batch costs milliseconds: operators want to see it."""
    _, load = counting
    rows = some_rows(criteo_model, 4)
    with System(nats_server.url, criteo_model, loader=load) as system, Door(nats_server.url) as door:
        for part in (rows.part(0), rows.part(1, 2), rows.part(3), rows.part(0, 3)):
            assert right(ask(door, part).result(PATIENCE_S), part)
        until(lambda: counted(system, "narsil_batches_without_graph_total") == 2, "two are counted")
