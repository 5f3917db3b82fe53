"""The few calls of a W&B server that a run needs, so that the real client can be tested.

GraphQL operations are answered by name; what `file_stream` receives is kept by offset, as
the service does: a write to an offset that is taken replaces the lines there.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class Server:
    """What was received. `down` makes every call fail with status 503."""

    url: str = ""
    down: bool = False
    config: str = "{}"
    run_ids: list[str] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    def graphql(self, operation: str, variables: dict[str, Any]) -> Any:
        if operation == "RunResumeStatus":
            known = variables["name"] in self.run_ids
            entity = {"id": "e", "name": "someone"}
            return {
                "model": {
                    "id": "p", "name": "bigbatch", "entity": entity,
                    "bucket": self._bucket() if known else None,
                }
            }  # fmt: skip
        if operation == "UpsertBucket":
            new = bool(variables["name"]) and variables["name"] not in self.run_ids
            if new:
                self.run_ids.append(variables["name"])
            self.config = variables["config"] or self.config
            return {"upsertBucket": {"bucket": self._bucket(), "inserted": new}}
        return {}

    def stream(self, files: dict[str, Any]) -> None:
        for name, chunk in files.items():
            lines = self.lines.setdefault(name, [])
            offset = chunk["offset"]
            lines[offset : offset + len(chunk["content"])] = chunk["content"]

    def _bucket(self) -> dict[str, Any]:
        history = self.lines.get(HISTORY, [])
        return {
            "id": "b", "name": self.run_ids[-1] if self.run_ids else "", "displayName": "run",
            "description": "", "sweepName": None, "tags": [], "notes": None,
            "project": {"id": "p", "name": "bigbatch", "entity": {"id": "e", "name": "someone"}},
            "summaryMetrics": "{}", "config": self.config, "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0,
        }  # fmt: skip


@contextmanager
def serve() -> Iterator[Server]:
    """A server on a free local port."""
    state = Server()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            answer: Any = {}
            with lock:
                if state.down:
                    return self._reply({}, 503)
                if self.path.endswith("/graphql"):
                    call = json.loads(body)
                    data = state.graphql(call.get("operationName", ""), call.get("variables") or {})
                    # What this server does not know is an error, as it is to a real one.
                    answer = {"data": data} if data else {"errors": [{"message": "not here"}]}
                elif self.path.endswith("/file_stream"):
                    state.stream(json.loads(body).get("files") or {})
            return self._reply(answer)

        def _body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def _reply(self, answer: Any, status: int = 200) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
