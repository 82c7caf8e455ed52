"""Enterprises and tokens.

A token's secret is 32 random bytes, shown once; the database has its SHA-256. It is scoped by role and enterprise,
expires, and can be revoked. Registering an enterprise makes its key in the provider's keyring and starts its connector;
removing one needs that it has no VPG, ends its tokens and certificates, and keeps the key: what it sealed may still be
wanted.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from typing import Final

from sqlalchemy import bindparam, delete, select, update

from dr_cloud.manager import tables
from dr_cloud.manager.access import OF_ENTERPRISE, OF_PROVIDER, no_enterprise
from dr_cloud.manager.callers import Callers
from dr_cloud.manager.operations import Context, Operations, missing
from dr_cloud.manager.paging import paged
from dr_cloud.manager.registry import RESERVED_NAMES
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, plain
from dr_cloud.model.cloud import Enterprise, EnterpriseUpdate, NewToken, Page, PageRequest, Token, TokenRequest
from dr_cloud.model.errors import ConflictError, ForbiddenError, InvalidError, UnauthenticatedError
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.provider import EnterpriseConfig
from dr_cloud.model.units import SECOND_NS

_SECRET_PREFIX: Final = "drt1."
_USED_EVERY_NS: Final = 60 * SECOND_NS
"""`last_used_ns` is written at most this often."""
_TOKENS: Final = tables.Base.metadata.tables[tables.Token.__tablename__]
_FIND_TOKEN: Final = select(_TOKENS).where(_TOKENS.c.digest == bindparam("whose"))


def hashed(secret: str) -> str:
    """Return what is kept of a secret. It has 256 random bits, so a plain hash will do."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Enterprises(Operations):
    """Operations on enterprises and tokens."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._callers = Callers(context.clock_ns)

    def register_enterprise(self, who: Principal, config: EnterpriseConfig) -> Enterprise:
        """Register a tenant with its sites."""
        with self._change(who, "enterprise.register", PROVIDER, f"enterprise {config.name}") as change:
            if config.name in RESERVED_NAMES or config.name == self._context.config.name:
                raise InvalidError(f"no enterprise can be called {config.name!r}", "Choose another name.")
            if any(center.name == site.name for center in self._context.config.data_centers for site in config.sites):
                raise InvalidError("a site has the name of a data center", "Choose another name for the site.")
            if change.session.get(tables.Enterprise, config.name) is not None:
                raise ConflictError(f"enterprise {config.name!r} exists already", "Choose another name.")
            row = tables.Enterprise(
                enterprise=config.name,
                title=config.title,
                owner=config.owner,
                jurisdiction=config.jurisdiction,
                created_ns=change.now_ns,
                link="",
            )
            change.session.add(row)
            change.session.flush()
            for site in config.sites:
                change.session.add(tables.Site(enterprise=config.name, **site.model_dump()))
            change.session.flush()
            self._context.keyring.create(config.name)
            change.enterprise = config.name
            change.registry = True
            change.event("site", config.name, registered=True)
            if change.session.get(tables.DecisionHead, config.name) is None:  # one that was removed has left its own
                change.session.add(tables.DecisionHead(enterprise=config.name, number=0, hash=""))
            change.after += [self._context.policies.tell_facts, lambda: self._start_connector(config.name)]
            answer = change.done(_enterprise(row, sorted(site.name for site in config.sites)))
        return answer.model_copy(update={"link": self._link(config.name)})

    def enterprises(self, who: Principal, page: PageRequest = PageRequest()) -> Page[Enterprise]:
        """List the enterprises that the caller may see."""
        with self._read(who, "enterprise.read", None) as session:
            sites: dict[str, list[str]] = {}
            rows = session.execute(select(tables.Site.enterprise, tables.Site.name).order_by(tables.Site.name))
            for enterprise, name in rows.all():
                sites.setdefault(enterprise, []).append(name)
            return paged(
                session,
                select(tables.Enterprise),
                [tables.Enterprise.enterprise],
                page,
                lambda row: _enterprise(row, sites.get(row.enterprise, [])),
            )

    def enterprise(self, who: Principal, enterprise: str) -> Enterprise:
        """Return one enterprise."""
        with self._read(who, "enterprise.read", enterprise) as session:
            row = session.get_one(tables.Enterprise, enterprise)
            return _enterprise(row, list(session.scalars(select(tables.Site.name).order_by(tables.Site.name))))

    def update_enterprise(self, who: Principal, enterprise: str, update: EnterpriseUpdate) -> Enterprise:
        """Change what may be changed of an enterprise."""
        with self._change(who, "enterprise.update", enterprise, f"enterprise {enterprise}") as change:
            row = change.session.get_one(tables.Enterprise, enterprise)
            for name, value in update.model_dump(exclude_none=True).items():
                setattr(row, name, value)
            change.registry = True
            change.after.append(self._context.policies.tell_facts)
            sites = list(change.session.scalars(select(tables.Site.name).order_by(tables.Site.name)))
            return change.done(_enterprise(row, sites))

    def remove_enterprise(self, who: Principal, enterprise: str) -> None:
        """Remove an enterprise that has no VPG any more."""
        with self._change(who, "enterprise.remove", enterprise, f"enterprise {enterprise}") as change:
            session = change.session
            if (vpg := session.scalars(select(tables.Vpg.name).limit(1)).first()) is not None:
                raise ConflictError(f"{enterprise} has VPGs, {vpg!r} is one", "Remove them first.")
            session.execute(
                update(tables.Certificate)
                .where(tables.Certificate.revoked_ns.is_(None))
                .values(revoked_ns=change.now_ns)
            )
            for kind in (tables.Token, tables.Server, tables.Alert, tables.Idempotency):
                session.execute(delete(kind))
            session.delete(session.get_one(tables.Enterprise, enterprise))
            change.registry = True
            change.after += [
                self._callers.forget,
                self._context.policies.tell_facts,
                lambda: self._context.fabric.stop_connector(enterprise),
            ]

    def connector_started(self, enterprise: str, link: str) -> None:
        """Note where an enterprise's sites dial: its connector has started (again)."""
        with self._database.write(enterprise) as session:
            row = session.get(tables.Enterprise, enterprise)
            if row is None:
                raise no_enterprise(enterprise)
            row.link = link

    def _start_connector(self, enterprise: str) -> None:
        self.connector_started(enterprise, self._context.fabric.start_connector(enterprise))

    def _link(self, enterprise: str) -> str:
        with self._database.read(enterprise) as session:
            row = session.get(tables.Enterprise, enterprise)
            return row.link if row is not None else ""

    # Tokens.

    def create_token(self, who: Principal, request: TokenRequest) -> NewToken:
        """Make a token. Nobody can make one that may more than its maker, or that sees another enterprise."""
        owner = request.enterprise or PROVIDER
        with self._change(who, "token.create", owner, f"token {request.name}") as change:
            if request.role in OF_PROVIDER and request.enterprise is not None:
                raise InvalidError(f"{request.role.value} is a role of the provider", "Leave the enterprise out.")
            if request.role in OF_ENTERPRISE and request.enterprise is None:
                raise InvalidError(f"{request.role.value} is a role in an enterprise", "Name the enterprise.")
            if request.role is Role.PROVIDER_ADMIN and who.role is not Role.PROVIDER_ADMIN:
                raise ForbiddenError("only a provider's administrator can make another", "Ask one.")
            if request.enterprise is not None:
                place = change.session.get_one(tables.Enterprise, owner).jurisdiction
            else:
                # The first administrators are made by the provider itself; of later ones somebody has to say it.
                place = (self._context.config.operators or "") if who.place is None else ""
            secret = _SECRET_PREFIX + secrets.token_urlsafe(32)
            row = tables.Token(
                enterprise=owner,
                id=uuid.uuid4().hex,
                digest=hashed(secret),
                name=request.name,
                role=request.role.value,
                place=request.place or place,
                created_ns=change.now_ns,
                expires_ns=change.now_ns + request.lifetime_seconds * SECOND_NS,
            )
            change.session.add(row)
            change.registry = True
            return change.done(NewToken(token=_token(row), secret=secret))

    def tokens(self, who: Principal, enterprise: str | None, page: PageRequest = PageRequest()) -> Page[Token]:
        """List tokens, without their secrets; None: all that the caller may see."""
        with self._read(who, "token.read", enterprise) as session:
            keys = [tables.Token.created_ns, tables.Token.id]
            return paged(session, select(tables.Token), keys, page, _token)

    def revoke_token(self, who: Principal, token: str) -> Token:
        """End a token now."""
        with self._database.read(who.enterprise if who.enterprise is not None else EVERYONE) as session:
            found = session.scalars(select(tables.Token).where(tables.Token.id == token)).first()
        if found is None:
            raise missing("token", token)
        with self._change(who, "token.revoke", found.enterprise, f"token {found.name}") as change:
            row = change.session.get_one(tables.Token, (found.enterprise, token))
            if row.revoked_ns is None:
                row.revoked_ns = change.now_ns
            change.registry = True
            change.after.append(self._callers.forget)
            return change.done(_token(row))

    def known_caller(self, secret: str) -> Principal | None:
        """Return whose token it is, if that was proven a moment ago; at once, also on an event loop."""
        return self._callers.get(hashed(secret))

    def authenticate(self, secret: str) -> Principal:
        """Return whose token it is. Raises `UnauthenticatedError`."""
        now_ns, age = self._context.clock_ns(), self._callers.age
        with self._database.read(EVERYONE) as session:
            row = plain(session, EVERYONE).execute(_FIND_TOKEN, {"whose": hashed(secret)}).one_or_none()
        if row is None:
            raise UnauthenticatedError(
                "the token is not known", "Use a token that was made with: dr-cloud token create"
            )
        if row.revoked_ns is not None:
            raise UnauthenticatedError("the token has been revoked", "Ask for a new one.")
        if row.expires_ns <= now_ns:
            raise UnauthenticatedError("the token has expired", "Ask for a new one.")
        if row.last_used_ns is None or now_ns - row.last_used_ns >= _USED_EVERY_NS:
            with self._database.write(row.enterprise or EVERYONE) as session:
                used = session.get(tables.Token, (row.enterprise, row.id))
                if used is not None:
                    used.last_used_ns = now_ns
        who = Principal(
            id=row.id, name=row.name, role=Role(row.role), enterprise=row.enterprise or None, place=row.place
        )
        self._callers.put(row.digest, who, row.expires_ns, age)
        return who


def _enterprise(row: tables.Enterprise, sites: list[str]) -> Enterprise:
    return Enterprise(
        name=row.enterprise,
        title=row.title,
        owner=row.owner,
        jurisdiction=row.jurisdiction,
        created_ns=row.created_ns,
        sites=sites,
        link=row.link,
    )


def _token(row: tables.Token) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        role=Role(row.role),
        enterprise=row.enterprise or None,
        place=row.place,
        created_ns=row.created_ns,
        expires_ns=row.expires_ns,
        revoked_ns=row.revoked_ns,
        last_used_ns=row.last_used_ns,
    )
