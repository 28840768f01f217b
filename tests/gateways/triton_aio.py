"""What Triton's asyncio client gets, as JSON: `python -m tests.gateways.triton_aio PORT ROWS.npz`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException


def inputs(dense: Any, ids: Any) -> list[triton.InferInput]:
    given = [
        triton.InferInput("dense", list(dense.shape), "FP32"),
        triton.InferInput("sparse", list(ids.shape), "INT32"),
    ]
    given[0].set_data_from_numpy(dense)
    given[1].set_data_from_numpy(ids)
    return given


async def main(port: str, path: str) -> dict[str, Any]:
    rows = np.load(path)
    dense, ids = rows["dense"], rows["ids"]
    async with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        ready = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("ctr")]
        ready.append((await client.get_model_metadata("ctr")).name == "ctr")
        ready.append((await client.get_model_config("ctr")).config.name == "ctr")
        scores = (await client.infer("ctr", inputs(dense, ids))).as_numpy("scores")
        asked = [client.infer("ctr", inputs(dense[i : i + 1], ids[i : i + 1])) for i in range(len(ids))]
        each = [answer.as_numpy("scores")[0] for answer in await asyncio.gather(*asked)]

        async def stream() -> AsyncIterator[dict[str, Any]]:
            for i in range(len(ids)):
                yield {"model_name": "ctr", "inputs": inputs(dense[i : i + 1], ids[i : i + 1]), "request_id": str(i)}

        streamed = {}
        async for answer, error in client.stream_infer(stream()):
            assert error is None, error
            streamed[int(answer.get_response().id)] = answer.as_numpy("scores")[0]
        ready.append([streamed[i] for i in range(len(ids))] == each)
        refused = []
        for model, given in (("nobody", inputs(dense, ids)), ("ctr", inputs(dense[:1], ids))):
            try:
                await client.infer(model, given)
            except InferenceServerException as error:
                refused.append(error.status().removeprefix("StatusCode."))
    return {"ready": ready, "scores": scores.tolist(), "each": list(map(float, each)), "refused": refused}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
