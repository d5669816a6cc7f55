"""Secrets at rest: an envelope opens in its own place with its own key, and nothing else of it ever shows."""

from __future__ import annotations

import base64
import io
import pickle
import stat
import traceback
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli.config_command import print_config
from cli.keys import DEV_KEY_FILE, dev_key, keys_in_words, write_private
from cli.run import DevAddresses
from domain.errors import EncryptionNotConfigured
from domain.secret import Secret
from infra.encryption import (
    CURRENT_KEY,
    PREVIOUS_KEY,
    EncryptionKeyError,
    Keyring,
    UndecryptableSecret,
    bound_to,
    generate_key,
    key_id_of,
)
from infra.settings import SettingsError, load_settings, resolve_settings

PLAINTEXT = '{"api_key":"sk-planted-secret"}'
PLANTED = "sk-planted-secret"
ROW = UUID("0199d3a1-7c52-7b06-8c7b-5a8f0f2f6f10")
PLACE = bound_to("providers", ROW, "credentials")

KEY_1 = generate_key("kek-v1")
KEY_2 = generate_key("kek-v2")
RING = Keyring.of(KEY_1, None)

DEV = {"DEV_MODE": "true"}

# Made with other code, of the bytes 0, 1, 2 … : the key, then the data key, then the data key's nonce.
VECTOR_KEY = Secret("kek-v1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
VECTOR = """{
    "version": 1,
    "alg": "AES-256-GCM",
    "key_id": "kek-v1",
    "dek_wrapped": "QEFCQ0RFRkdISUpLwpiMAAIZoSTl7T0dt0k9dEn3YG+DADkUT3503qsu0+QNS9IR+MfA37Jd4NlniO71",
    "nonce": "UFFSU1RVVldYWVpb",
    "ciphertext": "yoLJYlhwHGhNLTA4HmKu2bmPO1AK1ARRwq+NpWs3p/qze4yEjVFy"
}"""

Fields = dict[str, object]


def sealed(ring: Keyring = RING, place: str = PLACE) -> str:
    return ring.encrypt(PLAINTEXT, bound_to=place)


def changed(envelope: str, change: Callable[[Fields], None]) -> str:
    fields: Fields = msgspec.json.decode(envelope)
    change(fields)
    return msgspec.json.encode(fields).decode()


def refused(envelope: str, *, ring: Keyring = RING, place: str = PLACE) -> UndecryptableSecret:
    """The refusal, of which no part may show anything of what was stored."""
    with pytest.raises(UndecryptableSecret) as caught:
        ring.decrypt(envelope, bound_to=place)
    error = caught.value
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    assert PLANTED not in shown
    assert "ciphertext" not in shown
    assert envelope not in shown
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    return error


# --- The format -------------------------------------------------------------------------------------------------------


def opened_by_hand(envelope: str, key: Secret, place: str) -> str:
    """The documented format, with nothing of ours."""
    key_id, _, encoded = key.reveal().partition(":")
    fields = msgspec.json.decode(envelope, type=dict[str, object])
    assert list(fields) == ["version", "alg", "key_id", "dek_wrapped", "nonce", "ciphertext"]
    assert (fields["version"], fields["alg"], fields["key_id"]) == (1, "AES-256-GCM", key_id)
    wrapped, nonce, ciphertext = (
        base64.b64decode(str(fields[name]), validate=True) for name in ("dek_wrapped", "nonce", "ciphertext")
    )
    assert (len(wrapped), len(nonce)) == (12 + 32 + 16, 12)
    data_key = AESGCM(base64.b64decode(encoded)).decrypt(wrapped[:12], wrapped[12:], f"{key_id}|{place}".encode())
    return AESGCM(data_key).decrypt(nonce, ciphertext, place.encode()).decode()


def test_a_fixed_envelope_is_read_by_us_and_by_hand() -> None:
    assert opened_by_hand(VECTOR, VECTOR_KEY, PLACE) == '{"api_key":"sk-vector"}'
    assert Keyring.of(VECTOR_KEY, None).decrypt(VECTOR, bound_to=PLACE) == Secret('{"api_key":"sk-vector"}')


def test_what_we_write_is_read_by_hand() -> None:
    assert opened_by_hand(sealed(), KEY_1, PLACE) == PLAINTEXT


@given(st.text(st.characters(codec=None)))
def test_every_text_comes_back(text: str) -> None:
    assert RING.decrypt(RING.encrypt(text, bound_to=PLACE), bound_to=PLACE).reveal() == text


def test_a_place_is_table_row_and_column() -> None:
    assert PLACE == "providers:0199d3a1-7c52-7b06-8c7b-5a8f0f2f6f10:credentials"


def test_the_same_value_is_never_stored_the_same_way_twice() -> None:
    envelopes = [msgspec.json.decode(sealed()) for _ in range(50)]
    for name in ("dek_wrapped", "nonce", "ciphertext"):
        assert len({fields[name] for fields in envelopes}) == 50
    assert len({base64.b64decode(fields["dek_wrapped"])[:12] for fields in envelopes}) == 50


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        bound_to("providers", uuid4(), "credentials"),
        bound_to("providers", ROW, "native"),
        bound_to("context_checkpoints", ROW, "credentials"),
        "",
    ],
    ids=["row", "column", "table", "nowhere"],
)
def test_an_envelope_that_was_copied_elsewhere_does_not_open(place: str) -> None:
    assert refused(sealed(), place=place).reason == "damaged"


