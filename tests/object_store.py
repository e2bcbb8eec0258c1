"""A stand-in for Google Cloud Storage: its JSON API over HTTP, as far as a run's clients use it.

Objects lie in memory. As in the real one an object appears whole, a listing shows every write
before it, and conditions on generations hold. Whatever would append to an object or rename one is
refused and noted: composing, copying and rewriting on the server, and moving.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)")
_LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o(?:/.*)?")
# An object's own name is quoted, so that these are actions.
_FORBIDDEN = re.compile(r"/(compose|copyTo|rewriteTo|moveTo)(/|$)")
_PAGE = 50  # names a page, so that clients have to turn pages


@dataclasses.dataclass(frozen=True)
class Blob:
    """A generation of an object."""

    content: bytes
    generation: int
    time: str

    def resource(self, bucket: str, name: str) -> dict:
        """As the API describes it."""
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "size": str(len(self.content)),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "timeCreated": self.time,
            "updated": self.time,
        }


class ObjectStore:
    """Buckets, and everything that was asked of them.

    Attributes:
      url: of the server.
      requests: (action, object or prefix) in their order; actions are 'bucket', 'list', 'stat',
        'read', 'write', 'delete' and 'forbidden'.
      forbidden: the paths that would have appended or renamed; each was refused.
      denied: actions that are answered with 403.
      refusals: how many requests are answered next with 503.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, Blob]] = {bucket: {} for bucket in buckets}
        self.requests: list[tuple[str, str]] = []
        self.forbidden: list[str] = []
        self.denied: set[str] = set()
        self.refusals = 0
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._generation = 1
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.store = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Of the objects of a bucket."""
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def content(self, bucket: str, name: str) -> bytes:
        """Of an object."""
        return self.buckets[bucket][name].content

    def put(self, bucket: str, name: str, content: bytes) -> Blob:
        """Makes an object or a new generation of it; the lock must be held."""
        self._generation += 1
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        blob = self.buckets[bucket][name] = Blob(content, self._generation, now)
        return blob

    @contextlib.contextmanager
    def counting(self) -> Iterator[collections.Counter[str]]:
        """The number of requests by action, from here to the end of the block."""
        count: collections.Counter[str] = collections.Counter()
        start = len(self.requests)
        yield count
        count.update(action for action, _ in self.requests[start:])

    @contextlib.contextmanager
    def denying(self, *actions: str) -> Iterator[None]:
        """Answers these actions with 403."""
        self.denied |= set(actions)
        try:
            yield
        finally:
            self.denied -= set(actions)

    @contextlib.contextmanager
    def busy(self, requests: int) -> Iterator[None]:
        """Answers the next requests with 503; there must be as many in the block."""
        self.refusals = requests
        yield
        assert self.refusals == 0


class _Answer(Exception):
    """What a request is answered with."""

    def __init__(self, status: int, body: bytes | dict | str = b"", **headers: str) -> None:
        super().__init__(status)
        if isinstance(body, str):
            body = {"error": {"code": status, "message": body, "errors": [{"message": body}]}}
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart

    @property
    def store(self) -> ObjectStore:
        return self.server.store  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """The store keeps its own log."""

    def handle_one_request(self) -> None:
        """Of a connection, which the client may have closed."""
        with contextlib.suppress(ConnectionError):
            return super().handle_one_request()
        self.close_connection = True

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            self._act(url.path, query, body)
        except _Answer as found:
            answer = found
        content = b"" if self.command == "HEAD" or answer.status in (204, 304) else answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _act(self, path: str, query: dict[str, str], body: bytes) -> None:
        """Raises the answer."""
        if _FORBIDDEN.search(path):
            self.store.forbidden.append(path)
            self._note("forbidden", path)
            raise _Answer(412, "appending and renaming are forbidden here")
        if found := _UPLOAD.fullmatch(path):
            self._upload(urllib.parse.unquote(found[1]), query, body)
        if found := _OBJECT.fullmatch(path):
            bucket, name = (urllib.parse.unquote(part) for part in found.groups())
            if self.command == "DELETE":
                self._delete(bucket, name, query)
            if self.command in ("GET", "HEAD"):
                self._read(bucket, name, query)
        if (found := _LIST.fullmatch(path)) and self.command == "GET":
            self._list(urllib.parse.unquote(found[1]), query)
        if (found := _BUCKET.fullmatch(path)) and self.command == "GET":
            bucket = urllib.parse.unquote(found[1])
            self._note("bucket", bucket)
            self._objects(bucket)
            raise _Answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        self._note("unknown", f"{self.command} {self.path}")
        raise _Answer(501, f"{self.command} {self.path}: not what a run asks of a bucket")

    def _note(self, action: str, name: str) -> None:
        self.store.requests.append((action, name))
        if self.store.refusals:
            self.store.refusals -= 1
            raise _Answer(503, "busy; try again")
        if action in self.store.denied:
            raise _Answer(403, f"the service account may not {action} {name}")

    def _objects(self, bucket: str) -> dict[str, Blob]:
        if bucket not in self.store.buckets:
            raise _Answer(404, "The specified bucket does not exist.")
        return self.store.buckets[bucket]

    def _check(self, blob: Blob | None, query: dict[str, str], changed: int = 412) -> None:
        there = 0 if blob is None else blob.generation
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != there:
            raise _Answer(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == there:
            raise _Answer(changed, "conditionNotMet")

    def _read(self, bucket: str, name: str, query: dict[str, str]) -> None:
        media = query.get("alt") == "media"
        self._note("read" if media else "stat", name)
        with self.store.lock:
            blob = self._objects(bucket).get(name)
        if blob is None:
            raise _Answer(404, f"No such object: {bucket}/{name}")
        self._check(blob, query, changed=304)
        if not media:
            raise _Answer(200, blob.resource(bucket, name), Content_Type="application/json")
        status, content, headers = 200, blob.content, {"x-goog-generation": str(blob.generation)}
        if asked := re.fullmatch(r"bytes=(\d+)?-(\d+)?", self.headers.get("Range", "")):
            size = len(content)
            first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            if first > last:
                raise _Answer(416, "requested range not satisfiable")
            status, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        raise _Answer(status, content, **headers)

    def _delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        self._note("delete", name)
        with self.store.lock:
            objects = self._objects(bucket)
            if name not in objects:
                raise _Answer(404, f"No such object: {bucket}/{name}")
            self._check(objects[name], query)
            del objects[name]
        raise _Answer(204)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        self._note("list", prefix)
        start = max(query.get("startOffset", ""), query.get("pageToken", ""))
        found: dict[str, dict | None] = {}
        with self.store.lock:
            for name, blob in self._objects(bucket).items():
                if not name.startswith(prefix) or query.get("endOffset", "\U0010ffff") <= name:
                    continue
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("",) * 3
                if cut:
                    name, resource = prefix + head + cut, None
                else:
                    resource = blob.resource(bucket, name)
                if name >= start:
                    found[name] = resource
        names = sorted(found)
        limit = min(_PAGE, int(query.get("maxResults", _PAGE)))
        page, rest = names[:limit], names[limit:]
        listing = {
            "kind": "storage#objects",
            "items": [found[name] for name in page if found[name]],
            "prefixes": [name for name in page if not found[name]],
        }
        raise _Answer(200, listing | ({"nextPageToken": rest[0]} if rest else {}))

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if self.command == "PUT" or (kind == "resumable" and "upload_id" in query):
            self._part(query["upload_id"], body)
        if kind == "media":
            self._write(bucket, query["name"], query, body)
        if kind == "multipart":
            described, content = _split(self.headers["Content-Type"], body)
            self._write(bucket, described.get("name") or query["name"], query, content)
        assert kind == "resumable", self.path
        name = query.get("name") or json.loads(body)["name"]
        self._objects(bucket)
        upload = uuid.uuid4().hex
        self.store.uploads[upload] = bucket, {**query, "name": name}, bytearray()
        place = f"{self.store.url}/upload/storage/v1/b/{urllib.parse.quote(bucket)}/o"
        raise _Answer(200, Location=f"{place}?uploadType=resumable&upload_id={upload}")

    def _part(self, upload: str, body: bytes) -> None:
        bucket, query, content = self.store.uploads[upload]
        given = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert given, self.headers["Content-Range"]
        if given[1] is not None:  # a part that is sent again takes the place of the first
            content[int(given[1]) :] = body
        if given[2] == "*" or len(content) < int(given[2]):
            raise _Answer(308, Range=f"bytes=0-{len(content) - 1}")
        self._write(bucket, query["name"], query, bytes(content))

    def _write(self, bucket: str, name: str, query: dict[str, str], content: bytes) -> None:
        self._note("write", name)
        with self.store.lock:
            self._check(self._objects(bucket).get(name), query)
            blob = self.store.put(bucket, name, content)
        raise _Answer(200, blob.resource(bucket, name), Content_Type="application/json")


def _split(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """(description, content) of an upload in two parts, by lines that end in LF or CRLF."""
    found = re.search(r"boundary=[\"']?([^\"';]+)", content_type)
    assert found, content_type
    line = b"--" + found[1].encode()
    first = body.index(line) + len(line)
    second = body.index(line, first)
    described = re.split(rb"\r?\n\r?\n", body[first:second], maxsplit=1)[1]
    content = re.split(rb"\r?\n\r?\n", body[second:], maxsplit=1)[1]
    content = content[: content.rindex(line)]  # of the end
    return json.loads(described), re.sub(rb"\r?\n\Z", b"", content)
