"""What a URL of a user may name, and which addresses the service connects to."""

import asyncio
import socket
import subprocess
import sys
from ipaddress import ip_address
from typing import NoReturn

import pytest

from app.services.webhooks.address_guard import (
    AddressGuard,
    ForbiddenUrl,
    UnknownHost,
    is_public,
)
from tests.serve_worker import ROOT

PUBLIC = [
    "93.184.215.14",
    "2606:4700::1111",
    "64:ff9b::808:808",
    "2002:808:808::1",
    "::ffff:8.8.8.8",
]
PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",  # neither private nor global
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "64:ff9b:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "5f00::1",
    "fc00::1",
    "fe80::1",
    "fec0::1",
    "ff0e::1",
    "2606:4700::1111%lo",
]
NUMERIC_LOOPBACK = ["0x7f000001", "2130706433", "0177.0.0.1", "127.1", "0"]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_any_other_address_is_not(address: str) -> None:
    assert not is_public(ip_address(address))


def test_a_url_that_may_be_stored_is_normalised() -> None:
    guard = AddressGuard(["Hooks.internal", "[::1]"])
    assert str(guard.parse("https://Example.COM.:8443/a?b=1")) == "https://example.com:8443/a?b=1"
    assert str(guard.parse("https://münchen.test/ä")) == "https://xn--mnchen-3ya.test/%C3%A4"
    assert str(guard.parse("http://hooks.INTERNAL./x")) == "http://hooks.internal/x"
    assert str(guard.parse("http://[0:0::1]:80/")) == "http://[::1]/"


@pytest.mark.parametrize(
    "url",
    [
        *(f"https://[{a}]/" if ":" in a else f"https://{a}/" for a in PRIVATE),
        *(f"https://{host}/" for host in NUMERIC_LOOPBACK),
        "https://localhost/",
        "https://LOCALHOST./",
        "https://api.localhost/",
        "http://example.com/",
        "http://127.0.0.1/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "//example.com/",
        "example.com",
        "",
        "https://",
        "https:///path",
        "https://user@example.com/",
        "https://example.com:pw@example.org/",
        "https://example.com/#part",
        "https://exam ple.com/",
        "https://example.com\n/",
        "https://%31%32%37.0.0.1/",
        "https://256.1.1.1/",
        "https://１２７.0.0.1/",
        "https://example.com:0/",
        "https://example.com:99999/",
        f"https://{'a' * 64}.com/",
        f"https://example.com/{'a' * 2048}",
    ],
)
def test_a_forbidden_url_is_refused_when_it_is_stored(url: str) -> None:
    with pytest.raises(ForbiddenUrl):
        AddressGuard().parse(url)


@pytest.mark.parametrize("host", ["0x7f000001", "2130706433", "127.1", "0"])  # not a URL for httpx
def test_the_resolver_of_the_system_reads_these_as_loopback(host: str) -> None:
    """So the guard must, too: its own reading of them is not a guess."""
    targets = asyncio.run(AddressGuard([host]).check(f"http://{host}/"))
    assert [target.url.host for target in targets] in (["127.0.0.1"], ["0.0.0.0"])


class NameServer:
    """A name server outside, whose answers change from one look-up to the next."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.num_asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.num_asked += 1
        return self.answers.pop(0)


def test_a_name_is_resolved_once_and_the_checked_addresses_are_connected_to() -> None:
    names = NameServer(["93.184.215.14", "2606:4700::1111"])
    targets = asyncio.run(AddressGuard(resolve=names).check("https://example.com:8443/hook?a=1"))
    assert names.num_asked == 1
    assert [str(target.url) for target in targets] == [
        "https://93.184.215.14:8443/hook?a=1",
        "https://[2606:4700::1111]:8443/hook?a=1",
    ]
    for target in targets:
        assert target.headers == {"host": "example.com:8443"}
        assert target.extensions == {"sni_hostname": "example.com"}


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.215.14", "127.0.0.1"]])
def test_one_private_address_of_a_name_is_enough_to_refuse_it(addresses: list[str]) -> None:
    with pytest.raises(ForbiddenUrl) as refused:
        asyncio.run(AddressGuard(resolve=NameServer(addresses)).check("https://example.com/"))
    assert not any(address in str(refused.value) for address in addresses)


def test_each_attempt_checks_again() -> None:
    guard = AddressGuard(resolve=NameServer(["93.184.215.14"], ["127.0.0.1"]))
    assert len(asyncio.run(guard.check("https://example.com/"))) == 1
    with pytest.raises(ForbiddenUrl):
        asyncio.run(guard.check("https://example.com/"))


def test_an_allowed_host_may_have_any_address_and_others_with_it_may_not() -> None:
    guard = AddressGuard(["hooks.internal"], NameServer(["10.0.0.1"], ["10.0.0.1"]))
    assert str(asyncio.run(guard.check("http://hooks.internal/"))[0].url) == "http://10.0.0.1/"
    with pytest.raises(ForbiddenUrl):
        asyncio.run(guard.check("https://evil.hooks.internal/"))


def test_a_name_that_does_not_exist_may_exist_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        """Answers as the resolver of the system does, without a request to a name server."""
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UnknownHost):
        asyncio.run(AddressGuard().check("https://no-such-host.invalid/"))


def test_a_name_server_that_does_not_answer_does_not_delay_the_exit() -> None:
    code = """
import asyncio, socket, time
from contextlib import suppress
from app.services.webhooks.address_guard import AddressGuard
socket.getaddrinfo = lambda *_, **__: time.sleep(3600)

async def check():
    with suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await AddressGuard().check("https://slow.test/")

asyncio.run(check())
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
