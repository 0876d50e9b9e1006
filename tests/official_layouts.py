"""Miniature copies of the official layouts of data sets, with real encoded images.

Every `write_*` returns what a conversion must find: source name -> (class name, split), and where the file is.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class Expected:
    """What a miniature data set holds."""

    items: dict[str, tuple[str, str]] = field(default_factory=dict)  # source -> class name, split
    files: dict[str, Path] = field(default_factory=dict)  # source -> file

    def add(self, source: str, class_name: str, split: str, path: Path) -> None:
        assert source not in self.items
        self.items[source] = (class_name, split)
        self.files[source] = path

    def splits(self) -> dict[str, dict[str, int]]:
        counts = {}
        for split in {split for _, split in self.items.values()}:
            names = [name for name, own in self.items.values() if own == split]
            counts[split] = {"classes": len(set(names)), "images": len(names)}
        return counts


def encoded(number: int, size: tuple[int, int] = (24, 18), mode: str = "RGB", form: str = "JPEG") -> bytes:
    """An image of noise; another for every number."""
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode=None if channels < 4 else "CMYK").save(
        buffer, form
    )
    return buffer.getvalue()


def put(path: Path, number: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number, **options))  # type: ignore[arg-type]
    return path


def write_cub(root: Path, images_per_class: dict[int, int]) -> Expected:
    """CUB_200_2011 with all 200 class names and images of some of them; every fourth image is grey."""
    expected = Expected()
    names = {i: f"{i:03d}.Bird_{i}" for i in range(1, 201)}
    images, labels, official = [], [], []
    for class_id, count in images_per_class.items():
        for i in range(count):
            number = len(images) + 1
            name = f"{names[class_id]}/Bird_{i:04d}_{number}.jpg"
            path = put(root / "images" / name, number, size=(16 + i, 20), mode="L" if number % 4 == 0 else "RGB")
            images.append(f"{number} {name}\n")
            labels.append(f"{number} {class_id}\n")
            official.append(f"{number} {i % 2}\n")  # on both sides of every class, and not to be used
            expected.add(f"images/{name}", names[class_id], "train" if class_id <= 100 else "test", path)
    (root / "images.txt").write_text("".join(images))
    (root / "image_class_labels.txt").write_text("".join(labels))
    (root / "train_test_split.txt").write_text("".join(official))
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in names.items()))
    return expected


CAR_FIELDS = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")


def write_cars_annotations(
    path: Path,
    annotations: list[tuple[str, int]],
    class_names: list[str],
    fields: tuple[str, ...] = CAR_FIELDS,
) -> None:
    """cars_annos.mat with the fields of the original, or with some of them (to write many is slow)."""
    from scipy.io import savemat

    table = np.empty((1, len(annotations)), dtype=[(name, "O") for name in fields])
    for i, (name, class_id) in enumerate(annotations):
        # `test` is the official split of images: on both sides of every class, and not to be used.
        values = {"relative_im_path": name, "class": np.array([[class_id]], dtype=np.uint16), "test": np.uint8(i % 2)}
        table[0, i] = tuple(values.get(field, np.array([[i]], dtype=np.uint16)) for field in fields)
    names = np.empty((1, len(class_names)), dtype=object)
    names[0, :] = class_names
    savemat(path, {"annotations": table, "class_names": names})


def car_names() -> list[str]:
    """196 names, one of them with a slash as in the original."""
    return [f"Maker Model {i} 2012" if i != 99 else "Ram C/V Cargo Van Minivan 2012" for i in range(1, 197)]


def write_cars(root: Path, images_per_class: dict[int, int]) -> Expected:
    expected = Expected()
    annotations = []
    for class_id, count in images_per_class.items():
        for _ in range(count):
            number = len(annotations) + 1
            name = f"car_ims/{number:06d}.jpg"
            path = put(root / name, number, mode="L" if number == 2 else "RGB")
            annotations.append((name, class_id))
            expected.add(name, car_names()[class_id - 1], "train" if class_id <= 98 else "test", path)
    write_cars_annotations(root / "cars_annos.mat", annotations, car_names())
    return expected


def write_sop(root: Path, train: dict[int, int], test: dict[int, int]) -> Expected:
    """Classes of bicycles (odd) and cabinets (even)."""
    expected = Expected()
    number = 0
    for split, name, classes in (("train", "Ebay_train.txt", train), ("test", "Ebay_test.txt", test)):
        lines = ["image_id class_id super_class_id path\n"]
        for class_id, count in classes.items():
            for i in range(count):
                number += 1
                super_id, super_class = (1, "bicycle") if class_id % 2 else (2, "cabinet")
                image = f"{super_class}_final/{110000 + class_id}_{i}.JPG"
                form = {"form": "PNG"} if number == 3 else {"mode": "CMYK"} if number == 4 else {}
                path = put(root / image, number, **form)
                lines.append(f"{number} {class_id} {super_id} {image}\n")
                expected.add(image, str(class_id), split, path)
        (root / name).write_text("".join(lines))
    return expected


def inshop_list(rows: list[tuple[str, str, str]]) -> str:
    """list_eval_partition.txt: the count, a header, columns padded with blanks."""
    lines = [f"{len(rows)}\n", "image_name  item_id  evaluation_status\n"]
    return "".join(lines + [f"{image:<80} {item:<20} {status}\n" for image, item, status in rows])


def write_inshop(images: Path, list_folder: Path, train: int = 3, test: int = 2) -> Expected:
    """Items of women's dresses and men's denim; `images` is the folder with MEN/ and WOMEN/."""
    expected = Expected()
    rows = []
    for item in range(1, train + test + 1):
        for i, status in enumerate(["train"] * 3 if item <= train else ["query", "gallery", "gallery"]):
            item_id = f"id_{item:08d}"
            below = f"{'WOMEN/Dresses' if item % 2 else 'MEN/Denim'}/{item_id}/{i:02d}_1_front.jpg"
            path = put(images / below, 10 * item + i)
            rows.append((f"img/{below}", item_id, status))
            expected.add(f"img/{below}", item_id, status, path)
    list_folder.mkdir(parents=True, exist_ok=True)
    (list_folder / "list_eval_partition.txt").write_text(inshop_list(rows))
    return expected


def write_hotels(root: Path, train: dict[int, int], test: dict[int, int]) -> Expected:
    """Hotels of chain 7, odd ones, and of no chain (0), even ones."""
    expected = Expected()
    tables = root / "input" / "dataset"
    tables.mkdir(parents=True)
    (tables / "chain_info.csv").write_text('chain_id,chain_name\n7,"Seven, and Sons"\n')
    hotels = sorted({*train, *test})
    rows = [f'{hotel},"Hôtel n° {hotel}",{7 if hotel % 2 else 0},1.5,-2.5\n' for hotel in hotels]
    (tables / "hotel_info.csv").write_text(
        "hotel_id,hotel_name,chain_id,latitude,longitude\n" + "".join(rows), encoding="utf-8"
    )
    number = 1000
    for split, table, folder, counts in (
        ("train", "train_set.csv", "images/train", train),
        ("test", "test_set.csv", "images/test/unoccluded", test),
    ):
        lines = ["image_id,hotel_id,image_url,image_source,upload_timestamp\n"]
        for hotel, count in counts.items():
            for i in range(count):
                number += 1
                origin = "traffickcam" if split == "test" or i == 0 else "travel_website"
                # download_train.py takes the extension of the address; the test archive has .jpg.
                suffix = "JPG" if split == "train" and i == 1 else "jpg"
                source = f"{folder}/{7 if hotel % 2 else 0}/{hotel}/{origin}/{number}.{suffix}"
                path = put(root / source, number)
                lines.append(f'{number},{hotel},"http://x.org/a,b/{number}.JPG",{origin},2017-01-01 00:00:00\n')
                expected.add(source, str(hotel), split, path)
        (tables / table).write_text("".join(lines))
    put(root / "images/test/low_occlusions/7/1/traffickcam/1.jpg", 1)
    return expected
