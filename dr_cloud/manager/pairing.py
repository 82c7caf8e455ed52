"""Pairing: how a site gets its certificate, keeps it, and loses it.

A pairing token's secret is used once, in one transaction with the certificate it buys. A site that crashed before it
kept the answer may send the very same request again until the token expires. Pairing a site again revokes what it had:
its old state is then of no use. A renewed certificate stands beside the old one until that expires.
"""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.enterprises import hashed
from dr_cloud.manager.operations import Operations, missing
from dr_cloud.manager.sites import site_view
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import NewPairing, Site
from dr_cloud.model.errors import ForbiddenError, InvalidError, UnauthenticatedError
from dr_cloud.model.pairing import PairAnswer, PairingToken, PairRequest, Renewal
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.units import SECOND_NS


class Pairings(Operations):
    """Operations on the pairing of sites."""

    def create_pairing(self, who: Principal, enterprise: str, site: str, lifetime_seconds: int = 3600) -> NewPairing:
        """Make a one-time token for a site."""
        if not 1 <= lifetime_seconds <= 30 * 86400:
            raise InvalidError("a pairing token lives 1 second to 30 days", "Choose a life in between.")
        with self._change(who, "site.pair", enterprise, f"site {site}") as change:
            if change.session.get(tables.Site, (enterprise, site)) is None:
                raise missing("site", site)
            secret = secrets.token_urlsafe(32)
            token = PairingToken(
                api=self._context.api_url,
                ca=self._context.authority.fingerprint,
                enterprise=enterprise,
                site=site,
                secret=secret,
            )
            expires_ns = change.now_ns + lifetime_seconds * SECOND_NS
            change.session.add(
                tables.Pairing(
                    enterprise=enterprise,
                    digest=hashed(secret),
                    site=site,
                    created_ns=change.now_ns,
                    expires_ns=expires_ns,
                )
            )
            return change.done(
                NewPairing(enterprise=enterprise, site=site, expires_ns=expires_ns, token=token.encode())
            )

    def pair(self, request: PairRequest) -> PairAnswer:
        """Give a site its certificate and its enterprise's key: the secret proves it. Raises `UnauthenticatedError`."""
        link = ""
        digest = hashed(request.secret)
        with self._database.read(request.enterprise) as session:
            known = session.get(tables.Pairing, (request.enterprise, digest))
        if known is None or known.site != request.site:
            raise UnauthenticatedError("the pairing token is not known here", "Ask for a new one for this site.")
        link = self._context.fabric.start_connector(request.enterprise)
        who = Principal(
            id="pairing",
            name=f"site {request.site}",
            role=Role.ENTERPRISE_ADMIN,
            enterprise=request.enterprise,
            place=None,
        )
        csr_digest = hashlib.sha256(request.csr.encode()).hexdigest()
        with self._change(who, "site.pair", request.enterprise, f"site {request.site}") as change:
            row = change.session.get_one(tables.Pairing, (request.enterprise, digest), with_for_update=True)
            if row.expires_ns <= change.now_ns:
                raise UnauthenticatedError("the pairing token has expired", "Ask for a new one.")
            if row.used_ns is None:
                row.used_ns, row.csr_digest = change.now_ns, csr_digest
                row.certificate, row.serial = self._issue(change.session, request, change.now_ns)
                change.registry = True
                change.event("site", request.site, paired=True)
                change.after.append(lambda: self._context.fabric.disconnect(request.enterprise, request.site))
            elif row.csr_digest != csr_digest or not self._valid(change.session, row.serial):
                raise UnauthenticatedError("the pairing token has been used", "Ask for a new one.")
            change.session.get_one(tables.Enterprise, request.enterprise).link = link
            answer = (row.certificate, row.serial)
        return PairAnswer(
            certificate=answer[0],
            ca=self._context.authority.certificate,
            link=link,
            enterprise_key=self._context.keyring.key(request.enterprise).hex(),
            serial=answer[1],
        )

    def _issue(self, session: Session, request: PairRequest, now_ns: int) -> tuple[str, str]:
        issued = self._context.authority.issue_site(request.csr, request.enterprise, request.site)
        _revoke(session, request.site, now_ns)
        session.add(_certificate(request.enterprise, request.site, issued.serial, now_ns))
        session.get_one(tables.Site, (request.enterprise, request.site)).certificate = issued.serial
        return issued.certificate, issued.serial

    @staticmethod
    def _valid(session: Session, serial: str) -> bool:
        found = session.scalars(select(tables.Certificate).where(tables.Certificate.serial == serial)).first()
        return found is not None and found.revoked_ns is None

    def unpair(self, who: Principal, enterprise: str, site: str) -> Site:
        """Take a site's certificates away; its link is closed at once."""
        with self._change(who, "site.unpair", enterprise, f"site {site}") as change:
            row = change.session.get(tables.Site, (enterprise, site))
            if row is None:
                raise missing("site", site)
            _revoke(change.session, site, change.now_ns)
            row.certificate = ""
            row.connected = False
            change.registry = True
            change.event("site", site, paired=False)
            change.after.append(lambda: self._context.fabric.disconnect(enterprise, site))
            return change.done(site_view(row))

    def renew(self, enterprise: str, site: str, serial: str, csr: str) -> Renewal:
        """Give a site that has a valid certificate the next one."""
        now_ns = self._context.clock_ns()
        self.check_certificate(enterprise, site, serial)
        issued = self._context.authority.issue_site(csr, enterprise, site)
        with self._database.write(enterprise) as session:
            session.add(_certificate(enterprise, site, issued.serial, now_ns))
            session.get_one(tables.Site, (enterprise, site)).certificate = issued.serial
            self._context.registry.touch(session, enterprise)
        self._context.registry.wake()
        return Renewal(certificate=issued.certificate, serial=issued.serial)

    def certificate_ok(self, serial: str) -> bool:
        """Return whether a site's certificate is one that was given and not revoked, and policy lets the site in."""
        with self._database.read(EVERYONE) as session:
            found = session.scalars(select(tables.Certificate).where(tables.Certificate.serial == serial)).first()
            if found is None or found.revoked_ns is not None:
                return False
            site = session.get(tables.Site, (found.enterprise, found.site))
            return site is not None and not site.denied

    def check_certificate(self, enterprise: str, site: str, serial: str) -> None:
        """Raise `ForbiddenError` unless `serial` is a certificate that this site holds."""
        with self._database.read(enterprise) as session:
            row = session.get(tables.Certificate, (enterprise, serial))
        if row is None or row.site != site or row.revoked_ns is not None:
            raise ForbiddenError(f"site {site} does not hold this certificate any more", "Pair it again.")


def _certificate(enterprise: str, site: str, serial: str, now_ns: int) -> tables.Certificate:
    return tables.Certificate(enterprise=enterprise, serial=serial, site=site, issued_ns=now_ns)


def _revoke(session: Session, site: str, now_ns: int) -> None:
    session.execute(
        update(tables.Certificate)
        .where(tables.Certificate.site == site, tables.Certificate.revoked_ns.is_(None))
        .values(revoked_ns=now_ns)
    )
