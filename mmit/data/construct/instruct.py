"""An annotation and a pool of wordings give one conversation: one picture, one task, one wording."""

from __future__ import annotations

from mmit.conversation import ImageRef, Message
from mmit.data.construct.annotation import Annotation, Region
from mmit.data.construct.boxes import STATED, Size, write_box
from mmit.data.construct.draw import Draw
from mmit.data.construct.pools import Pool, Task
from mmit.data.construct.tasks import Case, Values
from mmit.data.faults import SampleError, SkippedError
from mmit.data.forms import IMAGE_MARK, Record, checked_turns


def instruct(annotation: Annotation, pool: Pool, *, seed: int, task: str = "", size: Size = (0, 0)) -> Record:
    """The conversation about a picture; the same for the same arguments, whatever else is in the source.

    task: one of the pool; "" draws one of those that fit. size: (width, height) of the picture as displayed; (0, 0)
    takes what the annotation states. The meta holds ``task``, ``wording`` (a number, from 0), ``pool``, and where boxes
    are written ``boxes``, their convention.
    Raises SkippedError where nothing fits; SampleError: a box that is not in the picture, an unclear answer.
    """
    draw = Draw(seed, annotation.id)
    if not annotation.image:
        raise SampleError("the record names no image")
    if not task:
        fitting = tasks_for(annotation, pool, seed=seed)
        task = fitting[draw.index("task", len(fitting))]
    chosen = pool.tasks[task]
    turns = _turns(annotation, pool, chosen, draw, size=_size(annotation, size))
    if not turns:
        raise SampleError(f"the record has not what the task {task} of the pool {pool.name} needs")
    number = draw.index(f"wording/{task}", len(chosen.wordings))
    wording = chosen.wordings[number]
    messages: list[Message] = []
    for values in draw.some(f"turns/{task}", turns, pool.max_turns):
        filled = {**values, "box_form": STATED[pool.boxes]}
        question, answer = wording.ask.format_map(filled), wording.say.format_map(filled)
        front = () if messages else (ImageRef(0),)
        messages.append(Message(role="user", content=(*front, question)))
        messages.append(Message(role="assistant", content=(answer,)))
    if any(IMAGE_MARK in message.text for message in messages):
        raise SampleError(f"its text holds {IMAGE_MARK}, which stands for a picture")
    meta = {**annotation.meta, "id": annotation.id, "task": task, "wording": number, "pool": pool.name}
    if any({"box", "boxes", "grounded"} & values.keys() for values in turns):
        meta["boxes"] = pool.boxes
    return Record(messages=checked_turns(messages), images=(annotation.image,), meta=meta)


def tasks_for(annotation: Annotation, pool: Pool, *, seed: int) -> list[str]:
    """The tasks of a pool that fit an annotation, in the pool's order. Raises SkippedError where there is none."""
    draw = Draw(seed, annotation.id)
    found = [name for name, task in pool.tasks.items() if _turns(annotation, pool, task, draw, size=None)]
    if not found:
        raise SkippedError(f"no task of the pool {pool.name} fits what is annotated")
    return found


def _turns(annotation: Annotation, pool: Pool, task: Task, draw: Draw, *, size: Size | None) -> list[Values]:
    """The values of all turns of a task; without a size, boxes are left out of them."""

    def write(region: Region) -> str:
        if size is None:
            return ""
        if size == (0, 0):
            raise SampleError("its boxes need the size of the picture: state width and height, or read the picture")
        return write_box(annotation.box(region, size), pool.boxes, size, decimals=pool.decimals)

    return task.kind.turns(Case(annotation=annotation, draw=draw, write=write, labels=pool.labels))


def _size(annotation: Annotation, size: Size) -> Size:
    """The size of the picture, if what is stated and what was read agree."""
    stated = annotation.size
    if size != (0, 0) and stated not in ((0, 0), size):
        raise SampleError(
            f"the record states {stated[0]} x {stated[1]} and the picture is {size[0]} x {size[1]} as displayed: "
            "its boxes are those of another picture"
        )
    return stated if size == (0, 0) else size
