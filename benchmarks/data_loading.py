"""Images per second and core from JPEG files to training batches: ours against ImageFolder and webdataset.

    python benchmarks/data_loading.py [--workers 0|1] [--rounds N] [--json FILE]

Makes 500 x 375 JPEGs (synthetic, with the spectrum and file sizes of photographs) in class folders, converts them with
this project's converter, and reads them as batches for training: random crop of 8 % to all of the area, resized to
224 x 224, flipped half of the time, normalised by ImageNet's mean and deviation. Arms, in turn in every round:

- ours: `TrainLoader`, batches of P classes x K samples, uint8 as the training step takes them (it normalises on its
  device);
- ours, normalised: the same, and the main process normalises on this CPU;
- imagefolder: torchvision's ImageFolder, its transforms and torch's DataLoader; float32, normalised by the worker;
- webdataset: `WebDataset` over the same tars, decoded by Pillow, torchvision's transforms; float32, normalised.

The whole of an arm, main process and worker, is bound to one core where the system allows it, so that the throughput
is that of a core: reading, decoding, transforms, putting batches together and handing them over.
"""

import argparse
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from gcahng.data.conversion.convert import convert
from gcahng.data.images.transform_settings import IMAGENET_MEAN, IMAGENET_STD, transform_settings
from gcahng.data.images.transforms import normalise
from gcahng.data.loader import TrainLoader
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder

QUALITY = 90
SHARD_BYTES = 4 << 20  # several tars, as webdataset's shuffling expects
SETTINGS = transform_settings("gca_hng")
# Largest difference of the arms' mean and deviation over a pass of n images, in normalised units, times sqrt(n): the
# crops differ, and not all arms leave out the same images. At 405 images 0.05 was seen, and 0.2 is allowed.
AGREEMENT = 4.0


