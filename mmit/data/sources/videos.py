"""Questions about videos, and captions of them: a video becomes pictures, its frames, when it is converted.

    {"video": "a.mp4", "QA": [{"q", "a"}, ...]}                           VideoChat
    {"video_id": "v_1", "q", "a"}                                         Video-ChatGPT
    videoid,contentUrl,duration,page_dir,name                             WebVid (a caption)
    {"video": "a.mp4", "conversations": [{"from", "value"}]}              LLaVA's form

Frames lie in a folder named like the video without its extension (``a/000001.jpg``), in time order by name, with
``timestamps.txt`` (seconds, one a line) or a known rate; or, with PyAV, they are decoded from the file itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmit.conversation import ImageRef, Message
from mmit.data import forms, rows
from mmit.data.faults import SampleError, SkippedError
from mmit.data.index import IMAGE_TYPES
from mmit.data.sources import filters
from mmit.data.sources.decoding import decode_frames
from mmit.data.sources.sampling import evenly
from mmit.data.sources.templates import fill

_MARKS = re.compile(r"\s*<(?:video|image)>\s*")


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Which frames are kept and what is said about them.

    video: the file's name, a template. frames: how many at most, spread evenly. frames_per_second: the rate at which
    the folders were extracted, where they have no timestamps.txt. decode: read the videos with PyAV instead.
    time_sentence: open the question with the number of frames and their times. question, answer: templates for a set
    with one question a record; question "" takes the record's own conversation. missing_videos: as for pictures.
    """

    video: str = "{video}"
    frames: int = 8
    frames_per_second: float = 0.0
    decode: bool = False
    time_sentence: bool = False
    question: str = ""
    answer: str = "{answer}"
    missing_videos: Literal["error", "skip"] = "error"
    only: Mapping[str, tuple[str | int | bool | None, ...]] = field(default_factory=dict)
    skip_with: tuple[str, ...] = ()


def open_videos(source: Path, options: VideoOptions, root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One conversation for every record of a CSV, TSV, JSON or JSONL file. Raises DataError, MissingExtra."""

    def parse(record: Mapping[str, Any]) -> forms.Record:
        filters.refuse(record, only=options.only, skip_with=options.skip_with)
        name = fill(options.video, record)
        images, seconds = _frames(root, name, options)
        opening = tuple(ImageRef(number) for number in range(len(images)))
        sentence = f"{time_sentence(seconds)}\n" if options.time_sentence else ""
        turns: list[Message] = []
        for number, (question, answer) in enumerate(_questions(record, options)):
            asked = _MARKS.sub(" ", question).strip()
            front = (*opening, sentence + asked) if not number else (asked,)
            turns.append(Message(role="user", content=front))
            turns.append(Message(role="assistant", content=(answer.strip(),)))
        own = record.get("id", record.get("videoid", record.get("video_id", name)))
        meta = {"id": own, "video": name, "seconds": list(seconds)}
        return forms.Record(messages=forms.checked_turns(turns), images=images, meta=meta)

    opened = rows.open_table(source) if source.suffix.lower() in (".csv", ".tsv") else rows.open_json(source)
    return opened, parse


def time_sentence(seconds: Sequence[float]) -> str:
    """How many frames there are and when they were taken."""
    times = ", ".join(f"{second:.1f}" for second in seconds)
    frames = f"{len(seconds)} frames" if len(seconds) != 1 else "1 frame"
    return f"The video contains {frames} sampled at {times} seconds."


def _questions(record: Mapping[str, Any], options: VideoOptions) -> list[tuple[str, str]]:
    if options.question:
        return [(fill(options.question, record), fill(options.answer, record))]
    pairs = record.get("QA")
    if isinstance(pairs, list):
        found = [(pair.get("q"), pair.get("a")) if isinstance(pair, dict) else (None, None) for pair in pairs]
    elif isinstance(turns := record.get("conversations"), list):
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
        if len(texts) % 2:
            raise SampleError("the conversation ends with a question")
        found = list(zip(texts[::2], texts[1::2], strict=True))
    else:
        found = [(record.get("q"), record.get("a"))]
    asked = [(q, a) for q, a in found if isinstance(q, str) and isinstance(a, str)]
    if len(asked) != len(found):
        raise SampleError(f"it has no QA, conversations or q and a that are texts; it has {', '.join(record)}")
    return asked


def _frames(root: Path, name: str, options: VideoOptions) -> tuple[tuple[str | bytes, ...], tuple[float, ...]]:
    """The frames to keep, as names below ``root`` or as JPEG bytes, and their times in seconds."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(f"video '{name}' leads out of the image root {root}")
    if options.decode:
        if not (root / path).is_file():
            raise _missing(f"video '{name}' is not below {root}", options)
        return decode_frames(root / path, options.frames)
    folder = root / path.with_suffix("")
    if not folder.is_dir():
        raise _missing(f"video '{name}' has no folder of frames {folder}", options)
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower().lstrip(".") in IMAGE_TYPES)
    if not files:
        raise SampleError(f"the folder of frames {folder} is empty")
    times = _times(folder, len(files), options.frames_per_second)
    kept = evenly(len(files), options.frames)
    place = path.with_suffix("").as_posix()
    return tuple(f"{place}/{files[number]}" for number in kept), tuple(times[number] for number in kept)


def _times(folder: Path, count: int, rate: float) -> list[float]:
    file = folder / "timestamps.txt"
    if not file.is_file():
        if rate <= 0:
            raise SampleError(f"{file} is missing; write it, or state frames_per_second in the options")
        return [number / rate for number in range(count)]
    try:
        times = [float(line) for line in file.read_text(encoding="utf-8").split()]
    except ValueError as error:
        raise SampleError(f"{file}: {error}") from None
    if len(times) != count or not all(map(math.isfinite, times)) or times != sorted(times):
        raise SampleError(f"{file}: {len(times)} times for {count} frames, or not in order")
    return times


def _missing(reason: str, options: VideoOptions) -> SampleError | SkippedError:
    return SkippedError("a video is missing") if options.missing_videos == "skip" else SampleError(reason)
