"""Tokenizers, chat templates and prompts of public folders, against what transformers made of them (tests/golden)."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from tests.golden import peers_answers
from tests.golden import peers_text as peers
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, chat_formats, template_process, tokenizers

CASES, ANSWERS = peers.read(), peers_answers.read()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case's files, written once."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, case in (CASES | ANSWERS).items():
        peers.write(case["files"], root / name)
    return root


def load(folder: Path) -> tokenizers.Tokenizer:
    config = folder / "config.json"
    return tokenizers.read_tokenizer(folder, json.loads(config.read_text()) if config.exists() else {})


def expanded(ids: list[int], image_id: int, placeholder: int, count: int, images: int = 1) -> list[int]:
    """The reference's ids with each image token as `count` placeholders."""
    assert ids.count(image_id) == images
    return [one for i in ids for one in ([placeholder] * count if i == image_id else [i])]


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_the_references(folders: Path, name: str) -> None:
    tokenizer, case = load(folders / name), CASES[name]
    for text, ids, plain in zip(peers.TEXTS, case["ids"], case["plain"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode_without_special(text) == plain, text
        assert ids == [*tokenizer.begin, *plain, *tokenizer.end]
        assert tokenizer.encode_with_offsets(text)[0] == plain
    assert tokenizer.pad == case["pad"]


@pytest.mark.parametrize("name", CASES)
def test_decoded_texts_equal_the_references(folders: Path, name: str) -> None:
    """Of encoded texts, and of ids that no text encodes to."""
    tokenizer, case = load(folders / name), CASES[name]
    assert [tokenizer.decode(row) for row in case["ids"]] == case["decoded"]
    assert [tokenizer.decode(row) for row in case["strange"]] == case["strange_decoded"]


@pytest.mark.parametrize("kind", peers.TEMPLATES)
@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_templates_render_as_the_reference(folders: Path, name: str, kind: str) -> None:
    tokenizer = load(folders / name)
    rendered = [
        template_process.render(peers.TEMPLATES[kind], messages, tokenizer.special, True) for messages in peers.TALKS
    ]
    assert rendered == CASES[name]["rendered"][kind]


@pytest.mark.parametrize("name", ["chatml", "pieces"])
def test_an_extra_special_token_does_not_count_for_the_size(folders: Path, name: str) -> None:
    """A language model that is joined with an encoder may have no embedding for it."""
    tokenizer = tokenizers.read_tokenizer(folders / name, {}, ("<image>",))
    assert tokenizer.size == tokenizers.read_tokenizer(folders / name, {}).size
    assert len(tokenizer.encode_without_special("a <image> b")) == len(
        tokenizer.encode_without_special("a ")
    ) + 1 + len(tokenizer.encode_without_special("<image> b")[1:])


def test_eos_ids_come_from_generation_config_then_config_then_the_tokenizer(folders: Path) -> None:
    assert load(folders / "chatml").eos_ids == (2, 0)
    assert tokenizers.read_tokenizer(folders / "llama3", {"text_config": {"eos_token_id": 7}}).eos_ids == (7,)
    assert load(folders / "llama3").eos_ids == (1,)


@pytest.mark.parametrize("kind", ANSWERS)
def test_prompt_ids_equal_the_processors(folders: Path, kind: str) -> None:
    """Of questions, and of prompts that contain the image token."""
    folder, case = folders / kind, ANSWERS[kind]
    config = json.loads((folder / "config.json").read_text())
    tokenizer = tokenizers.read_tokenizer(folder, config, ("<image>",))
    chat_format = chat_formats.chat_format_of(config["architectures"][0], tokenizer)
    expected = [
        [token for token, real in zip(*pair, strict=True) if real]
        for pair in zip(case["input_ids"], case["mask"], strict=True)
    ]
    for prompts in (peers_answers.QUESTIONS, case["asked"]):
        token = config.get("image_token_id", config.get("image_token_index"))
        assert [chat.prompt_ids(chat_format, tokenizer, one, token, 9) for one in prompts] == expected


def test_a_folder_without_a_template_uses_its_familys(folders: Path) -> None:
    """LLaVA-1.5's "USER: <image>\\n... ASSISTANT:"; a base model gets the prompt unchanged."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    framed = chat.prompt_ids(chat_format, tokenizer, "What?", 500, 2)
    head, tail = tokenizer.encode("USER: "), tokenizer.encode_without_special("<image>\nWhat? ASSISTANT:")
    assert framed == [*head, 500, 500, *tail[1:]]
    plain = chat_formats.chat_format_of("LlamaForCausalLM", tokenizer)
    assert chat.prompt_ids(plain, tokenizer, "What?", None, 0) == tokenizer.encode("What?")


def test_a_template_of_strings_gets_the_image_token(folders: Path) -> None:
    """As of a language model that is joined with an encoder."""
    tokenizer = tokenizers.read_tokenizer(folders / "chatml", {}, ("<image>",))
    chat_format = chat_formats.ChatFormat("template", "<|im_start|>{{ messages[0].content }}<|im_end|>", "<image>")
    start, end = map(tokenizer.encode_without_special, ("<|im_start|>", "\nHi<|im_end|>"))
    assert chat.prompt_ids(chat_format, tokenizer, "Hi", 999, 3) == [*start, 999, 999, 999, *end]


@pytest.mark.parametrize("kind", peers.PART_TEMPLATES)
@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_a_template_of_parts_gets_parts(folders: Path, name: str, kind: str) -> None:
    """String messages and messages of parts render as transformers renders parts."""
    tokenizer = tokenizers.read_tokenizer(folders / name, {}, ("<image>",))
    chat_format = chat_formats.ChatFormat("template", peers.PART_TEMPLATES[kind], "<image>")
    rendered = iter(CASES[name]["rendered_parts"][kind])
    for messages in peers.TALKS:
        for images in (0, 1):
            expected = next(rendered)
            ids = expanded(tokenizer.encode(expected), tokenizer.id("<image>"), 999, 2, images)
            assert ids.count(999) == 2 * images
            for given in (messages, peers.in_parts(messages, 0), peers.in_parts(messages, images)):
                assert chat.prompt_ids(chat_format, tokenizer, given, 999, 2 * images) == ids, expected
            if not images:
                assert chat.prompt_ids(chat_format, tokenizer, messages, None, 0) == tokenizer.encode_without_special(
                    expected
                )
        if len(messages) == 1:
            assert chat.prompt_ids(chat_format, tokenizer, messages[0]["content"], 999, 2) == ids


def test_text_of_a_template_is_not_taken_for_a_part(folders: Path) -> None:
    """One that loops over parts and contains JSON itself, and one that prints any content in capitals."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    loop = "{% for part in messages[0].content if part is mapping %}{{ part.text }}{% endfor %}"
    for template, expected in (
        ('{"type": "object"} ' + loop, '{"type": "object"} Hi'),
        ("{{ messages[0].content | upper }}", "HI"),
    ):
        chat_format = chat_formats.ChatFormat("template", template, "<image>")
        assert chat.prompt_ids(chat_format, tokenizer, "Hi", None, 0) == tokenizer.encode_without_special(expected)


def test_parts_become_a_string_for_a_template_of_strings(folders: Path) -> None:
    """LLaVA's family template, and a template of parts with another image token."""
    tokenizer = tokenizers.read_tokenizer(folders / "llama2", {}, ("<image>",))
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    seen = [{"type": "text", "text": "Look:"}, {"type": "image"}, "well"]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": seen},
    ]
    expected = tokenizer.encode("Be kind. USER: Look:\n<image>\nwell ASSISTANT:")
    assert chat.prompt_ids(chat_format, tokenizer, messages, 999, 2) == expanded(
        expected, tokenizer.id("<image>"), 999, 2
    )
    other = peers.PART_TEMPLATES["parts"].replace("<image>", "<soft>")
    chat_format, messages = chat_formats.ChatFormat("template", other, "<image>"), peers.in_parts(peers.TALKS[0], 1)
    expected = tokenizer.encode("USER: <image>\n What is this? ASSISTANT:")
    assert chat.prompt_ids(chat_format, tokenizer, messages, 999, 2) == expanded(
        expected, tokenizer.id("<image>"), 999, 2
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "expected 0 image placeholders, .* got 1"),
        ([{"role": "user", "content": [{"type": "video"}]}], "expected type .* got .*'video'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected type .text."),
        ([{"role": "user", "content": [3]}], "message part: .* got 3"),
    ],
)
def test_invalid_parts_are_rejected(folders: Path, messages: list, message: str) -> None:
    tokenizer = load(folders / "chatml")
    for template in (peers.TEMPLATES["chatml"], peers.PART_TEMPLATES["parts"]):
        with pytest.raises(UserError, match=message):
            chat.prompt_ids(chat_formats.ChatFormat("template", template, "<image>"), tokenizer, messages, 999, 0)


