"""engine/network.py: a server that answers is reachable, whatever it answers."""

import http.server
import threading

from engine.network import reachable


def test_a_server_is_reachable_if_it_answers_at_all():
    class Refuses(http.server.BaseHTTPRequestHandler):
        do_GET = lambda self: self.send_error(404)
        log_message = lambda *_: None

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.handle_request).start()
    assert reachable(url)
    server.server_close()
    assert not reachable(url)
