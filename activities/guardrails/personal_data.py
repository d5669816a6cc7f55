"""Personal data and secrets by their shape, and by their check digits where they have some.

Numbers that merely look like a card or an account fail their checksum nine times out of ten and more; telephone numbers have
none, so only their usual spellings are taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

from infra.text_patterns import Match, Pattern, compile_line_pattern

Kind = Literal["email", "phone", "credit_card", "iban", "secret"]

_IBAN_COUNTRIES: Final = {
    15: "NO",
    16: "BE",
    18: "DK FI NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS",
    23: "AE GI IL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "PT",
    26: "IS TR",
    27: "FR GR IT MC MR SM",
    28: "AL AZ CY DO HU LB PL",
    29: "BR PS QA UA",
    30: "KW MU",
    31: "MT",
}
IBAN_LENGTHS: Final = {
    country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()
}
CARD_DIGITS: Final = range(13, 20)
MAX_SMALL_GROUPS: Final = 64
"""In a table of numbers, groups of one or two digits are no part of a card: trying them all would take too long."""

_PATTERNS: Final[dict[Kind, str]] = {
    "email": r"(?i)[a-z0-9._%+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}",
    "phone": r"\+[1-9](?:[ ().\-/]{0,2}[0-9]){7,14}|(?:\b|\()[0-9]{3}\)?[ .\-][0-9]{3}[ .\-][0-9]{4}\b",
    "credit_card": r"[0-9](?:[ -]?[0-9]){12,}",
    "iban": r"(?i)\b[a-z]{2}[0-9]{2}(?: ?[a-z0-9]){11,30}",
    "secret": "|".join(
        (
            r"\bsk-[A-Za-z0-9_-]{20,}",
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
            r"\bgh[pousr]_[A-Za-z0-9]{36,}",
            r"\bgithub_pat_[A-Za-z0-9_]{22,}",
            r"\bglpat-[A-Za-z0-9_-]{20,}",
            r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
            r"\bAIza[0-9A-Za-z_-]{35}",
            r"\b(?:sk|rk)_live_[A-Za-z0-9]{16,}",
            r"\bnpm_[A-Za-z0-9]{36}",
            r"\bhf_[A-Za-z0-9]{30,}",
            r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
        )
    ),
}


def compiled(kind: Kind) -> Pattern:
    return compile_line_pattern(_PATTERNS[kind])


def is_real(kind: Kind, data: bytes, match: Match) -> bool:
    """Whether a match is what it looks like."""
    check = _CHECKS.get(kind)
    return check is None or check(data[match.start() : match.end()].decode("utf-8", "replace"))


def _is_card(text: str) -> bool:
    """Any groups of the number, one after the other, that make a card number."""
    groups = re.split("[ -]", text)
    shortest = 1 if len(groups) <= MAX_SMALL_GROUPS else 3
    for first, begin in enumerate(groups):
        if begin[0] not in "23456" or len(begin) < shortest:
            continue
        number = ""
        for group in groups[first : first + CARD_DIGITS.stop]:
            number += group
            if len(number) >= CARD_DIGITS.stop or len(group) < shortest:
                break
            if len(number) in CARD_DIGITS and _luhn(number):
                return True
    return False


def _luhn(number: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _is_iban(text: str) -> bool:
    compact = text.replace(" ", "").upper()
    length = IBAN_LENGTHS.get(compact[:2])
    if length is None or len(compact) < length:
        return False
    account = compact[:length]
    return int("".join(str(int(one, 36)) for one in account[4:] + account[:4])) % 97 == 1


_CHECKS: Final[dict[Kind, Callable[[str], bool]]] = {"credit_card": _is_card, "iban": _is_iban}
