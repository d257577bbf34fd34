"""Sharding changes where arrays are stored, and no result."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import builders
from vlm_jax.compress import catalog
from vlm_jax.core import axes, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import TrainState, Views, Visual
from vlm_jax.distributed import partitioning
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.vlm import Vlm
from vlm_jax.ops import logical_axes
from vlm_jax.training import loss
from vlm_jax.training import step as training_step

QWEN = dict(qkv_bias=True, tied_head=False, width=32, vocab=64)  # Qwen 2.5 in small
RATE = 0.1


def plan(strategy: str, *mesh: int) -> partitioning.Plan:
    return partitioning.make_plan(builders.compute(strategy=strategy, mesh=mesh), jax.devices()[: int(np.prod(mesh))])


def axis_names(shapes: dict) -> dict[str, tuple]:
    """Parameter path -> the logical name of each of its axes."""
    specs = tree.flatten(nn.get_partition_spec(shapes), is_leaf=lambda leaf: isinstance(leaf, P))
    return {path: tuple(spec) for path, spec in specs.items()}


@pytest.mark.parametrize("strategy", partitioning.TABLES)
def test_a_table_covers_every_name_and_no_other(strategy: str) -> None:
    """A name without a rule would leave its axis whole, silently."""
    assert set(partitioning.TABLES[strategy]) == {*axes.KERNEL_AXES, *axes.COMPUTE_AXES, *axes.ACTIVATION_AXES}
    targets = partitioning.TABLES[strategy].values()
    used = {name for t in targets if t is not None for name in (t if isinstance(t, tuple) else (t,))}
    assert used <= set(partitioning.MESH_AXES)


@pytest.mark.parametrize("compressor", catalog.ROWS)
def test_every_axis_of_every_parameter_is_named(compressor: str) -> None:
    """A known name for each axis longer than one, none twice: two axes cannot live on the same mesh axis."""
    shapes = builders.boxed_shapes(
        Vlm(builders.model(compressor, builders.nearest_tokens(compressor, 4), **QWEN), builders.COMPUTE)
    )
    leaves, named = tree.flatten(nn.meta.unbox(shapes)), axis_names(shapes)
    for path, names in named.items():
        assert len(names) == leaves[path].ndim, path
        assert all(n in axes.KERNEL_AXES or size == 1 for n, size in zip(names, leaves[path].shape, strict=True)), path
        assert len(set(names)) == len(names), path


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tensor"])
def test_unrolled_layers_are_cut_as_the_rows_of_scanned_ones(strategy: str) -> None:
    where, spec, text = plan(strategy, 2, 2, 2), builders.model(**QWEN).decoder, jnp.zeros((1, 2), jnp.int32)

    def specs(scan_layers: bool) -> dict[str, P]:
        init = Decoder(spec, builders.compute(scan_layers=scan_layers)).init
        boxed = jax.eval_shape(init, jax.random.key(0), text, builders.causal(text))["params"]
        return {path: sharding.spec for path, sharding in tree.flatten(where.shardings(boxed)).items()}

    scanned, unrolled = specs(True), specs(False)
    for path, placed in unrolled.items():
        whole = scanned[re.sub(r"^blocks_\d+/", "blocks/", path)]
        assert tuple(placed) == tuple(whole)[path.startswith("blocks_") :], path
    assert sum(path.startswith("blocks_") for path in unrolled) == spec.depth * sum(
        "blocks/" in path for path in scanned
    )


def three_steps(compressor: str, train: tuple[str, ...], strategy: str, mesh: tuple[int, int, int], microbatches: int):
    """(losses, last state). Without the encoder among the trained parts, the views carry features."""
    compute = builders.compute(strategy=strategy, mesh=mesh, microbatches=microbatches)
    where, model = plan(strategy, *mesh), Vlm(builders.model(compressor, qkv_bias=True), compute)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE, momentum=0.9))
    params, boxed = (
        {part: whole[part] for part in train} for whole in (builders.params(model), builders.boxed_shapes(model))
    )

    def start(params: dict) -> TrainState:
        return training_step.init_state(params, optimiser, train)

    shardings = where.shardings(jax.eval_shape(start, boxed))
    state = where.jit(start, out_shardings=shardings)(params)
    step = training_step.make_step(
        lambda params, inputs: loss.sums(model.forward(params, inputs)[0], model.head(params), inputs),
        optimiser,
        train,
        microbatches,
    )
    step = where.jit(step, donate_argnums=0, out_shardings=(shardings, None, None))
    losses = []
    for seed in range(3):
        views = 2 if model.reads_question else 1
        inputs = builders.inputs(rows=8, visual_tokens=model.visual_tokens, seed=seed, views=views)
        if "encoder" not in train:
            features = np.random.default_rng(seed).standard_normal((8, views, 16, 16)).astype(np.float16)
            inputs = inputs._replace(views=Views(features=Visual(features)))
        state, sums, _ = step(state, where.put(inputs))
        losses.append(float(sums.nll) / float(sums.count))
    return losses, state


@pytest.mark.parametrize(
    ("compressor", "train", "settings"),
    [
        ("resampler", ("encoder", "connector", "decoder"), [("fsdp_tensor", (2, 2, 2), 2)]),
        ("pool", ("connector", "decoder"), [("fsdp", (4, 2, 1), 1), ("replicated", (8, 1, 1), 1)]),
        ("fastv", ("connector", "decoder"), [("fsdp_tensor", (2, 2, 2), 1)]),
    ],
)
def test_a_sharded_step_equals_the_single_device_step(compressor: str, train: tuple[str, ...], settings: list) -> None:
    """Losses and parameters after three steps, over three meshes, once with microbatches.

    Only the order of additions differs. Each rounds to 2^-24, and terms of either sign cancel, so that gradients, whose
    norm is clipped to 1, differ by some 1e-6; with momentum, three steps add up fewer than six of them.
    """
    losses, alone = three_steps(compressor, train, "replicated", (1, 1, 1), 1)
    assert losses[2] != losses[0]
    for strategy, mesh, microbatches in settings:
        other, state = three_steps(compressor, train, strategy, mesh, microbatches)
        np.testing.assert_allclose(other, losses, rtol=1e-5)
        ours, theirs = tree.flatten(state.params), tree.flatten(alone.params)
        for path in theirs:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=6e-6 * RATE, err_msg=path)
        _assert_split(state, strategy, dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))


def _assert_split(state: TrainState, strategy: str, mesh: dict[str, int]) -> None:
    """What one device holds of parameters and of the optimiser's momentum, against the sizes worked out by hand."""
    by_hand = {  # path -> mesh axes that cut it; builders: D = E = 16, two key heads, feed-forward 24, 32 words
        "decoder/embedding": ("fsdp", "tensor"),
        "decoder/blocks/attention/key/kernel": ("fsdp", "tensor"),
        "decoder/blocks/mlp/down/kernel": ("fsdp", "tensor"),
        "decoder/blocks/attention_norm/scale": (),
        "connector/projector/kernel": ("fsdp", "tensor"),
        "connector/compressor/layer0/attention/query/kernel": ("fsdp", "tensor"),
        "encoder/blocks/mlp/up/kernel": ("fsdp", "tensor"),
        "encoder/position": ("fsdp",),
    }
    cut = {"replicated": (), "fsdp": ("fsdp",), "fsdp_tensor": ("fsdp", "tensor")}[strategy]
    for part in (state.params, optax.tree.get(state.opt_state, "trace")):
        flat = tree.flatten(part)
        for path in by_hand.keys() & flat.keys():
            # A vector that every device holds has its momentum cut all the same: sixteen divide by any mesh here.
            small = part is not state.params and path.endswith("scale") and strategy != "replicated"
            axes_of = ("fsdp", "tensor") if small else tuple(axis for axis in by_hand[path] if axis in cut)
            parts = int(np.prod([mesh[axis] for axis in axes_of]))
            held = {shard.data.nbytes for shard in flat[path].addressable_shards}
            assert held == {flat[path].nbytes // parts}, (strategy, path)


def test_most_bytes_of_a_real_shape_are_split() -> None:
    """Over 8-way fsdp a device holds an eighth of all but norms, biases and the resampler's table of places."""
    model = Vlm(builders.model(**QWEN), builders.COMPUTE)
    shapes = builders.boxed_shapes(model)
    where = plan("fsdp", 1, 8, 1)
    flat, names = tree.flatten(nn.meta.unbox(shapes)), axis_names(shapes)
    whole = sum(int(np.prod(flat[p].shape)) for p, n in names.items() if not {"embed", "vision"} & set(n))
    total = tree.count(shapes)
    shards = tree.flatten(where.shardings(shapes))
    held = sum(int(np.prod(shards[path].shard_shape(leaf.shape))) for path, leaf in flat.items())
    assert held == whole + (total - whole) // 8
    assert partitioning.unsharded_share(where, shapes) == whole / total
    assert partitioning.unsharded_share(plan("replicated", 8, 1, 1), shapes) == 1


def test_a_second_plan_is_honoured_in_the_same_process() -> None:
    """jit's own cache knows neither mesh nor rules: the same function under other rules must be traced anew."""

    def logits(x: jax.Array) -> jax.Array:
        return logical_axes.constrain(2 * x, (axes.BATCH, axes.LENGTH, axes.ACT_VOCAB))

    x = jnp.ones((8, 3, 8))
    seen = []
    for where in (plan("replicated", 2, 2, 2), plan("fsdp_tensor", 2, 2, 2), plan("fsdp_tensor", 1, 1, 8)):
        out = where.jit(logits)(jax.device_put(x, where.replicated))
        seen.append(out.addressable_shards[0].data.shape)
        np.testing.assert_array_equal(out, 2 * x)
    assert seen == [(1, 3, 8), (2, 3, 4), (8, 3, 1)]


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    """One key head over two devices."""
    names = {"kernel": nn.LogicallyPartitioned(jnp.zeros((16, 1, 8)), (axes.EMBED, axes.KV_HEADS, axes.HEAD_DIM))}
    assert plan("fsdp_tensor", 1, 4, 2).shardings(names)["kernel"].spec == P("fsdp", None, None)


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((4, 2, 1), 8, (4, 2, 1)), ((1, 1, -1), 1, (1, 1, 1))],
)
def test_mesh_shape(mesh, devices, shape) -> None:
    assert partitioning.mesh_shape(mesh, devices) == shape


