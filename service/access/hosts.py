"""Addresses that nobody else can reach, and those that may be asked for keys."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9.-]+))(:[0-9]*)?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host.lower() == "localhost":
        return True
    address = parse_address(host)
    return address is not None and address.is_loopback


def named_in(host: str) -> str:
    """The name or address in a header `Host`, in small letters; empty if there is none."""
    found = _HOST.fullmatch(host.strip().lower())
    return "" if found is None else found["v6"] or found["name"]


def is_private_url(url: str) -> bool:
    """Whether nobody can change on its way what is read there: by TLS, or on this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, an IPv4 one that came as IPv6 as the former; None for anything else."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
