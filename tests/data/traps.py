"""Sixty items as LLaVA's files have them, every known defect among them, over photographs that scikit-image ships.

Sources of the defects: issues 593, 601, 835, 1618 of haotian-liu/LLaVA and its `docs/Data.md`, the files themselves.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
from PIL import Image

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "color.png")
SIDE = 72  # pixels of the shorter edge


class Traps(NamedTuple):
    """The files and what a reader must find in them. Keys are item numbers: ids repeat."""

    json: Path
    images: Path
    rows: list[dict[str, Any]]
    bad: dict[int, str]  # items that raise `BadItem`, with its reason
    undecodable: list[int]  # items whose image file is broken, which decoding finds
    text_only: list[int]


def build(folder: Path) -> Traps:
    """Writes traps.json and images/ in `folder`."""
    images = folder / "images"
    _write_images(images)
    rows, bad, undecodable = [], dict[int, str](), list[int]()

    def add(row: dict[str, Any], reason: str = "", broken: int = 0) -> None:
        if reason:
            bad[len(rows)] = reason
        if broken:
            undecodable.append(len(rows))
        rows.append(row)

    for number in range(12):  # ordinary rows of one to three questions; the ids of two repeat, some are numbers
        talk = [
            f"<image>\nWhat is in photograph {number}?",
            "A thing.",
            "What colour is it?",
            "Red.",
            "Where?",
            "Here.",
        ]
        id = {3: "000000000002", 4: 4, 5: 4}.get(number, f"{number:012d}")
        add(item(id, f"coco/train2017/{number:012d}.jpg", *talk[: 2 * (number % 3 + 1)]))
    add(item("behind", "coco/train2017/000000000000.jpg", "What is this?\n<image>", "A thing."))
    add(item("inside", "coco/train2017/000000000000.jpg", "Look at <image> and say what it is.", "A thing."))
    add(item("no newline", "coco/train2017/000000000000.jpg", "<image>What is this?", "A thing."))
    add(item("spaces", "coco/train2017/000000000000.jpg", "  <image>  \n\n What is this?  ", "A thing. "))
    add(item("twice in one turn", "coco/train2017/000000000000.jpg", "<image>\nWhat is this?\n<image>", "A thing."))
    add(item("second turn", "coco/train2017/000000000000.jpg", "Hello.", "Hello.", "<image>\nWhat?", "A thing."))
    add(item("only the image", "coco/train2017/000000000000.jpg", "<image>", "A photograph of a thing."))
    add(
        item(
            "unicode", "coco/train2017/000000000001.jpg", "<image>\nQu'est-ce que c'est ? 这是什么", "Un objet. 东西 🚲"
        )
    )
    add(item("escapes", "coco/train2017/000000000001.jpg", '<image>\n"Quoted" \\ {braces} [brackets]', "\tTab\nline"))
    add(item("markup", "coco/train2017/000000000001.jpg", "<image>\nRead it.", "It says </s> and  ASSISTANT: so"))
    for name in ("as_gif", "as_png", "upper", "png_inside", "webp_inside", "frames", "progressive"):
        add(item(f"ocr {name}", f"ocr_vqa/images/{name}.jpg", "<image>\nWho wrote this book?", "Nobody."))
    add(item("no suffix", "ocr_vqa/images/upper", "<image>\nWho wrote this book?", "Nobody."))
    for name in ("rgba.png", "palette.png", "clear_palette.png", "cmyk.jpg", "deep.png", "grey.png", "grey_alpha.png"):
        add(item(f"mode {name}", f"modes/{name}", "<image>\nWhat is this?", "A thing."))
    add(item("mode bits", "modes/bits.png", "<image>\nWhat is this?", "A thing."))
    add(item("turned", "modes/turned.jpg", "<image>\nWhich way is up?", "Up."))
    for name in ("truncated.jpg", "empty.jpg", "page.jpg"):
        add(item(f"broken {name}", f"vg/VG_100K_2/{name}", "<image>\nWhat is this?", "A thing."), broken=1)
    add(item("text", None, "What is two and two?", "Four."))
    add({**item("text with a model", None, "Hello.", "Hello.", "Again.", "Hello."), "model": ""})
    add(item("text about <image>", None, "What does <image> mean in HTML?", "The tag is <img>, not <image>."))
    pair = ["coco/train2017/000000000000.jpg", "modes/rgba.png"]
    add(item("interleaved", pair, "First <image>, then <image>: which is older?", "The first."))
    add(item("one a turn", pair, "What is <image>?", "A thing.", "<image>\nAnd this?", "Another."))
    add(item("list of one", pair[:1], "What is this?\n<image>", "A thing."))
    starts = {"from": "gpt", "value": "Hello, how can I help?"}
    row = item("answer first", pair[0], "<image>\nWhat is this?", "A thing.")
    add({**row, "conversations": [starts, *row["conversations"]]})
    row = item("roles", pair[0], "<image>\nWhat is this?", "A thing.")
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A thing."}]
    add({**row, "conversations": messages})

    add(item("missing", "ocr_vqa/images/0000000000.jpg", "<image>\nWho?", "Nobody."), "missing image")
    add(item("empty question", pair[0], "<image>\nWhat?", "A thing.", "", "A thing."), "empty turn")
    add(item("empty answer", pair[0], "<image>\nWhat?", "", "And?", "A thing."), "empty turn")
    add(item("blank last answer", pair[0], "<image>\nWhat?", " \n"), "empty turn")
    add(item("two turns", pair[0], "<image>\nWhat?", "A.", "<image>\nAnd?", "B."), "placeholder without an image")
    add(item("three for two", pair, "<image><image><image>\nWhich?", "A."), "placeholder without an image")
    add(item("one for two", pair, "<image>\nWhich?", "A."), "image without a placeholder")
    add(item("no placeholder", pair[0], "What is this?", "A."), "image without a placeholder")
    add(item("unanswered", pair[0], "<image>\nWhat?", "A.", "And?"), "no answer")
    row = item("same role", pair[0], "<image>\nWhat?", "A.")
    add({**row, "conversations": [row["conversations"][0], *row["conversations"]]}, "roles do not alternate")
    assert len(rows) == 60, len(rows)
    path = folder / "traps.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    text_only = [number for number, row in enumerate(rows) if "image" not in row]
    return Traps(path, images, rows, bad, undecodable, text_only)


def item(id: str | int, image: str | list[str] | None, *talk: str) -> dict[str, Any]:
    """A row; question and answer in turn. Without an image it has no such key."""
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(talk)]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


def photo(number: int) -> Image.Image:
    """A photograph in RGB, its shorter edge `SIDE` pixels."""
    with Image.open(Path(skimage.data.__file__).parent / PHOTOS[number % len(PHOTOS)]) as image:
        scale = SIDE / min(image.size)
        return image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _write_images(folder: Path) -> None:
    files = {f"coco/train2017/{number:012d}.jpg": encoded(photo(number), "JPEG") for number in range(12)}
    files["ocr_vqa/images/as_gif.gif"] = encoded(photo(0), "GIF")
    files["ocr_vqa/images/as_png.png"] = encoded(photo(1), "PNG")
    files["ocr_vqa/images/upper.JPG"] = encoded(photo(2), "JPEG")
    files["ocr_vqa/images/png_inside.jpg"] = encoded(photo(3), "PNG")
    files["ocr_vqa/images/webp_inside.jpg"] = encoded(photo(4), "WEBP")
    files["ocr_vqa/images/frames.gif"] = encoded(photo(5), "GIF", save_all=True, append_images=[photo(6)])
    files["ocr_vqa/images/progressive.jpg"] = encoded(photo(5), "JPEG", progressive=True)
    alpha = photo(0)
    alpha.putalpha(128)
    deep = (np.asarray(photo(1).convert("L")).astype(np.uint16) * 257).astype("<u2")
    turned = photo(3)
    turned.getexif()[0x0112] = 6  # taken sideways
    files |= {
        "modes/rgba.png": encoded(alpha, "PNG"),
        "modes/palette.png": encoded(photo(1).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "modes/clear_palette.png": encoded(photo(1).convert("P"), "PNG", transparency=0),
        "modes/cmyk.jpg": encoded(photo(2).convert("CMYK"), "JPEG"),
        "modes/deep.png": encoded(Image.frombytes("I;16", deep.shape[::-1], deep.tobytes()), "PNG"),
        "modes/grey.png": encoded(photo(2).convert("L"), "PNG"),
        "modes/grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "modes/bits.png": encoded(photo(3).convert("1"), "PNG"),
        "modes/turned.jpg": encoded(turned, "JPEG", exif=turned.getexif()),
        "vg/VG_100K_2/truncated.jpg": encoded(photo(0), "JPEG")[:900],
        "vg/VG_100K_2/empty.jpg": b"",
        "vg/VG_100K_2/page.jpg": b"<html><body>404 Not Found</body></html>",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
