"""Checkpoints of LLaVA's own code, TokenPacker and QueCC, against what the official modules computed."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vlm_jax
from tests import builders
from tests.checkpoints.test_vision_import import close
from tests.golden import drawn
from tests.golden import peers_llava_weights as peers
from vlm_jax import build
from vlm_jax.checkpoints.huggingface import exporting
from vlm_jax.checkpoints.inspection import inspect, load_parts, model_spec
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec
from vlm_jax.data import chat
from vlm_jax.inference import api, programs, prompts
from vlm_jax.inference.loading import Model
from vlm_jax.models.vlm import Vlm

GOLDEN = np.load(peers.GOLDEN)
QUECCS = [name for name in peers.CASES if name.startswith("quecc")]
TOWER = "clip-vit-large-patch14-336"


@functools.cache
def tensors(name: str, part: str = "") -> dict[str, np.ndarray]:
    """The weights of a case, or of its tower."""
    files = json.loads(str(GOLDEN[f"{name}/files"]))
    return drawn.weights((files[part] if part else files)["shapes"])


def write_tower(folder: Path, name: str = "llava15", processor: dict[str, Any] | None = None) -> Path:
    tower = json.loads(str(GOLDEN[f"{name}/files"]))["tower"]
    folder.mkdir()
    save_file(tensors(name, "tower"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tower["config"]))
    size = tower["config"]["image_size"]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": size, "crop_size": size, "do_center_crop": True, "resample": 3, **(processor or {})})
    )
    return folder


def write(root: Path, name: str, **changes: Any) -> Path:
    """A checkpoint in two shards, with the tower's folder beside it; `changes` go into config.json."""
    files = json.loads(str(GOLDEN[f"{name}/files"]))
    folder = root / name
    folder.mkdir(parents=True)
    drawn_here = tensors(name)
    names = sorted(drawn_here)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({tensor: drawn_here[tensor] for tensor in some}, folder / file)
    index = {"weight_map": {tensor: file for file, some in shards.items() for tensor in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**files["config"], **changes}))
    write_tower(root / TOWER, name)
    return folder


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """The checkpoint's tensors as one file, with these beside or instead of its own."""
    files = sorted(folder.glob("model*.safetensors"))
    found = {name: leaf for file in files for name, leaf in load_file(file).items()}
    for path in (*files, *folder.glob("*.index.json")):
        path.unlink()
    save_file({**found, **tensors}, folder / "model.safetensors")


def generated(model: Model, name: str) -> tuple[Any, Any]:
    """Logits and greedy ids of the peer's prompt."""
    _, tokens = peers.prompt(peers.CASES[name][1])
    model = model._replace(eos_ids=())
    if not name.startswith("quecc"):
        logits = vlm_jax.forward(model, peers.pixels(), tokens)
        return logits, vlm_jax.generate_tokens(model, peers.pixels(), tokens, max_new_tokens=6)
    # `forward` takes questions as texts, which this model has no tokenizer for.
    images = prompts.images_by_row(model, peers.pixels(), 2)
    inputs = prompts.inputs_of(model, images, tokens, None, None, [peers.QUESTION] * 2)
    length, config = tokens.shape[1], (model.spec, model.compute, model.plan)
    hidden = programs.hidden_program(*config)(model.params, prompts.put(prompts.to_bucket(inputs, model), model.plan))
    logits = programs.logits_program(*config)(model.params, hidden[:, :length])
    asked = [peers.QUESTION] * 2
    return logits, vlm_jax.generate_tokens(model, peers.pixels(), tokens, max_new_tokens=6, questions=asked)


@pytest.mark.parametrize("name", peers.CASES)
def test_a_checkpoint_gives_its_references_logits(tmp_path: Path, name: str) -> None:
    """And the greedy text; the number of visual tokens is that of the release."""
    model = vlm_jax.load(write(tmp_path, name), dtype="float32")
    assert model.visual_tokens == peers.CASES[name][1]
    assert model.is_trained
    logits, tokens = generated(model, name)
    close(logits, GOLDEN[f"{name}/logits"])
    np.testing.assert_array_equal(tokens, GOLDEN[f"{name}/generated"])


