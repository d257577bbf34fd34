"""Entries that read a model's folder or file, or that of a run."""

import base64
import functools
import io
import json
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tests import builders
from tests.fuzz import hostile
from tests.golden import peers_answers, peers_llava_weights
from tests.golden.drawn import weights
from vlm_jax.checkpoints import inspection, integrity, orbax, tensor_files, tensor_tables
from vlm_jax.checkpoints.huggingface import exporting, hf_decoder
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.data import token_files, tokenizers
from vlm_jax.inference import joining, loading

_SPEC = builders.DECODER
_LLAMA = {**hf_decoder.hf_config(_SPEC), "eos_token_id": 2, "pad_token_id": 0}


@functools.cache
def base(name: str) -> dict[str, bytes]:
    """The files of a tiny model that loads."""
    if name == "decoder":
        table = hf_decoder.decoder_table(_SPEC)
        arrays = {name: np.ones(shape, np.float32) for name, shape in tensor_tables.expected([table]).items()}
        return {"config.json": json.dumps(_LLAMA).encode(), "model.safetensors": save(arrays)}
    if name == "tokenpacker":
        files = json.loads(str(np.load(peers_llava_weights.GOLDEN)[f"{name}/files"]))
        parts = {"": files, "clip-vit-large-patch14-336/": files["tower"]}
        configs = {f"{place}config.json": json.dumps(part["config"]).encode() for place, part in parts.items()}
        return configs | {f"{place}model.safetensors": save(weights(part["shapes"])) for place, part in parts.items()}
    case = peers_answers.read()[name]
    files = {key: base64.b64decode(content) for key, content in case["files"].items()}
    return files | {"model.safetensors": save(weights(case["shapes"]))}


def folder(name: str, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for file, content in base(name).items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(content)
    return path


def _read(path: Path) -> None:
    """What `load` reads, but for the weights of encoder and decoder."""
    loading._path("path", path)
    info = inspection.inspect(path)
    encoder = inspection.prepared_encoder(info)
    if encoder is not None and info.decoder is not None:
        joining.joined_spec(info._replace(encoder=encoder), info, None, None)
    if token_files.find(path) is not None:
        tokenizers.read_tokenizer(path, info.config, ("<image>",))
    for tensor in list(info.weights.shapes)[:2]:
        np.asarray(info.weights.read(tensor)).sum()


def json_of_folder(rng: random.Random, path: Path) -> None:
    """One settings file of a model changed or broken."""
    model = folder(rng.choice(("decoder", "llava", "paligemma", "tokenpacker")), path / "model")
    names = sorted(str(file.relative_to(model)) for file in model.rglob("*.json") if file.name != "tokenizer.json")
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
                        "(9223372036854775807,)", "(True,)", "None", "(" * 200, "(1,)" * 500,
                        "(2**62, 4)"))  # fmt: skip
    kind = rng.choice(("'<f4'", "'|O'", "'|V2'", "'|V0'", "'<U9'", "'S0'", "'>f8'", "'f999'", "[('a', '<f4')]",
    "'|V99999999'",
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
    "snapshots", "a.npz", "model.safetensors.index.json", "x.ckpt", "model.pt", "spec.json", "checkpoints",
    "a.incomplete",
)  # fmt: skip


def foreign(rng: random.Random, path: Path) -> None:
    """A folder of files that are not ours, or a name that is no folder."""
    if rng.random() < 0.25:
        name = rng.choice(("google/siglip", "https://huggingface.co/a/b", "hf://a/b", "a\0b", "x" * 5000, "a/" * 2000,
                           "", ".", "/dev/zero", "/dev/stdin", "~/x", "/proc/self/mem", "/proc/1/environ",
                           hostile.text(rng)))  # fmt: skip
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
            assert not re.search("secret|root:", copy.read_text()), f"{copy.name} was copied"


ENTRIES = {
    "a model's settings": json_of_folder, "index of shards": index, "safetensors": safetensors, "npz": npz,
    "foreign folders": foreign, "wrapped or quantised": wrapped, "workdir": workdir, "export": export,
}  # fmt: skip
