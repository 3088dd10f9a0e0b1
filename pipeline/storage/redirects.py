"""Where a web server may send a reader: never from https to http, nor into this machine's or its network's own places.

Link-local addresses (169.254.0.0/16, fe80::/10) are where clouds answer with a machine's credentials.
"""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urljoin

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from pipeline.base.errors import UserError

MOST = 5  # redirects of one request
_PORTS = {"http": 80, "https": 443}


def follow(source: str, location: str) -> str:
    """The URL that an answer of `source` leads to. Raises UserError where it must not be followed.

    Only names are looked up; nothing is connected to.
    """
    try:
        target = urljoin(source, location)
        before, after = parse_url(source), parse_url(target)
    except (ValueError, LocationParseError) as error:
        raise UserError(f"'{source}' redirects to '{location[:200]}', which is no address: use another") from error
    if after.scheme not in _PORTS or not after.host:
        raise _refused(source, target, "which is not on a web server")
    if after.auth is not None:
        raise _refused(source, target, "with a user name in it")
    if before.scheme == "https" and after.scheme != "https":
        raise _refused(source, target, "which is not encrypted")
    places = _addresses(after)
    if any(place.is_link_local for place in places):
        raise _refused(source, target, "a link-local address, where a cloud keeps a machine's credentials")
    inside = [place for place in places if not place.is_global]
    if inside and _is_public(before):
        raise _refused(source, target, f"from a public server to an address of your own network ({inside[0]})")
    return target


def _refused(source: str, target: str, why: str) -> UserError:
    return UserError(f"'{source}' redirects to '{target}', {why}: give the address of the files themselves")


def _is_public(url: Url) -> bool:
    """Whether a host is on the internet; also where its name is not found, though it has answered."""
    places = _addresses(url)
    return not places or any(place.is_global for place in places)


def _addresses(url: Url) -> list[IPv4Address | IPv6Address]:
    """Every address of a URL's host; none where its name is not found, of which a connection then tells."""
    host = str(url.host).removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host, url.port or _PORTS[str(url.scheme)], type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [_plain(str(entry[4][0])) for entry in found]


def _plain(text: str) -> IPv4Address | IPv6Address:
    """An address without its zone; an IPv4 one that is written as IPv6 is that one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
