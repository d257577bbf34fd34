"""big_vision's checkpoints: its names as it writes them, exact round trips, and bad files told in one line."""

import dataclasses
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.checkpoints import big_vision
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import EncoderSpec
from vlm_jax.models.vlm import Vlm

SPEC = dataclasses.replace(
    builders.ENCODER, depth=2, taps=()
)  # E 16, two heads of 8, feed-forward 24, patches of 4 x 4

ATTENTION = {
    "MultiHeadDotProductAttention_0/query/kernel": (16, 2, 8),
    "MultiHeadDotProductAttention_0/query/bias": (2, 8),
    "MultiHeadDotProductAttention_0/key/kernel": (16, 2, 8),
    "MultiHeadDotProductAttention_0/key/bias": (2, 8),
    "MultiHeadDotProductAttention_0/value/kernel": (16, 2, 8),
    "MultiHeadDotProductAttention_0/value/bias": (2, 8),
    "MultiHeadDotProductAttention_0/out/kernel": (2, 8, 16),
    "MultiHeadDotProductAttention_0/out/bias": (16,),
}
MLP = {
    "MlpBlock_0/Dense_0/kernel": (16, 24),
    "MlpBlock_0/Dense_0/bias": (24,),
    "MlpBlock_0/Dense_1/kernel": (24, 16),
    "MlpBlock_0/Dense_1/bias": (16,),
}
FIRST_NORM = {"LayerNorm_0/scale": (16,), "LayerNorm_0/bias": (16,)}
BLOCK = {**FIRST_NORM, **ATTENTION, "LayerNorm_1/scale": (16,), "LayerNorm_1/bias": (16,), **MLP}
STEM = {
    "embedding/kernel": (4, 4, 3, 16),
    "embedding/bias": (16,),
    "pos_embedding": (1, 16, 16),
    "Transformer/encoder_norm/scale": (16,),
    "Transformer/encoder_norm/bias": (16,),
}
POOL = {f"MAPHead_0/{name}": shape for name, shape in {"probe": (1, 1, 16), **ATTENTION, **FIRST_NORM, **MLP}.items()}
BLOCKS = {f"Transformer/encoderblock_{i}/{name}": shape for i in range(2) for name, shape in BLOCK.items()}
STACKED = {f"Transformer/encoderblock/{name}": (2, *shape) for name, shape in BLOCK.items()}


@pytest.fixture(scope="module")
def params() -> dict:
    model = dataclasses.replace(builders.model(), encoder=SPEC)
    return builders.params(Vlm(model, builders.COMPUTE))["encoder"]


def written(shapes: dict[str, tuple[int, ...]], prefix: str = "params/img/") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"{prefix}{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def load(folder, arrays: dict[str, np.ndarray], spec: EncoderSpec = SPEC) -> dict[str, np.ndarray]:
    np.savez(folder / "model.npz", **arrays)
    return tree.flatten(big_vision.load_encoder(folder / "model.npz", spec))


