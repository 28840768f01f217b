"""Machine code kept on disk: whatever is wrong with the folder, a model is served."""

import logging
import multiprocessing
from pathlib import Path

import pytest

from narsil_stream.kernels.native import cache

CODE = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NARSIL_KERNEL_CACHE", str(tmp_path / "kernels"))
    cache._warn.cache_clear()
    return tmp_path / "kernels"


def never() -> bytes:
    raise AssertionError("compiled although the cache has it")


def test_code_is_compiled_once(folder: Path) -> None:
    """A second start must not wait for the compiler; nothing else is left in the folder."""
    assert cache.cached("a.bin", lambda: CODE) == CODE
    assert cache.cached("a.bin", never) == CODE
    assert [file.name for file in folder.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty", "of another program"])
def test_a_damaged_file_is_compiled_anew(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk or a power failure leaves such files: the driver's own error would say nothing of the cache."""
    cache.cached("a.bin", lambda: CODE)
    file = folder / "a.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(
        {
            "cut short": file.read_bytes()[:-1],
            "changed": bytes(content),
            "empty": b"",
            "of another program": CODE,
        }[damage]
    )
    assert cache.cached("a.bin", lambda: CODE) == CODE
    assert "a.bin is damaged" in caplog.text
    assert cache.cached("a.bin", never) == CODE


@pytest.mark.parametrize("obstacle", ["a file in its place", "a folder in the file's place"])
def test_an_unusable_folder_costs_one_warning(folder: Path, obstacle: str, caplog: pytest.LogCaptureFixture) -> None:
    """A container without a home that can be written serves all the same, and says what to set."""
    if obstacle == "a folder in the file's place":
        (folder / "a.bin").mkdir(parents=True)
    else:
        folder.write_bytes(b"")
    for _ in range(3):
        assert cache.cached("a.bin", lambda: CODE) == CODE
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "NARSIL_KERNEL_CACHE" in warnings[0].getMessage()


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file must neither take the name nor fill what is left of the disk."""
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        write(path, content[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert cache.cached("a.bin", lambda: CODE) == CODE
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.home` raises where the user has no entry, as in many containers."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NARSIL_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.cached("a.bin", lambda: CODE) == CODE


def test_processes_that_compile_at_the_same_time_do_not_disturb_each_other(folder: Path) -> None:
    """Executors of one machine start together: each gets whole code, and one file stays."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        assert pool.map(_take_turns, range(4)) == [True] * 4
    assert [file.name for file in folder.iterdir()] == ["a.bin"]


def _take_turns(number: int) -> bool:
    """Write and read again and again; what was written last is not of interest, only that it is whole."""
    right = True
    for _ in range(50):
        right &= cache.cached("a.bin", lambda: CODE) == CODE
        cache._write(cache.folder() / "a.bin", CODE)
    return right
