"""Foreign text: one printable line in messages, and no markup, path or mathematics anywhere else."""

import pytest

from vlm_jax.core import text
from vlm_jax.core.errors import UserError, unknown

HOSTILE = (
    "../../escaped", "/etc/passwd", "..", ".", "", "a\0b", "a/b", "a\\b", "x" * 300, "y" * 300, "\ud800", "日本語",
    "日本", '"><img src=x onerror=alert(1)>', "\x1b[31m", "-rf", "a b", "CON ", "$\\frac$", "a-1a2b3c4d", "ocr\n", "²",
)  # fmt: skip


@pytest.mark.parametrize("foreign", ["\x1b[2J", "\x9b31m", "\u202ecod.exe", "a\rb", "\x07", "\ud800", "\x00"])
def test_messages_have_no_control_characters(foreign: str) -> None:
    message = str(UserError(f"a.json: expected a name, got {foreign} here"))
    assert message.isprintable()
    assert message.startswith("a.json: expected a name, got ")
    assert message.endswith(" here")


def test_messages_are_one_short_line_with_both_ends() -> None:
    message = str(UserError(f"a.json: expected a name, got {'x' * 10**6}\n\n (choose another)"))
    assert len(message) <= text.MAX_MESSAGE
    assert message.startswith("a.json: expected a name")
    assert message.endswith("(choose another)")
    assert " ... " in message
    assert str(UserError("two\nlines,\tand  more")) == "two lines, and more"


def test_letters_of_all_scripts_stay() -> None:
    plain = "naïve 日本語 😀 👨\u200d👩\u200d👧 \u0639\u0631\u0628\u064a"
    assert text.printable(plain) == plain
    assert text.printable("a\tb\nc\x1b[0m") == "a\tb\nc\\x1b[0m"


def test_a_long_unknown_name_costs_little() -> None:
    message = str(unknown("form", "y" * 10**6, ["multiplicative"]))
    assert "unknown form 'yyyy" in message
    assert len(message) <= text.MAX_MESSAGE


def test_file_names_are_safe_and_different() -> None:
    slugs = [text.slug(name) for name in HOSTILE]
    assert len(set(slugs)) == len(HOSTILE)
    for slug in slugs:
        assert 1 <= len(slug) <= 64
        assert set(slug) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+=,-")
        assert slug[0] not in ".-"


@pytest.mark.parametrize("name", ["ocr", "mme_perception", "llm=d48,tokens=4", "v1.5"])
def test_plain_names_are_their_own_file_names(name: str) -> None:
    assert text.slug(name) == name


def test_a_name_cannot_pose_as_the_file_name_of_another() -> None:
    assert text.slug(text.slug("a b")) != text.slug("a b")


def test_html_has_no_tags_or_quotes() -> None:
    assert text.to_html("\"><img onerror='x'>&\x1b") == "&quot;&gt;&lt;img onerror=&#x27;x&#x27;&gt;&amp;\\x1b"


def test_labels_are_drawn_as_they_are() -> None:
    """matplotlib draws `\\$` as a dollar sign, and two `$` as mathematics."""
    from matplotlib import cbook

    for name in ("$\\frac$", "$x_{$", "a$b$c$", "plain"):
        assert not cbook.is_math_text(text.to_label(name))
    assert text.to_label("_hidden") == " _hidden"
    assert len(text.to_label("x" * 300)) <= 60
