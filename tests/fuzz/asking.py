"""Entries that read a tokenizer, a prompt, an image or arrays."""

import functools
import io
import json
import math
import random
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import builders
from tests.fuzz import hostile
from tests.fuzz.folders import base, folder
from vlm_jax.compress import catalog
from vlm_jax.core.specs import CLIP_MEAN, EncoderSpec
from vlm_jax.data import chat, chat_formats, images, messages, tokenizers
from vlm_jax.inference import loading, prompts


def tokenizer(rng: random.Random, path: Path) -> None:
    """A tokenizer's files, and text to encode."""
    model = folder(rng.choice(("llava", "paligemma")), path / "model")
    name = rng.choice(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                       "generation_config.json", "tokenizer.model"))  # fmt: skip
    file = model / name
    if name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
        content = hostile.broken(rng.randbytes(200), rng)
    elif name == "tokenizer.json" and rng.random() < 0.5:
        content = json.dumps(hostile.changed(json.loads(file.read_bytes()), rng)).encode()
    else:
        original = json.loads(file.read_bytes()) if file.exists() else {"bos_token": "<s>", "a": 3}
        content = hostile.json_bytes(original, rng)
    hostile.maybe_no_file(hostile.write(file, content), rng)
    read = tokenizers.read_tokenizer(model, {"eos_token_id": rng.choice((2, [2], None, "a", 1e99, -1))}, ("<image>",))
    ids = read.encode(hostile.text(rng))
    read.decode(ids[:20])


@functools.cache
def llava_tokenizer() -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as place:
        return tokenizers.read_tokenizer(folder("llava", Path(place)), {}, ("<image>",))


def _part(rng: random.Random) -> Any:
    kind = rng.choice(("text", "text", "image", "video", None))
    return rng.choice(
        ({"type": kind, "text": hostile.text(rng)}, {"type": kind}, hostile.text(rng), hostile.value(rng))
    )


def prompt(rng: random.Random, path: Path) -> None:
    """Prompts and messages."""
    read = llava_tokenizer()
    kind = rng.choice(("LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration", "LlamaForCausalLM"))
    chat_format = chat_formats.chat_format_of(kind, read, "<image>")
    asked: Any = hostile.text(rng) + rng.choice(("", "<image>", "<image><image>"))
    if rng.random() < 0.7:
        contents = (hostile.text(rng), [_part(rng) for _ in range(rng.randrange(4))], hostile.value(rng))
        asked = [
            {"role": rng.choice(("user", "assistant", "system", hostile.text(rng))), "content": rng.choice(contents)}
            for _ in range(rng.choice((0, 1, 2, 3)))
        ]
        asked = hostile.changed(asked, rng, rng.choice((0, 0, 1)))
    chat.prompt_ids(chat_format, read, asked, 383, rng.choice((0, 4)), rng.choice((0, 1, 2)))
    if isinstance(asked, str) or messages.is_conversation(asked):
        chat.bare_question(chat_format, asked)


_TEMPLATES = (
    "{{ 10**10**8 }}", "{% for a in range(10**6) %}{% for b in range(10**6) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ '{:>2000000000}'.format(1) }}", "{{ messages | tojson(indent=1000000000) }}", "{{ 'a' | center(10**10) }}",
    "{{",
    "{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}", "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception('x' * 9000) }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ strftime_now('%' * 999) }}",
    "{{ [1] * 10**9 }}", "{{ 'x' | replace('x', 'y' * 10**9) }}", "{% include '/etc/passwd' %}",
    "{{ cycler.__init__ }}",
    "{{ messages[0].content.upper() }}", "{{ (1 for x in messages) }}", "{% set ns = namespace(a=1) %}{{ ns.b }}",
    "{{ 1/0 }}",
    "{{ lipsum(n=10**7) }}", "{{ 'a,' * 10**6 | wordwrap(1) }}", "{{ messages | map('upper') | list }}",
    "{{ 2 ** 10**7 }}",
)  # fmt: skip


def template(rng: random.Random, path: Path) -> None:
    """Chat templates that loop, grow, recurse or look around."""
    model = folder("llava", path / "model")
    content = "".join(rng.choice((*_TEMPLATES, hostile.text(rng))) for _ in range(rng.choice((1, 1, 2))))
    if rng.random() < 0.2:
        content = "{% if 1 %}" * rng.choice((50, 5000)) + content
    (model / "chat_template.jinja").write_bytes(content.encode("utf-8", "surrogatepass"))
    read = tokenizers.read_tokenizer(model, {}, ("<image>",))
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", read, "<image>")
    chat.prompt_ids(chat_format, read, [{"role": "user", "content": "hi"}], 383, 4, 0)


