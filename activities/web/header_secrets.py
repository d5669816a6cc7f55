"""Secrets of a session in the headers of a request: put in at the last moment, and taken out of whatever comes back.

A model writes `{{secret:NAME}}` into a header's value and never sees what stands for it. It may have been talked into that by a
page, so it does not decide where a secret goes: the capability's configuration, which people write, names the places of each
secret, and nothing else does. Only header values take one: bodies and URLs are what servers store, log and show to others.

What comes back is searched for the secret as it is and in the encodings in which servers repeat what they were sent. A server
that wants to tell the model can find another one; it is one of those the secret was meant for.
"""

from __future__ import annotations

import base64
import html
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote, quote_plus

from activities.web.arguments import SECRET_NAME
from activities.web.network_rules import matches
from activities.web.targets import Target
from domain.capabilities import ToolError
from domain.network_patterns import parse_pattern
from domain.secret import Secret
from domain.session_storage import SessionStorage

MIN_SECRET_CHARACTERS: Final = 8
"""Of what is sent. A shorter text is found in pages by chance, and its absence there tells what it is."""
FILLED_MAX_CHARACTERS: Final = 8192

_PLACE: Final = re.compile(rf"\{{\{{secret:({SECRET_NAME})\}}\}}")
_ALMOST: Final = re.compile(r"\{\{\s*secret\s*:", re.IGNORECASE)
_LEFT_ALONE: Final = ("", "/", "-_.!~*'()", "/:@-._~!$&'()*+,;=", ";,/?:@&=+$-_.!~*'()#")
"""Besides letters and digits, by those who percent-encode: parts of queries and of paths, and browsers' two functions."""
_HEADER_VALUE: Final = re.compile(r"[!-~](?:[\t -~]*[!-~])?")


class SecretRefused(ToolError):
    """A request that would send a secret where it may not go"""


def mentions_secret(text: str) -> bool:
    """Whether a text names a secret, or was meant to."""
    return _ALMOST.search(text) is not None


class HeaderSecrets:
    """Those that the headers of one request name. Without any, every method leaves things as they are."""

    def __init__(self, secrets: Mapping[str, Secret], allowed: Mapping[str, Sequence[str]]) -> None:
        """`allowed` are patterns by the name of a secret. Raises `SecretRefused`."""
        for name, secret in secrets.items():
            _check_value(name, secret)
        self._secrets = secrets
        self._allowed = allowed
        self._forms = {name: _forms(secret.reveal()) for name, secret in secrets.items()}

    @classmethod
    async def named_in(
        cls, headers: Mapping[str, str], storage: SessionStorage, allowed: Mapping[str, Sequence[str]]
    ) -> HeaderSecrets:
        """Raises `SecretRefused`; storage's own `StorageProblem` goes through."""
        found: dict[str, Secret] = {}
        for header, value in headers.items():
            if mentions_secret(_PLACE.sub("", value)):
                raise SecretRefused(
                    f"`headers`: in `{header}` a secret is not named properly. Write it as {{{{secret:NAME}}}}, without spaces."
                )
            for name in _PLACE.findall(value):
                if name in found:
                    continue
                secret = await storage.get_secret(name)
                if secret is None:
                    raise SecretRefused(
                        f"This session has no secret `{name}`. Ask the user to set it over the API, and not to write its value "
                        "into the conversation."
                    )
                found[name] = secret
        return cls(found, allowed)

    def check(self, target: Target, addresses: Sequence[str], headers: Mapping[str, str]) -> None:
        """Before each hop, with the addresses it will go to. Raises `SecretRefused`."""
        for value in headers.values():
            for name in _PLACE.findall(value):
                self._check_place(name, target, addresses)

    def _check_place(self, name: str, target: Target, addresses: Sequence[str]) -> None:
        patterns = [pattern for text in self._allowed.get(name, ()) if (pattern := parse_pattern(text)) is not None]
        named = [pattern for pattern in patterns if pattern.host != "*" and not pattern.subdomains_only]
        if not any(matches(pattern, target, in_doubt=False) for pattern in named):
            raise SecretRefused(
                f"The secret `{name}` may not be sent to {target.scheme}://{target.host_header}, or not to this path of it. "
                "Whoever configures this session can allow it, in the configuration of the capability `web_fetch`: "
                f'{{"secrets": {{"{name}": ["https://{target.host_header}"]}}}}. Nothing was sent there.'
            )
        if target.scheme != "https" and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
            raise SecretRefused(f"The secret `{name}` is sent over https:// only. Nothing was sent to `{target.host}`.")

    def filled(self, headers: Mapping[str, str]) -> dict[str, str]:
        """For the connection and nothing else. Raises `SecretRefused`."""
        done = {
            header: _PLACE.sub(lambda match: self._secrets[match[1]].reveal(), value)
            for header, value in headers.items()
        }
        for header, value in done.items():
            if value != headers[header] and len(header) + len(value) > FILLED_MAX_CHARACTERS:
                raise SecretRefused(
                    f"`headers`: with its secret, `{header}` is longer than {FILLED_MAX_CHARACTERS:,} characters."
                )
        return done

    @property
    def longest_form_bytes(self) -> int:
        """What may be missing at the end of a body that was cut, so that a part of a secret is not recognized."""
        return max((len(form) for forms in self._forms.values() for form in forms), default=0)

    def hidden(self, data: bytes) -> bytes:
        """With `[secret NAME]` wherever one of the secrets stands, in upper or lower case."""
        for name, forms in self._forms.items():
            shown = f"[secret {name}]"
            for form in forms:
                data = _replaced(data, form, shown.encode("utf-16-le" if b"\0" in form else "ascii"))
        return data

    def hidden_text(self, text: str) -> str:
        if not self._forms:
            return text
        data = text.encode("utf-8", "surrogatepass")
        hidden = self.hidden(data)
        return text if hidden is data else hidden.decode("utf-8", "surrogatepass")


