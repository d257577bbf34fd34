"""Ids and losses of conversations, against LLaVA's, LLaVA-NeXT's and transformers' (tests/golden)."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.golden import peers_answers, peers_text
from tests.golden import peers_conversations as peers
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, chat_formats, conversations, tokenizers
from vlm_jax.data.conversations import IMAGE, Conversation
from vlm_jax.studies.glyphs import tokenizer_files

CASES = peers.read()
FORMATS = [(name, kind) for name, case in CASES.items() for kind in case["formats"]]
# Rows whose answer and what stands before it share a token, so that no prompt has the same ids.
SHARED = ("newlines", "tabs")


class Turn(NamedTuple):
    role: str
    text: str


def turns(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tokenizers.Tokenizer]:
    root = tmp_path_factory.mktemp("conversations")
    folders = {name: peers_text.write(case["files"], root / name) for name, case in CASES.items()}
    folders["gemma"] = peers_text.write(peers_text.read()["gemma"]["files"], root / "gemma")
    return {name: tokenizers.read_tokenizer(folder, {}, ("<image>",)) for name, folder in folders.items()}


def learned(tokenizer: tokenizers.Tokenizer, conversation: Conversation) -> list[list[int]]:
    """The ids of each run of learned tokens."""
    runs: list[list[int]] = []
    for i, (token, is_learned) in enumerate(zip(conversation.ids, conversation.target, strict=True)):
        if is_learned and not (i and conversation.target[i - 1]):
            runs.append([])
        if is_learned:
            runs[-1].append(token)
    return runs


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_ids_and_losses_equal_the_references(loaded: dict[str, Any], name: str, kind: str) -> None:
    """The loss where the reference has one: it gives up on rows whose tokens it miscounts."""
    chat_format = chat_formats.format_named(kind, loaded[name])
    legal = 0
    for title, expected in CASES[name]["formats"][kind].items():
        found = conversations.tokenize(chat_format, loaded[name], turns(*peers.ROWS[title]))
        assert found.ids == expected["ids"], title
        if any(expected["target"]):
            legal += 1
            assert found.target == expected["target"], title
    assert legal >= 12 or kind == "mpt"  # of which it counts no row right with these tokenizers


@pytest.mark.parametrize("name", CASES)
def test_generation_tags_are_learned_as_in_transformers(loaded: dict[str, Any], name: str) -> None:
    chat_format = chat_formats.ChatFormat("template", peers.TAGGED, "<image>")
    tokenizer = loaded[name]._replace(begin=())  # transformers' tokenizers add no begin token to a template
    for row, expected in zip(peers.ROWS.values(), CASES[name]["tagged"], strict=True):
        if any("<image>" in text for text in row):
            continue
        found = conversations.tokenize(chat_format, tokenizer, turns(*row))
        assert (found.ids, found.target) == (expected["ids"], expected["target"]), row


UNTAGGED = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
    "trimmed": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}"
    "{{ '\n' }}{{ m.content | trim }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model{{ '\n' }}{% endif %}",
    "end of text": "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + m.content }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% else %}<|endoftext|>{% endif %}",
    "thoughts": "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
    "parts": "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{{ '\n' }}{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
}


@pytest.mark.parametrize("kind", UNTAGGED)
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_answers_of_a_template_without_tags_are_found(loaded: dict[str, Any], name: str, kind: str) -> None:
    """What the template writes behind the generation prompt, up to the end token; not what looks like it."""
    tokenizer = loaded[name]
    chat_format = chat_formats.ChatFormat("template", UNTAGGED[kind], "<image>")
    row = turns("<image>\nWhat is the end?", "assistant\n the end ", "And user?", "user ")
    found = conversations.tokenize(chat_format, tokenizer, row)
    answers = ["assistant\n the end ", "user "]
    if kind == "trimmed":
        answers = [answer.strip() for answer in answers]
    if kind == "thoughts":
        answers[-1] = f"<think>\n\n</think>\n\n{answers[-1]}"
    expected = [tokenizer.encode_without_special(f"{answer}<|im_end|>") for answer in answers]
    assert learned(tokenizer, found) == expected
    assert [found.ids[end - 1] for end in found.turn_ends] == [tokenizer.id("<|im_end|>")] * 2
    assert found.ids.count(IMAGE) == 1


@pytest.mark.parametrize("template", [*UNTAGGED.values(), peers.TAGGED])
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_folders_template_trains_on_the_ids_that_it_answers(loaded: dict[str, Any], name: str, template: str) -> None:
    tokenizer = loaded[name]
    chat_format = chat_formats.ChatFormat("template", template, "<image>")
    row = turns("<image>\nWhat is this?", "A fox.", "Is it quick?", "Yes.")
    found = conversations.tokenize(chat_format, tokenizer, row)
    for i in (1, 3):
        prompt = chat.prompt_ids(chat_format, tokenizer, conversations.messages_of(row[:i]), 999, 1)
        assert [999 if token == IMAGE else token for token in found.ids[: len(prompt)]] == prompt
        assert found.target[len(prompt)]
        assert not found.target[len(prompt) - 1]


def test_a_template_without_an_end_token_learns_the_answers_alone(loaded: dict[str, Any]) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{{ '\n' }}{% else %}A: {{ m.content }}"
        "{{ '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    chat_format = chat_formats.ChatFormat("template", template, "<image>")
    found = conversations.tokenize(chat_format, loaded["chatml"], turns("a", "the mat", "b", "jumps "))
    expected = [loaded["chatml"].encode_without_special(text) for text in (" the mat", " jumps")]
    assert learned(loaded["chatml"], found) == expected


# The vocabulary of both has a token of ": ", which the public ones have not.
COLON = [(name, "v1") for name in ("llama2", "llama2_older")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(one for one in FORMATS if one not in COLON), ("chatml", "chatml"), ("llama3", "chatml"), ("gemma", "prefix")],
)
def test_up_to_an_answer_the_ids_are_those_of_the_prompt(loaded: dict[str, Any], name: str, kind: str) -> None:
    tokenizer, placeholders = loaded[name], [999, 999]
    chat_format = chat_formats.format_named(kind, tokenizer)
    for title, row in peers.ROWS.items():
        if title in SHARED or (kind in ("plain", "prefix") and len(row) != 2):
            continue
        found = conversations.tokenize(chat_format, tokenizer, turns(*row))
        ends = [0, *found.turn_ends]
        for i in range(1, len(row), 2):
            messages = conversations.messages_of(turns(*row[:i]))
            images = sum(text.count("<image>") for text in row[:i])
            prompt = chat.prompt_ids(chat_format, tokenizer, messages, 999, 2, images)
            before = [one for j in found.ids for one in (placeholders if j == IMAGE else [j])][: len(prompt)]
            assert before == prompt, (title, i)
            if kind == "qwen_headers":
                continue
            start = next(j for j in range(ends[i // 2], len(found.ids)) if found.target[j])
            assert start + found.ids[:start].count(IMAGE) == len(prompt), (title, i)


def test_chatml_learns_answers_and_the_quirk_more_of_the_same_ids(loaded: dict[str, Any]) -> None:
    tokenizer = loaded["chatml"]
    plain, quirk = (chat_formats.format_named(kind, tokenizer) for kind in ("qwen_1_5", "qwen_headers"))
    row = turns("<image>\nWhat?", "A cat.", "read\nrow", "two")
    one, other = (conversations.tokenize(chat_format, tokenizer, row) for chat_format in (plain, quirk))
    assert one.ids == other.ids
    assert learned(tokenizer, one) == [
        tokenizer.encode_without_special(t) for t in ("A cat.<|im_end|>", "two<|im_end|>")
    ]
    assert all(more for few, more in zip(one.target, other.target, strict=True) if few)
    newline = tokenizer.encode_without_special("\n")[0]
    assert all(other.target[i] for i, token in enumerate(other.ids) if token == newline)


def test_a_system_turn_replaces_the_formats_own(loaded: dict[str, Any]) -> None:
    row = [Turn("system", "Be kind."), *turns("Hi", "Hello.")]
    for name, kind, expected in (
        ("pieces", "v1", "Be kind. USER: Hi ASSISTANT: Hello.</s>"),
        ("pieces", "llama_2", "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello. </s>"),
        ("chatml", "chatml", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
         "<|im_start|>assistant\nHello.<|im_end|>\n"),
    ):  # fmt: skip
        found = conversations.tokenize(chat_formats.format_named(kind, loaded[name]), loaded[name], row)
        assert found.ids == loaded[name].encode(expected)


def test_prefix_is_paligemmas_row(loaded: dict[str, Any]) -> None:
    """Image, begin token, prefix, newline; suffix and end token are learned. As big_vision, each part on its own."""
    tokenizer = loaded["gemma"]
    encode = tokenizer.encode_without_special
    begin, end = tokenizer.id("<bos>"), tokenizer.id("<eos>")
    chat_format = chat_formats.format_named("prefix", tokenizer)
    for question in ("<image>\nanswer en What is it?", "answer en What is it?"):
        found = conversations.tokenize(chat_format, tokenizer, turns(question, "a cat"), images=1)
        prefix = [IMAGE, begin, *encode("answer en What is it?"), *encode("\n")]
        assert found.ids == [*prefix, *encode("a cat"), end]
        assert found.target == [False] * len(prefix) + [True] * (len(found.ids) - len(prefix))
        assert found.turn_ends == [len(found.ids)]
    paligemma = peers_answers.read()["paligemma"]
    assert paligemma["input_ids"]  # tests/data/test_tokenizers.py holds the prompts to the processor's


def test_prefix_of_the_word_tokenizer_is_image_question_answer_end() -> None:
    """As the rows of `vlm_jax.train` were: no begin token, and the newline is no word."""
    words = tokenizers.read_tokenizer(tokenizer_files.FOLDER, {})
    chat_format = chat_formats.format_named("prefix", words)
    found = conversations.tokenize(chat_format, words, turns("<image>\nread row two", "4 7"))
    question, answer = words.encode("read row two"), words.encode("4 7")
    assert found.ids == [IMAGE, *question, *answer, words.eos_ids[0]]
    assert found.target == [False] * (1 + len(question)) + [True] * (len(answer) + 1)
    assert chat.prompt_ids(chat_format, words, "read row two", 83, 4) == [83] * 4 + question


def test_without_images_a_placeholder_is_ordinary_text(loaded: dict[str, Any], tmp_path: Path) -> None:
    row = turns("what is <image> in XML?", "A tag, <image>.")
    for name, kind in (("pieces", "v1"), ("chatml", "chatml"), ("gemma", "prefix")):
        tokenizer = loaded[name]
        chat_format = chat_formats.format_named(kind, tokenizer)
        found = conversations.tokenize(chat_format, tokenizer, row, images=0)
        assert IMAGE not in found.ids
        assert tokenizer.id("<image>") not in found.ids
        other = conversations.tokenize(chat_format, tokenizer.without_extra(), row, images=0)
        assert found == other
    assert "what is <image> in XML" in loaded["chatml"].decode(
        conversations.tokenize(chat_formats.format_named("chatml", loaded["chatml"]), loaded["chatml"], row, 0).ids
    )
    own = loaded["chatml"]._replace(without_extra=lambda: loaded["chatml"])
    with pytest.raises(UserError, match="expected no <image> without an image"):
        conversations.tokenize(chat_formats.format_named("chatml", own), own, row, images=0)


def test_an_image_token_of_another_name_stands_for_the_placeholder(loaded: dict[str, Any]) -> None:
    tokenizer = loaded["chatml"]
    other = chat_formats.ChatFormat("template", UNTAGGED["chatml"], "<|endoftext|>")
    usual = chat_formats.ChatFormat("template", UNTAGGED["chatml"], "<image>")
    row = turns("<image>\nWhat?", "A cat.")
    assert conversations.tokenize(other, tokenizer, row) == conversations.tokenize(usual, tokenizer, row)


def test_images_come_before_the_first_question_without_a_placeholder(loaded: dict[str, Any]) -> None:
    for name, kind in (("pieces", "v1"), ("chatml", "chatml")):
        chat_format = chat_formats.format_named(kind, loaded[name])
        row, marked = turns("What?", "A cat."), turns("<image>\nWhat?", "A cat.")
        assert conversations.tokenize(chat_format, loaded[name], row, images=1) == conversations.tokenize(
            chat_format, loaded[name], marked
        )


def test_questions_and_turns_without_images() -> None:
    row = [Turn("system", "Be kind."), *turns("<image>\nWhat is this?", "A cat.", "And now?", "A dog.")]
    assert conversations.bare_question(row) == "What is this?"
    assert [turn.text for turn in conversations.without_images(row)][:2] == ["Be kind.", "What is this?"]


@pytest.mark.parametrize(
    ("kind", "row", "images", "message"),
    [
        ("v1", turns("only a question"), None, "expected an answer .*, got none"),
        ("v1", turns("a question", " \n"), None, "expected an answer .*, got an empty one"),
        ("v1", turns("<image>\n<image>\nWhat?", "A cat."), 1, "expected 1 image placeholders, .* got 2"),
        ("prefix", turns("<image>\n<image>\nWhat?", "A cat."), 3, "expected 3 image placeholders, .* got 2"),
        ("v1", turns("<image>\nWhat?", "<image>"), 1, "expected 1 image placeholders, .* got 2"),
    ],
)
def test_invalid_conversations_are_one_line(
    loaded: dict[str, Any], kind: str, row: list[Turn], images: int | None, message: str
) -> None:
    chat_format = chat_formats.format_named(kind, loaded["pieces"])
    with pytest.raises(UserError, match=message):
        conversations.tokenize(chat_format, loaded["pieces"], row, images)


REWRITING = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, "the text of every answer"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites earlier turns"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "the text of every answer"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
         "rewrites earlier turns"),
    ],
)  # fmt: skip
def test_a_template_that_trains_on_other_text_than_it_asks_is_refused(
    loaded: dict[str, Any], template: str, message: str
) -> None:
    chat_format = chat_formats.ChatFormat("template", template, "<image>")
    with pytest.raises(UserError, match=message):
        conversations.tokenize(chat_format, loaded["chatml"], turns("a", "b", "c", "d"))


def test_formats_are_named(loaded: dict[str, Any]) -> None:
    """With the nearest name to a typo, and those to choose from where a folder has no template."""
    tokenizer = loaded["pieces"]
    for name, same in (("vicuna_v1", "v1"), ("llama-2", "llama_2"), ("Vicuna", "v1"), ("paligemma", "prefix")):
        assert chat_formats.format_named(name, tokenizer) == chat_formats.format_named(same, tokenizer)
    with pytest.raises(UserError, match="unknown chat format 'lama_2': did you mean 'llama_2'"):
        chat_formats.format_named("lama_2", tokenizer)
    with pytest.raises(UserError, match="no chat template: choose one of prefix, plain, v1"):
        chat_formats.format_named("template", tokenizer)
    with pytest.raises(UserError, match=r"'qwen': expected a tokenizer with the token <\|im_end\|>"):
        chat_formats.format_named("qwen", tokenizer)
    with pytest.raises(UserError, match="'llama_2': expected a tokenizer with a bos_token"):
        chat_formats.format_named("llama_2", loaded["chatml"])
    own = chat_formats.format_named("template", tokenizer._replace(template="x"))
    assert own.template == "x"
    with pytest.raises(UserError, match="has no chat template: name a chat format"):
        conversations.tokenize(chat_formats.chat_format_of("LlamaForCausalLM", tokenizer), tokenizer, turns("a", "b"))


def test_llavas_family_learns_answers_and_end(loaded: dict[str, Any]) -> None:
    tokenizer = loaded["pieces"]
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", tokenizer)
    found = conversations.tokenize(chat_format, tokenizer, turns("Hi", "Hello."))
    assert found.ids == tokenizer.encode("USER: Hi ASSISTANT: Hello.</s>")
    assert learned(tokenizer, found) == [tokenizer.encode_without_special(" Hello.</s>")]


@pytest.mark.parametrize("name", [*CASES, "gemma"])
def test_offsets_cover_the_text(loaded: dict[str, Any], name: str) -> None:
    """Each character belongs to a token, in order, whatever the tokenizer adds."""
    for text in (*peers_text.TEXTS, "</s>é日 a</s>b"):
        ids, offsets = loaded[name].encode_with_offsets(text)
        assert len(ids) == len(offsets)
        ends = [end for _, end in offsets]
        assert ends == sorted(ends)
        covered = {i for start, end in offsets for i in range(start, end)}
        assert {i for i, letter in enumerate(text) if not letter.isspace()} <= covered


def test_evaluation_has_the_text_of_training_and_answers_alone(loaded: dict[str, Any]) -> None:
    """By any name of the format; others stay as they are."""
    tokenizer, row = loaded["chatml"], turns("<image>\nWhat is it?", "A cat.")
    for name in ("qwen_headers", "Qwen-Headers"):
        trained, asked = (
            conversations.tokenize(chat_formats.format_named(each, tokenizer), tokenizer, row)
            for each in (name, chat_formats.for_evaluation(name))
        )
        assert trained.ids == asked.ids
        assert sum(asked.target) < sum(trained.target)
    assert [chat_formats.for_evaluation(name) for name in ("template", "v1", "chatml")] == ["template", "v1", "chatml"]
