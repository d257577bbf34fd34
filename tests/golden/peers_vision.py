"""Makes the golden files of image towers and whole vision-language models with the libraries that define them.

    python -m tests.golden.peers_vision hf            # transformers and torch: peers_vision_hf.npz
    python -m tests.golden.peers_vision big_vision    # big_vision on PYTHONPATH: peers_vision_bv.npz; see make_peers.py

A golden file holds, for each model, what its files say (config.json; names and shapes of the tensors) and what the peer
computed. The weights are drawn from their names.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.drawn import redrawn, weights

HERE = Path(__file__).parent
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 18,
    "patch_size": 4,
}  # fmt: skip
TEXT_TOWER = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE_TOKEN, PATCHES = 39, 16


def pixels(side: int) -> np.ndarray:
    """float32[2, H, H, 3], already normalised."""
    return np.random.default_rng(side).standard_normal((2, side, side, 3)).astype(np.float32)


def prompts(image_first: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of tokens with placeholders for every patch, and 1 where a token belongs to the answer."""
    rng = np.random.default_rng(7)
    words = rng.integers(3, IMAGE_TOKEN, (2, 12))
    image = np.full((2, PATCHES), IMAGE_TOKEN)
    before = 0 if image_first else 3
    tokens = np.concatenate([words[:, :before], image, words[:, before:]], axis=1)
    answer = np.zeros_like(tokens)
    answer[:, -4:] = 1
    return tokens, answer


def llava_config(t: Any, vision: dict[str, Any], text: dict[str, Any], **fields: Any) -> Any:
    """LLaVA-1.5's: CLIP and Llama, of these sizes; `t` is transformers."""
    towers = {"vision_config": t.CLIPVisionConfig(**vision), "text_config": t.LlamaConfig(**text)}
    return t.LlavaConfig(**{**towers, **fields})


def paligemma_config(t: Any, vision: dict[str, Any], text: Any, **fields: Any) -> Any:
    """PaliGemma's: SigLIP without its head, and the Gemma whose configuration is given."""
    tower = t.SiglipVisionConfig(**vision, vision_use_head=False)
    return t.PaliGemmaConfig(vision_config=tower, text_config=text, projection_dim=text.hidden_size, **fields)


def hugging_face() -> dict[str, Any]:
    import torch
    import transformers as t

    torch.set_num_threads(1)
    clip, siglip = t.CLIPVisionConfig(**VISION), t.SiglipVisionConfig(**VISION)
    mark = {"image_token_index": IMAGE_TOKEN}
    every = {"vision_config": siglip, "vision_feature_layer": 2, "vision_feature_select_strategy": "full"}
    lava, pali = t.LlavaForConditionalGeneration, t.PaliGemmaForConditionalGeneration
    gemma = t.GemmaConfig(**TEXT)
    gemma2, narrow = (t.Gemma2Config(**TEXT, query_pre_attn_scalar=6, sliding_window=n) for n in (4096, 6))
    cases = {
        "siglip_vision": (t.SiglipVisionModel, siglip),
        "siglip": (t.SiglipModel, t.SiglipConfig(text_config=TEXT_TOWER, vision_config=siglip.to_dict())),
        "clip_vision": (t.CLIPVisionModel, clip),
        "clip_projection": (t.CLIPVisionModelWithProjection, t.CLIPVisionConfig(**VISION, projection_dim=8)),
        "clip": (t.CLIPModel, t.CLIPConfig(text_config=TEXT_TOWER, vision_config=clip.to_dict(), projection_dim=8)),
        "llava": (lava, llava_config(t, VISION, TEXT, **mark)),
        "llava_siglip": (lava, llava_config(t, VISION, TEXT, **mark, **every)),
        "paligemma": (pali, paligemma_config(t, VISION, gemma, **mark)),
        "paligemma2": (pali, paligemma_config(t, VISION, gemma2, **mark)),
        "paligemma2_narrow": (pali, paligemma_config(t, VISION, narrow, **mark)),
    }
    out = processed(t)
    for name, (cls, config) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            model, shapes = redrawn(cls(config), Path(folder))
            said = json.loads((Path(folder) / "config.json").read_text())
        said.pop("transformers_version", None)
        out[f"{name}/files"] = np.array(json.dumps({"config": said, "shapes": shapes}))
        with torch.no_grad():
            for key, value in ask(model, torch).items():
                out[f"{name}/{key}"] = value.numpy()
    return out


