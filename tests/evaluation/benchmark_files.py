"""Small folders in the layouts of the public benchmarks, with drawn images.

The field names, file names and spellings are those of the published files; the contents are made up.
"""

# ruff: noqa: E501  (a made-up row stands in one line)

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG")
    return out.getvalue()


def stored(seed: int) -> dict[str, Any]:
    return {"bytes": png(seed), "path": None}


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))  # of any suffix: readers go by content


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], images: Mapping[str, pa.DataType]) -> None:
    """Two rows a row group, as large files have many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows], images.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=2)


def answers(*texts: str) -> list[str]:
    """Ten annotators."""
    return [texts[i % len(texts)] for i in range(10)]


def gqa(root: Path) -> None:
    truth = {
        str(n): {"question": q, "answer": a, "imageId": f"n{n % 2}", "types": {"structural": s, "semantic": "attr"}}
        for n, (q, a, s) in enumerate(
            [("Is it red?", "yes", "verify"), ("What is it?", "cat", "query"), ("Who?", "boy", "query")]
        )
    }
    write_json(root / "gqa/data/testdev_balanced_questions.json", truth)
    lines = [
        {"question_id": k, "image": f"{v['imageId']}.jpg", "text": v["question"] + SHORT, "category": "default"}
        for k, v in truth.items()
    ]
    write_jsonl(root / "gqa/llava_gqa_testdev_balanced.jsonl", lines)
    for n in range(2):
        write_image(root / f"gqa/data/images/n{n}.jpg", n)
    rows = [
        {"id": k, "imageId": v["imageId"], "question": v["question"], "answer": v["answer"], "types": v["types"]}
        for k, v in truth.items()
    ]
    write_parquet(root / "lmms-lab/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet", rows, {})
    pictures = [{"id": f"n{n}", "image": stored(n)} for n in range(2)]
    write_parquet(root / "lmms-lab/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet", pictures, {"image": IMAGE})  # fmt: skip


def vqav2(root: Path) -> None:
    questions = [{"image_id": 42 + n // 2, "question": f"How many in {n}?", "question_id": 42000 + n} for n in range(3)]
    truth = [
        {
            "question_type": "how many", "multiple_choice_answer": "2", "image_id": q["image_id"],
            "question_id": q["question_id"], "answer_type": "number",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers("2", "two", "3"))],
        }
        for q in questions
    ]  # fmt: skip
    write_json(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": truth})
    for n in (42, 43):
        write_image(root / f"vqav2/val2014/COCO_val2014_{n:012d}.jpg", n)
    rows = [{**t, **q, "image": stored(q["image_id"])} for q, t in zip(questions, truth, strict=True)]
    write_parquet(root / "lmms-lab/VQAv2/data/validation-00000-of-00001.parquet", rows, {"image": IMAGE})
    hidden = [
        {
            "question_id": 7 + n,
            "image": "COCO_test2015_000000000007.jpg",
            "text": f"Is it {n}?" + SHORT,
            "category": "default",
        }
        for n in range(2)
    ]
    write_jsonl(root / "testdev/vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", hidden)
    write_jsonl(root / "testdev/vqav2/llava_vqav2_mscoco_test2015.jsonl", [*hidden, {**hidden[0], "question_id": 99}])
    write_image(root / "testdev/vqav2/test2015/COCO_test2015_000000000007.jpg", 7)  # fmt: skip


def textvqa(root: Path) -> None:
    data = [
        {
            "image_id": f"a{n // 2}",
            "question": f"what is the Brand {n}?",
            "question_id": 34602 + n,
            "answers": answers("nokia", "Nokia phone"),
        }
        for n in range(3)
    ]
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    tokens = [["MIA", "NOKIA"], [], ["x"]]
    lines = [
        {
            "question_id": row["image_id"], "image": f"{row['image_id']}.jpg", "category": "default",
            "text": f"{row['question'].capitalize()}\nReference OCR token: {', '.join(words)}" + SHORT,
        }
        for row, words in zip(data, tokens, strict=True)
    ]  # fmt: skip
    write_jsonl(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)
    for n in range(2):
        write_image(root / f"textvqa/train_images/a{n}.jpg", n)
    rows = [
        {**row, "image": stored(n), "ocr_tokens": words}
        for n, (row, words) in enumerate(zip(data, tokens, strict=True))
    ]
    write_parquet(root / "lmms-lab/textvqa/data/validation-00000-of-00001.parquet", rows, {"image": IMAGE, "ocr_tokens": pa.list_(pa.string())})  # fmt: skip


def vizwiz(root: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{n:08d}.jpg", "question": "what is THIS?", "answer_type": "other", "answerable": 1,
            "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers("unanswerable", "coke", "coke")],
        }
        for n in range(2)
    ]  # fmt: skip
    write_json(root / "vizwiz/val.json", rows)
    for row in rows:
        write_image(root / "vizwiz/val" / row["image"], 1)
    parquet = [
        {
            "question_id": f"VizWiz_val_{n:08d}",
            "image": stored(n),
            "question": "what is THIS?",
            "answers": answers("coke"),
            "category": "other",
        }
        for n in range(2)
    ]
    write_parquet(root / "lmms-lab/VizWiz-VQA/data/val-00000-of-00001.parquet", parquet, {"image": IMAGE})
    hidden = [
        {
            "question_id": n,
            "image": f"VizWiz_test_{n:08d}.jpg",
            "text": "What is this?" + UNANSWERABLE + SHORT,
            "category": "default",
        }
        for n in range(2)
    ]
    write_jsonl(root / "test/vizwiz/llava_test.jsonl", hidden)
    for row in hidden:
        write_image(root / "test/vizwiz/test" / row["image"], 2)  # fmt: skip


def pope(root: Path) -> None:
    """LLaVA's questions say "imange" and are in another order than the labels."""
    questions = [
        ("Is there a cat in the image?", "yes"),
        ("Is there a dog in the image?", "no"),
        ("Is there a cup in the image?", "no"),
    ]
    asked, rows = [], []
    for subset in ("adversarial", "popular", "random"):
        labels = [
            {"question_id": n + 1, "image": f"COCO_val2014_{n % 2:012d}.jpg", "text": q, "label": a}
            for n, (q, a) in enumerate(questions)
        ]
        write_jsonl(root / f"pope/coco/coco_pope_{subset}.json", labels)
        for row in reversed(labels):
            text = row["text"].replace("image", "imange") + SHORT
            asked.append({"question_id": len(asked), "image": row["image"], "text": text, "category": subset})
            rows.append({
                "id": str(len(rows)), "question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"],
                "image_source": row["image"][:-4], "image": stored(1), "category": subset,
            })  # fmt: skip
    write_jsonl(root / "pope/llava_pope_test.jsonl", asked)
    for n in range(2):
        write_image(root / f"pope/val2014/COCO_val2014_{n:012d}.jpg", n)
    write_parquet(root / "lmms-lab/POPE/data/test-00000-of-00001.parquet", rows, {"image": IMAGE})  # fmt: skip


