"""Training speed and memory of mmit, and of four other ways to train the same model, on this machine's CPU.

    python benchmarks/training.py                       about 15 minutes, as many rounds as fit
    python benchmarks/training.py --rounds 3 --steps 6,2 --again mmit,trainer,grouped --write-docs
    python benchmarks/training.py --sizes tiny --stages 2 --ranks 1 --systems mmit,trainer --steps 4

All train the same random model on the same samples in the same precision with the same optimizer, one thread per rank.
Systems take turns, each run in fresh processes; ratios are taken within a round. On a busy machine trust CPU seconds,
not the wall clock. Results are written after every run: Ctrl-C keeps the table so far.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any, TypeVar

from contest import Contest, Run, prepare
from report import CPU, Result, chart, heading, machine, markdown, read, replace_section, summary, write
from schedule import PREPARING, Cell, choose_steps, measure_speed, round_seconds
from systems import BASE, OURS, PEERS, TITLES, check_same_work, here, run
from world import ROWS_PER_STEP, SIZES, World, make_parts

MOST_ROUNDS = 5
ROOT = Path(__file__).parents[1]
PICTURE = "training_speed.svg"
T = TypeVar("T")
SECTION = "training speed, written by benchmarks/training.py"


def main() -> int:
    options = _options()
    if options.only_report:
        results, command, on = read(options.out)
    else:
        folder = options.folder or Path(tempfile.mkdtemp(prefix="mmit-bench-"))
        comparison = Comparison(options, folder)
        results, command, on = comparison.results, comparison.command, comparison.machine
        try:
            comparison.measure()
        except KeyboardInterrupt:
            print(f"stopped; what was measured so far:\n\n{markdown(results, command=command, on=on)}")
            return 130
        finally:
            if options.folder is None:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{markdown(results, command=command, on=on)}\nwritten to {options.out}")
    if options.write_docs:
        _write_docs(results, command=command, on=on)
    return 0


class Comparison:
    """All rounds of all cells; ``results`` grow with every run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.command = _command(sys.argv[1:])
        self.machine = machine()
        self.cells = [Cell(*names) for names in product(options.sizes, options.stages, options.ranks)]
        self.results: list[Result] = []
        if options.add:
            self.results, before, _ = read(options.out)
            self.command = f"{before}` and `{self.command}"
        self._of = {Cell(*(found.facts[key] for key in ("size", "stage", "ranks"))): found for found in self.results}
        self._contests: dict[tuple[str, int], Contest] = {}
        self._took: dict[Cell, float] = {}

    def measure(self) -> None:
        """Run everything that the options ask for."""
        started, options = time.monotonic(), self.options
        seconds = options.minutes * 60
        steps = self._plan(seconds)
        for number in count(1):
            left = seconds - (time.monotonic() - started)
            cells = self._next(number, left)
            if not cells:
                return
            for cell in cells:
                self._run_cell(cell, number, steps[cell.size, cell.stage])
            minutes = (time.monotonic() - started) / 60
            print(f"round {number} is done after {minutes:.1f} minutes", flush=True)

    def _plan(self, seconds: float) -> dict[tuple[str, int], int]:
        """Timed steps of each size and stage; says what is coming."""
        options, speed = self.options, measure_speed()
        made = PREPARING * len(options.sizes) * len(options.stages)
        if options.steps:
            of_size = dict(zip(options.sizes, options.steps * len(options.sizes), strict=False))
            steps = {(cell.size, cell.stage): of_size[cell.size] for cell in self.cells}
        else:
            room = (seconds - made) if options.rounds is None else float("inf")
            steps = choose_steps(speed, self.cells, options.systems, warmup=options.warmup, seconds=room)
        for cell in self.cells:
            self._took[cell] = round_seconds(speed, [cell], options.systems, steps, warmup=options.warmup)
        first = self._next(1, seconds - made)
        one = sum(self._took[cell] for cell in first)
        another = round_seconds(speed, first, self._systems(2), steps, warmup=options.warmup)
        rounds = options.rounds or max(1, min(MOST_ROUNDS, 1 + int((seconds - made - one) / another)))
        chosen = ", ".join(f"{size} stage {stage}: {number}" for (size, stage), number in steps.items())
        print(f"one thread multiplies matrices at {speed.flops / 1e9:.0f} GFLOP/s; a start takes {speed.start:.0f} s")
        print(f"timed steps of 16 samples: {chosen}")
        print(
            f"a round is {len(first) * len(options.systems)} runs in about {one / 60:.0f} minutes on idle cores; "
            f"about {(made + one + (rounds - 1) * another) / 60:.0f} minutes for {rounds} round{'s'[: rounds > 1]}",
            flush=True,
        )
        if left_out := [f"{c.size} stage {c.stage} on {c.ranks}" for c in self.cells if c not in first]:
            print(f"no time for {', '.join(left_out)}: --rounds 1 runs all, --minutes gives more", flush=True)
        return steps

    def _systems(self, number: int) -> list[str]:
        """The systems of a round."""
        return self.options.systems if number == 1 else self.options.again or self.options.systems

    def _next(self, number: int, left: float) -> list[Cell]:
        """The cells of a round: all that were asked for, or those that fit into the seconds left, one at least."""
        if self.options.rounds is not None:
            return self.cells if number <= self.options.rounds else []
        cheapest_first = sorted(self.cells, key=self._took.__getitem__) if number <= MOST_ROUNDS else []
        fitting: list[Cell] = []
        for cell in cheapest_first:
            left -= self._took[cell]
            if left > 0 or (number == 1 and not fitting):
                fitting.append(cell)
        return fitting

    def _run_cell(self, cell: Cell, number: int, steps: int) -> None:
        contest = self._contest(cell, steps)
        started = time.monotonic()
        facts = {**contest.facts(), "ranks": cell.ranks}
        if cell not in self._of:
            self._of[cell] = Result(facts=facts)
            self.results.append(self._of[cell])
            self.results.sort(key=_order)
        result, runs = self._of[cell], dict[str, Run]()
        if result.facts != facts:
            raise SystemExit(f"--add: {result.name} was measured with other steps ({result.facts}, now {facts})")
        result.rounds.append({})
        # each round begins with another system, so that none is always behind the same one
        systems = self._systems(number)
        turn = (number - 1) % len(systems)
        for system in systems[turn:] + systems[:turn]:
            runs[system] = run(system, contest, ranks=cell.ranks, overrides=self.options.set)
            check_same_work(runs)
            result.rounds[-1][system] = runs[system].figures()
            write(self.results, self.options.out, command=self.command, on=self.machine)
        self._took[cell] = time.monotonic() - started
        seconds = ", ".join(f"{TITLES[name]} {found[CPU]:.4f}" for name, found in result.rounds[-1].items())
        print(f"round {number}: {result.name}: CPU s/sample: {seconds} ({self._took[cell]:.0f} s)", flush=True)

    def _contest(self, cell: Cell, steps: int) -> Contest:
        """The data and the models of a size and a stage, made when they are first needed."""
        key = cell.size, cell.stage
        if key not in self._contests:
            world = World(self.folder / cell.size, SIZES[cell.size])
            if not world.language_model.exists():
                make_parts(world)
            self._contests[key] = prepare(world, cell.size, cell.stage, warmup_steps=self.options.warmup, steps=steps)
        return self._contests[key]