def test_saved_and_loaded_is_the_same(tmp_path, params) -> None:
    """Bit for bit, and the names and shapes in between are big_vision's."""
    big_vision.save_encoder(tmp_path / "encoder.npz", params, SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.npz"]
    with np.load(tmp_path / "encoder.npz", allow_pickle=False) as archive:
        shapes = {name: archive[name].shape for name in archive.files}
    assert shapes == {f"params/img/{name}": shape for name, shape in {**STEM, **BLOCKS, **POOL}.items()}
    again = big_vision.load_encoder(tmp_path / "encoder.npz", SPEC)
    assert tree.sha256(again) == tree.sha256(params)


def test_tensors_go_where_they_belong(tmp_path) -> None:
    arrays = written({**STEM, **BLOCKS, **POOL})
    flat = load(tmp_path, arrays)
    block = "params/img/Transformer/encoderblock_1"
    for ours, theirs in (
        ("blocks/attention_norm/scale", "LayerNorm_0/scale"),
        ("blocks/mlp_norm/bias", "LayerNorm_1/bias"),
        ("blocks/attention/value/kernel", "MultiHeadDotProductAttention_0/value/kernel"),
        ("blocks/attention/out/bias", "MultiHeadDotProductAttention_0/out/bias"),
        ("blocks/mlp/down/kernel", "MlpBlock_0/Dense_1/kernel"),
    ):
        np.testing.assert_array_equal(flat[ours][1], arrays[f"{block}/{theirs}"])
    np.testing.assert_array_equal(flat["position"], arrays["params/img/pos_embedding"][0])
    np.testing.assert_array_equal(flat["norm/scale"], arrays["params/img/Transformer/encoder_norm/scale"])
    np.testing.assert_array_equal(flat["pooling/norm/bias"], arrays["params/img/MAPHead_0/LayerNorm_0/bias"])


def test_the_patch_kernel_is_the_kernel_of_a_convolution(tmp_path) -> None:
    """big_vision convolves with stride 4; we multiply flattened patches."""
    arrays = written({**STEM, **BLOCKS, **POOL})
    image = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    wanted = jax.lax.conv_general_dilated(
        jnp.asarray(image), jnp.asarray(arrays["params/img/embedding/kernel"]), (4, 4), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    patches = [image[0, r : r + 4, c : c + 4].ravel() for r in range(0, 16, 4) for c in range(0, 16, 4)]
    found = np.stack(patches) @ load(tmp_path, arrays)["patch/kernel"]
    np.testing.assert_allclose(found, np.reshape(wanted, (16, 16)), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "params/", "params/img/"])
def test_scanned_checkpoints_and_other_roots_are_read(tmp_path, prefix: str) -> None:
    """Blocks stacked on a leading axis give what the same blocks give one by one; a text tower beside is left alone."""
    arrays = written({**STEM, **STACKED, **POOL}, prefix)
    apart = {name: leaf for name, leaf in arrays.items() if "/encoderblock/" not in name}
    for name, leaf in arrays.items():
        if "/encoderblock/" in name:
            apart |= {name.replace("encoderblock", f"encoderblock_{i}"): leaf[i] for i in range(2)}
    if prefix == "params/img/":
        arrays |= {"params/t": np.zeros(1), "params/txt/Embed_0/embedding": np.zeros((4, 4))}
    stacked, single = load(tmp_path, arrays), load(tmp_path, apart)
    assert tree.sha256(stacked) == tree.sha256(single)


def test_16_bit_tensors_become_float32(tmp_path) -> None:
    half = {name: leaf.astype(np.float16) for name, leaf in written({**STEM, **BLOCKS, **POOL}).items()}
    assert {leaf.dtype for leaf in load(tmp_path, half).values()} == {np.dtype(np.float32)}


def test_a_missing_tensor_is_named(tmp_path) -> None:
    for name in ("Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias", "MAPHead_0/probe", "pos_embedding"):
        arrays = written({**STEM, **BLOCKS, **POOL})
        del arrays[f"params/img/{name}"]
        with pytest.raises(UserError, match=rf"model\.npz: 1 tensor.*params/img/{name} is missing"):
            load(tmp_path, arrays)


def test_a_pool_is_only_wanted_where_the_spec_has_one(tmp_path) -> None:
    flat = load(tmp_path, written({**STEM, **BLOCKS}), dataclasses.replace(SPEC, pooling_head=False))
    assert not any(name.startswith("pooling") for name in flat)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding/kernel", (4, 4, 3, 15)),
        ("embedding/kernel", (8, 8, 3, 16)),
        ("pos_embedding", (1, 25, 16)),
        ("Transformer/encoderblock_1/LayerNorm_0/scale", (15,)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", (16, 4, 4)),
        ("Transformer/encoderblock_1/MlpBlock_0/Dense_1/kernel", (32, 16)),
        ("Transformer/encoder_norm/bias", (8,)),
        ("MAPHead_0/MlpBlock_0/Dense_0/bias", (25,)),
    ],
)
def test_a_misshapen_tensor_is_named(tmp_path, name: str, shape: tuple[int, ...]) -> None:
    arrays = written({**STEM, **BLOCKS, **POOL}) | {f"params/img/{name}": np.zeros(shape, np.float32)}
    with pytest.raises(UserError, match=rf"model\.npz: 1 tensor.*params/img/{name}: expected shape .* got "):
        load(tmp_path, arrays)


def test_a_deeper_checkpoint_is_not_cut_short(tmp_path) -> None:
    """Three blocks where the spec has two, apart or stacked."""
    deep = {f"Transformer/encoderblock_{i}/{name}": shape for i in range(3) for name, shape in BLOCK.items()}
    stacked = {f"Transformer/encoderblock/{name}": (3, *shape) for name, shape in BLOCK.items()}
    for blocks in (deep, stacked):
        with pytest.raises(UserError, match=r"expected shape|is unexpected"):
            load(tmp_path, written({**STEM, **blocks, **POOL}))


def test_a_file_that_is_no_archive_is_told(tmp_path, params) -> None:
    path = tmp_path / "encoder.npz"
    with pytest.raises(UserError, match=r"encoder\.npz: no such file"):
        big_vision.load_encoder(path, SPEC)
    big_vision.save_encoder(path, params, SPEC)
    whole = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[: len(whole) // 2], b"", b"not an archive", array.getvalue(), bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"encoder\.npz: .*(not a readable|cannot be read)"):
            big_vision.load_encoder(path, SPEC)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **written({**STEM, **BLOCKS, **POOL}))
    flipped = bytearray(compressed.getvalue())
    flipped[len(flipped) // 2] ^= 255
    path.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match=r"encoder\.npz: .*(not a readable|cannot be read)"):
        big_vision.load_encoder(path, SPEC)


class Trap:
    """Its unpickling would be noticed."""

    sprung = False

    def __reduce__(self) -> tuple:
        return setattr, (Trap, "sprung", True)


def test_no_pickle_is_loaded(tmp_path) -> None:
    """Neither inside an archive nor in place of one."""
    path = tmp_path / "model.npz"
    arrays = written({**STEM, **BLOCKS, **POOL}) | {"params/img/pos_embedding": np.array([Trap()], object)}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="not a readable"):
        big_vision.load_encoder(path, SPEC)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="not a readable"):
        big_vision.load_encoder(path, SPEC)
    assert not Trap.sprung
