"""What a check found: faults by kind and severity, and what a run would make of the data; for terminal and JSON.

Severity: an ``error`` ends training or makes its numbers wrong, a ``warning`` deserves a look, a ``note`` is a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from mmit.data.quarantine import Entry

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXIT_CODES: Mapping[Severity, int] = {"error": 1, "warning": 3, "note": 0}
"""Of the worst finding; 2 is a mistake of the caller."""

SHOWN = 3
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass
class Report:
    """What was found in one set: counts of what is there, and for each kind of fault how often and where first.

    examples: shard and row of the samples in ``places``, by kind. broken: the samples with an error.
    words: number of samples by the bit length of their number of words. tars: by name. url: empty for local shards.
    """

    name: str = ""
    samples: int = 0
    images: int = 0
    text_only: int = 0
    quarantined: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    severity: dict[str, Severity] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    broken: list[Entry] = field(default_factory=list)
    words: Counter[int] = field(default_factory=Counter)
    tars: dict[str, Path] = field(default_factory=dict)
    url: str = ""

    @property
    def exit_code(self) -> int:
        """0 where nothing or only notes were found, 1 with an error, 3 with a warning at worst."""
        found = set(self.severity.values())
        return next((EXIT_CODES[severity] for severity in SEVERITIES if severity in found), 0)

    def add(
        self, place: str, reason: str, severity: Severity = "error", *, sample: tuple[str, int] | None = None
    ) -> None:
        """Note a fault; reasons that differ in numbers and quoted names only are one kind."""
        kind = _DETAIL.sub("…", reason)
        self.faults[kind] += 1
        self.severity[kind] = severity
        shown = self.places.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(f"{place}: {reason}")
            if sample is not None:
                self.examples.setdefault(kind, []).append(sample)

    def merge(self, other: Report) -> None:
        """Take in the findings of another part of the set."""
        self.samples += other.samples
        self.images += other.images
        self.text_only += other.text_only
        self.quarantined += other.quarantined
        self.faults.update(other.faults)
        self.severity |= other.severity
        self.words.update(other.words)
        self.broken += other.broken
        self.tars |= other.tars
        for kind, places in other.places.items():
            self.places[kind] = (self.places.get(kind, []) + places)[:SHOWN]
        for kind, examples in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + examples)[:SHOWN]

    def kinds(self) -> list[tuple[Severity, str]]:
        """Severity and kind of all faults, the worst and most frequent first."""
        found = [(self.severity[kind], kind) for kind, _ in self.faults.most_common()]
        return sorted(found, key=lambda pair: SEVERITIES.index(pair[0]))

    def headline(self) -> str:
        """The counts, in one line."""
        left_out = f", {self.quarantined} in quarantine" if self.quarantined else ""
        return f"{self.name}: {self.samples} samples, {self.images} images, {self.text_only} text-only{left_out}"

    def table(self) -> Table:
        """``severity | fault | count | first three``, for rich to print."""
        table = Table("", "fault", "count", "first three", title=Text(self.headline()))
        for severity, kind in self.kinds():
            table.add_row(severity, Text(kind), str(self.faults[kind]), Text("\n".join(self.places[kind])))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "samples": self.samples,
            "images": self.images,
            "text_only": self.text_only,
            "quarantined": self.quarantined,
            "findings": [
                {"severity": severity, "kind": kind, "count": self.faults[kind], "first": self.places[kind]}
                for severity, kind in self.kinds()
            ],
            "words": {span(bits): self.words[bits] for bits in sorted(self.words)},
        }


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a stage would make of its data.

    lengths: number of samples by the bit length of their tokens, before any is cut. padding: share of the tokens
    that are computed for nothing. tokens: over the whole stage, padding aside. hours: at the stated throughput; 0
    where none is stated. dropped, cut: samples longer than a row that are left out, or lose turns. problem: why there
    is no plan.
    """

    stage: str
    problem: str = ""
    lengths: Mapping[int, int] = field(default_factory=dict)
    longest: int = 0
    samples: int = 0
    dropped: int = 0
    cut: int = 0
    refused: int = 0
    rows: int = 0
    padding: float = 0.0
    steps: int = 0
    tokens: int = 0
    hours: float = 0.0

    def table(self) -> Table:
        """The numbers for rich to print."""
        table = Table(
            "tokens of a sample", "samples", "", title=Text(f"stage {self.stage}"), caption=Text(self.summary())
        )
        table.columns[1].justify = "right"
        for label, count, bar in bars(self.lengths):
            table.add_row(label, str(count), bar)
        return table

    def summary(self) -> str:
        """The prediction in a sentence."""
        if self.problem:
            return f"cannot be planned: {self.problem}"
        hours = f"; {self.hours:.2f} hours at the stated throughput" if self.hours else ""
        return (
            f"{self.samples} samples ({self.refused} refused, {self.dropped} too long and left out, {self.cut} cut), "
            f"longest {self.longest}; {self.tokens} tokens in {self.rows} rows, {self.padding:.1%} padding on top, "
            f"{self.steps} steps{hours}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"lengths": {span(bits): self.lengths[bits] for bits in sorted(self.lengths)}}


@dataclass
class Diagnosis:
    """All that a check says: a report for each set, a prediction for each stage."""

    reports: list[Report] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 with an error anywhere, 3 with a warning at worst, else 0."""
        codes = {report.exit_code for report in self.reports} | {1 for p in self.predictions if p.problem}
        return next((code for code in (1, 3) if code in codes), 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "exit_code": self.exit_code,
            "sets": [report.to_json() for report in self.reports],
            "stages": [prediction.to_json() for prediction in self.predictions],
        }


def span(bits: int) -> str:
    """The numbers of this bit length: ``4-7`` for 3."""
    return f"{1 << bits >> 1}-{(1 << bits) - 1}" if bits > 1 else str(bits)


def bars(counts: Mapping[int, int]) -> Iterator[tuple[str, int, str]]:
    """Span, count and a bar for each bit length."""
    most = max(counts.values(), default=1)
    for bits in sorted(counts):
        yield span(bits), counts[bits], "█" * max(1, round(30 * counts[bits] / most))
