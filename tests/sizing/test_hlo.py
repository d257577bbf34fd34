"""Collectives of small programs, against bytes counted by hand."""

from pathlib import Path

import pytest

from vlm_jax.sizing import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 2}

# A loop of five trips round a split gather, a sum that is scattered and a permute, and a sum behind the loop.
PROGRAM = (Path(__file__).parents[1] / "golden" / "program_loop.txt").read_text()


def test_collectives_of_a_program_by_hand() -> None:
    """The gather is one of eight chips although two fusions name it, and runs five times, and one of one is silent."""
    found = {each.kind: each for each in hlo.collectives(PROGRAM, MESH)}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    permute, reduce = found["collective-permute"], found["all-reduce"]
    assert (gather.group, gather.axes, gather.trips) == (8, ("fsdp", "tensor"), 5)
    assert gather.wire_bytes == 5 * 128 * 128 * 2 * 7 / 8
    assert gather.result == ("bf16[128,128]",)
    assert gather.source == "jit(step)/while/body/mlp"
    assert (scatter.group, scatter.axes, scatter.trips) == (4, ("fsdp",), 5)
    assert scatter.wire_bytes == 5 * 64 * 128 * 2 * 3 / 4
    assert (permute.axes, permute.wire_bytes) == (("tensor",), 5 * 32 * 4)
    assert (reduce.group, reduce.axes, reduce.trips) == (2, ("data",), 1)
    assert reduce.wire_bytes == 2 * (8 + 1000) * 4 / 2
    assert {each.kind for each in found.values() if each.beside_products} == {"all-gather", "collective-permute"}
    assert reduce.whole == 4000


def test_a_loop_in_a_loop_multiplies() -> None:
    text = PROGRAM.replace("%bound = s32[] constant(5)", "%bound = s32[] constant(5)\n  %other = f32[] constant(7.5)")
    inner = "%nest = (s32[], bf16[16,128]{1,0}) while(%start), condition=%condition, body=%middle"
    text = text.replace("%loop = (s32[], bf16[16,128]{1,0}) while(%start), condition=%condition, body=%body", inner)
    middle = """%middle (carry.2: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %carry.2 = (s32[], bf16[16,128]{1,0}) parameter(0)
  ROOT %in = (s32[], bf16[16,128]{1,0}) while(%carry.2), condition=%c, body=%body, {"known_trip_count":{"n":"3"}}
}

ENTRY"""
    trips = {each.kind: each.trips for each in hlo.collectives(text.replace("ENTRY", middle, 1), MESH)}
    assert trips == {"all-gather": 15, "reduce-scatter": 15, "collective-permute": 15, "all-reduce": 1}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,8},{1,9}}", ("data",)),
        ("replica_groups={{0,2,4,6}}", ("fsdp",)),
        ("replica_groups={{0,1},{2,3}}", ("tensor",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[2,8]<=[16]", ("fsdp", "tensor")),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}", ("data", "fsdp")),
    ],
)
def test_groups_are_named_by_the_mesh(groups: str, axes: tuple[str, ...]) -> None:
    lines = (
        "ENTRY %main (p: f32[4]) -> f32[4] {",
        "  %p = f32[4]{0} parameter(0)",
        f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add",
        "}",
    )
    (found,) = hlo.collectives("\n".join(lines), MESH)
    assert found.axes == axes
    assert found.wire_bytes == pytest.approx(2 * 16 * (found.group - 1) / found.group)


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30), ("(s8[4]{0}, pred[2], u32[])", 10), ("token[]", 0),
     ("f8e4m3fn[10]", 10)],
)  # fmt: skip
def test_bytes_of_shapes(shape: str, size: float) -> None:
    assert hlo.shape_bytes(shape) == size


def test_transfers_between_slices_are_collectives() -> None:
    """A sum over three slices: each sends its array to the others in a ring, twice two thirds."""
    note = '{_xla_megascale_transfer_type="ALL_REDUCE",_xla_megascale_target="{1,2,3}x{0:15}"}'
    lines = (
        "ENTRY %main (p: bf16[6,8]) -> bf16[6,8] {",
        "  %p = bf16[6,8]{1,0} parameter(0)",
        f"  %s = (bf16[6,8]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=5, frontend_attributes={note}",
        "  %own = (bf16[6,8]{1,0}, u32[], token[]) send(%p, %t), channel_id=6",
        "  ROOT %r = bf16[6,8]{1,0} copy(%p)",
        "}",
    )
    (found,) = hlo.collectives("\n".join(lines), {"slice": 3, **MESH})
    assert (found.kind, found.axes, found.group) == ("all-reduce", ("slice",), 3)
    assert found.wire_bytes == pytest.approx(2 * 2 / 3 * 96)


def test_cycles_of_loops_count_once_a_trip() -> None:
    """Seven in each of five trips and eleven behind them; the nine inside a fusion are part of its seven."""
    assert hlo.compiler_cycles(PROGRAM) == 0
    text = PROGRAM.replace("calls=%all-reduce-scatter.1", 'calls=%all-reduce-scatter.1, {"estimated_cycles":"7"}')
    text = text.replace("dynamic_slice_sizes={16,128}", 'dynamic_slice_sizes={16,128}, {"estimated_cycles":"9"}')
    text = text.replace(
        "%alone = f32[8]{0} all-reduce(%p0),", '%alone = f32[8]{0} all-reduce(%p0), {"estimated_cycles":"11"},'
    )
    assert hlo.compiler_cycles(text) == 5 * 7 + 11


def test_of_a_conditional_the_last_branch_is_counted() -> None:
    """As of one program that always takes it."""
    text = """HloModule m

%few (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, backend_config={"estimated_cycles":"3"}
}

%all (b: f32[64]) -> f32[64] {
  %b = f32[64]{0} parameter(0)
  ROOT %t = f32[64]{0} all-reduce(%b), channel_id=2, replica_groups={{0,1}}, backend_config={"estimated_cycles":"40"}
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%few, %all}
}
"""
    (found,) = hlo.collectives(text, {"data": 2})
    assert (found.trips, found.wire_bytes) == (1, 4 * 64)  # twice (n - 1) / n of them, with n = 2
    assert hlo.compiler_cycles(text) == 40