PROCESSORS: dict[str, dict[str, Any]] = {
    "siglip": {"size": {"height": 18, "width": 18}},
    "siglip_bilinear": {"size": {"height": 18, "width": 18}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
    "clip": {"size": {"shortest_edge": 18}, "crop_size": {"height": 18, "width": 18}},
    "clip_small_edge": {"size": {"shortest_edge": 13}, "crop_size": {"height": 18, "width": 18}},
    "clip_large_edge": {"size": {"shortest_edge": 23}, "crop_size": {"height": 18, "width": 18}},
    "llava_pad": {"size": {"shortest_edge": 18}, "crop_size": {"height": 18, "width": 18}, "do_pad": True},
}
SHAPES = ((37, 53), (53, 36), (18, 18), (9, 14))


def pictures() -> list[np.ndarray]:
    """uint8[h, w, 3] of several shapes: smooth, so that resizing has something to keep, with noise on top."""
    rng, out = np.random.default_rng(3), []
    for height, width in SHAPES:
        y, x = np.mgrid[:height, :width]
        wave = 128 + 90 * np.sin(x / 4)[..., None] * np.cos(y / 3)[..., None] * (1, 0.5, -0.8)
        out.append(np.clip(wave + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8))
    return out


def processed(t: Any) -> dict[str, np.ndarray]:
    """What the processors that use Pillow make of the pictures, channels last."""
    from PIL import Image

    classes = {"siglip": "SiglipImageProcessorPil", "clip": "CLIPImageProcessorPil", "llava": "LlavaImageProcessorPil"}
    out = {}
    for name, fields in PROCESSORS.items():
        make = getattr(t, classes[name.split("_")[0]])
        processor = make(**fields)
        pixels = [processor(Image.fromarray(one), return_tensors="np")["pixel_values"][0] for one in pictures()]
        out[f"images/{name}"] = np.stack(pixels).transpose(0, 2, 3, 1)
        out[f"images/{name}/config"] = np.array(json.dumps(json.loads(processor.to_json_string())))
    return out


def ask(model: Any, torch: Any) -> dict[str, Any]:
    """What a model of transformers computes, by name."""

    def image(side: int) -> Any:
        return torch.from_numpy(pixels(side)).permute(0, 3, 1, 2)

    if not hasattr(model, "generate") or not hasattr(model.config, "image_token_index"):
        tower = getattr(model, "vision_model", model)
        out, wide = tower(image(18), output_hidden_states=True), tower(image(24), interpolate_pos_encoding=True)
        pooled = {"pooled": out.pooler_output} if "siglip" in model.config.model_type else {}
        return {
            "tokens": out.last_hidden_state, "layers": torch.stack(out.hidden_states[1:], 1),
            "wide": wide.last_hidden_state, **pooled,
        }  # fmt: skip
    prefix = model.config.model_type == "paligemma"
    tokens, answer = (torch.from_numpy(a) for a in prompts(image_first=prefix))
    kinds = {"token_type_ids": answer} if prefix else {}
    logits = model(input_ids=tokens, pixel_values=image(18), **kinds).logits
    features = model.get_image_features(image(18)).pooler_output
    features = torch.stack(list(features)) if isinstance(features, list | tuple) else features
    asked = {name: value[:, :-4] for name, value in kinds.items()}
    said = model.generate(
        input_ids=tokens[:, :-4], pixel_values=image(18), attention_mask=torch.ones_like(tokens[:, :-4]),
        max_new_tokens=6, do_sample=False, eos_token_id=None, **asked,
    )  # fmt: skip
    return {"logits": logits, "features": features, "generated": said[:, tokens.shape[1] - 4 :]}


BV_IMAGE = {"width": 16, "mlp_dim": 24, "depth": 3, "num_heads": 2, "patch_size": (4, 4)}
BV_TEXT = {
    "width": 24, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-6,
    "vocab_size": 40, "scan": True, "remat_policy": "nothing_saveable",
}  # fmt: skip
BV_GEMMAS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma_full_heads": {"num_kv_heads": 4},
    "gemma2": {"final_logits_softcap": 30.0, "attn_logits_softcap": 50.0, "post_norms": True},
}


