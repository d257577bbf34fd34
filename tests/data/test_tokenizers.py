"""Tokenizers, chat templates and prompts of public folders, against what transformers made of them (tests/golden)."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from tests.golden import peers_answers
from tests.golden import peers_text as peers
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, tokenizers

CASES, ANSWERS = peers.read(), peers_answers.read()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's files, written once."""
    place = tmp_path_factory.mktemp("tokenizers")
    for name, case in (CASES | ANSWERS).items():
        peers.write(case["files"], place / name)
    return place


def opened(folder: Path) -> tokenizers.Tokenizer:
    config = folder / "config.json"
    return tokenizers.read_tokenizer(folder, json.loads(config.read_text()) if config.exists() else {})


@pytest.mark.parametrize("name", CASES)
def test_ids_are_the_references(folders: Path, name: str) -> None:
    tokenizer, case = opened(folders / name), CASES[name]
    for said, ids, plain in zip(peers.TEXTS, case["ids"], case["plain"], strict=True):
        assert tokenizer.encode(said) == ids, said
        assert tokenizer.encode_without_special(said) == plain, said
    assert tokenizer.pad == case["pad"]


@pytest.mark.parametrize("name", CASES)
def test_texts_are_the_references(folders: Path, name: str) -> None:
    """Of what was encoded, and of ids that no text gives."""
    tokenizer, case = opened(folders / name), CASES[name]
    assert [tokenizer.decode(row) for row in case["ids"]] == case["decoded"]
    assert [tokenizer.decode(row) for row in case["strange"]] == case["strange_decoded"]


@pytest.mark.parametrize("kind", peers.TEMPLATES)
@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_templates_render_as_the_reference(folders: Path, name: str, kind: str) -> None:
    tokenizer = opened(folders / name)
    rendered = [chat.render(peers.TEMPLATES[kind], talk, tokenizer.special) for talk in peers.TALKS]
    assert rendered == CASES[name]["rendered"][kind]


@pytest.mark.parametrize("name", ["chatml", "pieces"])
def test_a_mark_of_ours_does_not_make_the_vocabulary_larger(folders: Path, name: str) -> None:
    """Two models joined: the embeddings may have no row to spare."""
    tokenizer = tokenizers.read_tokenizer(folders / name, {}, ("<image>",))
    assert tokenizer.size == tokenizers.read_tokenizer(folders / name, {}).size
    assert len(tokenizer.encode_without_special("a <image> b")) == len(
        tokenizer.encode_without_special("a ")
    ) + 1 + len(tokenizer.encode_without_special("<image> b")[1:])


def test_several_tokens_may_end_an_answer(folders: Path) -> None:
    assert opened(folders / "chatml").eos_ids == (2, 0)  # generation_config.json has the first word
    assert tokenizers.read_tokenizer(folders / "llama3", {"text_config": {"eos_token_id": 7}}).eos_ids == (7,)
    assert opened(folders / "llama3").eos_ids == (1,)  # the tokenizer's own


@pytest.mark.parametrize("kind", ANSWERS)
def test_prompts_are_the_processors(folders: Path, kind: str) -> None:
    """The ids of a question, and of a text that names the image itself, with the placeholders expanded."""
    folder, case = folders / kind, ANSWERS[kind]
    config = json.loads((folder / "config.json").read_text())
    tokenizer = tokenizers.read_tokenizer(folder, config, ("<image>",))
    layout = chat.chat_format_of(config["architectures"][0], tokenizer)
    wanted = [
        [token for token, real in zip(*pair, strict=True) if real]
        for pair in zip(case["input_ids"], case["mask"], strict=True)
    ]
    for asked in (peers_answers.QUESTIONS, case["asked"]):
        token = config.get("image_token_id", config.get("image_token_index"))
        assert [chat.prompt_ids(layout, tokenizer, one, token, 9) for one in asked] == wanted


