"""A report on the data of a run: what is usable, how long it is, and how it fills the rows."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec
from vlm_jax.data import images, packing
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.tokenized import Mixture

_BLOCK = 1024  # images in flight


class DataReport(NamedTuple):
    """Of one mixture. Token counts include visual tokens."""

    name: str
    items: int
    kept: int  # items
    skipped: dict[str, list[str]]  # reason -> ids of items
    conversations: int
    cut: int
    dropped: int  # conversations longer than a row
    tokens: int
    learned: int  # tokens in the loss
    fill: float  # positions of rows that are not padding
    rows: int  # of an epoch
    steps: int
    lengths: dict[str, int]  # percentile -> tokens of a conversation
    turns: float  # answers a conversation, mean
    images: int
    formats: dict[str, int]  # "JPEG RGB" -> images
    sizes: dict[str, int]  # percentile -> pixels of the longer edge

    @property
    def skipped_count(self) -> int:
        return sum(map(len, self.skipped.values()))

    @property
    def bad_share(self) -> float:
        return self.skipped_count / max(self.items, 1)


def check(
    name: str, mixture: Mixture, spec: DataSpec, layout: RowLayout, seed: int, on_image: Callable[[int, int], object]
) -> DataReport:
    """Decodes every image, in threads, and packs an epoch. `on_image` is called with (done, total)."""
    skipped: dict[str, list[str]] = {}
    formats: Counter[str] = Counter()
    edges: list[int] = []
    total, done, bad_items = sum(part.image_count for part in mixture.parts), 0, set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, part in enumerate(mixture.parts):
            for reason, ids in part.skipped.items():
                skipped.setdefault(reason, []).extend(ids)
            for start in range(0, part.image_count, _BLOCK):
                block = range(start, min(start + _BLOCK, part.image_count))
                for image, found in zip(
                    block, pool.map(lambda i, part=part: _decoded(part.image(i)), block), strict=True
                ):
                    if isinstance(found, tuple):
                        formats[found[0]] += 1
                        edges.append(found[1])
                    elif (number, item := part.item_of(image)) not in bad_items:
                        bad_items.add((number, item))
                        skipped.setdefault("unreadable image", []).append(part.source.without_images(item).id)
                done += len(block)
                on_image(done, total)
    sizes = packing.lengths(mixture, spec, layout)
    rows = packing.epoch_rows(mixture, spec, sizes, layout, seed, 0)
    used = sizes.tokens[rows.conversation]
    whole = mixture.concatenate(lambda part: np.diff(part.bounds) + part.images * (layout.visual_tokens - 1))
    items = sum(len(part.source) for part in mixture.parts)
    return DataReport(
        name=name,
        items=items,
        kept=items - sum(map(len, skipped.values())),
        skipped=skipped,
        conversations=len(mixture),
        cut=sizes.cut,
        dropped=sizes.dropped,
        tokens=int(used.sum()),
        learned=int(sum(part.target.sum() for part in mixture.parts)),
        fill=float(_row_tokens(rows, used, mixture, layout).sum() / (len(rows) * spec.row_tokens)),
        rows=len(rows),
        steps=-(-len(rows) // spec.batch_rows),
        lengths=_percentiles(whole),
        turns=float(np.concatenate([np.diff(part.turn_bounds) for part in mixture.parts]).mean()),
        images=total,
        formats=dict(formats.most_common()),
        sizes=_percentiles(np.array(edges, int)) if edges else {},
    )


def _decoded(image: Any) -> tuple[str, int] | str:
    """("JPEG RGB", the longer edge), or why the image cannot be used."""
    try:
        header = images.header(image)
        return f"{header.format} {header.mode}", max(images.read_image(image).shape[:2])
    except UserError as error:
        return str(error)


def _row_tokens(rows: packing.Rows, used: np.ndarray, mixture: Mixture, layout: RowLayout) -> np.ndarray:
    """Positions of each row; an image that is shared counts once."""
    row = np.repeat(np.arange(len(rows)), np.diff(rows.bounds))
    out = np.bincount(row, used, minlength=len(rows))
    if layout.shares_image:
        images = mixture.concatenate(lambda part: part.images)[rows.conversation]
        out -= np.bincount(row, images * layout.visual_tokens) - images[rows.bounds[:-1]] * layout.visual_tokens
    return out


def _percentiles(values: np.ndarray) -> dict[str, int]:
    return {f"p{q}": int(np.percentile(values, q)) for q in (0, 50, 90, 99, 100)}


def as_json(reports: Sequence[DataReport]) -> dict[str, Any]:
    """The totals of the training data, and each report with all ids of skipped items."""
    training = [report for report in reports if report.name != "test"] or list(reports)
    skipped: dict[str, list[str]] = {}
    for report in training:
        for reason, ids in report.skipped.items():
            skipped.setdefault(reason, []).extend(ids)
    positions = sum(report.tokens / report.fill for report in training if report.fill)
    return {
        **{name: sum(getattr(r, name) for r in training) for name in ("items", "kept", "cut", "dropped", "tokens")},
        "skipped": skipped,
        "fill": sum(report.tokens for report in training) / positions if positions else 0.0,
        "sets": [report._asdict() for report in reports],
    }


def text(report: DataReport) -> str:
    """The report for a terminal."""
    lines = [
        f"{report.name}: {report.kept:,} of {report.items:,} items kept, {report.conversations:,} conversations with "
        f"{report.images:,} images, {report.turns:.1f} answers each",
        f"  tokens    {report.tokens:,} in rows, {report.learned:,} learned; a conversation {_listed(report.lengths)}",
        f"  rows      {report.rows:,} an epoch ({report.steps:,} steps), {report.fill:.1%} full; "
        f"{report.cut:,} conversations cut, {report.dropped:,} dropped",
    ]
    if report.images:
        lines.append(f"  images    {_listed(report.formats)}; longer edge {_listed(report.sizes)}")
    for reason, ids in sorted(report.skipped.items()):
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        lines.append(f"  skipped   {reason}: {len(ids):,} ({shown})")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in counts.items())
