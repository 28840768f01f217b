"""KServe's own REST client against a gateway: `kserve_rest.py PORT ROWS.npz`. Raises when something is wrong."""

import asyncio
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(rows: Any, binary_in: bool, binary_out: bool) -> InferRequest:
    dense = InferInput("dense", list(rows["dense"].shape), "FP32")
    dense.set_data_from_numpy(rows["dense"], binary_data=binary_in)
    sparse = InferInput("sparse", list(rows["ids"].shape), "INT32")
    sparse.set_data_from_numpy(rows["ids"], binary_data=binary_in)
    outputs = [RequestedOutput("scores", {"binary_data": binary_out})]
    return InferRequest("ctr", [dense, sparse], request_id="mine", request_outputs=outputs)


async def main(port: str, rows: Any) -> None:
    url = f"http://127.0.0.1:{port}"
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "ctr")
    for binary_in in (True, False):
        for binary_out in (True, False):
            answer = await client.infer(url, request(rows, binary_in, binary_out), "ctr")
            assert (answer.id, answer.model_name) == ("mine", "ctr"), answer
            assert np.allclose(answer.outputs[0].as_numpy(), rows["scores"], rtol=0, atol=1e-6), answer
    try:
        await client.infer(url, request(rows, True, True), "nobody")
    except httpx.HTTPStatusError as error:
        assert error.response.status_code == 404, error
        assert "is not served here" in str(error), error
    else:
        raise AssertionError("a model that nobody serves had an answer")
    await client.close()


asyncio.run(main(sys.argv[1], np.load(sys.argv[2])))
