"""Reading a number as people write it, in the conventions of its language; docs/evaluation.md has the rules."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from layalign.data.languages import find_language

_KINDS = {",": ",", "،": ",", "，": ",", ".": ".", "．": ".", "٫": "decimal", "٬": "group", "'": "group", "’": "group"}
_NARROW = "\u00a0\u2007\u2009\u202f"
_MARK = re.compile(rf"[{''.join(_KINDS)} {_NARROW}]")
_COMMA = re.compile("[,،，]")
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_MINUS = "-−﹣－–"
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")

_CHINESE = {character: number for number, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "兆": 10**12}
_NUMERAL = "".join((*_CHINESE, *_UNITS, *_MYRIADS))


def _pattern(spaces: str) -> re.Pattern[str]:
    """A number as it may stand in a text; ``spaces`` may part groups of three digits."""
    token = rf"\d+(?:[{''.join(_KINDS)}]\d+|[{spaces}]\d{{3}}(?!\d))*"
    return re.compile(
        rf"""
        (?P<sign>(?<![\w)\].])[{_MINUS}]\\?[$€£¥₹₽฿₩]?)?      # no subtraction: not after a digit, letter or bracket
        (?:
          (?:(?<![\d/⁄])(?P<whole>\d+)[ {_NARROW}])?(?<![\d/⁄])(?P<over>\d+)[/⁄](?P<under>\d+)(?![/⁄]?\d)
        | (?:(?P<token>{token})|(?<![\w.)])[.](?P<places>\d+))
          (?:
            [eE](?P<e>[-+]?\d{{1,3}})(?![\w.])
          | \s?(?:[×·*x]|\\times|\\cdot)\s?10(?:\^\{{?(?P<power>[-−]?\d{{1,3}})\}}?|(?P<raised>⁻?[⁰¹²³⁴-⁹]{{1,3}}))
          | [ {_NARROW}]?(?P<vulgar>[{_VULGAR}])
          | (?P<myriads>[{"".join(_MYRIADS)}](?:{token}|[{_NUMERAL}])*)
          )?
        | (?P<alone>[{_VULGAR}])
        )
        """,
        re.VERBOSE,
    )


_WITH_SPACES, _WITHOUT = _pattern(" " + _NARROW), _pattern(_NARROW)
_CHINESE_RUN = re.compile(rf"[{_NUMERAL}]+")
_PART = re.compile(rf"[{_NUMERAL}]|[^{_NUMERAL}]+")


class Convention:
    """How a language writes numbers.

    Args:
        language: name or code; None where it is not known: then only what has one possible meaning is read.
    """

    def __init__(self, language: str | None = None) -> None:
        found = None if language is None else find_language(language)
        self.known = found is not None
        parted = None if found is None else found.decimal_comma
        self.points, self.commas = parted == "points", parted is not None
        self.pattern = _WITHOUT if self.known and not self.commas else _WITH_SPACES

    def decimal(self, mark: str, whole: str, places: str) -> bool:
        """Whether the only mark in a number, ``whole`` MARK ``places``, is a decimal mark."""
        zero = unicodedata.digit(whole[0]) == 0
        thousands = len(places) == 3 and len(whole) <= 3 and not zero
        if mark == ".":
            return not (thousands and self.points)
        if mark == ",":  # "1,234" is how the test sets write thousands in every language
            single = len(whole) == len(places) == 1
            return not thousands and (self.commas or zero or not (self.known or single))
        return mark == "decimal"

    def value(self, token: str) -> Decimal | None:
        """The number that digits with marks between them give; None for several numbers (``1,2,3``, ``24.12.2024``)."""
        digits = _MARK.split(token)
        marks = [_KINDS.get(mark, "group") for mark in _MARK.findall(token)]
        if not marks:
            return Decimal(token)
        *before, last = marks
        if last != "group" and last not in before:
            decimal = _grouped(digits[:-1], before) if before else self.decimal(last, digits[0], digits[1])
            if decimal:
                return Decimal(f"{''.join(digits[:-1])}.{digits[-1]}")
        return Decimal("".join(digits)) if _grouped(digits, marks) else None

    def last_of(self, token: str) -> Decimal:
        """As :meth:`value`; of several numbers the last one."""
        found = self.value(token)
        if found is None:
            *before, last = _COMMA.split(token)
            found = self.last_of(last) if before else Decimal(_MARK.split(token)[-1])
        return found


def _grouped(digits: list[str], marks: list[str]) -> bool:
    """Whether equal marks part thousands: groups of three, or Indian ones (12,34,567)."""
    first, *middle, last = digits
    if len(set(marks)) != 1 or marks[0] == "decimal" or len(last) != 3 or unicodedata.digit(first[0]) == 0:
        return False
    return (len(first) <= 3 and all(len(group) == 3 for group in middle)) or (
        marks[0] == "," and len(first) <= 2 and all(len(group) == 2 for group in middle)
    )


def find_number(text: str, language: str | None = None) -> Decimal | None:
    """The last number of a text; None without any.

    Args:
        text: any text.
        language: name or code of the language whose conventions decide what can be read in two ways.
    """
    text = _plain(text)
    convention = Convention(language)
    for part in (_boxed(text), text):
        # Words in brackets after a number are a remark: "5 (step 2)".
        part = re.sub(r"(?<=\d)\s\((?=[^()]*[^\W\d_])[^()]*\)", "", part)
        numbers = list(convention.pattern.finditer(part))
        if numbers:
            return _value(numbers[-1], convention)
        runs = _CHINESE_RUN.findall(part)
        if runs:
            return _composite(_PART.findall(runs[-1]), convention)
    return None


def whole_number_text(text: str, language: str | None = None) -> str | None:
    """A text that is one number and nothing else (save a currency or a percent sign), in plain digits; else None.

    Powers of ten (1e3) and numbers without a digit before the point are none.
    """
    convention = Convention(language)
    text = _plain(text).strip()
    text = re.sub(r"^([-−﹣－–+]?)\s*[$€£¥₹₽฿₩]\s*|\s*[$€£¥₹₽฿₩%٪％]$", r"\1", text)
    found = convention.pattern.fullmatch(text.removeprefix("+"))
    if found is None:
        value = _composite(_PART.findall(text), convention) if _CHINESE_RUN.fullmatch(text) else None
    elif any(found[name] for name in ("e", "power", "raised", "places")):
        value = None
    else:
        several = found["token"] is not None and convention.value(found["token"]) is None
        value = None if several else _value(found, convention)
    return None if value is None else f"{value:f}"


def _plain(text: str) -> str:
    """Without direction marks, and LaTeX's ways of writing numbers in the usual ones."""
    text = re.sub("[\u200e\u200f\u061c\u2066-\u2069]|\\\\!", "", text)
    text = re.sub(r"\{,\}", ",", re.sub(r"\\[,;: ]", "\u2009", text))
    return re.sub(r"(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2]}/{m[3]}", text)


