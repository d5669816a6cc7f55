"""HTML to Markdown or text, in a process of its own: reads one JSON request from stdin, writes one JSON answer to stdout.

The converter holds the interpreter's lock while it works, and pages are made by strangers: here it can take neither the worker's
time nor its memory, and it can be killed. Run as a script, so that nothing of ours is imported with it.
"""

from __future__ import annotations

import html
import json
import re
import sys

CPU_SECONDS = 20
ADDRESS_SPACE_BYTES = 1536 * 1024 * 1024
MAX_OUTPUT_CHARACTERS = 8 * 1024 * 1024
MAX_DEPTH = 400
TITLE_WITHIN_CHARACTERS = 256 * 1024
MAX_TITLE_CHARACTERS = 300

BOILERPLATE = [
    "nav",
    "aside",
    "footer",
    "dialog",
    "[role=navigation]",
    "[role=banner]",
    "[role=contentinfo]",
    "[role=complementary]",
    "[role=search]",
]


def limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


def title_of(page: str) -> str | None:
    head = page[:TITLE_WITHIN_CHARACTERS]
    match = re.search(r"<title(?:\s[^<>]{0,500})?>([^<]{1,5000})", head, re.IGNORECASE)
    words = html.unescape(match[1]).split() if match else []
    return " ".join(words)[:MAX_TITLE_CHARACTERS] or None


def main_part(page: str) -> str:
    """What is inside `<main>`, or inside the only `<article>`, or the whole page."""
    lowered = page.lower()
    if len(lowered) != len(page):  # a few characters get longer: positions would be off
        return page
    for element, most in (("main", sys.maxsize), ("article", 1)):
        starts = [match.start() for match in re.finditer(rf"<{element}[\s>]", lowered)]
        end = lowered.rfind(f"</{element}")
        if 1 <= len(starts) <= most and starts[0] < end:
            return page[starts[0] : end]
    return page


def converted(page: str, *, markdown: bool, main_only: bool, base_url: str) -> str:
    from html_to_markdown import ConversionOptions, InlineDataMedia, OutputFormat, PreprocessingOptions, convert

    options = ConversionOptions(
        extract_metadata=False,
        output_format=OutputFormat.MARKDOWN if markdown else OutputFormat.PLAIN,
        inline_data_media=InlineDataMedia.ALT_TEXT_ONLY,
        preprocessing=PreprocessingOptions(enabled=main_only, remove_navigation=main_only, remove_forms=main_only),
        exclude_selectors=BOILERPLATE if main_only else [],
        max_depth=MAX_DEPTH,
        base_url=base_url,
    )
    return (convert(main_part(page) if main_only else page, options).content or "").strip()


def main() -> None:
    limit_resources()
    request = json.loads(sys.stdin.buffer.read())
    page = request.pop("page")
    content = converted(page, **request)
    answer = {
        "title": title_of(page),
        "content": content[:MAX_OUTPUT_CHARACTERS],
        "is_cut": len(content) > MAX_OUTPUT_CHARACTERS,
    }
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
