"""What a compiled program sends between chips, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing of the network. Here every collective is found
in the scheduled program, weighed by its bytes, and multiplied by the trips of the loops round it. Three things of
XLA:TPU's text need care:

1. A gather that runs beside products is split over many fusions, each of which repeats the instruction: those of one
   computation tree with one `channel_id` are one collective.
2. A sum of which each chip keeps a part stands as an all-reduce inside a computation called all-reduce-scatter: it
   costs a reduce-scatter.
3. Slices are joined by their hosts: what they exchange stands as sends with a note.
4. Groups are written as lists, as an iota, or as a mesh of their own. They are expanded, and named by the mesh axes
   along which the group of the first chip extends.

Wire bytes are what one chip sends in a ring over a group of n: (n - 1) / n of the result of a gather or of the operand
of a reduce-scatter or all-to-all, twice that for an all-reduce, everything for a permute.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16}  # of types whose names do not end in their bits
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
          "collective-broadcast")  # fmt: skip
SLICE = "slice"  # the mesh axis that hosts carry exchanges over
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLS = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One exchange of a program, with all its repetitions."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that the group spans
    group: int  # chips that take part
    trips: int  # how often it runs in one call of the program
    result: tuple[str, ...]  # "bf16[4096,11008]", of each array that it makes
    wire_bytes: float  # that one chip sends, over all trips
    beside_products: bool  # whether XLA runs it while products go on
    source: str  # where in the program it comes from

    @property
    def whole(self) -> float:
        """Bytes of the widest array that it handles, once."""
        return max(map(shape_bytes, self.result), default=0.0)


class _Line(NamedTuple):
    name: str
    opcode: str
    result: str
    text: str


def shape_bytes(shape: str) -> float:
    """`"bf16[4096,11008]"` -> its bytes; of several shapes in a text, the sum. Tokens weigh nothing."""
    return sum(
        (
            _bits(kind) / 8 * math.prod(int(size) for size in sizes.split(",") if size)
            for kind, sizes in _SHAPE.findall(shape)
        ),
        0.0,
    )


def _bits(kind: str) -> int:
    """Of one element: `f32`, `s4`, `f8e4m3fn`."""
    found = re.match(r"[fsuc](\d+)", kind)
    return _BITS.get(kind, int(found[1]) if found else 0)


def collectives(text: str, mesh: Mapping[str, int], open_trips: int = 1) -> list[Collective]:
    """Every collective of a compiled program, the heaviest first. `mesh` names the axes, slowest first; `open_trips` is
    how often a loop runs of which the program does not say it (decoding, until every row has ended).
    """
    rooms, entry = _computations(text)
    trips = _trips(rooms, entry, open_trips)
    seen: dict[tuple[str, str], Collective] = {}
    for room, lines in rooms.items():
        for line in lines:
            kind = line.opcode.removesuffix("-start")
            if "_xla_megascale_transfer_type" in line.text and line.opcode == "send" and trips.get(room):
                seen[room, line.name] = _between_slices(line, trips[room], mesh)
            if kind not in _KINDS or not trips.get(room):
                continue
            if kind == "all-reduce" and room.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            beside = line.opcode.endswith("-start") or room.startswith("async_collective") or "async_co" in line.text
            found = _collective(kind, line, trips[room], mesh)._replace(beside_products=beside)
            channel = re.search(r"channel_id=(\d+)", line.text)
            # Permutes share a channel and are each their own; so do the parts of a combined sum of several rooms.
            own = kind == "collective-permute" or kind == "reduce-scatter" or channel is None
            key = (kind, line.name if own or channel is None else channel[1])
            if key not in seen or found.wire_bytes > seen[key].wire_bytes:
                seen[key] = found
    return sorted((found for found in seen.values() if found.group > 1), key=lambda found: -found.wire_bytes)


def compiler_cycles(text: str, open_trips: int = 1) -> float:
    """Cycles that XLA:TPU itself expects a chip to compute and to move memory for, in one call; 0 if it does not say.

    Its estimates stand at the fusions; what they call is part of them.
    """
    rooms, entry = _computations(text)
    trips = _trips(rooms, entry, open_trips)
    scheduled = {entry} | {
        name for lines in rooms.values() for line in lines if line.opcode == "while"
        for name in re.findall(r"(?:body|condition)=%?([\w.-]+)", line.text)
    }  # fmt: skip
    estimates = (
        (trips.get(room, 0), re.search(r'"estimated_cycles":"(\d+)"', line.text))
        for room in scheduled
        for line in rooms.get(room, ())
    )
    return float(sum(times * int(found[1]) for times, found in estimates if found))


def _collective(kind: str, line: _Line, trips: int, mesh: Mapping[str, int]) -> Collective:
    shapes = [f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(line.result) if _bits(kind)]
    if line.opcode == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if line.opcode == "collective-permute-start":  # (operand, result, contexts)
        shapes = shapes[:1]
    group, axes = _group(line.text, mesh)
    size = sum(map(shape_bytes, shapes))
    if line.opcode.startswith("reduce-scatter"):  # the text of a true one shows the part that is kept
        size *= group
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    source = re.search(r'op_name="([^"]*)"', line.text)
    return Collective(
        kind, axes, group, trips, tuple(shapes), size * factor * trips, False, source[1] if source else ""
    )


def _between_slices(line: _Line, trips: int, mesh: Mapping[str, int]) -> Collective:
    """What hosts exchange over the data-centre network: a send of (array, contexts) that names what becomes of it."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.text)
    name = kind[1].lower().replace("_", "-") if kind else "send"
    shape = "{}[{}]".format(*next((found for found in _SHAPE.findall(line.result) if _bits(found[0])), ("u8", "0")))
    slices = max(mesh.get(SLICE, 1), 2)
    factor = 2 * (slices - 1) / slices if name == "all-reduce" else 1.0
    return Collective(name, (SLICE,), slices, trips, (shape,), factor * shape_bytes(shape) * trips, True, "")


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Name -> instructions, and the name of the entry."""
    rooms: dict[str, list[_Line]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = rooms.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(" " + found[2])
            if opcode:
                current.append(_Line(found[1], opcode[1], found[2][: opcode.start()], found[2]))
    return rooms, entry


def _trips(rooms: Mapping[str, list[_Line]], entry: str, open_trips: int) -> dict[str, int]:
    """How often each computation runs in one call. One that several places call counts for all of them."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for room, lines in rooms.items():
        for line in lines:
            times = _loop_trips(line.text, rooms, open_trips) if line.opcode == "while" else 1
            callees = [(name, times) for _, name in _CALLS.findall(line.text)]
            callees += [(name.strip(" %"), 1) for group in _LISTS.findall(line.text) for name in group.split(",")]
            calls.setdefault(room, []).extend((name, times) for name, times in callees if name in rooms)
    order: list[str] = []
    done: set[str] = set()

    def visit(room: str) -> None:
        if room not in done:
            done.add(room)
            for name, _ in calls.get(room, ()):
                visit(name)
            order.append(room)

    visit(entry)
    trips = dict.fromkeys(order, 0) | {entry: 1}
    for room in reversed(order):
        for name, times in calls.get(room, ()):
            trips[name] += trips[room] * times
    return trips