def mme(root: Path) -> None:
    """One subtask with images and texts side by side, one with folders for each."""
    tree, asked, rows = root / "MME/MME_Benchmark_release_version", [], []
    places = {"count": ("count", "count"), "artwork": ("artwork/images", "artwork/questions_answers_YN")}
    for task, (images, texts) in places.items():
        for n in range(2):
            write_image(tree / images / f"{n:04d}.png", n)
            pairs = [(f"Is it {n}?  Please answer yes or no.", "Yes"), ("Is it ten? Please answer yes or no.", "No")]
            (tree / texts).mkdir(parents=True, exist_ok=True)
            (tree / texts / f"{n:04d}.txt").write_text("".join(f"{q}\t{a}\n" for q, a in pairs))
            for question, answer in pairs:
                name = f"{task}/{n:04d}.png"
                bare = question.replace("  ", " ").removesuffix(" Please answer yes or no.")
                asked.append(
                    {"question_id": name, "image": f"{images}/{n:04d}.png", "text": bare + SHORT, "category": "default"}
                )
                rows.append(
                    {
                        "question_id": name,
                        "image": stored(n),
                        "question": question.replace("  ", " "),
                        "answer": answer,
                        "category": task,
                    }
                )
    write_jsonl(root / "MME/llava_mme.jsonl", asked)
    write_parquet(root / "lmms-lab/MME/data/test-00000-of-00001.parquet", rows, {"image": IMAGE})  # fmt: skip


