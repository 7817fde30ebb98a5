"""Nothing that existed is lost, and an interrupted run goes on where it stopped, to the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import contents, save_model

from qcore.backend.registry import use_backend
from qcore.errors import FormatError, OutputError
from qcore.formats.output import open_partial, partial_path
from qcore.formats.plan import Options
from qcore.formats.quantize import Listener, quantize_checkpoint

OPTIONS = Options("nf4", shard_bytes=20_000)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with use_backend("cpu_reference"):
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "float")


class Interrupt(Listener):
    """Interrupts a run while it verifies its n-th shard; keeps the names of shards taken over."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen, self.taken_over = at, 0, list[str]()

    def verifying(self, shard: str) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt

    def kept(self, shard: str, nbytes: int) -> None:
        self.taken_over.append(shard)


def run(source: Path, out: Path, options: Options = OPTIONS, *, at: int | None = None, **flags: bool) -> Interrupt:
    listener = Interrupt(at)
    quantize_checkpoint(source, out, options, listener=listener, **flags)
    return listener


def interrupt(source: Path, out: Path, at: int, **flags: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, out, at=at, **flags)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_gives_the_same_bytes(tmp_path: Path, source: Path, at: int) -> None:
    run(source, tmp_path / "whole")
    out = tmp_path / "resumed"
    interrupt(source, out, at)
    assert not out.exists()
    resumed = run(source, out)
    assert len(resumed.taken_over) == at - 1
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial_path(out).exists()


class Stop(Listener):
    """Interrupts a run after ``tensors`` of its tensors; keeps what was taken over of an unfinished shard."""

    def __init__(self, tensors: int | None) -> None:
        self.left, self.taken_over, self.read_again = tensors, list[tuple[str, int]](), 0

    def read(self, nbytes: int) -> None:
        self.read_again += nbytes
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def resumed(self, shard: str, tensors: int, of: int, nbytes: int) -> None:
        assert 0 < tensors <= of
        self.taken_over.append((shard, tensors))


ONE_SHARD = Options("nf4")


def stopped(source: Path, out: Path, tensors: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, ONE_SHARD, listener=Stop(tensors))


@pytest.mark.parametrize("tensors", [1, 2, 9])
def test_a_run_goes_on_inside_an_unfinished_shard(tmp_path: Path, source: Path, tensors: int) -> None:
    whole = quantize_checkpoint(source, tmp_path / "whole", ONE_SHARD)
    out = tmp_path / "out"
    stopped(source, out, tensors)
    resumed = Stop(None)
    assert quantize_checkpoint(source, out, ONE_SHARD, listener=resumed) == whole
    # The tensor that was being written when it stopped is not vouched for.
    assert [count for _, count in resumed.taken_over] == ([tensors - 1] if tensors > 1 else [])
    assert contents(out) == contents(tmp_path / "whole")


def damage_file(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    start = len(data) // 3
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)


def damage_log(folder: Path) -> None:
    (path,) = folder.glob("*.steps")
    path.write_bytes(path.read_bytes()[:-20])


