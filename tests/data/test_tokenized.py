"""Token ids on disk: what is written, when it is written again, and damage."""

import os

import numpy as np
import pytest

from tests.data import mixtures
from vlm_jax.core.errors import UserError
from vlm_jax.data import tokenized
from vlm_jax.data.conversations import IMAGE
from vlm_jax.data.examples import BadItem, Example, Turn

IMAGES = [mixtures.png(n) for n in range(4)]


@pytest.fixture
def items() -> list:
    return [
        mixtures.example("a", "<image> 5 | 6 7 | 8 <image> | 9", IMAGES[:2]),
        BadItem("missing image", "b", "b.png"),
        mixtures.example("c", "10 | 11"),
        mixtures.example("d", "<image> 12 | 13 | 14 | 15", IMAGES[2:3]),
        BadItem("missing image", "e", "e.png"),
    ]


def folders(path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def test_a_conversation_is_what_the_tokenizer_gave(items) -> None:
    dataset = mixtures.dataset(items)
    assert len(dataset) == dataset.items == 3
    ids, target = dataset.conversation(0)
    assert ids.tolist() == [IMAGE, 5, 6, 7, 1, 8, IMAGE, 9, 1]
    assert target.tolist() == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2
    assert dataset.turn_ends[dataset.turn_bounds[0] : dataset.turn_bounds[1]].tolist() == [5, 9]
    assert dataset.question(1).tolist() == [10]
    assert [dataset.id_of(i) for i in range(3)] == ["a", "c", "d"]
    assert dataset.skipped == {"missing image": ["b", "e"]}


def test_images_are_numbered_through_the_usable_items(items) -> None:
    dataset = mixtures.dataset(items)
    assert dataset.image_count == 3
    assert [dataset.image(n) for n in range(3)] == IMAGES[:3]
    assert dataset.images.tolist() == [2, 0, 1]
    separate = mixtures.dataset([*items, mixtures.example("f", "1 | 2")][2:], separate=True)
    assert separate.image_count == 1
    assert separate.image(0) == IMAGES[2]


def test_separate_questions_are_conversations_with_the_images_of_their_item() -> None:
    """Those that do not say where the images are have them first; a system turn stays with each."""
    turns = (
        Turn("system", "30"),
        Turn("user", "<image> 5"),
        Turn("assistant", "6"),
        Turn("user", "7"),
        Turn("assistant", "8"),
    )
    dataset = mixtures.dataset([Example("a", (IMAGES[0],), turns)], separate=True)
    assert len(dataset) == 2
    assert dataset.items == dataset.image_count == 1
    assert dataset.conversation(0)[0].tolist() == [30, IMAGE, 5, 6, 1]
    assert dataset.conversation(1)[0].tolist() == [30, IMAGE, 7, 8, 1]
    assert dataset.first_image.tolist() == [0, 0]
    assert [dataset.question(i).tolist() for i in range(2)] == [[5], [7]]


@pytest.mark.parametrize(
    ("text", "images", "reason"),
    [
        ("<image> 5 | 6", 0, "placeholder without an image"),
        ("5 | 6", 1, "image without a placeholder"),
        ("5 | 6 | <image> <image> 7 | 8", 1, "placeholder without an image"),
    ],
)
def test_items_that_cannot_be_used_are_skipped_and_named(text: str, images: int, reason: str) -> None:
    dataset = mixtures.dataset([mixtures.example("bad", text, IMAGES[:images]), mixtures.example("good", "5 | 6")])
    assert dataset.skipped == {reason: ["bad"]}
    assert len(dataset) == 1


def test_an_item_that_the_template_refuses_is_skipped(tmp_path) -> None:
    def tokenize(turns, images):
        if turns[0].text == "13":
            raise UserError("roles must alternate")
        return mixtures.tokenize(turns, images)

    source = mixtures.Listed([mixtures.example("a", "5 | 6"), mixtures.example("b", "13 | 6")])
    dataset = tokenized.open_tokenized(source, False, tokenize, mixtures.bare_ids, "key", tmp_path)
    assert dataset.skipped == {"cannot be rendered": ["b"]}


def test_a_source_without_a_usable_item_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"listed: expected a usable item, got none of 2 \(missing image: 2 .*'b'"
    ) as caught:
        mixtures.dataset([BadItem("missing image", "b"), BadItem("missing image", "e")])
    assert "\n" not in str(caught.value)


