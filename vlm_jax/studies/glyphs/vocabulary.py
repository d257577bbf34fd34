"""The closed vocabulary of the suite. Questions and answers are words of it, separated by spaces."""

DIGITS = tuple("0123456789")
ORDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
READING = ("read", "row", "column", "all")
RELATIONS = (
    "built", "bought", "sold", "sent", "found", "lost", "painted", "named",
    "guarded", "carried", "repaired", "borrowed", "opened", "hid", "sealed", "owned",
)  # fmt: skip
PEOPLE = (
    "ada", "ben", "cora", "dan", "eva", "finn", "gil", "hana",
    "ivo", "jane", "kai", "lea", "mia", "nora", "otto", "pia",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross")
OPERATORS = ("plus", "minus", "times", "max", "min")
DIRECTIONS = ("left", "right", "above", "below")
SCENE = ("count", "nearest", "digit", "of", "and", "yes", "no")
PAD = "<pad>"
END = "<end>"
WORDS = (
    PAD, END, *DIGITS, *ORDINALS, *READING, "who", *RELATIONS, *PEOPLE,
    *COLOURS, *SHAPES, *OPERATORS, *DIRECTIONS, *SCENE,
)  # fmt: skip