def _write_docs(results: list[Result], *, command: str, on: dict[str, Any]) -> None:
    """Everything into docs/performance.md, chart and summary into README.md, where these have a place for it."""
    (ROOT / "docs" / PICTURE).write_text(chart(results), encoding="utf-8")
    told = heading(results, command=command, on=on)
    in_full, in_short = markdown(results, command=command, on=on), f"{told}{summary(results)}"
    for page, picture, text in (
        ("docs/performance.md", PICTURE, in_full),
        ("README.md", f"docs/{PICTURE}", in_short),
    ):
        shown = f"![Training speed by CPU time]({picture})\n\n{text}"
        print(f"{page}: {'written' if replace_section(ROOT / page, SECTION, shown) else 'has no place for it'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    names, numbers = partial(_some, parse=str), partial(_some, parse=int)
    add = parser.add_argument
    add("--sizes", type=partial(names, of=list(SIZES)), default=list(SIZES), help=f"of {', '.join(SIZES)}, with commas")
    add(
        "--stages",
        type=partial(numbers, of=[1, 2]),
        default=[1, 2],
        help="1 (connector), 2 (connector and LLM)",
    )
    add("--ranks", type=partial(numbers, of=range(1, ROWS_PER_STEP + 1)), default=[1, 2], help="of 1, 2")
    add("--systems", type=partial(names, of=list(TITLES)), default=here(), help=f"of {', '.join(TITLES)}")
    add("--minutes", type=float, default=15.0, help="choose steps and rounds so that this is enough (default 15)")
    add("--rounds", type=int, help="runs of each system, however long they take")
    add("--again", type=partial(names, of=list(TITLES)), help="of those, which run in the rounds after the first")
    add("--steps", type=_counts, help="timed optimizer steps of 16 samples, of all sizes or of each (else chosen)")
    add("--warmup", type=int, default=1, help="steps before them (default 1)")
    add("--out", type=Path, default=Path("bench_results"), help="folder for training.json, .md and .svg")
    add("--write-docs", action="store_true", help="also put tables and chart into docs/ and README.md")
    add("--add", action="store_true", help="go on with what --out holds: further rounds and other cells")
    add("--only-report", action="store_true", help="measure nothing; report what --out holds")
    add("--folder", type=Path, help="keep models and data here; else they are made anew and removed")
    add("--set", action="append", default=[], metavar="a.b=c", help="a change to mmit's run file")
    options = parser.parse_args()
    if {OURS, BASE} - set(options.systems) or {OURS, BASE} - set(options.again or options.systems):
        parser.error(f"--systems, --again: {OURS} and {BASE} are what ratios are taken between; keep both")
    if options.add and not (options.out / "training.json").is_file():
        parser.error(f"--add: {options.out} holds no training.json of an earlier call")
    if options.steps and len(options.steps) not in {1, len(options.sizes)}:
        parser.error("--steps: give one number, or one for each of the sizes")
    if "trl" in options.systems and importlib.util.find_spec("trl") is None:
        others = ",".join(name for name in (OURS, *PEERS) if name != "trl")
        parser.error(f"TRL is not installed: pip install 'mmit[bench]', or leave it out with --systems {others}")
    return options


def _order(result: Result) -> tuple[int, int, int]:
    """Where a cell stands in the tables."""
    return list(SIZES).index(result.facts["size"]), result.facts["stage"], result.facts["ranks"]


def _command(arguments: Sequence[str]) -> str:
    """The call as it is told: places on this machine say nothing about what was measured."""
    places = {at for at, word in enumerate(arguments) if word in {"--folder", "--out"}}
    told = [word for at, word in enumerate(arguments) if not {at, at - 1} & places]
    return " ".join(["python benchmarks/training.py", *told])


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("a step at least")
    return counts


def _some(text: str, *, parse: Callable[[str], T], of: Sequence[T]) -> list[T]:
    values = [parse(part) for part in text.split(",")]
    if any(value not in of for value in values):
        raise argparse.ArgumentTypeError(f"choose of {', '.join(map(str, of))}, with commas between them")
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    raise SystemExit(main())