@pytest.mark.parametrize("swapped", [["ciphertext"], ["nonce"], ["dek_wrapped"], ["nonce", "ciphertext"]])
def test_parts_of_two_envelopes_of_one_place_do_not_open_together(swapped: list[str]) -> None:
    other: Fields = msgspec.json.decode(sealed())
    mixed = changed(sealed(), lambda fields: fields.update({name: other[name] for name in swapped}))
    assert refused(mixed).reason == "damaged"


@given(st.sampled_from(["dek_wrapped", "nonce", "ciphertext"]), st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_noticed(name: str, position: int, mask: int) -> None:
    def flip(fields: Fields) -> None:
        data = bytearray(base64.b64decode(str(fields[name])))
        data[position % len(data)] ^= mask
        fields[name] = base64.b64encode(data).decode()

    assert refused(changed(sealed(), flip)).reason == "damaged"


@given(st.sampled_from(["dek_wrapped", "nonce", "ciphertext"]), st.integers(0, 60))
def test_a_part_that_was_cut_is_noticed(name: str, kept: int) -> None:
    def cut(fields: Fields) -> None:
        data = base64.b64decode(str(fields[name]))
        fields[name] = base64.b64encode(data[: min(kept, len(data) - 1)]).decode()

    assert refused(changed(sealed(), cut)).reason == "damaged"


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(version=2),
        lambda fields: fields.update(version="1"),
        lambda fields: fields.update(alg="AES-256-CBC"),
        lambda fields: fields.update(alg="none"),
        lambda fields: fields.update(kid="kek-v1"),
        lambda fields: fields.pop("nonce"),
        lambda fields: fields.update(nonce=None),
        lambda fields: fields.update(ciphertext="not base64!"),
        lambda fields: fields.update(key_id=f"a key named {PLANTED}"),
    ],
    ids=["version", "version type", "alg", "no alg", "extra", "missing", "null", "base64", "key id"],
)
def test_what_is_not_an_envelope_of_this_version_is_refused(change: Callable[[Fields], None]) -> None:
    assert refused(changed(sealed(), change)).reason == "not_an_envelope"


@pytest.mark.parametrize("stored", [PLANTED, PLAINTEXT, f'"{PLANTED}"', "{", "[]", "", "\ud800", "1" * 5000])
def test_a_secret_that_was_stored_in_the_clear_is_refused_and_not_repeated(stored: str) -> None:
    with pytest.raises(UndecryptableSecret) as caught:
        RING.decrypt(stored, bound_to=PLACE)
    assert caught.value.reason == "not_an_envelope"
    assert PLANTED not in "".join(traceback.format_exception(caught.value))


def test_another_key_of_the_same_id_is_refused() -> None:
    assert refused(sealed(), ring=Keyring.of(generate_key("kek-v1"), None)).reason == "damaged"


def test_an_unknown_key_is_named() -> None:
    error = refused(sealed(), ring=Keyring.of(KEY_2, None))
    assert (error.reason, error.key_id) == ("unknown_key", "kek-v1")
    assert str(error) == (
        f"The secret at {PLACE} cannot be decrypted: it was encrypted with key `kek-v1`, which is not configured"
    )


