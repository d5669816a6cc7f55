"""Secrets at rest: an envelope per value, sealed with a key of the installation and bound to its place.

Every value has a random data key (DEK) of its own; the installation's key (KEK) only seals data keys. Decisions:
- Both layers are AES-256-GCM with the place (`table:row:column`) as associated data, the data key with the id of its KEK besides.
  An envelope that is copied to another row or column, or put together from two, opens nowhere.
- The installation has one key that encrypts and at most one previous key that only decrypts: enough to rotate without a stop.
- Keys are read strictly, so that a mistyped one is noticed before anything is encrypted with it.
- No error carries anything of a key, an envelope or a value but the key's id, and that only where it looks like one.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from typing import Final, Literal, final
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Struct

from domain.errors import EncryptionNotConfigured
from domain.secret import Secret

CURRENT_KEY: Final = "SECRETS_ENCRYPTION_KEY"
PREVIOUS_KEY: Final = "SECRETS_ENCRYPTION_KEY_PREVIOUS"

KEY_ID_PATTERN: Final = r"[A-Za-z0-9._-]{1,64}"
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
VERSION: Final = 1
ALGORITHM: Final = "AES-256-GCM"


class EncryptionKeyError(ValueError):
    """A key, or the two together, cannot be used. The text is fit to be shown: it never holds the key."""


class UndecryptableSecret(Exception):
    """A stored secret that cannot be read; `reason` is for programs, the text for operators. Neither holds any of it."""

    def __init__(
        self, place: str, reason: Literal["not_an_envelope", "unknown_key", "damaged"], *, key_id: str | None = None
    ) -> None:
        self.place = place
        self.reason = reason
        self.key_id = key_id
        self.problem = {
            "not_an_envelope": "what is stored there is not an envelope of this version",
            "unknown_key": f"it was encrypted with key `{key_id}`, which is not configured",
            "damaged": f"it is damaged, belongs elsewhere, or key `{key_id}` is another one than it was encrypted with",
        }[reason]
        super().__init__(f"The secret at {place} cannot be decrypted: {self.problem}")


class Envelope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored, as JSON; bytes are standard base64 there. `dek_wrapped` begins with the nonce of the data key."""

    version: Literal[1]
    alg: Literal["AES-256-GCM"]
    key_id: str
    dek_wrapped: bytes
    nonce: bytes
    ciphertext: bytes


def bound_to(table: str, row: UUID, column: str) -> str:
    """The place a secret belongs to, such as `providers:<uuid>:credentials`."""
    return f"{table}:{row}:{column}"


def generate_key(key_id: str) -> Secret:
    """A new random key, in the form of the setting. Raises `EncryptionKeyError` for an id that no key may have."""
    _check_key_id(key_id)
    return Secret(f"{key_id}:{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}")


def key_id_of(key: Secret) -> str:
    """The id of a key as the settings hold it. Raises `EncryptionKeyError` when the key is malformed."""
    return _Key(key).id


@final
class _Key:
    __slots__ = ("cipher", "id")

    def __init__(self, written: Secret) -> None:
        self.id, separator, encoded = written.reveal().partition(":")
        if not separator:
            raise EncryptionKeyError("it has no ':' between key id and key")
        _check_key_id(self.id)
        try:
            key = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise EncryptionKeyError("what follows the ':' is not standard base64") from None
        if len(key) != KEY_BYTES:
            raise EncryptionKeyError(f"the key has {len(key)} bytes instead of {KEY_BYTES}")
        self.cipher = AESGCM(key)

    def __repr__(self) -> str:
        return f"_Key({self.id!r})"


