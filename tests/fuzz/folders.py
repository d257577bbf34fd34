"""Entries that read a model's folder or file, a tokenizer, an image, a prompt or arrays."""

import base64
import functools
import io
import json
import math
import random
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from tests import builders
from tests.fuzz import hostile
from tests.golden import peers_answers
from tests.golden.drawn import weights
from vlm_jax.checkpoints import inspection, integrity, orbax, tensor_files, tensor_tables
from vlm_jax.checkpoints.huggingface import exporting, hf_decoder, processors
from vlm_jax.compress import catalog
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core.specs import CLIP_MEAN, EncoderSpec
from vlm_jax.data import chat, images, messages, token_files, tokenizers
from vlm_jax.inference import loading, prompts

_SPEC = builders.DECODER
_LLAMA = {**hf_decoder.hf_config(_SPEC), "eos_token_id": 2, "pad_token_id": 0}


@functools.cache
def base(name: str) -> dict[str, bytes]:
    """The files of a tiny model that loads."""
    if name == "decoder":
        table = hf_decoder.decoder_table(_SPEC)
        arrays = {name: np.ones(shape, np.float32) for name, shape in tensor_tables.expected([table]).items()}
        return {"config.json": json.dumps(_LLAMA).encode(), "model.safetensors": save(arrays)}
    case = peers_answers.read()[name]
    files = {key: base64.b64decode(content) for key, content in case["files"].items()}
    return files | {"model.safetensors": save(weights(case["shapes"]))}


