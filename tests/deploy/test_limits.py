"""What the gateway keeps from the service: too much, too slow, too clever, too old."""

from __future__ import annotations

import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy.gateway import Gateway
from tests.end_to_end.server import PATIENCE_S

MIB = 1 << 20


class Replica:
    """Stands in for one: answers with a status, and keeps what it was asked.

    What is about an episode `late-…` is answered 503, as what comes too late or to a full engine.
    """

    def __init__(self, status: int) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked.append(f"{self.command} {self.path}")
                if status == 0:  # hangs up without a word
                    self.close_connection = True
                    return
                self.send_response(503 if "/late-" in self.path else status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    served = Replica(200)
    yield served
    served.close()


@pytest.fixture(scope="module")
def gateway(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("gateway"), [replica.port, replica.port]) as running:
        yield running


def connect(gateway: Gateway) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S)
    return gateway.tls().wrap_socket(raw, server_hostname="localhost")


def answer_to(gateway: Gateway, request: bytes) -> bytes:
    """All that comes back until the gateway closes the connection."""
    with connect(gateway) as line:
        line.sendall(request)
        return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(gateway: Gateway, replica: Replica, chunked: bool) -> None:
    before = len(replica.asked)
    parts = [b"x" * 65536] * 17
    content = iter(parts) if chunked else b"".join(parts)
    with gateway.client() as http:
        answer = http.post("/episodes/icu-1/observations", content=content)
        assert http.post("/episodes/icu-1/observations", content=b"x" * MIB).status_code == 200
    assert answer.status_code == 413
    assert answer.json()["type"] == "/problems/body-too-large"
    assert len(replica.asked) == before + 1


def test_nothing_is_unpacked(gateway: Gateway, replica: Replica) -> None:
    before = len(replica.asked)
    with gateway.client() as http:
        for coding in ("gzip", "deflate", "br", "identity"):
            headers = {"Content-Encoding": coding}
            answer = http.post("/episodes/icu-1/observations", content=b"x", headers=headers)
            assert answer.status_code == 415
    assert len(replica.asked) == before


def test_large_bodies_wait_in_the_scratch_folder(replica: Replica, tmp_path: Path) -> None:
    """The room there bounds them, not the memory of the gateway; without any they are refused."""
    with Gateway(tmp_path, [replica.port]) as gateway, gateway.client() as http:
        path = "/episodes/icu-1/observations"
        assert http.post(path, content=b"x" * MIB).status_code == 200
        assert not list((tmp_path / "scratch" / "body").iterdir())
        (tmp_path / "scratch" / "body").rmdir()
        refused = http.post(path, content=b"x" * MIB)
        assert http.post(path, content=b"x" * 8192).status_code == 200
    assert refused.status_code == 503
    assert refused.json()["type"] == "/problems/no-room"
    assert refused.headers["Retry-After"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"", id="says nothing"),
        pytest.param(b"GET /episodes HTTP/1.1\r\nHost: a\r\nX-", id="in the headers"),
        pytest.param(
            b"POST /episodes/a/observations HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx",
            id="in the body",
        ),
    ],
)
def test_a_slow_client_is_cut(gateway: Gateway, replica: Replica, begin: bytes) -> None:
    before = len(replica.asked)
    with connect(gateway) as slow:
        slow.sendall(begin)
        with gateway.client() as http:  # nobody waits for it
            assert http.get("/episodes").status_code == 200
        try:
            said = b"".join(iter(lambda: slow.recv(65536), b""))
        except (ConnectionResetError, ssl.SSLEOFError):
            said = b""
    assert said == b"" or b" 408 " in said.partition(b"\r\n")[0]
    assert len(replica.asked) == before + 1


def test_too_many_requests(replica: Replica, tmp_path: Path) -> None:
    with (
        Gateway(tmp_path, [replica.port], requests_per_second=1, burst=2) as gateway,
        gateway.client() as http,
    ):
        before = len(replica.asked)
        answers = [http.get("/episodes") for _ in range(20)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers[:3]] == [200, 200, 200]
    assert refused
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert refused[0].json()["type"] == "/problems/too-many-requests"
    assert len(replica.asked) == before + len(answers) - len(refused)


def test_the_description_is_given_to_nobody_without_end(gateway: Gateway) -> None:
    with gateway.client() as http:
        statuses = [http.get("/openapi.json").status_code for _ in range(40)]
        assert http.get("/episodes").status_code == 200
    assert statuses[:11] == [200] * 11
    assert 429 in statuses


def _offering(gateway: Gateway, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = gateway.tls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is old is the point
        context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_tls_is_refused(gateway: Gateway, version: ssl.TLSVersion) -> None:
    raw = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S)
    with raw, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        _offering(gateway, version).wrap_socket(raw, server_hostname="localhost")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_new_tls_is_taken(gateway: Gateway, version: ssl.TLSVersion) -> None:
    raw = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S)
    with _offering(gateway, version).wrap_socket(raw, server_hostname="localhost") as line:
        line.sendall(b"GET /episodes HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert line.recv(12) == b"HTTP/1.1 200"


def test_plain_http_is_not_served(gateway: Gateway, replica: Replica) -> None:
    before = len(replica.asked)
    with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) as line:
        line.sendall(b"GET /episodes HTTP/1.1\r\nHost: a\r\n\r\n")
        assert line.recv(12) == b"HTTP/1.1 400"
    assert len(replica.asked) == before


