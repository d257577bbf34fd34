"""The range of every number of a `RunSpec`, and what its texts and patterns may be."""

import dataclasses
import math
import re
from collections.abc import Iterator
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError


class Range(NamedTuple):
    low: float
    high: float
    ends: str = "[]"  # "(": without the lower end, ")": without the upper one


COUNT, COUNT_OR_NONE = Range(1, 2**31 - 1), Range(0, 2**31 - 1)
RATE = Range(0, 1e6)
_POSITIVE = Range(0, 1e30, "(]")


def _fields(group: str, **ranges: Range) -> dict[str, Range]:
    return {f"{group}.{name}": value for name, value in ranges.items()}


def _same(group: str, value: Range, *names: str) -> dict[str, Range]:
    return {f"{group}.{name}" if group else name: value for name in names}


# "*" is an index of a tuple.
RANGES = {
    **_same("", COUNT, "log_every_steps", "keep_checkpoints"),
    **_same("", COUNT_OR_NONE, "save_every_steps", "keep_every_steps", "evaluate_every_steps"),
    "seed": Range(0, 2**32 - 1),
    **_same("data", COUNT, "batch_rows", "row_tokens", "row_images", "question_tokens"),
    "data.questions_per_example": COUNT_OR_NONE,
    "data.max_bad_share": Range(0, 1),
    **{
        f"{group}.*.{name}": valid
        for group in ("data.train", "data.test", "stages.*.data.train")
        for name, valid in (("weight", Range(0, 1e6, "(]")), ("share", Range(0, 1)))
    },
    **_same("stages.*", COUNT_OR_NONE, "total_steps", "warmup_steps", "examples"),
    **_same("stages.*.data", COUNT_OR_NONE, "batch_rows", "row_images"),
    **_fields("stages.*", peak_lr=RATE, epochs=Range(0, 1e6), warmup_share=Range(0, 1)),
    **_fields(
        "optim", weight_decay=RATE, clip_norm=_POSITIVE, b1=Range(0, 1, "[)"), b2=Range(0, 1, "[)"),
        final_lr_share=Range(0, 1),
    ),
    "optim.lr_scale.*.1": RATE,
    **_same("compute", COUNT, "microbatches", "slices"),
    "compute.mesh.*": Range(-1, 2**31 - 1),
    **_same("evaluation", COUNT, "questions_per_example", "batch_examples", "max_new_tokens", "subset_examples"),
    "evaluation.examples": COUNT_OR_NONE,
    **_fields("bad_step", spike_factor=Range(0, 1e30), skip_limit=COUNT),
    **_same("model.encoder", COUNT, "image_size", "patch_size", "width", "depth", "heads", "mlp_width", "taps.*"),
    **_same("model.encoder", COUNT_OR_NONE, "feature_layer", "shortest_edge", "attention_layer", "merge.*"),
    **_same("model.encoder", _POSITIVE, "norm_eps", "pixel_rescale", "pixel_std.*"),
    "model.encoder.pixel_mean.*": Range(-1e30, 1e30),
    **_same("model.compressor", COUNT, "grid.*", "encoder_width", "width", "heads", "depth", "elastic.*"),
    **_same("model.compressor", COUNT_OR_NONE, "tokens", "taps", "text_width", "mlp_width", "key_width", "queries"),
    "model.compressor.fusion_heads": COUNT_OR_NONE,
    **_same("model.decoder", COUNT, "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "vocab", "window"),
    **_same("model.decoder", COUNT_OR_NONE, "window_pattern", "context"),
    **_same("model.decoder", _POSITIVE, "norm_eps", "query_scale", "attention_softcap", "logit_softcap"),
    **_same("model.decoder", _POSITIVE, "rope_theta", "rope_factor", "local_rope_theta"),
    **_fields("model.decoder.rope_bands", low=_POSITIVE, high=_POSITIVE, original_context=COUNT),
}  # fmt: skip
# Texts that are not empty.
NAMES = (
    "data.train.*.source", "data.test.*.source", "data.format", "stages.*.name", "optim.lr_scale.*.0",
    "model.encoder.name", "model.compressor.name", "model.decoder.name", "model.projector",
)  # fmt: skip
_MAX_WAYS = 1e8  # in which a pattern may match: a search may try them all
_NAME_LENGTH = 64  # of a parameter, about
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)


def check(spec: Any, where: str) -> None:
    """Raises `UserError` for a value of a spec outside its range, an empty name and a control character, with the
    field's name behind the prefix `where`."""
    for field, value in leaves(spec):
        # The last index is a "*" too, unless a tuple holds several kinds of values.
        patterns = {re.sub(rf"\.\d+(?={end})", ".*", field) for end in (r"\.|$", r"\.")}
        for pattern in patterns & RANGES.keys() if value is not None else ():
            check_number(f"{where}{field}", value, RANGES[pattern])
        if value == "" and patterns & set(NAMES):
            raise UserError(f"{where}{field}: expected a name, got ''")
        if isinstance(value, str) and not value.isprintable():
            raise UserError(f"{where}{field}: expected printable text, got {value[:80]!a}")


def check_number(where: str, value: Any, valid: Range) -> None:
    """Raises `UserError` unless `value` is a number of that range."""
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise UserError(f"{where}: expected a number, got {value!r}")
    if value < valid.low or (value == valid.low and valid.ends[0] == "("):
        raise UserError(f"{where}: expected {'above' if valid.ends[0] == '(' else 'at least'} {valid.low}, got {value}")
    if value > valid.high or (value == valid.high and valid.ends[1] == ")"):
        raise UserError(f"{where}: expected {'below' if valid.ends[1] == ')' else 'at most'} {valid.high}, got {value}")


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every value in nested specs and tuples."""
    if dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        yield where, value
        return
    for name, item in items:
        yield from leaves(item, f"{where}.{name}" if where else name)


def check_regex(where: str, pattern: str) -> None:
    """Raises `UserError` for a pattern that is invalid, or that may take exponential time: a repeat of something that
    matches in several ways, or many unbounded repeats.
    """
    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: expected a regular expression, got {pattern[:80]!r} ({error})") from error
    if _ways(parsed) > _MAX_WAYS:
        raise UserError(
            f"{where}: expected a pattern with few repeats and without a repeat or choice within a repeat, got "
            f"{pattern[:80]!r}"
        )


def _ways(parsed: Any, within: bool = False) -> float:
    """An upper bound on the number of ways to match a name, infinite for a repeat or choice within a repeat."""
    ways = 1.0
    for op, argument in parsed:
        counts, is_repeated = 1, within
        if op in _REPEATS:
            low, high, _ = argument
            counts, is_repeated = min(int(high) - int(low) + 1, _NAME_LENGTH), within or high > 1
        elif op is _parser.BRANCH:
            counts = len(argument[1])
        ways *= math.inf if within and counts > 1 else counts
        for part in _parts(argument):
            ways *= _ways(part, is_repeated)
    return ways


def _parts(argument: Any) -> Iterator[Any]:
    """The subpatterns in the argument of an operation."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _parts(item)
