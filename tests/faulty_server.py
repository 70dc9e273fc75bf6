"""A real HTTP server on this machine that serves files with Range, and misbehaves as it is told."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><body>Sign in to use this network.</body></html>"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else server.always
        content = server.files.get(self.path)
        if content is None or fault == 404:
            return self.send_error(404)
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, tuple):  # (status, Retry-After)
            self.send_response(fault[0])
            self.send_header("Retry-After", fault[1])
            return self.end_headers()
        if fault == "hang up":
            return None
        if fault == "page":
            return self.answer(200, PAGE, {"Content-Type": "text/html"})
        if fault == "page as long as the file":
            return self.answer(200, PAGE.ljust(len(content)), {"Content-Type": "text/html"})
        if fault == "wrong bytes":
            content = content[:2] + bytes(byte ^ 1 for byte in content[2:])
        if fault == "shorter":
            content = content[:-10]
        if fault in ("longer", "longer, unsaid"):
            content += b"0123456789"
        start = (
            int(asked.removeprefix("bytes=").removesuffix("-"))
            if asked and "no range" not in str(fault)
            else None
        )
        whole, headers = len(content), {}
        if start is not None:
            if start >= whole:
                return self.send_error(416)
            if fault == "another range":
                start = max(0, start - 5)
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            if fault == "no word on the range":
                headers = {"Content-Range": "items 1-2"}
            content = content[start:]
        sent = content[: len(content) // 2] if "cut" in str(fault) or fault == "stall" else content
        told = None if "unsaid" in str(fault) else len(content)
        self.answer(200 if start is None else 206, sent, headers, told)
        if fault == "stall":
            self.wfile.flush()
            server.closing.wait()

    def answer(self, status, content, headers, length=-1):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(content) if length == -1 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serve(files):
    """Serves {"/path": bytes}. `faults` are taken one a request, then `always`; `requests` is what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.faults, server.always, server.requests = files, [], None, []
    server.closing = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
