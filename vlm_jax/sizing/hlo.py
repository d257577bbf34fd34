"""Collectives of a compiled program, parsed from its HLO text.

XLA's cost analysis counts the body of a loop once and does not cover the network. Here every collective of the
scheduled program is counted with its bytes times the trip counts of the loops around it. In XLA:TPU's text:

1. A gather that overlaps with products is split over many fusions, each of which repeats the instruction: those with
   one `channel_id` are one collective.
2. A reduce-scatter may be written as an all-reduce inside a computation called all-reduce-scatter.
3. Transfers between slices go through the hosts and are written as annotated sends.
4. Groups are written as lists, as an iota, or as a mesh. They are named by the mesh axes along which the group of the
   first chip extends.

Wire bytes are what one chip sends in a ring over a group of n: (n - 1) / n of the result of a gather or of the operand
of a reduce-scatter or all-to-all, twice that for an all-reduce, everything for a permute.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16}  # types whose names do not match `_bits`
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
          "collective-broadcast")  # fmt: skip
SLICE = "slice"  # the mesh axis across slices
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLS = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program, over all its trips."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that the group spans
    group: int  # chips in the group
    trips: int  # executions per call of the program
    result: tuple[str, ...]  # shapes of the results, "bf16[4096,11008]"
    wire_bytes: float  # sent by one chip over all trips
    beside_products: bool  # overlapped with products
    source: str  # its op_name

    @property
    def whole(self) -> float:
        """Bytes of the largest result."""
        return max(map(shape_bytes, self.result), default=0.0)


class _Line(NamedTuple):
    name: str
    opcode: str
    result: str
    text: str


def shape_bytes(shape: str) -> float:
    """Bytes of `"bf16[4096,11008]"`, or the sum over several shapes in a text; tokens have none."""
    arrays = ((_bits(kind), [int(size) for size in sizes.split(",") if size]) for kind, sizes in _SHAPE.findall(shape))
    return sum((bits / 8 * math.prod(sizes) for bits, sizes in arrays), 0.0)


def _bits(kind: str) -> int:
    """Bits of one element: `f32`, `s4`, `f8e4m3fn`."""
    match = re.match(r"[fsuc](\d+)", kind)
    return _BITS.get(kind, int(match[1]) if match else 0)


def collectives(text: str, mesh: Mapping[str, int], open_trips: int = 1) -> list[Collective]:
    """Collectives of a compiled program, the largest first. `mesh` names the axes, slowest first; `open_trips` is the
    trip count of loops without a known one (decoding, until every row has ended).
    """
    computations, entry = _computations(text)
    trips = _trips(computations, entry, open_trips)
    found: dict[tuple[str, str], Collective] = {}
    for computation, lines in computations.items():
        for line in lines:
            kind = line.opcode.removesuffix("-start")
            if "_xla_megascale_transfer_type" in line.text and line.opcode == "send" and trips.get(computation):
                found[computation, line.name] = _between_slices(line, trips[computation], mesh)
            if kind not in _KINDS or not trips.get(computation):
                continue
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            beside = (
                line.opcode.endswith("-start") or computation.startswith("async_collective") or "async_co" in line.text
            )
            each = _collective(kind, line, trips[computation], mesh)._replace(beside_products=beside)
            channel = re.search(r"channel_id=(\d+)", line.text)
            # Distinct permutes share a channel; so do the parts of a reduce-scatter that several computations hold.
            shared = channel is None or kind in ("collective-permute", "reduce-scatter")
            key = (kind, line.name if shared or channel is None else channel[1])
            if key not in found or each.wire_bytes > found[key].wire_bytes:
                found[key] = each
    return sorted((each for each in found.values() if each.group > 1), key=lambda each: -each.wire_bytes)


def compiler_cycles(text: str, open_trips: int = 1) -> float:
    """XLA:TPU's own estimate of compute and memory cycles of one call; 0 without estimates.

    The estimate of a fusion includes the computations that it calls.
    """
    computations, entry = _computations(text)
    trips = _trips(computations, entry, open_trips)
    scheduled = {entry} | {
        name for lines in computations.values() for line in lines if line.opcode in ("while", "conditional")
        for name in re.findall(r"(?:body=|condition=|branch_computations=\{(?:[^}]*[ ,])?)%?([\w.-]+)", line.text)
    }  # fmt: skip
    total = 0
    for computation in scheduled:
        for line in computations.get(computation, ()):
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line.text):
                total += trips.get(computation, 0) * int(estimate[1])
    return float(total)


def _collective(kind: str, line: _Line, trips: int, mesh: Mapping[str, int]) -> Collective:
    shapes = [f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(line.result) if _bits(kind)]
    if line.opcode == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if line.opcode == "collective-permute-start":  # (operand, result, contexts)
        shapes = shapes[:1]
    group, axes = _group(line.text, mesh)
    size = sum(map(shape_bytes, shapes))
    if line.opcode.startswith("reduce-scatter"):  # its result is one shard
        size *= group
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    source = re.search(r'op_name="([^"]*)"', line.text)
    return Collective(
        kind, axes, group, trips, tuple(shapes), size * factor * trips, False, source[1] if source else ""
    )


def _between_slices(line: _Line, trips: int, mesh: Mapping[str, int]) -> Collective:
    """A transfer over the data-centre network: a send of (array, contexts) annotated with its collective."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.text)
    name = kind[1].lower().replace("_", "-") if kind else "send"
    shape = "{}[{}]".format(*next((found for found in _SHAPE.findall(line.result) if _bits(found[0])), ("u8", "0")))
    slices = max(mesh.get(SLICE, 1), 2)
    factor = 2 * (slices - 1) / slices if name == "all-reduce" else 1.0
    return Collective(name, (SLICE,), slices, trips, (shape,), factor * shape_bytes(shape) * trips, True, "")


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Instructions by computation, and the name of the entry computation."""
    computations: dict[str, list[_Line]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(" " + found[2])
            if opcode:
                current.append(_Line(found[1], opcode[1], found[2][: opcode.start()], found[2]))
    return computations, entry


def _trips(computations: Mapping[str, list[_Line]], entry: str, open_trips: int) -> dict[str, int]:
    """Executions of each computation per call, summed over its callers."""
    calls: dict[str, list[tuple[str, int]]] = {}
    for computation, lines in computations.items():
        for line in lines:
            times = _loop_trips(line.text, computations, open_trips) if line.opcode == "while" else 1
            callees = [(name, times) for _, name in _CALLS.findall(line.text)]
            callees += [(name.strip(" %"), 1) for group in _LISTS.findall(line.text) for name in group.split(",")]
            callees = callees[-1:] if line.opcode == "conditional" else callees  # the last branch does the most
            calls.setdefault(computation, []).extend((name, times) for name, times in callees if name in computations)
    order: list[str] = []
    done: set[str] = set()

    def visit(computation: str) -> None:
        if computation not in done:
            done.add(computation)
            for name, _ in calls.get(computation, ()):
                visit(name)
            order.append(computation)

    visit(entry)
    trips = dict.fromkeys(order, 0) | {entry: 1}
    for computation in reversed(order):
        for name, times in calls.get(computation, ()):
            trips[name] += trips[computation] * times
    return trips


def _loop_trips(line: str, computations: Mapping[str, list[_Line]], open_trips: int) -> int:
    """Trip count of a while: XLA's, else the constant in its condition (counters start at zero), else `open_trips`."""
    known = re.search(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [re.search(r"constant\((\d+)\)", each.text) for each in lines if each.opcode == "constant"]
    return max((int(bound[1]) for bound in bounds if bound), default=open_trips)


def _group(text: str, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Size of a group, and the mesh axes that the first chip's group spans."""
    chips = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        members = np.array([int(pairs[1]), int(pairs[2])])
    else:
        members = _first_group(text, chips)
    coords = np.stack(np.unravel_index(members, tuple(mesh.values())))
    axes = tuple(name for name, row in zip(mesh, coords, strict=True) if len(set(row.tolist())) > 1)
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
    """Chip ids reshaped to these sizes and transposed, flat."""
    ids = np.arange(chips)
    if sizes:
        ids = ids.reshape([int(size) for size in sizes.split(",")])
    return (ids.transpose([int(axis) for axis in order.split(",")]) if order else ids).reshape(-1)