def test_a_relabelled_key_id_does_not_open_even_where_both_ids_have_one_key() -> None:
    material = KEY_1.reveal().partition(":")[2]
    ring = Keyring.of(KEY_1, Secret(f"kek-v0:{material}"))
    assert refused(changed(sealed(), lambda fields: fields.update(key_id="kek-v0")), ring=ring).reason == "damaged"


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_encrypted_and_nothing_opens() -> None:
    ring = Keyring.of(None, None)
    assert not ring.can_encrypt
    with pytest.raises(EncryptionNotConfigured) as caught:
        ring.encrypt(PLAINTEXT, bound_to=PLACE)
    assert (caught.value.status, caught.value.code) == (503, "encryption_not_configured")
    assert caught.value.message == "Secrets cannot be stored: SECRETS_ENCRYPTION_KEY is not set"
    assert refused(sealed(), ring=ring).reason == "unknown_key"
    assert not ring.needs_reencryption(sealed()), "there is nothing to do it with"


def test_during_a_rotation_both_keys_read_and_only_the_current_one_writes() -> None:
    before = sealed(Keyring.of(KEY_1, KEY_2))
    rotated = Keyring.of(KEY_2, KEY_1)
    assert rotated.key_ids == ("kek-v2", "kek-v1")
    assert rotated.decrypt(before, bound_to=PLACE).reveal() == PLAINTEXT
    assert rotated.needs_reencryption(before)
    after = sealed(rotated)
    assert not rotated.needs_reencryption(after)
    assert Keyring.of(KEY_2, None).decrypt(after, bound_to=PLACE).reveal() == PLAINTEXT
    assert refused(after).reason == "unknown_key"


def test_what_cannot_be_read_needs_reencryption() -> None:
    assert RING.needs_reencryption(PLANTED)


def b64(size: int) -> str:
    return base64.b64encode(bytes(size)).decode()


MALFORMED = {
    "no id": b64(32),
    "empty id": f":{b64(32)}",
    "spaces in the id": f"kek v1:{b64(32)}",
    "id of 65 characters": f"{'k' * 65}:{b64(32)}",
    "no key": "kek-v1:",
    "short": f"kek-v1:{b64(31)}",
    "long": f"kek-v1:{b64(33)}",
    "AES-128": f"kek-v1:{b64(16)}",
    "no padding": f"kek-v1:{b64(32).rstrip('=')}",
    "url-safe base64": "kek-v1:" + base64.urlsafe_b64encode(b"\xfb" * 32).decode(),
    "not base64": f"kek-v1:{PLANTED}",
    "a character too many": f"kek-v1:{b64(32)}!",
    "not ASCII": f"kek-v1:{b64(32)}é",
    "hexadecimal": "kek-v1:" + "0f" * 32,
}


