"""The questions of a generation: every annotation with every kind, made one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmit.data import rows
from mmit.data.construct.annotation import read_annotation
from mmit.data.construct.source import picture_size
from mmit.data.faults import BadSample, SampleError, first_three
from mmit.data.generate.pictures import data_url, with_picture
from mmit.data.generate.prompts import Request, load_prompts, make_request
from mmit.data.generate.settings import Generation
from mmit.data.readers import ImageRoot
from mmit.errors import DataError


class Questions:
    """Every annotation with every kind, in order; those that nothing can be asked from are listed as bad."""

    def __init__(self, generation: Generation) -> None:
        source = generation.source
        if not source.is_file():
            raise DataError(f"{source}: there is no such file of annotations")
        if generation.images is not None and not generation.images.is_dir():
            raise DataError(f"{generation.images}: the image root is not a folder")
        self.generation = generation
        self.prompts = load_prompts(generation.prompts)
        self.images = ImageRoot(generation.images or source.parent)
        self.rows = rows.open_json(source)
        self.count = min(generation.limit or len(self.rows), len(self.rows))
        self.bad: list[BadSample] = []

    def __len__(self) -> int:
        return self.count * len(self.generation.kinds)

    def __iter__(self) -> Iterator[Request]:
        for number in range(self.count):
            try:
                yield from self._of(number)
            except SampleError as error:
                name = self.generation.source.name
                self.bad.append(BadSample(id="", key=f"record {number}", shard=name, reason=str(error)))
                self.check()

    def check(self) -> None:
        """Raise DataError where more annotations are bad than the settings allow."""
        if len(self.bad) > self.generation.max_bad * self.count:
            raise DataError(
                f"{len(self.bad)} bad annotations of {self.count} are more than max_bad {self.generation.max_bad:g} "
                f"allows: {first_three(self.bad)}; mend them, or allow more with max_bad"
            )

    def messages(self, request: Request) -> list[Any]:
        """The messages to send, the picture among them where it is shown. Raises SampleError."""
        if self.generation.see == "text":
            return list(request.messages)
        url = data_url(self.images.read(request.image), max_side=self.generation.max_side)
        return with_picture(request.messages, url)

    def _of(self, number: int) -> list[Request]:
        settings = self.generation
        record = self.rows.read(number)
        if record.get("id") in (None, ""):
            record = {**record, "id": str(number)}
        annotation = read_annotation(record, convention=settings.boxes)
        if not annotation.image:
            raise SampleError("the record names no image")
        size = annotation.size
        if settings.see != "image" and annotation.regions and size == (0, 0):
            size = picture_size(self.images.read(annotation.image), annotation.image)
        return [
            make_request(annotation, kind, self.prompts, see=settings.see, size=size, seed=settings.seed)
            for kind in dict.fromkeys(settings.kinds)
        ]
