"""Predicted times, worked out by hand."""

from collections.abc import Callable

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.sizing import chips, cost, roofline
from vlm_jax.sizing.hlo import Collective

V5E, V5P = chips.device("v5e"), chips.device("v5p")


def sent(axes: tuple[str, ...], wire_bytes: float, beside: bool) -> Collective:
    return Collective("all-gather", axes, 2, 1, (), wire_bytes, beside, "")


def test_a_step_by_hand() -> None:
    """Compute hides memory and overlapped gathers; exposed collectives are added, and bind if they take longest."""
    work = roofline.Work(model_flops=3e15, flops=4e15, chip_bytes=8.1e10)
    found = [sent(("fsdp",), 1e9, True), sent(("tensor",), 3e9, False), sent(("slice",), 6.2e9, False)]
    share = {("fsdp",): 1.0, ("tensor",): 0.5}
    half = chips.Efficiency(0.5, 0.5, 0.5)
    got = roofline.predict(work, found, V5E, 16, share.__getitem__, cycles=1.503e9, efficiency=half)
    compute = 4e15 / 16 / 1.97e14
    assert got.compute_secs == pytest.approx(compute)
    assert got.memory_secs == pytest.approx(0.1)
    assert got.hidden_secs == pytest.approx(1e9 / 2e11)
    assert got.exposed_secs == pytest.approx(3e9 / 1e11 + 2.0)
    assert got.step_secs == pytest.approx(2 * (compute + 0.03 + 2.0))
    assert got.mfu == pytest.approx(3e15 / (got.step_secs * 16 * 1.97e14))
    assert (got.binds, got.compiler_secs) == ("network", pytest.approx(1.0))
    without = roofline.predict(work, found[:2], V5E, 16, share.__getitem__, efficiency=half)
    assert (without.binds, without.compiler_secs) == ("compute", 0.0)


@pytest.mark.parametrize(
    ("chip", "places", "extent", "share"),
    [
        (V5E, [(x, 0) for x in range(16)], (16, 16), 0.5),  # a ring, both ways
        (V5E, [(x, y) for x in range(16) for y in range(16)], (16, 16), 1.0),
        (V5E, [(x, 0) for x in range(4)], (4, 4), 0.25),  # a line: no way back
        (V5E, [(x, 0) for x in range(4)], (16, 16), 0.25),  # a part of a ring is a line
        (V5P, [(x, y, 0) for x in range(4) for y in range(4)], (4, 4, 8), 2 / 3),
        (V5P, [(0, 0, z) for z in range(8)], (4, 4, 8), 1 / 3),
        (chips.device("h100"), [(0, 0, 0)], (1, 1, 1), 1.0),
    ],
)
def test_links_of_a_ring(chip: chips.Chip, places: list, extent: tuple[int, ...], share: float) -> None:
    assert roofline.ring_share(places, extent, chip) == pytest.approx(share)


def test_a_device_may_be_half_a_chip() -> None:
    whole, device = chips.chip("v4"), chips.device("v4")
    assert device.peak_flops == whole.peak_flops / 2
    assert device.memory_bytes == whole.memory_bytes / 2
    assert device.usable_bytes == whole.usable_bytes < device.memory_bytes * 1.074
    assert chips.device("a100").usable_bytes == 80e9


def test_recomputing_costs_a_forward_pass() -> None:
    """With every block computed again, a step that trains the decoder does one of its forward passes more, less the
    down products: nothing reads their outputs."""
    spec = resolve(load_config("configs/llava.py:llm=qwen1.5-0.5b,tokens=16"))
    work = roofline.train_work(spec, spec.stages[-1], 256)
    decoder = spec.model.decoder
    down = 2 * 2048 * decoder.depth * decoder.width * decoder.mlp_width
    again = cost.pass_flops(decoder, 2048, 2048, 2048).total - down
    rows = spec.data.batch_rows
    assert work.model_flops == cost.step_flops(spec, spec.stages[-1])
    assert work.flops - work.model_flops == pytest.approx(rows * again)


def test_every_view_of_a_row_is_encoded() -> None:
    """FLOPs and activations of the frozen encoder for each of a packed row's images."""
    fields = {"data.frozen_features": "False", "data.pack": "fit"}
    specs = [resolve(load_config("configs/vlm.py", fields | {"data.row_images": str(count)})) for count in (1, 5)]
    one, five = (roofline.train_work(spec, spec.stages[0], 1) for spec in specs)
    model, rows = specs[0].model, specs[0].data.batch_rows
    encoder = cost.encoder_activation_bytes(model.encoder, "float32")
    assert five.chip_bytes - one.chip_bytes == pytest.approx(4 * rows * encoder)
    parts = cost.flops(model, 0, 1)
    image = parts.encoder + 3 * (parts.compressor + parts.projector)
    assert five.model_flops - one.model_flops == pytest.approx(4 * rows * image)


def test_a_decode_step_reads_kernels_and_cache_once() -> None:
    """Kernels that stay cut in sixteen, and the keys and values of a chip's rows."""
    spec = resolve(
        load_config("configs/llava.py:llm=qwen1.5-0.5b,tokens=16,batch=256", {"compute.mesh": "(16, 1, 16)"})
    )
    work = roofline.decode_work(spec, 256, compute_shards=16)
    keys = 2048 + spec.evaluation.max_new_tokens
    by_hand = 2 * cost.decoder_params(spec.model.decoder) / 16 + cost.cache_bytes(spec.model.decoder, keys)
    assert work.chip_bytes == pytest.approx(by_hand)


@pytest.mark.parametrize("work", [roofline.prefill_work, roofline.decode_work])
def test_gathered_kernels_are_written_too(work: Callable[..., roofline.Work]) -> None:
    """Read once if stored as computed, else also written once, two bytes each; whatever mesh the spec has."""
    spec = resolve(load_config("configs/llava.py:llm=qwen1.5-0.5b,tokens=16"))
    assert spec.compute.mesh[1] != 1
    sizes = cost.params(spec.model).total if work is roofline.prefill_work else cost.decoder_params(spec.model.decoder)
    whole, split, kept = (work(spec, 16, *parts).chip_bytes for parts in ((1, 1), (1, 16), (16, 16)))
    assert split - whole == pytest.approx(2 * sizes)
    assert whole - kept == pytest.approx(2 * sizes * 15 / 16)


def test_replicated_state_is_updated_whole_on_every_device() -> None:
    """Seven passes of four bytes over trained parameters, and no gathered kernels."""
    spec = resolve(load_config("configs/llava.py:llm=qwen1.5-0.5b,tokens=16", {"compute.remat": "none"}))
    stage, sizes = spec.stages[-1], cost.params(spec.model)
    assert stage.train == ("connector", "decoder")
    whole, split = (roofline.train_work(spec, stage, 16, 1, rests).chip_bytes for rests in (1, 16))
    learned = sizes.total - sizes.encoder
    assert whole - split == pytest.approx(28 * learned * 15 / 16 - 2 * 2 * sizes.total)