@pytest.mark.parametrize("mesh", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (16, 1, 1), (-1, 16, 1), (0, -1, 1), (-2, -4, 1)])
def test_a_mesh_that_does_not_divide_the_devices_is_an_error(mesh) -> None:
    with pytest.raises(UserError, match=r"compute\.mesh .* does not divide 8 device\(s\).*write -1 on one axis"):
        partitioning.mesh_shape(mesh, 8)


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(UserError, match=r"unknown compute\.strategy 'fsdp_tensors': did you mean 'fsdp_tensor'\?"):
        plan("fsdp_tensors", 8, 1, 1)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    where = plan("fsdp_tensor", 2, 2, 2)
    partitioning.check_batch(where, "batch", 24, microbatches=3)
    with pytest.raises(UserError, match=r"batch=32 does not divide .* = 12 parts: use 24"):
        partitioning.check_batch(where, "batch", 32, microbatches=3)
    with pytest.raises(UserError, match="use 12"):
        partitioning.check_batch(where, "batch", 8, microbatches=3)
    with pytest.raises(UserError, match="into groups of devices = 4 parts: use 28"):
        partitioning.check_batch(where, "batch", 30)


def test_a_table_that_splits_nothing_is_refused() -> None:
    shapes = builders.boxed_shapes(Vlm(builders.model(**QWEN), builders.COMPUTE))
    for strategy, mesh in (("fsdp", (1, 8, 1)), ("fsdp_tensor", (2, 2, 2)), ("replicated", (8, 1, 1))):
        partitioning.check_sharded(plan(strategy, *mesh), shapes)
    with pytest.raises(UserError, match="100% of them whole"):
        partitioning.check_sharded(plan("fsdp", 8, 1, 1), shapes)


