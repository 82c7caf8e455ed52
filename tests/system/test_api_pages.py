"""Ten thousand protection groups, page by page over TLS. The time of a page is printed and recorded, not judged."""

from __future__ import annotations

import ssl
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from api_world import ApiWorld
from sqlalchemy import insert, select

from dr_cloud.actors.https import ApiServer
from dr_cloud.manager import tables
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.seal.authority import Authority

pytestmark = pytest.mark.system
COUNT = 10_000


def multiply(world: ApiWorld) -> None:
    """Give `brit` so many copies of one of its groups, each with its target, server and disk."""
    original = world.names_b["vpg"]
    parts = [
        (tables.Vpg.__table__, "name"),
        (tables.VpgTarget.__table__, "vpg"),
        (tables.VpgMember.__table__, "vpg"),
        (tables.VpgDisk.__table__, "vpg"),
    ]
    with world.cloud._database.write(EVERYONE) as session:
        for table, key in parts:
            wanted = select(table).where(table.c.enterprise == "brit", table.c[key] == original)
            rows = [dict(row) for row in session.execute(wanted).mappings()]
            assert rows
            copies = [{**row, key: f"copy-{number:05d}"} for number in range(COUNT) for row in rows]
            session.execute(insert(table), copies)


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], httpx.Response]]:
    folder = tmp_path_factory.mktemp("pages")
    with ExitStack() as stack:
        world = ApiWorld(folder / "state", stack)
        multiply(world)
        (folder / "tls").mkdir()
        credentials = Authority.open(folder / "tls", "provider").service_credentials("api", ["127.0.0.1"])
        server = ApiServer(world.app, "127.0.0.1", 0, credentials)
        stack.callback(server.close)
        client = httpx.Client(
            base_url=f"https://127.0.0.1:{server.port}",
            verify=ssl.create_default_context(cadata=credentials.ca),
            headers={"Authorization": f"Bearer {world.token_b}"},
        )
        yield stack.enter_context(client).get


@pytest.mark.parametrize("limit", [100, 1000])
def test_ten_thousand_groups_page_by_page(
    get: Callable[[str], httpx.Response], limit: int, record_property: Callable[[str, object], None]
) -> None:
    names: list[str] = []
    milliseconds: list[float] = []
    url = f"/v1/enterprises/-/vpgs?limit={limit}"
    while url and len(milliseconds) < 30:
        began = time.perf_counter()
        response = get(url)
        milliseconds.append((time.perf_counter() - began) * 1000)
        names += [vpg["name"] for vpg in response.json()["items"]]
        url = response.links.get("next", {}).get("url", "")
    assert names == sorted(set(names))
    assert len(names) == min(30 * limit, COUNT + 2)
    median, worst = statistics.median(milliseconds), max(milliseconds)
    print(f"\n{limit} groups a page: median {median:.1f} ms, worst {worst:.1f} ms over {len(milliseconds)} pages")
    record_property("milliseconds_median", median)


def test_the_last_page_is_as_near_as_the_first(get: Callable[[str], httpx.Response]) -> None:
    """By key, not by counting: what lies before is not read."""
    began = time.perf_counter()
    found = get("/v1/enterprises/-/vpgs?limit=100&name_begins=copy-099").json()
    print(f"\nby the beginning of its name: {(time.perf_counter() - began) * 1000:.1f} ms")
    assert [vpg["name"] for vpg in found["items"]] == [f"copy-{number:05d}" for number in range(9900, 10_000)]
