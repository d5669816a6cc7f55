"""`/v1/orgs`."""

from __future__ import annotations

from litestar import Router, get, patch
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, Struct, UnsetType

from api.problems import declared
from api.requests import present
from db import organizations
from domain.ids import DEFAULT_ORG_PUBLIC_ID
from domain.resources import Organization


class UpdateOrganization(Struct, frozen=True, kw_only=True):
    """`default_model_id` is the model of whatever names none; null leaves it open."""

    name: str | UnsetType | None = UNSET
    default_model_id: str | UnsetType | None = UNSET


class OrganizationList(Struct, frozen=True, kw_only=True):
    data: list[Organization]
    total: int


@get("/", operation_id="list_organizations", summary="List organizations", responses=declared())
async def list_organizations() -> OrganizationList:
    """The caller's organizations."""
    return OrganizationList(data=[await organizations.get_organization(DEFAULT_ORG_PUBLIC_ID)], total=1)


@get("/{org:str}", operation_id="get_organization", summary="Get an organization", responses=declared())
async def get_organization(org: FromPath[str]) -> Organization:
    """With its defaults."""
    return await organizations.get_organization(org)


@patch("/{org:str}", operation_id="update_organization", summary="Update an organization", responses=declared(413))
async def update_organization(org: FromPath[str], data: JSONBody[UpdateOrganization]) -> Organization:
    """Turns see a new default model from the next one on."""
    return await organizations.update_organization(org, name=present(data.name), default_model_id=data.default_model_id)


router = Router(
    "/orgs",
    tags=["Organizations"],
    route_handlers=[list_organizations, get_organization, update_organization],
)
