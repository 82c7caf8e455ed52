"""Who may do what: one table from roles to operations, and one from operations to what the rights manager is asked.

An operation's name is `noun.verb`. Whether the thing is the caller's at all is decided before (`tenancy`): another's
thing is "not found", whatever the role; what the role does not allow is "forbidden"; what policy does not allow is
"denied" (R13), by where the caller sits as well.
"""

from __future__ import annotations

from typing import Final

from dr_cloud.model.errors import ForbiddenError, NotFoundError
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.rights import Action

READ: Final = frozenset(
    {
        "enterprise.read",
        "site.read",
        "datacenter.read",
        "host.read",
        "server.read",
        "vpg.read",
        "checkpoint.read",
        "test.read",
        "task.read",
        "health.read",
        "event.read",
        "rights.read",
    }
)
_OPERATE: Final = READ | {
    "vpg.pause",
    "vpg.resume",
    "vpg.sync",
    "checkpoint.insert",
    "failover.start",
    "failover.commit",
    "failover.rollback",
    "test.start",
    "test.stop",
    "test.discard",
    "test.attach",
    "clean.find",
    "drill.put",
    "drill.remove",
    "drill.run",
    "task.abort",
    "logs.collect",
    "logs.read",
}
_ADMINISTER: Final = _OPERATE | {
    "audit.read",
    "decision.read",
    "token.read",
    "token.create",
    "token.revoke",
    "site.update",
    "site.pair",
    "site.unpair",
    "vdsa.deploy",
    "vdsa.undeploy",
    "vpg.create",
    "vpg.update",
    "vpg.remove",
    "failover.release",
}
_PROVIDER_OPERATE: Final = _OPERATE | {
    "site.pair",
    "vdsa.deploy",
    "vdsa.undeploy",
    "center.read",
    "policy.read",
}
_PROVIDER_ADMINISTER: Final = _ADMINISTER | {
    "enterprise.register",
    "enterprise.update",
    "enterprise.remove",
    "center.read",
    "center.deploy",
    "policy.read",
    "policy.apply",
}

ALLOWED: Final[dict[Role, frozenset[str]]] = {
    Role.PROVIDER_ADMIN: frozenset(_PROVIDER_ADMINISTER),
    Role.PROVIDER_OPERATOR: frozenset(_PROVIDER_OPERATE),
    Role.ENTERPRISE_ADMIN: frozenset(_ADMINISTER),
    Role.ENTERPRISE_OPERATOR: frozenset(_OPERATE),
    Role.AUDITOR: READ | {"audit.read", "decision.read", "policy.read", "token.read"},
}

ASKED: Final[dict[str, Action]] = {
    "checkpoint.read": Action.READ,
    "test.read": Action.READ,
    "test.attach": Action.READ,
    "logs.collect": Action.LOGS,
    "logs.read": Action.LOGS,
    "test.start": Action.TEST,
    "clean.find": Action.TEST,
    "drill.run": Action.TEST,
    "failover.start": Action.FAIL_OVER,
} | dict.fromkeys(
    (
        "vpg.create",
        "vpg.update",
        "vpg.remove",
        "vpg.pause",
        "vpg.resume",
        "vpg.sync",
        "checkpoint.insert",
        "failover.commit",
        "failover.rollback",
        "failover.release",
        "test.stop",
        "test.discard",
        "drill.put",
        "drill.remove",
        "task.abort",
        "site.update",
        "site.pair",
        "site.unpair",
        "vdsa.deploy",
        "vdsa.undeploy",
        "token.create",
        "token.revoke",
    ),
    Action.OPERATE,
)
"""What the rights manager is asked, with the place of the person, when an operation is on an enterprise's things.

The others neither show an enterprise's data nor act on its protection: names, states, alerts."""
OF_OWN_PEOPLE: Final = frozenset({"token.create", "token.revoke"})
"""Asked of an enterprise's own people only, who would else lend each other their places. The first token of an
enterprise comes from the provider, whose people may sit anywhere; it is in the audit log and in the list of tokens."""

OF_PROVIDER: Final = frozenset({Role.PROVIDER_ADMIN, Role.PROVIDER_OPERATOR})
OF_ENTERPRISE: Final = frozenset({Role.ENTERPRISE_ADMIN, Role.ENTERPRISE_OPERATOR})


def check_owner(who: Principal, enterprise: str) -> None:
    """Raise `NotFoundError` if `enterprise` is not one that the caller may see."""
    if who.enterprise is not None and who.enterprise != enterprise:
        raise no_enterprise(enterprise)


def check_role(who: Principal, operation: str) -> None:
    """Raise `ForbiddenError` if the caller's role does not allow the operation."""
    if operation not in ALLOWED[who.role]:
        able = [role.value for role, allowed in ALLOWED.items() if operation in allowed]
        raise ForbiddenError(f"the role {who.role.value} does not allow {operation}", f"Ask {' or '.join(able)}.")


def no_enterprise(enterprise: str) -> NotFoundError:
    """Return the error for an enterprise that is not there, or not the caller's."""
    return NotFoundError(f"there is no enterprise {enterprise!r}", "Check the name.")