def folder(name: str, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for file, content in base(name).items():
        (path / file).write_bytes(content)
    return path


def _read(path: Path) -> None:
    """What `load` reads, but for the weights of encoder and decoder."""
    loading._path("path", path)
    info = inspection.inspect(path)
    encoder = info.encoder and processors.with_processor_files(info.encoder, path)
    if encoder is not None and info.decoder is not None:
        loading._joined_spec(info._replace(encoder=encoder), info, None, None)
    if token_files.find(path) is not None:
        tokenizers.read_tokenizer(path, info.config, ("<image>",))
    for tensor in list(info.weights.shapes)[:2]:
        np.asarray(info.weights.read(tensor)).sum()


def json_of_folder(rng: random.Random, path: Path) -> None:
    """One settings file of a model changed or broken."""
    model = folder(rng.choice(("decoder", "llava", "paligemma")), path / "model")
    names = sorted(file.name for file in model.glob("*.json") if file.name != "tokenizer.json")
    file = model / rng.choice((*names, "config.json", "preprocessor_config.json"))
    original = json.loads(file.read_bytes()) if file.exists() else {"size": {"height": 12, "width": 12}, "resample": 2}
    hostile.maybe_no_file(hostile.write(file, hostile.json_bytes(original, rng)), rng)
    _read(model)


def index(rng: random.Random, path: Path) -> None:
    """Shards and their index."""
    model = folder("decoder", path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    table = hf_decoder.decoder_table(_SPEC)
    names = dict.fromkeys(tensor_tables.expected([table]), "model-00001-of-00001.safetensors")
    content = hostile.json_bytes({"metadata": {"total_size": 1}, "weight_map": names}, rng)
    hostile.maybe_no_file(hostile.write(model / "model.safetensors.index.json", content), rng)
    _read(model)


def safetensors(rng: random.Random, path: Path) -> None:
    """A damaged file, or one with a hostile header."""
    model = folder("decoder", path / "model")
    file, content = model / "model.safetensors", base("decoder")["model.safetensors"]
    if rng.random() < 0.5:
        content = hostile.broken(content, rng)
    else:
        size = struct.unpack("<Q", content[:8])[0]
        header = hostile.json_bytes(json.loads(content[8 : 8 + size]), rng)
        length = rng.choice((len(header), len(header), len(header), rng.choice((0, 2**63, 2**31, 10**6))))
        content = struct.pack("<Q", length) + header + content[8 + size :]
    hostile.maybe_no_file(hostile.write(file, content), rng)
    _read(model)


def npz(rng: random.Random, path: Path) -> None:
    """An archive with hostile headers, sizes, entries or bytes."""
    file = path / "model.npz"
    arrays = {"params/img/embedding/kernel": np.ones((4, 4, 3, 16), np.float32), "params/img/b": np.zeros(3)}
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array)
            archive.writestr(f"{name}.npy", content.getvalue())
        for _ in range(rng.choice((0, 1, 2))):
            archive.writestr(*_npy(rng))
    if rng.random() < 0.5:
        file.write_bytes(hostile.broken(file.read_bytes(), rng))
    opened = tensor_files.open_weights(hostile.maybe_no_file(file, rng))
    for name in opened.shapes:
        opened.read(name)
    inspection.inspect(file)


def _npy(rng: random.Random) -> tuple[str, bytes]:
    shape = rng.choice(("(2,)", "()", "(-1,)", "(10**9,)", "(0, 1000000000000000000000)", "(2, -3)", "(1e3,)", "('a',)",
                        "(9223372036854775807,)", "(True,)", "None", "(" * 200, "(1,)" * 500, "(2**62, 4)"))  # fmt: skip
    kind = rng.choice(("'<f4'", "'|O'", "'|V2'", "'|V0'", "'<U9'", "'S0'", "'>f8'", "'f999'", "[('a', '<f4')]", "'|V99999999'",
                       "None", "'<M8[s]'", "[]", "'float32'"))  # fmt: skip
    header = f"{{'descr': {kind}, 'fortran_order': {rng.choice(('True', 'False', '1'))}, 'shape': {shape}}}"
    if rng.random() < 0.1:
        header = rng.choice(("{", "[" * 5000, "__import__('os').system('touch escaped')", "{1: 2}", " " * 60_000, "\0"))
    version = rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\7\7"))
    size = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
    body = bytes(rng.choice((0, 8, 100, 10**6, 4 * 10**7)))
    name = rng.choice(("a.npy", "../../escaped.npy", "params/img/b.npy", "/a.npy", "x" * 900, "\x1b[31m.npy"))
    return name, b"\x93NUMPY" + version + size + header.encode() + body


_NAMES = (
    "model.gguf", "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.onnx",
    "model-00001-of-00002.safetensors", "model.safetensors", "flax_model.msgpack", "consolidated.00.pth", "config.json",
    "snapshots", "a.npz", "model.safetensors.index.json", "x.ckpt", "model.pt", "spec.json", "checkpoints", "a.incomplete",
)  # fmt: skip


def foreign(rng: random.Random, path: Path) -> None:
    """A folder of files that are not ours, or a name that is no folder."""
    if rng.random() < 0.25:
        name = rng.choice(("google/siglip", "https://huggingface.co/a/b", "hf://a/b", "a\0b", "x" * 5000, "a/" * 2000,
                           "", ".", "/dev/zero", "/dev/stdin", "~/x", "/proc/self/mem", "/proc/1/environ", hostile.text(rng)))  # fmt: skip
        inspection.inspect(loading._path("path", name))
    model = path / "model"
    model.mkdir()
    for name in rng.sample(_NAMES, rng.choice((1, 2, 4))):
        content = rng.choice((b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", rng.randbytes(200), b"GGUF"))
        hostile.maybe_no_file(hostile.write(model / name, content), rng, 0.3)
    found = sorted(model.iterdir())
    inspection.inspect(model if rng.random() < 0.6 else rng.choice(found))


def wrapped(rng: random.Random, path: Path) -> None:
    """Tensors under other names and dtypes, quantised or wrapped."""
    model = folder("decoder", path / "model")
    arrays = {name: np.ones(2, rng.choice((np.float32, np.int8, np.uint8, np.float64, np.bool_))) for name in "ab"}
    prefix = rng.choice(("base_model.model.", "_orig_mod.", "module.", "model.", "", "x" * 400, "\x1b[31m"))
    suffix = rng.choice((".weight", ".qweight", ".SCB", ".lora_A.default.weight", ".weight_scale", ""))
    (model / "model.safetensors").write_bytes(
        save({f"{prefix}{name}{suffix}": array for name, array in arrays.items()})
    )
    settings = {"quantization_config": rng.choice((None, {"quant_method": hostile.text(rng)}, [], 1, {"bits": 4}))}
    (model / "config.json").write_text(json.dumps({**_LLAMA, **settings}))
    _read(model)


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
def _tokenizer() -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as place:
        return tokenizers.read_tokenizer(folder("llava", Path(place)), {}, ("<image>",))


def _part(rng: random.Random) -> Any:
    kind = rng.choice(("text", "text", "image", "video", None))
    return rng.choice(
        ({"type": kind, "text": hostile.text(rng)}, {"type": kind}, hostile.text(rng), hostile.value(rng))
    )


def prompt(rng: random.Random, path: Path) -> None:
    """Prompts and messages."""
    read = _tokenizer()
    kind = rng.choice(("LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration", "LlamaForCausalLM"))
    chat_format = chat.chat_format_of(kind, read, "<image>")
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
    "{{ 10**10**8 }}", "{% for a in range(10**6) %}{% for b in range(10**6) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}",
    "{{ '{:>2000000000}'.format(1) }}", "{{ messages | tojson(indent=1000000000) }}", "{{ 'a' | center(10**10) }}", "{{",
    "{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}", "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception('x' * 9000) }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ strftime_now('%' * 999) }}",
    "{{ [1] * 10**9 }}", "{{ 'x' | replace('x', 'y' * 10**9) }}", "{% include '/etc/passwd' %}", "{{ cycler.__init__ }}",
    "{{ messages[0].content.upper() }}", "{{ (1 for x in messages) }}", "{% set ns = namespace(a=1) %}{{ ns.b }}", "{{ 1/0 }}",
    "{{ lipsum(n=10**7) }}", "{{ 'a,' * 10**6 | wordwrap(1) }}", "{{ messages | map('upper') | list }}", "{{ 2 ** 10**7 }}",
)  # fmt: skip


def template(rng: random.Random, path: Path) -> None:
    """Chat templates that loop, grow, recurse or look around."""
    model = folder("llava", path / "model")
    content = "".join(rng.choice((*_TEMPLATES, hostile.text(rng))) for _ in range(rng.choice((1, 1, 2))))
    if rng.random() < 0.2:
        content = "{% if 1 %}" * rng.choice((50, 5000)) + content
    (model / "chat_template.jinja").write_bytes(content.encode("utf-8", "surrogatepass"))
    read = tokenizers.read_tokenizer(model, {}, ("<image>",))
    chat_format = chat.chat_format_of("LlavaForConditionalGeneration", read, "<image>")
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
                       ("TIFF", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB"), ("PNG", "I;16"), ("AVIF", "RGB"), ("ICO", "RGBA"),
                       ("EPS", "RGB"), ("TGA", "RGB"), ("DDS", "RGBA"), ("SGI", "RGB"), ("PCX", "RGB"), ("JPEG2000", "RGB")):  # fmt: skip
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
    spec = catalog.model_spec(builders.ENCODER, "pool", 4, _SPEC)
    return loading.Model(spec, builders.COMPUTE, {}, None, image_token=32, pad=0, eos_ids=(2,))


def arrays(rng: random.Random, path: Path) -> None:
    """The arguments of `forward`."""
    model, shape = _model(), (rng.choice((0, 1, 2)), rng.choice((0, 1, 6, 40)))
    tokens: Any = rng.choice((
        np.full(shape, rng.choice((0, 1, 31, 32, 33, -1, 2**31 - 1))), np.ones((2, 6), rng.choice(("f4", "i8", "u8", "?", "O", "U2"))),
        [[1, 2], [3]], [[10**30]], hostile.value(rng), None, [[32] * 4 + [1]], [[0] * 5], np.zeros((1, 2, 3), int),
    ))  # fmt: skip
    given = (None, [None], [[None]], np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), np.nan), [hostile.value(rng)],
             np.zeros((2, 1, 16, 16, 3), np.float32), "a.png", [[np.zeros((16, 16, 3), "f4")]], [Image.new("RGB", (2, 3))])  # fmt: skip
    tokens = prompts.array_of("tokens", tokens)
    by_row = prompts.images_by_row(model, rng.choice(given), len(tokens) if tokens.ndim else 0)
    mask = rng.choice((None, None, np.ones((1, 5)), hostile.value(rng), np.zeros(tokens.shape)))
    prompts.to_bucket(prompts.inputs_of(model, by_row, tokens, mask, rng.choice((None, mask))), model.visual_tokens)


