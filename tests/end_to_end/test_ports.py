"""Ports of the services that are tested."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.end_to_end import server
from tests.end_to_end.server import free_port

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not _RANGE.exists(), reason="needs Linux")
def test_no_outgoing_connection_can_take_a_port_while_its_service_is_away() -> None:
    first = int(_RANGE.read_text().split()[0])
    if first <= 20_000:
        pytest.skip("this machine leaves no ports below those of outgoing connections")
    ports = [free_port() for _ in range(50)]
    assert max(ports) < first
    assert len(set(ports)) == len(ports)


def test_a_port_that_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_port(), free_port()
    monkeypatch.setattr(server, "_ports", iter([taken, free]))
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", taken))
        assert free_port() == free
