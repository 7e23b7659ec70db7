"""Stage 1 with and without cached features, against the gain that the tower's share of the work predicts.

    python benchmarks/features.py --sizes tiny,tower --rounds 3

Both ways train the same random model on the same samples in the same steps, one thread per rank; runs alternate, each
in a fresh process. Of every round the share of the tower is measured: the CPU time of its forward pass over the samples
of the timed steps, row by row. A run that loads no tower should save that time: the ratio is the share of the predicted
gain that was reached, (measured - 1) / (predicted - 1). Above 1: pictures are not decoded either. Least CPU seconds of
all rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contest import STAGE, Contest, prepare, run_mmit
from report import machine
from world import SIZES as PLAIN_SIZES
from world import World, make_parts

BAR = 0.9
FIGURES = ("cpu_seconds_per_sample", "peak_mib", "loss")
SIZES = PLAIN_SIZES | {
    "tower": replace(PLAIN_SIZES["tiny"], pixels=168, vision_width=384, vision_layers=6, vision_heads=6),
}
"""``tower`` has the encoder of ``small`` before the language model of ``tiny``: what cached features are for."""


def main() -> None:
    options = _options()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mmit-bench-"))
    try:
        results = [_compare(World(folder / size, SIZES[size]), size, options) for size in options.sizes]
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "bar": BAR, "results": results}
    (options.out / "features.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(
            f"{result['size']}: {result['predicted_by_operations']:.2f} times by operations, "
            f"{result['predicted']:.2f} by the tower's CPU time, {result['measured']:.2f} measured, "
            f"{result['reached']:.0%} of the gain (bar {BAR:.0%}); peak {result['peak_mib'][0]:.0f} -> "
            f"{result['peak_mib'][1]:.0f} MiB; loss {result['loss'][0]:.4f} -> {result['loss'][1]:.4f}"
        )


def _compare(world: World, size: str, options: argparse.Namespace) -> dict[str, Any]:
    from mmit.config import load_config
    from mmit.train.feature_cache import cache_features
    from mmit.train.features import look_at
    from mmit.train.prediction import predict

    if not world.language_model.exists():
        make_parts(world)
    contest = prepare(world, size, 1, warmup_steps=options.warmup, steps=options.steps)
    overrides = [f"stages.{STAGE}.data.features={world.folder / 'features'}"]
    config = load_config(world.run_file(1), overrides)
    look = look_at(config, STAGE, dtype=torch.float32)
    prediction = predict(config, STAGE, look)
    cache_features(config, STAGE, [], ranks=1, say=print)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        plain = run_mmit(contest, ranks=1, overrides=[]).figures()
        tower = _tower_seconds(look, contest)
        cached = run_mmit(contest, ranks=1, overrides=overrides).figures()
        figures = {"tower": tower} | {f"{n} {way}": run[n] for n in FIGURES for way, run in _both(plain, cached)}
        rounds.append(figures)
        print(f"{size} round {number + 1}: {figures}", flush=True)
    # on a machine that others use the least CPU time is the one that they disturbed least
    least = {name: min(figures[name] for figures in rounds) for name in rounds[0]}
    before, after = (least[f"cpu_seconds_per_sample {way}"] for way in ("plain", "cached"))
    measured, predicted = before / after, before / (before - least["tower"])
    return {
        "size": size,
        "samples": len(contest.timed),
        "predicted_by_operations": prediction.gain,
        "predicted": predicted,
        "measured": measured,
        "reached": (measured - 1) / (predicted - 1),
        "tower": least["tower"],
        **{name: [least[f"{name} plain"], least[f"{name} cached"]] for name in FIGURES},
        "rounds": rounds,
    }


def _both(plain: dict[str, float], cached: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    return [("plain", plain), ("cached", cached)]


@torch.no_grad()
def _tower_seconds(look: Any, contest: Contest) -> float:
    """CPU seconds of the tower for one sample of the timed steps, row by row."""
    from mmit.models.vlm import tower_features

    torch.set_num_threads(1)
    plan = look.plan
    rows = [row for step in range(contest.warmup_steps, plan.steps) for row in plan.step(step)]
    tower = look.tower.module.to("cpu")
    seconds, samples = 0.0, 0
    for row in rows:
        images = [image for source, number in row.samples for image in plan.sources[source].read(number).images]
        if not images:
            continue
        tiles = torch.cat([look.spec.prepare(image) for image in images])
        started = time.process_time()
        tower_features(tower, tiles, look.spec)
        seconds += time.process_time() - started
        samples += len(row.samples)
    return seconds / samples


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=_names, default=["tiny", "tower"], help=f"of {', '.join(SIZES)}, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of 16 samples (default 6)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for features.json")
    parser.add_argument("--folder", type=Path, help="keep models and data here; else they are made anew and removed")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SIZES):
        raise argparse.ArgumentTypeError(f"unknown size {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    main()
