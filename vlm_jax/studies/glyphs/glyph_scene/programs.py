"""Questions about scenes: programs of two or three steps, each with its words and its oracle.

Operations are done from left to right, and every result below 0 or above 9 becomes 0 or 9.

    two steps
      pair      red plus blue                       the digits of two colours
      side      red left of circle                  yes or no, by rows and columns of cells
      among     count left of red and above circle  objects that are both
      nearer    nearest red of blue and circle      which of the two stands closer to the first
      mixed     red times 3 plus blue               (red times 3) plus blue
    three steps
      chain     red times 3 plus blue minus 2       ((red times 3) plus blue) minus 2
      triple    red plus blue max green             (red plus blue) max green
      reach     digit nearest circle times red      the digit that stands closest to the circle, times the red one
      tally     red minus count left of circle      the red digit minus the number of objects left of the circle
      meet      digit nearest red plus digit nearest circle

A question is valid in a scene if everything it names is there and no two distances that decide it are equal. Those
whose answer hardly depends on the scene (`red times 0`) can be left out. Questions are split once into those asked in
training and those kept for the test; questions that mean the same (`red plus blue`, `blue plus red`), found by their
answers in many scenes, are on the same side.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.core.errors import unknown
from vlm_jax.studies.glyphs.glyph_scene.scenes import SIDE, SceneLayout, Scenes, sample
from vlm_jax.studies.glyphs.vocabulary import COLOURS, DIGITS, OPERATORS, SHAPES

NAMES = (*COLOURS, *SHAPES)
TOWARDS = ("left of", "right of", "above", "below")
ANSWERS = (*DIGITS, "yes", "no", *COLOURS, *SHAPES)
_YES, _NO, _FIRST_NAME = ANSWERS.index("yes"), ANSWERS.index("no"), ANSWERS.index(COLOURS[0])
_HELD_OUT_ONE_IN = 4
_FARTHER = 2 * SIDE**2  # than any two cells
_PROBES, _PROBE_SEED = 600, 7
_QUESTIONS = 256  # answered at once, so that they stay in the cache

Answers = tuple[Int[np.ndarray, "n q"], Bool[np.ndarray, "n q"]]  # number in ANSWERS, and whether the question is valid


class SceneProgram(NamedTuple):
    """A kind of question. `solve` takes scenes and one array of argument numbers [q] a slot."""

    slots: tuple[tuple[str, ...], ...]  # the words that each argument may be
    words: str  # with {0}, {1}, ... for the arguments
    solve: Callable[..., Answers]
    kind: tuple[int, ...] = ()  # the arguments that are operators or directions: answers are balanced within each


class ProgramTable(NamedTuple):
    """All questions of some programs, with a row for each."""

    texts: tuple[str, ...]
    group: Int[np.ndarray, " q"]  # program and kind
    share: Float[np.ndarray, " groups"]  # of the questions that are asked
    held_out: Bool[np.ndarray, " q"]
    parts: tuple[tuple[SceneProgram, Int[np.ndarray, "slots q"]], ...]


_A, _B = np.mgrid[:10, :10]
# Of every operator of `OPERATORS` and two digits: the result, between 0 and 9.
_RESULTS = np.clip([_A + _B, _A - _B, _A * _B, np.maximum(_A, _B), np.minimum(_A, _B)], 0, 9).astype(np.int8)


def _apply(operator: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The operators of `OPERATORS` by number. Anything for digits that are absent, -1."""
    index = operator.astype(np.int16) * np.int16(100) + a * np.int16(10) + b.astype(np.int16)
    return _RESULTS.ravel().take(index, mode="wrap")


def _digit(scenes: Scenes, colour: np.ndarray) -> Answers:
    value = scenes.value[:, colour]
    return value, value >= 0


