"""`dr-cloud provider`: the provider's own processes."""

from __future__ import annotations

from typing import Final

from dr_cloud.cli.lazy import group, lazy_group

COMMANDS: Final = {"up": "dr_cloud.cli.provider_up", "rebuild": "dr_cloud.cli.provider_rebuild"}
app = group("The provider's own processes.", lazy_group(COMMANDS))
