"""Opens safetensors, big_vision's `.npz` and torch's `.bin` alike: names, shapes and types at once, tensors on demand.

safetensors are memory-mapped one tensor at a time, so that a page which was read is given back with its tensor; other
formats keep no more than the tensor that was read last. Writes safetensors, in shards, one tensor at a time.
"""

import contextlib
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

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write

BF16 = np.dtype(ml_dtypes.bfloat16)
# safetensors' names of the types that parameters come in.
SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TORCH_INDEX = "pytorch_model.bin.index.json"

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class TensorFiles(NamedTuple):
    """The tensors under one path. `read(name)` gives one of them, perhaps as a view of the file that must not be
    written to.
    """

    path: Path
    shapes: Shapes
    read: Callable[[str], np.ndarray]

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.shapes.values())


def open_weights(path: str | Path) -> TensorFiles:
    """The tensors of a Hugging Face folder, a `.safetensors`, a `.npz`, or torch's `.bin` where torch is installed.

    Raises `UserError` for what is missing, truncated or corrupt.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _open_file(path)
    for name in (_WHOLE, _INDEX, "pytorch_model.bin", _TORCH_INDEX):
        if (path / name).exists():
            opened = _open_shards(path / name) if name.endswith(".json") else _open_file(path / name)
            return opened._replace(path=path)
    raise UserError(f"{path}: no weights here: {_WHOLE}, {_INDEX} or pytorch_model.bin is wanted")


def _open_file(path: Path) -> TensorFiles:
    openers = {
        ".safetensors": open_safetensors, ".npz": open_npz, ".bin": open_torch, ".pt": open_torch, ".pth": open_torch,
    }  # fmt: skip
    if path.suffix not in openers:
        raise UserError(f"{path}: {path.suffix or 'no ending'} is not a format of weights: .safetensors, .npz or .bin")
    return openers[path.suffix](path)


def _open_shards(index: Path) -> TensorFiles:
    """All files that an index names, as one."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        files = sorted(set(where.values()), key=str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weights ({error})") from error
    folder = index.parent
    outside = [name for name in files if not isinstance(name, str) or not name or Path(name).name != name]
    if outside:
        raise UserError(f"{index}: names {outside[0]!r}, which is no file beside it")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{index}: names {missing[0]}, which is not there ({len(missing)} of {len(files)} files missing)"
        )
    shards = {name: _open_file(folder / name) for name in files}
    astray = [tensor for tensor, name in where.items() if tensor not in shards[name].shapes]
    if astray:
        raise UserError(f"{index}: says that {astray[0]} is in {where[astray[0]]}, which does not have it")
    shapes = {tensor: shards[name].shapes[tensor] for tensor, name in where.items()}
    return TensorFiles(folder, shapes, lambda tensor: shards[where[tensor]].read(tensor))


def open_safetensors(path: Path) -> TensorFiles:
    """Raises `UserError` where the header, or the length of the file, is not what the format says."""
    import safetensors

    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
        # The library's reader checks the header against the length of the file: no overlap, no hole, no missing end.
        with safetensors.safe_open(path, framework="numpy") as archive:
            names = archive.offset_keys()
            found = [(name, archive.get_slice(name)) for name in names]
            described = [(name, tuple(one.get_shape()), one.get_dtype()) for name, one in found]
    except (OSError, struct.error, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}): fetch it again") from error
    start, shapes, offsets = 8 + header_bytes, {}, {}
    for name, shape, kind in described:
        if kind not in SAFETENSORS_TYPES:
            raise UserError(f"{path}: {name} is {kind}; types that can be read: {', '.join(SAFETENSORS_TYPES)}")
        shapes[name], offsets[name] = (shape, SAFETENSORS_TYPES[kind]), start
        start += math.prod(shape) * SAFETENSORS_TYPES[kind].itemsize

    def read(name: str) -> np.ndarray:
        shape, kind = shapes[name]
        if math.prod(shape) == 0:
            return np.empty(shape, kind)
        return np.memmap(path, kind, mode="r", offset=offsets[name], shape=shape).view(np.ndarray)

    return TensorFiles(path, shapes, read)