def test_a_family_without_a_template_has_ours(folders: Path) -> None:
    """LLaVA-1.5 was trained on "USER: <image>\\n... ASSISTANT:", and what a base model reads is the prompt."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    layout = chat.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    framed = chat.prompt_ids(layout, tokenizer, "What?", 500, 2)
    head, tail = tokenizer.encode("USER: "), tokenizer.encode_without_special("<image>\nWhat? ASSISTANT:")
    assert framed == [*head, 500, 500, *tail[1:]]
    plain = chat.chat_format_of("LlamaForCausalLM", tokenizer)
    assert chat.prompt_ids(plain, tokenizer, "What?", None, 0) == tokenizer.encode("What?")


def test_a_text_template_gets_the_image_as_a_mark(folders: Path) -> None:
    """Two models joined: the language model's template knows no parts."""
    tokenizer = tokenizers.read_tokenizer(folders / "chatml", {}, ("<image>",))
    layout = chat.ChatFormat("template", "<|im_start|>{{ messages[0].content }}<|im_end|>", "<image>")
    start, end = map(tokenizer.encode_without_special, ("<|im_start|>", "\nHi<|im_end|>"))
    assert chat.prompt_ids(layout, tokenizer, "Hi", 999, 3) == [*start, 999, 999, 999, *end]


@pytest.mark.parametrize("kind", peers.PART_TEMPLATES)
@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_a_template_that_reads_parts_gets_them(folders: Path, name: str, kind: str) -> None:
    """Messages of texts and of parts, several turns with a system's: as transformers renders them given as parts."""
    tokenizer = tokenizers.read_tokenizer(folders / name, {}, ("<image>",))
    layout = chat.ChatFormat("template", peers.PART_TEMPLATES[kind], "<image>")
    rendered = iter(CASES[name]["rendered_parts"][kind])
    for talk in peers.TALKS:
        for images in (0, 1):
            wanted = next(rendered)
            ids = chat.expanded(tokenizer.encode(wanted), tokenizer.id("<image>"), 999, 2, images)
            assert ids.count(999) == 2 * images
            for given in (talk, peers.in_parts(talk, 0), peers.in_parts(talk, images)):
                assert chat.prompt_ids(layout, tokenizer, given, 999, 2 * images) == ids, wanted
            if not images:
                assert chat.prompt_ids(layout, tokenizer, talk, None, 0) == tokenizer.encode_without_special(wanted)
        if len(talk) == 1:
            assert chat.prompt_ids(layout, tokenizer, talk[0]["content"], 999, 2) == ids


def test_words_of_a_template_are_not_taken_for_a_part(folders: Path) -> None:
    """One that reads parts and says what JSON says, and one that prints whatever it is given, in capitals."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    loop = "{% for part in messages[0].content if part is mapping %}{{ part.text }}{% endfor %}"
    for template, wanted in (
        ('{"type": "object"} ' + loop, '{"type": "object"} Hi'),
        ("{{ messages[0].content | upper }}", "HI"),
    ):
        layout = chat.ChatFormat("template", template, "<image>")
        assert chat.prompt_ids(layout, tokenizer, "Hi", None, 0) == tokenizer.encode_without_special(wanted)


def test_parts_become_text_for_a_template_that_reads_texts(folders: Path) -> None:
    """Ours for LLaVA without one, a language model's, and one whose mark for an image is another."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    layout = chat.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    seen = [{"type": "text", "text": "Look:"}, {"type": "image"}, "well"]
    talk = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, {"role": "user", "content": seen}]
    wanted = tokenizer.encode("Be kind. USER: Look:\n<image>\nwell ASSISTANT:")
    assert chat.prompt_ids(layout, tokenizer, talk, 999, 2) == chat.expanded(wanted, tokenizer.id("<image>"), 999, 2)
    other = peers.PART_TEMPLATES["parts"].replace("<image>", "<soft>")
    layout, talk = chat.ChatFormat("template", other, "<image>"), peers.in_parts(peers.TALKS[0], 1)
    wanted = tokenizer.encode("USER: <image>\n What is this? ASSISTANT:")
    assert chat.prompt_ids(layout, tokenizer, talk, 999, 2) == chat.expanded(wanted, tokenizer.id("<image>"), 999, 2)


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "1 places for images: expected 0"),
        ([{"role": "user", "content": [{"type": "video"}]}], "'video'} is no part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is no part"),
        ([{"role": "user", "content": [3]}], "3 is no part"),
    ],
)
def test_parts_that_are_none_are_told(folders: Path, talk: list, told: str) -> None:
    tokenizer = opened(folders / "chatml")
    for template in (peers.TEMPLATES["chatml"], peers.PART_TEMPLATES["parts"]):
        with pytest.raises(UserError, match=told):
            chat.prompt_ids(chat.ChatFormat("template", template, "<image>"), tokenizer, talk, 999, 0)


