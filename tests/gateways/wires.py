"""Bytes to the HTTP gateway that no client library would send, and whether it still serves others."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np

from tests.asking import Rows, ask_http, infer_json, json_scores, some_rows
from tests.support import PATIENCE_S

INFER = "/v2/models/ctr/infer"


def talk(port: int, *sent: bytes, close: bool = False) -> bytes:
    """What comes back on a connection of its own until the server closes it, or says nothing more for 2 s."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        answer = b""
        with contextlib.suppress(OSError):  # the server may have had enough of it, or has nothing more to say
            for part in sent:
                wire.sendall(part)
            if close:
                wire.shutdown(socket.SHUT_WR)
        wire.settimeout(2)
        with contextlib.suppress(OSError):
            while part := wire.recv(65_536):
                answer += part
        return answer


def request_bytes(rows: Rows, *headers: str, length: int | None = None) -> bytes:
    body = json.dumps(infer_json(rows)).encode()
    head = [f"POST {INFER} HTTP/1.1", "host: x", f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def still_answers(port: int, model: Path) -> bool:
    rows = some_rows(model, 2)
    return np.allclose(
        json_scores(ask_http(port, "POST", INFER, infer_json(rows)).json), rows.scores, rtol=0, atol=1e-6
    )


def right_binary(answer: Any, rows: Rows) -> bool:
    return np.allclose(json_scores(answer), rows.scores, rtol=0, atol=1e-6)
