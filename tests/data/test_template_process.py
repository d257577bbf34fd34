"""Limits on the time, memory and output of chat templates."""

import resource
import subprocess
import sys
import time

import pytest

from tests.golden import peers_text
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, chat_formats, template_process, tokenizers
from vlm_jax.data.template_process import TemplateLimit
from vlm_jax.studies.glyphs import tokenizer_files

TALK = [{"role": "user", "content": "Hi"}]


def render(template: str, messages: list = TALK) -> str:
    return template_process.render(template, messages, {}, True)


BOMBS = {
    "power": "{{ (10 ** 10 ** 9) | length }}{% set a = 9 ** 9999 %}{{ a ** 99999 }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "percent": "{{ '%2000000000d' % messages | length }}",
    "json": "{{ messages | tojson(indent=1000000000) }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "list": "{{ ([1] * 10 ** 10) | length }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "replace": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 5) }}",
    "words": "{{ lipsum(n=10 ** 8) }}",
    "literal": "x" * 40_000_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_that_takes_too_much_is_stopped(kind: str) -> None:
    """Where it runs, or where Jinja folds its constants; the next template is rendered."""
    start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="chat template: "):
        render(BOMBS[kind])
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**19  # KiB: nothing of it was here
    assert render("{{ messages[0].content }}") == "Hi"


@pytest.mark.parametrize(
    "template",
    ["{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
     "{{ 1" + "+1" * 10**5 + " }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a' * 5000000 }}",
     "{% for a in [1] %}" * 150 + "{% endfor %}" * 150],
)  # fmt: skip
def test_deep_and_long_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        render(template)


def test_a_limit_ends_the_search_for_the_content_format() -> None:
    """Not one second for each trial."""
    chat_format = chat_formats.ChatFormat("template", BOMBS["loops"], "<image>")
    with pytest.raises(TemplateLimit, match="of computing"):
        chat.prompt_ids(chat_format, tokenizers.read_tokenizer(tokenizer_files.FOLDER, {}), "Hi", None, 0)


def test_long_conversations_are_within_the_limits() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(400)]
    text = render(peers_text.TEMPLATES["chatml"], messages)
    assert text.count("word ") == 800_000


def test_messages_arrive_as_they_are() -> None:
    """Lone surrogates, keys in order, and objects by the name of their type."""
    messages = [{"role": "user", "content": "\ud800 \U0001f600\n", "b": 1, "a": [None, 1.5, ("x",)], "image": object()}]
    assert render("{{ messages[0].content }}|{{ messages[0].image }}|{{ messages[0] | list }}", messages) == (
        "\ud800 \U0001f600\n|<object>|['role', 'content', 'b', 'a', 'image']"
    )
    looped: list = []
    looped.append(looped)
    with pytest.raises(UserError, match="messages: expected texts"):
        render("x", [{"role": "user", "content": looped}])


def test_generation_tags_are_not_rendered() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}{% else %}A{% generation %}{{ m.content }}E"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    messages = [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "yé"), ("user", "z"))]
    assert template_process.render_answers(template, messages, {}, []) == ("QxAyéEQz", [(3, 6)])
    assert render(template, messages[:1]) == "QxA"


def test_a_process_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    template_process.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="cannot start '/nowhere/python'"):
        render("x")
    monkeypatch.undo()
    assert render("x") == "x"


def test_a_forked_process_has_its_own() -> None:
    """And the interpreter ends without a word, whether it rendered, was refused, or forked."""
    code = (
        "import os\nfrom vlm_jax.data import template_process as t\n"
        "show = lambda: print(t.render('{{ messages[0] }}', ['Hi'], {}, True), flush=True)\n"
        "show()\npid = os.fork()\nshow()\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("Hi\n" * 3, "", 0)
