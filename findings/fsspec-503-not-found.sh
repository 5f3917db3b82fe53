#!/usr/bin/env bash
# fsspec 2026.9.0: an HTTP server that answers 503 (try again later) is reported as a file that
# does not exist.
#
# info(), size() and open() raise FileNotFoundError, exists() and isfile() are False; only
# cat_file() raises the error with its status. The status 503 is to be found in the error's cause
# alone. A loop that takes a missing file for the end of its data ends early on a busy server.
#
# Seen 2026-11-28:
#   info: FileNotFoundError (cause: 503)
#   open: FileNotFoundError (cause: 503)
#   exists: False, isfile: False
#   cat_file: ClientResponseError 503
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv venv
  python=$work/venv/bin/python
  "$python" -m pip install --quiet fsspec==2026.9.0 aiohttp==3.14.5
fi

"$python" - <<'PY'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from aiohttp import ClientResponseError


class Busy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/shard.tar"
files = fsspec.filesystem("http")
for name, call in (("info", files.info), ("open", files.open)):
    try:
        call(url)
    except FileNotFoundError as error:
        print(f"{name}: FileNotFoundError (cause: {error.__cause__.status})")
        assert error.__cause__.status == 503
    else:
        raise AssertionError(name)
print(f"exists: {files.exists(url)}, isfile: {files.isfile(url)}")
assert files.exists(url) is False
assert files.isfile(url) is False
try:
    files.cat_file(url)
except ClientResponseError as error:
    print(f"cat_file: {type(error).__name__} {error.status}")
    assert error.status == 503
else:
    raise AssertionError("cat_file")
server.shutdown()
PY
