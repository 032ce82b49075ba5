"""HTTP handler for JSON requests and responses; rejects cross-origin requests."""

import ipaddress
import json
import traceback
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

MAX_BODY = 1 << 20  # bytes


class ApiError(Exception):
    """ApiError(HTTP status, message): a request that can't be answered."""


class JsonHandler(BaseHTTPRequestHandler):
    """Subclasses define `get(path)` and `post(path, body)`, which may raise ApiError."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds to wait for a byte
    disable_nagle_algorithm = True  # otherwise head and body are sent 40 ms apart
    streaming = False  # whether a streamed response has started
    path = ""

    def do_OPTIONS(self):
        self.respond(lambda: self.send_data(b"", "text/plain"))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.respond(lambda: self.get(self.path.partition("?")[0]))

    def do_POST(self):
        self.respond(lambda: self.post(self.path, self.body()))

    def respond(self, answer):
        """Call answer(), and send errors as JSON."""
        self.streaming = False
        if self.command != "POST" and {"Content-Length", "Transfer-Encoding"} & {*self.headers}:
            self.close_connection = True  # don't parse an unread body as a new request
        try:
            self.require_same_site()
            answer()
        except ApiError as error:
            self.send_error(*error.args)
        except OSError:  # the client disconnected
            self.close_connection = True
        except Exception:  # a bug: log it and answer the client
            traceback.print_exc()
            self.send_error(500, "internal server error; see the server log")

    def log_request(self, code="-", size="-"):
        if not self.path.startswith("/views/"):  # polled every two seconds
            super().log_request(code, size)

    def require_same_site(self):
        """Raise ApiError for cross-origin requests from the user's browser, and for unknown host
        names, which prevents DNS rebinding. IP addresses are always accepted.
        """
        host = self.headers.get("Host", self.server.server_address[0])
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            if name.lower() not in self.server.host_names:
                allow = f"to allow it, start with --allowed_hosts {name:.100}"
                raise ApiError(403, f"Host {name:.100} isn't this server; {allow}") from None
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, f"a page of {origin:.100} may not use this server")

    def body(self):
        """Return the JSON object in the body of a request."""
        encoding = self.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise ApiError(415, f"Content-Encoding {encoding:.100} isn't supported; send JSON")
        try:
            text = self.chunks() if "Transfer-Encoding" in self.headers else self.sized_body()
            body = json.loads(text)
        except TimeoutError:
            raise ApiError(408, "the body has fewer bytes than were announced") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body isn't JSON: {error}") from None
        if not isinstance(body, dict):
            raise ApiError(400, "the body isn't a JSON object")
        return body

    def sized_body(self):
        """Return the bytes of a body with a Content-Length."""
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise ApiError(411, "the request needs Content-Length, or a chunked body") from None
        # Read what the client is sending, or it sees a reset connection instead of the error.
        text = self.rfile.read(max(0, min(length, 16 * MAX_BODY)))
        if not 0 <= length <= MAX_BODY:
            raise ApiError(413, f"the body has {length} bytes; the limit is {MAX_BODY}")
        return text

    def chunks(self):
        """Return the bytes of a chunked body (RFC 9112, section 7.1)."""
        if self.headers["Transfer-Encoding"].lower() != "chunked":
            raise ApiError(501, "Transfer-Encoding other than chunked isn't supported")
        text = b""
        while True:
            size = int(self.rfile.readline(MAX_BODY).partition(b";")[0], 16)
            if not 0 <= size <= MAX_BODY - len(text):
                raise ApiError(413, f"the body is longer than the limit, {MAX_BODY} bytes")
            text += self.rfile.read(size)
            end = self.rfile.readline(MAX_BODY)
            while size == 0 and end not in (b"\r\n", b"\n", b""):  # trailer fields
                end = self.rfile.readline(MAX_BODY)
            if size == 0:
                return text

    def send(self, value, status=200):
        """Send a value as JSON."""
        self.send_data(json.dumps(value).encode(), "application/json", status)

    def send_data(self, data, kind, status=200):
        connection = "close" if self.close_connection else "keep-alive"
        self.send_head(status, kind, connection, str(len(data)))
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status, kind, connection, length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Allow", "GET, HEAD, OPTIONS, POST")
        self.send_header("Connection", connection)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        kind = "invalid_request_error" if code < 500 else "server_error"
        error = {"message": message or HTTPStatus(code).phrase, "type": kind}
        error = {"error": error | {"param": None, "code": None}}
        self.close_connection = True  # don't parse leftover body bytes as a new request
        with suppress(OSError):  # the client disconnected
            if self.streaming:
                self.send_event(error)
            else:
                self.send(error, code)

    def send_event(self, value):
        """Send a server-sent event, a value as JSON or a text."""
        if not self.streaming:
            self.streaming = True
            self.send_head(200, "text/event-stream", "close")
        text = value if isinstance(value, str) else json.dumps(value)
        self.wfile.write(f"data: {text}\n\n".encode())
