"""Answer files for the servers that keep a split's answers: EvalAI (VQAv2 test, VizWiz test) and MMBench."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from vlm_jax.core.files import atomic_write, write_text
from vlm_jax.evaluation.answers import Answer
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Item, Loaded
from vlm_jax.evaluation.benchmarks.mmbench_files import is_missing
from vlm_jax.evaluation.metrics import vqa

_TEST_IDS = ("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")


def write(name: str, loaded: Loaded, answers: Mapping[str, Answer], data: Path, folder: Path) -> Path | None:
    """Writes the submission file of a benchmark and returns its path; None where no server scores this split."""
    if name not in _WRITERS or (name != "mmbench" and any(item.references for item in loaded.items)):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    texts = [answers[item.id].text.strip() for item in loaded.items]
    return _WRITERS[name](loaded.items, texts, data, folder)


def _vqav2(items: Sequence[Item], texts: Sequence[str], data: Path, folder: Path) -> Path:
    """[{"question_id": 1, "answer": "..."}], as the EvalAI processor prepares answers. The server expects all questions
    of test2015; with its list beside the data, those outside test-dev are filled with "".
    """
    by_id = {int(item.question_id): vqa.evalai(text) for item, text in zip(items, texts, strict=True)}
    path, ids = folder / "vqav2_testdev.json", list(by_id)
    places = [folder / file for folder in files.find_folders(data, ("vqav2",)) for file in _TEST_IDS]
    if listed := next((place for place in places if place.is_file()), None):
        rows = files.read_json(listed)["questions"] if listed.suffix == ".json" else files.read_jsonl(listed)
        ids = list(dict.fromkeys([*(int(row["question_id"]) for row in rows), *by_id]))
    write_text(path, json.dumps([{"question_id": key, "answer": by_id.get(key, "")} for key in ids]))
    return path


def _vizwiz(items: Sequence[Item], texts: Sequence[str], data: Path, folder: Path) -> Path:
    """[{"image": "VizWiz_test_00000000.jpg", "answer": "..."}]."""
    path = folder / "vizwiz_test.json"
    rows = [{"image": i.extra["image"], "answer": vqa.evalai(text)} for i, text in zip(items, texts, strict=True)]
    write_text(path, json.dumps(rows))
    return path


def _mmbench(items: Sequence[Item], texts: Sequence[str], data: Path, folder: Path) -> Path:
    """A spreadsheet for the server of OpenCompass, with the columns of LLaVA's `convert_mmbench_for_submission.py`."""
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    columns = [name for name in columns if name == "prediction" or name in items[0].extra["row"]]
    table = [columns]
    for item, text in zip(items, texts, strict=True):
        row = item.extra["row"] | {"prediction": text}
        table.append(tuple("" if is_missing(row.get(name)) else str(row[name]) for name in columns))
    path = folder / "mmbench.xlsx"
    write_xlsx(path, table)
    return path


def write_xlsx(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """A workbook with one sheet of texts (Office Open XML, ECMA-376, with inline strings); integers in the first column
    are numbers.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(_cell(f"{_column(i)}{number}", value, i == 0) for i, value in enumerate(row))
        lines.append(f'<row r="{number}">{cells}</row>')
    space = "http://schemas.openxmlformats.org"
    main, relations = f"{space}/spreadsheetml/2006/main", f"{space}/package/2006/relationships"
    office, types = f"{space}/officeDocument/2006/relationships", "application/vnd.openxmlformats-officedocument"
    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{space}/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{types}.spreadsheetml.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{types}.spreadsheetml.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{relations}"><Relationship Id="rId1" Type="{office}/officeDocument"'
        ' Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="Sheet1" sheetId="1"'
        ' r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{relations}"><Relationship Id="rId1"'
        f' Type="{office}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{"".join(lines)}</sheetData></worksheet>',
    }
    with atomic_write(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, head + text)


def _column(index: int) -> str:
    return chr(ord("A") + index)


def _cell(place: str, value: str, is_index: bool) -> str:
    if is_index and value.isdigit():
        return f'<c r="{place}"><v>{value}</v></c>'
    text = escape("".join(char for char in value if char >= " " or char in "\t\n"))
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


_WRITERS: dict[str, Callable[[Sequence[Item], Sequence[str], Path, Path], Path]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "mmbench": _mmbench,
}
