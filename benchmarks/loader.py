"""What reading and decoding a sample costs, beside loose files, webdataset, and Pillow alone, in CPU time of one core.

    python benchmarks/loader.py [--samples 2000] [--rounds 7] [--size 640x480]

Everything runs in this one process, with the files in the page cache, one system after the other in every round; the
figures are medians over the rounds (lowest-highest). Without decoding, all systems hand out the parsed JSON of a record
and the bytes of its picture. mmit hands out more: checked turns (a ``Conversation``), in any order; so webdataset is
also measured with these made of what it hands out.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from report import machine
from samples import Writer, picture, write_records
from torch.utils.data import Dataset
from transformers import AutoTokenizer
from webdataset.compat import WebDataset
from world import make_tokenizer

from mmit.data import Loader, ShardSet, make_plan, measure_lengths, open_source, stored
from mmit.data.convert import Conversion, convert
from mmit.images import ImageSpec
from mmit.resize import WITH_TORCH
from mmit.templates import ChatTemplate
from mmit.tokenizer import prepare_tokenizer
from mmit.train.feed import Encode

TILE = (336, 336)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GRAIN = 5.0
"""Grey levels; 96 kB at 640 x 480, as photos of that size have."""
PICTURES = 100
"""Different pictures; each is written under many names."""

STREAM = "(b) webdataset, in order"
ALIKE = "(c) Pillow: decode, torch: bicubic on uint8"

Work = Callable[[], int]
"""One pass over all samples; how many there were."""


@dataclass(frozen=True)
class Files:
    """The same samples as one JSON with loose JPEGs, and as shards."""

    json: Path
    images: Path
    shards: Path
    count: int

    @classmethod
    def make(cls, folder: Path, *, stage: int, count: int, size: tuple[int, int]) -> Files:
        """Write them. Stage 1 holds captions, stage 2 the kinds of LLaVA's 665k."""
        made = cls(folder / "records.json", folder / "images", folder / "shards", count)
        records = list(islice(Writer(stage=stage, image_tokens=576, seed=0).records(), count))
        pictures = [picture(number, size, grain=GRAIN) for number in range(PICTURES)]
        write_records(records, made.json, made.images, picture_of=lambda number: pictures[number % PICTURES])
        convert(
            Conversion(reader="llava_json", source=made.json, target=made.shards, name="made", images=made.images),
            processes=1,
            progress=False,
        )
        return made

    @property
    def tars(self) -> list[str]:
        """Of the shards."""
        return [str(path) for path in sorted(self.shards.glob("*.tar"))]


class LooseFiles(Dataset[tuple[dict[str, Any], bytes]]):
    """LLaVA's way: a JSON of all records is read first, then a picture for each."""

    def __init__(self, files: Files) -> None:
        self.records = json.loads(files.json.read_bytes())
        self.images = files.images

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], bytes]:
        record = self.records[index]
        if "image" not in record:
            return record, b""
        with (self.images / record["image"]).open("rb") as file:
            return record, file.read()


def reading(files: Files) -> dict[str, Work]:
    """The systems without decoding, each one pass over all samples."""
    shards, order = open_source(files.shards), shuffled(files.count)

    def loose() -> int:
        data = LooseFiles(files)  # the JSON is part of the work
        return sum(bool(data[number][0]) for number in order)

    def stream(buffer: int = 0, *, turns: bool = False) -> int:
        data: Any = WebDataset(files.tars, shardshuffle=False)  # it is iterable, which its types do not say
        count = 0
        for sample in data.shuffle(buffer) if buffer else data:
            if turns:
                images = (sample["0.jpg"],) if "0.jpg" in sample else ()
                stored.whole({"json": sample["json"]}, images, key=sample["__key__"], source="made")
            else:
                json.loads(sample["json"])
            count += 1
        return count

    return {
        "(a) JSON + loose JPEGs, any order": loose,
        STREAM: stream,
        "(b) webdataset, shuffle(1000)": lambda: stream(1000),
        "(b) webdataset, in order, turns checked": lambda: stream(turns=True),
        "mmit, any order, turns checked": lambda: sum(bool(shards.read(number).messages) for number in order),
    }


