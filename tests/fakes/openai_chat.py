"""Servers that speak Chat Completions: a plain OpenAI-compatible one, OpenRouter, and Gemini's compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from tests.fakes.script import Answer, Call, Failure, Usage
from tests.fakes.server import AbruptEnd, Exchange, FakeProvider, Json

MODEL = "gpt-test"
VERIFY_URL = "https://platform.openai.com/settings/organization/general"
RESETS_AT = 1_900_000_000
GEMINI_RETRY_SECONDS = 30

_ARGUMENT_PIECES = 3


class FakeOpenAIChat(FakeProvider):
    provider_type = "openai_completions"
    base_path = "/v1/"
    models: ClassVar[Sequence[Json]] = (
        {"id": MODEL, "object": "model", "owned_by": "fake"},
        {"id": "text-embedding-3-small", "object": "model", "owned_by": "fake"},
        {"id": "whisper-1", "object": "model", "owned_by": "fake"},
    )

    async def handle(self, exchange: Exchange) -> None:
        match exchange.request.method, exchange.request.path:
            case "GET", path if path == f"{self.base_path}models":
                await exchange.json({"object": "list", "data": list(self.models)})
            case "POST", path if path == f"{self.base_path}chat/completions":
                await self._complete(exchange)
            case _:
                await exchange.json({"detail": "Not Found"}, status=404)

    async def _complete(self, exchange: Exchange) -> None:
        answer = self.next_answer()
        refused = self.refusal_of(exchange.request.body)
        if refused is not None:
            await exchange.json(refused, status=400)
        elif answer.failure and answer.after is None:
            status, error = self.error(answer.failure, exchange.request.headers, answer.retry_after_seconds)
            wait = answer.retry_after_seconds
            headers = {} if wait is None else {"retry-after": str(wait)}
            await exchange.json(self.error_body(error), status=status, headers=headers)
        else:
            await self._stream(exchange, answer)

    async def _stream(self, exchange: Exchange, answer: Answer) -> None:
        response_id = answer.response_id or self.new_id("chatcmpl-")

        def chunk(delta: Json, finish: str | None = None) -> Json:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return self.chunk(response_id, exchange.request.body, answer, [choice])

        async with exchange.stream():
            pieces = list(self.pieces(answer))
            strikes = answer.failure or answer.cut or answer.stall
            after = len(pieces) if answer.after is None else answer.after
            for piece in pieces[:after] if strikes else pieces:
                await exchange.event(chunk(piece))
                if answer.piece_delay_seconds:
                    await exchange.pause(answer.piece_delay_seconds)
            if answer.failure:
                _, error = self.error(answer.failure, exchange.request.headers, answer.retry_after_seconds)
                await exchange.event(self.error_chunk(chunk, error))
                return
            if answer.cut == "abrupt":
                raise AbruptEnd
            if answer.cut == "clean":
                return
            if answer.stall:
                await exchange.stall()
            for delta in self.call_deltas(answer.calls):
                await exchange.event(chunk(delta))
            await exchange.event(chunk(self.end_delta(answer), answer.finish or self.finish_reason(answer)))
            for last in self.after_the_end(response_id, exchange.request.body, answer):
                await exchange.event(last)
            await exchange.event("[DONE]")

    # --- what a dialect does its own way ---

    def refusal_of(self, body: Json) -> object | None:
        """An error for a request this server would not take."""
        for name in ("reasoning", "extra_body", "verbosity", "service_tier", "prompt_cache_key"):
            if name in body:
                return self.error_body(_error(f"Unrecognized request argument supplied: {name}"))
        return None

    def chunk(self, response_id: str, body: Json, answer: Answer, choices: list[Json]) -> Json:
        return {
            "id": response_id,
            "object": "chat.completion.chunk",
            "created": 1_790_000_000,
            "model": body.get("model"),
            "choices": choices,
        }

    def pieces(self, answer: Answer) -> Iterator[Json]:
        yield from ({"role": "assistant", "reasoning_content": text} for text in answer.thinking)
        yield from ({"role": "assistant", "content": text} for text in answer.text)
        yield from ({"role": "assistant", "refusal": text} for text in answer.refusal)

    def call_deltas(self, calls: Sequence[Call]) -> Iterator[Json]:
        for index, call in enumerate(calls):
            begun = {"name": call.name, "arguments": ""}
            call_id = call.id or self.new_id("call_")
            yield {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": begun}]}
            for piece in _in_pieces(call.arguments):
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}

    def end_delta(self, answer: Answer) -> Json:
        return {}

    def finish_reason(self, answer: Answer) -> str:
        return "tool_calls" if answer.calls else "stop"

    def after_the_end(self, response_id: str, body: Json, answer: Answer) -> Iterator[Json]:
        asked = (body.get("stream_options") or {}).get("include_usage")
        if asked and answer.usage:
            yield self.chunk(response_id, body, answer, []) | {"usage": self.usage(answer.usage)}

    def usage(self, usage: Usage) -> Json:
        prompt = usage.input + usage.cache_read + usage.cache_write
        return {
            "prompt_tokens": prompt,
            "completion_tokens": usage.output,
            "total_tokens": prompt + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        }

    def error(self, failure: Failure, headers: Mapping[str, str], wait: int | None) -> tuple[int, Json]:
        return openai_error(failure, headers)

    def error_body(self, error: Json) -> object:
        return {"error": error}

    def error_chunk(self, chunk: Callable[[Json, str | None], Json], error: Json) -> Json:
        return {"error": error}


class FakeOpenRouter(FakeOpenAIChat):
    """Tells the cost, writes errors with numeric codes and the upstream's own words, and ends a failed stream with a choice."""

    provider_type = "openrouter"
    base_path = "/api/v1/"
    models = (
        {
            "id": "anthropic/claude-test",
            "name": "Anthropic: Claude Test",
            "architecture": {"output_modalities": ["text"]},
        },
        {"id": "google/picture-test", "name": "Picture", "architecture": {"output_modalities": ["image"]}},
    )

    def refusal_of(self, body: Json) -> object | None:
        return None

    def pieces(self, answer: Answer) -> Iterator[Json]:
        for number, text in enumerate(answer.thinking):
            detail: Json = {"type": "reasoning.text", "text": text, "format": "anthropic-claude-v1", "index": 0}
            if number == len(answer.thinking) - 1:
                detail["signature"] = "signature-of-the-thinking"
            yield {"role": "assistant", "content": "", "reasoning": text, "reasoning_details": [detail]}
        yield from ({"role": "assistant", "content": text} for text in answer.text)
        yield from ({"role": "assistant", "refusal": text} for text in answer.refusal)

    def usage(self, usage: Usage) -> Json:
        cost = {} if usage.cost_usd is None else {"cost": usage.cost_usd, "is_byok": False}
        return super().usage(usage) | cost

    def error(self, failure: Failure, headers: Mapping[str, str], wait: int | None) -> tuple[int, Json]:
        return openrouter_error(failure)

    def error_chunk(self, chunk: Callable[[Json, str | None], Json], error: Json) -> Json:
        return chunk({"role": "assistant", "content": ""}, "error") | {"error": error}


