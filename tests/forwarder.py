"""One address for two Redis servers, to test fail-over: forwards connections to either of them."""

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Name(socketserver.ThreadingTCPServer):
    """Forwards new connections to the port `leads_to`. Old ones stay open, as with a virtual IP or a load balancer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, leads_to: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.leads_to = leads_to

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Forward(socketserver.BaseRequestHandler):
    """Forwards one connection in both directions until either end closes it."""

    server: Name

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.server.leads_to)) as there:
            other = {self.request: there, there: self.request}
            while True:
                for ready in select.select([*other], [], [])[0]:
                    data = ready.recv(2**16)
                    if not data:
                        return
                    other[ready].sendall(data)


@contextmanager
def name_for(port: int) -> Iterator[Name]:
    with Name(port) as name:
        threading.Thread(target=name.serve_forever, args=[0.02], daemon=True).start()
        yield name
        name.shutdown()
