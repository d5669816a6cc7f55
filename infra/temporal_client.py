"""The connection to Temporal, and how values become payloads.

Payloads are plain JSON (`json/plain`), readable in the Temporal Web UI and by workers in other languages, encoded and
decoded by msgspec: 7-16 times faster than the SDK's own converter, and strict about types.
"""

import asyncio
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
import structlog
from temporalio import activity, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client, TLSConfig
from temporalio.converter import (
    BinaryNullPayloadConverter,
    BinaryPlainPayloadConverter,
    BinaryProtoPayloadConverter,
    CompositePayloadConverter,
    DataConverter,
    EncodingPayloadConverter,
    JSONProtoPayloadConverter,
)
from temporalio.exceptions import ApplicationError
from temporalio.runtime import LogForwardingConfig, LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError, RPCStatusCode

from infra.settings import Settings

logger = structlog.get_logger(__name__)

# --- Payloads ------------------------------------------------------------------------------------------------------


class PayloadError(ValueError):
    """A value can't become a payload, or a payload is not what the receiving function's annotation says."""


# Bounded because a sandboxed workflow whose module is not passed through defines its types anew for every run, and each
# would stay here for good. Shared by all converters: the SDK makes a new one per workflow run.
@lru_cache(maxsize=512)
def _decoder(type_hint: object) -> msgspec.json.Decoder[object]:
    return msgspec.json.Decoder(type_hint)


class MsgspecJSONConverter(EncodingPayloadConverter):
    """Everything msgspec knows: Structs, dataclasses, enums, dates, UUIDs, unions, plain containers."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    @property
    def encoding(self) -> str:
        return "json/plain"

    def to_payload(self, value: Any) -> Payload:
        try:
            data = self._encoder.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PayloadError(f"a {type(value).__qualname__} can't be sent through Temporal: {error}") from error
        return Payload(metadata={"encoding": b"json/plain"}, data=data)

    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        wanted: object = Any if type_hint is None else type_hint
        try:
            try:
                decoder = _decoder(wanted)
            except TypeError:
                # Not hashable, such as Annotated with a list in it; if msgspec can't handle it either, it says so here.
                decoder = msgspec.json.Decoder(wanted)
            return decoder.decode(payload.data)
        except (TypeError, msgspec.DecodeError, RecursionError) as error:
            name = wanted.__qualname__ if isinstance(wanted, type) else str(wanted)
            raise PayloadError(f"a payload can't be read as {name}: {error}") from error


class MsgspecPayloadConverter(CompositePayloadConverter):
    """The SDK's converters in their order, with msgspec in the place of its JSON converter."""

    def __init__(self) -> None:
        super().__init__(
            BinaryNullPayloadConverter(),
            BinaryPlainPayloadConverter(),
            JSONProtoPayloadConverter(),
            BinaryProtoPayloadConverter(),
            MsgspecJSONConverter(),
        )


DATA_CONVERTER = DataConverter(payload_converter_class=MsgspecPayloadConverter)

# --- Connection ----------------------------------------------------------------------------------------------------


class TemporalConnectionError(Exception):
    """Temporal can't be reached with the settings as they are."""


async def connect_temporal(settings: Settings) -> Client:
    try:
        return await Client.connect(
            settings.temporal_address,
            namespace=settings.temporal_namespace,
            api_key=settings.temporal_api_key,
            tls=await asyncio.to_thread(_tls, settings),
            data_converter=DATA_CONVERTER,
        )
    except RuntimeError as error:
        security = "with TLS" if settings.temporal_tls else "without TLS"
        raise TemporalConnectionError(
            f"TEMPORAL_ADDRESS: no connection to '{settings.temporal_address}' {security}: {error}"
        ) from error


def _tls(settings: Settings) -> TLSConfig | bool:
    if not settings.temporal_tls:
        # Not None: with an API key the SDK would turn TLS on by itself.
        return False
    return TLSConfig(
        server_root_ca_cert=settings.temporal_tls_ca.read_bytes() if settings.temporal_tls_ca else None,
        client_cert=settings.temporal_tls_cert.read_bytes() if settings.temporal_tls_cert else None,
        client_private_key=settings.temporal_tls_key.read_bytes() if settings.temporal_tls_key else None,
        domain=settings.temporal_tls_server_name,
    )


# --- Logs ----------------------------------------------------------------------------------------------------------


CORE_LOGGER: Final = logging.getLogger("temporalio.core")


def configure_temporal_logging() -> None:
    """Bring the SDK's logs into our format: its Rust core would write to standard error by itself, in its own colours.

    It is the process's default runtime that is set up here, so this comes before the first client.
    """
    logs = LoggingConfig(
        filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
        forwarding=LogForwardingConfig(
            logger=CORE_LOGGER,
            append_target_to_name=False,
            prepend_target_on_message=False,
            append_log_fields_to_message=False,
        ),
    )
    Runtime.set_default(Runtime(telemetry=TelemetryConfig(logging=logs)), error_if_already_set=False)
    # The ids are bound to every line of a step already.
    activity.logger.activity_info_on_message = False
    activity.logger.activity_info_on_extra = False
    workflow.logger.workflow_info_on_message = False
    activity.logger.logger.addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """An `ApplicationError` is an outcome of ours, told where it was decided; a traceback is for what nobody expected."""
    return not (record.exc_info and isinstance(record.exc_info[1], ApplicationError))


# --- Search attributes ---------------------------------------------------------------------------------------------

# A managed Temporal refuses these to applications, or has no operator service at all.
_NOT_OURS_TO_DO = frozenset(
    {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.UNIMPLEMENTED}
)


async def ensure_search_attributes(client: Client, wanted: Mapping[str, IndexedValueType.ValueType]) -> None:
    """Register what is missing. Starting a workflow with an unregistered attribute would fail."""
    operator = client.operator_service
    try:
        listed = await operator.list_search_attributes(ListSearchAttributesRequest(namespace=client.namespace))
        known = {**listed.system_attributes, **listed.custom_attributes}
        for name, wanted_type in wanted.items():
            if name in known and known[name] != wanted_type:
                raise TemporalConnectionError(
                    f"the search attribute {name} of namespace '{client.namespace}' is of type {_type_name(known[name])}, "
                    f"it has to be of type {_type_name(wanted_type)}"
                )
        missing = {name: wanted_type for name, wanted_type in wanted.items() if name not in known}
        if missing:
            await operator.add_search_attributes(
                AddSearchAttributesRequest(namespace=client.namespace, search_attributes=missing)
            )
    except RPCError as error:
        if error.status == RPCStatusCode.ALREADY_EXISTS:
            return  # another process was faster
        if error.status not in _NOT_OURS_TO_DO:
            raise
        flags = " ".join(f"--name {name} --type {_type_name(wanted_type)}" for name, wanted_type in wanted.items())
        logger.warning(
            "search attributes could not be checked; somebody with the permission has to create them",
            reason=error.message,
            command=f"temporal operator search-attribute create --namespace {client.namespace} {flags}",
        )


def _type_name(value_type: IndexedValueType.ValueType) -> str:
    """INDEXED_VALUE_TYPE_KEYWORD_LIST is KeywordList for the `temporal` command."""
    return "".join(
        word.capitalize() for word in IndexedValueType.Name(value_type).removeprefix("INDEXED_VALUE_TYPE_").split("_")
    )