def _place(scenes: Scenes, name: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and colour of the object that a name means, and whether it is there."""
    colour = scenes.named[:, name]
    cell = np.take_along_axis(scenes.cells[..., 0], colour, axis=1)
    return cell // SIDE, cell % SIDE, colour, colour >= 0


def _beyond(
    direction: np.ndarray, row: np.ndarray, column: np.ndarray, row_of: np.ndarray, column_of: np.ndarray
) -> np.ndarray:
    """Whether (row, column) lies strictly in that direction of (row_of, column_of)."""
    return np.choose(direction, [column < column_of, column > column_of, row < row_of, row > row_of])


def _everything(scenes: Scenes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and presence of all objects, [n, 1, c]."""
    cell = scenes.cells[:, None, :, 0]
    return cell // SIDE, cell % SIDE, cell >= 0


def _nearest_digit(scenes: Scenes, name: np.ndarray) -> Answers:
    """The digit that stands closest to an object, itself left out; not valid if two stand equally close."""
    row, column, colour, there = _place(scenes, np.arange(len(NAMES)))
    rows, columns, _ = _everything(scenes)
    far = (rows - row[..., None]) ** 2 + (columns - column[..., None]) ** 2
    counts = (scenes.value >= 0)[:, None, :] & (np.arange(len(COLOURS)) != colour[..., None])
    far = np.where(counts, far, _FARTHER)
    closest = far.argmin(axis=2)
    unique = (far == far.min(axis=2, keepdims=True)).sum(axis=2) == 1
    return np.take_along_axis(scenes.value, closest, axis=1)[:, name], (there & unique)[:, name]


def _pair(scenes: Scenes, a: np.ndarray, operator: np.ndarray, b: np.ndarray) -> Answers:
    (va, oka), (vb, okb) = _digit(scenes, a), _digit(scenes, b)
    return _apply(operator, va, vb), oka & okb & (a != b)


def _triple(
    scenes: Scenes, a: np.ndarray, first: np.ndarray, b: np.ndarray, second: np.ndarray, c: np.ndarray
) -> Answers:
    (ab, ok), (vc, okc) = _pair(scenes, a, first, b), _digit(scenes, c)
    return _apply(second, ab, vc), ok & okc & (a != c) & (b != c)


def _mixed(
    scenes: Scenes, a: np.ndarray, first: np.ndarray, number: np.ndarray, second: np.ndarray, b: np.ndarray
) -> Answers:
    (va, oka), (vb, okb) = _digit(scenes, a), _digit(scenes, b)
    return _apply(second, _apply(first, va, number.astype(np.int8)), vb), oka & okb & (a != b)


def _chain(
    scenes: Scenes,
    a: np.ndarray,
    first: np.ndarray,
    number: np.ndarray,
    second: np.ndarray,
    b: np.ndarray,
    third: np.ndarray,
    last: np.ndarray,
) -> Answers:
    value, ok = _mixed(scenes, a, first, number, second, b)
    return _apply(third, value, last.astype(np.int8)), ok


def _side(scenes: Scenes, a: np.ndarray, direction: np.ndarray, b: np.ndarray) -> Answers:
    (ra, ca, a_is, oka), (rb, cb, b_is, okb) = _place(scenes, a), _place(scenes, b)
    return np.where(_beyond(direction, ra, ca, rb, cb), _YES, _NO), oka & okb & (a_is != b_is)


def _among(scenes: Scenes, across: np.ndarray, a: np.ndarray, along: np.ndarray, b: np.ndarray) -> Answers:
    (ra, ca, a_is, oka), (rb, cb, b_is, okb) = _place(scenes, a), _place(scenes, b)
    rows, columns, there = _everything(scenes)
    both = _beyond(across[:, None], rows, columns, ra[..., None], ca[..., None]) & there
    both &= _beyond(along[:, None] + 2, rows, columns, rb[..., None], cb[..., None])
    return both.sum(axis=2), oka & okb & (a_is != b_is)


def _nearer(scenes: Scenes, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Answers:
    (ra, ca, a_is, oka), (rb, cb, b_is, okb), (rc, cc, c_is, okc) = (_place(scenes, x) for x in (a, b, c))
    to_b, to_c = (ra - rb) ** 2 + (ca - cb) ** 2, (ra - rc) ** 2 + (ca - cc) ** 2
    distinct = (a_is != b_is) & (a_is != c_is) & (b_is != c_is)
    return np.where(to_b < to_c, b, c) + _FIRST_NAME, oka & okb & okc & distinct & (to_b != to_c)


def _reach(scenes: Scenes, name: np.ndarray, operator: np.ndarray, b: np.ndarray) -> Answers:
    (va, oka), (vb, okb) = _nearest_digit(scenes, name), _digit(scenes, b)
    return _apply(operator, va, vb), oka & okb


def _tally(scenes: Scenes, a: np.ndarray, operator: np.ndarray, direction: np.ndarray, name: np.ndarray) -> Answers:
    (va, oka), (row, column, _, there) = _digit(scenes, a), _place(scenes, name)
    rows, columns, objects = _everything(scenes)
    beyond = _beyond(direction[:, None], rows, columns, row[..., None], column[..., None]) & objects
    return _apply(operator, va, beyond.sum(axis=2)), oka & there


def _meet(scenes: Scenes, a: np.ndarray, operator: np.ndarray, b: np.ndarray) -> Answers:
    (va, oka), (vb, okb) = _nearest_digit(scenes, a), _nearest_digit(scenes, b)
    return _apply(operator, va, vb), oka & okb & (scenes.named[:, a] != scenes.named[:, b])


PROGRAMS = {
    "pair": SceneProgram((COLOURS, OPERATORS, COLOURS), "{} {} {}", _pair, (1,)),
    "side": SceneProgram((NAMES, TOWARDS, NAMES), "{} {} {}", _side, (1,)),
    "among": SceneProgram((TOWARDS[:2], NAMES, TOWARDS[2:], NAMES), "count {} {} and {} {}", _among, (0, 2)),
    "nearer": SceneProgram((NAMES, NAMES, NAMES), "nearest {} of {} and {}", _nearer),
    "triple": SceneProgram((COLOURS, OPERATORS, COLOURS, OPERATORS, COLOURS), "{} {} {} {} {}", _triple, (1, 3)),
    "mixed": SceneProgram((COLOURS, OPERATORS, DIGITS, OPERATORS, COLOURS), "{} {} {} {} {}", _mixed, (1, 3)),
    "chain": SceneProgram(
        (COLOURS, OPERATORS, DIGITS, OPERATORS, COLOURS, OPERATORS, DIGITS), "{} {} {} {} {} {} {}", _chain, (1, 3, 5)
    ),
    "reach": SceneProgram((NAMES, OPERATORS, COLOURS), "digit nearest {} {} {}", _reach, (1,)),
    "tally": SceneProgram((COLOURS, OPERATORS[:2], TOWARDS, NAMES), "{} {} count {} {}", _tally, (1, 2)),
    "meet": SceneProgram((NAMES, OPERATORS, NAMES), "digit nearest {} {} digit nearest {}", _meet, (1,)),
}


@functools.cache
def table(programs: tuple[str, ...], layout: SceneLayout, most_common: float = 1.0) -> ProgramTable:
    """All questions of these programs that are valid in some scene, and that have no answer in more than a share
    `most_common` of the scenes. Raises `UserError` for an unknown program."""
    texts, groups, parts, marks = [], [], [], []
    probes = sample(np.random.default_rng(_PROBE_SEED), "train", _PROBES, layout)
    for name in programs:
        if name not in PROGRAMS:
            raise unknown("program", name, PROGRAMS)
        program = PROGRAMS[name]
        arguments = np.stack(
            [a.ravel() for a in np.meshgrid(*(np.arange(len(s)) for s in program.slots), indexing="ij")]
        )
        meaning = _meaning(program, arguments, probes)
        counts = np.stack([(meaning == number).sum(axis=0) for number in range(len(ANSWERS))])
        kept = (counts.sum(axis=0) > 0) & (counts.max(axis=0) <= most_common * counts.sum(axis=0))
        arguments, meaning = arguments[:, kept], meaning[:, kept]
        marks += [zlib.crc32(column.tobytes()) for column in np.ascontiguousarray(meaning.T)]
        words = [[slot[i] for i in row] for slot, row in zip(program.slots, arguments, strict=True)]
        texts += [program.words.format(*row) for row in zip(*words, strict=True)]
        groups += [(name, *row) for row in arguments[list(program.kind)].T.tolist()]
        parts.append((program, arguments))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    share = {name: 1 / len({g for g in numbers if g[0] == name}) for name in programs}
    return ProgramTable(
        tuple(texts),
        np.array([numbers[g] for g in groups]),
        np.array([share[g[0]] for g in numbers]),
        np.array(marks) % _HELD_OUT_ONE_IN == 0,
        tuple(parts),
    )


def _meaning(program: SceneProgram, arguments: np.ndarray, scenes: Scenes) -> Int[np.ndarray, "n q"]:
    """The answers to questions in scenes, -1 where they are not valid."""
    parts = []
    for start in range(0, arguments.shape[1], _QUESTIONS):
        answer, valid = program.solve(scenes, *arguments[:, start : start + _QUESTIONS])
        parts.append(np.where(valid, answer, -1).astype(np.int8))
    return np.concatenate(parts, axis=1)


def answers(questions: ProgramTable, scenes: Scenes) -> Int[np.ndarray, "n q"]:
    """The oracle: numbers in `ANSWERS`, -1 where a question is not valid."""
    return np.concatenate([_meaning(*part, scenes) for part in questions.parts], axis=1)


def choose(
    rng: np.random.Generator,
    questions: ProgramTable,
    answer: Int[np.ndarray, "n q"],
    allowed: Bool[np.ndarray, " q"],
    count: int,
) -> Int[np.ndarray, "n count"]:
    """Different valid questions for every scene.

    Programs, their kinds within a program, and the answers within a kind come about equally often, so that
    little is to be learned from the question alone. (Weighted draws without replacement: the largest of
    log weight + Gumbel noise.)
    """
    cell = questions.group * len(ANSWERS) + answer
    usable = (answer >= 0) & allowed
    if usable.sum(axis=1).min() < count:
        raise ValueError(
            f"a scene has fewer than {count} valid questions: name more programs, or store fewer questions"
        )
    often = np.bincount(cell[usable], minlength=len(questions.share) * len(ANSWERS)).reshape(-1, len(ANSWERS))
    kinds = np.maximum((often > 0).sum(axis=1, keepdims=True), 1)
    weight = (questions.share[:, None] / kinds / np.maximum(often, 1)).ravel()
    score = np.where(usable, np.log(weight)[np.where(usable, cell, 0)] + rng.gumbel(size=cell.shape), -np.inf)
    return np.argpartition(-score, count, axis=1)[:, :count]
