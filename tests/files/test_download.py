"""Downloads: whole files by their whole URL, or none."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time

import pytest

from gatewise.errors import Failure, UserError
from gatewise.files.download import download


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content, promised, pause = self.server.answers(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if promised is not None:
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        time.sleep(pause)
        self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Starts a server: answers(path) gives the content, the length that it promises, and a pause in the middle."""
    servers = []

    def start(answers):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answers, server.requests, server.timeout = answers, [], 10
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def by_path(path):
    content = path.encode() * 1000
    return content, len(content), 0


@pytest.mark.parametrize(
    ("first", "second"), [("/a/model.pth", "/b/model.pth"), ("/download?id=1", "/download?id=2"), ("/m", "/m?v=2")]
)
def test_urls_with_one_last_name_give_different_files(tmp_path, serve, first, second):
    _, url = serve(by_path)
    for path in (first, second):
        assert download(url + path, tmp_path).read_bytes() == by_path(path)[0]


def test_a_file_is_fetched_once(tmp_path, serve):
    server, url = serve(by_path)
    assert download(f"{url}/x.pth", tmp_path) == download(f"{url}/x.pth", tmp_path)
    assert server.requests == ["/x.pth"]


def test_a_file_of_the_bare_name_is_not_taken_for_it(tmp_path, serve):
    (tmp_path / "x.pth").write_bytes(b"of another program")
    _, url = serve(by_path)
    assert download(f"{url}/x.pth", tmp_path).read_bytes() == by_path("/x.pth")[0]


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(tmp_path, serve):
    answers = [(b"half of it", 1000, 0), by_path("/x.pth")]
    _, url = serve(lambda path: answers.pop(0))
    with pytest.raises(UserError, match="it broke off after 10 of 1,000 bytes; try again"):
        download(f"{url}/x.pth", tmp_path)
    assert os.listdir(tmp_path) == []
    assert download(f"{url}/x.pth", tmp_path).read_bytes() == by_path("/x.pth")[0]


def test_a_length_that_is_not_promised_is_not_required(tmp_path, serve):
    _, url = serve(lambda path: (b"content", None, 0))
    assert download(f"{url}/x.pth", tmp_path).read_bytes() == b"content"


def test_the_digest_in_a_name_is_compared(tmp_path, serve):
    _, url = serve(lambda path: (b"content", 7, 0))
    digest = hashlib.sha256(b"content").hexdigest()[:8]
    assert download(f"{url}/net-{digest}.pth", tmp_path).read_bytes() == b"content"
    assert download(f"{url}/net-20240101.pth", tmp_path).read_bytes() == b"content"
    with pytest.raises(UserError, match=f"SHA-256 begins with {digest}, not with 0123abcd"):
        download(f"{url}/net-0123abcd.pth", tmp_path)


def test_only_whole_files_appear_when_several_download_the_same(tmp_path, serve):
    content = b"x" * 100_000
    _, url = serve(lambda path: (content, len(content), 0.3))
    found, seen = [], []

    def fetch():
        found.append(download(f"{url}/x.pth", tmp_path).read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen += [path.stat().st_size for path in tmp_path.glob("*.pth")]
        time.sleep(0.01)
    for thread in threads:
        thread.join(10)
    assert found == [content] * 3
    assert set(seen) <= {len(content)}
    assert len(os.listdir(tmp_path)) == 1


def test_the_cache_name_is_a_plain_name(tmp_path, serve):
    _, url = serve(by_path)
    for path in ("/", "/a%2Fb%00c/..%2f..%2fx.pth", "/" + "long" * 300 + ".safetensors", "/%E2%82%AC.pth"):
        found = download(url + path, tmp_path)
        assert found.parent == tmp_path
        assert found.is_file()


@pytest.mark.parametrize(
    "url",
    ["http://a b/x.pth", "http://[::1/x.pth", "http://", "http://127.0.0.1:99999/x", f"http://{'a' * 70}.invalid/x"],
)
def test_a_malformed_url_is_told_in_one_line(tmp_path, url):
    with pytest.raises(UserError, match="cannot download") as told:
        download(url, tmp_path)
    assert "\n" not in str(told.value)


def test_a_missing_file_is_told(tmp_path, serve):
    _, url = serve(lambda path: (None, None, 0))
    with pytest.raises(UserError, match="the server answers 404"):
        download(f"{url}/x.pth", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path, serve):
    (tmp_path / "cache").write_text("a file")
    _, url = serve(by_path)
    with pytest.raises(Failure, match="cannot"):
        download(f"{url}/x.pth", tmp_path / "cache")