@final
class Keyring:
    """The installation's keys. Without any it can neither encrypt nor decrypt, and says so when it has to."""

    __slots__ = ("_current", "_keys")

    def __init__(self, current: _Key | None, keys: dict[str, _Key]) -> None:
        self._current = current
        self._keys = keys

    @classmethod
    def of(cls, current: Secret | None, previous: Secret | None) -> Keyring:
        """Keys as the settings hold them, `kek-v1:<base64 of 32 bytes>`. Raises `EncryptionKeyError`, naming the setting."""
        if current is None:
            if previous is not None:
                raise EncryptionKeyError(f"{CURRENT_KEY}: it is not set although {PREVIOUS_KEY} is")
            return cls(None, {})
        first = _read_key(CURRENT_KEY, current)
        keys = {first.id: first}
        if previous is not None:
            second = _read_key(PREVIOUS_KEY, previous)
            if second.id == first.id:
                raise EncryptionKeyError(f"{PREVIOUS_KEY}: its key id '{second.id}' is that of {CURRENT_KEY}")
            keys[second.id] = second
        return cls(first, keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._keys)})"

    @property
    def can_encrypt(self) -> bool:
        return self._current is not None

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The current key's id, then the previous one's."""
        return tuple(self._keys)

    def encrypt(self, plaintext: str, *, bound_to: str) -> str:
        """The envelope to store. Raises `EncryptionNotConfigured`."""
        key = self._current
        if key is None:
            raise EncryptionNotConfigured
        data_key = AESGCM.generate_key(KEY_BYTES * 8)
        key_nonce = secrets.token_bytes(NONCE_BYTES)
        nonce = secrets.token_bytes(NONCE_BYTES)
        envelope = Envelope(
            version=VERSION,
            alg=ALGORITHM,
            key_id=key.id,
            dek_wrapped=key_nonce + key.cipher.encrypt(key_nonce, data_key, _wrapping(bound_to, key.id)),
            nonce=nonce,
            # Python's texts may hold lone surrogates; the error of a strict encoder would carry the text.
            ciphertext=AESGCM(data_key).encrypt(nonce, plaintext.encode(errors="surrogatepass"), bound_to.encode()),
        )
        return msgspec.json.encode(envelope).decode()

    def decrypt(self, stored: str, *, bound_to: str) -> Secret:
        """What an envelope holds. Raises `UndecryptableSecret`: unknown key, another place, damaged."""
        envelope = _opened(stored)
        if envelope is None:
            raise UndecryptableSecret(bound_to, "not_an_envelope")
        key = self._keys.get(envelope.key_id)
        if key is None:
            raise UndecryptableSecret(bound_to, "unknown_key", key_id=envelope.key_id)
        key_nonce, wrapped = envelope.dek_wrapped[:NONCE_BYTES], envelope.dek_wrapped[NONCE_BYTES:]
        try:
            data_key = key.cipher.decrypt(key_nonce, wrapped, _wrapping(bound_to, key.id))
            plaintext = AESGCM(data_key).decrypt(envelope.nonce, envelope.ciphertext, bound_to.encode())
        except (InvalidTag, ValueError):
            # ValueError: a nonce that is too short. The chain is cut, so that no traceback can hold a part of the value.
            raise UndecryptableSecret(bound_to, "damaged", key_id=envelope.key_id) from None
        return Secret(plaintext.decode(errors="surrogatepass"))

    def needs_reencryption(self, stored: str) -> bool:
        """Whether this is not encrypted with the current key; True as well for what cannot be read."""
        if self._current is None:
            return False
        envelope = _opened(stored)
        return envelope is None or envelope.key_id != self._current.id


def _opened(stored: str) -> Envelope | None:
    try:
        envelope = msgspec.json.decode(stored, type=Envelope)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return envelope if re.fullmatch(KEY_ID_PATTERN, envelope.key_id) else None


def _wrapping(bound_to: str, key_id: str) -> bytes:
    """The associated data of a wrapped data key; a key id holds no '|'."""
    return f"{key_id}|{bound_to}".encode()


def _check_key_id(key_id: str) -> None:
    if not re.fullmatch(KEY_ID_PATTERN, key_id):
        raise EncryptionKeyError("a key id is 1 to 64 letters, digits, '.', '_' or '-'")


def _read_key(setting: str, written: Secret) -> _Key:
    try:
        return _Key(written)
    except EncryptionKeyError as error:
        raise EncryptionKeyError(f"{setting}: {error}") from None