def _loop_trips(line: str, rooms: Mapping[str, list[_Line]], open_trips: int) -> int:
    """Of a while: what XLA knows of it, else the constant that its condition compares a counter from zero with."""
    known = re.search(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = rooms.get(condition[1], []) if condition else []
    bounds = [re.search(r"constant\((\d+)\)", each.text) for each in lines if each.opcode == "constant"]
    return max((int(bound[1]) for bound in bounds if bound), default=open_trips)


def _group(text: str, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Chips in a group, and the mesh axes along which the first chip's group extends."""
    chips = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        members = np.array([int(pairs[1]), int(pairs[2])])
    else:
        members = _first_group(text, chips)
    places = np.stack(np.unravel_index(members, tuple(mesh.values())))
    axes = tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
    return len(members), axes


def _first_group(text: str, chips: int) -> np.ndarray:
    if own := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", own[1])}
        ids = _iota(own[2], own[3], chips).reshape(tuple(sizes.values()))
        spanned = set(re.findall(r"'(\w+)'", own[4]))
        return ids[tuple(slice(None) if name in spanned else 0 for name in sizes)].reshape(-1)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[3], iota[4], chips).reshape(int(iota[1]), int(iota[2]))[0]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(chip) for chip in listed[1].split(",")])
    return np.arange(chips)


def _iota(sizes: str | None, order: str | None, chips: int) -> np.ndarray:
    """Chips 0, 1, ... laid out in these sizes and transposed, flat."""
    ids = np.arange(chips)
    if sizes:
        ids = ids.reshape([int(size) for size in sizes.split(",")])
    return (ids.transpose([int(axis) for axis in order.split(",")]) if order else ids).reshape(-1)
