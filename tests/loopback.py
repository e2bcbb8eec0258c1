"""A web server on the loopback that behaves as badly as a test asks for."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site(ThreadingHTTPServer):
    """Serves `content` at every address that `missing` does not name; keeps what was asked for.

    Attributes:
      cuts: after how many bytes each of the next answers ends, however many it announced.
      status: of the next answers, in place of their content.
      ranges, tagged: whether parts are served, and whether versions are told apart.
      headers: further ones.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.missing = {}, set()
        self.cuts, self.status, self.asked, self.sent = [], [], [], 0
        self.ranges, self.tagged, self.headers = True, True, {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server
        site.asked.append((self.path, self.headers.get("Range")))
        if site.status or self.path in site.missing:
            self.send_error(site.status.pop(0) if site.status else 404)
            return
        content = site.content[self.path]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start, asked = 0, self.headers.get("Range")
        if asked and site.ranges and self.headers.get("If-Range") in (None, tag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", site.headers.pop("Content-Range", span))
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        if site.tagged:
            self.send_header("ETag", tag)
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[: site.cuts.pop(0)] if site.cuts else body
        site.sent += len(body)
        self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """A site that answers from a thread."""
    site = Site()
    thread = threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
        thread.join()
