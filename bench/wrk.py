"""Closed loops over HTTP by wrk, where it is installed: it takes far less of a small machine than Python does."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from narsil_stream.bench.callers import http_request
from narsil_stream.bench.load import Load, LoadFailed
from narsil_stream.bench.questions import Question

HEAD_BYTES = 1024
"""An answer's status line and headers are shorter than this."""

SCRIPT = Template("""\
local requests, at = {}, 0
for i = 1, $count do
  local file = io.open("$folder/" .. i, "rb")
  requests[i] = file:read("*a")
  file:close()
end
request = function()
  at = at % $count + 1
  return requests[at]
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'OUTCOME {"requests":%d,"us":%d,"bytes":%d,"failed":%d,"p50":%f,"p99":%f,"p999":%f}\\n',
    summary.requests, summary.duration, summary.bytes,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency:percentile(99.9) / 1000))
end
""")


def available() -> bool:
    return shutil.which("wrk") is not None


def run(load: Load) -> dict[str, Any]:
    """`requests`, `failed`, `us` of the run, `p50`, `p99` and `p999` in ms. Its time is whole seconds.

    wrk looks at status codes alone, so answers must have been checked before; that all are as long as those is checked
    here. Raises LoadFailed.
    """
    with tempfile.TemporaryDirectory(prefix="narsil-wrk-") as folder:
        _write(Path(folder), load.questions)
        seconds = max(1, round(load.seconds))
        command = ["wrk", "-t1", f"-c{load.in_flight}", f"-d{seconds}s", "-s", f"{folder}/ask.lua"]
        url = f"http://127.0.0.1:{load.port}{quote(load.questions[0].path)}"
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=seconds + 60)
    for line in done.stdout.splitlines():
        if line.startswith("OUTCOME "):
            said: dict[str, Any] = json.loads(line.removeprefix("OUTCOME "))
            each, length = said["bytes"] / max(said["requests"], 1), len(load.answers[0])
            if said["requests"] and not length <= each <= length + HEAD_BYTES:
                raise LoadFailed(f"wrk got {each:.0f} bytes a request; expected a head and the {length} checked before")
            return said
    raise LoadFailed(f"wrk ended with status {done.returncode}: {done.stderr or done.stdout}")


def _write(folder: Path, questions: list[Question]) -> None:
    for number, one in enumerate(questions, start=1):
        (folder / str(number)).write_bytes(http_request(one))
    (folder / "ask.lua").write_text(SCRIPT.substitute(count=len(questions), folder=folder))
