"""A server on this machine that answers as much of W&B's API as sweeps need, and fails on request."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb.sdk.lib.wbauth.authenticate import unauthenticate_session

KEY = "0" * 40
USER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


class Server(ThreadingHTTPServer):
    """What it was told, and how it is to let down.

    told: (what, content) so far, where `what` is the name of a GraphQL operation, `file_stream`, or `PUT`.
    fails: what is answered with `status`, the first `times` times; hangs: what is not answered.
    delay: seconds that an answer takes. refused: the id of a run that is not taken.
    views: saved views by name; files: what was uploaded, by the end of its path.
    """

    daemon_threads = True
    # Connections that wait to be taken; a client whose connection is turned away tries again after seconds.
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.told: list[tuple[str, dict]] = []
        self.fails, self.status, self.times = "", 400, 10**9
        self.hangs = self.refused = ""
        self.delay = 0.0
        self.released = threading.Event()
        self.views: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}

    def handle_error(self, *_) -> None:
        """The client closes connections as it likes: nothing to report."""

    def asked(self, what: str) -> list[dict]:
        """The content of everything told of that name."""
        return [content for name, content in self.told if name == what]

    def runs(self) -> dict[str, dict]:
        """Every run that was logged: id → what it was started with."""
        return {each["name"]: each for each in self.asked("UpsertBucket") if each.get("groupName")}

    def history(self) -> list[dict]:
        """The rows of all histories."""
        return [
            json.loads(line)
            for content in self.asked("file_stream")
            for line in content.get("files", {}).get("wandb-history.jsonl", {}).get("content", ())
        ]


@contextmanager
def serving() -> Iterator[Server]:
    """A server at work."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        # The client keeps a key for as long as its process lives.
        unauthenticate_session(update_settings=False)


class Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_PUT(self) -> None:
        body = self.content()
        self.server.files[self.path.lstrip("/")] = body
        self.answer("PUT", {}, {})

    def do_POST(self) -> None:
        content = json.loads(self.content())
        if self.path != "/graphql":
            return self.answer(self.path.rpartition("/")[2], content, {})
        name = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])[1]
        variables = content.get("variables") or {}
        reply = getattr(self, name, lambda _: {"viewer": USER})(variables)
        return self.answer(name, variables, {"data": reply})

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(content) if self.headers["Content-Encoding"] == "gzip" else content

    def answer(self, what: str, content: dict, reply: dict) -> None:
        server = self.server
        server.told.append((what, content))
        time.sleep(server.delay)
        if what == server.hangs:
            server.released.wait()
        status = 200
        if what in server.fails.split() and server.times > 0:
            server.times -= 1
            status, reply = server.status, {"errors": [{"message": "as asked"}]}
        elif content.get("name") and content["name"] == server.refused:
            status, reply = 400, {"errors": [{"message": "not this one"}]}
        elif what != "PUT" and not self.knows_the_key():
            status, reply = 401, {"errors": [{"message": "user is not logged in"}]}
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def knows_the_key(self) -> bool:
        scheme, _, given = (self.headers["Authorization"] or "").partition(" ")
        return scheme == "Basic" and base64.b64decode(given).decode() == f"api:{KEY}"

    # -- operations -------------------------------------------------------------------------------------------------

    def UpsertBucket(self, asked: dict) -> dict:
        project = {"id": "p", "name": asked.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": asked["name"], "config": "{}", "historyLineCount": 0, "project": project}
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}

    def CreateRunFiles(self, asked: dict) -> dict:
        urls = [{"name": file, "uploadUrl": f"{self.server.url}/{asked['run']}/{file}"} for file in asked["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": urls}}

    def ServerFeaturesQuery(self, asked: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def ArtifactType(self, asked: dict) -> dict:
        return {"project": None}

    def CreateArtifact(self, asked: dict) -> dict:
        artifact = {"id": asked["input"]["digest"], "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, asked: dict) -> dict:
        file = {"id": "f", "uploadUrl": f"{self.server.url}/{asked['artifactID']}/manifest", "uploadHeaders": []}
        manifest = {"id": "m", "file": {**file, "name": "manifest", "displayName": "manifest"}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def CreateArtifactFiles(self, asked: dict) -> dict:
        nodes = [
            {
                "id": spec["name"],
                "name": spec["name"],
                "displayName": spec["name"],
                "uploadUrl": f"{self.server.url}/{spec['artifactID']}/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "storagePath": spec["name"],
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in asked["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def CommitArtifact(self, asked: dict) -> dict:
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}

    def UpsertView2(self, asked: dict) -> dict:
        inserted = asked["name"] not in self.server.views
        self.server.views[asked["name"]] = asked
        return {"upsertView": {"view": {"id": f"id-{asked['name']}", "name": asked["name"]}, "inserted": inserted}}