def test_two_names_on_one_mesh_axis_are_an_error() -> None:
    names = {"kernel": nn.LogicallyPartitioned(jnp.zeros((16, 16)), (axes.VISION, axes.EMBED))}
    with pytest.raises(UserError, match=r"axes 'vision' and 'embed' of an array .* both map to mesh axis 'fsdp'"):
        plan("fsdp", 1, 8, 1).shardings(names)
    plan("replicated", 8, 1, 1).shardings(names)


def test_a_width_that_both_directions_do_not_divide_is_cut_in_one() -> None:
    """Twelve over four and two: by four, and the heads by two."""
    where = plan("fsdp", 1, 4, 2)
    assert where.sharding((axes.EMBED, axes.HEADS), (16, 2)).spec == P(("fsdp", "tensor"), None)
    assert where.sharding((axes.EMBED, axes.HEADS), (12, 2)).spec == P("fsdp", None)
    assert where.sharding((axes.VISION, axes.VISION_HEADS), (12, 2)).spec == P("fsdp", "tensor")


def test_gradients_go_home_one_mesh_axis_at_a_time() -> None:
    """From where a kernel works to where it rests; under fsdp_tensor the heads stay cut all the way."""
    names = (axes.EMBED, axes.HEADS, axes.HEAD_DIM)
    way = {
        strategy: [step.spec for step in plan(strategy, 1, 4, 2).storage_shardings(names, (16, 4, 8))]
        for strategy in partitioning.TABLES
    }
    assert way["fsdp"] == [P(("fsdp",), None, None), P(("fsdp", "tensor"), None, None)]
    assert way["fsdp_tensor"] == [P(("fsdp",), ("tensor",), None)]
    assert way["replicated"] == []


