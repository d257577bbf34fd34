"""Readers of safetensors, big_vision's `.npz` and torch's `.bin`, and a writer of safetensors.

`open_weights` reads names, shapes and dtypes; tensors are read on demand. safetensors are memory-mapped tensor by
tensor, so that pages can be released; other formats cache the tensor that was read last.
"""

import contextlib
import functools
import json
import math
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.checkpoints import foreign
from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write

_BF16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": _BF16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# The first one is read; the last two are a connector alone (`huggingface.hf_llava`).
FOLDER_FILES = (
    _SINGLE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "mm_projector.safetensors",
    "mm_projector.bin",
)  # fmt: skip
_MAX_EXPANSION, _SMALL_BYTES = 64, 2**24  # an .npz holds at most 64 times its file's bytes, or 16 MiB
_MAX_AXIS = 2**48
# RuntimeError is raised for an archive with a password and a header that is nested too deeply.
_NPZ_ERRORS = (
    ValueError, OSError, EOFError, KeyError, SyntaxError, TypeError, MemoryError, RuntimeError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error, NotImplementedError,
)  # fmt: skip

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class TensorFiles(NamedTuple):
    """The tensors under one path. `read(name)` returns one of them, possibly a read-only view of the file."""

    path: Path
    shapes: Shapes
    read: Callable[[str], np.ndarray]


def open_weights(path: str | Path) -> TensorFiles:
    """The tensors of a Hugging Face folder, a `.safetensors`, a `.npz`, or torch's `.bin` where torch is installed.
    Raises `UserError` for what is missing, truncated or corrupt.
    """
    path = Path(path)
    found = reading.kind(path)
    if not found:
        raise foreign.missing(path)
    if found == "file":
        return _open_file(path)
    for name in FOLDER_FILES:
        if reading.kind(path / name):
            opened = _open_shards(path / name) if name.endswith(".json") else _open_file(path / name)
            return opened._replace(path=path)
    raise foreign.no_weights(path, FOLDER_FILES)


def _open_file(path: Path) -> TensorFiles:
    openers = {
        ".safetensors": open_safetensors, ".npz": open_npz, ".bin": open_torch, ".pt": open_torch, ".pth": open_torch,
    }  # fmt: skip
    if path.suffix not in openers:
        raise foreign.unknown_format(path)
    foreign.check_content(path)
    return openers[path.suffix](path)


def _open_shards(index: Path) -> TensorFiles:
    """All files of an index as one."""
    shard_of = reading.read_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: not an index of weights (expected weight_map, an object of tensor -> file)")
    folder, files = index.parent, sorted(set(map(str, shard_of.values())))
    for name in shard_of.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(f"{index}: expected names of files beside it, got {name!r}")
    missing = [name for name in files if not reading.kind(folder / name)]
    if missing:
        raise UserError(f"{index}: {missing[0]} does not exist ({len(missing)} of {len(files)} files missing)")
    shards = {name: _open_file(folder / name) for name in files}
    for tensor, name in shard_of.items():
        if tensor not in shards[name].shapes:
            raise UserError(f"{index}: expected {tensor} in {name}, which does not have it")
    shapes = {tensor: shards[name].shapes[tensor] for tensor, name in shard_of.items()}
    return TensorFiles(folder, shapes, lambda tensor: shards[shard_of[tensor]].read(tensor))


def open_safetensors(path: Path) -> TensorFiles:
    """Raises `UserError` where the header or the file's length do not follow the format."""
    import safetensors

    try:
        with reading.open_regular(path) as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
        # The library checks the header against the file's length: no overlap, no gap, no missing end.
        with safetensors.safe_open(path, framework="numpy") as archive:
            slices = [(name, archive.get_slice(name)) for name in archive.offset_keys()]
            described = [(name, tuple(one.get_shape()), one.get_dtype()) for name, one in slices]
    except (OSError, struct.error, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}): download it again") from error
    start, shapes, offsets = 8 + header_bytes, {}, {}
    for name, shape, kind in described:
        if kind not in _DTYPES:
            raise foreign.unknown_dtype(path, name, kind, _DTYPES)
        shapes[name], offsets[name] = (shape, _DTYPES[kind]), start
        start += math.prod(shape) * _DTYPES[kind].itemsize

    def read(name: str) -> np.ndarray:
        shape, dtype = shapes[name]
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=offsets[name], shape=shape).view(np.ndarray)

    return TensorFiles(path, shapes, read)


