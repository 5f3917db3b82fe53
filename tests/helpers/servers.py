"""Real servers for tests: files over HTTP, and a TCP proxy that fails when told to."""

import contextlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Store(ThreadingHTTPServer):
    """Serves `files` by path. `fail` maps a request's number to the status it gets instead."""

    daemon_threads = True

    def __init__(self, files, *, ranges=True, lengths=True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.ranges, self.lengths = files, ranges, lengths
        self.requests, self.sent = [], 0
        self.fail = lambda number, path: None
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that were killed

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        store = self.server
        with store.lock:
            store.requests.append((self.command, self.path))
            status = store.fail(len(store.requests) - 1, self.path)
        data = store.files.get(self.path.lstrip("/"))
        if status or data is None:
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        body = data
        if store.ranges and found:
            start, end = int(found[1]), min(int(found[2]) + 1, len(data))
            body = data[start:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{hash(data)}"')
        if store.lengths:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            with store.lock:
                store.sent += len(body)

    def log_message(self, *args):
        pass


class Proxy:
    """Passes TCP connections on to a port.

    `plan(number)` says what happens to connection `number`: None, all is well; ("drop", n),
    it is reset after n bytes of the answer; ("answer", bytes), these bytes are the answer.
    """

    def __init__(self, port, plan):
        self.target, self.plan, self.connections = port, plan, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                number, self.connections = self.connections, self.connections + 1
                threading.Thread(target=self._serve, args=(client, number), daemon=True).start()

    def _serve(self, client, number):
        what, value = self.plan(number) or (None, None)
        with contextlib.suppress(OSError), client:
            if what == "answer":
                client.recv(1 << 16)
                client.sendall(value)
                client.shutdown(socket.SHUT_WR)
                client.recv(1 << 16)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                up = threading.Thread(target=_pump, args=(client, server), daemon=True)
                up.start()
                _pump(server, client, value if what == "drop" else None)
                if what == "drop":  # a reset, not an orderly end
                    client.shutdown(socket.SHUT_RD)  # or the other thread would keep it open
                    up.join()
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _pump(source, target, limit=None):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if limit is not None and len(data) >= limit:
                target.sendall(data[:limit])
                return
            limit = limit and limit - len(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
