"""Listen on a port: check it early, say the address, and on a signal finish what is being answered, then leave."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from wherry.errors import BadInput, Error

GRACE_S = 30.0


def check_port(host: str = "127.0.0.1", port: int = 8000) -> None:
    """See that the address can be listened on; call it before a model is loaded. Port 0 (any free one) is fine.

    Raises:
        BadInput: the port is in use, may not be used, or the host is not this machine; with the way out.
    """
    _bind(host, port).close()


def run(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace_s: float = GRACE_S,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then drain: /health/ready says 503, new requests get 503, running ones end.

    A second signal ends running answers at their next token. Only the main thread hears signals.

    Args:
        app: what `create_app` returned.
        host: address to listen on; 0.0.0.0 for all of this machine's.
        port: 0 takes a free one.
        grace_s: seconds that running requests have to end after the first signal.
        say: told the URL when requests are taken, and once more when draining begins.

    Raises:
        BadInput: see check_port.
    """
    sock = _bind(host, port)
    server = Server(app, sock, grace_s, say)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()


@contextmanager
def serving(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve from a thread of this process while the block runs; gives the URL. For demos, examples and tests.

    Raises:
        BadInput: see check_port.
    """
    sock = _bind(host, port)
    server = Server(app, sock, GRACE_S, lambda line: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="wherry-serve")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        if not server.started:
            raise Error(f"the server did not start at {server.url}; the log says why")
        yield server.url
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


class Server(uvicorn.Server):
    """uvicorn that drains before it closes its door, and does not die of the signal that it obeyed."""

    def __init__(self, app: Starlette, sock: socket.socket, grace_s: float, say: Callable[[str], None]) -> None:
        # log_config: uvicorn's own would end every log handler of the process, absl's with its closed stream among them
        config = uvicorn.Config(
            app, log_level="warning", log_config=None, access_log=False, server_header=False, lifespan="on", ws="none",
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self.service, self.say, self.grace_s, self.until = app.state.service, say, grace_s, 0.0
        host, port = sock.getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        self.url = f"http://{shown}:{port}"
        self.said = False

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; True ends the main loop."""
        if not self.said:
            self.said = True
            self.say(f"{self.service.model} is served at {self.url} (Ctrl-C ends it)")
        if self.service.draining:
            late_s = time.monotonic() - self.until
            if late_s > 0:
                self.service.halt()
            self.should_exit = not self.service.line.inside or late_s > 2
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end running answers at their next token. Third: leave at once."""
        if not self.service.draining:
            self.until = time.monotonic() + self.grace_s
            self.service.draining = True
            if self.service.line.inside:
                self.say(
                    f"ending {self.service.line.inside} running requests, {self.grace_s:g} s at most; "
                    f"once more ends them now"
                )
        elif time.monotonic() < self.until:
            self.until = time.monotonic()
        else:
            self.should_exit = self.force_exit = True


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise BadInput(f"port {port} does not exist; a port is a number from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadInput(f"host '{host}' is not known ({error.strerror}).\nUse --host 127.0.0.1.") from error
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would allow two programs on one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise BadInput(
                f"port {port} needs the rights of an administrator.\nTake one above 1023: --port 8000"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise BadInput(
                f"{host} is not an address of this machine.\nUse --host 127.0.0.1 or --host 0.0.0.0."
            ) from error
        free = _bind(host, 0)
        other = free.getsockname()[1]
        free.close()
        raise BadInput(f"port {port} on {host} is in use by another program.\nTake another: --port {other}") from error