def test_where_certificates_are_needed_nobody_gets_in_without(
    replica: Replica, tmp_path: Path
) -> None:
    with Gateway(tmp_path, [replica.port], verify_client="on") as gateway:
        with gateway.client() as http:
            assert http.get("/episodes").status_code == 400
        with gateway.client(gateway.authority.client("feed")) as http:
            assert http.get("/episodes").status_code == 200


HIDDEN = b"GET /episodes/hidden HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /episodes/a/observations HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 0\r\nContent-Length: %d\r\n",
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +%d\r\n",
        b"Content-Length: 0x1f\r\n",
        b"Content-Length: %d, %d\r\n",
        b"Host: b\r\n",
    ],
)
def test_no_request_hides_in_another(gateway: Gateway, replica: Replica, headers: bytes) -> None:
    headers = headers.replace(b"%d", str(len(HIDDEN)).encode())
    body = b"0\r\n\r\n" + HIDDEN if b"chunked" in headers else HIDDEN
    before = len(replica.asked)
    said = answer_to(gateway, POST + headers + b"\r\n" + body)
    assert said.split(b" ", 2)[1] in (b"400", b"501")
    assert said.count(b"HTTP/1.1 ") == 1
    assert not [asked for asked in replica.asked[before:] if "hidden" in asked]


def test_what_follows_a_good_request_is_a_request_of_its_own(
    gateway: Gateway, replica: Replica
) -> None:
    last = b"GET /episodes/c HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    before = len(replica.asked)
    said = answer_to(gateway, b"GET /episodes/b HTTP/1.1\r\nHost: a\r\n\r\n" + last)
    assert said.count(b"HTTP/1.1 200") == 2
    assert replica.asked[before:] == ["GET /episodes/b", "GET /episodes/c"]


class TestRetries:
    """One of two replicas fails; which of them a stay belongs to is as the hash has it."""

    N_STAYS = 20

    def _ask(self, folder: Path, fails_with: int, method: str, path: str) -> tuple[list[int], int]:
        """Statuses for many stays, and how many requests the failing replica got."""
        bad, good = Replica(fails_with), Replica(200)
        statuses = []
        try:
            # Never out of the ring, so that each stay meets its own replica first.
            gateway = Gateway(folder, [bad.port, good.port], max_fails=0)
            with gateway, gateway.client() as http:
                for n in range(self.N_STAYS):
                    body = None if method in ("GET", "DELETE") else b"{}"
                    url = path.format(f"icu-{n}")
                    statuses.append(http.request(method, url, content=body).status_code)
        finally:
            bad.close()
            good.close()
        assert bad.asked, "no stay belonged to the replica that fails"
        return statuses, len(bad.asked)

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/episodes/{}/observations"),
            ("GET", "/episodes/{}/risk"),
            ("PUT", "/episodes/{}"),
            ("DELETE", "/episodes/{}"),
        ],
    )
    def test_what_changes_nothing_twice_goes_to_the_other(
        self, tmp_path: Path, method: str, path: str
    ) -> None:
        statuses, _ = self._ask(tmp_path, 0, method, path)
        assert statuses == [200] * self.N_STAYS

    def test_what_was_sent_of_a_patch_is_not_sent_again(self, tmp_path: Path) -> None:
        statuses, bad = self._ask(tmp_path, 0, "PATCH", "/episodes/{}")
        assert statuses.count(502) == bad
        assert statuses.count(200) == self.N_STAYS - bad

    @pytest.mark.parametrize("status", [500, 503])
    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/episodes/{}/risk"), ("POST", "/episodes/{}/observations")]
    )
    def test_what_the_service_refuses_is_not_asked_again(
        self, tmp_path: Path, status: int, method: str, path: str
    ) -> None:
        statuses, bad = self._ask(tmp_path, status, method, path)
        assert statuses.count(status) == bad
        assert statuses.count(200) == self.N_STAYS - bad

    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/episodes/{}/risk"), ("POST", "/episodes/{}/observations")]
    )
    def test_refusals_of_one_client_take_no_replica_from_the_others(
        self, tmp_path: Path, method: str, path: str
    ) -> None:
        """With the limits that are shipped: two failures take a replica out for five seconds."""
        replicas = Replica(200), Replica(200)
        body = None if method == "GET" else b"{}"
        try:
            gateway = Gateway(tmp_path, [replica.port for replica in replicas])
            with gateway, gateway.client() as http:
                for n in range(self.N_STAYS):
                    url = path.format(f"late-{n}")
                    assert http.request(method, url, content=body).status_code == 503
                asked = [len(replica.asked) for replica in replicas]
                assert sum(asked) == self.N_STAYS
                assert min(asked) >= 2
                for n in range(self.N_STAYS):
                    url = path.format(f"icu-{n}")
                    assert http.request(method, url, content=body).status_code == 200
        finally:
            for replica in replicas:
                replica.close()
