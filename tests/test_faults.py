"""Damaged files, full disks, signals: harmless or one sentence, and never another result in silence."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel import Step
from bilevel.checkpoint import read_checkpoint, write_atomically
from bilevel.cli import main
from bilevel.cli.progress import Progress
from bilevel.cli.signals import Stop
from bilevel.errors import WriteError
from bilevel.files import append_text, write_text
from bilevel.methods import BiDVL
from bilevel.methods.data.images import load_images
from bilevel.methods.data.tables import load_table
from bilevel.methods.evaluation.features import classifier, save_classifier
from bilevel.methods.report.pictures import save_curves, save_grid
from bilevel.methods.suite import run_suite
from bilevel.methods.training.run import Run
from bilevel.methods.training.weights import write_weights
from tests import faults

Capture = pytest.CaptureFixture[str]


def make_world(world: Path) -> None:
    """A finished run, one and a suite that were stopped midway, a suite, a feature network."""
    data = world / "data.npz"
    faults.images(data)
    with contextlib.redirect_stdout(io.StringIO()):
        options = ["--num-steps", "6", "--evaluate-every", "2"]
        assert main(faults.start(data, world / "run", *options)) == 0
        short = ["--num-steps", "6", "--evaluate-every", "2", "--no-report"]
        assert main(faults.start(data, world / "half", *short)) == 0
    checkpoints = world / "half" / "checkpoints"
    (checkpoints / "step-00000003.pt").replace(checkpoints / "last.pt")
    run_suite(faults.suite(), world / "suite")

    def stop(step: object) -> None:
        if getattr(step, "number", 0) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(faults.suite(), world / "halfsuite", callbacks=[stop])
    network = classifier(load_images("digits", limit=60), num_steps=2, width=2)
    save_classifier(network, world / "features.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "whole"
    folder.mkdir()
    make_world(folder)
    return folder


def looked(world: Path, file: str) -> faults.Seen:
    """What the command that reads this file does with an undamaged copy."""
    copy = world.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(world, copy)
    found = faults.FILES[file][1](copy)
    assert found.status == 0, found.said
    return found


QUICK = [file for file in faults.FILES if not file.startswith("half")]
FINE = {"harmless", "sentence", "noted"}


@pytest.mark.parametrize("file", QUICK)
def test_a_damaged_file_is_harmless_or_one_sentence(file: str, world: Path) -> None:
    """Every kind of damage once, for each file that a finished run or suite is read from."""
    whole = looked(world, file)
    for kind in faults.FILES[file][0]:
        rng = random.Random(f"{file} {kind.name}")
        found = faults.outcome(world, file, kind, rng, whole)
        assert found in FINE, f"{kind.name}: {found}"


@pytest.mark.parametrize("name", ["a bit", "truncated"])
def test_a_damaged_checkpoint_is_refused(name: str, world: Path) -> None:
    """`torch.load` reads a flipped bit as another weight; the checksum does not let it pass."""
    file = "half/checkpoints/last.pt"
    (kind,) = [kind for kind in faults.EVERY if kind.name == name]
    found = faults.outcome(world, file, kind, random.Random(name), faults.Seen(0, "", None))
    assert found == "sentence"


def test_files_without_checksums_still_load(world: Path, tmp_path: Path) -> None:
    """Runs of the version before: the same content in the formats it was written in then."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    whole = BiDVL.load(run / "model")
    for path in (run / "config.json", run / "evaluation.json", run / "model" / "model.json"):
        content = json.loads(path.read_text())
        del content["checksum"]
        path.write_text(json.dumps(content))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(
        json.dumps({k: v for k, v in x.items() if k != "checksum"}) + "\n" for x in lines
    )
    (run / "metrics.jsonl").write_text(text)
    weights = run / "model" / "weights.safetensors"
    save_file(load_file(weights), weights)
    checkpoint = run / "checkpoints" / "last.pt"
    torch.save(torch.load(checkpoint, weights_only=True), checkpoint)
    again = BiDVL.load(run / "model")
    assert all(t.equal(again.state_dict()[n]) for n, t in whole.state_dict().items())
    assert Run(run).metrics() == Run(world / "run").metrics()
    assert read_checkpoint(checkpoint)["step"] == 6
    assert main(["report", str(run)]) == 0


def test_weights_of_another_model_are_refused(world: Path, tmp_path: Path) -> None:
    """The same shapes under other settings: the numbers would be taken for something else."""
    folder = tmp_path / "model"
    BiDVL.for_images((1, 8, 8), latent_dim=2, width=2, ratio=0.2).save(folder)
    shutil.copy(world / "run" / "model" / "weights.safetensors", folder)
    with pytest.raises(
        ValueError, match="its checksum fits neither its content nor what it belongs"
    ):
        BiDVL.load(folder)