def test_specs_are_the_published_ones(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, "tokenpacker"))
    assert found.encoder.taps == (12, 16, 22, 23)
    assert found.encoder.feature_layer == 23
    assert (found.compressor.name, found.compressor.tokens, found.compressor.heads) == ("tokenpacker", 9, 8)
    assert (found.projector, found.mask, found.decoder.context) == ("mlp", "causal", 64)


@pytest.mark.parametrize("fields", [{"down_rate": 3, "scale_factor": None}, {"scale_factor": 3, "down_rate": 2}])
def test_the_scale_under_its_former_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The first release of TokenPacker had `down_rate`; its first code knows 2 alone, and has no field."""
    fields = {name: value for name, value in fields.items() if value is not None}
    folder = write(tmp_path, "tokenpacker", **fields)
    config = json.loads((folder / "config.json").read_text())
    if "scale_factor" not in fields:
        config.pop("scale_factor")
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).compressor.tokens == 4
    config = {name: value for name, value in config.items() if name not in ("scale_factor", "down_rate")}
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": "mlp2x_gelu"}))
    assert inspect(folder).compressor.tokens == 9


@pytest.mark.parametrize("place", ["beside", "inside", "hub", "absolute", "relative", "option"])
def test_where_the_tower_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder, option = write(tmp_path, "tokenpacker"), None
    tower = tmp_path / TOWER
    if place == "inside":
        tower.rename(folder / TOWER)
    elif place == "hub":
        (tmp_path / "org").mkdir()
        (tmp_path / "openai").mkdir()
        tower.rename(tmp_path / "openai" / TOWER)
        folder = folder.rename(tmp_path / "org" / "TokenPacker-7b-144token")
    elif place != "beside":
        moved = tower.rename(tmp_path / "elsewhere")
        named = {"absolute": str(moved), "relative": "elsewhere", "option": "openai/gone"}[place]
        monkeypatch.chdir(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": named}))
        option = moved if place == "option" else None
    model = vlm_jax.load(folder, dtype="float32", vision=option)
    close(generated(model, "tokenpacker")[0], GOLDEN["tokenpacker/logits"])


def test_a_tower_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """It lists what was looked for. The language model alone needs no tower."""
    folder = write(tmp_path, "tokenpacker")
    (tmp_path / TOWER).rename(tmp_path / "other")
    with pytest.raises(UserError) as caught:
        vlm_jax.load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/config.json: mm_vision_tower: expected the folder of a CLIP tower, looked for")
    places = (
        f"openai/{TOWER}",
        f"{TOWER} in {folder}",
        f"{TOWER} in {tmp_path}",
        f"openai/{TOWER} in {tmp_path.parent}",
    )
    for place in places:
        assert f" {place}" in message
    assert "vision=FOLDER" in message
    assert "\n" not in message
    found = inspect(folder)
    assert found.encoder is None
    assert set(found.tables) == {"decoder"}
    load_parts(found)
    with pytest.raises(UserError, match="expected the folder of a CLIP tower"):
        model_spec(found)
    with pytest.raises(UserError, match=r"gone: no such|config\.json: missing"):
        vlm_jax.load(folder, vision=tmp_path / "gone")
    with pytest.raises(UserError, match="leave vision out"):
        vlm_jax.load(tmp_path / "other", llm=folder, vision=tmp_path / "other")


@pytest.mark.parametrize("tower", ["frozen", "trained", "config alone"])
def test_a_tower_in_the_checkpoint_counts_where_it_was_trained(tmp_path: Path, tower: str) -> None:
    """LLaVA reads CLIP's folder over what is saved, except for a tower that was trained."""
    trained = tower != "frozen"
    folder = write(tmp_path, "llava15", unfreeze_mm_vision_tower=tower == "trained")
    prefix = "model.vision_tower.vision_tower.vision_model."
    saved = {prefix + name: leaf for name, leaf in load_file(tmp_path / TOWER / "model.safetensors").items()}
    other = {name: np.zeros_like(leaf) for name, leaf in saved.items()}
    buffers = {f"{prefix}embeddings.position_ids": np.arange(37)[None]}
    rewrite(folder, (saved if trained else other) | buffers)
    if tower == "trained":
        save_file({"none": np.zeros(1, np.float32)}, tmp_path / TOWER / "model.safetensors")
    elif tower == "config alone":
        (tmp_path / TOWER / "model.safetensors").unlink()
    close(generated(vlm_jax.load(folder, dtype="float32"), "llava15")[0], GOLDEN["llava15/logits"])