def _boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` holds; an empty text without one."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for place in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[start + 7 : place]
    return text[start + 7 :] if start >= 0 else ""


def _value(found: re.Match[str], convention: Convention) -> Decimal:
    if found["over"]:
        over, under = Decimal(found["over"]), Decimal(found["under"])
        value = over / under + Decimal(found["whole"] or 0) if under else under
    elif found["alone"]:
        value = _fraction(found["alone"])
    elif found["myriads"]:
        parts = [found["token"] or f"0.{found['places']}", *_PART.findall(found["myriads"])]
        value = _composite(parts, convention)
    else:
        value = Decimal(f"0.{found['places']}") if found["places"] else convention.last_of(found["token"])
        power = found["e"] or found["power"] or found["raised"]
        if power:
            value = value.scaleb(int(power.replace("−", "-").translate(_SUPERSCRIPTS)))
        if found["vulgar"]:
            value += _fraction(found["vulgar"])
    return value.copy_negate() if found["sign"] else value


def _fraction(character: str) -> Decimal:
    return Decimal(str(unicodedata.numeric(character)))


def _composite(parts: list[str], convention: Convention) -> Decimal:
    """The value of Chinese numerals, among which digits may stand: 三千五百, 1万2千, 二〇二四."""
    total, section, current = Decimal(0), Decimal(0), None
    for part in parts:
        if part in _UNITS:
            section, current = section + (1 if current is None else current) * _UNITS[part], None
        elif part in _MYRIADS:
            total += (section + (current or 0) or 1) * _MYRIADS[part]
            section, current = Decimal(0), None
        elif part in _CHINESE:
            current = (current or Decimal(0)) * 10 + _CHINESE[part]
        else:
            current = convention.last_of(part)
    return total + section + (current or 0)
