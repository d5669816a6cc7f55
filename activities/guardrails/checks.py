"""The configuration of `guardrails`, and the matcher each check is compiled into.

Regular expressions are RE2's and matched line by line: nothing anybody configures can take more than linear time. Whatever could
be said only by a model or a server elsewhere is no check here: nothing leaves this process.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Protocol, get_args
from urllib.parse import urlsplit

import re2
from msgspec import UNSET, Meta, Struct, UnsetType, field

from activities.guardrails import personal_data
from activities.guardrails.folded_text import Phrases, folded
from domain.workspace import BadPattern
from infra.text_patterns import Pattern, compile_line_pattern

MAX_CHECKS: Final = 64
MAX_ENTRIES: Final = 64
ENTRY_MAX_CHARACTERS: Final = 512
HOLD_BACK_MAX_CHARACTERS: Final = 1_000_000
HOLD_BACK_CHARACTERS: Final = 200
OPEN_MAX_CHARACTERS: Final = 64 * 1024
"""A match that has not ended after this much counts as one: it would be looked at again with every further piece."""

Stage = Literal["output", "tool_use", "tool_output"]
Entry = Annotated[str, Meta(min_length=1, max_length=ENTRY_MAX_CHARACTERS)]
Entries = Annotated[list[Entry], Meta(min_length=1, max_length=MAX_ENTRIES)]


class Check(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What all checks have. A check that blocks replaces the text, or refuses the call; one that logs only says so."""

    stage: Stage
    id: Annotated[str, Meta(min_length=1, max_length=128)] | UnsetType = UNSET
    on_fail: Literal["block", "log"] = "block"
    replacement: Annotated[str, Meta(min_length=1, max_length=4_000)] | UnsetType = UNSET

    @property
    def type(self) -> str:
        return str(self.__struct_config__.tag)


class RegexCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="regex"):
    patterns: Annotated[Entries, Meta(description="RE2, matched line by line; `(?i)` in front ignores case.")]

    def __post_init__(self) -> None:
        for index, pattern in enumerate(self.patterns):
            try:
                compiled = compile_line_pattern(pattern)
            except BadPattern as error:
                raise ValueError(f"`patterns[{index}]`: {error}") from None
            if compiled.fullmatch(b"") is not None:
                raise ValueError(f"`patterns[{index}]` matches the empty text, and with it everything")


class BlocklistCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="blocklist"):
    words: Annotated[Entries, Meta(description="Words and phrases, found anywhere, also inside other words.")]
    case_sensitive: bool = False
    whole_words: Annotated[bool, Meta(description="Only where no letter or digit stands next to it.")] = False

    def __post_init__(self) -> None:
        for index, word in enumerate(self.words):
            if not folded(word).text.strip():
                raise ValueError(f"`words[{index}]` has no visible character")


class ToolPatternCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="tool_pattern"):
    tools: Annotated[Entries, Meta(description="Names of tools that must not be called; `*` and `?` are wildcards.")]
    except_tools: Annotated[
        list[Entry], Meta(max_length=MAX_ENTRIES, description="Names that may be called nevertheless.")
    ] = []

    def __post_init__(self) -> None:
        if self.stage != "tool_use":
            raise ValueError("`tool_pattern` is for the stage `tool_use` only")


class PiiCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pii"):
    kinds: Annotated[
        list[personal_data.Kind],
        Meta(min_length=1, description="Cards and IBANs are taken only with the right check digits."),
    ] = field(default_factory=lambda: list(get_args(personal_data.Kind)))


class MaxLengthCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="max_length"):
    characters: Annotated[int, Meta(ge=1, le=10_000_000)]


class UrlCheck(Check, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="url"):
    """A URL is found when it is denied, or when there is an `allow` that it is not on."""

    allow: Annotated[
        list[Entry], Meta(max_length=MAX_ENTRIES, description="Hosts; `*.example.com` has subdomains.")
    ] = []
    deny: Annotated[list[Entry], Meta(max_length=MAX_ENTRIES, description="Hosts, stronger than `allow`.")] = []

    def __post_init__(self) -> None:
        if not self.allow and not self.deny:
            raise ValueError("a `url` check needs `allow` or `deny`")


AnyCheck = RegexCheck | BlocklistCheck | ToolPatternCheck | PiiCheck | MaxLengthCheck | UrlCheck


