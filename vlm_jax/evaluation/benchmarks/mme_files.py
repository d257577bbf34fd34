"""MME's official folders: a folder for each subtask, with a text file of questions and answers for each image.

Some subtasks have images and texts side by side, others in `images/` and `questions_answers_YN/`.
"""

import re
from pathlib import Path

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks.items import SHORT, without

YES_NO = "Please answer yes or no."

Key = tuple[str, str, str]  # subtask, image without suffix, bare question


def key(question_id: str, question: str) -> Key:
    """The identity of a question; `question_id` is "subtask/IMAGE.png"."""
    return question_id.split("/")[0], Path(question_id).stem, re.sub(r"\s+", " ", without(question, SHORT, YES_NO))


def read(root: Path) -> dict[Key, dict]:
    """All questions, as rows like those of lmms-lab's parquet. Raises `UserError` for a line without its answer."""
    rows = {}
    for text in sorted([*root.glob("*/*.txt"), *root.glob("*/questions_answers_YN/*.txt")]):
        task = text.relative_to(root).parts[0]
        folder = root / task / "images" if (root / task / "images").is_dir() else root / task
        found = [path for end in ("png", "jpg", "jpeg") if (path := folder / f"{text.stem}.{end}").is_file()]
        image = found[0] if found else folder / f"{text.stem}.jpg"
        for number, line in enumerate(reading.read_text(text).splitlines(), start=1):
            question, _, answer = (part.strip() for part in line.partition("\t"))
            if answer.lower() not in ("yes", "no"):
                raise UserError(f"{text}:{number}: expected a question, a tab and Yes or No, got {line!r}")
            name = f"{task}/{image.name}"
            row = {"question_id": name, "question": question, "answer": answer, "category": task, "image": (image,)}
            rows[key(name, question)] = row
    return rows