@pytest.mark.parametrize(("code", "where"), faults.DISKS)
def test_a_failing_disk_leaves_what_was_there(
    code: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with the file and what is whole; no half a file and no temporary one."""
    path = tmp_path / "x"
    for write in (
        lambda: write_text(path, "new" * 20),
        lambda: write_atomically({"step": 1, "x": torch.zeros(9)}, path),
        lambda: write_weights(path, {"x": torch.zeros(9)}, {}),
        lambda: save_grid(torch.zeros(2, 1, 8, 8), path),
        lambda: save_curves([{"step": 1, "upper_loss": 0.0}], path),
    ):
        path.write_text("old")
        with (
            faults.failing(1, code, where, monkeypatch),
            pytest.raises(
                WriteError, match=r"`.*x` could not be written: .*; the file before it is"
            ),
        ):
            write()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
    if where in ("open", "write"):
        with faults.failing(1, code, where, monkeypatch), pytest.raises(WriteError):
            append_text(path, "a line that is lost\n")
        assert path.read_text() == "old"


@pytest.mark.parametrize("at", [2, 4])
def test_a_full_disk_stops_a_run_that_then_goes_on(
    at: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """At any file: exit code 2, one sentence with the space, no half a file, and `--resume` goes on."""
    run = tmp_path / "run"
    shutil.copytree(world / "half", run)
    command = ["train", "--run", str(run), "--resume", "--no-report"]
    with faults.failing(at, errno.ENOSPC, "write", monkeypatch):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "no space left on device" in said
    assert "are needed" in said
    assert said.count("\n") == 1
    assert not faults.temporary(run)
    assert main(command) == 0
    mine, other = Run(run).metrics(), Run(world / "run").metrics()
    assert faults.timeless(mine) == faults.timeless(other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_a_run_that_ends_as_if_there_had_been_none(
    name: str, status: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record at the interruption is forgotten: an uninterrupted run has none there."""
    run, command = tmp_path / "run", ["--num-steps", "6", "--evaluate-every", "2", "--no-report"]
    call = Progress.__call__

    def signalled(self: Progress, step: Step) -> None:
        call(self, step)
        if step.number == 3:
            os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", signalled)
        assert main(faults.start(world / "data.npz", run, *command)) == status
    assert [record["step"] for record in Run(run).metrics()] == [2, 3]
    (run / "checkpoints" / ".last.pt.1.tmp").write_bytes(b"left by a crash")
    assert main(["train", "--run", str(run), "--resume", "--no-report"]) == 0
    assert faults.timeless(Run(run).metrics()) == faults.timeless(Run(world / "run").metrics())
    assert not faults.temporary(run)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, world / "run")
    ]
    without = [[{**line, "seconds": 0} for line in part] for part in lines]
    assert without[0] == without[1]


def test_the_second_ctrl_c_ends_at_once() -> None:
    """But SIGTERM twice within a second, as `timeout` sends it, is one request."""
    stop = Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_is_made_longer(world: Path, tmp_path: Path, capsys: Capture) -> None:
    """Six steps made eight are the first eight of eight, and the record says eight."""
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    data = world / "data.npz"
    assert main(faults.start(data, whole, "--num-steps", "8", "--no-report")) == 0
    assert main(faults.start(data, longer, "--num-steps", "5", "--no-report")) == 0
    resume = ["train", "--run", str(longer), "--resume", "--no-report", "--num-steps"]
    assert main([*resume, "3"]) == 2
    assert "has taken 5 steps already" in capsys.readouterr().err
    assert main([*resume, "8"]) == 0
    assert Run(longer).config()["training"]["num_steps"] == 8
    assert faults.timeless(Run(longer).metrics()) == faults.timeless(Run(whole).metrics())
    one, two = (load_file(r / "model" / "weights.safetensors") for r in (whole, longer))
    assert all(one[name].equal(two[name]) for name in one)


def test_the_last_line_says_where_the_clock_stopped(
    world: Path, tmp_path: Path, capsys: Capture
) -> None:
    clock = ["--num-steps", "900", "--max-seconds", "1e-9", "--no-report"]
    assert main(faults.start(world / "data.npz", tmp_path / "run", *clock)) == 0
    assert "stopped it at step 1 of 900" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("option", ["--width=-1", "--width=0", "--latent-dim=-2", "--width=nan"])
