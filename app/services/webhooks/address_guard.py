"""Guard for requests to URLs that users name: which hosts and addresses may be connected to.

A user must not be able to make the service send requests to itself, to its databases or to other
private hosts (server-side request forgery). A URL is therefore checked when it is stored. Before
each connection its host is resolved once, all addresses are checked, and the connection is made to
a checked address. A host that resolves to another address later cannot evade the check.

An administrator can name hosts that may have any address.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any, Final

import httpx

from app.errors import BadRequest
from app.services.webhooks.resolver import get_addresses

MAX_URL_CHARACTERS: Final = 2048
DEFAULT_PORTS: Final = {"https": 443, "http": 80}
HOST_PATTERN: Final = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
NAT64: Final = IPv6Network("64:ff9b::/96")
Resolver = Callable[[str, int], Awaitable[list[str]]]


class ForbiddenUrl(BadRequest):
    """The URL is malformed, or the service must not connect to its host."""

    code = "forbidden_url"


class UnknownHost(Exception):
    """The host name cannot be resolved. It may be possible later."""


@dataclass(frozen=True)
class CheckedTarget:
    """A URL and one of its checked addresses.

    A request for `url` with these headers and extensions connects to the address. The headers and
    the TLS handshake still name the host, and the certificate must be valid for it.
    """

    url: httpx.URL
    headers: dict[str, str]
    extensions: dict[str, Any]  # Any: httpx's own type


class AddressGuard:
    """Checks URLs and addresses. Hosts in `allowed_hosts` may have any address and plain http."""

    def __init__(self, allowed_hosts: Iterable[str] = (), resolve: Resolver | None = None) -> None:
        self._allowed_hosts = frozenset(map(_normalised, allowed_hosts))
        self._resolve = resolve or _resolve

    def parse(self, text: str) -> httpx.URL:
        """Returns the URL. Raises ForbiddenUrl unless it may be stored as a receiver.

        Only addresses in the URL itself are checked, because names can resolve differently later.
        """
        url = _parse(text)
        host = host_of(url)
        if host in self._allowed_hosts:
            return url
        if url.scheme != "https":
            raise ForbiddenUrl(
                "the URL must begin with https://; plain http is only possible for hosts that "
                "STILLHOUSE_WEBHOOK_ALLOWED_HOSTS names",
                param="url",
            )
        address = _literal_address(host)
        is_local_name = host == "localhost" or host.endswith(".localhost")
        if is_local_name or (address is not None and not is_public(address)):
            raise _forbidden(host)
        return url

    async def check(self, text: str) -> list[CheckedTarget]:
        """Resolves the host of a URL once, and returns one target per address, the preferred first.

        Raises:
            ForbiddenUrl: The URL is forbidden, or one of its addresses is not public.
            UnknownHost: The host name cannot be resolved.
        """
        url = self.parse(text)
        host = host_of(url)
        addresses = await self._resolve(host, url.port or DEFAULT_PORTS[url.scheme])
        if host not in self._allowed_hosts and not all(map(_is_public_text, addresses)):
            raise _forbidden(host)
        extensions = {"sni_hostname": host} if url.scheme == "https" else {}
        return [
            CheckedTarget(
                url=url.copy_with(host=address),
                headers={"host": url.netloc.decode("ascii")},
                extensions=dict(extensions),
            )
            for address in addresses
        ]


def host_of(url: httpx.URL) -> str:
    """Returns the host of a URL as it is resolved: a name in ASCII, or an address."""
    return url.raw_host.decode("ascii")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Returns whether the address is in the public internet.

    An IPv6 address that embeds an IPv4 address is public only if the embedded one is public, too.
    `is_global` alone is not enough. It is True for multicast, and in Python 3.11 for NAT64 and 6to4
    forms of private addresses.
    """
    if isinstance(address, IPv4Address):
        return address.is_global and not (
            address.is_multicast or address.is_reserved or address.is_unspecified
        )
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in NAT64:  # the only way to IPv4 hosts in a network that has IPv6 alone
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    if address not in GLOBAL_UNICAST or not address.is_global or address.is_multicast:
        return False
    embedded = [address.sixtofour, *(address.teredo or ())]
    return all(is_public(inner) for inner in embedded if inner is not None)


def _parse(text: str) -> httpx.URL:
    if len(text) > MAX_URL_CHARACTERS:
        raise ForbiddenUrl(
            f"the URL has more than {MAX_URL_CHARACTERS} characters; use a shorter one", param="url"
        )
    try:
        url = httpx.URL(text)
        host = _normalised(host_of(url))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ForbiddenUrl(f"the URL is malformed: {error}", param="url") from None
    if url.scheme not in DEFAULT_PORTS:
        raise ForbiddenUrl("the URL must begin with https://", param="url")
    if url.userinfo or url.fragment:
        raise ForbiddenUrl(
            "the URL must have neither a user name, a password nor a fragment", param="url"
        )
    if not HOST_PATTERN.fullmatch(host) and _literal_address(host) is None:
        raise ForbiddenUrl("the URL must have a valid host name", param="url")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ForbiddenUrl("the URL must have a valid port", param="url")
    return url.copy_with(host=host)


def _normalised(host: str) -> str:
    """Returns the host in lower case, without brackets and the final dot of a full name."""
    host = host.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _literal_address(host: str) -> IPv4Address | IPv6Address | None:
    """Returns the address that the host is, or None if it is a name.

    Also reads the other forms of IPv4 that the resolver of the system accepts: 127.1, 0x7f000001,
    2130706433 and 0177.0.0.1.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _is_public_text(address: str) -> bool:
    return is_public(ipaddress.ip_address(address))


async def _resolve(host: str, port: int) -> list[str]:
    """Returns the addresses of a host, the preferred first. Raises UnknownHost."""
    try:
        return await asyncio.wrap_future(get_addresses(host, port))
    except (OSError, UnicodeError):
        raise UnknownHost(f"the host name {host} cannot be resolved") from None


def _forbidden(host: str) -> ForbiddenUrl:
    # Does not name the address, from which a user could learn names of the private network.
    return ForbiddenUrl(
        f"the host {host} is not in the public internet; an administrator can allow it with "
        "STILLHOUSE_WEBHOOK_ALLOWED_HOSTS",
        param="url",
    )
