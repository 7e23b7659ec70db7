"""The house's layers: imports go only downwards, and heavy packages stay behind their doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mmit"

LAYERS = {
    "errors": 0,
    "config": 1,
    "config_file": 1,
    "distributed": 1,
    "hub": 1,
    "conversation": 2,
    "images": 2,
    "image_files": 2,
    "resize": 2,
    "tiling": 2,
    "templates": 3,
    "turns": 3,
    "encoding": 3,
    "instructions": 3,
    "tokenizer": 3,
    "batch": 3,
    "data": 4,
    "models": 4,
    "train": 5,
    "chat": 5,
    "evaluate": 5,
    "export": 5,
    "demo": 5,
    "cli": 6,
    "cli_data": 6,
    "cli_machine": 6,
    "cli_models": 6,
    "cli_runs": 6,
    "__main__": 7,
}

DOORS = {
    "deepspeed": {"train"},
    "open_clip": {"models", "demo"},
    "timm": {"models"},
    "webdataset": {"data"},
    "fastapi": {"chat"},
    "uvicorn": {"chat"},
    "peft": {"models"},
    "bitsandbytes": {"models"},
}

# evaluation and chat generate with the same code, and the demo tells the whole story
SIBLINGS_ALLOWED = {("demo", "train"), ("demo", "evaluate"), ("demo", "chat"), ("evaluate", "chat"), ("export", "chat")}


def imports_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"{node.module}.{alias.name}" if node.module == "mmit" else node.module for alias in node.names]
    return names


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in modules()} <= set(LAYERS)


def test_imports_go_only_downwards() -> None:
    upward = []
    for path in modules():
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "mmit" or len(parts) < 2 or parts[1] not in LAYERS or parts[1] == room:
                continue
            target = parts[1]
            if (room, target) in SIBLINGS_ALLOWED or LAYERS[target] < LAYERS[room]:
                continue
            if LAYERS[target] == LAYERS[room] and LAYERS[room] in (1, 2, 3, 6):
                continue
            upward.append(f"{path.relative_to(ROOT)} imports mmit.{target}")
    assert upward == []


def test_heavy_packages_stay_behind_their_doors() -> None:
    strays = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        for name in imports_of(path)
        if name.split(".")[0] in DOORS and room_of(path) not in DOORS[name.split(".")[0]]
    ]
    assert strays == []


def test_open_clip_and_webdataset_each_have_one_module() -> None:
    users = {package: set() for package in ("open_clip", "webdataset")}
    for path in modules():
        for name in imports_of(path):
            if name.split(".")[0] in users and room_of(path) != "demo":
                users[name.split(".")[0]].add(str(path.relative_to(ROOT)))
    assert {package: len(files) for package, files in users.items()} == {"open_clip": 1, "webdataset": 1}


@pytest.mark.parametrize("module", ["mmit", "mmit.cli", "mmit.config_file"])
def test_no_torch_on_the_way_to_help_and_config(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_listed_and_exist() -> None:
    import mmit

    assert mmit.__all__ == sorted(mmit.__all__)
    assert all(getattr(mmit, name) is not None for name in mmit.__all__)
