"""Whether the device computes what the references do: logits of golden files, fused attention, a resumed training.

`relative` is the root mean square of the difference over the standard deviation of the reference.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu import goldens
from experiments.gpu.cases import Case
from experiments.gpu.results import Results
from experiments.gpu.sizes import AttentionShape, Sizes
from vlm_jax.compress import catalog
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import attention_mask
from vlm_jax.sizing.chips import Chip

PART = "correctness"
# (dtype, precision of float32 products on the device) -> tolerance of `relative`. "default" is TF32 on an H100.
PRECISIONS = {("float32", "highest"): 1e-5, ("float32", "default"): 0.02, ("bfloat16", "default"): 0.1}
# Of the differences from float32, by fused and by plain attention in bfloat16.
FUSED_OVER_PLAIN = 2.0


def cases(sizes: Sizes, results: Results, chip: Chip) -> list[Case]:
    """Attention first: the train step asks for its result."""
    found = [attention_case(shape) for shape in sizes.attention]
    for (dtype, precision), tolerance in PRECISIONS.items():
        for golden in goldens.read()[: sizes.goldens or None]:
            found.append(logits_case(golden, dtype, precision, tolerance))
    resume = Case("resumed training", lambda: None, lambda _: resumed(sizes.resume_steps))
    return [*found[: len(sizes.attention)], resume, *found[len(sizes.attention) :]]


def implementation() -> str:
    """The fused attention of this device; on a CPU, which has none, the plain one stands in for it."""
    return "cudnn" if jax.default_backend() in ("gpu", "cuda") else "xla"


def fused_is_correct(results: Results) -> bool:
    """Whether fused attention has passed on this device with the masks of training rows."""
    prefixes = tuple(f"attention {implementation()}, {pattern}," for pattern in ("causal", "packed"))
    rows = [row for name, row in results.rows(PART).items() if name.startswith(prefixes)]
    return bool(rows) and all(row.get("ok") for row in rows)


def difference(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """`max_abs` and `relative`."""
    miss = np.asarray(found, np.float64) - reference
    return {"max_abs": float(np.abs(miss).max()), "relative": float(np.sqrt(np.mean(miss**2)) / np.std(reference))}


def logits_case(golden: goldens.Golden, dtype: str, precision: str, tolerance: float) -> Case:
    """Logits of a golden model. All work is in `prepare`: nothing is timed."""

    def prepare() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision(precision):
            return goldens.logits(golden, Path(folder), dtype)

    def measure(found: np.ndarray) -> dict[str, Any]:
        values = difference(found[:, -golden.logits.shape[1] :], golden.logits)
        return {"kind": f"logits, {dtype}, {precision} precision", **values, "tolerance": tolerance,
                "ok": values["relative"] <= tolerance}  # fmt: skip

    return Case(f"logits of {golden.name}, {dtype}, {precision} precision", prepare, measure)


def metadata(pattern: str, batch: int, length: int) -> AttentionMetadata:
    """Rows [B, L] of a pattern.

    causal: a conversation fills the row. packed: three of them, then a sixteenth of padding. padded right, padded left:
    a conversation of half the row or more. prefix: the first quarter is bidirectional.
    """
    place = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    segment, order = np.ones_like(place), place
    if pattern == "packed":
        segment = segment + (place >= length // 4) + (place >= length // 2)
        segment[:, -max(length // 16, 1) :] = 0
    elif pattern.startswith("padded"):
        used = length // 2 + np.arange(batch)[:, None] * (length // (2 * batch))
        segment = segment * ((place < used) if pattern == "padded right" else (place >= length - used))
    elif pattern == "prefix":
        order = np.where(place < length // 4, 0, place)
    return AttentionMetadata(*map(jnp.asarray, (segment, place, order)))


def attention_case(shape: AttentionShape) -> Case:
    """Forward and gradients of fused and plain attention in bfloat16, each against plain attention in float32."""
    kind = implementation()
    sizes = f"B = {shape.batch}, L = {shape.length}, N = {shape.heads}, K = {shape.kv_heads}, C = {shape.head_dim}"

    def prepare() -> dict[str, list[np.ndarray]]:
        with jax.default_matmul_precision("highest"):
            exact = attention_arrays(shape, "xla", jnp.float32)
        return {
            "exact": exact,
            "plain": attention_arrays(shape, "xla", jnp.bfloat16),
            "fused": attention_arrays(shape, kind, jnp.bfloat16),
        }

    def measure(found: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        values, ok = {}, True
        for index, name in enumerate(("out", "dq", "dk", "dv")):
            exact, plain, fused = (found[side][index] for side in ("exact", "plain", "fused"))
            ours, others = difference(fused, exact)["relative"], difference(plain, exact)["relative"]
            values[f"{name}_relative"], values[f"{name}_plain_relative"] = ours, others
            ok &= bool(np.isfinite(fused).all()) and ours <= FUSED_OVER_PLAIN * others
            values[f"{name}_max_abs"] = difference(fused, plain)["max_abs"]
        ratios = [values[f"{name}_relative"] / values[f"{name}_plain_relative"] for name in ("out", "dq", "dk", "dv")]
        worst = float(np.max(ratios))  # NaN if one is
        return {"kind": f"attention, {kind}, bfloat16", **values, "ratio": worst, "tolerance": FUSED_OVER_PLAIN,
                "ok": ok}  # fmt: skip

    return Case(f"attention {kind}, {shape.pattern}, {sizes}", prepare, measure)


def attention_arrays(shape: AttentionShape, kind: str, dtype: Any) -> list[np.ndarray]:
    """float64 output and gradients of q, k, v, for random inputs and a random gradient of the output."""
    rng, heads = np.random.default_rng(0), (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    # Rounded to bfloat16 first, so that all dtypes get the same numbers.
    q, k, v, weight = (
        jnp.asarray(rng.standard_normal((shape.batch, shape.length, n, shape.head_dim)), jnp.bfloat16).astype(dtype)
        for n in heads
    )
    mask = None
    if shape.pattern != "none":
        place = metadata(shape.pattern, shape.batch, shape.length)
        mask = attention_mask(place, place)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, gradients = jax.vjp(lambda *inputs: attend(*inputs, mask, implementation=kind), q, k, v)
        return out, *gradients(weight)

    return [np.asarray(leaf, np.float64) for leaf in run(q, k, v)]


def resumed(steps: int) -> dict[str, Any]:
    """A training that is stopped half-way and resumed from its checkpoint, against one that is not, and that against a
    repeat of itself. It passes bit for bit, or where the device does not repeat itself, within twice the difference of
    the repeat.
    """
    from vlm_jax import build
    from vlm_jax.config.arguments import load_config
    from vlm_jax.config.resolve import resolve

    spec = resolve(load_config("configs/vlm.py:llm=d48,tokens=4,compressor=pool,data=rows4_tiny"))
    encoder = EncoderSpec("tiny", image_size=64, patch_size=16, width=16, depth=1, heads=2, mlp_width=16)
    stage = dataclasses.replace(spec.stages[0], total_steps=steps, warmup_steps=1)
    model = catalog.model_spec(encoder, "pool", 4, spec.model.decoder)
    spec = dataclasses.replace(
        spec, model=model, encoder_checkpoint="", stages=(stage,), log_every_steps=steps, save_every_steps=0
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = build.open_run(spec, build.default_cache())
        train = functools.partial(_trained, run)
        whole, repeat = train(root / "whole"), train(root / "repeat")
        half = lambda step: step >= steps // 2  # noqa: E731
        stopped = train(root / "resumed", half)
        after = train(root / "resumed")
    if stopped is not None:
        raise RuntimeError("the run was not stopped")
    noise, found = (_largest(other, whole) for other in (repeat, after))
    return {"kind": "resumed training", "steps": steps, "max_abs": found, "repeat_max_abs": noise,
            "tolerance": 2 * noise, "bit_for_bit": found == 0.0, "ok": found <= 2 * noise}  # fmt: skip


def _trained(run: Any, workdir: Path, stop: Callable[[int], bool] = lambda step: False) -> list[np.ndarray] | None:
    """Final parameters on the host; None where `stop` ended the run."""
    from vlm_jax import job
    from vlm_jax.core.errors import RunStopped

    try:
        params = job.train(run, workdir, lambda log, values: None, stop)
    except RunStopped:
        return None
    return jax.device_get(jax.tree.leaves(params))


def _largest(found: list[np.ndarray] | None, reference: list[np.ndarray] | None) -> float:
    """NaN if there is one."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(found or [], reference or [], strict=True)]))
