"""scene: an interpreter written from the words alone agrees with the oracle; the test asks what training never asks."""

import collections
import itertools

import numpy as np
import pytest

from vlm_jax.core.errors import UserError
from vlm_jax.studies.glyphs import glyphs
from vlm_jax.studies.glyphs.glyph_scene import builder as scene_builder
from vlm_jax.studies.glyphs.glyph_scene import programs, scenes
from vlm_jax.studies.glyphs.vocabulary import COLOURS, SHAPES

OPERATORS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
    "max": max,
    "min": min,
}
CONFIGS = ("chains2", "two", "three")


class Interpreter:
    """Answers a question about one scene by reading its words from left to right."""

    def __init__(self, scene, number):
        self.objects = []
        for colour, name in enumerate(COLOURS):
            for cell in scene.cells[number, colour]:
                if cell >= 0:
                    value, shape = scene.value[number, colour], scene.shape[number, colour]
                    kind = SHAPES[shape] if shape >= 0 else "digit"
                    self.objects.append({"colour": name, "kind": kind, "value": int(value), "at": divmod(int(cell), 4)})

    def find(self, name):
        return next(o for o in self.objects if name in (o["colour"], o["kind"]))

    @staticmethod
    def lies(thing, towards, other):
        (row, column), (row_of, column_of) = thing["at"], other["at"]
        return {"left": column < column_of, "right": column > column_of, "above": row < row_of, "below": row > row_of}[
            towards
        ]

    @staticmethod
    def far(a, b):
        return (a["at"][0] - b["at"][0]) ** 2 + (a["at"][1] - b["at"][1]) ** 2

    def condition(self, words):
        """`left of red` -> (left, the red thing)."""
        towards = words.pop(0)
        if words[0] == "of":
            words.pop(0)
        return towards, self.find(words.pop(0))

    def number(self, words):
        """A colour, `digit nearest X` or `count ...`: one number."""
        word = words.pop(0)
        if word == "digit":
            assert words.pop(0) == "nearest"
            target = self.find(words.pop(0))
            digits = sorted(
                (o for o in self.objects if o["kind"] == "digit" and o is not target), key=lambda o: self.far(o, target)
            )
            assert len(digits) == 1 or self.far(digits[0], target) < self.far(digits[1], target)
            return digits[0]["value"]
        if word == "count":
            conditions = [self.condition(words)]
            while words and words[0] == "and":
                words.pop(0)
                conditions.append(self.condition(words))
            return sum(all(self.lies(o, *c) for c in conditions) for o in self.objects)
        if word.isdigit():
            return int(word)
        assert self.find(word)["kind"] == "digit"
        return self.find(word)["value"]

    def answer(self, question):
        words = question.split()
        if words[0] == "nearest":
            _, a, _, b, _, c = words
            return min((b, c), key=lambda name: self.far(self.find(a), self.find(name)))
        if words[0] not in ("digit", "count") and words[1] in ("left", "right", "above", "below"):
            thing = self.find(words.pop(0))
            return "yes" if self.lies(thing, *self.condition(words)) else "no"
        total = self.number(words)
        while words:
            operator = OPERATORS[words.pop(0)]
            total = min(max(operator(total, self.number(words)), 0), 9)
        return str(total)


def _chunk(config, split, tmp_path, monkeypatch, count=96):
    """A chunk and the scenes that it was drawn from."""
    kept = []
    sample = scenes.sample
    monkeypatch.setattr(scene_builder.scenes, "sample", lambda *a: kept.append(sample(*a)) or kept[-1])
    builder = scene_builder.GlyphScene(config=config, data_dir=tmp_path)
    return builder, builder.chunk(split, 0, np.random.default_rng(8), count), kept[-1]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_a_second_interpreter_gives_the_stored_answers(config, split, tmp_path, monkeypatch):
    _, chunk, shown = _chunk(config, split, tmp_path, monkeypatch)
    for number, (questions, answers) in enumerate(zip(chunk.questions, chunk.answers, strict=True)):
        interpreter = Interpreter(shown, number)
        assert [interpreter.answer(q) for q in questions] == answers
        assert len(set(questions)) == len(questions) == 16


