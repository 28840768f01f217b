"""What KServe's client gets, as JSON: `python -m tests.gateways.kserve_aio PORT ROWS.npz`."""

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest


def request(model: str, dense: Any, ids: Any, raw: bool) -> InferRequest:
    given = [InferInput("dense", list(dense.shape), "FP32"), InferInput("sparse", list(ids.shape), "INT32")]
    for tensor, values in zip(given, (dense, ids), strict=True):
        tensor.set_data_from_numpy(values, binary_data=raw)
    return InferRequest(model, given, request_id="mine")


async def main(port: str, path: str) -> dict[str, Any]:
    rows = np.load(path)
    dense, ids = rows["dense"], rows["ids"]
    async with InferenceGRPCClient(f"127.0.0.1:{port}", retries=0) as client:
        ready = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("ctr")]
        raw, typed = [await client.infer(request("ctr", dense, ids, raw)) for raw in (True, False)]
        ready += [typed.id == "mine", typed.model_name == "ctr"]
        scores = raw.outputs[0].as_numpy()
        ready.append(scores.tolist() == typed.outputs[0].as_numpy().tolist())
        asked = [client.infer(request("ctr", dense[i : i + 1], ids[i : i + 1], False)) for i in range(len(ids))]
        each = [float(answer.outputs[0].as_numpy()[0]) for answer in await asyncio.gather(*asked)]
        refused = []
        for model, rows_of_dense in (("nobody", dense), ("ctr", dense[:1])):
            try:
                await client.infer(request(model, rows_of_dense, ids, False))
            except grpc.RpcError as error:
                refused.append(error.code().name)
    return {"ready": ready, "scores": scores.tolist(), "each": each, "refused": refused}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