def mmbench(root: Path) -> None:
    """Two questions; the first has a hint, three options and their rotations, the second two options and no rotation."""
    options = ["a cat", "a dog", "nan"]
    base = {
        "question": "What is it?",
        "hint": "Look.",
        "category": "naming",
        "l2-category": "perception",
        "source": "drawn",
        "comment": "",
    }
    rows = [
        {
            "index": 241 + k * 1_000_000,
            "A": options[k % 2],
            "B": options[(k + 1) % 2],
            "C": "nan",
            "D": "nan",
            "answer": "AB"[k],
            **base,
        }
        for k in range(2)
    ]
    rows.append(
        {**rows[0], "index": 252, "question": "Where?", "hint": "nan", "A": "here", "B": "there", "answer": "B"}
    )
    header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
    ]
    lines = ["\t".join(header)]
    for row in rows:
        image = "241" if row["index"] > 1_000_000 else base64.b64encode(png(row["index"])).decode()
        lines.append("\t".join(str({**row, "image": image}[name]) for name in header))
    (root / "mmbench").mkdir(parents=True)
    (root / "mmbench/mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n")
    parquet = [
        {
            **row,
            "index": str(row["index"]),
            "image": stored(row["index"] % 1_000_000),
            "L2-category": row.pop("l2-category"),
        }
        for row in rows
    ]
    for row in parquet:
        del row["l2-category"]
    write_parquet(root / "lmms-lab/MMBench/en/dev-00000-of-00001.parquet", parquet, {"image": IMAGE})  # fmt: skip


def scienceqa(root: Path) -> None:
    problems = {
        str(n): {
            "question": f"Which is {n}?", "choices": ["one", "two", "three"][: 2 + n % 2], "answer": n % 2, "hint": "Read." * (n == 1),
            "image": "image.png" if n else None, "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "split": "test",
        }
        for n in range(3)
    }  # fmt: skip
    write_json(root / "scienceqa/problems.json", problems)
    write_json(root / "scienceqa/pid_splits.json", {"test": list(problems), "train": []})
    asked = []
    for key, row in problems.items():
        options = "\n".join(f"{'ABC'[i]}. {c}" for i, c in enumerate(row["choices"]))
        text = f"Context: {row['hint']}\n" * bool(row["hint"]) + f"{row['question']}\n{options}"
        line = {
            "id": key,
            "conversations": [
                {"from": "human", "value": "<image>\n" * bool(row["image"]) + text},
                {"from": "gpt", "value": "x"},
            ],
        }
        if row["image"]:
            line["image"] = f"{key}/image.png"
            write_image(root / f"scienceqa/images/test/{key}/image.png", int(key))
        asked.append(line)
    write_json(root / "scienceqa/llava_test_CQM-A.json", asked)
    rows = [{**row, "image": stored(n) if row["image"] else None} for n, row in enumerate(problems.values())]
    write_parquet(root / "lmms-lab/ScienceQA/ScienceQA-FULL/test-00000-of-00001.parquet", rows, {"image": IMAGE})  # fmt: skip


