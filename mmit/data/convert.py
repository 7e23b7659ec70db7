"""Turn a published data set into shards: in parallel, all of it or visibly unfinished.

Everything is written into ``TARGET.partial``, which becomes ``TARGET`` by one rename at the very end. A conversion that
was killed keeps its finished shards, and the same command continues it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmit import __version__
from mmit.data.conversion_folder import check_target, exclusive, publish, start_or_continue, write_bytes, write_json
from mmit.data.faults import BadSample, SampleError, SkippedError, first_three
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.readers import Reader, open_reader
from mmit.data.shards import Manifest, ShardInfo, ShardWriter
from mmit.errors import DataError
from mmit.images import ImageSpec

BAD_LIST = "bad.jsonl"
SMALL_SHARD = 512
_DECODING = ImageSpec(
    size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", tokens_per_tile=1, exact=True
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert, and into what; two equal ones over equal sources give the same bytes.

    source, reader, images, prompt, follow_links, options: see ``readers.open_reader``.
    shard_samples, shard_bytes: a shard ends at whichever comes first. seed: of the one shuffle of all samples.
    verify: read each picture's header, or decode it too. max_bad: share of bad records that is tolerated.
    records: how many the source must hold; 0 takes any number.
    """

    reader: str
    source: Path
    target: Path
    name: str
    images: Path | None = None
    prompt: str = ""
    follow_links: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    shard_samples: int = 10_000
    shard_bytes: int = 1 << 30
    seed: int = 0
    verify: Literal["header", "decode"] = "header"
    max_bad: float = 0.001
    records: int = 0
    recipe_digest: str = ""
    licence: str = ""