def test_a_prompt_begins_once(folders: Path) -> None:
    """With the template's begin token or, where that writes none and the model sees, with the tokenizer's: a processor
    adds it with or without a picture, a language model's tokenizer never.
    """
    tokenizer = tokenizers.read_tokenizer(folders / "llama3", {}, ("<image>",))
    rendered = CASES["llama3"]["rendered"]["marks"][0]
    begin = tokenizer.id("<s>")
    assert rendered.startswith("<s>")
    assert tokenizer.encode("a")[0] == begin
    layout = chat.ChatFormat("template", peers.TEMPLATES["marks"], "<image>")
    assert chat.prompt_ids(layout, tokenizer, peers.TALKS[0], None, 0) == tokenizer.encode_without_special(rendered)
    for template in (peers.TEMPLATES["marks"], peers.PART_TEMPLATES["parts"]):
        for visual in (0, 2):
            ids = chat.prompt_ids(chat.ChatFormat("template", template, "<image>"), tokenizer, "Hi", 999, visual)
            assert (ids[0], ids.count(begin), ids.count(999)) == (begin, 1, visual)
    layout = chat.ChatFormat("template", peers.PART_TEMPLATES["parts"], "<image>")
    assert begin not in chat.prompt_ids(layout, tokenizer, "Hi", None, 0)


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
        tokenizers.read_tokenizer(tmp_path, {})


SETTINGS = "tokenizer_config.json"
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "name",
    [SETTINGS, *(f"{n}.json" for n in ["special_tokens_map", "generation_config", "added_tokens", "chat_template"])],
)
@pytest.mark.parametrize("content", ["[1]", "3", "null", DEEP])
def test_files_that_hold_no_object_are_named(folders: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: (an object is wanted|not valid JSON)"):
        tokenizers.read_tokenizer(folder, {})


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (SETTINGS, {"added_tokens_decoder": [1]}, "added_tokens_decoder: an object"),
        (SETTINGS, {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x' is no id"),
        (SETTINGS, {"added_tokens_decoder": {"7": {}}}, "is no token"),
        (SETTINGS, {"added_tokens_decoder": {"7": {"content": "a", "special": 3}}}, "true or false"),
        (SETTINGS, {"additional_special_tokens": [3]}, "additional_special_tokens: 3 is no token"),
        (SETTINGS, {"extra_special_tokens": 3}, "a list or an object"),
        (SETTINGS, {"chat_template": 3}, "chat_template is no text"),
        (SETTINGS, {"chat_template": [3]}, "chat_template is no text"),
        ("added_tokens.json", {"a": "x"}, "'x' is no id"),
        *(
            ("generation_config.json", {"eos_token_id": end}, "eos_token_id: .* is no id")
            for end in ("x", {}, [[1]], 10**12)
        ),
    ],
)
def test_fields_of_the_wrong_kind_are_named(
    folders: Path, tmp_path: Path, name: str, change: dict[str, object], told: str
) -> None:
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**there, **change}))
    with pytest.raises(UserError, match=told):
        tokenizers.read_tokenizer(folder, {})


def test_text_that_is_not_utf_8_is_told(folders: Path, tmp_path: Path) -> None:
    """As a command line brings it, and as a template's file holds it."""
    for name in ("llama3", "pieces"):
        with pytest.raises(UserError, match="not valid UTF-8"):
            opened(folders / name).encode("caf\udce9")
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    (folder / "chat_template.jinja").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not readable"):
        opened(folder)


def test_an_added_special_token_may_have_no_embedding(folders: Path, tmp_path: Path) -> None:
    """Gemma 3 of one billion: its tokenizer knows a token for images, one beyond the embeddings."""
    for name in ("llama3", "pieces"):
        folder = shutil.copytree(folders / name, tmp_path / name)
        size = opened(folder).size
        added = {str(size): {"content": "<image_soft_token>", "special": True}}
        there = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).exists() else {}
        decoder = {**there.get("added_tokens_decoder", {}), **added}
        (folder / SETTINGS).write_text(json.dumps({**there, "added_tokens_decoder": decoder}))
        assert opened(folder).id("<image_soft_token>") >= size
        assert opened(folder).size == size


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 // (messages | length - 1) }}", "zero"),
        ("{{ messages + 3 }}", "not take"),
        ("{{ none.x.y }}", "not take"),
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
    ours, theirs = tokenizers.read_tokenizer(tmp_path / "some.model", {}), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(content)
    for said in peers.LINES:
        assert ours.encode_without_special(said) == theirs.encode(said)
        assert ours.encode(said) == [theirs.bos_id(), *theirs.encode(said)]
        assert ours.decode(theirs.encode(said)) == theirs.decode(theirs.encode(said))
    assert ours.eos_ids == (theirs.eos_id(),)