def seed(root: Path) -> None:
    """Question 49914 occurs twice."""
    truth = [
        {
            "answer": "AB"[n % 2], "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
            "data_id": f"d{n}", "data_type": "image" if n < 2 else "video", "question": f"Which is {n}?",
            "question_id": name, "question_type_id": 1 if n < 2 else 10, "segment": [],
        }
        for n, name in enumerate(("49914", "101670", "v1_0"))
    ]  # fmt: skip
    write_json(root / "seed_bench/SEED-Bench.json", {"questions": truth, "question_type": {"Scene": 1, "Action": 10}})
    asked = []
    for row in [*truth, truth[0]]:
        kind = "SEED-Bench-image" if row["data_type"] == "image" else "SEED-Bench-video-image"
        write_image(root / f"seed_bench/{kind}/{row['data_id']}", 3)
        text = row["question"] + "".join(f"\n{c.upper()}. {row[f'choice_{c}']}" for c in "abcd") + LETTER
        asked.append(
            {
                "question_id": row["question_id"],
                "image": f"{kind}/{row['data_id']}",
                "text": text,
                "category": row["data_type"],
            }
        )
    write_jsonl(root / "seed_bench/llava-seed-bench.jsonl", asked)
    rows = [
        {**row, "image": [stored(4), stored(5)][: 1 + (row["data_type"] == "video")], "segment": None} for row in truth
    ]
    write_parquet(root / "lmms-lab/SEED-Bench/data/test-00000-of-00001.parquet", rows, {"image": pa.list_(IMAGE)})  # fmt: skip


def ai2d(root: Path) -> None:
    rows = [
        {"question": f"Which is {n}?", "options": ["leaf", "root", "stem", "bud"], "answer": str(n), "image": stored(n)}
        for n in range(3)
    ]
    write_parquet(root / "lmms-lab/ai2d/data/test-00000-of-00001.parquet", rows, {"image": IMAGE})


def chartqa(root: Path) -> None:
    rows = []
    for kind, label in (("human", "14"), ("augmented", "Yes")):
        lines = [{"imgname": f"{kind}.png", "query": "How many?", "label": label} for _ in range(2)]
        write_json(root / f"chartqa/ChartQA Dataset/test/test_{kind}.json", lines)
        write_image(root / f"chartqa/ChartQA Dataset/test/png/{kind}.png", 1)
        rows += [
            {"type": f"{kind}_test", "question": "How many?", "answer": label, "image": stored(1)} for _ in range(2)
        ]
    write_parquet(root / "lmms-lab/ChartQA/data/test-00000-of-00001.parquet", rows, {"image": IMAGE})


def docvqa(root: Path) -> None:
    rows = [
        {
            "questionId": 49153 + n, "question": "What is the date?", "question_types": ["form", "layout"][: n + 1],
            "image": f"documents/d{n}.png", "docId": 14465, "answers": ["1/8/93", "8 Jan"], "data_split": "val",
        }
        for n in range(2)
    ]  # fmt: skip
    write_json(root / "docvqa/val_v1.0.json", {"dataset_name": "SP-DocVQA", "data": rows})
    for n in range(2):
        write_image(root / f"docvqa/documents/d{n}.png", n)
    parquet = [{**row, "questionId": str(row["questionId"]), "image": stored(n)} for n, row in enumerate(rows)]
    write_parquet(root / "lmms-lab/DocVQA/DocVQA/validation-00000-of-00001.parquet", parquet, {"image": IMAGE})


def infovqa(root: Path) -> None:
    rows = [
        {
            "questionId": 98313 + n, "question": "Which country?", "image_local_name": f"{20471 + n}.jpeg",
            "image_url": "https://example.com/a.jpeg", "answers": ["canada"], "answer_type": ["single span"],
            "operation/reasoning": [], "data_split": "val", "ocr": "",
        }
        for n in range(2)
    ]  # fmt: skip
    write_json(root / "infovqa/infographicsVQA_val_v1.0_withQT.json", {"data": rows})
    for row in rows:
        write_image(root / "infovqa/infographicsvqa_images" / row["image_local_name"], 1)
    parquet = [{**row, "questionId": str(row["questionId"]), "image": stored(n)} for n, row in enumerate(rows)]
    write_parquet(root / "lmms-lab/DocVQA/InfographicVQA/validation-00000-of-00001.parquet", parquet, {"image": IMAGE, "operation/reasoning": pa.list_(pa.string())})  # fmt: skip


