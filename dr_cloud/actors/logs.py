"""What the provider's processes say: each into files of its own in the state folder, and one archive of them.

Layout
    `logs/<actor>/log.jsonl` and its former parts (`dr_cloud.site.logs`); `/` in an actor's name is written `+`. Stacks
    write none: what they say is in Ray's own logs. On a node with a state folder of its own they stay there.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from importlib.metadata import version
from typing import Final

from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.model.replication import LogRequest
from dr_cloud.site.logs import SiteLog, core_state

_FOLDER: Final = "logs"


def start_log(settings: ProviderSettings, actor: str) -> SiteLog:
    """Write what this process says into its files from now on."""
    return SiteLog.start(settings.config.state / _FOLDER / actor.strip("/").replace("/", "+"))


def provider_archive(settings: ProviderSettings, request: LogRequest) -> bytes:
    """Return the logs of the provider's processes as tar.gz. Blocks."""
    about = {
        "provider": settings.config.name,
        "version": version("dr-cloud"),
        "architecture": settings.config.architecture,
        "actors": settings.placement.names(),
        "request": request.model_dump(),
    }
    files = {"about.json": json.dumps(about, indent=1).encode()}
    if request.core:
        files["core.json"] = json.dumps(core_state(), indent=1, default=str).encode()
    for folder in sorted((settings.config.state / _FOLDER).iterdir()):
        if request.vdsa or not folder.name.startswith("vdsa+"):
            lines = "".join(SiteLog(folder).lines(request))
            files[f"{folder.name}.jsonl"] = lines.encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
            packed.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
