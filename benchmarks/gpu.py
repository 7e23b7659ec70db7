"""Training on one GPU at true shapes: samples/s, tokens/s, share of the device's matrix rate, memory, a profile.

    python benchmarks/gpu.py                            0.5B and 7B, both stages, isolation of every attention kernel
    python benchmarks/gpu.py --sizes 0.5b --stages 2 --set attention=mmit_packed
    python benchmarks/gpu.py --device cpu --sizes toy   shows that it runs; its figures mean nothing

Weights are random, lengths are those of LLaVA's data. Each case is a process of its own; one that runs out of memory
is tried again with shorter rows, or with activations recomputed. MFU counts useful operations only: no padding,
nothing recomputed, the head where there is a label.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import yaml

WAYS: dict[tuple[str, int], list[tuple[int, int, bool]]] = {
    ("0.5b", 1): [(32768, 2, False), (16384, 4, False)],
    ("0.5b", 2): [(32768, 2, False), (16384, 4, False), (8192, 8, False)],
    ("7b", 1): [(16384, 2, False), (8192, 4, False), (8192, 4, True)],
    ("7b", 2): [(4096, 8, False), (2048, 16, False), (8192, 4, True), (4096, 8, True)],
    ("toy", 1): [(128, 2, False)],
    ("toy", 2): [(128, 2, False)],
}
"""For each size and stage: tokens of a row, rows in a step, recomputation; the first that fits is measured."""
BARS = {("7b", 2): 13.0, ("7b", 1): 25.0, ("0.5b", 2): 110.0}
"""Samples a second to reach on one H200."""
AIM, LEAST = 0.55, 0.49
"""MFU to reach, and the least that is worth reporting."""
OUT_OF_MEMORY = 3


def main() -> int:
    options = _options()
    if options.case:
        return _child(json.loads(options.case))
    report: dict[str, Any] = {"cases": []}
    report |= _run({"kind": "isolation", "device": options.device, "sizes": options.sizes})
    _write(report, options.out)
    for size in options.sizes:
        for stage in options.stages:
            report["cases"].append(_case(size, stage, options))
            _write(report, options.out)
    print(markdown(report))
    print(f"written to {options.out}")
    return 0


def _case(size: str, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """The first way that fits into memory."""
    for length, rows, recomputed in WAYS[size, stage]:
        settings = {"activation_checkpointing": recomputed, **_settings(options.set)}
        asked = {
            "size": size,
            "stage": stage,
            "length": length,
            "rows": rows,
            "settings": settings,
            "device": options.device,
            "steps": options.steps,
            "warmup": options.warmup,
        }
        print(f"{size} stage {stage}: rows of {length} tokens, {settings}", flush=True)
        found = _run({"kind": "step", **asked})
        if found:
            return {**asked, **found}
        print("  does not fit into memory", flush=True)
    return {"size": size, "stage": stage, "failed": "no way of it fits into memory"}


def _run(case: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own found; nothing where it ran out of memory."""
    command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == OUT_OF_MEMORY:
        return {}
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def _child(case: dict[str, Any]) -> int:
    import torch
    from gpu_isolation import kernels, try_kernel
    from gpu_model import SHAPES
    from gpu_step import Case, measure

    from mmit.train.work import peak

    kind, device = case.pop("kind"), case["device"]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if kind == "isolation":
        found = {
            size: [_one(try_kernel, SHAPES[size], name, device, dtype) for name in kernels()] for size in case["sizes"]
        }
        name = "CPU" if device == "cpu" else torch.cuda.get_device_name()
        rate = peak(dtype)
        print(json.dumps({"device": name, "torch": torch.__version__, "matrix_rate": rate, "isolation": found}))
        return 0
    try:
        print(json.dumps(measure(Case(**case))))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return 0


def _one(test: Any, shape: Any, kernel: str, device: str, dtype: Any) -> dict[str, Any]:
    seen = test(shape, kernel, length=64 if device == "cpu" else 4096, device=device, dtype=dtype)
    return {**asdict(seen), "holds": seen.holds(dtype)}


