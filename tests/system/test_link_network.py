"""The link through what stands between an enterprise and its provider, in network namespaces.

    site (10.0.0.2) ── router (10.0.0.1 │ 203.0.113.x) ── provider (198.51.100.1)

Three sites, all with the same address. The routers of the first two translate addresses (NAT); the third one passes no
packets on, and only its HTTP proxy leads out. The provider has no route to 10.0.0.0/24.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from link_end import PROVIDER_ADDRESS

from dr_cloud.seal.authority import Authority

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
SCRIPT = Path(__file__).resolve().parents[1] / "link_end.py"
SITE = "10.0.0.2"
NAT = 'table ip link { chain out { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }; }'
STALL = "table ip stall { chain pass { type filter hook forward priority filter; drop; }; }"


class Network:
    """Namespaces, named after this process, and the programs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports: dict[str, int] = {}
        self._programs: list[subprocess.Popen[str]] = []
        self._namespaces: list[str] = []

    def name(self, place: str) -> str:
        return f"drc-{os.getpid()}-{place}"

    def run(self, *words: str, text: str | None = None) -> str:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=20)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, place: str, *words: str) -> str:
        return self.run("ip", "-n", self.name(place), *words)

    def inside(self, place: str, *words: str, text: str | None = None) -> str:
        return self.run("ip", "netns", "exec", self.name(place), *words, text=text)

    def start(self, place: str, *words: str) -> subprocess.Popen[str]:
        command = ("ip", "netns", "exec", self.name(place), *words)
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._programs.append(program)
        return program

    def build(self) -> None:
        self.ip("provider", "addr", "add", f"{PROVIDER_ADDRESS}/32", "dev", "lo")
        for number, site in enumerate(("a", "b", "c")):
            router = f"router-{site}"
            near, far = f"203.0.113.{4 * number + 1}", f"203.0.113.{4 * number + 2}"
            self.namespace(router)
            self.namespace(f"site-{site}")
            self._wire("provider", f"to-{site}", f"{near}/30", router, "wan", f"{far}/30")
            self._wire(router, "lan", "10.0.0.1/24", f"site-{site}", "eth0", f"{SITE}/24")
            self.ip(router, "route", "add", "default", "via", near)
            self.ip(f"site-{site}", "route", "add", "default", "via", "10.0.0.1")
            forward = int(site != "c")
            self.inside(router, "sh", "-c", f"echo {forward} > /proc/sys/net/ipv4/ip_forward")
            if forward:
                self.inside(router, "nft", "-f", "-", text=NAT)

    def namespace(self, place: str) -> None:
        self.run("ip", "netns", "add", self.name(place))
        self._namespaces.append(self.name(place))
        self.ip(place, "link", "set", "dev", "lo", "up")

    def _wire(self, one: str, one_name: str, one_address: str, other: str, other_name: str, address: str) -> None:
        peer = ("peer", "name", other_name, "netns", self.name(other))
        self.run("ip", "link", "add", one_name, "netns", self.name(one), "type", "veth", *peer)
        for place, device, own in ((one, one_name, one_address), (other, other_name, address)):
            self.ip(place, "addr", "add", own, "dev", device)
            self.ip(place, "link", "set", "dev", device, "up")

    def serve(self) -> None:
        Authority.open(self.folder, "provider")
        program = self.start("provider", sys.executable, str(SCRIPT), "serve", str(self.folder), "acme-us", "brit-uk")
        self.ports = read(program)

    def url(self, enterprise: str) -> str:
        return f"wss://{PROVIDER_ADDRESS}:{self.ports[enterprise]}/link"

    def dial(self, site: str, enterprise: str, *options: str, url: str = "") -> subprocess.Popen[str]:
        words = (str(SCRIPT), "dial", str(self.folder), enterprise, url or self.url(enterprise), *options)
        return self.start(f"site-{site}", sys.executable, *words)

    def proxy(self, name: str, port: int, *lines: str) -> str:
        """Start a proxy on the third site's router; return its URL."""
        config = self.folder / f"{name}.conf"
        config.write_text("\n".join([f"Port {port}", "Listen 10.0.0.1", "Timeout 60", "LogLevel Error", *lines, ""]))
        self.start("router-c", "tinyproxy", "-d", "-c", str(config))
        probe = f"until 2>/dev/null : < /dev/tcp/10.0.0.1/{port}; do sleep 0.05; done"
        self.inside("site-c", "bash", "-c", probe)
        return f"http://10.0.0.1:{port}"

    def stop(self, program: subprocess.Popen[str]) -> None:
        program.terminate()
        program.wait(10)

    def close(self) -> None:
        for program in self._programs:
            if program.poll() is None:
                program.kill()
            program.wait(10)
            assert program.stdout is not None
            program.stdout.close()
        for namespace in self._namespaces:
            self.run("ip", "netns", "del", namespace)


