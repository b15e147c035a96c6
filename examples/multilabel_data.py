"""Write images with several known labels each, and a table of them.

    python examples/multilabel_data.py shapes shapes/     # colored shapes: the labels are those that are drawn
    python examples/multilabel_data.py digits pairs/      # two of scikit-learn's digits on one image

Writes FOLDER/images/*.png and FOLDER/labels.csv: for shapes a column of 0 and 1 for each class, for digits one column
`labels` such as `3|7`; both have a column `split`.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {"red circle": (220, 40, 40), "green square": (40, 180, 60), "blue triangle": (50, 80, 230)}
SIDE = 32


def shapes(count: int, rng: np.random.Generator):
    """Images with any of `SHAPES` on noise, each with probability 0.5.

    Places and sizes are random.
    """
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        present = [name for name in SHAPES if rng.random() < 0.5]
        for place, name in zip(rng.permutation(4), present, strict=False):  # quarters, so that nothing is hidden
            size = int(rng.integers(8, 15))
            left = int(place % 2 * 16 + rng.integers(0, 16 - size + 1))
            top = int(place // 2 * 16 + rng.integers(0, 16 - size + 1))
            box = (left, top, left + size - 1, top + size - 1)
            if "circle" in name:
                draw.ellipse(box, SHAPES[name])
            elif "square" in name:
                draw.rectangle(box, SHAPES[name])
            else:
                draw.polygon([(left, box[3]), (box[2], box[3]), ((left + box[2]) / 2, top)], SHAPES[name])
        yield image, present


def digit_pairs(count: int, rng: np.random.Generator, rows: np.ndarray):
    """Images with digits in two of their quarters; the labels are the digits.

    Args:
        count: number of images.
        rng: draws the digits and their places.
        rows: rows of scikit-learn's digits to use.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for _ in range(count):
        pixels = np.zeros((16, 16), dtype=np.uint8)
        names = set()
        for quarter, row in zip(rng.permutation(4), rng.choice(rows, 2), strict=False):
            left, top = 8 * (quarter % 2), 8 * (quarter // 2)
            pixels[top : top + 8, left : left + 8] = np.round(digits.images[row] * (255 / 16))
            names.add(str(digits.target[row]))
        yield Image.fromarray(pixels), sorted(names)


def write(kind: str, folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write the images and their table; returns the table.

    Args:
        kind: `shapes` or `digits`.
        folder: that is created.
        train: number of training images; validation images are held out of them.
        test: number of test images; of digits that no training image has.
        seed: of all that is random.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    order = rng.permutation(1797)
    rows = []
    for split, count, own in (("train", train, order[:1437]), ("test", test, order[1437:])):
        found = shapes(count, rng) if kind == "shapes" else digit_pairs(count, rng, own)
        for number, (image, labels) in enumerate(found):
            name = f"images/{split}-{number:05d}.png"
            image.save(folder / name)
            row = {"image": name, "split": split}
            if kind == "shapes":
                row |= {shape: int(shape in labels) for shape in SHAPES}
            else:
                row |= {"labels": "|".join(labels)}
            rows.append(row)
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["shapes", "digits"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="number of training images [%(default)s]")
    parser.add_argument("--test", type=int, default=500, help="number of test images [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.kind, options.folder, options.train, options.test, options.seed))