LOUD = 60.0  # times what is drawn: scores then reach 35, so that a cap of 50 is felt


def bv_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Drawn from their names, but for the queries of Gemma 2: of those that are drawn no soft cap would be felt."""
    out, second = weights(shapes), any("post_ffw_norm" in name for name in shapes)
    return {name: leaf * np.float32(LOUD if second and "/q_einsum" in name else 1) for name, leaf in out.items()}


def paligemma(variant: str) -> Any:
    """big_vision's PaliGemma of our small sizes, in the place of those that it knows by name."""
    import ml_collections
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    gemma.get_config = lambda name: ml_collections.ConfigDict({"variant": name, **BV_TEXT, **BV_GEMMAS[name]})
    image = {**BV_IMAGE, "pool_type": "none", "head_zeroinit": False, "scan": True}
    return paligemma.Model(img=image, llm={"variant": variant})


def paligemma_of_big_vision(variant: str, file: Path, image: Any, words: Any, answer: Any) -> np.ndarray:
    """The logits of a checkpoint that is loaded as big_vision loads it."""
    import ml_collections
    from big_vision.models.proj.paligemma import paligemma as module

    model = paligemma(variant)
    config = ml_collections.ConfigDict({"img": {**BV_IMAGE, "scan": True}, "llm": {"variant": variant}})
    params = module.load(None, str(file), config)
    return np.asarray(model.apply({"params": params}, image, words.astype(np.int32), answer)[0])


def big_vision() -> dict[str, Any]:
    import jax
    from big_vision import utils
    from big_vision.models import vit
    from big_vision.models.proj.image_text import two_towers

    image, text = pixels(16), prompts(image_first=True)
    words, answer = text[0][:, PATCHES:].astype(np.int32), text[1][:, PATCHES:]
    towers = {
        "image_model": "vit", "text_model": "proj.image_text.text_transformer", "out_dim": (None, 16),
        "bias_init": -10.0, "image": {**BV_IMAGE, "pool_type": "map"},
        "text": {"width": 16, "depth": 1, "mlp_dim": 24, "num_heads": 2, "vocab_size": 20},
    }  # fmt: skip
    few = words[:, :6] % 20
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "vit": (vit.Model(**BV_IMAGE, pool_type="map"), (image,)),
        "vit_scan": (vit.Model(**BV_IMAGE, pool_type="map", scan=True), (image,)),
        "two_towers": (two_towers.Model(**towers), (image, few)),
    }
    for name in BV_GEMMAS:
        model = paligemma(name)
        cases[f"paligemma_{name}"] = (model, (image, words, answer))
    out: dict[str, Any] = {}
    for name, (model, inputs) in cases.items():
        abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        named = {f"params/{path}": leaf for path, leaf in utils.tree_flatten_with_names(abstract)[0]}
        shapes = {path: list(leaf.shape) for path, leaf in sorted(named.items())}
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/model.npz"
            np.savez(file, **bv_weights(shapes))
            params = utils.load_params(file)
        result, *_, more = model.apply({"params": params}, *inputs)
        out[f"{name}/files"] = np.array(json.dumps({"shapes": shapes}))
        if name.startswith("paligemma"):
            out |= {f"{name}/logits": result, f"{name}/features": more["img/zimg"]}
        else:
            inner = {key.removeprefix("img/"): leaf for key, leaf in more.items()}
            out |= {f"{name}/tokens": inner["encoded"], f"{name}/pooled": inner["head_input"]}
    rng = np.random.default_rng(5)
    table = rng.standard_normal((1, 16, 3)).astype(np.float32)
    for side in (3, 6, 7):
        out[f"positions/{side}"] = vit.resample_posemb(table, np.zeros((1, side * side, 3)))[0]
    return {**out, "positions": table[0]}


def main(argv: list[str]) -> None:
    which = argv[0] if argv else "hf"
    if which == "hf":
        np.savez_compressed(HERE / "peers_vision_hf.npz", **hugging_face())
    else:
        np.savez_compressed(HERE / "peers_vision_bv.npz", **big_vision())


if __name__ == "__main__":
    main(sys.argv[1:])