def read(program: subprocess.Popen[str]) -> dict[str, Any]:
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line, "the program has ended"
    answer: dict[str, Any] = json.loads(line)
    return answer


@pytest.fixture(scope="module")
def network(require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    for program in ("ip", "nft", "tinyproxy", "bash"):
        require_tool(program)
    network = Network(tmp_path_factory.mktemp("link"))
    try:
        try:
            network.namespace("provider")
        except RuntimeError as error:
            lack = f"network namespaces cannot be made here (they need root): {error}"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(lack)
        network.build()
        network.serve()
        yield network
    finally:
        network.close()


def test_a_site_behind_nat_is_reached_though_no_route_leads_there(network: Network) -> None:
    """R12: works behind NAT, without a VPN and without a public address; calls and channels go both ways."""
    with pytest.raises(RuntimeError, match="unreachable"):
        network.ip("provider", "route", "get", SITE)
    site = network.dial("a", "acme-us")
    linked = read(site)["linked"]
    assert linked["enterprise"] == "acme-us" and linked["sent"] and linked["reached_back"]
    assert linked["place"] == SITE and linked["seen_from"] == "203.0.113.2"
    assert site.wait(10) == 0


def test_two_enterprises_with_the_same_addresses_are_linked_at_the_same_time(network: Network) -> None:
    """R11: equal IP ranges."""
    sites = [network.dial("a", "acme-us", "--stay"), network.dial("b", "brit-uk", "--stay")]
    first, second = (read(site)["linked"] for site in sites)
    again = network.dial("a", "acme-us")
    assert read(again)["linked"]["together"] == 3
    assert (first["enterprise"], second["enterprise"]) == ("acme-us", "brit-uk")
    assert first["place"] == second["place"] == SITE
    assert (first["seen_from"], second["seen_from"]) == ("203.0.113.2", "203.0.113.6")
    assert all(linked["sent"] and linked["reached_back"] for linked in (first, second))
    for site in sites:
        network.stop(site)


def test_one_enterprises_certificate_opens_nothing_at_the_others_door(network: Network) -> None:
    """R11: an enterprise controls only its own."""
    site = network.dial("a", "acme-us", url=network.url("brit-uk"))
    failed = read(site)
    assert failed["kind"] == "ForbiddenError" and "opens nothing" in failed["failed"]


def test_a_link_that_the_nat_forgets_is_noticed_and_dialled_again(network: Network) -> None:
    """R12: packets vanish without a word; both ends notice, and the site comes back."""
    site = network.dial("a", "acme-us", "--stay")
    assert read(site)["linked"]["sent"]
    network.inside("router-a", "nft", "-f", "-", text=STALL)
    try:
        assert "nothing came for 1 s" in read(site)["closed"]
    finally:
        network.inside("router-a", "nft", "delete", "table", "ip", "stall")
    answer = read(site)
    while "failed" in answer:
        answer = read(site)
    assert answer["linked"]["sent"] and answer["linked"]["together"] == 1, "the old session is gone at the provider too"
    network.stop(site)


def test_a_site_whose_only_way_out_is_an_http_proxy_is_linked(network: Network) -> None:
    """R12: CONNECT; TLS and the certificates stay end to end."""
    port = network.ports["acme-us"]
    direct = f"timeout 1 bash -c ': < /dev/tcp/{PROVIDER_ADDRESS}/{port}'"
    with pytest.raises(RuntimeError):
        network.inside("site-c", "bash", "-c", direct)
    open_proxy = network.proxy("open", 8888)
    linked = read(network.dial("c", "acme-us", open_proxy))["linked"]
    assert linked["enterprise"] == "acme-us" and linked["sent"] and linked["reached_back"]
    assert linked["seen_from"] == "203.0.113.10", "the provider sees the proxy"


def test_a_proxy_that_refuses_or_wants_a_password_is_told_apart_from_the_provider(network: Network) -> None:
    closed = network.proxy("closed", 8889, "ConnectPort 443")
    failed = read(network.dial("c", "acme-us", closed))
    assert failed["kind"] == "ConnectionRefusedError" and "proxy" in failed["failed"] and "403" in failed["failed"]
    guarded = network.proxy("guarded", 8890, "BasicAuth site secret-word")
    failed = read(network.dial("c", "acme-us", guarded))
    assert "407" in failed["failed"]
    wrong = guarded.replace("http://", "http://site:wrong-word@")
    failed = read(network.dial("c", "acme-us", wrong))
    assert "wrong-word" not in failed["failed"]
    right = guarded.replace("http://", "http://site:secret-word@")
    assert read(network.dial("c", "acme-us", right))["linked"]["sent"]