def figures(case: dict[str, Any], rate: float) -> dict[str, float]:
    """Samples and tokens a second by the median step, MFU, and GiB at the peak."""
    seconds = median(case["seconds"]) * len(case["seconds"])
    return {
        "samples_per_second": case["samples"] / seconds,
        "tokens_per_second": case["tokens"] / seconds,
        "mfu": sum(case["flops"].values()) / seconds / rate,
        "peak_gib": case["peak_bytes"] / 2**30,
    }


def markdown(report: dict[str, Any]) -> str:
    """All that was found, as tables."""
    rate = report["matrix_rate"]
    lines = [
        f"{report['device']}, torch {report['torch']}, matrix products at {rate / 1e12:.3g} TFLOP/s.",
        "",
        "| size | stage | row | attention | recomputed | samples/s | bar | tokens/s | MFU | aim | least | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    measured = [case for case in report["cases"] if "seconds" in case]
    for case in measured:
        found = figures(case, rate)
        bar = BARS.get((case["size"], case["stage"]), "")
        lines.append(
            f"| {case['size']} | {case['stage']} | {case['length']} | {case['attention']} "
            f"| {'yes' if case['settings']['activation_checkpointing'] else 'no'} | {found['samples_per_second']:.1f} "
            f"| {bar} | {found['tokens_per_second']:.0f} | {found['mfu']:.1%} | {AIM:.0%} | {LEAST:.0%} "
            f"| {found['peak_gib']:.1f} |"
        )
    lines += [f"| {c['size']} | {c['stage']} | {c['failed']} |" for c in report["cases"] if "failed" in c]
    for case in measured:
        lines += ["", *_profile(case)]
    lines += [
        "",
        "| size | kernel | samples kept apart | leak | gradient leak | against alone | ms |",
        "| --- |" + " --- |" * 6,
    ]
    for size, seen in report["isolation"].items():
        for one in seen:
            told = one["refused"] or ("yes" if one["holds"] else "NO")
            numbers = (
                f"{one['leak']:.2g} | {one['gradient_leak']:.2g} | {one['difference']:.2g} | {one['milliseconds']:.1f}"
            )
            lines.append(f"| {size} | {one['kernel']} | {told} | {numbers if not one['refused'] else ' | | |'} |")
    return "\n".join(lines) + "\n"


def _profile(case: dict[str, Any]) -> list[str]:
    seen, held = case["profile"], case["held_bytes"]
    whole = seen["milliseconds"]
    peak = case["peak_bytes"]
    parts = {**held, "activations and gradients at the peak": max(0, peak - sum(held.values()))}
    flops, name = case["flops"], f"{case['size']} stage {case['stage']}"
    return [
        f"{name}, one step under the profiler: {whole:.1f} ms, device idle {seen['idle']:.1f} ms.",
        "",
        "| kind of kernel | ms | share |",
        "| --- | --- | --- |",
        *(f"| {name} | {spent:.1f} | {spent / whole:.1%} |" for name, spent in seen["kinds"].items()),
        "",
        "| longest kernels | ms |",
        "| --- | --- |",
        *(f"| `{name}` | {spent:.1f} |" for name, spent in seen["longest"].items()),
        "",
        "| memory | GiB |",
        "| --- | --- |",
        *(f"| {name} | {size / 2**30:.2f} |" for name, size in parts.items()),
        "",
        "| useful operations | share |",
        "| --- | --- |",
        *(f"| {name} | {count / sum(flops.values()):.1%} |" for name, count in flops.items()),
    ]


def _write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(report), encoding="utf-8")


def _settings(changes: list[str]) -> dict[str, Any]:
    """``a.b=c`` as keys of the run file's stage."""
    found: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        *parents, last = key.split(".")
        here = found
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = yaml.safe_load(value)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    sizes = sorted({size for size, _ in WAYS})
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--sizes", type=lambda text: text.split(","), default=["0.5b", "7b"], help=f"of {', '.join(sizes)}"
    )
    parser.add_argument("--stages", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--out", type=Path, default=Path("bench_results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a change to the run file's stage")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
