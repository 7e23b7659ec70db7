"""A page of samples to look through in a browser, without a server."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mmit.data.atomic import cannot_write, write_whole
from mmit.data.faults import StorageError
from mmit.data.order import key, permutation
from mmit.data.page import card, page
from mmit.data.shard_set import open_source
from mmit.errors import DataError


def browse(source: str | Path, out: Path, *, samples: int = 50, seed: int = 0) -> int:
    """Write a page of ``samples`` samples, drawn at random and in the order of the shards; how many there are.

    Raises DataError for shards that cannot be opened or a file that cannot be written.
    """
    shards = open_source(source)
    chosen = sorted(permutation(len(shards), key(seed, "browse"))[:samples].tolist())
    body = [f"<p>{len(chosen)} of {len(shards)} samples.</p>"]
    for number in chosen:
        shard, name = shards.place(number)
        heading = f"sample {number}: {shard} {name}"
        try:
            conversation = shards.read(number)
        except StorageError:
            raise
        except DataError as error:
            body.append(f'<div class="card"><h3>{escape(heading)}</h3>{escape(str(error))}</div>\n')
        else:
            body.append(card(f"{heading} ({conversation.id})", conversation))
    save_page(out, page(shards.name, body))
    return len(chosen)


def save_page(out: Path, text: str) -> None:
    """Write a page whole or not at all; halves of surrogate pairs in it become question marks. Raises DataError."""
    try:
        write_whole(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise cannot_write(out, error) from None
