"""Jinja chat templates, rendered as transformers does.

    text, spans = render(template, messages, prefixes=[(len(messages), False)], special=tokenizer.special)[0]

Sandboxed Jinja with `trim_blocks` and `lstrip_blocks`, `raise_exception`, `strftime_now`, `tojson` and the `generation`
tag. A template is a program: one that this package did not write is rendered by `data.template_process`, which limits
its time and memory. Needs nothing but Jinja, so that the process starts at once.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox, utils

# What the text of `{% generation %}...{% endgeneration %}` is rendered between: not known to a template.
_BEGIN, _END = (f"\ue000{secrets.token_hex(12)}{name}" for name in "be")
_MARK = re.compile(f"{_BEGIN}|{_END}")


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: list[tuple[int, int]]  # characters of `text` within `generation` tags


class TemplateError(Exception):
    """A template that cannot be compiled, or that refused the messages; one line."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    prefixes: Sequence[tuple[int, bool]],
    special: Mapping[str, str],
) -> list[Rendered]:
    """The first n messages, with or without the generation prompt, for each (n, generation prompt) of `prefixes`.

    Raises `TemplateError`.
    """
    compiled = _compiled(template)
    try:
        return [
            _split(
                compiled.render(
                    messages=messages[:count], tools=None, documents=None, add_generation_prompt=prompt, **special
                )
            )
            for count, prompt in prefixes
        ]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error)[:300] or type(error).__name__
        raise TemplateError(f"chat template: cannot render these messages ({reason})") from error


def _split(marked: str) -> Rendered:
    """Without marks. An inner `generation` tag counts as part of the outer one."""
    if _BEGIN not in marked:
        return Rendered(marked, [])
    parts, spans, length, depth, start = [], [], 0, 0, 0
    marks = _MARK.findall(marked)
    for mark, part in zip(("", *marks), _MARK.split(marked), strict=True):
        if mark == _BEGIN:
            start = length if depth == 0 else start
            depth += 1
        elif mark:
            depth -= 1
            if depth == 0:
                spans.append((start, length))
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
