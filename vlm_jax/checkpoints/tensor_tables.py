"""Tables that map our parameters to the tensors of published checkpoints.

    weights = open_weights("folder")                # names, shapes and dtypes; no tensor is read yet
    table = {"blocks/mlp/up/kernel": linear("model.layers.{i}.mlp.up_proj.weight", (D,), (F,), blocks=24), ...}
    params = load_params(weights, table, boxed_shapes, plan, "bfloat16")
    tensors(params, table)                          # the inverse

All names and shapes are checked before the first tensor is read. Then each parameter is copied from the memory-mapped
file into the buffers of its shards. `checkpoints.tensor_files` opens and writes the files.
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

from vlm_jax.checkpoints.tensor_files import TensorFiles, cores, free, write_safetensors
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError, unknown

_Shape = tuple[int, ...]
_Map = Callable[..., Iterable[None]]  # `map` of a thread pool
OnTensor = Callable[[int], None]  # called with the bytes of each tensor that was read or written
MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_MAX_PROBLEMS = 4  # that a message lists
NORM = {"scale": "weight", "bias": "bias"}  # our name -> torch's
_ALIGNMENT = 64  # bytes; JAX uses an aligned host buffer as a CPU array without a copy
_CHUNK = 2**17  # scalars copied at once: a transposition stays in the cache
_CHUNKS = 32  # chunks between two releases of the file's pages
_MAX_THREADS = 8  # memory bandwidth is the limit


def noop(size: int) -> None:
    """An `OnTensor` that does nothing."""


class Leaf(NamedTuple):
    """A parameter = read(hf_name)[part].reshape(view).transpose(order).reshape(shape), for each block if there are any.

    "{i}" in `hf_name` is a block's number: one tensor for each block, stacked on our leading `layers` axis. Without it
    one tensor holds the whole parameter. Shapes are those of one tensor in the file.
    """

    hf_name: str
    file_shape: _Shape
    view: _Shape
    order: tuple[int, ...]
    blocks: int = 0  # number of blocks "{i}"
    part: tuple[int, int, int] | None = None  # (axis, k, n): the k-th of n equal parts of the tensor along the axis
    layer: int | None = None  # row of a stacked tensor; `view` and `order` are then those of the row

    def names(self) -> list[str]:
        """The file's tensors that make up the parameter."""
        return [self.hf_name.replace("{i}", str(i)) for i in range(self.blocks)] if self.blocks else [self.hf_name]

    def to_param(self, array: np.ndarray, shape: _Shape) -> np.ndarray:
        """One tensor of the file as our parameter of that shape; a view where numpy can."""
        if self.part is not None:
            axis, k, n = self.part
            size = array.shape[axis] // n
            array = array[(slice(None),) * axis + (slice(k * size, (k + 1) * size),)]
        if self.layer is not None:
            array = array[self.layer]
        return array.reshape(self.view).transpose(self.order).reshape(shape)

    def block(self, i: int) -> "Leaf":
        """The leaf of one block of a stacked parameter."""
        if self.blocks:
            return self._replace(hf_name=self.names()[i], blocks=0)
        return self._replace(view=self.view[1:], order=tuple(axis - 1 for axis in self.order[1:]), layer=i)

    @property
    def shape(self) -> _Shape:
        """The parameter's shape, of one block."""
        return tuple(self.view[axis] for axis in self.order)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`, for this part."""
        transposed = tuple(self.view[axis] for axis in self.order)
        shape = list(self.file_shape)
        if self.part is not None:
            shape[self.part[0]] //= self.part[2]
        return array.reshape(transposed).transpose(np.argsort(self.order)).reshape(shape)


TensorTable = dict[str, Leaf]  # path of a parameter, such as "blocks/attention/query/kernel" -> Leaf


def same(hf_name: str, shape: Sequence[int], blocks: int = 0) -> Leaf:
    """The same array under another name: norms, embeddings, biases."""
    return Leaf(hf_name, tuple(shape), tuple(shape), tuple(range(len(shape))), blocks)


def linear(hf_name: str, inputs: Sequence[int], outputs: Sequence[int], blocks: int = 0) -> Leaf:
    """torch's [out, in] -> our inputs + outputs axes: (D,), (N, C) is [N C, D] in the file and [D, N, C] in JAX."""
    view = (*outputs, *inputs)
    order = (*range(len(outputs), len(view)), *range(len(outputs)))
    return Leaf(hf_name, (math.prod(outputs), math.prod(inputs)), view, order, blocks)


def norm(path: str, hf_name: str, width: int, blocks: int = 0) -> "TensorTable":
    """The rows of a layer norm at `path`."""
    return {f"{path}/{name}": same(f"{hf_name}.{part}", (width,), blocks) for name, part in NORM.items()}


def multi_head(path: str, hf_name: str, width: int, heads: int) -> "TensorTable":
    """The rows of torch's MultiheadAttention at `path`, which has queries, keys and values in one tensor."""
    shape = (heads, width // heads)
    table = {
        f"{path}/out/kernel": linear(f"{hf_name}out_proj.weight", shape, (width,)),
        f"{path}/out/bias": same(f"{hf_name}out_proj.bias", (width,)),
    }
    for part, name in enumerate(("query", "key", "value")):
        kernel = linear(f"{hf_name}in_proj_weight", (width,), shape)
        table[f"{path}/{name}/kernel"] = kernel._replace(file_shape=(3 * width, width), part=(0, part, 3))
        bias = Leaf(f"{hf_name}in_proj_bias", (3 * width,), (width,), (0,), part=(0, part, 3))
        table[f"{path}/{name}/bias"] = bias
    return table


def conv_patch(hf_name: str, patch_size: int, width: int, channels: int = 3) -> Leaf:
    """torch's patch convolution [E, 3, p, p] -> [p p 3, E], the order in which `models.vision` flattens patches."""
    shape = (width, channels, patch_size, patch_size)
    return Leaf(hf_name, shape, shape, (2, 3, 1, 0))


def expected(tables: Iterable[TensorTable]) -> dict[str, _Shape]:
    """Name -> shape of every tensor of the file that the tables read."""
    return {name: leaf.file_shape for table in tables for leaf in table.values() for name in leaf.names()}


def check(weights: TensorFiles, tables: Iterable[TensorTable], ignore: Iterable[str] = ()) -> None:
    """Raises `UserError` that lists tensors which are missing, of the wrong shape, not floating-point or unexpected.

    `ignore` are regexes of whole names that may be in the file besides those of the tables.
    """
    needed, stored = expected(tables), weights.shapes
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    missing = [name for name in needed if name not in stored]
    extra = [name for name in stored if name not in needed and not ignored.fullmatch(name)]
    wrong = [name for name in needed if name in stored and not _fits(*stored[name], needed[name])]

    def problem(name: str) -> str:
        if name not in stored:
            return f"{name} is missing{_nearest(name, extra or stored, 'the file has')}"
        if name not in needed:
            return f"{name} is unexpected{_nearest(name, needed, 'expected')}"
        shape, dtype = stored[name]
        if shape != needed[name]:
            return f"{name}: expected shape {list(needed[name])}, got {list(shape)}"
        return f"{name}: expected floating-point weights, got {dtype} (is it quantised?)"

    problems = [*missing, *wrong, *extra]
    if problems:
        listed = "; ".join(map(problem, problems[:_MAX_PROBLEMS]))
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise UserError(f"{weights.path}: {len(problems)} tensor(s) do not fit the configuration: {listed}{more}")


def _fits(shape: _Shape, dtype: np.dtype, needed: _Shape) -> bool:
    return shape == needed and (np.issubdtype(dtype, np.floating) or dtype == DTYPES["bfloat16"])


def _nearest(name: str, names: Iterable[str], text: str) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" ({text} {near[0]})" if near else ""


def load_params(
    weights: TensorFiles,
    table: TensorTable,
    boxed_abstract: Any,
    plan: Any | None,
    dtype: str | None = "float32",
    ignore: Iterable[str] = (),
    on_tensor: OnTensor = noop,
) -> dict[str, Any]:
    """Parameters read shard by shard, in the shardings of `plan`; None puts them on the first device.

    Args:
        boxed_abstract: shapes with axis names, as `jax.eval_shape(module.init, ...)` gives.
        dtype: "float32", "bfloat16" or "float16"; None keeps the file's.
        ignore: regexes of tensors that the file may have besides the table's; (".*",) when it holds other parts.
        on_tensor: called with the bytes of each tensor that was read.

    Raises `UserError` for an unknown dtype, and where names or shapes differ, before anything is read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    check(weights, [table], ignore)
    unboxed = nn.meta.unbox(boxed_abstract)
    shapes = tree.flatten(unboxed)
    _check_paths(shapes, table)
    if plan is None:
        shardings = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = tree.flatten(plan.shardings(boxed_abstract))
    with ThreadPoolExecutor(min(_MAX_THREADS, cores())) as pool:
        flat = {
            # In the file's order, so that a tensor with several parts is read once.
            path: _load_leaf(weights, table[path], shapes[path].shape, shardings[path], dtype, on_tensor, pool.map)
            for path in sorted(shapes, key=lambda path: table[path].hf_name)
        }
    # Through the structure of the shapes, so that a part without parameters stays an empty dict.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator="/")], unboxed
    )


def _check_paths(flat: dict[str, Any], table: TensorTable) -> None:
    if set(flat) != set(table):
        raise ValueError(f"the table and the parameters differ in {sorted(set(flat) ^ set(table))}")


def _load_leaf(
    weights: TensorFiles, leaf: Leaf, shape: _Shape, sharding: Any, dtype: str | None, on_tensor: OnTensor, map_: _Map
) -> jax.Array:
    """One parameter; devices with the same shard share one host buffer."""
    kind = weights.shapes[leaf.names()[0]][1] if dtype is None else DTYPES[dtype]
    shards: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        shards.setdefault(bounds, []).append(device)
    arrays = []
    for number, (bounds, devices) in enumerate(shards.items()):
        buffer = _read_shard(weights, leaf, shape, bounds, kind, on_tensor if number == 0 else noop, map_)
        arrays += [jax.device_put(buffer, device) for device in devices]
        # On an accelerator the host buffer is freed before the next one is allocated.
        jax.block_until_ready(arrays)
        del buffer
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_shard(
    weights: TensorFiles, leaf: Leaf, shape: _Shape, bounds: Any, dtype: np.dtype, on_tensor: OnTensor, map_: _Map
) -> np.ndarray:
    """The part of a parameter within `bounds`, a (start, stop) for each axis."""
    shard = _aligned(tuple(stop - start for start, stop in bounds), dtype)
    index, names = tuple(slice(*bound) for bound in bounds), leaf.names()
    if leaf.blocks:
        for row, block in enumerate(range(*bounds[0])):
            _copy(shard[row], leaf.to_param(weights.read(names[block]), shape[1:])[index[1:]], map_)
    else:
        _copy(shard, leaf.to_param(weights.read(leaf.hf_name), shape)[index], map_)
    for name in names:
        file_shape, stored = weights.shapes[name]
        shares = (leaf.part[2] if leaf.part else 1) * (1 if leaf.layer is None else file_shape[0])
        on_tensor(math.prod(file_shape) * stored.itemsize // shares)
    return shard


def _aligned(shape: _Shape, dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, view: np.ndarray, map_: _Map) -> None:
    """`target[...] = view`, cast and transposed, in chunks along the axis of the largest stride in the file."""
    if view.size <= _CHUNK:
        target[...] = view
        return
    axis = int(np.argmax([abs(step) * (size > 1) for step, size in zip(view.strides, view.shape, strict=True)]))
    rows = max(1, _CHUNK * view.shape[axis] // view.size)
    chunks = [(slice(None),) * axis + (slice(i, i + rows),) for i in range(0, view.shape[axis], rows)]

    def copy(chunk: tuple[slice, ...]) -> None:
        target[chunk] = view[chunk]

    for start in range(0, len(chunks), _CHUNKS):
        list(map_(copy, chunks[start : start + _CHUNKS]))
        free(view)


def tensors(params: Any, table: TensorTable) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the file, the inverse of `load_params`. Holds one parameter on the host."""
    flat = tree.flatten(params)
    _check_paths(flat, table)
    for members in _by_tensor(table):
        arrays = [np.asarray(flat[path]) for path, _ in members]
        leaf = members[0][1]
        if leaf.part is not None and len(members) != leaf.part[2]:
            raise ValueError(f"{leaf.hf_name}: expected {leaf.part[2]} parts, got {len(members)}")
        for i, name in enumerate(leaf.names()):
            parts = [one.to_file(a[i] if leaf.blocks else a) for (_, one), a in zip(members, arrays, strict=True)]
            yield name, np.concatenate(parts, axis=leaf.part[0]) if leaf.part else parts[0]


def _by_tensor(table: TensorTable) -> list[list[tuple[str, Leaf]]]:
    """The rows of a table, grouped by tensor."""
    rows = sorted(table.items(), key=lambda item: (item[1].hf_name, item[1].part or ()))
    return [list(group) for _, group in itertools.groupby(rows, key=lambda item: item[1].hf_name)]


def save_params(
    folder: Path,
    parts: Sequence[tuple[Any, TensorTable]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: OnTensor = noop,
) -> None:
    """Writes parts of a model, each (parameters, table), as safetensors in the parameters' dtype. Holds one parameter
    on the host.
    """
    shapes = {}
    for params, table in parts:
        flat = tree.flatten(params)
        for members in _by_tensor(table):
            path, leaf = members[0]
            shapes |= dict.fromkeys(leaf.names(), (leaf.file_shape, np.dtype(flat[path].dtype)))

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for params, table in parts:
            for name, array in tensors(params, table):
                yield name, array
                on_tensor(array.nbytes)

    write_safetensors(folder, shapes, arrays(), max_shard_bytes)