def test_thin_parts_are_gathered_one_mesh_axis_at_a_time() -> None:
    """Sixteen rows a part make a tile; fewer would be summed instead of gathered."""
    where = plan("fsdp", 1, 4, 2)
    names = (axes.EMBED, axes.MLP)
    assert [step.spec for step in where.compute_shardings(names, (128, 3))] == [
        P(("fsdp", "tensor"), None),
        P(None, None),
    ]
    way = [P(("fsdp", "tensor"), None), P(("fsdp",), None), P(None, None)]
    assert [step.spec for step in where.compute_shardings(names, (64, 3))] == way
    kept = plan("fsdp_tensor", 1, 4, 2).compute_shardings(names, (64, 32))
    assert [step.spec for step in kept] == [P("fsdp", "tensor"), P(None, "tensor")]


def test_examples_are_split_over_slices_and_parameters_are_not() -> None:
    """Two slices of four: each holds all parameters, and its half of the examples."""
    shapes = builders.boxed_shapes(Vlm(builders.model(**QWEN), builders.COMPUTE))
    for strategy in ("fsdp", "fsdp_tensor"):
        compute = builders.compute(strategy=strategy, mesh=(1, -1, 2), slices=2)
        where = partitioning.make_plan(compute, jax.devices())
        assert dict(where.mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
        rows = where.examples.devices_indices_map((8,))
        assert {rows[device][0].start < 4 for device in where.mesh.devices[0].flat} == {True}
        assert {rows[device][0].start < 4 for device in where.mesh.devices[1].flat} == {False}
        assert not any("slice" in str(each.spec) for each in jax.tree.leaves(where.shardings(shapes)))
    with pytest.raises(UserError, match=r"compute.slices=3 does not divide 8"):
        partitioning.make_plan(builders.compute(slices=3))


def test_auto_replicates_here() -> None:
    """One device, or a CPU: there is nothing to win by splitting."""
    where = partitioning.make_plan(builders.compute(strategy="auto", mesh=(-1, 1, 1)))
    assert dict(where.rules) == dict(partitioning.TABLES["replicated"])
    assert where.mesh.shape["data"] == 8


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        (("cpu", 8), ("replicated", (-1, 1, 1))),
        (("tpu", 1), ("replicated", (-1, 1, 1))),
        (("gpu", 8), ("fsdp", (1, -1, 2))),
        (("tpu", 128), ("fsdp", (1, -1, 8))),
        (("tpu", 256), ("fsdp", (1, -1, 16))),
        (("gpu", 3), ("fsdp", (1, -1, 1))),
    ],
)
def test_what_auto_means(kind: tuple, meaning: tuple) -> None:
    assert partitioning.by_kind(*kind) == meaning


def test_without_a_plan_kernels_are_only_cast() -> None:
    """And their gradients come back in the dtype that they rest in."""
    kernel = jnp.arange(6.0).reshape(2, 3)
    work = lambda k: logical_axes.gather_for_compute(k, (axes.EMBED, axes.MLP), jnp.bfloat16)  # noqa: E731
    assert work(kernel).dtype == jnp.bfloat16
    np.testing.assert_array_equal(work(kernel), kernel)
    gradient = jax.grad(lambda k: work(k).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.ones((2, 3)))
