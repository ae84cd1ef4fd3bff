"""The composition root: the only file that knows all others.

`create_app` builds one worker's gateway from its settings. Nothing connects while it is built: MongoDB, Redis and
every backend may be down, the worker serves all the same and readiness says what is missing.
"""

import asyncio
import contextlib
import datetime as dt
import gc
import logging
import os
import random
import sys
import time
from functools import partial
from typing import Any

import msgspec
from sanic import Sanic

from lucid import logs
from lucid.blueprints import access, answers, auth, docs, health, meta, rate_limits, sessions, users
from lucid.blueprints import api_keys as api_keys_routes
from lucid.clusters import backend_answers, balancer_of, breaker_of, client_of, fetch
from lucid.core.gateway import Gateway
from lucid.core.policy import Policy
from lucid.core.rules.addresses import TrustedProxies
from lucid.core.rules.breaker import CircuitBreaker
from lucid.core.rules.cors import Cors
from lucid.core.rules.framing import MAX_HEAD_BYTES
from lucid.core.rules.keys import KeyMemory
from lucid.core.rules.routes import Route, RouteTable
from lucid.core.rules.tokens import TokenMemory
from lucid.core.security.jwt import TokenIssuer, TokenVerifier
from lucid.core.wire.access_log import AccessLog, write_to
from lucid.core.wire.connection import DRAIN_IDLE_SECONDS, Wire
from lucid.core.wire.control_channel import ControlChannel
from lucid.core.wire.health import Check, HealthMonitor
from lucid.core.wire.lease_store import LeaseStore
from lucid.core.wire.pool import Balancer
from lucid.core.wire.redis_link import RedisLink, new_holder
from lucid.core.wire.tasks import Tasks
from lucid.database.api_key_repository import ApiKeyRepository
from lucid.database.connection import Connection
from lucid.database.indexes import Indexes
from lucid.database.refresh_token_repository import RefreshTokenRepository
from lucid.database.session_repository import SessionRepository
from lucid.database.user_repository import UserRepository
from lucid.openapi import document
from lucid.services.api_key_service import ApiKeyService
from lucid.services.auth_cluster import AuthCluster
from lucid.services.auth_service import AuthService
from lucid.services.challenges import Challenges
from lucid.services.cluster_logins import ClusterLogins
from lucid.services.credentials import Credentials
from lucid.services.login_delays import LoginDelays
from lucid.services.password_hashing import PasswordHashing
from lucid.services.rate_limit_service import RateLimitService
from lucid.services.revocation_watch import RevocationWatch
from lucid.services.revocations import Revocations
from lucid.services.session_outbox import SessionOutbox
from lucid.services.session_service import SessionService
from lucid.services.signing_keys import SigningKeys
from lucid.services.unbroken import Unbroken
from lucid.services.user_proofs import UserProofs
from lucid.services.user_service import UserService
from lucid.settings import Settings
from lucid.settings.limits import named_limits

SWEEP_SECONDS = 0.25
FLUSH_SECONDS = 0.5
DRAIN_NOTICE_SECONDS = 0.5
"""Between failing readiness and refusing to keep connections: what is on its way still gets its answer."""
KEY_USES_SECONDS = 60.0
FIRST_LOOK_SECONDS = 1.0
"""So long a worker that starts waits for what MongoDB knows to be revoked. It serves without, too."""
REMEMBERED_TOKENS = 50_000

_log = logging.getLogger("lucid.app")


