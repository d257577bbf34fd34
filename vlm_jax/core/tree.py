"""Parameter trees (nested dicts of arrays): flatten, count, hash."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a/b": x}`, in sorted order. Works for any pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return dict(sorted(named.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or `ShapeDtypeStruct`s."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def sha256(tree: Any, fetch: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """SHA-256 of names, shapes, dtypes and bytes, independent of sharding. `fetch` copies a leaf to the host."""
    digest = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        array = fetch(leaf)
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