@dataclass(frozen=True)
class Setting:
    """What is measured: images, batches of P x K, worker processes."""

    classes: int
    images: int
    width: int
    height: int
    num_classes: int
    num_samples: int
    workers: int

    @property
    def batch(self) -> int:
        """Images per batch."""
        return self.num_classes * self.num_samples

    @property
    def num_batches(self) -> int:
        """Batches of a pass, the same for all arms."""
        return max(1, -(-self.classes * self.images // self.batch) - 1)


@dataclass(frozen=True)
class Arm:
    """A loader: `one_pass()` yields the images of `num_batches` batches."""

    name: str
    one_pass: Callable[[], Iterator[Tensor]]


@dataclass
class Memory:
    """The most that a worker held at any batch of a pass, in MiB."""

    unique: float = 0.0
    proportional: float = 0.0


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with frequency as in photographs, shapes with sharp edges, sensor grain."""
    draws = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def texture(exponent: float) -> np.ndarray[Any, Any]:
        spectrum = draws.normal(size=frequency.shape) + 1j * draws.normal(size=frequency.shape)
        noise = np.fft.irfft2(spectrum / frequency**exponent, s=(height, width))
        return np.asarray(noise / noise.std())

    light = draws.uniform(70, 180, 3) + draws.uniform(25, 50) * texture(draws.uniform(1.3, 1.6))[..., None]
    tint = np.stack([texture(1.6), texture(1.6)], -1) @ draws.normal(0, 14, (2, 3))
    image = Image.fromarray(np.clip(light + tint, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(draws.integers(3, 9))):
        x, y = draws.integers(0, width), draws.integers(0, height)
        dx, dy = draws.integers(1 + width // 30, 2 + width // 4), draws.integers(1 + height // 30, 2 + height // 4)
        colour = (*(int(value) for value in draws.integers(0, 256, 3)), int(draws.integers(60, 200)))
        (pen.ellipse if draws.random() < 0.5 else pen.rectangle)((x - dx, y - dy, x + dx, y + dy), fill=colour)
    grain = draws.normal(0, 2.5, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def write_images(setting: Setting, directory: Path) -> list[int]:
    """`directory`/train/<class>/<number>.jpg, and one class for test/. Returns the sizes of the files in bytes."""
    sizes = []
    for place in range(setting.classes + 1):
        split = "train" if place < setting.classes else "test"
        folder = directory / split / f"class{place:04d}"
        folder.mkdir(parents=True)
        for number in range(setting.images if split == "train" else 1):
            buffer = io.BytesIO()
            seed = place * setting.images + number
            picture(seed, setting.width, setting.height).save(buffer, "JPEG", quality=QUALITY)
            (folder / f"{number:04d}.jpg").write_bytes(buffer.getvalue())
            sizes.append(len(buffer.getvalue()))
    return sizes


def their_transforms() -> transforms.Compose:
    """The training transforms of the released code."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SETTINGS.crop, scale=SETTINGS.scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def our_loader(setting: Setting, shards: ShardSet) -> TrainLoader:
    """P x K batches from the converted folder."""
    return TrainLoader(
        shards,
        ClassTable.from_shards(shards, "train"),
        seed=0,
        num_classes=setting.num_classes,
        num_samples=setting.num_samples,
        transform=SETTINGS,
        num_workers=setting.workers,
    )


def our_pass(loader: TrainLoader, epochs: Iterator[int], setting: Setting, *, to_numbers: bool) -> Iterator[Tensor]:
    """One epoch, cut to the number of batches of the others."""
    for batch in itertools.islice(loader.epoch_iterator(next(epochs)), setting.num_batches):
        yield normalise(batch.images, SETTINGS) if to_numbers else batch.images


def their_pass(loader: Any) -> Iterator[Tensor]:
    """One pass of a loader of (images, labels)."""
    for images, _ in loader:
        yield images


def folder_loader(setting: Setting, directory: Path) -> DataLoader[Any]:
    """torchvision's ImageFolder in torch's DataLoader."""
    data = ImageFolder(str(directory / "train"), their_transforms())
    return DataLoader(
        data,
        batch_size=setting.batch,
        sampler=RandomSampler(data, num_samples=setting.num_batches * setting.batch),
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
    )


def webdataset_loader(setting: Setting, directory: Path, shards: ShardSet) -> Any:
    """A webdataset pipeline over the training tars, as its documentation builds one."""
    tars = [str(directory / info.name) for info in shards.manifest.shards if info.split == "train"]
    data = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(their_transforms(), class_of)
        .batched(setting.batch, partial=False)
        .repeat()
        .with_epoch(setting.num_batches)
    )
    workers = setting.workers
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def class_of(meta: dict[str, Any]) -> int:
    """The label in a sample's JSON member."""
    return int(meta["class_id"])


def make_arms(setting: Setting, directory: Path) -> list[Arm]:
    """The arms over freshly written images."""
    sizes = write_images(setting, directory / "images")
    convert(Folder(directory / "images"), directory / "shards", shard_bytes=SHARD_BYTES)
    shards = ShardSet.open(directory / "shards")
    print(
        f"{len(sizes)} JPEGs of {setting.width} x {setting.height}, {statistics.median(sizes) / 1000:.0f} kB "
        f"({min(sizes) / 1000:.0f} to {max(sizes) / 1000:.0f}); a pass is {setting.num_batches} batches of "
        f"{setting.num_classes} x {setting.num_samples}"
    )
    ours, epochs = our_loader(setting, shards), itertools.count()
    return [
        Arm("ours", partial(our_pass, ours, epochs, setting, to_numbers=False)),
        Arm("ours, normalised", partial(our_pass, ours, epochs, setting, to_numbers=True)),
        Arm("imagefolder", partial(their_pass, folder_loader(setting, directory / "images"))),
        Arm("webdataset", partial(their_pass, webdataset_loader(setting, directory / "shards", shards))),
    ]


def check_and_warm_up(arm: Arm, setting: Setting) -> tuple[Memory, set[int], tuple[float, float]]:
    """An untimed pass: the most memory that its workers took, their process ids, mean and deviation of its pixels.

    Raises:
        RuntimeError: The pass does not consist of the batches that it should.
    """
    me, memory = psutil.Process(), Memory()
    before = {child.pid for child in me.children()}
    moments = []
    for images in arm.one_pass():
        if images.shape != (setting.batch, 3, SETTINGS.crop, SETTINGS.crop):
            raise RuntimeError(f"{arm.name}: a batch has shape {tuple(images.shape)}.")
        numbers = normalise(images, SETTINGS) if images.dtype == torch.uint8 else images
        moments.append((float(numbers.mean()), float(numbers.std())))
        for child in me.children():
            if child.pid not in before:
                full = child.memory_full_info()
                memory.unique = max(memory.unique, full.uss / 2**20)
                memory.proportional = max(memory.proportional, getattr(full, "pss", 0) / 2**20)
    if len(moments) != setting.num_batches:
        raise RuntimeError(f"{arm.name}: a pass has {len(moments)} batches: expected {setting.num_batches}.")
    workers = {child.pid for child in me.children()} - before
    mean, deviation = np.mean(moments, axis=0).tolist()
    return memory, workers, (mean, deviation)


def check_agreement(moments: dict[str, tuple[float, float]], images: int) -> None:
    """Stop unless all arms deliver pixels of the same mean and deviation in a pass of that many images.

    Raises:
        RuntimeError: They do not.
    """
    for arm, found in moments.items():
        difference = max(abs(a - b) for a, b in zip(found, moments["imagefolder"], strict=True))
        if not difference <= AGREEMENT / math.sqrt(images):
            raise RuntimeError(f"{arm}: mean and deviation {found} are not those of imagefolder.")


def time_pass(arm: Arm, workers: set[int]) -> tuple[float, float]:
    """Wall time and processor time (of the main process and the arm's workers) of a pass in seconds."""
    wall, processor = time.perf_counter(), processor_time(workers)
    for _ in arm.one_pass():
        pass
    return time.perf_counter() - wall, processor_time(workers) - processor


def processor_time(workers: set[int]) -> float:
    """Seconds of processor time that this process and the given ones have taken."""
    times = [psutil.Process(pid).cpu_times() for pid in workers]
    return time.process_time() + sum(each.user + each.system for each in times)


def measure(setting: Setting, directory: Path, rounds: int) -> list[dict[str, object]]:
    """Time all arms in turn, print a table, return the rows."""
    arms = make_arms(setting, directory)
    memory, workers, moments = {}, {}, {}
    for arm in arms:
        memory[arm.name], workers[arm.name], moments[arm.name] = check_and_warm_up(arm, setting)
    images = setting.num_batches * setting.batch
    check_agreement(moments, images)
    workers["ours, normalised"], memory["ours, normalised"] = workers["ours"], memory["ours"]  # the same loader
    times: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
    for turn in range(rounds):
        for place in range(len(arms)):
            arm = arms[(turn + place) % len(arms)]
            times[arm.name].append(time_pass(arm, workers[arm.name]))
    for name, found in times.items():
        rates = [images / wall for wall, _ in found]
        wall_ratio, processor_ratio = ratios(times, "ours", name)
        held = f"   worker USS {memory[name].unique:4.0f} MiB, PSS {memory[name].proportional:4.0f} MiB"
        print(
            f"{name:<17} {statistics.median(rates):7.0f} images/s ({min(rates):.0f} to {max(rates):.0f})   ours is "
            f"{wall_ratio:4.2f} times as fast (processor time {processor_ratio:4.2f})"
            + (held if setting.workers else "")
        )
    return speed_rows(setting, times) + (memory_rows(memory) if setting.workers else [])


def ratios(times: dict[str, list[tuple[float, float]]], ours: str, theirs: str) -> tuple[float, float]:
    """How many times as fast `ours` is, by wall and by processor time: medians over rounds."""
    pairs = list(zip(times[theirs], times[ours], strict=True))
    wall, processor = (statistics.median(a[clock] / b[clock] for a, b in pairs) for clock in (0, 1))
    return wall, processor


def speed_rows(setting: Setting, times: dict[str, list[tuple[float, float]]]) -> list[dict[str, object]]:
    """Our throughput, and its ratio to that of each other loader."""
    images = setting.num_batches * setting.batch
    pairs = {
        "ours over imagefolder": ("ours", "imagefolder"),
        "ours over webdataset": ("ours", "webdataset"),
        "ours normalised on this CPU, over torchvision's folder": ("ours, normalised", "imagefolder"),
        "ours normalised on this CPU, over webdataset": ("ours, normalised", "webdataset"),
    }
    return [
        {
            "name": f"data loading per core, {name}, {setting.width}x{setting.height} JPEG, {setting.workers} worker",
            "value": statistics.median(images / wall for wall, _ in times[ours]),
            "unit": "images/s",
            "ratio": ratios(times, ours, theirs)[0],
        }
        for name, (ours, theirs) in pairs.items()
    ]


def memory_rows(memory: dict[str, Memory]) -> list[dict[str, object]]:
    """Memory that belongs to a worker alone, and what share it is of the other loaders'."""
    names = {"imagefolder": "torchvision's folder", "webdataset": "webdataset"}
    return [
        {
            "name": f"memory of a loader worker (USS), ours over {name}",
            "value": memory["ours"].unique,
            "unit": "MiB",
            "ratio": memory["ours"].unique / memory[theirs].unique,
        }
        for theirs, name in names.items()
    ]


@contextmanager
def one_core() -> Iterator[str]:
    """Bind this process and the workers that it starts to one core; torch computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if allowed:
            os.sched_setaffinity(0, {max(allowed)})
        yield f"bound to core {max(allowed)}" if allowed else "not bound to a core, which this system does not offer"
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Parse, make the data, measure, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each arm")
    parser.add_argument("--workers", type=int, choices=(0, 1), default=1, help="worker processes; 0: the main process")
    parser.add_argument("--classes", type=int, default=40, help="training classes")
    parser.add_argument("--images", type=int, default=12, help="images per class")
    parser.add_argument("--size", default="500x375", help="width x height of the images")
    parser.add_argument("--batch", default="27x3", help="P classes x K samples")
    options = parser.parse_args(arguments)
    try:
        (width, height), (num_classes, num_samples) = (
            map(int, text.split("x")) for text in (options.size, options.batch)
        )
    except ValueError:
        parser.error(f"--size and --batch are two numbers, as in 500x375: got {options.size} and {options.batch}")
    numbers = (width, height, num_classes, num_samples, options.classes, options.images, options.rounds)
    if min(numbers) < 1 or num_classes > options.classes:
        parser.error(f"numbers must be at least 1, and P at most --classes: got P {num_classes}, {options.classes}")
    setting = Setting(options.classes, options.images, width, height, num_classes, num_samples, options.workers)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "webdataset", "pillow", "simplejpeg")
    )
    with one_core() as where, tempfile.TemporaryDirectory() as directory:
        print(f"{versions}; --workers {options.workers}, {where}")
        rows = measure(setting, Path(directory), options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
