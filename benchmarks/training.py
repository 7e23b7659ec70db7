"""Training speed and memory of mmit beside transformers' Trainer with padded batches, on this machine's CPU.

    python benchmarks/training.py --sizes tiny,small --stages 1,2 --rounds 3

Both train the same random model on the same samples in the same precision with the same optimizer, one thread per rank.
Runs alternate, each in fresh processes; ratios are taken within a round. On a busy machine trust CPU seconds, not the
wall clock.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from contest import check_same_work, prepare, run_mmit, run_trainer
from report import Result, markdown, write
from world import ROWS_PER_STEP, SIZES, World, make_parts


def main() -> None:
    options = _options()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mmit-bench-"))
    try:
        results = [
            _compare(World(folder / size, SIZES[size]), size, stage, options)
            for size in options.sizes
            for stage in options.stages
        ]
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    write(results, options.out, command="python benchmarks/training.py " + " ".join(sys.argv[1:]))
    print(markdown(results))
    print(f"written to {options.out}")


def _compare(world: World, size: str, stage: int, options: argparse.Namespace) -> Result:
    if not world.language_model.exists():
        make_parts(world)
    contest = prepare(world, size, stage, warmup_steps=options.warmup, steps=options.steps)
    mmit, trainer = [], []
    for number in range(options.rounds):
        ours = run_mmit(contest, ranks=options.ranks, overrides=options.set)
        theirs = run_trainer(contest, ranks=options.ranks)
        check_same_work(ours, theirs)
        mmit.append(ours.figures())
        trainer.append(theirs.figures())
        faster = trainer[-1]["cpu_seconds_per_sample"] / mmit[-1]["cpu_seconds_per_sample"]
        print(f"{size} stage {stage} round {number + 1}: {faster:.2f} times less CPU time than the Trainer", flush=True)
    return Result(facts={**contest.facts(), "ranks": options.ranks}, mmit=mmit, trainer=trainer)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=_names, default=list(SIZES), help=f"of {', '.join(SIZES)}, with commas")
    parser.add_argument(
        "--stages", type=_numbers, default=[1, 2], help="1 (connector), 2 (connector and LLM), with commas"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (default 3)")
    parser.add_argument("--ranks", type=int, default=1, choices=range(1, ROWS_PER_STEP + 1), help="processes of each")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of 16 samples (default 6)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for training.json and .md")
    parser.add_argument("--folder", type=Path, help="keep models and data here; else they are made anew and removed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a change to mmit's run file")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SIZES):
        raise argparse.ArgumentTypeError(f"unknown size {', '.join(unknown)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if not set(numbers) <= {1, 2}:
        raise argparse.ArgumentTypeError("stages are 1 and 2")
    return numbers


if __name__ == "__main__":
    main()
