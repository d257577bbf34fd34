"""Tensors in the files that users hold, and the tables that say which of our parameters each one is.

    weights = open_weights("folder")                # names, shapes and types; no tensor is read yet
    table = {"blocks/mlp/up/kernel": linear("model.layers.{i}.mlp.up_proj.weight", (D,), (F,), blocks=24), ...}
    params = load_params(weights, table, boxed_shapes, plan, "bfloat16")
    tensors(params, table)                          # the way back

All names and shapes are compared before the first tensor is read, and every difference is told at once. Then one tensor
at a time goes from the file's memory map into the buffer of its own shard. `importers.tensor_files` opens them.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from vlm_jax.checkpoints.tensor_files import TensorFiles, cores, free, open_weights, write_safetensors
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError, unknown

__all__ = [
    "Leaf",
    "TensorFiles",
    "TensorTable",
    "check",
    "conv_patch",
    "expected",
    "linear",
    "load_params",
    "open_weights",
    "same",
    "save_params",
    "tensors",
]  # fmt: skip

_Shape = tuple[int, ...]
Each = Callable[..., Iterable[None]]  # `map`, or that of a pool of threads
OnTensor = Callable[[int], None]  # called with the bytes of each tensor that went by
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_TOLD = 4  # differences that a message spells out
_ALIGNMENT = 64  # bytes; JAX adopts a host buffer that starts there as a CPU array without copying
_PIECE = 2**17  # scalars that are moved at once: a transposition stays in the cache
_BATCH = 32  # pieces behind which the pages of the file are given back
_MOST_THREADS = 8  # memory is the limit long before


def noop(size: int) -> None:
    """Tells nobody."""


class Leaf(NamedTuple):
    """Our parameter = read(hf_name)[part].reshape(view).transpose(order).reshape(shape), for each block where there are
    blocks.

    "{i}" in `hf_name` is the number of a block: one tensor a block, stacked on our leading `layers` axis. Without it
    the file's tensor is our whole array, stacked or not. Shapes are those of one tensor in the file.
    """

    hf_name: str
    file_shape: _Shape
    view: _Shape
    order: tuple[int, ...]
    blocks: int = 0  # how many "{i}" there are
    part: tuple[int, int, int] | None = None  # (axis, k, n): the k-th of n equal parts along that axis of the file's
    layer: int | None = None  # of a tensor that the file stacks, this row alone; `view` and `order` are then a row's

    def names(self) -> list[str]:
        """The file's tensors that this leaf is made of."""
        return [self.hf_name.replace("{i}", str(i)) for i in range(self.blocks)] if self.blocks else [self.hf_name]

    def to_param(self, array: np.ndarray, shape: _Shape) -> np.ndarray:
        """One tensor of the file -> our parameter of that shape; a view where numpy can."""
        if self.part is not None:
            axis, k, n = self.part
            size = array.shape[axis] // n
            array = array[(slice(None),) * axis + (slice(k * size, (k + 1) * size),)]
        if self.layer is not None:
            array = array[self.layer]
        return array.reshape(self.view).transpose(self.order).reshape(shape)

    def block(self, i: int) -> "Leaf":
        """One block of a leaf that stacks them."""
        if self.blocks:
            return self._replace(hf_name=self.names()[i], blocks=0)
        return self._replace(view=self.view[1:], order=tuple(axis - 1 for axis in self.order[1:]), layer=i)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`, up to the other parts."""
        middle = tuple(self.view[axis] for axis in self.order)
        shape = list(self.file_shape)
        if self.part is not None:
            shape[self.part[0]] //= self.part[2]
        return array.reshape(middle).transpose(np.argsort(self.order)).reshape(shape)


TensorTable = dict[str, Leaf]  # our path, such as "blocks/attention/query/kernel" -> Leaf


def same(hf_name: str, shape: Sequence[int], blocks: int = 0) -> Leaf:
    """The same array under another name: norms, tables, biases that carry our axes flattened."""
    return Leaf(hf_name, tuple(shape), tuple(shape), tuple(range(len(shape))), blocks)


def linear(hf_name: str, inputs: Sequence[int], outputs: Sequence[int], blocks: int = 0) -> Leaf:
    """torch's [out, in] -> our inputs + outputs axes: with (D,), (N, C) it is [N C, D] there and [D, N, C] here."""
    view = (*outputs, *inputs)
    order = (*range(len(outputs), len(view)), *range(len(outputs)))
    return Leaf(hf_name, (math.prod(outputs), math.prod(inputs)), view, order, blocks)


def conv_patch(hf_name: str, patch_size: int, width: int, channels: int = 3) -> Leaf:
    """A convolution of patches, torch's [E, 3, p, p] -> [p p 3, E], the order in which `models.vision` cuts."""
    shape = (width, channels, patch_size, patch_size)
    return Leaf(hf_name, shape, shape, (2, 3, 1, 0))


def expected(tables: Iterable[TensorTable]) -> dict[str, _Shape]:
    """Name -> shape of every tensor of the file that the tables speak of."""
    return {name: leaf.file_shape for table in tables for leaf in table.values() for name in leaf.names()}


def check(weights: TensorFiles, tables: Iterable[TensorTable], ignore: Iterable[str] = ()) -> None:
    """Raises `UserError` that names the tensors which are missing, misshapen, no floats or not wanted; `ignore` are
    regexes of whole names that may be in the file without being wanted.
    """
    wanted, there = expected(tables), weights.shapes
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    problems: list[Callable[[], str]] = []
    extra = [name for name in there if name not in wanted and not skip.fullmatch(name)]
    for name in (name for name in wanted if name not in there):
        problems.append(lambda name=name: f"{name} is missing{_nearest(name, extra or there, 'the file has')}")
    for name, shape in wanted.items():
        if name in there and there[name][0] != shape:
            found = there[name][0]
            problems.append(lambda n=name, f=found, s=shape: f"{n} has shape {list(f)}, {list(s)} is wanted")
        elif name in there and not _floating(there[name][1]):
            kind = there[name][1]
            problems.append(lambda n=name, k=kind: f"{n} holds {k}, not floating-point weights (is it quantised?)")
    for name in extra:
        problems.append(lambda name=name: f"{name} is not known{_nearest(name, wanted, 'expected is')}")
    if problems:
        told = "; ".join(problem() for problem in problems[:_TOLD])
        more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise UserError(f"{weights.path}: {len(problems)} tensor(s) do not fit the configuration: {told}{more}")


def _floating(kind: np.dtype) -> bool:
    return np.issubdtype(kind, np.floating) or kind == DTYPES["bfloat16"]


def _nearest(name: str, names: Iterable[str], words: str) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" ({words} {near[0]})" if near else ""


def load_params(
    weights: TensorFiles,
    table: TensorTable,
    boxed_abstract: Any,
    plan: Any | None,
    dtype: str | None = "float32",
    ignore: Iterable[str] = (),
    on_tensor: OnTensor | None = None,
) -> dict[str, Any]:
    """Our parameters, read shard by shard into the placements of `plan`; None puts them on the first device.

    Args:
        boxed_abstract: shapes of our tree with axis names, as `jax.eval_shape(module.init, ...)` gives.
        dtype: "float32", "bfloat16" or "float16"; None keeps the file's.
        ignore: regexes of tensors that the file may have beside the table's; (".*",) when the file holds other parts.
        on_tensor: called with the bytes of each tensor of the file that was read.

    Raises `UserError` for an unknown dtype, and where names or shapes differ, before anything is read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    check(weights, [table], ignore)
    shapes = tree.flatten(nn.meta.unbox(boxed_abstract))
    if set(shapes) != set(table):
        raise ValueError(f"the table and the parameters differ in {sorted(set(shapes) ^ set(table))}")
    if plan is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(shapes, one)
    else:
        places = tree.flatten(plan.shardings(boxed_abstract))
    told = on_tensor or noop
    with ThreadPoolExecutor(min(_MOST_THREADS, cores())) as pool:
        flat = {
            # In the file's order, so that a tensor which several parameters are cut from is read once.
            path: _place(weights, table[path], shapes[path].shape, places[path], dtype, told, pool.map)
            for path in sorted(shapes, key=lambda path: table[path].hf_name)
        }
    # Through the shapes' own structure, so that a part without parameters stays an empty dict.
    unboxed = nn.meta.unbox(boxed_abstract)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator="/")], unboxed
    )


def _place(
    weights: TensorFiles, leaf: Leaf, shape: _Shape, place: Any, dtype: str | None, on_tensor: OnTensor, each: Each
) -> jax.Array:
    """One of our parameters, device by device; devices that hold the same part share one host buffer."""
    stored = weights.shapes[leaf.names()[0]][1]
    kind = stored if dtype is None else DTYPES[dtype]
    parts: dict[Any, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    arrays = []
    for number, (bounds, devices) in enumerate(parts.items()):
        buffer = _shard(weights, leaf, shape, bounds, kind, on_tensor if number == 0 else noop, each)
        arrays += [jax.device_put(buffer, device) for device in devices]
        # On an accelerator the host's copy goes before the next one comes.
        jax.block_until_ready(arrays)
        del buffer
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _shard(
    weights: TensorFiles, leaf: Leaf, shape: _Shape, bounds: Any, kind: np.dtype, on_tensor: OnTensor, each: Each
) -> np.ndarray:
    """The part of our parameter that lies within `bounds`, a (start, stop) for each axis."""
    into = _aligned(tuple(stop - start for start, stop in bounds), kind)
    index = tuple(slice(*bound) for bound in bounds)
    if not leaf.blocks:
        _copy(into, leaf.to_param(weights.read(leaf.hf_name), shape)[index], each)
    else:
        names = leaf.names()
        for row, block in enumerate(range(*bounds[0])):
            _copy(into[row], leaf.to_param(weights.read(names[block]), shape[1:])[index[1:]], each)
    for name in leaf.names():
        file_shape, stored = weights.shapes[name]
        shares = (leaf.part[2] if leaf.part else 1) * (1 if leaf.layer is None else file_shape[0])
        on_tensor(math.prod(file_shape) * stored.itemsize // shares)
    return into


def _aligned(shape: _Shape, kind: np.dtype) -> np.ndarray:
    size = math.prod(shape) * kind.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def _copy(into: np.ndarray, view: np.ndarray, each: Each) -> None:
    """`into[...] = view`, cast and transposed, in pieces along the axis that is slowest in the file."""
    if view.size <= _PIECE:
        into[...] = view
        return
    axis = int(np.argmax([abs(step) * (size > 1) for step, size in zip(view.strides, view.shape, strict=True)]))
    rows = max(1, _PIECE * view.shape[axis] // view.size)
    pieces = [(slice(None),) * axis + (slice(i, i + rows),) for i in range(0, view.shape[axis], rows)]

    def copy(piece: tuple[slice, ...]) -> None:
        into[piece] = view[piece]

    for batch in range(0, len(pieces), _BATCH):
        for _ in each(copy, pieces[batch : batch + _BATCH]):
            pass
        free(view)


def tensors(params: Any, table: TensorTable) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the file, one of our parameters on the host at a time: loading's inverse."""
    flat = tree.flatten(params)
    if set(flat) != set(table):
        raise ValueError(f"the table and the parameters differ in {sorted(set(flat) ^ set(table))}")
    for members in _by_tensor(table):
        arrays = [np.asarray(flat[path]) for path, _ in members]
        leaf = members[0][1]
        if leaf.part is not None and len(members) != leaf.part[2]:
            raise ValueError(f"{leaf.hf_name}: {len(members)} parts of {leaf.part[2]}")
        for i, name in enumerate(leaf.names()):
            pieces = [one.to_file(a[i] if leaf.blocks else a) for (_, one), a in zip(members, arrays, strict=True)]
            yield name, np.concatenate(pieces, axis=leaf.part[0]) if leaf.part else pieces[0]


def _by_tensor(table: TensorTable) -> list[list[tuple[str, Leaf]]]:
    """The rows of a table, those together that are parts of one tensor."""
    rows = sorted(table.items(), key=lambda item: (item[1].hf_name, item[1].part or ()))
    return [list(group) for _, group in itertools.groupby(rows, key=lambda item: item[1].hf_name)]


def save_params(
    folder: Path,
    parts: Iterable[tuple[Any, TensorTable]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    wrote: OnTensor = noop,
) -> None:
    """Writes parts of a model, each (parameters, table), as the safetensors of one folder, in the parameters' dtype.

    `wrote` is called with the bytes of each tensor. Holds one of our parameters on the host at a time.
    """
    parts = list(parts)
    shapes = {}
    for params, table in parts:
        kinds = {path: np.dtype(leaf.dtype) for path, leaf in tree.flatten(params).items()}
        for members in _by_tensor(table):
            path, leaf = members[0]
            shapes |= dict.fromkeys(leaf.names(), (leaf.file_shape, kinds[path]))

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for params, table in parts:
            for name, array in tensors(params, table):
                yield name, array
                wrote(array.nbytes)

    write_safetensors(folder, shapes, arrays(), max_shard_bytes)