def free(array: np.ndarray) -> None:
    """Gives back the memory of a mapped tensor's pages; they are read again if they are wanted again."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_npz(path: Path) -> TensorFiles:
    """numpy's archive. Nothing in it is unpickled. Two bytes without a type are bfloat16, as numpy stores that."""
    unreadable = (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        SyntaxError,
        TypeError,
        MemoryError,
        RuntimeError,  # of an archive with a password, and of a header that is nested too deeply
        struct.error,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    )
    shapes: Shapes = {}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive, or its end is missing")
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shapes[member.removesuffix(".npy")] = _npy_header(file)
    except unreadable as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from error

    def read(name: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[name]
        except unreadable as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from error
        return array.view(BF16) if array.dtype == np.dtype("V2") else array

    return TensorFiles(path, shapes, _last(read))


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    if kind.hasobject:
        raise ValueError("it holds pickled objects")
    return tuple(shape), BF16 if kind == np.dtype("V2") else kind


def open_torch(path: Path) -> TensorFiles:
    """torch's own format, with no code run from it. Raises `UserError` where torch is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: this format needs torch (pip install torch); or fetch the model's .safetensors"
        ) from None
    try:
        # Files from before torch had archives cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises whatever the file provokes, with advice that is not ours
        raise UserError(
            f"{path}: torch finds no plain weights: damaged, or with objects that would have to run code, which never "
            "happens here; fetch the model's .safetensors"
        ) from error
    if isinstance(found, Mapping):
        found = found.get("state_dict", found)
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: a dictionary of tensors by name is wanted, not {type(found).__name__}")
    held = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    kinds = {getattr(torch, str(kind)): kind for kind in SAFETENSORS_TYPES.values() if kind.kind != "b"}
    kinds[torch.bool] = np.dtype(np.bool_)
    for name, tensor in held.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a tensor is called {name!r}: a name is wanted")
        if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.layout} tensor of {tensor.dtype} ({tensor.device})"
            raise UserError(f"{path}: {name} is a {kind}, which cannot be read")
    shapes = {name: (tuple(tensor.shape), kinds[tensor.dtype]) for name, tensor in held.items()}

    def read(name: str) -> np.ndarray:
        tensor = held[name].detach()
        return tensor.view(torch.int16).numpy().view(BF16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    return TensorFiles(path, shapes, read)


def _last(read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """The same function, which remembers its last answer: the shards of one tensor ask for it one after the other."""
    kept: dict[str, np.ndarray] = {}

    def again(name: str) -> np.ndarray:
        if name not in kept:
            kept.clear()
            kept[name] = read(name)
        return kept[name]

    return again


def write_safetensors(
    folder: Path, shapes: Shapes, arrays: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors` into a folder, or shards and their index; `arrays` come in the order of `shapes`.

    Holds one tensor at a time. Names appear when all is on disk.
    """
    names = {kind: name for name, kind in SAFETENSORS_TYPES.items()}
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [_WHOLE]
    coming = iter(arrays)
    with contextlib.ExitStack() as stack:
        for file_name, shard in zip(files, shards, strict=True):
            new = stack.enter_context(atomic_write(folder / file_name))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            start = 0
            for name in shard:
                shape, kind = shapes[name]
                header[name] = {"dtype": names[kind], "shape": shape, "data_offsets": [start, start + sizes[name]]}
                start += sizes[name]
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with new.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for name in shard:
                    told, array = next(coming)
                    if told != name or array.shape != shapes[name][0] or array.dtype != shapes[name][1]:
                        raise ValueError(f"{told} {array.shape} {array.dtype} comes where {name} {shapes[name]} is due")
                    file.write(np.ascontiguousarray(array).view(np.uint8).data)
    if count > 1:
        where = {name: file_name for file_name, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