def free(array: np.ndarray) -> None:
    """Releases the pages of a memory-mapped tensor; they are read again on the next access."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_npz(path: Path) -> TensorFiles:
    """numpy's archive, without unpickling. numpy stores bfloat16 as the dtype V2."""
    try:
        with reading.open_regular(path) as file, zipfile.ZipFile(file) as archive:
            shapes = _npz_shapes(archive, os.fstat(file.fileno()).st_size)
    except _NPZ_ERRORS as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from error

    @functools.lru_cache(maxsize=1)  # the shards of a tensor read it one after the other
    def read(name: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[name]
        except _NPZ_ERRORS as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from error
        return array.view(_BF16) if array.dtype == np.dtype("V2") else array

    return TensorFiles(path, shapes, read)


def _npz_shapes(archive: zipfile.ZipFile, file_bytes: int) -> Shapes:
    """Shapes and dtypes of all arrays. Raises `ValueError` where the archive claims more than its file can hold, or an
    array more than its entry: nothing is unpacked before both are known.
    """
    entries = archive.infolist()
    packed, unpacked = sum(one.compress_size for one in entries), sum(one.file_size for one in entries)
    if packed > file_bytes or unpacked > max(_MAX_EXPANSION * file_bytes, _SMALL_BYTES):
        raise ValueError(
            f"{file_bytes:,} bytes that claim to hold {unpacked:,}: expected at most {_MAX_EXPANSION} times as many"
        )
    shapes: Shapes = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        with archive.open(entry) as file:
            shape, dtype = _npy_header(file)
            held, expected = entry.file_size - file.tell(), math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or max(shape, default=0) > _MAX_AXIS or held != expected:
            raise ValueError(f"{name}: shape {list(shape)} of {dtype} does not fit its {held:,} bytes")
        shapes[name] = shape, _BF16 if dtype == np.dtype("V2") else dtype
    return shapes


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return tuple(shape), dtype


def open_torch(path: Path) -> TensorFiles:
    """torch's format, without running code from it. Raises `UserError` where torch is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: this format needs torch (pip install torch, or download the model's .safetensors)"
        ) from None
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's errors vary, and its advice to unpickle is unsafe
        raise UserError(
            f"{path}: damaged, or it holds objects that would have to run code, which is never done (download the "
            "model's .safetensors)"
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a dictionary of tensors by name, got {type(content).__name__}")
    held = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    dtypes = {getattr(torch, str(dtype)): dtype for dtype in _DTYPES.values()}
    for name, tensor in held.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: expected tensors by name, got the key {name!r}")
        if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"a {tensor.layout} tensor of {tensor.dtype} ({tensor.device})"
            raise UserError(f"{path}: {name}: expected a strided CPU tensor of a known dtype, got {kind}")
    shapes = {name: (tuple(tensor.shape), dtypes[tensor.dtype]) for name, tensor in held.items()}

    def read(name: str) -> np.ndarray:
        tensor = held[name].detach()
        return tensor.view(torch.int16).numpy().view(_BF16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    return TensorFiles(path, shapes, read)


def write_safetensors(
    folder: Path, shapes: Shapes, arrays: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards and their index; `arrays` come in the order of `shapes`.

    Holds one tensor at a time. Files get their names when all are complete.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [_SINGLE]
    arrays = iter(arrays)
    with contextlib.ExitStack() as stack:
        for file_name, shard in zip(files, shards, strict=True):
            path = stack.enter_context(atomic_write(folder / file_name))
            with path.open("wb") as file:
                file.write(_safetensors_header({name: shapes[name] for name in shard}))
                for name in shard:
                    given, array = next(arrays)
                    if (given, (array.shape, array.dtype)) != (name, shapes[name]):
                        raise ValueError(f"expected {name} {shapes[name]}, got {given} {array.shape} {array.dtype}")
                    file.write(np.ascontiguousarray(array).view(np.uint8).data)
    if count > 1:
        shard_of = {name: file_name for file_name, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shard_of}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _safetensors_header(shapes: Shapes) -> bytes:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
