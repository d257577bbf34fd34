"""The rule of who sees whom, as it is drawn and against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.ops import masks


def test_the_drawings_in_the_module_are_the_mask() -> None:
    """Rows see the columns marked x."""
    drawings = masks.__doc__.split("    segment ")[1:]
    assert len(drawings) == 2
    for drawing in drawings:
        segment, position, order, letters, *lines = f"    segment {drawing}".splitlines()
        columns = [at for at, letter in enumerate(letters) if letter != " "]
        drawn = [[line.ljust(99)[at] == "x" for at in columns] for line in lines[: len(columns)]]
        fields = (jnp.array([list(map(int, line.split()[1:]))]) for line in (segment, position, order))
        row = AttentionMetadata(*fields)
        np.testing.assert_array_equal(masks.attention_mask(row, row)[0, 0], drawn)


@pytest.mark.parametrize("window", [None, 2])
def test_the_rule_against_loops(window: int | None) -> None:
    """Queries beside other keys, with shared segments, two-way prefixes longer than the window, and padding."""
    rng = np.random.default_rng(0)

    def rows(length: int) -> AttentionMetadata:
        segment, position = rng.integers(-1, 3, (4, length)), rng.integers(0, 6, (4, length))
        return AttentionMetadata(*map(jnp.asarray, (segment, position, np.where(position < 4, 0, position))))

    query, key = rows(5), rows(9)
    mask = masks.attention_mask(query, key, window)
    assert mask.shape == (4, 1, 5, 9)
    for b, i, j in np.ndindex(4, 5, 9):
        ours, theirs = (AttentionMetadata(*(int(leaf[b, at]) for leaf in row)) for row, at in ((query, i), (key, j)))
        sees = ours.segment != 0 and theirs.segment in (ours.segment, -1) and theirs.order <= ours.order
        if window is not None and theirs.order != ours.order:
            sees = sees and ours.position - theirs.position < window
        assert bool(mask[b, 0, i, j]) == sees
