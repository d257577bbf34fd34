"""Foreign text in messages, file names, HTML pages and figures: one function for each."""

import re

MAX_MESSAGE = 500  # characters of an error
MAX_NAME = 200  # characters of a name in a file of data
# Control characters but tab and newline, line separators, text direction, lone surrogates.
_UNPRINTABLE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_SLUG = r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,63}"
_HASHED = r".*-[0-9a-f]{8}"  # as `slug` ends the names that it changes


def printable(text: object) -> str:
    """The text with control characters and lone surrogates as escapes; tabs and newlines stay."""
    return re.sub(_UNPRINTABLE, lambda match: ascii(match[0])[1:-1], str(text))


def is_printable(text: str) -> bool:
    return re.search(_UNPRINTABLE, text) is None


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the middle is left out."""
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 5]} ... {text[-tail:]}"


def one_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """The text in one printable line of at most `limit` characters."""
    return shorten(printable(" ".join(shorten(str(text), 20 * limit).split())), limit)


def slug(name: str) -> str:
    """A file name for any name, at most 64 characters: the name itself if it is one, else what is left of it and a
    hash, so that different names give different files."""
    if re.fullmatch(_SLUG, name) and not re.fullmatch(_HASHED, name):
        return name
    import hashlib  # not at the top: every command imports this module before its first flag is read

    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = re.sub(r"[^A-Za-z0-9_+=,]+", "-", name).strip("-")[:48]
    return f"{kept or 'name'}-{digest}"


def to_html(text: object) -> str:
    """Text for an HTML page, as content or as an attribute."""
    import html

    return html.escape(printable(text))


def to_label(text: object, limit: int = 60) -> str:
    """Text for a figure: matplotlib reads `$` as mathematics, and leaves labels with a leading "_" out of legends."""
    label = one_line(text, limit).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label