def test_things_stand_in_their_cells_in_their_colours(tmp_path, monkeypatch):
    _, chunk, shown = _chunk("three", "test", tmp_path, monkeypatch)
    for number, image in enumerate(chunk.images.astype(float)):
        for colour, cell in enumerate(shown.cells[number, :, 0]):
            if cell >= 0:
                row, column = divmod(int(cell), 4)
                patch = image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].reshape(-1, 3)
                ink = patch[patch.max(axis=1).argmax()]
                palette = glyphs.PALETTE / np.linalg.norm(glyphs.PALETTE, axis=1, keepdims=True)
                assert (palette @ ink).argmax() == colour


def test_scenes_hold_what_their_layout_says():
    for split in glyphs.SPLITS:
        shown = scenes.sample(np.random.default_rng(2), split, 500, scenes.SceneLayout(4, 2, 6, 1, "free"))
        assert ((shown.value >= 0).sum(axis=1) == 4).all()
        assert ((shown.shape >= 0).sum(axis=1) == 2).all()
        for cells, shape in zip(shown.cells, shown.shape, strict=True):
            assert len(set(cells[cells >= 0])) == 6
            assert len(set(shape[shape >= 0])) == 2


def test_digits_of_a_test_scene_never_stand_together_in_training():
    layout = scenes.SceneLayout(4, 0, 4, 4, "rows")
    seen = [
        set(map(tuple, scenes.sample(np.random.default_rng(3), split, 3000, layout).value.tolist()))
        for split in glyphs.SPLITS
    ]
    assert not seen[0] & seen[1]
    assert min(map(len, seen)) > 1000


@pytest.mark.parametrize("config", CONFIGS)
def test_the_test_asks_only_what_training_never_asks(config, tmp_path, monkeypatch):
    asked = {}
    for split in glyphs.SPLITS:
        _, chunk, _ = _chunk(config, split, tmp_path, monkeypatch, 256)
        asked[split] = set(itertools.chain.from_iterable(chunk.questions))
    assert not asked["train"] & asked["test"]
    words = {split: collections.Counter(" ".join(questions).split()) for split, questions in asked.items()}
    assert set(words["test"]) <= set(words["train"])
    # No word is tested that training hardly shows: what is new is the combination.
    assert all(words["train"][word] >= words["test"][word] for word in words["test"])


def test_questions_of_one_meaning_are_on_one_side():
    config = scene_builder.GlyphScene.builder_configs["three"]
    table = programs.table(("pair", "side", "triple"), config.layout)
    side = dict(zip(table.texts, table.held_out.tolist(), strict=True))
    swaps = 0
    for text in side:
        words = text.split()
        if len(words) == 3 and words[1] in ("plus", "times", "max", "min"):
            assert side[text] == side[" ".join(words[::-1])]
            swaps += 1
        if len(words) == 5 and words[1] == words[3] != "minus":
            for order in itertools.permutations(words[::2]):
                assert side[text] == side[f"{order[0]} {words[1]} {order[1]} {words[1]} {order[2]}"]
                swaps += 1
        if words[1] == "above":
            assert side[text] == side[f"{words[2]} below {words[0]}"]
            swaps += 1
    assert swaps > 500
    assert 0.15 < np.mean(list(side.values())) < 0.35


@pytest.mark.parametrize("config", CONFIGS)
def test_a_question_alone_tells_little(config, tmp_path, monkeypatch):
    _, chunk, _ = _chunk(config, "train", tmp_path, monkeypatch, 256)
    pairs = list(zip(itertools.chain(*chunk.questions), itertools.chain(*chunk.answers), strict=True))
    numbers = collections.Counter(a for q, a in pairs if a.isdigit() and not q.startswith("count"))
    assert max(numbers.values()) / sum(numbers.values()) < 0.125
    sides = collections.Counter(a for _, a in pairs if a in ("yes", "no"))
    assert not sides or sides["yes"] / sum(sides.values()) == pytest.approx(0.5, abs=0.05)


def test_an_unknown_program_is_named():
    with pytest.raises(UserError, match=r"unknown program 'tripel': did you mean 'triple'"):
        programs.table(("tripel",), scenes.SceneLayout(4, 2, 6, 1, "free"))
