"""The programs that `narsil client-example` prints: whole, with comments for who reads them for the first time.

No secret stands in one: tokens and logins come from variables, as do the files of certificates.
"""

import json
from string import Template
from typing import Any, NamedTuple

from narsil_stream.cli.examples import connect_arguments, example_inputs, tls_lines
from narsil_stream.core.config import Config
from narsil_stream.schemas import subjects


class Shape(NamedTuple):
    """What a model takes."""

    model: str
    dense: int
    tables: tuple[int, ...]
    """Rows of each; 1 where the server does not tell, so that ids are 0, which every table has."""

    def inputs(self) -> list[dict[str, Any]]:
        """Two rows."""
        return example_inputs(self.dense, self.tables, 2)


class Door(NamedTuple):
    """Where a gateway is, and what it wants to see."""

    address: str
    """host:port"""
    tls: bool = False
    mutual: bool = False
    token: bool = False


SHOWN = {
    "authority": "# For a certificate of an authority of your own, set SSL_CERT_FILE to that authority's PEM file.",
    "certificate": "# The server asks for a certificate of yours: CLIENT_CERT and CLIENT_KEY name its PEM files.",
    "token": "# The server asks for a token, which `narsil token` makes; it is in the variable TOKEN.",
}

TRITON = Template('''\
"""Scores two rows over $protocol with Triton's client: pip install 'tritonclient[$extra]'"""

import os
import ssl
import sys

import numpy as np
import tritonclient.$extra as triton
from tritonclient.utils import InferenceServerException

$connect

# A row has $n_dense numbers, and an id for each of $n_sparse tables: from 0 to the table's number of rows - 1.
# Send all rows that you have at once: one request of many rows is much cheaper than many requests.
dense = np.array($dense, np.float32)
sparse = np.array($sparse, np.int64)
inputs = [
    triton.InferInput("dense", dense.shape, "FP32"),
    triton.InferInput("sparse", sparse.shape, "INT64"),
]
inputs[0].set_data_from_numpy(dense)
inputs[1].set_data_from_numpy(sparse)

try:
    # timeout, in microseconds: what cannot be answered in that time is refused at once, with $overloaded.
    answer = client.infer("$model", inputs, request_id="1", timeout=500_000$arguments)
except InferenceServerException as error:
    # $retry may succeed when tried again later; any other will not.
    sys.exit(f"{error.status()}: {error.message()}")

for row, score in enumerate(answer.as_numpy("scores")):
    print(f"row {row}: {score:.6f}")
''')
OF_HTTP = {"protocol": "HTTP", "extra": "http", "overloaded": "429", "retry": "429 and 503"}
OF_GRPC = {
    "protocol": "gRPC",
    "extra": "grpc",
    "overloaded": "RESOURCE_EXHAUSTED",
    "retry": "RESOURCE_EXHAUSTED and UNAVAILABLE",
}


def http(shape: Shape, door: Door) -> str:
    connect = [f'client = triton.InferenceServerClient("{door.address}")']
    if door.tls:
        mine = ['tls.load_cert_chain(os.environ["CLIENT_CERT"], os.environ["CLIENT_KEY"])'] if door.mutual else []
        connect = [
            "tls = ssl.create_default_context()",
            *mine,
            f'client = triton.InferenceServerClient("{door.address}", ssl=True, ssl_context_factory=lambda: tls)',
        ]
    return _triton(shape, door, connect, OF_HTTP)


def grpc(shape: Shape, door: Door) -> str:
    connect = [f'client = triton.InferenceServerClient("{door.address}")']
    if door.tls:
        mine = ['private_key=os.environ["CLIENT_KEY"]', 'certificate_chain=os.environ["CLIENT_CERT"]']
        arguments = [
            f'"{door.address}"',
            "ssl=True",
            'root_certificates=os.environ.get("SSL_CERT_FILE")',
            *(mine if door.mutual else []),
        ]
        connect = ["client = triton.InferenceServerClient(", *(f"    {one}," for one in arguments), ")"]
    return _triton(shape, door, connect, OF_GRPC)


def _triton(shape: Shape, door: Door, connect: list[str], words: dict[str, str]) -> str:
    if door.token:
        connect = [*connect, SHOWN["token"], 'headers = {"authorization": f"Bearer {os.environ[\'TOKEN\']}"}']
    dense, sparse = (_rows(one) for one in shape.inputs())
    text = TRITON.substitute(
        words,
        connect="\n".join([*_tls_remarks(door), *connect]),
        n_dense=shape.dense,
        n_sparse=len(shape.tables),
        dense=dense,
        sparse=sparse,
        model=shape.model,
        arguments=", headers=headers" if door.token else "",
    )
    return _only_used_imports(text, "os", "ssl")


