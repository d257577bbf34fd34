"""Jinja chat templates, rendered as transformers does.

    text = render(template, messages, special=tokenizer.special, prompt=True)
    text, spans = render_answers(template, messages, special, ends=["<|im_end|>"])

Sandboxed Jinja with `trim_blocks` and `lstrip_blocks`, `raise_exception`, `strftime_now`, `tojson` and the `generation`
tag. A template is a program: one that this package did not write is rendered by `data.template_process`, which limits
its time and memory. Needs nothing but Jinja, so that the process starts at once.
"""

import datetime
import functools
import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox, utils

# Marks in rendered text, unknown to a template: around what is within `generation` tags, and behind an answer.
_BEGIN, _END, _ANSWER = (f"\ue000{secrets.token_hex(12)}{name}" for name in "bea")
_MARK = re.compile(f"({_BEGIN}|{_END}|{_ANSWER})")
_REWRITES = "expected it to render a conversation as it renders its beginning"

Messages = Sequence[Mapping[str, Any]]


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: list[tuple[int, int]]  # characters of `text` that the assistant writes


class TemplateError(Exception):
    """A template that cannot be compiled, or that refused the messages; one line."""


def render(template: str, messages: Messages, special: Mapping[str, str], prompt: bool) -> str:
    """The text of messages, with the generation prompt where `prompt`. Raises `TemplateError`."""
    return _split(_render(template, messages, special, prompt)).text


def render_answers(template: str, messages: Messages, special: Mapping[str, str], ends: Sequence[str]) -> Rendered:
    """The text of messages without a generation prompt, and one span for each answer in it.

    The spans are those of the template's `generation` tags. Without tags, an answer starts where the text with the
    generation prompt before it ends, and ends with the first of the special tokens `ends` that the template writes
    behind it; without one, with the last thing but white space that it writes behind each answer.

    Raises `TemplateError`, also for a template whose text before an answer is not that of its generation prompt.
    """
    whole = _split(_render(template, messages, special, False))
    if whole.spans:
        return whole
    text, answers = whole.text, [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    marked = _MARK.split(_render(template, [_marked(message) for message in messages], special, False))
    stops = [sum(map(len, marked[0 : i + 1 : 2])) for i in range(0, len(marked) - 1, 2)]
    if "".join(marked[::2]) != text or len(stops) != len(answers):
        raise TemplateError("chat template: expected the text of every answer, got another (it changes or omits some)")
    starts = [len(prompt) for i in answers if text.startswith(prompt := render(template, messages[:i], special, True))]
    if len(starts) != len(answers) or any(start > stop for start, stop in zip(starts, stops, strict=True)):
        raise TemplateError(f"chat template: {_REWRITES} and generation prompt (it rewrites earlier turns)")
    last = text[stops[-1] :].lstrip() if stops else ""
    return Rendered(text, [(start, _end(text, stop, last, ends)) for start, stop in zip(starts, stops, strict=True)])


def _end(text: str, stop: int, last: str, ends: Sequence[str]) -> int:
    """The end of an answer with its end token; `last` is what follows the last answer."""
    rest = text[stop:].lstrip()
    tail = "".join(
        one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rest, last, strict=False))
    )
    found = [where + len(end) for end in ends if end and (where := tail.find(end)) >= 0]
    length = min(found) if found else len(tail.rstrip())
    return len(text) - len(rest) + length if length else stop


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """An assistant's message with a mark behind its last word; a template may strip the space around it."""
    content = message.get("content")
    if message.get("role") != "assistant" or not content:
        return message
    if isinstance(content, str):
        return {**message, "content": _with_mark(content)}
    parts = list(content)
    last = max((i for i, part in enumerate(parts) if part.get("type") == "text"), default=None)
    if last is not None:
        parts[last] = {**parts[last], "text": _with_mark(parts[last]["text"])}
    return {**message, "content": parts}


def _with_mark(text: str) -> str:
    length = len(text.rstrip())
    return f"{text[:length]}{_ANSWER}{text[length:]}"


def _render(template: str, messages: Messages, special: Mapping[str, str], prompt: bool) -> str:
    compiled = _compiled(template)
    try:
        return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **special)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error)[:300] or type(error).__name__
        raise TemplateError(f"chat template: cannot render these messages ({reason})") from error


def _split(marked: str) -> Rendered:
    """Without marks. A `generation` tag within another counts as part of it."""
    if _BEGIN not in marked:
        return Rendered(marked, [])
    parts, spans, length, depth, start = [], [], 0, 0, 0
    for part in _MARK.split(marked):
        if part == _BEGIN:
            start = length if depth == 0 else start
            depth += 1
        elif part == _END:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return Rendered("".join(parts), spans)


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its content between the two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END))
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope([begin, *body, end], lineno=line)


class _Namespace(utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: expected names without a leading underscore, got {name!r}")


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise, strftime_now=lambda pattern: datetime.datetime.now().strftime(pattern)
    )
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        reason = f"chat template, line {error.lineno}: not valid Jinja ({str(error.message)[:300]})"
        raise TemplateError(reason) from error
    except MemoryError:
        raise
    except Exception as error:  # Python's compiler may refuse what Jinja wrote
        raise TemplateError(f"chat template: cannot be compiled ({type(error).__name__})") from error


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