def test_a_tower_with_a_text_side_is_the_same(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14-336 is a `CLIPModel`."""
    folder = write(tmp_path, "llava15")
    file, config = tmp_path / TOWER / "model.safetensors", tmp_path / TOWER / "config.json"
    tensors = {f"vision_model.{name}": leaf for name, leaf in load_file(file).items()}
    text = {"text_model.final_layer_norm.weight": np.ones(8, np.float32), "logit_scale": np.ones(1, np.float32)}
    save_file(tensors | text, file)
    vision = json.loads(config.read_text())
    config.write_text(json.dumps({"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": vision}))
    close(generated(vlm_jax.load(folder, dtype="float32"), "llava15")[0], GOLDEN["llava15/logits"])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tokenpacker", {"image_aspect_ratio": "slice"}, "image_aspect_ratio='slice'.*tiles.*expected pad or square"),
        ("llava15", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'.*tiles"),
        ("llava15", {"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad' is not supported"),
        ("llava15", {"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not supported"),
        ("llava15", {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' is not supported"),
        ("llava15", {"mm_vision_select_layer": -26}, "mm_vision_select_layer=-26: expected a layer of the tower"),
        (
            "llava15",
            {"mm_projector_type": "mlp3x_gelu"},
            "mm_projector_type='mlp3x_gelu' is not supported: expected li",
        ),
        ("llava15", {"mm_projector_type": "linear"}, "expected the connector of mm_projector_type='linear', got the"),
        ("llava15", {"mm_projector_type": "tokenpacker"}, "expected the connector of mm_projector_type='tokenpacker'"),
        ("llava15", peers.QUECC, "mm_vision_token_compression_type='quecc', got the tensors"),
        ("llava15", {"mm_hidden_size": 32}, "expected a CLIP tower of mm_hidden_size=32"),
        ("llava15", {"mm_new_field": 3}, "unknown field mm_new_field=3"),
        ("llava15", {"mm_vision_tower": None}, "mm_vision_tower: expected the folder of a CLIP tower, looked for none"),
        ("llava15", {"s2": True}, "s2=True is not supported"),
        ("llava15", {"hidden_act": "relu"}, "hidden_act"),
        ("tokenpacker", {"scale_factor": 4}, r"scale_factor=4: expected a divisor of the tower's 6 .*\(1, 2, 3, 6\)"),
        ("tokenpacker", {"scale_factor": "2"}, "scale_factor='2': expected a positive integer"),
        ("quecc", {"mm_vision_token_compression_stride": 2}, "kernel_size=3: expected 2"),
        ("quecc", {"mm_vision_output_token_count": 576}, "mm_vision_output_token_count=576: expected 36"),
        ("quecc", {"mm_vision_output_text_embedding_size": 4096}, "text_embedding_size=4096: expected 24"),
    ],
)
def test_what_changes_the_outputs_is_supported_or_named(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        vlm_jax.load(write(tmp_path, name, **fields))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "tokenpacker")
    rewrite(folder, {"model.mm_projector.k_proj_1.0.weight": np.zeros((16, 48), np.float32)})
    with pytest.raises(UserError, match=r"k_proj_1\.0\.weight: expected shape \[16, 64\], got \[16, 48\]"):
        inspect(folder)
    rewrite(folder, {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.mm_projector.ln_v_1.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"ln_v_1\.bias is missing"):
        inspect(folder)


@pytest.mark.parametrize(("aspect", "resize"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_images_are_prepared_as_the_release_does(tmp_path: Path, aspect: str | None, resize: str) -> None:
    """Padding to a square is a field of the checkpoint, all else is in CLIP's processor."""
    folder = write(tmp_path, "tokenpacker", image_aspect_ratio=aspect)
    processor = json.loads((tmp_path / TOWER / "preprocessor_config.json").read_text())
    processor |= {"image_mean": [0.1, 0.2, 0.3], "resample": 2}
    (tmp_path / TOWER / "preprocessor_config.json").write_text(json.dumps(processor))
    # LLaVA reads the processor of CLIP's folder, not one beside its own weights.
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9] * 3, "size": 24}))
    encoder = vlm_jax.load(folder).spec.encoder
    assert (encoder.resize, encoder.interpolation) == (resize, "bilinear")
    assert encoder.pixel_mean == (0.1, 0.2, 0.3)