def test_the_second_open_tokenizes_nothing(items, tmp_path) -> None:
    first = mixtures.dataset(items, folder=tmp_path)

    def fails(turns, images):
        raise AssertionError("tokenized again")

    source = mixtures.Listed(items)
    again = tokenized.open_tokenized(source, False, fails, fails, "key", tmp_path)
    for name in ("ids", "target", "bounds", "turn_ends", "questions", "images", "first_image", "item"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert again.skipped == first.skipped
    assert len(folders(tmp_path)) == 1


def test_a_change_of_what_ids_depend_on_gives_another_folder(items, tmp_path) -> None:
    """Texts, image bytes, separate questions, and the key of tokenizer and format."""
    make = mixtures.dataset
    make(items, folder=tmp_path)
    changes = [
        lambda: make(
            [mixtures.example("a", "<image> 5 | 6 7 | 8 <image> | 10", IMAGES[:2]), *items[1:]], folder=tmp_path
        ),
        lambda: make(
            [mixtures.example("a", "<image> 5 | 6 7 | 8 <image> | 9", IMAGES[2:]), *items[1:]], folder=tmp_path
        ),
        lambda: make(items[:4], folder=tmp_path),
        lambda: tokenized.open_tokenized(
            mixtures.Listed(items), False, mixtures.tokenize, mixtures.bare_ids, "other", tmp_path
        ),
        lambda: make([mixtures.example("c", "10 | 11 | 12 | 13")], folder=tmp_path),
        lambda: make([mixtures.example("c", "10 | 11 | 12 | 13")], separate=True, folder=tmp_path),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        assert len(folders(tmp_path)) == count


def test_a_changed_tokenizer_has_another_fingerprint(tmp_path) -> None:
    """Its files and their names; other files of the folder do not matter."""
    prints = []
    for name, content in (
        ("tokenizer.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("tokenizer.json", "[]"),
    ):
        (tmp_path / name).write_text(content)
        prints.append(tokenized.folder_fingerprint.__wrapped__(tmp_path))
    assert len(set(prints)) == 3
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert tokenized.folder_fingerprint.__wrapped__(tmp_path) == prints[-1]


def truncate(name: str, keep: int):
    """Leaves `keep` bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def swap(name: str, value: int, dtype: type):
    """Replaces the last number of an array; its size stays."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: -dtype().itemsize] + dtype(value))


def pipe(name: str):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


@pytest.mark.parametrize(
    "damage",
    [
        *(swap(name, value, np.int64) for name in ("bounds", "first_image", "item") for value in (-1, 99)),
        *(swap("turn_ends", value, np.int32) for value in (-1, 0, 99)),
        swap("images", -1, np.int32),
        *(pipe(name) for name in ("ids", "meta.json")),
        lambda folder: (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('["b"', "[3")),
        *(truncate(name, keep) for name in ("ids", "target", "bounds", "item") for keep in (0, 8, 5)),
        lambda folder: (folder / "meta.json").write_text("[]"),
        truncate("meta.json", 4),
        lambda folder: (folder / "images").unlink(),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_damaged_folder_is_one_line(damage, items, tmp_path) -> None:
    mixtures.dataset(items, folder=tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    damage(folder)
    with pytest.raises(UserError, match=rf"^{folder}: unreadable tokens \(.*\): delete the folder") as caught:
        mixtures.dataset(items, folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_interrupted_write_leaves_no_tokens(items, tmp_path) -> None:
    def fails(turns, images):
        raise KeyboardInterrupt

    source = mixtures.Listed(items)
    with pytest.raises(KeyboardInterrupt):
        tokenized.open_tokenized(source, False, fails, fails, "key", tmp_path)
    assert folders(tmp_path) == []
    (folder,) = {p.name.removesuffix(".lock") for p in tmp_path.iterdir()}
    (tmp_path / f".{folder}.vlm_jax-{0:016x}").mkdir()  # of a process that was killed
    assert len(mixtures.dataset(items, folder=tmp_path)) == 3
    assert folders(tmp_path) == [folder]
