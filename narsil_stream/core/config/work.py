"""The settings of how requests become batches, who computes them, and when somebody counts as dead."""

from typing import Annotated

from msgspec import Meta, Struct

from narsil_stream.core.config.fields import LIVE, MIB, Count


class BatchConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Batching"""

    batchers: Annotated[
        Count,
        Meta(
            description="Batcher processes. More: more requests per second taken in, but each sees fewer of them, "
            "so batches are less full."
        ),
    ] = 1
    max_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=65_536,
            description="Most rows in one batch. Larger: more throughput, longer tail latency, more memory.",
            extra=LIVE,
        ),
    ] = 4096
    max_request_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Most rows in one request to a gateway; above it the answer is 413. What is more than a batch "
            "or a message holds is split, and its scores are joined. Larger: one caller can hold up the others.",
            extra=LIVE,
        ),
    ] = 65_536
    queue_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=16_777_216,
            description="Most rows waiting in one batcher; above it requests are refused as OVERLOADED. Larger: "
            "longer waits before a refusal.",
            extra=LIVE,
        ),
    ] = 65_536
    queue_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=16 * 1024 * MIB,
            description="Most bytes waiting in one batcher; above it requests are refused as OVERLOADED. Larger: "
            "more memory.",
            extra=LIVE,
        ),
    ] = 64 * MIB
    linger_us: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="How long a request waits for company although an executor is free, µs. 0: never. Larger: "
            "fuller batches, later answers.",
            extra=LIVE,
        ),
    ] = 0
    slo_p99_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="Target for the p99 from arrival in the batcher to the scores, ms (20 or 20ms): row cap and "
            "linger of batches are tuned to it, up to `max_rows` and from `linger_us` on. 0: they stay as configured. "
            "Larger: fuller batches, later answers. It refuses nobody: budgets do.",
            extra=LIVE | {"flag": "--slo-p99", "unit": "ms"},
        ),
    ] = 0.0
    consolidate: Annotated[
        bool,
        Meta(
            description="Keep batches full by using as few executors as meet the deadlines. Fewer passes, later "
            "answers; for two executors or more.",
            extra=LIVE,
        ),
    ] = False
    default_budget_us: Annotated[
        int,
        Meta(
            ge=1000,
            le=600_000_000,
            description="Time budget of a request that names none, µs. Larger: under overload, answers come late "
            "rather than as refusals.",
            extra=LIVE,
        ),
    ] = 1_000_000
    max_budget_us: Annotated[
        int,
        Meta(
            ge=1000,
            le=600_000_000,
            description="Longest time budget that a request may ask for, µs; a longer one is cut to it. Larger: "
            "requests may hold memory for longer.",
            extra=LIVE,
        ),
    ] = 60_000_000
    ageing_percent: Annotated[
        int,
        Meta(
            ge=0,
            le=100,
            description="While more urgent requests wait: the share of the rows that goes to less urgent ones which "
            "have waited for half of their budget, percent. 0: none, so that they may starve. Larger: urgent requests "
            "wait longer.",
            extra=LIVE,
        ),
    ] = 10
    tenant_weights: Annotated[
        str,
        Meta(
            description="Shares of tenants when they compete, as <name>=<weight>, separated by commas. A tenant is the "
            'name of a token, or what a request says where no token is needed. Who is not named has weight 1. "": all '
            "are equal. Larger: more for that tenant, less for each other one.",
        ),
    ] = ""
    stale_grace_us: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000_000,
            description="A request older than its budget plus this, by the sender's clock, is dropped unread, µs. "
            "0: never. Larger: more work for callers who have left; smaller: clocks must agree better.",
            extra=LIVE,
        ),
    ] = 2_000_000

    @property
    def weights(self) -> dict[str, float]:
        """Of tenants, by name. Raises ValueError."""
        weights: dict[str, float] = {}
        for one in filter(None, map(str.strip, self.tenant_weights.split(","))):
            name, _, weight = one.rpartition("=")
            weights[name.strip()] = float(weight)
        return weights


class ExecutorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Executors"""

    executors: Annotated[
        Count, Meta(description="Executor processes, each with a copy of the model. More: more memory.")
    ] = 1
    lanes: Annotated[
        int,
        Meta(
            ge=0,
            le=16,
            description="Batches that one model computes at the same time, where its backend can (native). 0: as many "
            "as the backend does best with. More: rows a second, until the device is full; then latency, and more of "
            "the device's memory.",
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="Batches that one executor accepts before it has answered the first. 0: those that its "
            "backend computes at once, plus one to copy meanwhile. Larger: batches wait at the executor, where "
            "nothing more can join or overtake them.",
        ),
    ] = 0
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="Processor threads that one executor computes with. 0: half of the cores, with torch two "
            "at least where there are two, divided by executor.executors. Larger: less left for batchers and gateways "
            "on the same host.",
        ),
    ] = 0
    noop_us: Annotated[
        int,
        Meta(
            ge=0,
            le=60_000_000,
            description="Backend noop only, for load tests: it stands in for a device that takes so long for each "
            "batch, µs ...",
        ),
    ] = 0
    noop_row_us: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="... and so long for each row of it, µs.",
        ),
    ] = 0


class TimingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Liveness and failover"""

    beat_ms: Annotated[
        int,
        Meta(
            ge=5,
            le=60_000,
            description="Time between two heartbeats of an actor, ms. Larger: news of load and of deaths is older.",
        ),
    ] = 100
    lease_ms: Annotated[
        int,
        Meta(
            ge=20,
            le=600_000,
            description="An actor that was silent for this long counts as dead, ms. Larger: more requests wait for a "
            "dead one; smaller: a pause is taken for a death.",
        ),
    ] = 500
    drain_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000,
            description="How long a stopping actor may finish what it accepted, ms. 0: it answers UNAVAILABLE at "
            "once. Larger: slower restarts.",
        ),
    ] = 10_000
    notice_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000,
            description="How long a stopping gateway says that it is not ready before it takes no more, ms. At least "
            "as long as a load balancer needs to notice. Larger: slower restarts.",
        ),
    ] = 200
    failover_floor_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="A batch is sent to another executor no sooner than this, ms. Larger: later answers when an "
            "executor dies; smaller: work done twice after a hiccup.",
        ),
    ] = 50
    failover_factor: Annotated[
        float,
        Meta(
            ge=1.0,
            le=100.0,
            description="... and no sooner than this many times its predicted service time. Larger and smaller: as "
            "for timing.failover_floor_ms.",
        ),
    ] = 4.0
