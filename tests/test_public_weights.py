"""A run that starts from published weights and a published tokenizer."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests import builders
from vlm_jax import build
from vlm_jax.checkpoints.huggingface import exporting
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec, RunSpec
from vlm_jax.data.conversations import IMAGE
from vlm_jax.models.vlm import Vlm

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = len(BYTES)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, and one token that ends an answer."""
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[RunSpec, dict]:
    """A tiny tower and a tiny language model as their users hold them, the run that names them, and their weights."""
    root = tmp_path_factory.mktemp("published")
    encoder = dataclasses.replace(builders.ENCODER, taps=())
    decoder = dataclasses.replace(builders.DECODER, vocab=END + 1, qkv_bias=True, context=512)
    compressor = dataclasses.replace(builders.model().compressor, taps=0)
    spec = ModelSpec(encoder, compressor, "mlp", decoder, "causal")
    params = builders.params(Vlm(spec, builders.COMPUTE))
    for part in ("encoder", "decoder"):
        exporting.save_folder(root / part, exporting.part_of(spec, part), params)
    write_tokenizer(root / "decoder")
    run = resolve(load_config("configs/vlm.py:smoke,data=rows4_tiny", {}))
    data = dataclasses.replace(run.data, tokenizer=str(root / "decoder"), row_tokens=256, frozen_features=False)
    run = dataclasses.replace(
        run, model=spec, data=data, encoder_checkpoint=str(root / "encoder"), decoder_checkpoint=str(root / "decoder")
    )
    return run, params


def test_training_starts_from_the_published_weights(published) -> None:
    spec, params = published
    start = build.first_params(build.open_network(spec))
    for part in ("encoder", "decoder"):
        ours, theirs = tree.flatten(start[part]), tree.flatten(params[part])
        assert set(ours) == set(theirs)
        for name, leaf in theirs.items():
            np.testing.assert_array_equal(ours[name], leaf, err_msg=f"{part}/{name}")


def test_questions_and_answers_use_the_models_tokenizer(published, tmp_path) -> None:
    (batches,) = build.open_run(published[0], build.default_cache()).train
    ids, target = batches.data.mixture.parts[0].conversation(0)
    assert ids[0] == IMAGE
    spelled = "".join(BYTES[i] for i in ids[1:][~target[1:]]).replace("Ġ", " ").replace("Ċ", "\n")
    assert spelled.startswith("read row ")
    assert spelled.endswith("\n")
    assert ids[target].tolist().index(END) == target.sum() - 1


@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_sees_as_its_encoders_folder_says(published, tmp_path, frozen: bool) -> None:
    """Pages of 64 pixels become the encoder's 16 on the host, by the folder's filter, mean and deviation: in training
    batches, in stored features, and in what `open_network` gives to those who load the run.
    """
    spec, params = published
    shutil.copytree(spec.encoder_checkpoint, tmp_path / "encoder")
    preparation = {"size": {"height": 16, "width": 16}, "resample": 4, "image_mean": [0.2] * 3, "image_std": [0.3] * 3}
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(preparation))
    data = dataclasses.replace(spec.data, frozen_features=frozen)
    run = build.open_run(
        dataclasses.replace(spec, encoder_checkpoint=str(tmp_path / "encoder"), data=data), build.default_cache()
    )
    (batches,) = run.train
    inputs, (dataset,) = batches[0], batches.data.mixture.parts
    shown = [int(dataset.item[plan.conversation[0]]) for plan in batches.rows(0)]
    pages = [Image.open(io.BytesIO(dataset.source[i].images[0])) for i in shown]
    small = np.stack([np.asarray(page.resize((16, 16), Image.Resampling.BOX)) for page in pages])
    encode = jax.jit(run.network.model.encode)
    wanted = encode(params, ((small / 255 - 0.2) / 0.3).astype(np.float32)).tokens
    if frozen:
        found = inputs.views.features.tokens[:, 0]
    else:
        np.testing.assert_array_equal(inputs.views.pixels[:, 0], small)
        found = encode(params, inputs.views.pixels[:, 0]).tokens
    np.testing.assert_allclose(found, wanted, atol=2e-3)  # features are stored in float16
    assert run.network.spec.model == spec.model  # the name of the experiment stays


def test_an_eos_id_outside_the_vocabulary_is_an_error(published, tmp_path) -> None:
    spec, _ = published
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5000}')
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.vocab: expected more than 5000, the eos_token_id of .* got 257"):
        build.open_network(spec)


def test_a_float_that_went_through_json_is_the_same(published) -> None:
    """1e-05 as float32 prints 9.9999997e-06."""
    spec, params = published
    eps = spec.model.decoder.norm_eps
    close = dataclasses.replace(spec.model.decoder, norm_eps=float(np.float32(eps)))
    assert close.norm_eps != eps
    start = build.first_params(
        build.open_network(dataclasses.replace(spec, model=dataclasses.replace(spec.model, decoder=close)))
    )
    np.testing.assert_array_equal(start["decoder"]["embedding"], params["decoder"]["embedding"])
    other = dataclasses.replace(spec.model.decoder, norm_eps=1.1 * eps)
    with pytest.raises(UserError, match="norm_eps"):
        build.first_params(
            build.open_network(dataclasses.replace(spec, model=dataclasses.replace(spec.model, decoder=other)))
        )


def test_weights_of_another_size_are_an_error(published) -> None:
    spec, _ = published
    other = dataclasses.replace(spec.model.decoder, mlp_width=32)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, decoder=other))
    with pytest.raises(UserError, match=r"expected decoder test, got mlp_width=24 \(not 32\)"):
        build.first_params(build.open_network(spec))
