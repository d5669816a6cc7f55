"""`/v1/durable`: the circuit breakers of models, for operators."""

from __future__ import annotations

from litestar import Router, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from msgspec import Struct

from api.links import ConfigView, resource_config
from api.problems import declared
from api.services import Services
from db import breaker_admin
from domain.resources import CircuitBreaker


class CircuitBreakerList(Struct, frozen=True, kw_only=True):
    data: list[CircuitBreaker]
    total: int


@get("/config", operation_id="durable_config", summary="Durable engine policies", responses=declared())
async def durable_config() -> ConfigView:
    """What the caller may do with the durable engine."""
    return resource_config("durable")


@get(
    "/circuit-breakers",
    operation_id="list_circuit_breakers",
    summary="List circuit breakers",
    responses=declared(),
)
async def list_circuit_breakers(services: NamedDependency[Services]) -> CircuitBreakerList:
    """Of the models that failed at some time, or whose breaker was forced. `key` is the model's id."""
    found = await breaker_admin.list_breakers(services.database.pool)
    return CircuitBreakerList(data=found, total=len(found))


@get(
    "/circuit-breakers/{key:str}",
    operation_id="get_circuit_breaker",
    summary="Get a model's circuit breaker",
    responses=declared(),
)
async def get_circuit_breaker(services: NamedDependency[Services], key: FromPath[str]) -> CircuitBreaker:
    """Closed, with counts of zero, for a model that never failed."""
    return await breaker_admin.get_breaker(services.database.pool, key)


@delete(
    "/circuit-breakers/{key:str}",
    operation_id="delete_circuit_breaker",
    summary="Reset a model's circuit breaker",
    status_code=200,
    responses=declared(),
)
async def delete_circuit_breaker(services: NamedDependency[Services], key: FromPath[str]) -> CircuitBreaker:
    """Forgets everything that was counted; the breaker is closed."""
    return await breaker_admin.delete_breaker(services.database.pool, key)


@post(
    "/circuit-breakers/{key:str}/close",
    operation_id="force_close_circuit_breaker",
    summary="Close a model's circuit breaker",
    status_code=200,
    responses=declared(),
)
async def force_close_circuit_breaker(services: NamedDependency[Services], key: FromPath[str]) -> CircuitBreaker:
    """Calls pass again, and counting begins anew."""
    return await breaker_admin.force_close(services.database.pool, key)


@post(
    "/circuit-breakers/{key:str}/open",
    operation_id="force_open_circuit_breaker",
    summary="Hold a model's circuit breaker open",
    status_code=200,
    responses=declared(),
)
async def force_open_circuit_breaker(services: NamedDependency[Services], key: FromPath[str]) -> CircuitBreaker:
    """No call passes until it is closed by hand; fallback models are called instead."""
    return await breaker_admin.force_open(services.database.pool, key)


router = Router(
    "/durable",
    tags=["Durable engine"],
    route_handlers=[
        durable_config,
        list_circuit_breakers,
        get_circuit_breaker,
        delete_circuit_breaker,
        force_close_circuit_breaker,
        force_open_circuit_breaker,
    ],
)