def remove_file(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.unlink()


def shorten_file(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    os.truncate(path, 1000)


def swap_lines(folder: Path) -> None:
    (path,) = folder.glob("*.steps")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize("damage", [damage_file, damage_log, remove_file, shorten_file, swap_lines])
def test_damage_to_an_unfinished_shard_costs_steps_and_nothing_else(
    tmp_path: Path, source: Path, damage: Callable[[Path], None]
) -> None:
    whole = quantize_checkpoint(source, tmp_path / "whole", ONE_SHARD)
    out = tmp_path / "out"
    stopped(source, out, 9)
    damage(partial_path(out))
    resumed = Stop(None)
    assert quantize_checkpoint(source, out, ONE_SHARD, listener=resumed) == whole
    assert sum(count for _, count in resumed.taken_over) < 8
    assert contents(out) == contents(tmp_path / "whole")


def test_a_report_after_resuming_is_complete(tmp_path: Path, source: Path) -> None:
    whole = quantize_checkpoint(source, tmp_path / "whole", OPTIONS)
    interrupt(source, tmp_path / "out", 3)
    assert quantize_checkpoint(source, tmp_path / "out", OPTIONS) == whole


def test_a_run_can_be_interrupted_again_and_again(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    for _ in range(3):
        interrupt(source, out, 2)
    run(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kept_shard_that_was_damaged_is_written_again(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    interrupt(source, out, 3)
    first = sorted(partial_path(out).glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-9] ^= 1
    first.write_bytes(data)
    assert len(run(source, out).taken_over) == 1
    assert contents(out) == contents(tmp_path / "whole")


def test_other_arguments_do_not_continue_a_run(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    interrupt(source, out, 2)
    before = contents(partial_path(out))
    other = Options("fp4", shard_bytes=20_000)
    with pytest.raises(OutputError, match=r"format \('nf4', now 'fp4'\).*--restart"):
        run(source, out, other)
    assert contents(partial_path(out)) == before
    run(source, out, other, restart=True)
    run(source, tmp_path / "whole", other)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_changed_source_does_not_continue_a_run(tmp_path: Path, source: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    save_model("llama", source, seed=1)
    with pytest.raises(OutputError, match="differs in source files"):
        run(source, tmp_path / "out")


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path: Path, source: Path) -> None:
    class Touch(Listener):
        def verifying(self, shard: str) -> None:
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(FormatError, match="changed while they were read"):
        quantize_checkpoint(source, tmp_path / "out", OPTIONS, listener=Touch())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99, "identity": {}, "shards": {}}'])
def test_a_damaged_journal_asks_for_a_restart(tmp_path: Path, source: Path, text: str) -> None:
    interrupt(source, tmp_path / "out", 2)
    (partial_path(tmp_path / "out") / "journal.json").write_text(text)
    with pytest.raises(OutputError, match="--restart"):
        run(source, tmp_path / "out")


def test_two_runs_do_not_write_one_folder(tmp_path: Path, source: Path) -> None:
    with (
        open_partial(tmp_path / "out", {}, restart=False, nbytes=0),
        pytest.raises(OutputError, match="another run is writing it"),
    ):
        run(source, tmp_path / "out")


def test_an_existing_output_is_not_touched(tmp_path: Path, source: Path) -> None:
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"):
        run(source, tmp_path / "out", Options("fp4"))
    assert contents(tmp_path / "out") == before


def test_force_keeps_the_old_output_until_the_new_one_is_complete(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(source, out, Options("fp4"))
    before = contents(out)
    interrupt(source, out, 2, force=True)
    assert contents(out) == before
    run(source, out, force=True)
    run(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "whole"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.EIO, "the disk fails"), OutputError), (KeyboardInterrupt("the disk fails"), KeyboardInterrupt)],
    ids=["disk", "signal"],
)
def test_the_old_output_comes_back_when_the_rename_fails(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(source, out, Options("fp4"))
    before, rename = contents(out), os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(old) == partial_path(out):
            raise error
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(raised, match="the disk fails"):
        run(source, out, force=True)
    assert contents(out) == before


def test_force_replaces_no_folder_that_is_not_a_model(tmp_path: Path, source: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no model \(no config.json\)"):
        run(source, tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years of work"


def test_an_empty_folder_may_be_the_output(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("where", ["float", ".", "float/inside"])
def test_the_source_is_not_overwritten(tmp_path: Path, source: Path, where: str) -> None:
    before = contents(source)
    with pytest.raises(OutputError, match="choose another output folder"):
        run(source, tmp_path / where, force=True)
    assert contents(source) == before


def test_a_parent_that_does_not_exist_is_named(tmp_path: Path, source: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; make it first"):
        run(source, tmp_path / "no/such/out")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file; choose another place"):
        run(source, tmp_path / "file/out")


def test_a_folder_that_cannot_be_written_is_an_output_error(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OutputError, match=r"Permission denied; choose another output folder"):
        run(source, tmp_path / "out")


def test_too_little_space_is_known_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="the disk has 1,000"):
        run(source, tmp_path / "out")
    assert not list(partial_path(tmp_path / "out").glob("*.safetensors"))


def test_a_disk_that_fills_up_leaves_the_finished_shards(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole")
    out, write, written = tmp_path / "out", os.pwrite, 0

    def filling(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 70_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(OutputError, match="No space left on device"):
            run(source, out)
    assert not out.exists()
    assert len(run(source, out).taken_over) >= 1
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path: Path, source: Path, share: float) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match="truncated"):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