@pytest.mark.parametrize("method", ["bidvl", "vae", "advil"])
def test_sizes_of_networks_are_checked_before_anything_is_written(
    method: str, option: str, world: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert (
        main(["train", method, "--data", str(world / "data.npz"), "--run", str(run), option]) == 2
    )
    assert "must be positive" in capsys.readouterr().err
    assert not run.exists()


# ---------------------------------------------------------------------- inputs


def archive(path: Path, content: bytes, name: str = "images.npy") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return path


def header(shape: str, kind: str = "|u1") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def patched(path: Path, local: tuple[int, int], central: tuple[int, int]) -> Path:
    """An archive with a byte changed in its first local and its first central header."""
    content = bytearray(path.read_bytes())
    content[local[0]] = local[1]
    content[content.index(b"PK\x01\x02") + central[0]] = central[1]
    path.write_bytes(content)
    return path


def test_arrays_that_promise_too_much_are_refused_by_their_header(tmp_path: Path) -> None:
    promise = archive(tmp_path / "a.npz", header("(40000000, 32, 32)"))
    with pytest.raises(ValueError, match=r"promises 41\.0 GB .* but holds 0 bytes"):
        load_images(promise)
    bomb = archive(tmp_path / "b.npz", header("(1000, 64, 64)") + bytes(4_096_000))
    with pytest.raises(ValueError, match=r"would take 4\.1 MB of memory, more than 0\.001 GB"):
        load_images(bomb, max_gigabytes=0.001)
    with pytest.raises(ValueError, match="promises -64 bytes"):
        load_images(archive(tmp_path / "c.npz", header("(-1, 8, 8)") + bytes(64)))


def test_what_is_no_plain_array_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for kind, words in (
        ("m8[s]", "is of type `timedelta64"),
        ("M8[s]", "is of type `datetime64"),
        ([("a", "u1"), ("b", "u1")], "is of type"),
        (object, "object array"),
    ):
        np.savez(path, images=np.zeros((5, 8, 8), kind))
        with pytest.raises(ValueError, match=words):
            load_images(path)
    np.savez(path, images=np.zeros((5, 8, 8), np.uint8))
    whole = path.read_bytes()
    for local, central, words in (
        ((6, 1), (8, 1), "it is encrypted"),
        ((8, 97), (10, 97), "compression method is not supported"),
        ((4, 99), (6, 99), "zip file version"),
    ):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=words):
            load_images(patched(path, local, central))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would wait for ever and a device would never end; a link to itself leads nowhere."""
    os.mkfifo(tmp_path / "pipe.npz")
    os.symlink("/dev/zero", tmp_path / "zero.npz")
    os.symlink("self.npz", tmp_path / "self.npz")
    for name, words in (("pipe", "is a pipe"), ("zero", "is a device"), ("self", "leads nowhere")):
        with pytest.raises((ValueError, OSError), match=words):
            load_images(tmp_path / f"{name}.npz")
        with pytest.raises((ValueError, OSError)):
            load_table(tmp_path / f"{name}.npz")


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for k in range(5):
        save_grid(torch.full((1, 1, 8, 8), k / 5), folder / f"{k}.png", scale=1)
    return folder


def test_folders_whose_links_loop_are_read_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a")
    whole = load_images(folder)
    os.symlink("..", folder / "up")
    os.symlink("../a", folder / "again")
    assert load_images(folder).train.equal(whole.train)
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png` cannot be read as an image: .* is a pipe"):
        load_images(folder)


def test_odd_names_in_archives_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a")
    content = [path.read_bytes() for path in sorted(folder.iterdir())]
    for names, words in (
        (["../0.png", "1.png"], "leads out of it"),
        (["/0.png", "1.png"], "leads out of it"),
    ):
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as file:
            for name, picture in zip(names, content, strict=False):
                file.writestr(name, picture)
        with pytest.raises(ValueError, match=words):
            load_images(path)
    other = archive(tmp_path / "y.zip", content[0], "0.png")
    raw = bytearray(other.read_bytes())
    place = raw.index(b"PK\x01\x02")
    raw[place + 9] |= 8  # names are said to be UTF-8
    raw[place + 46] = 0xFF
    other.write_bytes(raw)
    with pytest.raises(ValueError, match="cannot be read as a zip archive"):
        load_images(other)


# ---------------------------------------------------------------------- the long part: `make faults`


@pytest.mark.faults
@pytest.mark.parametrize("file", faults.FILES)
def test_many_damages_are_harmless_or_one_sentence(file: str, world: Path) -> None:
    whole, counts = looked(world, file), Counter[str]()
    for kind in faults.FILES[file][0]:
        for seed in range(3):
            rng = random.Random(f"{file} {kind.name} {seed}")
            found = faults.outcome(world, file, kind, rng, whole)
            assert found in FINE, f"{kind.name} {seed}: {found}"
            counts[found] += 1
    print(f"\n{file}: {dict(counts)}")


@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sixty_signals_at_random_times(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.faults",
        "kills",
        str(tmp_path),
        "60",
        "0",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"\n{done.stdout}")