def test_a_prompt_has_one_bos_token(folders: Path) -> None:
    """The template's, or the tokenizer's where the template has none and the model has vision: a processor adds it with
    or without an image, a language model's tokenizer never.
    """
    tokenizer = tokenizers.read_tokenizer(folders / "llama3", {}, ("<image>",))
    rendered = CASES["llama3"]["rendered"]["marks"][0]
    begin = tokenizer.id("<s>")
    assert rendered.startswith("<s>")
    assert tokenizer.encode("a")[0] == begin
    chat_format = chat_formats.ChatFormat("template", peers.TEMPLATES["marks"], "<image>")
    assert chat.prompt_ids(chat_format, tokenizer, peers.TALKS[0], None, 0) == tokenizer.encode_without_special(
        rendered
    )
    for template in (peers.TEMPLATES["marks"], peers.PART_TEMPLATES["parts"]):
        for visual in (0, 2):
            ids = chat.prompt_ids(
                chat_formats.ChatFormat("template", template, "<image>"), tokenizer, "Hi", 999, visual
            )
            assert (ids[0], ids.count(begin), ids.count(999)) == (begin, 1, visual)
    chat_format = chat_formats.ChatFormat("template", peers.PART_TEMPLATES["parts"], "<image>")
    assert begin not in chat.prompt_ids(chat_format, tokenizer, "Hi", None, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: not a readable"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no"), "tokenizer.model: not a readable"),
    ],
)
def test_errors_name_the_unreadable_file(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        tokenizers.read_tokenizer(tmp_path, {})


SETTINGS = "tokenizer_config.json"
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "name",
    [SETTINGS, *(f"{n}.json" for n in ["special_tokens_map", "generation_config", "added_tokens", "chat_template"])],
)
@pytest.mark.parametrize("content", ["[1]", "3", "null", DEEP])
def test_errors_name_the_file_without_an_object(folders: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: (expected an object|not valid JSON)"):
        tokenizers.read_tokenizer(folder, {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SETTINGS, {"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object"),
        (SETTINGS, {"added_tokens_decoder": {"x": {"content": "a"}}}, "expected a token id, .* got 'x'"),
        (SETTINGS, {"added_tokens_decoder": {"7": {}}}, "expected a token, "),
        (SETTINGS, {"added_tokens_decoder": {"7": {"content": "a", "special": 3}}}, "true or false"),
        (SETTINGS, {"additional_special_tokens": [3]}, "additional_special_tokens: expected a token, .* got 3"),
        (SETTINGS, {"extra_special_tokens": 3}, "a list or an object"),
        (SETTINGS, {"chat_template": 3}, "chat_template: expected a string"),
        (SETTINGS, {"chat_template": [3]}, "chat_template: expected a string"),
        ("added_tokens.json", {"a": "x"}, "expected a token id, .* got 'x'"),
        *(
            ("generation_config.json", {"eos_token_id": end}, "eos_token_id: expected a token id")
            for end in ("x", {}, [[1]], 10**12)
        ),
    ],
)
def test_errors_name_the_field_of_the_wrong_type(
    folders: Path, tmp_path: Path, name: str, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    stored = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**stored, **change}))
    with pytest.raises(UserError, match=message):
        tokenizers.read_tokenizer(folder, {})