def decoding(files: Files) -> dict[str, Work]:
    """Pillow alone and mmit, over the samples that have a picture; one tile each, squashed."""
    shards = open_source(files.shards)
    with_picture = [number for number in shuffled(files.count) if shards.images[number]]
    pictures = [shards.read(number).images[0] for number in with_picture]
    spec = ImageSpec(size=TILE, mean=MEAN, std=STD, resize="squash", tokens_per_tile=576)
    draft = ImageSpec(size=TILE, mean=MEAN, std=STD, resize="squash", tokens_per_tile=576, draft=True)

    def pillow() -> int:
        for data in pictures:
            decoded(data).resize(TILE, Image.Resampling.BICUBIC)
        return len(pictures)

    def pillow_and_torch() -> int:
        for data in pictures:
            WITH_TORCH["squash"](decoded(data), TILE, (0, 0, 0))
        return len(pictures)

    loader = loader_of(shards, with_picture, spec, files)

    def mmit(how: ImageSpec) -> int:
        for number in with_picture:
            how.prepare(shards.read(number).images[0])
        return len(with_picture)

    return {
        "(c) Pillow: decode + bicubic": pillow,
        ALIKE: pillow_and_torch,
        "mmit: read + decode + resize": lambda: mmit(spec),
        "mmit: the same with draft": lambda: mmit(draft),
        "mmit: its loader, tokens and packed rows too": lambda: sum(
            len(batch.sample_ids) for step in loader for batch in step.batches
        ),
    }


def loader_of(shards: ShardSet, with_picture: list[int], spec: ImageSpec, files: Files) -> Loader:
    """mmit's loader in this process, over the samples that have a picture: rows of 4096 tokens, eight to a step."""
    make_tokenizer(files.shards.parent / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(files.shards.parent / "tokenizer")
    assert tokenizer is not None, "it was written just now"
    prepared = prepare_tokenizer(tokenizer)
    template = ChatTemplate.load("vicuna", prepared.tokenizer)
    encode = Encode(template, prepared.tokenizer, spec, prepared.image_id, "hf")
    lengths = measure_lengths(
        shards, encode.measure, fingerprint=encode.fingerprint(), max_skipped=0.0, processes=1, progress=False
    )
    plan = make_plan(
        [(shards, len(with_picture))],
        [lengths],
        length=4096,
        rows_per_step=8,
        packing=True,
        tiles_per_row=64,
        seed=0,
        chosen=[np.sort(np.array(with_picture, dtype=np.uint32))],
    )
    return Loader(
        plan, encode, rank=0, world=1, rows_per_micro_batch=1, workers=0, pad_id=prepared.pad_id, image_size=TILE
    )


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def shuffled(count: int) -> list[int]:
    return random.Random(0).sample(range(count), count)


def rounds(works: dict[str, Work], count: int) -> dict[str, list[float]]:
    """CPU microseconds of a sample, for every round of every system."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # fills the page cache
    for _ in range(count):
        for name, work in works.items():
            started = time.process_time()
            samples = work()
            found[name].append((time.process_time() - started) / samples * 1e6)
    return found


def table(title: str, found: dict[str, list[float]], *, base: str) -> str:
    """A line for each system: CPU microseconds of a sample, samples per second, and the speed beside ``base``."""
    lines = [f"| {title} | CPU us/sample | samples/s per core | times as fast as {base} |"]
    lines.append("| --- | --- | --- | --- |")
    for name, values in found.items():
        ratios = [b / own for b, own in zip(found[base], values, strict=True)]
        middle = median(values)
        lines.append(
            f"| {name} | {middle:.1f} ({min(values):.1f}-{max(values):.1f}) | {1e6 / middle:,.0f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the samples, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="samples of each set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="640x480", help="width x height of the pictures")
    parser.add_argument("--folder", type=Path, default=None, help="where to write the samples; kept")
    asked = parser.parse_args()
    width, height = (int(number) for number in asked.size.split("x"))
    torch.set_num_threads(1)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="mmit-loader-"))
    try:
        print(", ".join(f"{key} {value}" for key, value in machine().items()), f"; pictures {asked.size}\n")
        for stage, name in ((1, "captions (2 turns)"), (2, "conversations as in LLaVA's 665k (12 turns)")):
            files = Files.make(folder / f"stage{stage}", stage=stage, count=asked.samples, size=(width, height))
            print(table(f"reading {name}", rounds(reading(files), asked.rounds), base=STREAM))
            if stage == 2:
                print(table("decoding", rounds(decoding(files), asked.rounds), base=ALIKE))
    finally:
        if asked.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