def _tls_remarks(door: Door) -> list[str]:
    asked = {"authority": door.tls, "certificate": door.mutual}
    return [SHOWN[name] for name, wanted in asked.items() if wanted]


def _rows(given: dict[str, Any]) -> str:
    """An input's data as a list of rows, one on a line."""
    rows, width = given["shape"]
    data = given["data"]
    return "".join(["[\n", *(f"    {data[row * width : (row + 1) * width]},\n" for row in range(rows)), "]"])


def _only_used_imports(text: str, *names: str) -> str:
    for name in names:
        if f"{name}." not in text:
            text = text.replace(f"import {name}\n", "")
    return text


def _body(shape: Shape) -> str:
    """An infer request in JSON, which is Python too. An input on a line."""
    inputs = "".join(f"\n        {json.dumps(one)}," for one in shape.inputs()).rstrip(",")
    return f'{{\n    "id": "1",\n    "parameters": {{"timeout": 500000}},\n    "inputs": [{inputs}\n    ]\n}}'


CURL = Template("""\
#!/bin/sh
# Scores two rows over HTTP with curl.
#
# A row has $n_dense numbers, and an id for each of $n_sparse tables: from 0 to the table's number of rows - 1.
# Send all rows that you have at once: "shape" says how many, "data" holds one after the other.
# timeout, in microseconds: what cannot be answered in that time is refused at once, with 429.
# 429 and 503 may succeed when tried again later, the header retry-after says when; any other error will not.
$remarks
curl $options $url --data-binary @- <<'END'
$body
END
""")


def curl(shape: Shape, door: Door) -> str:
    remarks, options = _tls_remarks(door), ["-sS", "-w '\\n'"]
    if door.tls:
        options.append('${SSL_CERT_FILE:+--cacert "$SSL_CERT_FILE"}')
    if door.mutual:
        options.append('--cert "$CLIENT_CERT" --key "$CLIENT_KEY"')
    if door.token:
        remarks.append(SHOWN["token"])
        options.append('-H "authorization: Bearer $TOKEN"')
    return CURL.substitute(
        n_dense=shape.dense,
        n_sparse=len(shape.tables),
        remarks="\n".join([*remarks, ""]),
        options=" ".join(options),
        url=f"http{'s' * door.tls}://{door.address}/v2/models/{shape.model}/infer",
        body=_body(shape),
    )


NATS = Template('''\
"""Scores two rows over NATS, without a gateway: pip install nats-py

Other languages do the same with their own client of NATS: a request in JSON, an answer in JSON.
"""

import asyncio
import json
import os
import ssl
import sys

import nats

# Batchers listen here, as one queue group. A version of the model may follow: $subject.1
SUBJECT = "$subject"

# A row has $n_dense numbers, and an id for each of $n_sparse tables: from 0 to the table's number of rows - 1.
# Send all rows that you have at once: "shape" says how many, "data" holds one after the other.
# timeout, in microseconds: what cannot be answered in that time is refused at once.
REQUEST = $body
$tls

async def main():
    async with await nats.connect($connect) as broker:
        # The answer comes to an inbox of this connection. Errors are answers too: wait for longer than the request's
        # timeout, and each says what was wrong. NoRespondersError means that no batcher runs.
        message = await broker.request(SUBJECT, json.dumps(REQUEST).encode(), timeout=2)
    answer = json.loads(message.data)
    if "error" in answer:
        # OVERLOADED and UNAVAILABLE may succeed when tried again after retry_after_us; any other will not.
        sys.exit(f"{answer['code']}: {answer['error']}")
    for row, score in enumerate(answer["outputs"][0]["data"]):
        print(f"row {row}: {score:.6f}")


asyncio.run(main())
''')


def nats(shape: Shape, config: Config) -> str:
    remark = "# Certificates come from the variables that `narsil` reads too."
    tls = tls_lines(config)
    text = NATS.substitute(
        subject=subjects.infer(shape.model),
        n_dense=shape.dense,
        n_sparse=len(shape.tables),
        body=_body(shape),
        tls="\n".join(["", remark, *tls, ""]) if tls else "",
        connect=connect_arguments(config),
    )
    return _only_used_imports(text, "os", "ssl")
