"""Which IP addresses may be connected to on behalf of a model: the guard against requests into our own network.

Decisions the code can't show:
- Tables of our own instead of `ipaddress.is_global`: what that says differs between patch releases of Python.
- IPv6 is an allow list (what is routed on the internet today), so that a range nobody has thought of is refused.
- Transition formats that hide an IPv4 address in an IPv6 one are judged by what they hide (mapped, NAT64), or refused outright
  where no site of today needs them (IPv4-compatible, 6to4, Teredo, ISATAP).
"""

from __future__ import annotations

from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from domain.network_patterns import Address


class Reach(Enum):
    PUBLIC = "public"
    PRIVATE = "private"
    """Somebody's own network: refused, unless the operator has opened the host."""
    NEVER = "never"
    """Nothing that a page could be fetched from, or a cloud's metadata service: no setting opens it."""


def _v4(*networks: str) -> tuple[IPv4Network, ...]:
    return tuple(map(IPv4Network, networks))


def _v6(*networks: str) -> tuple[IPv6Network, ...]:
    return tuple(map(IPv6Network, networks))


_METADATA_V4: Final = _v4(
    "100.100.100.200/32",  # Alibaba Cloud, in the range of carrier-grade NAT
    "168.63.129.16/32",  # Azure, a public address
    "169.254.0.0/16",  # link-local, where all others put 169.254.169.254 and its neighbours
    "192.0.0.192/32",  # Oracle Cloud
)
_METADATA_V6: Final = _v6(
    "fd00:ec2::/32",  # AWS: fd00:ec2::254, and its other local services
    "fd20:ce::/32",  # Google Cloud: fd20:ce::254
    "fd00:42::/32",  # Scaleway: fd00:42::42
)

_PRIVATE_V4: Final = _v4("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
_PRIVATE_V6: Final = _v6("::1/128", "fc00::/7")

_SPECIAL_V4: Final = _v4(
    "0.0.0.0/8",  # "this network"; Linux connects 0.0.0.0 to itself
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
_ROUTED_V6: Final = IPv6Network("2000::/3")
_SPECIAL_V6: Final = _v6(
    "2001::/23",  # protocol assignments, Teredo among them
    "2001:db8::/32",
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",
    "3fff::/20",
)
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
"""The well-known prefix only: DNS64 makes such addresses for ordinary public sites. A network's own prefix can't be known."""

_ISATAP_MARKS: Final = (0x0000_5EFE, 0x0200_5EFE)


def reach(address: Address) -> Reach:
    if isinstance(address, IPv6Address):
        return _reach_v6(address)
    if _within(address, _METADATA_V4):
        return Reach.NEVER
    if _within(address, _PRIVATE_V4):
        return Reach.PRIVATE
    return Reach.NEVER if _within(address, _SPECIAL_V4) else Reach.PUBLIC


def _reach_v6(address: IPv6Address) -> Reach:
    if address in _MAPPED or address in _NAT64:
        return reach(IPv4Address(int(address) & 0xFFFF_FFFF))
    if _within(address, _METADATA_V6):
        return Reach.NEVER
    if _within(address, _PRIVATE_V6):
        return Reach.PRIVATE
    if address not in _ROUTED_V6 or _within(address, _SPECIAL_V6):
        return Reach.NEVER
    is_isatap = (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP_MARKS
    return Reach.NEVER if is_isatap else Reach.PUBLIC


def _within(address: Address, networks: tuple[IPv4Network, ...] | tuple[IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)