@pytest.mark.parametrize("written", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("name", [CURRENT_KEY, PREVIOUS_KEY])
def test_a_malformed_key_is_refused_by_name_and_not_shown(name: str, written: str) -> None:
    keys = [Secret(written), None] if name == CURRENT_KEY else [KEY_1, Secret(written)]
    with pytest.raises(EncryptionKeyError) as caught:
        Keyring.of(*keys)
    shown = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith(f"{name}: ")
    assert written not in shown
    assert PLANTED not in shown

    given = {CURRENT_KEY: KEY_1.reveal(), name: written}
    with pytest.raises(SettingsError) as wrong:
        load_settings(DEV | given)
    (line,) = wrong.value.problems
    assert line.startswith(f"{name}: *** is not accepted (")
    assert "`everruns secrets generate-key`" in line
    assert written not in line


def test_two_keys_of_one_id_are_refused_wherever_they_come_from() -> None:
    other = generate_key("kek-v1")
    with pytest.raises(EncryptionKeyError, match=r"^SECRETS_ENCRYPTION_KEY_PREVIOUS: its key id 'kek-v1' is that of"):
        Keyring.of(KEY_1, other)
    with pytest.raises(SettingsError) as caught:
        load_settings(DEV | {CURRENT_KEY: KEY_1.reveal(), PREVIOUS_KEY: other.reveal()})
    (line,) = caught.value.problems
    assert line.startswith("SECRETS_ENCRYPTION_KEY_PREVIOUS: its key id 'kek-v1'")
    assert KEY_1.reveal() not in line
    assert other.reveal() not in line


def test_a_previous_key_without_a_current_one_is_refused() -> None:
    with pytest.raises(EncryptionKeyError, match=r"^SECRETS_ENCRYPTION_KEY: it is not set although"):
        Keyring.of(None, KEY_1)
    with pytest.raises(SettingsError) as caught:
        load_settings(DEV | {PREVIOUS_KEY: KEY_1.reveal()})
    (line,) = caught.value.problems
    assert line.startswith("SECRETS_ENCRYPTION_KEY: it is not set although SECRETS_ENCRYPTION_KEY_PREVIOUS is")


def test_a_generated_key_is_accepted_and_each_is_new() -> None:
    keys = [generate_key("a.b_c-1") for _ in range(20)]
    assert len(set(keys)) == 20
    assert {key_id_of(key) for key in keys} == {"a.b_c-1"}
    assert {len(base64.b64decode(key.reveal().partition(":")[2])) for key in keys} == {32}
    with pytest.raises(EncryptionKeyError, match="a key id is"):
        generate_key("a:b")


# --- What shows of it -------------------------------------------------------------------------------------------------


def test_no_representation_and_no_config_shows_a_key() -> None:
    environ = DEV | {CURRENT_KEY: KEY_2.reveal(), PREVIOUS_KEY: KEY_1.reveal()}
    settings = load_settings(environ)
    assert settings.secrets_encryption_key == KEY_2
    output = io.StringIO()
    assert print_config(environ, console=Console(file=output))
    assert f"{CURRENT_KEY}=***" in output.getvalue()
    ring = Keyring.of(settings.secrets_encryption_key, settings.secrets_encryption_key_previous)
    addresses = DevAddresses(
        api="http://localhost:1/api",
        docs="",
        temporal="",
        temporal_ui=None,
        database_url="",
        pid=7,
        ready_seconds=0,
        postgres_pid=0,
        temporal_pid=0,
        environment=environ,
    )
    shown = [output.getvalue(), repr(settings), str(settings), repr(ring), repr(resolve_settings(environ))]
    shown += [repr(settings.secrets_encryption_key), repr(addresses), str(addresses)]
    for key in (KEY_1, KEY_2):
        assert not [text for text in shown if key.reveal().partition(":")[2] in text]
    assert repr(ring) == "Keyring(kek-v2, kek-v1)"


def test_a_keyring_is_neither_pickled_nor_encoded() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(RING)
    with pytest.raises(TypeError):
        msgspec.json.encode(RING)


def test_key_ids_are_counted_in_words() -> None:
    assert keys_in_words({"kek-v1": 2, None: 1, "kek-v2": 1200}) == (
        "1,200 with `kek-v2`, 2 with `kek-v1`, 1 with no known key"
    )


# --- The key of dev ---------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_dev_keeps_its_key_beside_its_data_for_our_account_only(tmp_path: Path) -> None:
    first = dev_key(tmp_path)
    assert mode(tmp_path / DEV_KEY_FILE) == 0o600
    assert dev_key(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [DEV_KEY_FILE]
    Keyring.of(first, None)


def test_dev_without_a_directory_has_a_new_key_of_a_new_id_each_time() -> None:
    assert len({key_id_of(dev_key(None)) for _ in range(10)}) == 10


@pytest.mark.parametrize("content", [b"", f"kek-v1:{PLANTED}".encode(), b"\xff\xfe"])
def test_a_damaged_key_file_is_named_kept_and_not_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / DEV_KEY_FILE
    path.write_bytes(content)
    with pytest.raises(EncryptionKeyError) as caught:
        dev_key(tmp_path)
    assert str(caught.value).startswith(f"{path} holds no key")
    assert PLANTED not in "".join(traceback.format_exception(caught.value))
    assert path.read_bytes() == content


def test_a_private_file_replaces_what_others_could_read(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    for left_over in (path, tmp_path / "ready.json.unfinished"):
        left_over.write_text("old")
        left_over.chmod(0o666)
    write_private(path, "new")
    assert (path.read_text(), mode(path)) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]