def test_a_placeholder_without_an_image_is_rejected(folders: Path) -> None:
    """By a model with an encoder; for a language model it is ordinary text."""
    tokenizer = tokenizers.read_tokenizer(folders / "chatml", {}, ("<image>",))
    for kind, template in (("template", peers.TEMPLATES["chatml"]), ("text", None)):
        chat_format = chat_formats.ChatFormat(kind, template, "<image>")
        with pytest.raises(UserError, match=r"expected 0 image placeholders, .* got 1"):
            chat.prompt_ids(chat_format, tokenizer, "a <image> b", 999, 2, images=0)
        assert tokenizer.id("<image>") not in chat.prompt_ids(chat_format, tokenizer, "a <image> b", None, 0)


def test_invalid_utf8_is_rejected(folders: Path, tmp_path: Path) -> None:
    """In a command line, and in a template file."""
    for name in ("llama3", "pieces"):
        with pytest.raises(UserError, match="not valid UTF-8"):
            load(folders / name).encode("caf\udce9")
    folder = shutil.copytree(folders / "llama3", tmp_path / "one")
    (folder / "chat_template.jinja").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template\.jinja: not valid UTF-8"):
        load(folder)


def test_an_added_special_token_may_have_no_embedding(folders: Path, tmp_path: Path) -> None:
    """Gemma 3 of one billion: its tokenizer knows a token for images, one beyond the embeddings."""
    for name in ("llama3", "pieces"):
        folder = shutil.copytree(folders / name, tmp_path / name)
        size = load(folder).size
        added = {str(size): {"content": "<image_soft_token>", "special": True}}
        stored = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).exists() else {}
        decoder = {**stored.get("added_tokens_decoder", {}), **added}
        (folder / SETTINGS).write_text(json.dumps({**stored, "added_tokens_decoder": decoder}))
        assert load(folder).id("<image_soft_token>") >= size
        assert load(folder).size == size


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // (messages | length - 1) }}", "zero"),
        ("{{ messages + 3 }}", "cannot render"),
        ("{{ none.x.y }}", "cannot render"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "cannot render"),
    ],
)
def test_template_errors_are_user_errors(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        template_process.render(template, [{"role": "user", "content": "x"}], {}, True)


def test_a_sentencepiece_file_alone_equals_its_library(folders: Path, tmp_path: Path) -> None:
    """Text without special tokens, in a folder that holds nothing else."""
    import sentencepiece

    content = base64.b64decode(CASES["pieces"]["files"]["tokenizer.model"])
    (tmp_path / "some.model").write_bytes(content)
    actual, reference = tokenizers.read_tokenizer(tmp_path / "some.model", {}), sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(content)
    for text in peers.LINES:
        assert actual.encode_without_special(text) == reference.encode(text)
        assert actual.encode(text) == [reference.bos_id(), *reference.encode(text)]
        assert actual.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    assert actual.eos_ids == (reference.eos_id(),)
