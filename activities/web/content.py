"""What a model gets to read of a body: its kind, its characters, and as much of its text as fits."""

from __future__ import annotations

import codecs
import re
from typing import Final, Literal

import msgspec

Kind = Literal["html", "json", "text", "binary"]

MAX_SHOWN_BYTES: Final = 60 * 1024
"""Of text in a result, as JSON: with the fields around it that stays below the 64 KiB a tool's result may have."""
MAX_INDENTED_JSON_BYTES: Final = 64 * 1024
"""Larger JSON stays as it came: indenting would only use up the room, and deeply nested JSON grows a thousandfold."""

_SNIFFED_BYTES: Final = 1024
_TEXT_TYPES: Final = frozenset({
    "application/ecmascript",
    "application/graphql",
    "application/javascript",
    "application/sql",
    "application/toml",
    "application/x-httpd-php",
    "application/x-javascript",
    "application/x-ndjson",
    "application/x-sh",
    "application/x-www-form-urlencoded",
    "application/x-yaml",
    "application/xml",
    "application/xml-dtd",
    "application/yaml",
    "image/svg+xml",
    "message/rfc822",
})  # fmt: skip
_UNKNOWN_TYPES: Final = frozenset({"", "application/octet-stream", "application/unknown", "binary/octet-stream"})
_WIDE_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BOMS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

# Labels as browsers read them. A closed list: Python knows codecs that are no character sets (rot13, zip) or that take
# quadratic time on hostile input (punycode, idna).
_CHARSETS: Final = {
    **{name: name for name in ("utf-8", "utf-16-le", "utf-16-be", "euc-jp", "iso-2022-jp", "gb18030", "koi8-r", "koi8-u")},
    **{f"iso-8859-{part}": f"iso-8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)},
    **{f"windows-{page}": f"cp{page}" for page in range(1250, 1259)},
    **dict.fromkeys(("utf8", "unicode-1-1-utf-8"), "utf-8"),
    **dict.fromkeys(("utf-16", "utf-16le", "unicode", "ucs-2"), "utf-16-le"),
    "utf-16be": "utf-16-be",
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin1", "latin-1", "ascii", "us-ascii", "cp1252"), "cp1252"),
    **dict.fromkeys(("iso-8859-9", "latin5"), "cp1254"),
    **dict.fromkeys(("latin2", "iso8859-2"), "iso-8859-2"),
    **dict.fromkeys(("gbk", "gb2312", "x-gbk"), "gb18030"),
    **dict.fromkeys(("big5", "big5-hkscs", "x-x-big5"), "big5hkscs"),
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "x-sjis", "windows-31j"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987", "korean"), "cp949"),
    **dict.fromkeys(("koi8", "koi"), "koi8-r"),
    **dict.fromkeys(("macintosh", "mac", "x-mac-roman"), "mac-roman"),
    **dict.fromkeys(("ibm866", "cp866", "866"), "cp866"),
    **dict.fromkeys(("windows-874", "tis-620", "iso-8859-11"), "cp874"),
    "cp1251": "cp1251",
}  # fmt: skip
_CHARSET_PARAMETER = re.compile(r"(?:^|;)\s*charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,100}?encoding\s*=\s*[\"']([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)


def parse_content_type(header: str) -> tuple[str, str | None]:
    """The media type in lower case, and the charset as it is named."""
    media_type, _, parameters = header.partition(";")
    charset = _CHARSET_PARAMETER.search(parameters)
    return media_type.strip().lower(), charset[1] if charset else None


def kind_of(media_type: str, charset: str | None, body: bytes) -> Kind:
    """What is declared, except where that says nothing; and what can't be text is none, whatever is declared."""
    head = body[:_SNIFFED_BYTES]
    is_wide = head.startswith(_WIDE_MARKS) or _CHARSETS.get((charset or "").lower(), "").startswith("utf-16")
    if b"\0" in head and not is_wide:
        return "binary"
    if media_type in ("text/html", "application/xhtml+xml"):
        return "html"
    if media_type in ("application/json", "text/json") or media_type.endswith("+json"):
        return "json"
    if media_type.startswith("text/") or media_type in _TEXT_TYPES or media_type.endswith(("+xml", "+yaml")):
        return "text"
    if media_type in _UNKNOWN_TYPES:
        return _sniffed(head)
    return "binary"


def _sniffed(head: bytes) -> Kind:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "binary"
    if any(character < " " and character not in "\t\n\r\f" for character in text):
        return "binary"
    start = text.lstrip("\ufeff \t\r\n")[:20].lower()
    return "html" if start.startswith(("<!doctype html", "<html", "<head", "<body")) else "text"


def decoded(body: bytes, kind: Kind, charset: str | None) -> str:
    """Characters out of bytes; what is not valid becomes U+FFFD. Mark, header, `<meta>`, then UTF-8."""
    for mark, name in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    name = _CHARSETS.get((charset or "").strip().lower()) or _declared_inside(body, kind)
    return body.decode(name or "utf-8", "replace")


def _declared_inside(body: bytes, kind: Kind) -> str | None:
    pattern = _META_CHARSET if kind == "html" else _XML_ENCODING
    match = pattern.search(body[:_SNIFFED_BYTES])
    name = _CHARSETS.get(match[1].decode().lower()) if match else None
    # A page that could be read up to its `<meta>` is not in UTF-16, whatever that says.
    return "utf-8" if name in ("utf-16-le", "utf-16-be") else name


def indented_json(text: str) -> str:
    if len(text) > MAX_INDENTED_JSON_BYTES:
        return text
    try:
        return msgspec.json.format(text, indent=2)
    except (msgspec.DecodeError, RecursionError):
        return text


def fitting(text: str, max_bytes: int = MAX_SHOWN_BYTES) -> str:
    """As much of the beginning as takes that many bytes when it is written as JSON."""
    if len(text) * 6 <= max_bytes or _json_bytes(text[: max_bytes + 1]) <= max_bytes:
        return text[:max_bytes]
    low, high = 0, min(len(text), max_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if _json_bytes(text[:middle]) <= max_bytes:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _json_bytes(text: str) -> int:
    return len(msgspec.json.encode(text)) - 2
