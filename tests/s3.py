"""A real S3 server on loopback, behind a proxy that can die, slow down, damage what it carries, and count."""

import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


class Proxy:
    """Carries TCP connections to a port of this machine.

    Attributes:
        gets: how often each path was asked for.
        bytes_per_second: of each connection, towards the client; 0 for no limit.
        damage: how many of the next answers with a file of this name get one byte changed.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.gets: Counter[str] = Counter()
        self.bytes_per_second = 0
        self.damage: Counter[str] = Counter()
        self._sockets: set[socket.socket] = set()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the port of the first time."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Die: refuse connections, and cut those that there are."""
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def shard_gets(self) -> Counter[str]:
        """How often each file of a data set but its manifest was fetched, by name."""
        names = Counter({path.rpartition("/")[2]: count for path, count in self.gets.items()})
        return Counter({name: count for name, count in names.items() if name.endswith(".arrow")})

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets |= {client, server}
            asked: list[str] = []
            threading.Thread(target=self._ask, args=(client, server, asked), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client, asked), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, asked: list[str]) -> None:
        for data in _chunks(client):
            for path in re.findall(rb"^GET (\S+) HTTP", data, re.MULTILINE):
                asked.append(path.decode().partition("?")[0])
                self.gets[asked[-1]] += 1
            with suppress(OSError):
                server.sendall(data)
        _close(server)

    def _answer(self, server: socket.socket, client: socket.socket, asked: list[str]) -> None:
        for data in _chunks(server):
            name = asked[-1].rpartition("/")[2] if asked else ""
            if self.damage[name] and len(data) > 1_500:
                self.damage[name] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self.bytes_per_second:
                time.sleep(len(data) / self.bytes_per_second)
            with suppress(OSError):
                client.sendall(data)
        _close(client)


def _chunks(source: socket.socket) -> Iterator[bytes]:
    with suppress(OSError):
        while data := source.recv(16_384):
            yield data


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def serve() -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A server with an empty bucket `bucket`; gives its proxy, and the environment in which clients find it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    S3FileSystem.clear_instance_cache()  # clients of an earlier server, which is gone
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        yield proxy, environment
    finally:
        proxy.stop()
        server.stop()


def upload(directory: Path, url: str) -> None:
    """Put a data set there; the environment must name the server."""
    files = fsspec.filesystem("s3")
    bucket = url.removeprefix("s3://").partition("/")[0]
    if not files.exists(bucket):
        files.mkdir(bucket)
    files.put([str(path) for path in sorted(directory.iterdir())], url.removeprefix("s3://") + "/")
