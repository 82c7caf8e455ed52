"""A provider's configuration as its actors get it; ports; calls that are carried to an enterprise's manager."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from dr_cloud.actors.cluster import Placement
from dr_cloud.actors.https import split_listen
from dr_cloud.actors.ports import Ports
from dr_cloud.actors.settings import ProviderSettings, load_provider, locked
from dr_cloud.actors.up import tenants_of
from dr_cloud.model.errors import ConflictError, DrCloudError, LimitError
from dr_cloud.model.provider import Architecture

ROOT = Path(__file__).resolve().parents[2]


def settings_of(state: Path, **changes: Any) -> ProviderSettings:
    config = load_provider(ROOT / "infra" / "local.yaml", state).model_copy(update=changes)
    return ProviderSettings(config=config, placement=Placement(namespace="x", local=True))


def test_relative_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    config = load_provider(ROOT / "infra" / "local.yaml")
    assert config.state == ROOT / "build" / "provider"
    assert config.database == f"sqlite:///{ROOT}/build/provider/provider.db"
    assert config.data_centers[0].datastores[0].store == f"file://{ROOT}/build/provider/stores/us-east/ds-1"
    assert [tenant.name for tenant in tenants_of(config)] == ["acme-us", "brit-uk", "coral-apac"]
    moved = load_provider(ROOT / "infra" / "local.yaml", tmp_path / "p")
    assert moved.state == tmp_path / "p"
    assert moved.data_centers[0].datastores[0].store.startswith(f"file://{tmp_path}/p/stores/")


def test_absolute_stores_and_databases_stay(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "infra" / "local.yaml").read_text())
    document["database"] = "postgresql://dr@db/cloud"
    document["data_centers"][0]["datastores"][0]["store"] = "s3://bucket/prefix"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    config = load_provider(tmp_path / "p.yaml")
    assert config.database == "postgresql://dr@db/cloud"
    assert config.data_centers[0].datastores[0].store == "s3://bucket/prefix"


def test_a_path_too_long_for_sockets_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DrCloudError, match="too long"):
        load_provider(ROOT / "infra" / "local.yaml", tmp_path / ("x" * 80))


def test_only_managers_are_told_of_the_database(tmp_path: Path) -> None:
    """R7: the database's URL may hold a password: connectors and VDSAs do not get it."""
    settings = settings_of(tmp_path, database="postgresql://dr:secret@db/cloud")
    assert "secret" not in settings.without_database.model_dump_json()


def test_names_of_actors_never_meet(tmp_path: Path) -> None:
    """R12: hosts, data centers and enterprises with any names have actors of their own."""
    alone = settings_of(tmp_path, architecture=Architecture.VDSA_PER_ENTERPRISE)
    names = [
        alone.vdsa_name("a", "b-c", "d"),
        alone.vdsa_name("a-b", "c", "d"),
        alone.vdsa_name("a", "b", "c-d"),
        alone.vdsa_name("a", "b", ""),
    ]
    assert len(set(names)) == 4
    assert len({alone.node.socket(name) for name in names}) == 4
    shared = settings_of(tmp_path)
    assert shared.vdsa_name("a", "b", "c") == shared.vdsa_name("a", "b", "d")


def test_a_port_stays_its_enterprises(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        first = probe.getsockname()[1]
        settings = settings_of(tmp_path, link_ports=(first, first + 2))
        ports = Ports(settings)
        assert ports.of("acme") != first, "that one is in use"
        given = ports.of("acme")
        other = Ports(settings).of("brit")
        assert {given, other} == {first + 1, first + 2}
        with pytest.raises(LimitError, match="is free for another"):
            ports.of("coral")
        ports.give_back("brit")
        assert Ports(settings).of("coral") == other
        assert json.loads((tmp_path / "ports.json").read_text()) == {"acme": given, "coral": other}


@pytest.mark.parametrize("address", ["8440", "host:", ":8440", "host:x", "host:70000"])
def test_an_address_of_the_api_is_checked(address: str) -> None:
    with pytest.raises(DrCloudError, match="HOST:PORT"):
        split_listen(address)


def test_a_state_folder_is_one_providers(tmp_path: Path) -> None:
    with locked(tmp_path / "p"):
        assert (tmp_path / "p").stat().st_mode & 0o077 == 0
        with pytest.raises(ConflictError, match="another process"), locked(tmp_path / "p"):
            pass
    with locked(tmp_path / "p"):
        pass