def _png(width: int, height: int, bits: int, colour: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    noise, out = np.random.default_rng(0).integers(0, 256, (9, 14, 4)).astype(np.uint8), []
    for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"),
                       ("TIFF", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB"), ("PNG", "I;16"), ("AVIF", "RGB"), ("ICO",
                       "RGBA"),
                       ("EPS", "RGB"), ("TGA", "RGB"), ("DDS", "RGBA"), ("SGI", "RGB"), ("PCX", "RGB"), ("JPEG2000",
                       "RGB")):  # fmt: skip
        content, image = io.BytesIO(), Image.fromarray(noise)
        image = Image.new("I;16", (9, 9)) if mode == "I;16" else image.convert(mode)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(content, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        out.append(content.getvalue())
    return tuple(out)


def image(rng: random.Random, path: Path) -> None:
    """Images that are damaged, claim other sizes, or are no image; read, and prepared for an encoder."""
    kind = rng.random()
    if kind < 0.6:
        content: Any = hostile.broken(rng.choice(_pictures()), rng)
    elif kind < 0.7:
        width, height = (rng.choice((0, 1, 2, 1000, 20_000, 65_535, 2**27, 2**31 - 1)) for _ in range(2))
        content = rng.choice((
            _png(width, height, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), bytes(rng.choice((0, 99, 10**7)))),
            f"P{rng.choice('123456')} {width} {height} {rng.choice((1, 255, 65535))}\n".encode() + bytes(99),
        ))  # fmt: skip
    elif kind < 0.85:
        shape = tuple(rng.choice((0, 1, 3, 4, 9, 5000)) for _ in range(rng.choice((1, 2, 3, 3, 3, 4))))
        shape = shape if math.prod(shape) < 10**7 else (3, 3, 3)
        content = np.zeros(
            shape, rng.choice(("uint8", "int8", "uint16", "float32", "bool", "object", "complex64", "U3"))
        )
    elif kind < 0.95:
        mode = rng.choice(
            ("1", "L", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "La", "I;16B")
        )
        content = Image.new(mode, (rng.choice((1, 3, 5000)), rng.choice((1, 3, 900))))
    else:
        content = rng.choice((None, 3, [1], {}, "missing.png", "a\0b", "x" * 5000, "/dev/zero", ".", hostile.text(rng)))
    if isinstance(content, bytes) and rng.random() < 0.5:
        content = hostile.maybe_no_file(hostile.write(path / "a.png", content), rng)
    mean = rng.choice((CLIP_MEAN, (9.0, -9.0, 1e30)))
    spec = EncoderSpec(
        "test", rng.choice((18, 336)), 6, 16, 3, 2, 24, resize=rng.choice(images.RESIZING), pixel_mean=mean
    )
    images.fit([images.read_image(content)], spec)


@functools.cache
def _model() -> loading.Model:
    spec = catalog.model_spec(builders.ENCODER, "pool", 4, builders.DECODER)
    return loading.Model(spec, builders.COMPUTE, {}, None, image_token=32, pad=0, eos_ids=(2,))


def arrays(rng: random.Random, path: Path) -> None:
    """The arguments of `forward`."""
    model, shape = _model(), (rng.choice((0, 1, 2)), rng.choice((0, 1, 6, 40)))
    tokens: Any = rng.choice((
        np.full(shape, rng.choice((0, 1, 31, 32, 33, -1, 2**31 - 1))), np.ones((2, 6), rng.choice(("f4", "i8", "u8",
        "?", "O", "U2"))),
        [[1, 2], [3]], [[10**30]], hostile.value(rng), None, [[32] * 4 + [1]], [[0] * 5], np.zeros((1, 2, 3), int),
    ))  # fmt: skip
    given = (None, [None], [[None]], np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), np.nan),
    [hostile.value(rng)],
             np.zeros((2, 1, 16, 16, 3), np.float32), "a.png", [[np.zeros((16, 16, 3), "f4")]], [Image.new("RGB", (2,
             3))])  # fmt: skip
    tokens = prompts.array_of("tokens", tokens)
    by_row = prompts.images_by_row(model, rng.choice(given), len(tokens) if tokens.ndim else 0)
    mask = rng.choice((None, None, np.ones((1, 5)), hostile.value(rng), np.zeros(tokens.shape)))
    prompts.to_bucket(prompts.inputs_of(model, by_row, tokens, mask, rng.choice((None, mask))), model.visual_tokens)


def warm() -> None:
    """Makes what all cases share, before processes are forked."""
    for name in ("decoder", "llava", "paligemma"):
        base(name)
    llava_tokenizer()
    _pictures()
    _model()


ENTRIES = {
    "tokenizer": tokenizer, "prompts": prompt, "chat templates": template, "images": image, "arrays of forward": arrays,
}  # fmt: skip