def create_app(settings: Settings) -> Sanic[Any, Any]:
    """One worker's application, to be served with `GatewayProtocol`."""
    logs.set_up(settings.server)
    app: Sanic[Any, Any] = Sanic("lucid", configure_logging=False)
    app.config.update(
        {
            "AUTO_EXTEND": False,
            "ACCESS_LOG": False,
            "REAL_IP_HEADER": None,
            "REQUEST_MAX_HEADER_SIZE": MAX_HEAD_BYTES,
            "FALLBACK_ERROR_FORMAT": "json",
        }
    )

    # --- what is known and what is decided: core/rules, core/policy ---
    limits = named_limits(settings.rates)
    backends = {backend.name: balancer_of(backend) for backend in settings.backends}
    breakers = {backend.name: breaker_of(backend.name, settings) for backend in settings.backends}
    signing_keys = SigningKeys(settings.tokens.jwks_url, fetch)
    verifier = TokenVerifier(
        settings.tokens, foreign_issuers=settings.auth_service_issuers, may_fetch=signing_keys.may_fetch
    )
    tokens = TokenMemory(
        verifier.verify, time.time, REMEMBERED_TOKENS, leeway_seconds=settings.tokens.leeway_seconds
    )
    signing_keys.attach(verifier, tokens)
    keys = KeyMemory()
    cors = Cors(settings.server.cors_origins, settings.server.cors_allow_credentials)
    own = access.own_routes(limits)
    routes = RouteTable.build((*own, *(Route.from_settings(route) for route in settings.routes)))

    # --- what has a socket: core/wire, database ---
    holder = new_holder()
    redis = RedisLink(settings.stores.redis_uri)
    control = ControlChannel(redis, holder)
    leases = LeaseStore(redis, holder, control, fleet_told=settings.rates.fleet)
    mongodb = Connection(settings.stores.mongodb_uri)
    auth_balancer = balancer_of(settings.auth_service) if settings.auth_service else None
    auth_breaker = breaker_of("auth-service", settings)
    indexes = Indexes(mongodb)

    # --- what people and operators do: services ---
    named = {limit.name: limit for route in routes.routes for limit in route.limits}
    rate_limit_service = RateLimitService(leases, {**named, **limits})
    accounts = UserRepository(mongodb, indexes)
    logins = RefreshTokenRepository(mongodb)
    api_keys = ApiKeyRepository(mongodb, indexes)
    records = SessionRepository(mongodb)
    revocations = Revocations(
        redis.commands, tokens, partial(control.publish, "revocation"), time.time, keys, logins.count_untold
    )
    control.subscribe("revocation", revocations.on_revocation, revocations.load_revocations)
    admins = settings.server.admin_tron_addresses
    challenges = Challenges(redis.commands, settings.server.public_origin, time.time)
    delays, unbroken = LoginDelays(redis.commands), Unbroken()
    # Apart, so that a flood of registrations keeps nobody from logging in.
    hashing, hashing_anew = PasswordHashing(), PasswordHashing(most_at_once=1, most_waiting=16)
    cluster = _auth_cluster(settings, auth_balancer, auth_breaker)
    credentials = Credentials(
        users=accounts,
        api_keys=api_keys,
        memory=tokens,
        settings=settings.tokens,
        admin_addresses=admins,
        cluster=cluster,
        fetch_keys=signing_keys.load_for_unknown if settings.tokens.jwks_url else None,
        remembered=keys,
    )
    cluster_logins = None
    if cluster is not None:
        cluster_logins = ClusterLogins(
            cluster,
            users=accounts,
            refresh_tokens=logins,
            challenges=challenges,
            revocations=revocations,
            charge=rate_limit_service.charge,
        )
    auth_service = AuthService(
        users=accounts,
        refresh_tokens=logins,
        challenges=challenges,
        revocations=revocations,
        hashing=hashing,
        delays=delays,
        issuer=TokenIssuer(settings.tokens),
        settings=settings.tokens,
        admin_addresses=admins,
        charge=rate_limit_service.charge,
        cluster=cluster_logins,
        unbroken=unbroken,
    )
    proofs = UserProofs(
        users=accounts,
        challenges=challenges,
        passwords=hashing_anew,
        delays=delays,
        unbroken=unbroken,
    )
    user_service = UserService(
        users=accounts,
        refresh_tokens=logins,
        api_keys=api_keys,
        revocations=revocations,
        proofs=proofs,
        passwords=hashing_anew,
        unbroken=unbroken,
        admin_addresses=admins,
        wall_clock=time.time,
        registration=cluster is None,
    )
    api_key_service = ApiKeyService(
        api_keys=api_keys,
        users=accounts,
        revocations=revocations,
        admin_addresses=admins,
        wall_clock=time.time,
        unbroken=unbroken,
    )
    session_cluster = client_of(backends["sessions"], breakers["sessions"])
    outbox = SessionOutbox(records, session_cluster)
    session_service = SessionService(records, outbox)
    watch = RevocationWatch(
        revocations=revocations,
        refresh_tokens=logins,
        users=accounts,
        api_keys=api_keys,
        silent_seconds=control.silent_seconds,
        token_seconds=settings.tokens.access_minutes * 60 + settings.tokens.leeway_seconds,
        wall_clock=time.time,
        monotonic=time.monotonic,
    )

    # --- a request's life: core/gateway ---
    policy = Policy(
        routes=routes,
        tiers=[limits[name] for name in ("public", "authenticated", "admin") if name in limits],
        tokens=tokens,
        keys=keys,
        leases=leases.leases,
        breakers=breakers,
        cors=cors,
        proxies=TrustedProxies(settings.server.trusted_networks, settings.server.trusted_hops),
        jitter=random.random,
    )
    secure = bool(settings.server.tls_cert_file)
    access_log = AccessLog(
        write=write_to(sys.stderr.fileno()), utc_now=_utc_now, text=settings.server.log_format == "text"
    )
    gateway = Gateway(
        policy,
        cors=cors,
        keys=keys,
        tokens=tokens,
        admit=leases.admit,
        look_up=credentials.look_up,
        recorder=access_log,
        monotonic=time.monotonic,
        utc_now=_utc_now,
        random_bytes=os.urandom,
        secure=secure,
    )
    wire = app.ctx.wire = Wire(gateway, backends, scheme="https" if secure else "http")

    # --- HTTP for people: blueprints ---
    checks: dict[str, Check] = {"mongodb": mongodb.ping, "redis": partial(_redis_answers, redis)}
    for backend in settings.backends:
        checks[backend.name] = partial(
            backend_answers, backend, backends[backend.name], breakers[backend.name]
        )
    if settings.auth_service and auth_balancer:
        checks["auth-service"] = partial(backend_answers, settings.auth_service, auth_balancer, auth_breaker)
    monitor = HealthMonitor(checks)
    tasks = Tasks()
    serving = False

    def readiness() -> tuple[bool, list[str]]:
        # Cut off from both stores, it accepts tokens that it cannot know to be revoked.
        missing = [*monitor.missing(), *(["revocations"] if watch.blind else [])]
        if leases.troubled and "redis" not in missing:
            # Redis answers, and yet does not do what limits need.
            missing.append("limits")
        return serving and not wire.draining, missing

    answers.install(app, gateway)
    resources = (
        health.resource(monitor.dependencies, readiness),
        meta.resource(),
        auth.resource(auth_service, credentials),
        users.resource(user_service),
        api_keys_routes.resource(api_key_service),
        sessions.resource(session_service),
        rate_limits.resource(rate_limit_service),
    )
    operations = [operation for resource in resources for operation in resource.operations]
    app.ctx.openapi = msgspec.json.encode(document([*operations, *docs.OPERATIONS], own))
    app.blueprint([*(resource.blueprint for resource in resources), docs.blueprint(app.ctx.openapi)])

    # --- a worker's life ---
    async def start(_: Sanic[Any, Any]) -> None:
        nonlocal serving
        await control.start()
        await leases.start()
        # What Redis did not tell MongoDB does, before the first request: a worker that starts remembers nothing.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                await watch.look()
        tasks.every("sweep", SWEEP_SECONDS, lambda: wire.sweep(time.monotonic()))
        tasks.every("access log", FLUSH_SECONDS, access_log.flush)
        tasks.start("health", monitor.run)
        tasks.start("indexes", indexes.keep_trying)
        tasks.start("revocations", watch.watch)
        tasks.start("session outbox", outbox.run)
        tasks.every("uses of API keys", KEY_USES_SECONDS, credentials.flush_key_uses)
        if settings.tokens.jwks_url:
            tasks.start("signing keys", signing_keys.keep_fresh)
        # What was imported and built lives as long as the worker: no collection need ever look at it again.
        gc.collect()
        gc.freeze()
        serving = True

    async def drain(_: Sanic[Any, Any]) -> None:
        nonlocal serving
        serving = False
        await asyncio.sleep(DRAIN_NOTICE_SECONDS)
        wire.drain()
        await asyncio.sleep(DRAIN_IDLE_SECONDS + SWEEP_SECONDS)

    async def stop(_: Sanic[Any, Any]) -> None:
        await tasks.stop()
        await unbroken.drain()
        hashing.close()
        hashing_anew.close()
        await outbox.stop()
        await credentials.flush_key_uses()
        await leases.stop()
        await control.stop()
        await session_cluster.aclose()
        if cluster is not None:
            await cluster.aclose()
        for balancer in (*backends.values(), *([auth_balancer] if auth_balancer else [])):
            balancer.close()
        mongodb.close()
        await redis.close()
        access_log.flush()

    app.register_listener(start, "before_server_start")
    app.register_listener(drain, "before_server_stop")
    app.register_listener(stop, "after_server_stop")
    return app


def _auth_cluster(
    settings: Settings, balancer: Balancer | None, breaker: CircuitBreaker
) -> AuthCluster | None:
    if balancer is None:
        return None
    return AuthCluster(
        client_of(balancer, breaker),
        issuers=settings.auth_service_issuers,
        retry_after=lambda: breaker.retry_after(time.monotonic()),
    )


async def _redis_answers(redis: RedisLink) -> bool:
    return bool(await redis.commands.ping())


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
