"""data/downloads.py: a download is complete and the expected file, or one line of error."""

import hashlib
import http.server
import os
import threading

import pytest
from conftest import subprocess_run
from prepared import contents

from configurator import UserError
from data import downloads


class Server(http.server.BaseHTTPRequestHandler):
    PAGES = {
        "/good": (200, b"to be or not to be", 0),
        "/html": (200, b"\n<!DOCTYPE html><title>Sign in</title>", 0),
        "/broken": (200, b"to be", 13),  # promises 13 bytes more
        "/missing": (404, b"to be or not to be", 0),
    }

    def do_GET(self):
        status, body, promised = self.PAGES[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_arrives_whole_and_is_kept(tmp_path, url):
    sha256 = hashlib.sha256(b"to be or not to be").hexdigest()
    path = downloads.download(f"{url}/good", tmp_path / "new" / "input.txt", 10, sha256)
    assert contents(tmp_path / "new") == {"input.txt": b"to be or not to be"}
    assert downloads.download("http://127.0.0.1:9/", path, 10, sha256) == path


@pytest.mark.parametrize(
    "page, min_bytes, sha256, message",
    [
        ("/html", 1, None, "is a web page"),
        ("/broken", 1, None, "broke off after 5 of 18 bytes"),
        ("/missing", 1, None, "404"),
        ("/good", 1000, None, "too short"),
        ("/good", 1, "0" * 64, "not the expected file"),
    ],
)
def test_an_odd_download_leaves_nothing_and_names_input(
    tmp_path, url, page, min_bytes, sha256, message
):
    (tmp_path / "input.txt").write_text("older")
    with pytest.raises(UserError, match=f"{message}.*--input FILE"):
        downloads.download(f"{url}{page}", tmp_path / "input.txt", min_bytes, sha256)
    assert contents(tmp_path) == {"input.txt": b"older"}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unreachable_server_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded.*--input FILE"):
        downloads.download("http://127.0.0.1:9/input.txt", tmp_path / "input.txt")
    assert contents(tmp_path) == {}


def test_an_unreachable_hub_is_one_line_at_once(tmp_path):
    script = "from data.downloads import load_hub; from configurator import run; "
    script += "run(lambda: load_hub('a/b'))"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess_run("-c", script, env={**os.environ, **nowhere})
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # the hub's retries print more
    assert "a/b" in done.stderr and "--input FILE" in done.stderr


def test_room_for_the_hubs_cache_is_needed_until_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert downloads.hub_space("owner/TinyTales", 5) == (tmp_path, 5)
    folder = tmp_path / "datasets" / "owner___tiny_tales" / "some-config" / "0.0.0"
    folder.mkdir(parents=True)
    (folder / "train.arrow").touch()
    assert downloads.hub_space("owner/TinyTales", 5, "some-config") == (tmp_path, 0)
    assert downloads.hub_space("owner/TinyTales", 5, "other-config") == (tmp_path, 5)
