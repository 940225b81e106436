"""A server on this machine that answers as much of W&B's API as logging points needs."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


class Server(ThreadingHTTPServer):
    """`fails`: what to answer with status 400, `hangs`: what not to answer; `told`: (what, content) so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.told: list[tuple[str, dict]] = []
        self.fails, self.hangs = "", ""
        self.released = threading.Event()

    def handle_error(self, *_) -> None:
        """The client closes connections as it likes: nothing to report."""


class Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_PUT(self) -> None:
        self.answer("PUT", self.content(), {})

    def do_POST(self) -> None:
        content = json.loads(self.content())
        if self.path != "/graphql":
            return self.answer(self.path.rpartition("/")[2], content, {})
        name = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])[1]
        variables = content.get("variables") or {}
        reply = {"viewer": USER}
        if name == "UpsertBucket":
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": project}
            reply = {"upsertBucket": {"inserted": True, "bucket": bucket}}
        if name == "CreateRunFiles":
            urls = [{"name": file, "uploadUrl": f"{self.server.url}/{file}"} for file in variables["files"]]
            reply = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": urls}}
        return self.answer(name, variables, {"data": reply})

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(content) if self.headers["Content-Encoding"] == "gzip" else content

    def answer(self, what: str, content: dict, reply: dict) -> None:
        self.server.told.append((what, content))
        if what == self.server.hangs:
            self.server.released.wait()
        body = json.dumps(reply).encode()
        self.send_response(400 if what == self.server.fails else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
