"""Tokenizers, chat templates and prompts of public folders, against what transformers made of them (peers_text)."""

import base64
import json
from pathlib import Path

import pytest

from tests.golden import peers_text as peers
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, text

CASES = peers.read()
TOKENIZERS = [name for name in CASES if "ids" in CASES[name]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's files, written once."""
    place = tmp_path_factory.mktemp("tokenizers")
    for name, case in CASES.items():
        peers.write(case["files"], place / name)
    return place


def opened(folder: Path) -> text.Text:
    config = folder / "config.json"
    return text.read_tokenizer(folder, json.loads(config.read_text()) if config.exists() else {})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_the_references(folders: Path, name: str) -> None:
    tokenizer, case = opened(folders / name), CASES[name]
    for said, ids, plain in zip(peers.TEXTS, case["ids"], case["plain"], strict=True):
        assert tokenizer.encode(said) == ids, said
        assert tokenizer.plain(said) == plain, said
    assert tokenizer.pad == case["pad"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_the_references(folders: Path, name: str) -> None:
    """Of what was encoded, and of ids that no text gives."""
    tokenizer, case = opened(folders / name), CASES[name]
    assert [tokenizer.decode(row) for row in case["ids"]] == case["decoded"]
    assert [tokenizer.decode(row) for row in case["strange"]] == case["strange_decoded"]


@pytest.mark.parametrize("kind", [kind for kind in peers.TEMPLATES if kind != "llava"])
@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_templates_render_as_the_reference(folders: Path, name: str, kind: str) -> None:
    tokenizer = opened(folders / name)
    rendered = [chat.render(peers.TEMPLATES[kind], talk, tokenizer.special) for talk in peers.TALKS]
    assert rendered == CASES[name]["rendered"][kind]


@pytest.mark.parametrize("name", ["chatml", "pieces"])
def test_a_mark_of_ours_does_not_make_the_vocabulary_larger(folders: Path, name: str) -> None:
    """Two models joined: the embeddings may have no row to spare."""
    tokenizer = text.read_tokenizer(folders / name, {}, ("<image>",))
    assert tokenizer.size == text.read_tokenizer(folders / name, {}).size
    assert len(tokenizer.plain("a <image> b")) == len(tokenizer.plain("a ")) + 1 + len(tokenizer.plain("<image> b")[1:])


def test_several_tokens_may_end_an_answer(folders: Path) -> None:
    assert opened(folders / "chatml").ends == (2, 0)  # generation_config.json has the first word
    assert text.read_tokenizer(folders / "llama3", {"text_config": {"eos_token_id": 7}}).ends == (7,)
    assert opened(folders / "llama3").ends == (1,)  # the tokenizer's own


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_prompts_are_the_processors(folders: Path, kind: str) -> None:
    """The ids of a question, and of a text that names the image itself, with the placeholders expanded."""
    folder, case = folders / kind, CASES[kind]
    config = json.loads((folder / "config.json").read_text())
    tokenizer = text.read_tokenizer(folder, config, ("<image>",))
    layout = chat.layout_of(config["architectures"][0], tokenizer)
    wanted = [
        [token for token, real in zip(*pair, strict=True) if real]
        for pair in zip(case["input_ids"], case["mask"], strict=True)
    ]
    for asked in (peers.QUESTIONS, case["asked"]):
        token = config.get("image_token_id", config.get("image_token_index"))
        assert [chat.prompt_ids(layout, tokenizer, one, token, 9) for one in asked] == wanted


def test_a_family_without_a_template_has_ours(folders: Path) -> None:
    """LLaVA-1.5 was trained on "USER: <image>\\n... ASSISTANT:", and what a base model reads is the prompt."""
    tokenizer = text.read_tokenizer(folders / "llama2", {}, ("<image>",))
    layout = chat.layout_of("LlavaForConditionalGeneration", tokenizer)
    framed = chat.prompt_ids(layout, tokenizer, "What?", 500, 2)
    head, tail = tokenizer.encode("USER: "), tokenizer.plain("<image>\nWhat? ASSISTANT:")
    assert framed == [*head, 500, 500, *tail[1:]]
    plain = chat.layout_of("LlamaForCausalLM", tokenizer)
    assert chat.prompt_ids(plain, tokenizer, "What?", None, 0) == tokenizer.encode("What?")


def test_a_text_template_gets_the_image_as_a_mark(folders: Path) -> None:
    """Two models joined: the language model's template knows no parts."""
    tokenizer = text.read_tokenizer(folders / "chatml", {}, ("<image>",))
    layout = chat.Layout("template", "<|im_start|>{{ messages[0].content }}<|im_end|>", "<image>")
    start, end = map(tokenizer.plain, ("<|im_start|>", "\nHi<|im_end|>"))
    assert chat.prompt_ids(layout, tokenizer, "Hi", 999, 3) == [*start, 999, 999, 999, *end]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: not a readable"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no"), "tokenizer.model: not a readable"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, make: object, told: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=told):
        text.read_tokenizer(tmp_path, {})


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not take"),
    ],
)
def test_templates_that_refuse_or_misbehave(template: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        chat.render(template, [{"role": "user", "content": "x"}], {})


def test_a_sentencepiece_file_gives_what_the_library_gives(folders: Path, tmp_path: Path) -> None:
    """Text without special tokens, in a folder that holds nothing else."""
    import sentencepiece

    content = base64.b64decode(CASES["pieces"]["files"]["tokenizer.model"])
    (tmp_path / "some.model").write_bytes(content)
    ours, theirs = text.read_tokenizer(tmp_path / "some.model", {}), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(content)
    for said in peers.LINES:
        assert ours.plain(said) == theirs.encode(said)
        assert ours.encode(said) == [theirs.bos_id(), *theirs.encode(said)]
        assert ours.decode(theirs.encode(said)) == theirs.decode(theirs.encode(said))
    assert ours.ends == (theirs.eos_id(),)