def workdir(rng: random.Random, path: Path) -> None:
    """The files of a run: its spec, and the digests of a checkpoint."""
    golden = json.loads((Path(__file__).parents[1] / "golden/vlm_default.json").read_text())
    hostile.maybe_no_file(hostile.write(path / "spec.json", hostile.json_bytes(golden, rng)), rng)
    for name in ("state", "cursor"):
        (path / name).mkdir()
    (path / "state" / "a").write_bytes(b"12")
    integrity.sign(path)
    digests = json.loads((path / "sha256.json").read_text())
    hostile.maybe_no_file(hostile.write(path / "sha256.json", hostile.json_bytes(digests, rng)), rng)
    integrity.damage(path)
    spec_from_dict(orbax.read_spec(path))


def export(rng: random.Random, path: Path) -> None:
    """Files that are copied beside exported weights."""
    model = folder("llava", path / "model")
    (path / "secret").write_text("secret")
    (path / "out").mkdir()
    for name in rng.sample(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"), 2):
        (model / name).unlink()
        (model / name).symlink_to(
            rng.choice(("../secret", "/etc/passwd", "/dev/zero", ".", "missing", "generation_config.json"))
        )
    if rng.random() < 0.5:
        hostile.maybe_no_file(model / "generation_config.json", rng, 1.0)
    try:
        exporting._companions(model, path / "out")
    finally:
        for copy in (path / "out").iterdir():
            assert "secret" not in copy.read_text() and "root:" not in copy.read_text(), (
                f"breach: {copy.name} was copied"
            )


def warm() -> None:
    """Makes what all cases share, before processes are forked."""
    for name in ("decoder", "llava", "paligemma"):
        base(name)
    _tokenizer()
    _pictures()
    _model()


ENTRIES = {
    "a model's settings": json_of_folder, "index of shards": index, "safetensors": safetensors, "npz": npz,
    "foreign folders": foreign, "wrapped or quantised": wrapped, "tokenizer": tokenizer, "prompts": prompt,
    "chat templates": template, "images": image, "arrays of forward": arrays, "workdir": workdir, "export": export,
}  # fmt: skip