class Guardrails(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Annotated[Literal["active", "advisory"], Meta(description="`advisory`: nothing is blocked, only logged.")] = (
        "active"
    )
    checks: Annotated[list[AnyCheck], Meta(max_length=MAX_CHECKS)] = []
    hold_back_characters: Annotated[
        int,
        Meta(
            ge=0,
            le=HOLD_BACK_MAX_CHARACTERS,
            description="How much of an answer's end is not shown before more has come, where a check of the output blocks: "
            "a match up to this length is never seen, not even its beginning.",
        ),
    ] = HOLD_BACK_CHARACTERS

    def __post_init__(self) -> None:
        ids = [check.id for check in self.checks if check.id is not UNSET]
        if twice := [one for one in ids if ids.count(one) > 1]:
            raise ValueError(f"`checks`: the id `{twice[0]}` is used twice")

    def check_id(self, index: int) -> str:
        check = self.checks[index]
        return f"{check.type}#{index}" if isinstance(check.id, UnsetType) else check.id

    def action(self, check: Check) -> Literal["block", "log"]:
        return "log" if self.mode == "advisory" else check.on_fail


class Found(Struct, frozen=True):
    """Where a check found something, in characters."""

    start: int
    end: int


class Looked(Struct, frozen=True):
    """`open_from`: what stands behind it may still become a match, or a part of one."""

    found: Found | None
    open_from: int


class Matcher(Protocol):
    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        """The first match at or after `start`; what stands before is only looked at as context. `before` counts the characters of
        the text that are not in `text` any more.

        Without `finished`, more may follow: a match that reaches the end is open.
        """
        ...


def matcher_of(check: AnyCheck, *, hold_back: int = 0) -> Matcher:
    match check:
        case RegexCheck(patterns=patterns):
            return _Expressions([(compile_line_pattern(one), None) for one in patterns], hold_back)
        case PiiCheck(kinds=kinds):
            return _Expressions([(personal_data.compiled(kind), kind) for kind in kinds], hold_back)
        case UrlCheck():
            return _Urls(check, hold_back)
        case BlocklistCheck():
            return _Words(check)
        case MaxLengthCheck(characters=characters):
            return _Length(characters)
        case ToolPatternCheck(tools=tools, except_tools=exceptions):
            return _Names(tools, exceptions)


class _Expressions:
    def __init__(self, patterns: list[tuple[Pattern, personal_data.Kind | None]], hold_back: int) -> None:
        self._patterns = patterns
        self._hold_back = hold_back

    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        data = text.encode("utf-8", "replace")
        begin = len(text[:start].encode("utf-8", "replace"))
        open_from = len(text) if finished else max(start, len(text) - self._hold_back)
        found: list[Found] = []
        for pattern, kind in self._patterns:
            position = begin
            while (match := pattern.search(data, position)) is not None:
                first, last = match.start(), match.end()
                if not finished and last == len(data) and len(data) - first <= OPEN_MAX_CHARACTERS:
                    open_from = min(open_from, _characters(data, first))
                    break
                if kind is None or personal_data.is_real(kind, data, match):
                    found.append(Found(_characters(data, first), _characters(data, last)))
                    break
                position = max(last, first + 1)
        return Looked(min(found, key=lambda one: one.start, default=None), open_from)


class _Urls:
    def __init__(self, check: UrlCheck, hold_back: int) -> None:
        self._url = compile_line_pattern(r"(?i)\b(?:https?|wss?|ftp)://[^\s<>\"'`\x{201c}\x{201d})\]}]+")
        self._allow = _globs(check.allow)
        self._deny = _globs(check.deny)
        self._hold_back = hold_back

    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        data = text.encode("utf-8", "replace")
        position = len(text[:start].encode("utf-8", "replace"))
        open_from = len(text) if finished else max(start, len(text) - self._hold_back)
        while (match := self._url.search(data, position)) is not None:
            first, last = match.start(), match.end()
            if not finished and last == len(data) and last - first <= OPEN_MAX_CHARACTERS:
                open_from = min(open_from, _characters(data, first))
                break
            if self._is_wrong(data[first:last].decode("utf-8", "replace")):
                return Looked(Found(_characters(data, first), _characters(data, last)), open_from)
            position = last
        return Looked(None, open_from)

    def _is_wrong(self, url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".").encode()
        except ValueError:
            return True
        if self._deny is not None and self._deny.fullmatch(host):
            return True
        return self._allow is not None and self._allow.fullmatch(host) is None


class _Words:
    def __init__(self, check: BlocklistCheck) -> None:
        self._case_sensitive = check.case_sensitive
        self._whole = check.whole_words
        self._words = [folded(word, case_sensitive=check.case_sensitive).text for word in check.words]
        self._phrases = Phrases(self._words)

    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        plain = folded(text, case_sensitive=self._case_sensitive)
        places = [one for word in self._words if (one := self._first(word, plain.text, start, finished)) is not None]
        found = min(places, default=None)
        if found is not None:
            return Looked(Found(plain.place(found[0]), plain.end_of(found[1])), plain.place(found[0]))
        if finished:
            return Looked(None, len(text))
        open_from = self._phrases.open_from(plain.text)
        if self._whole:
            # A word at the very end may go on and be another one.
            ends = [len(plain.text) - len(word) for word in self._words if plain.text.endswith(word)]
            open_from = min([open_from, *ends])
        return Looked(None, plain.place(open_from))

    def _first(self, word: str, text: str, start: int, finished: bool) -> tuple[int, int] | None:
        place = text.find(word, start)
        while place >= 0:
            end = place + len(word)
            if not self._whole or (not text[place - 1 : place].isalnum() and self._ends(text, end, finished)):
                return place, end
            place = text.find(word, place + 1)
        return None

    @staticmethod
    def _ends(text: str, end: int, finished: bool) -> bool:
        return not text[end].isalnum() if end < len(text) else finished


class _Length:
    def __init__(self, characters: int) -> None:
        self._characters = characters

    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        found = Found(self._characters, before + len(text)) if before + len(text) > self._characters else None
        return Looked(found, len(text))


class _Names:
    """Of a tool, which is the whole text."""

    def __init__(self, tools: list[str], exceptions: list[str]) -> None:
        self._tools = _globs(tools)
        self._exceptions = _globs(exceptions)

    def look(self, text: str, *, start: int = 0, before: int = 0, finished: bool = True) -> Looked:
        name = text.lower().encode("utf-8", "replace")
        hit = self._tools is not None and self._tools.fullmatch(name) is not None
        if hit and self._exceptions is not None and self._exceptions.fullmatch(name) is not None:
            hit = False
        return Looked(Found(0, len(text)) if hit else None, len(text))


def _globs(patterns: list[str]) -> Pattern | None:
    """One expression for all of them; None for none. RE2, so that many stars cost nothing."""
    if not patterns:
        return None
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    joined = "|".join(_glob(one.lower()) for one in patterns)
    return re2.compile(joined.encode(), options)


def _glob(pattern: str) -> str:
    return "".join({"*": ".*", "?": "."}.get(one) or re2.escape(one) for one in pattern)


def _characters(data: bytes, end: int) -> int:
    return len(data[:end].decode("utf-8", "replace"))