def ocrbench(root: Path) -> None:
    rows = [
        {
            "dataset_name": "IIIT5K",
            "id": 0,
            "image_path": "IIIT5K/1.png",
            "question": "what is written in the image?",
            "answers": ["CENTRE"],
            "type": "Regular Text Recognition",
        },
        {
            "dataset_name": "HME100k",
            "id": 0,
            "image_path": "HME/1.jpg",
            "question": "Write the formula.",
            "answers": "\\frac { a } { b }",
            "type": "Handwritten Mathematical Expression Recognition",
        },
    ]
    write_json(root / "OCRBench/OCRBench.json", rows)
    for row in rows:
        write_image(root / "OCRBench/OCRBench_Images" / row["image_path"], 1)
    parquet = [
        {
            "dataset": r["dataset_name"],
            "question": r["question"],
            "question_type": r["type"],
            "answer": [r["answers"]] if isinstance(r["answers"], str) else r["answers"],
            "image": stored(1),
        }
        for r in rows
    ]
    write_parquet(root / "lmms-lab/OCRBench/data/test-00000-of-00001.parquet", parquet, {"image": IMAGE})  # fmt: skip


def mmmu(root: Path) -> None:
    """A question with two images, and an open one whose answers are a list as text."""
    rows = [
        {
            "id": "validation_Art_Theory_1", "question": "Compare <image 1> and <image 2>.", "options": "['same', \"it's not\"]",
            "answer": "B", "question_type": "multiple-choice", "subfield": "x", "image_1": stored(1), "image_2": stored(2),
        },
        {
            "id": "validation_Physics_2", "question": "How far? <image 1>", "options": "[]", "answer": "['24', 'twenty-four']",
            "question_type": "open", "subfield": "y", "image_1": stored(3), "image_2": None,
        },
    ]  # fmt: skip
    write_parquet(root / "lmms-lab/MMMU/data/validation-00000-of-00001.parquet", rows, {"image_1": IMAGE, "image_2": IMAGE})  # fmt: skip


def mathvista(root: Path) -> None:
    base = {
        "image": "images/1.jpg",
        "unit": None,
        "query": "",
        "metadata": {"task": "geometry", "category": "math", "skills": ["arithmetic"]},
    }
    rows = [
        {
            "pid": "1",
            "question": "Find x.",
            "choices": ["3", "4"],
            "answer": "4",
            "question_type": "multi_choice",
            "answer_type": "text",
            "precision": None,
            **base,
        },
        {
            "pid": "2",
            "question": "How long?",
            "choices": None,
            "answer": "1.2",
            "question_type": "free_form",
            "answer_type": "float",
            "precision": 1.0,
            **base,
            "unit": "m",
        },
        {
            "pid": "3",
            "question": "How many?",
            "choices": None,
            "answer": "7",
            "question_type": "free_form",
            "answer_type": "integer",
            "precision": None,
            **base,
        },
    ]
    rows = [{**row, "decoded_image": stored(n)} for n, row in enumerate(rows)]
    write_parquet(root / "MathVista/data/testmini-00000-of-00001-725687bf7a18d64b.parquet", rows, {"decoded_image": IMAGE})  # fmt: skip


def easy_vqa(root: Path) -> None:
    questions = [
        ["what is the red shape?", "triangle", 0],
        ["is there a red shape?", "yes", 0],
        ["what is the color of the shape?", "teal", 1],
    ]
    write_json(root / "easy_vqa/data/test/questions.json", questions)
    for n in range(2):
        write_image(root / f"easy_vqa/data/test/images/{n}.png", n)


def own(root: Path) -> None:
    write_jsonl(
        root / "own/questions.jsonl",
        [
            {"question_id": 1, "image": "a.png", "text": "read row two", "answer": "4 7", "group": "rows"},
            {"question_id": 2, "image": "a.png", "text": "who?", "answer": ["Ada", "Ada L."]},
        ],
    )
    write_image(root / "own/a.png", 1)


WRITERS = (
    gqa, vqav2, textvqa, vizwiz, pope, mme, mmbench, scienceqa, seed, ai2d, chartqa, docvqa, infovqa, ocrbench, mmmu,
    mathvista, easy_vqa, own,
)  # fmt: skip


def write(root: Path) -> Path:
    """All layouts of all benchmarks."""
    for writer in WRITERS:
        writer(root)
    return root