def _check_value(name: str, secret: Secret) -> None:
    text = secret.reveal()
    if not _HEADER_VALUE.fullmatch(text):
        raise SecretRefused(
            f"The secret `{name}` can't stand in a header: it holds a line break, begins or ends with white space, or is not "
            "printable ASCII. It has to be set again without that; a line break at the end is a common mistake."
        )
    if len(text) < MIN_SECRET_CHARACTERS:
        raise SecretRefused(
            f"The secret `{name}` is too short to be kept out of answers: {MIN_SECRET_CHARACTERS} characters are needed."
        )


def _forms(secret: str) -> tuple[bytes, ...]:
    """How a secret may come back, in lower case and the longest first, so that none hides a part of another."""
    texts = {
        secret,
        quote_plus(secret),
        html.escape(secret),
        html.escape(secret, quote=False),
        json.dumps(secret)[1:-1],
    }
    texts |= {quote(secret, safe=safe) for safe in _LEFT_ALONE}
    texts |= {json.dumps(secret)[1:-1].replace("/", "\\/"), secret.encode().hex()}
    for text in (secret, quote(secret, safe="")):
        texts |= _in_base64(text.encode())
    texts |= {quote(text, safe="") for text in tuple(texts)}
    texts |= _out_of_base64(secret)
    forms = {text.lower().encode() for text in texts if len(text) >= MIN_SECRET_CHARACTERS}
    forms |= {form.decode().encode("utf-16-le") for form in tuple(forms) if form.decode() == secret.lower()}
    return tuple(sorted(forms, key=len, reverse=True))


def _in_base64(secret: bytes) -> set[str]:
    """What of it is the same whatever stands before and behind it: Basic credentials hold a user name before the secret."""
    found: set[str] = set()
    for before in range(3):
        coded = base64.b64encode(bytes(before) + secret).decode().rstrip("=")
        # Characters that also depend on the neighbours: the first ones, and the last if it is not a whole one.
        begin = (0, 2, 3)[before]
        end = len(coded) - (1 if (before + len(secret)) % 3 else 0)
        inner = coded[begin:end]
        found |= {inner, inner.replace("+", "-").replace("/", "_")}
    return found


def _out_of_base64(secret: str) -> set[str]:
    """Basic credentials are often kept as they are sent, and servers tell what is in them."""
    try:
        plain = base64.b64decode(secret, validate=True).decode()
    except ValueError:
        return set()
    return {plain, *plain.split(":", 1)} if plain.isprintable() else set()


def _replaced(data: bytes, form: bytes, shown: bytes) -> bytes:
    lowered = data.lower()
    at = lowered.find(form)
    if at < 0:
        return data
    pieces: list[bytes] = []
    begin = 0
    while at >= 0:
        pieces += [data[begin:at], shown]
        begin = at + len(form)
        at = lowered.find(form, begin)
    return b"".join([*pieces, data[begin:]])
