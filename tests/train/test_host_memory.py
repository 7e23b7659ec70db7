"""The memory that a copy may take."""

from pathlib import Path

from mmit.train.host_memory import copies_fit, free_memory


def test_a_containers_limit_counts_and_what_its_file_cache_holds_is_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  64000 kB\nMemAvailable:   48000 kB\n")
    assert free_memory(tmp_path / "meminfo", tmp_path / "none") == 48000 * 1024
    for name, text in (("memory.max", "10000\n"), ("memory.current", "9000\n"), ("memory.stat", "inactive_file 500\n")):
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path / "meminfo", tmp_path) == 10000 - 9000 + 500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path / "meminfo", tmp_path) == 48000 * 1024
    assert free_memory(tmp_path / "nothing") == 0


def test_a_small_copy_fits_and_one_of_a_petabyte_does_not() -> None:
    assert copies_fit(1000)
    assert not copies_fit(10**15)
