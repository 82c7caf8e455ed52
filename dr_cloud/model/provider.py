"""What a provider is made of, as its configuration tells it: data centers, hosts, datastores; and its enterprises.

`infra/local.yaml` is a `ProviderConfig`; each file in `tenants/` is an `EnterpriseConfig`. Both are data that people
write, so every record refuses what it does not know, and says where.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import check_name


def _checked(name: str) -> str:
    try:
        return check_name(name, "a")
    except DrCloudError as error:
        raise ValueError(f"{error}. {error.remedy}") from None


Name = Annotated[
    str,
    AfterValidator(_checked),
    Field(json_schema_extra={"pattern": r"^(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"}),
]
"""A name that may be a part of an object key (`dr_cloud.model.ids`)."""
Jurisdiction = Annotated[str, Field(pattern=r"^[A-Z]{2,8}(-[A-Z0-9]{1,8})*$")]
"""A code such as USA, UK, APAC, EU-DE."""


class Architecture(StrEnum):
    """How control and data paths are divided among enterprises (R12)."""

    MANAGER_PER_ENTERPRISE = "manager-per-enterprise"
    """A manager per enterprise, a VDSA per host."""
    VDSA_PER_ENTERPRISE = "vdsa-per-enterprise"
    """A manager per enterprise, a VDSA per enterprise and host."""
    CLOUD_CONNECTOR = "cloud-connector"
    """One manager, a VDSA per host, a connector per enterprise in the cloud."""
    PAIRED_CONNECTORS = "paired-connectors"
    """As before, with a second connector on the enterprise's side: works through NAT."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatastoreConfig(_Config):
    """A place of storage: where replicas and journals of VPGs that chose it lie."""

    name: Name
    store: str
    """URL of its object store: file:///directory or s3://bucket/prefix."""
    jurisdiction: Jurisdiction | None = None
    """Where the bytes lie, if that is not the data center's own jurisdiction: a bucket of a region elsewhere."""


class PoolConfig(_Config):
    """Datastores under one name, for tenants who are not to see which one is used."""

    name: Name
    datastores: list[Name] = Field(min_length=1)


class HostConfig(_Config):
    """One hypervisor."""

    name: Name
    datastores: list[Name] = Field(min_length=1)
    """Those it reaches."""
    address: str = "127.0.0.1"


class ClusterConfig(_Config):
    """Hosts under one name, for tenants who are not to see which one is used."""

    name: Name
    hosts: list[Name] = Field(min_length=1)


class DataCenterConfig(_Config):
    """One of the provider's sites. It lies in one jurisdiction."""

    name: Name
    jurisdiction: Jurisdiction
    location: str = ""
    contact: str = ""
    datastores: list[DatastoreConfig] = Field(min_length=1)
    pools: list[PoolConfig] = []
    hosts: list[HostConfig] = Field(min_length=1)
    clusters: list[ClusterConfig] = []
    keys: Jurisdiction | None = None
    """Where the keys are held that open what lies here; None: in the data center's own jurisdiction."""
    idle_stacks: int | None = Field(default=None, ge=0)
    """Stack actors kept ready here; None is what the provider says for all."""
    stacks: str = ""
    """Host name or IP address on which the disks of remote tests are served over TLS; empty: there are no remote ones.

    Where stacks run on several nodes, `*`: each serves on its own address, by which Ray knows it.
    """

    @model_validator(mode="after")
    def _refers_to_itself(self) -> DataCenterConfig:
        stores = {datastore.name for datastore in self.datastores}
        hosts = {host.name for host in self.hosts}
        holders: list[tuple[str, list[str], set[str]]] = [
            *((pool.name, pool.datastores, stores) for pool in self.pools),
            *((host.name, host.datastores, stores) for host in self.hosts),
            *((cluster.name, cluster.hosts, hosts) for cluster in self.clusters),
        ]
        for name, parts, known in holders:
            if missing := set(parts) - known:
                raise ValueError(f"{name} of {self.name} names {min(missing)}, which is not listed")
        places = [store.name for store in self.datastores] + [pool.name for pool in self.pools]
        machines = [host.name for host in self.hosts] + [cluster.name for cluster in self.clusters]
        for kind, names in (("datastore or pool", places), ("host or cluster", machines)):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{self.name} has {kind} {min(twice)} twice")
        return self


class RightsConfig(_Config):
    """The rights manager (R13)."""

    engine: Literal["embedded", "opa"] = "embedded"
    """`embedded` evaluates the policies in process; `opa` asks an OPA server."""
    opa: str = ""
    """URL of the OPA server; empty: one is started here (the program `opa` must be on the PATH)."""
    policies: Path | None = None
    """Folder of the policies that are in force at the first start; None takes those that come with the product."""


class ProviderConfig(_Config):
    """A whole provider. Paths may be relative: they then count from the configuration's own folder."""

    name: Name = "provider"
    architecture: Architecture = Architecture.PAIRED_CONNECTORS
    state: Path = Path("state")
    """Folder of the provider's own files: database, keyring, certificates, sockets, caches."""
    database: str = ""
    """SQLAlchemy URL; empty means SQLite in `state`."""
    api: str = "127.0.0.1:8440"
    """HOST:PORT of the REST API (TLS). Port 0 takes any free one."""
    link_host: str = "127.0.0.1"
    """Where connectors listen; each enterprise's has a port of its own."""
    link_ports: tuple[int, int] = (8500, 8999)
    """First and last port of connectors; (0, 0) takes any free ones."""
    ray: str = "local"
    """`local` starts Ray here; else the address of a running cluster."""
    idle_stacks: int = Field(default=2, ge=0)
    """Stack actors kept ready in each data center that does not say otherwise."""
    untested_days: int = Field(default=30, ge=0)
    """After how many days without a passed recovery test there is an alert about a VPG; 0: never."""
    kernel_mounts: bool = True
    """Whether probes may have the nodes' own kernels mount file systems of tenants: docs/probes.md tells the risk."""
    operators: Jurisdiction | None = None
    """Where the first administrator sits; None: not told, and then no enterprise's data may be touched by it."""
    rights: RightsConfig = RightsConfig()
    tenants: Path | None = None
    """Folder of `EnterpriseConfig` files that are registered at the start."""
    data_centers: list[DataCenterConfig] = Field(min_length=1)

    def data_center(self, name: str) -> DataCenterConfig | None:
        """Return the data center of that name, if there is one."""
        return next((center for center in self.data_centers if center.name == name), None)


class SiteConfig(_Config):
    """One site of an enterprise, as the provider registers it."""

    name: Name
    jurisdiction: Jurisdiction
    location: str = ""
    contact: str = ""


class EnterpriseConfig(_Config):
    """A tenant, as the provider registers it."""

    name: Name
    title: str = ""
    owner: str = ""
    """Who owns it: enterprises of one owner are as far apart as any others."""
    jurisdiction: Jurisdiction
    sites: list[SiteConfig] = Field(min_length=1)


_C = TypeVar("_C", bound=BaseModel)


def load_yaml(path: Path, kind: type[_C]) -> _C:
    """Read a configuration file. Raises `DrCloudError` that names the file and the field."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise DrCloudError(f"{path} cannot be read: {error.strerror}", "Name an existing file.") from error
    except yaml.YAMLError as error:
        raise DrCloudError(f"{path} is no YAML: {error}", "Correct it at the line told.") from error
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DrCloudError(f"{path}: {where}: {first['msg']}", "Correct that field.") from None