class FakeGemini(FakeOpenAIChat):
    """Thoughts between tags, signed calls without index, one whole chunk for all of them, usage in every chunk, `stop` always."""

    provider_type = "gemini"
    base_path = "/v1beta/openai/"
    models = (
        {"id": "models/gemini-test", "object": "model", "owned_by": "google", "display_name": "Gemini Test"},
        {"id": "models/gemini-embedding-001", "object": "model", "owned_by": "google"},
        {"id": "models/imagen-4.0", "object": "model", "owned_by": "google"},
    )

    def refusal_of(self, body: Json) -> object | None:
        """Tool calls of the running turn must come back signed; effort and level mean the same and exclude each other."""
        if "reasoning_effort" in body and "thinking_config" in str(body.get("extra_body")):
            return self.error_body(_google(400, "INVALID_ARGUMENT", "Expected one of either `reasoning_effort` or …"))
        messages: list[Json] = body.get("messages", [])
        newest_user = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for message in messages[newest_user + 1 :]:
            calls = message.get("tool_calls") or []
            if calls and not calls[0].get("extra_content", {}).get("google", {}).get("thought_signature"):
                words = f"Function call `{calls[0]['function']['name']}` is missing a thought_signature in functionCall parts."
                return self.error_body(_google(400, "INVALID_ARGUMENT", words))
        return None

    def chunk(self, response_id: str, body: Json, answer: Answer, choices: list[Json]) -> Json:
        usage = {"usage": self.usage(answer.usage)} if answer.usage else {}
        return super().chunk(response_id, body, answer, choices) | usage

    def pieces(self, answer: Answer) -> Iterator[Json]:
        marked = {"google": {"thought": True}}
        for number, text in enumerate(answer.thinking):
            tag = "<thought>" if number == 0 else ""
            yield {"role": "assistant", "content": tag + text, "extra_content": marked}
        for number, text in enumerate([*answer.text, *answer.refusal]):
            tag = "</thought>" if number == 0 and answer.thinking else ""
            yield {"role": "assistant", "content": tag + text}

    def call_deltas(self, calls: Sequence[Call]) -> Iterator[Json]:
        sent: list[Json] = [
            {
                "id": call.id or self.new_id("call_"),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
        if sent:
            sent[0]["extra_content"] = {"google": {"thought_signature": "signature-of-the-calls"}}
            yield {"role": "assistant", "tool_calls": sent}

    def end_delta(self, answer: Answer) -> Json:
        if answer.calls:
            return {"role": "assistant"}
        return {"role": "assistant", "extra_content": {"google": {"thought_signature": "signature-of-the-text"}}}

    def finish_reason(self, answer: Answer) -> str:
        return "stop"

    def after_the_end(self, response_id: str, body: Json, answer: Answer) -> Iterator[Json]:
        yield from ()

    def usage(self, usage: Usage) -> Json:
        prompt = usage.input + usage.cache_read + usage.cache_write
        told: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": usage.output - usage.reasoning,
            "total_tokens": prompt + usage.output,
        }
        details = {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write}
        return told | ({"prompt_tokens_details": details} if usage.cache_read or usage.cache_write else {})

    def error(self, failure: Failure, headers: Mapping[str, str], wait: int | None) -> tuple[int, Json]:
        return gemini_error(failure, headers, wait)

    def error_body(self, error: Json) -> object:
        return [{"error": error}]


def openai_error(failure: Failure, headers: Mapping[str, str]) -> tuple[int, Json]:
    match failure:
        case "rate_limit":
            words = f"Rate limit reached for {MODEL} on tokens per min (TPM): Limit 30000, Used 29000, Requested 2000."
            return 429, _error(words, kind="tokens", code="rate_limit_exceeded")
        case "overloaded":
            return 503, _error("The engine is currently overloaded, please try again later", kind="server_error")
        case "server_error":
            words = "The server had an error while processing your request. Sorry about that!"
            return 500, _error(words, kind="server_error")
        case "quota":
            words = "You exceeded your current quota, please check your plan and billing details."
            return 429, _error(words, kind="insufficient_quota", code="insufficient_quota")
        case "usage_limit":
            error = _error("The usage limit has been reached", kind="usage_limit_reached")
            return 429, error | {"plan_type": "plus", "resets_at": RESETS_AT}
        case "auth":
            words = f"Incorrect API key provided: {_echoed(headers)}. You can find your API key in the settings."
            return 401, _error(words, code="invalid_api_key")
        case "permission":
            return 403, _error("You have insufficient permissions for this operation. Missing scopes: model.request.")
        case "attestation":
            words = (
                f"Your organization must be verified to use the model `{MODEL}`. Please go to: {VERIFY_URL} and click"
            )
            return 403, _error(words + " on Verify Organization.")
        case "not_found":
            words = f"The model `{MODEL}` does not exist or you do not have access to it."
            return 404, _error(words, code="model_not_found")
        case "overflow":
            words = "This model's maximum context length is 128000 tokens. However, your messages resulted in 140000 tokens."
            return 400, _error(words, param="messages", code="context_length_exceeded")
        case "tool_schema":
            words = (
                "Invalid schema for function 'lookup': In context=('properties', 'rows'), array schema missing items."
            )
            return 400, _error(words, param="tools[0].function.parameters", code="invalid_function_parameters")
        case "content_filter":
            words = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
            return 400, _error(words, kind=None, param="prompt", code="content_filter") | {"status": 400}
        case "invalid_request":
            words = "Unsupported parameter: 'colour' is not supported with this model."
            return 400, _error(words, param="colour", code="unsupported_parameter")


def openrouter_error(failure: Failure) -> tuple[int, Json]:
    def upstream(status: int, raw: str) -> tuple[int, Json]:
        metadata = {"raw": raw, "provider_name": "Upstream"}
        return status, {"code": status, "message": "Provider returned error", "metadata": metadata}

    match failure:
        case "rate_limit":
            return upstream(429, "the model is temporarily rate-limited upstream. Please retry shortly")
        case "overloaded":
            return upstream(503, '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}')
        case "server_error":
            return 502, {"code": 502, "message": "Upstream error"}
        case "quota":
            return 402, {"code": 402, "message": "This request requires more credits, or fewer max_tokens."}
        case "auth":
            return 401, {"code": 401, "message": "User not found."}
        case "permission":
            return 403, {"code": 403, "message": "This key is not allowed to use the model."}
        case "not_found":
            return 400, {"code": 400, "message": "vendor/nothing is not a valid model ID"}
        case "overflow":
            words = (
                "This endpoint's maximum context length is 131072 tokens. However, you requested about 200000 tokens."
            )
            return 400, {"code": 400, "message": words}
        case "content_filter":
            metadata = {"reasons": ["violence"], "flagged_input": "…", "provider_name": "Upstream"}
            return 403, {"code": 403, "message": "The input was flagged", "metadata": metadata}
        case _:
            return openai_error(failure, {})


def gemini_error(failure: Failure, headers: Mapping[str, str], wait: int | None) -> tuple[int, Json]:
    """What Gemini has no words of its own for comes as OpenAI says it."""
    quota = "You exceeded your current quota, please check your plan and billing details."

    def exhausted(quota_id: str) -> Json:
        violations = [{"quotaId": quota_id, "quotaValue": "10"}]
        seconds = GEMINI_RETRY_SECONDS if wait is None else wait
        return _google(429, "RESOURCE_EXHAUSTED", quota) | {
            "details": [
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations},
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{seconds}s"},
            ]
        }

    match failure:
        case "rate_limit":
            return 429, exhausted("GenerateRequestsPerMinutePerProjectPerModel")
        case "quota":
            return 429, exhausted("GenerateRequestsPerDayPerProjectPerModel-FreeTier")
        case "overloaded":
            return 503, _google(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")
        case "server_error":
            return 500, _google(500, "INTERNAL", "An internal error has occurred. Please retry.")
        case "auth":
            details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
            words = "API key not valid. Please pass a valid API key."
            return 400, _google(400, "INVALID_ARGUMENT", words) | {"details": details}
        case "permission":
            return 403, _google(403, "PERMISSION_DENIED", "The caller does not have permission")
        case "not_found":
            words = "models/nothing is not found for API version v1main, or is not supported for generateContent."
            return 404, _google(404, "NOT_FOUND", words)
        case "overflow":
            words = "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."
            return 400, _google(400, "INVALID_ARGUMENT", words)
        case "tool_schema":
            words = "* GenerateContentRequest.tools[0].function_declarations[0].parameters.properties[rows].items: missing field."
            return 400, _google(400, "INVALID_ARGUMENT", words)
        case "invalid_request":
            return 400, _google(400, "INVALID_ARGUMENT", 'Invalid JSON payload received. Unknown name "colour".')
        case _:
            return openai_error(failure, headers)


def _error(
    message: str, *, kind: str | None = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Json:
    return {"message": message, "type": kind, "param": param, "code": code}


def _google(code: int, status: str, message: str) -> Json:
    return {"code": code, "message": message, "status": status}


def _echoed(headers: Mapping[str, str]) -> str:
    """As OpenAI repeats a wrong key: its beginning and its end."""
    key = headers.get("authorization", "").removeprefix("Bearer ")
    return f"{key[:8]}{'*' * 12}{key[-4:]}"


def _in_pieces(text: str) -> Iterator[str]:
    size = max(1, -(-len(text) // _ARGUMENT_PIECES))
    yield from (text[at : at + size] for at in range(0, len(text), size))