def convert(
    conversion: Conversion,
    *,
    reader: Reader | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the shards of ``conversion`` and return their manifest.

    reader: of conversations that have no published form; None opens the one that ``conversion`` names.
    processes: None uses every core. overwrite: replace a finished target, and restart an unfinished one.
    Raises DataError: a source that is missing, broken or empty, more bad records than ``max_bad``, a finished target,
    an unfinished one of another conversion, a full disk.
    """
    if conversion.shard_samples < 1:
        raise DataError(f"shard_samples is {conversion.shard_samples}; a shard holds at least one sample")
    target = conversion.target
    check_target(target, overwrite=overwrite)
    reader = (
        reader
        if reader is not None
        else open_reader(
            conversion.reader,
            conversion.source,
            name=conversion.name,
            images=conversion.images,
            prompt=conversion.prompt,
            follow_links=conversion.follow_links,
            options=conversion.options,
        )
    )
    if conversion.records not in (0, reader.published):
        raise DataError(
            f"{conversion.source}: holds {reader.published} records and {conversion.records} are expected; was it "
            "downloaded whole? For a part of the set on purpose, take 'records' out of the recipe"
        )
    partial = target.with_name(target.name + ".partial")
    with exclusive(partial):
        start_or_continue(partial, _plan(conversion, reader), overwrite=overwrite)
        done = _run_jobs(conversion, reader, partial, processes or usable_cores(), progress=progress)
        manifest = _manifest(conversion, done)
        _write_bad(partial, manifest.bad)
        manifest.write(partial)
        publish(partial, target)
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Done:
    """The outcome of one job: the shards it wrote (one, or more where they grew too large) and what it left out."""

    job: int
    records: int
    shards: tuple[ShardInfo, ...]
    bad: tuple[BadSample, ...]
    skipped: Mapping[str, int]  # by reason
    text_only: int
    text_bytes: int


def _run_jobs(conversion: Conversion, reader: Reader, partial: Path, processes: int, *, progress: bool) -> list[_Done]:
    order = reader.order(conversion.seed)
    # a small set still becomes several shards, so that several processes have work
    size = min(conversion.shard_samples, max(SMALL_SHARD, -(-len(order) // 32)))
    jobs = range((len(order) + size - 1) // size)
    done = {job: found for job in jobs if (found := _read_done(partial, job)) is not None}

    def work(job: int) -> _Done:
        return _write_job(conversion, reader, partial, job, order[job * size : (job + 1) * size].tolist())

    missing = [job for job in jobs if job not in done]
    total = sum(len(order[job * size : (job + 1) * size]) for job in missing)
    results = run(work, missing, processes=processes)
    for result in with_progress(
        results, title=f"converting {conversion.name}", total=total, count=lambda r: r.records, shown=progress
    ):
        done[result.job] = result
        _check_bad([bad for found in done.values() for bad in found.bad], len(order), conversion, partial)
    return [done[job] for job in jobs]


def _write_job(conversion: Conversion, reader: Reader, partial: Path, job: int, rows: list[int]) -> _Done:
    """Write the samples at ``rows`` into shard ``job``, and note that it is done."""
    shards: list[ShardInfo] = []
    bad: list[BadSample] = []
    skipped: Counter[str] = Counter()
    text_only = text_bytes = 0
    waiting = iter(rows)
    row = next(waiting, None)
    while row is not None:
        part = f"-{len(shards)}" if shards else ""
        with ShardWriter(partial / f"shard-{job:06d}{part}.tar") as shard:
            while row is not None and (shard.samples == 0 or shard.payload < conversion.shard_bytes):
                try:
                    conversation = reader.read(row)
                    if conversion.verify == "decode":
                        decode_all(conversation.images)
                except SkippedError as error:
                    skipped[str(error)] += 1
                except SampleError as error:
                    bad.append(_bad(reader, conversion, row, error))
                else:
                    shard.write(f"{row:08d}", conversation)
                    text_only += not conversation.images
                    text_bytes += sum(len(message.text.encode()) for message in conversation.messages)
                row = next(waiting, None)
            if shard.samples:
                shards.append(shard.finish())
    done = _Done(
        job=job,
        records=len(rows),
        shards=tuple(shards),
        bad=tuple(bad),
        skipped=dict(skipped),
        text_only=text_only,
        text_bytes=text_bytes,
    )
    if not bad:
        # a job with bad records is done again next time: the missing picture may be there by then
        write_json(_done_file(partial, job), asdict(done))
    return done


def decode_all(images: tuple[bytes, ...]) -> None:
    """Decode pictures as training does. Raises SampleError for one that is damaged."""
    for number, image in enumerate(images):
        try:
            _DECODING.prepare(image)
        except DataError as error:
            raise SampleError(f"image {number} of the record: {error}") from None


def _bad(reader: Reader, conversion: Conversion, row: int, error: SampleError) -> BadSample:
    return BadSample(id=reader.record_id(row), key=f"record {row}", shard=conversion.source.name, reason=str(error))


def _check_bad(bad: list[BadSample], records: int, conversion: Conversion, partial: Path) -> None:
    if len(bad) <= conversion.max_bad * records:
        return
    _write_bad(partial, tuple(asdict(sample) for sample in bad))
    raise DataError(
        f"{len(bad)} bad records of {records} are more than max_bad {conversion.max_bad:g} allows "
        f"(all so far in {partial / BAD_LIST}): {first_three(bad)}. Mend them and run the same command again, "
        "or allow more with max_bad"
    )


def _write_bad(partial: Path, bad: tuple[Any, ...]) -> None:
    lines = "".join(json.dumps(dict(sample), ensure_ascii=False) + "\n" for sample in bad)
    write_bytes(partial / BAD_LIST, lines.encode("utf-8", "backslashreplace"))


def _manifest(conversion: Conversion, done: list[_Done]) -> Manifest:
    shards = tuple(shard for found in done for shard in found.shards)
    skipped = sum((Counter(found.skipped) for found in done), Counter())
    if not shards:
        raise DataError(
            f"{conversion.source}: every record is bad (see {BAD_LIST}) or skipped ({_counted(skipped) or 'none'}), "
            "nothing was written"
        )
    return Manifest(
        name=conversion.name,
        created_by=f"mmit {__version__}",
        shards=shards,
        totals={
            "samples": sum(shard.samples for shard in shards),
            "images": sum(shard.images for shard in shards),
            "text_only": sum(found.text_only for found in done),
            "text_bytes": sum(found.text_bytes for found in done),
            "bad": sum(len(found.bad) for found in done),
            "skipped": skipped.total(),
        },
        recipe_digest=conversion.recipe_digest,
        source=str(conversion.source),
        licence=conversion.licence,
        bad=tuple(asdict(bad) for found in done for bad in found.bad),
        skipped=dict(sorted(skipped.items())),
    )


def _counted(skipped: Mapping[str, int]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in sorted(skipped.items()))


def _plan(conversion: Conversion, reader: Reader) -> dict[str, Any]:
    """What must be unchanged for a conversion to be continued."""
    settings = {k: str(v) for k, v in asdict(conversion).items() if k not in ("target", "max_bad")}
    return {**settings, "records": len(reader), "source_digest": reader.rows.digest(), "version": __version__}


def _done_file(partial: Path, job: int) -> Path:
    return partial / "jobs" / f"{job:06d}.json"


def _read_done(partial: Path, job: int) -> _Done | None:
    """The outcome of a job that an earlier run finished, if its shards are still there."""
    try:
        content = json.loads(_done_file(partial, job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shards = tuple(ShardInfo(**shard) for shard in content["shards"])
    if any(not (path := partial / s.file).is_file() or path.stat().st_size != s.bytes for s in shards):
        return None
    content.update(shards=shards, bad=())
    return _Done(**content)