def write_tokenizer(folder: Path) -> None:
    """Words of one letter, with Llama's begin and end tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(97 + i): 3 + i for i in range(26)}, "?": 29, ":": 30, ".": 31}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "chat_template": "wrong"}))


def test_prompts_are_vicunas(tmp_path: Path) -> None:
    """The begin token, then `conv_vicuna_v1` of LLaVA, the image in front of the question; not a folder's template."""
    folder = write(tmp_path, "tokenpacker", max_position_embeddings=256)
    write_tokenizer(folder)
    model = vlm_jax.load(folder)
    (ids,) = api.prompt_rows(model, peers.pixels()[:1], ["what is this?"]).tokens
    before = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: "
    )
    encode = model.tokenizer.encode_without_special
    after = encode("\nwhat is this? ASSISTANT:")
    assert ids == [1, *encode(before), *[model.image_token] * 9, *after]
    assert chat.bare_question(model.chat_format, "what is this?") == "what is this?"
    assert model.eos_ids == (2,)
    assert len(vlm_jax.generate(model, [np.zeros((20, 30, 3), np.uint8)], ["a b"], max_new_tokens=2)) == 1


def split_connector(root: Path, name: str, file: str = "mm_projector.safetensors", **config: Any) -> tuple[Path, Path]:
    """(folder of a first stage, folder of its language model) of a case."""
    whole = write(root, name)
    tensors = {n: leaf for shard in whole.glob("*-of-*") for n, leaf in load_file(shard).items()}
    connector = {n: leaf for n, leaf in tensors.items() if "mm_projector" in n}
    stage, llm = root / "stage1", root / "vicuna"
    for folder, part in ((stage, connector), (llm, {n: leaf for n, leaf in tensors.items() if n not in connector})):
        folder.mkdir()
        save_file(part, folder / (file if folder == stage else "model.safetensors"))
    fields = json.loads((whole / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps({**fields, "architectures": ["LlamaForCausalLM"], **config}))
    (llm / "config.json").write_text(
        json.dumps({**peers.LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    return stage, llm


@pytest.mark.parametrize("name", ["llava15", "tokenpacker", "quecc"])
def test_a_connector_alone_joins_its_language_model(tmp_path: Path, name: str) -> None:
    """The result of a first stage: mm_projector.bin, with the config.json of the whole."""
    stage, llm = split_connector(tmp_path, name)
    model = vlm_jax.load(stage, llm=llm, dtype="float32")
    assert model.is_trained
    close(generated(model, name)[0], GOLDEN[f"{name}/logits"])
    with pytest.raises(UserError, match="has no language model: name one with llm=FOLDER"):
        vlm_jax.load(stage)


def test_a_connector_for_another_language_model_is_refused(tmp_path: Path) -> None:
    stage, _ = split_connector(tmp_path, "llava15")
    narrow = dataclasses.replace(builders.DECODER, vocab=40)
    spec = ModelSpec(None, None, None, narrow, "causal")
    params = builders.params(Vlm(dataclasses.replace(builders.model(), decoder=narrow), builders.COMPUTE))
    exporting.save_folder(tmp_path / "narrow", spec, {"decoder": params["decoder"]})
    with pytest.raises(UserError, match=r"connector expects a language model of width 24, got narrow of width 16"):
        vlm_jax.load(stage, llm=tmp_path / "narrow")


@pytest.mark.parametrize("source", ["whole", "first stage", "file"])
@pytest.mark.parametrize("name", ["llava15", "tokenpacker"])
def test_a_run_starts_from_a_released_connector(tmp_path: Path, name: str, source: str) -> None:
    """With the compressor's weights; CLIP's folder is the run's encoder_checkpoint, which need not be found again."""
    stage, llm = split_connector(tmp_path, name)
    write_tokenizer(llm)
    info = inspect(tmp_path / name)
    expected = load_parts(info, ("connector",))["connector"]
    tower = (tmp_path / TOWER).rename(tmp_path / "tower")
    path = {"whole": tmp_path / name, "first stage": stage, "file": stage / "mm_projector.safetensors"}[source]
    run = resolve(load_config("configs/vlm.py:smoke,data=rows4_tiny"))
    run = dataclasses.replace(
        run, model=model_spec(info), data=dataclasses.replace(run.data, tokenizer=str(llm)),
        encoder_checkpoint=str(tower), decoder_checkpoint=str(llm), connector_checkpoint=str(path),
    )  # fmt: skip
    found = tree.flatten(build.first_params(build.open_network(run))["connector"])
    assert set(found) == set(tree.flatten(expected))
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    if name == "tokenpacker":
        model = dataclasses.replace(run.model, compressor=dataclasses.replace(run.model.compressor, tokens=4))
        with pytest.raises(
            UserError, match=r"expected the compressor of the config, got tokenpacker of tokens=9 \(not"
        ):
            build.first_params(build.open_network(dataclasses.replace(run, model=model)))


def test_torchs_files_are_read_where_torch_is_installed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    stage, llm = split_connector(tmp_path, "tokenpacker")
    tensors = load_file(stage / "mm_projector.safetensors")
    os.unlink(stage / "mm_projector.safetensors")
    torch.save({name: torch.from_numpy(leaf) for name, leaf in tensors.items()}, stage / "mm_projector.bin")
    close(generated(vlm_jax.load(stage, llm=llm, dtype="float32"), "tokenpacker")[0], GOLDEN["tokenpacker/logits"])


def test_another_compressor_keeps_the_projector(tmp_path: Path) -> None:
    """TokenPacker's own is recognised by name and V; its weights are not those of another V."""
    folder = write(tmp_path, "tokenpacker")
    own = vlm_jax.load(folder, compressor="tokenpacker", tokens=9, dtype="float32")
    assert own.is_trained
    close(generated(own, "tokenpacker")[0], GOLDEN["tokenpacker/logits"])
    pooled = vlm_jax.load(folder, compressor="pool", tokens=9, dtype="float32")
    assert pooled.is_trained
    kernels = (model.params["connector"]["projector"]["kernel"] for model in (own, pooled))
    np.testing.assert_array_equal(*kernels)
    assert not vlm_jax.load(folder, compressor="tokenpacker", tokens=4).is_trained
    with pytest.raises(UserError, match="tokens=4: expected 9; for another number name the compressor"):
        vlm_jax.load(folder, tokens=4)
    with pytest.raises(UserError, match=r"image_size=48: compressor 'tokenpacker' of .* 6 x 6 patches"):
        vlm_jax.load(folder, image_size=48)
