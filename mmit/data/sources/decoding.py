"""Frames of a video file, decoded with PyAV (the extra ``video``)."""

from __future__ import annotations

import io
from pathlib import Path

from mmit.data.faults import SampleError
from mmit.data.sources.sampling import evenly
from mmit.errors import MissingExtra

_QUALITY = 95


def decode_frames(path: Path, wanted: int) -> tuple[tuple[bytes, ...], tuple[float, ...]]:
    """At most ``wanted`` frames of a video, evenly spread, as JPEG, and their times in seconds from the first one.

    Reads the file twice: once to count, since what the container says of its length may be wrong.
    Raises SampleError for a file that is no video, MissingExtra("av", "video").
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MissingExtra("av", "video", f"decoding {path.name}") from None
    try:
        with av.open(str(path)) as container:
            count = sum(1 for _ in container.decode(video=0))
        kept = set(evenly(count, wanted))
        frames: list[bytes] = []
        seconds: list[float] = []
        start = 0.0
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                time = float(frame.time or 0.0)
                start = time if number == 0 else start
                if number in kept:
                    file = io.BytesIO()
                    frame.to_image().save(file, "JPEG", quality=_QUALITY)
                    frames.append(file.getvalue())
                    seconds.append(time - start)
    except (FFmpegError, IndexError) as error:
        raise SampleError(f"video '{path.name}' cannot be decoded: {error}") from None
    if not frames:
        raise SampleError(f"video '{path.name}' has no frames")
    return tuple(frames), tuple(seconds)
