#!/usr/bin/env bash
# wandb 0.31.0: `wandb sync` stops at the file of an attempt that was killed, leaves out the later
# attempts of the run, and exits with 0.
#
# wandb-core writes a run's file in blocks of 32 KiB, so what a kill leaves ends in half a record.
# Of two attempts with one run id, the first one torn, `wandb sync FIRST SECOND` uploads the whole
# records of the first and nothing of the second, although the second is sent without fault when
# it is named alone. The server here is a local stand-in that answers the calls sync needs.
#
# Seen 2026-11-28:
#   both whole:  status 0, rows 0 to 299
#   first torn:  status 0, rows 0 to 122; the file ends with an incomplete record
#   second only: status 0, rows 100 to 299
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet wandb==0.31.0
fi

"$python" - <<'PY'
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ATTEMPT = """
import sys
import wandb
run = wandb.init(project="case", id="one", settings=wandb.Settings(console="off"))
for row in range(int(sys.argv[1]), int(sys.argv[2])):
    run.log({"row": row})
run.finish()
"""
rows = {}  # line of the history -> value, as the server holds it
runs = set()


def bucket():
    project = {"id": "p", "name": "case", "entity": {"id": "e", "name": "someone"}}
    empty = dict.fromkeys(("displayName", "description", "sweepName", "notes"))
    lines = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
    tails = {"historyTail": "[]", "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
    more = {"id": "b", "name": "one", "tags": [], "project": project, "wandbConfig": '{"t": 1}'}
    return empty | lines | tails | more


def graphql(operation):
    if operation == "RunResumeStatus":
        project = {"id": "p", "name": "case", "entity": {"id": "e", "name": "someone"}}
        return {"model": project | {"bucket": bucket() if runs else None}}
    if operation == "UpsertBucket":
        new = not runs
        runs.add("one")
        return {"upsertBucket": {"bucket": bucket(), "inserted": new}}
    return None


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {}
        if self.path.endswith("/graphql"):
            data = graphql(json.loads(body).get("operationName"))
            answer = {"data": data} if data else {"errors": [{"message": "unknown"}]}
        elif self.path.endswith("/file_stream"):
            history = (json.loads(body).get("files") or {}).get("wandb-history.jsonl")
            for i, line in enumerate(history["content"] if history else ()):
                rows[history["offset"] + i] = json.loads(line)["row"]
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=server.serve_forever, daemon=True).start()
plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
plain |= {"NETRC": os.path.abspath("none"), "WANDB_ERROR_REPORTING": "false"}
plain |= {"WANDB_X_DISABLE_STATS": "true"}
offline = plain | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
online = plain | {"WANDB_API_KEY": "0" * 40}
online |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
for first, last in ((0, 200), (100, 300)):
    command = [sys.executable, "-c", ATTEMPT, str(first), str(last)]
    subprocess.run(command, env=offline, check=True, timeout=120)
    time.sleep(2)  # the folders are named by the second
one, two = sorted(Path("wandb").glob("offline-run-*"))


def sync(label, *folders):
    rows.clear()
    runs.clear()
    for mark in Path("wandb").glob("*/*.synced"):
        mark.unlink()
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, folders)]
    done = subprocess.run(command, env=online, capture_output=True, text=True, timeout=120)
    torn = "the file ends with an incomplete record"
    said = f"; {torn}" if torn in done.stdout + done.stderr else ""
    got = sorted(set(rows.values()))
    print(f"{label}: status {done.returncode}, rows {got[0]} to {got[-1]}{said}", flush=True)
    assert got == list(range(got[0], got[-1] + 1))
    return done.returncode, got[0], got[-1], bool(said)


assert sync("both whole", one, two) == (0, 0, 299, False)
os.truncate(one / "run-one.wandb", 32768)
status, first, last, said = sync("first torn", one, two)
assert (status, first, said) == (0, 0, True)
assert 0 < last < 199
assert sync("second only", two) == (0, 100, 299, False)
PY
