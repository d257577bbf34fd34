"""The table of architectures in docs/models.md: all that are read, what they are written as, and tests that exist."""

import importlib
import json
import re
from pathlib import Path

import pytest

from tests.checkpoints import test_importers_decoders as decoders
from tests.checkpoints import test_llava_layout as llava
from tests.checkpoints import test_vision_import as vision
from tests.golden import peers_decoders
from vlm_jax.checkpoints import inspection
from vlm_jax.checkpoints.huggingface import exporting
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
HEADER = "| read | which are | written | proven by, in `tests/checkpoints/` |\n"
TABLE = PAGE.partition(HEADER)[2].partition("\n\n")[0].rstrip()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.splitlines()[1:]]
# What the tensors of a big_vision checkpoint of each kind are called.
OF_BIG_VISION = {"SigLIP, one tower": "params/", "SigLIP, two towers": "params/txt/", "PaliGemma 1, 2": "params/llm/"}
DECODERS = peers_decoders.read()
WHOLE_GEMMA3 = "test_the_text_part_of_a_whole_gemma3_is_the_references"  # its cases are layouts of one model


def named(cell: str) -> tuple[str, str, list[str]]:
    """`file.py::test[one]` `[two]` -> (file, test, cases)."""
    file, test = re.match(r"`(\w+)\.py::(\w+)\[", cell).groups()
    return file, test, re.findall(r"\[([\w.]+)\]`", cell)


def architecture(case: str) -> str:
    """What the golden files say that a case is."""
    if case in DECODERS:
        return DECODERS[case].config["architectures"][0]
    golden = llava.GOLDEN if case in llava.peers.CASES else vision.HF
    return json.loads(str(golden[f"{case}/files"]))["config"]["architectures"][0]


def test_every_architecture_has_a_row() -> None:
    names = [name.strip("`") for name, *_ in ROWS if ".npz" not in name]
    assert sorted(names) == sorted(inspection.architectures())
    assert sorted(kind for name, kind, *_ in ROWS if ".npz" in name) == sorted(OF_BIG_VISION)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_tests_of_a_row_are_there_and_are_about_it(row: list[str]) -> None:
    name, kind, _, proof = row
    file, test, cases = named(proof)
    function = getattr(importlib.import_module(f"tests.checkpoints.{file}"), test)
    (there,) = [mark.args[1] for mark in function.pytestmark if mark.name == "parametrize"]
    assert cases
    assert set(cases) <= set(there)
    for case in cases:
        if ".npz" in name:
            shapes = json.loads(str(vision.BV[f"{case}/files"]))["shapes"]
            assert any(tensor.startswith(OF_BIG_VISION[kind]) for tensor in shapes)
        elif test != WHOLE_GEMMA3:
            assert architecture(case) == name.strip("`")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if WHOLE_GEMMA3 not in row[3]], ids=lambda row: f"{row[0]} {row[1]}"
)
def test_a_model_is_written_as_its_row_says(row: list[str], tmp_path: Path) -> None:
    """A `.npz` as such, a folder under the architecture that is named."""
    name, _, written, proof = row
    kinds = set()
    for case in named(proof)[2]:
        place = tmp_path / case
        if case in DECODERS:
            there = inspection.inspect(decoders.folder(place, DECODERS[case]))
        elif case in llava.peers.CASES:
            there = inspection.inspect(llava.write(place, case))
        else:
            place.mkdir()
            there = inspection.inspect((vision.write_npz if ".npz" in name else vision.write)(place, case))
        whole = there.encoder is not None and there.decoder is not None
        parts = ModelSpec(there.encoder, None, None, there.decoder, there.mask)
        spec = inspection.model_spec(there) if whole else parts
        if ".npz" in name:
            exporting.check(place / "out.npz", spec, None)
        elif written.startswith("its parts"):
            with pytest.raises(UserError):
                exporting.layout(spec, there.image_token)
            for part in ("encoder", "decoder"):
                kinds |= set(exporting.layout(exporting.part_of(spec, part))[0]["architectures"])
        else:
            kinds |= set(exporting.layout(spec, there.image_token)[0]["architectures"])
    if ".npz" not in name:
        wanted = {name.strip("`")} if written.startswith("yes") else set()
        assert kinds == wanted | set(re.findall(r"`(\w+)`", written))
