"""A real HTTP server on this machine that serves files with Range, and misbehaves as it is told."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><body>Sign in to use this network.</body></html>"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, span = self.server, self.headers.get("Range")
        server.requests.append((self.path, span))
        fault = server.faults.pop(0) if server.faults else server.always
        content = server.files.get(self.path)
        if content is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if fault == "hang up":
            return None
        if fault == "page":
            return self.answer(200, PAGE)
        if fault == "page as long as the file":
            return self.answer(200, PAGE.ljust(len(content)))
        if fault == "wrong bytes":
            content = content[:2] + bytes(byte ^ 1 for byte in content[2:])
        if fault == "another length":
            content += b"0123456789"
        status, headers, whole = 200, {}, len(content)
        if span and "no range" not in str(fault):
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            content = content[start:]
        half = "cut" in str(fault) or fault == "stall"
        sent = content[: len(content) // 2] if half else content
        self.answer(status, sent, headers, len(content))
        if fault == "stall":
            self.wfile.flush()
            server.closing.wait()

    def answer(self, status, content, headers=(), length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running(handler, **state):
    """A server on a port of its own, with `url`, `requests` and `state` as its attributes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    vars(server).update(state, requests=[])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve(files):
    """Serves {"/path": bytes}. `faults` are taken one a request, then `always`.

    `requests` lists what came in: (path, Range).
    """
    closing = threading.Event()
    with running(Handler, files=files, faults=[], always=None, closing=closing) as server:
        try:
            yield server
        finally:
            closing.set()
