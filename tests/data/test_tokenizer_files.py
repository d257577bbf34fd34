"""Which of a folder's files decides, against AutoTokenizer and AutoProcessor (tests/golden/peers_files.py)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden import peers_files, peers_text
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, chat_formats, token_files, tokenizers

GOLDEN = peers_files.read()
TEMPLATES, BEGIN_END = GOLDEN["templates"], GOLDEN["begin_end"]


def cases_of(backend: str, post_processor: str) -> Iterator[dict[str, Any]]:
    return (case for case in BEGIN_END["cases"] if (case["backend"], case["post"]) == (backend, post_processor))


@pytest.mark.parametrize("post_processor", peers_files.POST_PROCESSORS)
@pytest.mark.parametrize("backend", peers_files.BACKENDS)
def test_the_post_processor_alone_adds_begin_and_end(tmp_path: Path, backend: str, post_processor: str) -> None:
    """For every class of tokenizer, model type, and value of `add_bos_token` and `add_eos_token`."""
    content = {
        **BEGIN_END["backends"][backend],
        "post_processor": BEGIN_END["post_processors"][backend][post_processor],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    seen = 0
    for case in cases_of(backend, post_processor):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(case["settings"]))
        config = {"model_type": case["model_type"]} if case["model_type"] else {}
        tokenizer = tokenizers.read_tokenizer(tmp_path, config)
        assert [tokenizer.encode(text) for text in peers_files.TEXTS] == case["ids"], case
        seen += 1
    assert seen > 30


@pytest.mark.parametrize("case", TEMPLATES["cases"], ids=str)
def test_the_chat_template_is_that_of_the_reference(tmp_path: Path, case: dict[str, Any]) -> None:
    """Where transformers finds none, that of tokenizer_config.json is used in a processor's folder too."""
    files = {name: peers_files.FILES[name] for name in case["names"]}
    template = peers_files.LISTS.get(case["template"], case["template"])
    peers_files.write_templates(tmp_path, files, template, TEMPLATES["files"])
    legacy = case["model_type"] == "llava" and "chat_template.json" in files
    if legacy and any("additional" in name for name in files):
        assert case["rendered"] is None
        with pytest.raises(UserError, match=r"chat_template\.json: expected no additional_chat_templates"):
            token_files.read(tmp_path, {"model_type": case["model_type"]})
        return
    found = token_files.read(tmp_path, {"model_type": case["model_type"]}).template
    if case["rendered"] is None and case["model_type"] == "llava" and "tokenizer_config.json" in files:
        return
    assert found == case["rendered"]


@pytest.mark.parametrize("case", GOLDEN["special"], ids=str)
def test_special_tokens_are_those_of_the_reference(tmp_path: Path, case: dict[str, Any]) -> None:
    peers_files.write_special(tmp_path, TEMPLATES["files"], case["parts"], case["map"])
    assert token_files.read(tmp_path, {}).special == case["special"]


def test_without_a_config_the_files_of_a_processor_count(tmp_path: Path) -> None:
    files = {"chat_template.json": peers_files.FILES["chat_template.json"]}
    peers_files.write_templates(tmp_path, files, None, TEMPLATES["files"])
    assert token_files.read(tmp_path, {}).template == "legacy json"
    assert token_files.read(tmp_path, {"model_type": "llama"}).template is None
    assert token_files.read(tmp_path, {"model_type": "any", "vision_config": {}}).template == "legacy json"


def test_padding_beyond_the_embeddings_does_not_count_for_the_size(tmp_path: Path) -> None:
    """Llama 2's `<pad>`, with the id of the vocabulary's size; an added end token would be needed in every row."""
    case = peers_text.read()["pieces"]
    folder = peers_text.write(case["files"], tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    size = tokenizers.read_tokenizer(folder, {}).size
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    tokenizer = tokenizers.read_tokenizer(folder, {}, ("<image>",))
    assert (tokenizer.pad, tokenizer.size, tokenizer.id("<image>")) == (size, size, size + 1)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<pad>"}))
    assert tokenizers.read_tokenizer(folder, {}).size == size + 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("processor_config.json", {"chat_template": 3}), ("chat_template.json", {"chat_template": [3]})],
)
def test_a_template_of_the_wrong_type_names_its_file(tmp_path: Path, name: str, content: Any) -> None:
    peers_files.write_templates(tmp_path, {name: content}, None, TEMPLATES["files"])
    with pytest.raises(UserError, match=rf"{name}: chat_template: expected a string"):
        token_files.read(tmp_path, {"model_type": "llava"})


def test_the_folders_template_reaches_the_prompt(tmp_path: Path) -> None:
    files = {name: peers_files.FILES[name] for name in ("processor_config.json", "chat_template.jinja")}
    peers_files.write_templates(tmp_path, files, None, TEMPLATES["files"])
    tokenizer = tokenizers.read_tokenizer(tmp_path, {"model_type": "llava"}, ("<image>",))
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    expected = tokenizer.encode_without_special("processor_config")
    assert chat.prompt_ids(chat_format, tokenizer, "x", None, 0) == expected
