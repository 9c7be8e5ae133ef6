"""The command line, from the outside: what is printed, written and returned."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bilevel import cli
from bilevel.cli import main
from bilevel.cli.options import model_settings, training_settings
from bilevel.cli.placing import device_of
from bilevel.methods.catalogue import IMAGE_METHODS
from bilevel.methods.data.images import load_images
from bilevel.methods.evaluation.fidelity import torchmetrics
from bilevel.methods.presets import DIGITS, PRESETS

TINY = ["--width", "2", "--latent-dim", "2", "--batch-size", "20", "--log-every", "2"]
TINY += ["--checkpoint-every", "2"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a small data set."""
    monkeypatch.chdir(tmp_path)
    images = load_images("digits")
    assert images.train_labels is not None
    array = ((images.train[:120, 0].numpy() + 1) * 8).astype(np.uint8)
    np.savez(tmp_path / "few.npz", images=array, labels=images.train_labels[:120].numpy())
    return tmp_path


def train(*more: str) -> int:
    return main(["train", "bidvl", "--data", "few.npz", *TINY, "--num-steps", "4", *more])


def refused(capture: Capture, arguments: str) -> str:
    """The one sentence with which bad arguments are refused."""
    capture.readouterr()
    assert main(arguments.split()) == cli.BAD_USAGE
    message = capture.readouterr().err
    assert message.startswith("bilevel: ")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    return message


def test_a_run_from_training_to_comparison(home: Path, capsys: Capture) -> None:
    assert train() == 0
    folder = home / "runs" / "bidvl-few-1"
    assert "runs/bidvl-few-1/report.html" in capsys.readouterr().out
    for name in ("config.json", "metrics.jsonl", "model/model.json", "evaluation.json"):
        assert (folder / name).is_file()
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"samples.png", "reconstructions.png", "curves.png"}
    shown = json.loads((folder / "evaluation.json").read_text())["results"]
    assert shown["steps_per_second"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["notes"]["data"] == str(home / "few.npz")
    assert config["training"]["num_steps"] == 4

    assert main(["sample", "runs/bidvl-few-1", "-n", "5", "--out", "s.npz", "--seed", "1"]) == 0
    assert main(["sample", "runs/bidvl-few-1", "-n", "5", "--out", "t.npz", "--seed", "1"]) == 0
    one, two = (np.load(name)["images"] for name in ("s.npz", "t.npz"))
    assert one.shape == (5, 1, 8, 8)
    np.testing.assert_array_equal(one, two)
    assert main(["sample", "runs/bidvl-few-1"]) == 0
    assert (folder / "drawn.png").is_file()

    assert main(["evaluate", "runs/bidvl-few-1", "--statistics", "batch"]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["statistics"] == "batch"
    assert main(["evaluate", "runs/bidvl-few-1", "--data", "digits"]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["statistics"] == "batch"

    assert train("--variant", "complete", "--solver", "unrolled", "--unroll-steps", "1") == 0
    assert main(["report", "runs/bidvl-few-1", "--out", "page.html"]) == 0
    assert (home / "page.html").is_file()
    capsys.readouterr()
    assert main(["report", "runs/bidvl-few-1", "runs/bidvl-few-2"]) == 0
    assert capsys.readouterr().out.strip() == "runs/comparison.html"
    assert "solver" in (home / "runs" / "comparison.html").read_text()


def test_the_demo_explains_and_reports(home: Path, capsys: Capture) -> None:
    threads = torch.get_num_threads()
    assert main(["demo", "--num-steps", "3"]) == 0
    out = capsys.readouterr().out
    for words in (
        "handwritten digits",
        "step      3/3",
        "Reconstruction: RMSE",
        "demo-1/report.html",
    ):
        assert words in out
    picture = home / "runs" / "demo-1" / "samples.png"
    assert picture.is_file()
    *_, trained, look, more, empty, page, last = out.splitlines()
    assert trained == "This was BiDVL on 1,438 handwritten digits, 3 of 3 steps."
    assert look.startswith("Look at ")
    assert more == "Next, train on images of your own: `bilevel train bidvl --data FOLDER`."
    assert empty == ""
    assert page == f"report:  {picture.resolve().with_name('report.html')}"
    assert last == f"picture: {picture.resolve()}"
    config = json.loads((home / "runs" / "demo-1" / "config.json").read_text())
    assert config["notes"]["command"] == "bilevel demo --num-steps 3"
    assert config["began"].endswith("+00:00")
    assert torch.get_num_threads() == threads


def test_missing_extras_are_no_failure(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    home: Path,
    capsys: Capture,
) -> None:
    request.addfinalizer(torchmetrics.cache_clear)  # it may fail to import here, and remembers
    for name in ("matplotlib", "matplotlib.figure", "rich", "rich.progress", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train() == 0
    assert "pip install 'bilevel[report]'" in capsys.readouterr().err
    assert (home / "runs" / "bidvl-few-1" / "report.html").is_file()


def test_resuming_continues_and_refuses_conflicts(home: Path, capsys: Capture) -> None:
    assert train("--run", "whole", "--no-report") == 0
    assert train("--run", "half", "--no-report", "--max-seconds", "1e-9") == 0
    config = json.loads((home / "half" / "config.json").read_text())
    config["training"]["max_seconds"] = None  # as if it had been interrupted
    del config["checksum"]  # what a refusal advises who edits
    (home / "half" / "config.json").write_text(json.dumps(config))
    assert "`--latent-dim` is 3, but" in refused(capsys, "train --run half --resume --latent-dim 3")
    assert "`--batch-size`" in refused(capsys, "train --run half --resume --batch-size 9")
    assert "`--data`" in refused(capsys, "train --run half --resume --data digits")
    assert "choose one" in refused(capsys, "train --run half --resume --overwrite")
    again = ["--data", "few.npz", "--latent-dim", "2", "--device", "cpu", "--no-report"]
    assert main(["train", "bidvl", "--run", "half", "--resume", *again]) == 0
    weights = [
        load_file(home / name / "model" / "weights.safetensors") for name in ("whole", "half")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", "did you mean `train`?"),
        ("train bidv --data few.npz", "did you mean `bidvl`?"),
        ("train bidvl", "--data NAME|PATH is missing"),
        ("train --preset digit", "did you mean `digits`?"),
        ("train vae --preset digits", "`digits` is for `bidvl`, not for `vae`; leave `vae` out"),
        ("train --preset=digits --sigma 1", "there is no option `--sigma`"),
        ("train --preset cifar10 --data few.npz", "colour images of 32x32 pixels, but `few` holds"),
        ("train --preset cifar10 --data few.npz", "make them so with `--side 32 --channels 3`"),
        ("train --preset cifar10 --data few.npz --side 32", "with `--channels 3`, train on them"),
        ("train --preset digits --num-steps 0", "`--num-steps`: input should be greater"),
        ("train bidvl --data few.npz --crop 50", "`--crop 50` is larger"),
        ("train bidvl --data few.npz --channels 2", "`--channels` is 1"),
        ("presets cifar", "there is no preset `cifar`; did you mean `cifar10`?"),
        ("train --data few.npz", "METHOD ("),
        ("train bidvl --dta few.npz", "did you mean `--data`?"),
        ("train bidvl --data few.npz extra", "`extra` is one argument too many"),
        ("train bidvl --data fewer.npz", "did you mean `few.npz`?"),
        ("train bidvl --data digit", "did you mean `digits`?"),
        ("train bidvl --data few.npz --variant ofset", "did you mean `offset`?"),
        ("train bidvl --data few.npz --solver implict", "did you mean `implicit`?"),
        ("train bidvl --data few.npz --num-steps many", "a whole number, got `many`"),
        ("train bidvl --data few.npz --num-steps 0", "`--num-steps`: input should be greater"),
        ("train bidvl --data few.npz --upper-lr fast", "a number, got `fast`"),
        ("train bidvl --data few.npz --damping 1", "belongs to `--solver implicit`"),
        ("train bidvl --data few.npz --batch-size 500", "`--batch-size` is 500"),
        (
            "train bidvl --data few.npz --batch-size 50 --solver implicit",
            "`--variant offset` stops",
        ),
        ("train bidvl --data few.npz --batch-size 50 --standardise", "`--standardise` is for rows"),
        ("train vae --data few.npz --batch-size 50 --lower-lr 1", "did you mean `--upper-lr`"),
        ("train vae --data few.npz --solver unrolled", "needs a lower level, which `VAE` lacks"),
        ("train bidvl --data few.npz --best fid", "give `--evaluate-every N` with it"),
        (
            "train bidvl --data few.npz --upper-lr inf",
            "`--upper-lr`: input should be a finite number",
        ),
        ("train bidvl --data few.npz --betas 0.9 2", "`--betas`: input should be less than 1"),
        ("train bidvl --data few.npz --betas 0.9", "`--betas`: expected 2 arguments"),
        (
            "train bidvl --solver implicit --linear-steps 0 --data few.npz",
            "`--linear-steps` must be",
        ),
        ("train bidvl --lr 0.1 --data few.npz", "did you mean `--upper-lr` or `--lower-lr`?"),
        ("train vae --lr 0.1 --data few.npz", "`--lr`; did you mean `--upper-lr`? ("),
        ("train bidvl --learning_rate=1 --data few.npz", "mean `--upper-lr` or `--lower-lr`?"),
        ("train bidvl --weight-decay 0.1 --data few.npz", "`--upper-weight-decay` or `--lower-"),
        ("train bidvl --epochs 3 --data few.npz", "give `--num-steps`: an epoch of n images"),
        ("train bidvl --batch 3 --data few.npz", "did you mean `--batch-size`?"),
        ("train bidvl --steps 3 --data few.npz", "did you mean `--num-steps`?"),
        ("train bidvl --num_steps 3 --data few.npz", "did you mean `--num-steps`?"),
        ("train bidvl --output x --data few.npz", "did you mean `--run`?"),
        ("train bidvl --proper --data few.npz", "it belongs to `advil`, not to `bidvl`"),
        ("train bidvl --verbose --data few.npz", "there is no option `--verbose` ("),
        ("sample nowhere --num 3", "did you mean `-n`?"),
        ("demo --epochs 3", "give `--num-steps`"),
        ("train bidvl --resume", "needs the folder"),
        ("train --resume --run nowhere", "there is no run in `nowhere`"),
        ("sample nowhere", "there is no run in `nowhere`; train one first"),
        ("sample", "RUN"),
        ("evaluate nowhere", "there is no run"),
        ("report nowhere", "there is no run"),
        ("demo --num-steps 0", "`--num-steps`"),
    ],
)
def test_bad_arguments_are_one_helpful_sentence(
    arguments: str, words: str, home: Path, capsys: Capture
) -> None:
    assert words in refused(capsys, arguments)
    assert not (home / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(capsys: Capture) -> None:
    assert "no CUDA device" in refused(capsys, "train bidvl --data few.npz --device cuda")
    assert "no CUDA device" in refused(capsys, "train bidvl --data few.npz --device cuda:1")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:5", "`--device` is `cuda:5`, but there are 2 CUDA devices: `cuda:0`, `cuda:1`"),
        ("gpu", "`--device` cannot be `gpu`; did you mean `cuda`?"),
        ("mps", "`--device` is `mps`, but there is no Metal device"),
    ],
)
@pytest.mark.parametrize(
    "command", ["train bidvl --data few.npz", "features few.npz --out f", "bench eblvm"]
)
def test_devices_are_refused_by_all_commands(
    command: str, device: str, words: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert words in refused(capsys, f"{command} --device {device}")


def test_one_gpu_of_several_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [device_of(name) for name in ("cuda:1", "cuda", "mps", "cpu")] == [
        "cuda:1",
        "cuda",
        "mps",
        "cpu",
    ]
    assert chosen == [torch.device("cuda:1")]


def test_torchrun_gives_the_devices(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, "train bidvl --data few.npz --device cuda:1")
    assert "`torchrun` gives each process a device of its own, so `cuda:1` cannot be chosen" in said


def test_a_run_is_not_overwritten_by_accident(capsys: Capture) -> None:
    assert train("--run", "mine", "--no-report") == 0
    message = refused(capsys, "train bidvl --data few.npz --run mine")
    assert "`--resume`" in message
    assert "`--overwrite`" in message
    assert train("--run", "mine", "--no-report", "--overwrite") == 0
    assert ".png or .npz" in refused(capsys, "sample mine --out s.gif")
    assert "`-n` must be positive" in refused(capsys, "sample mine -n 0")


def test_divergence_is_status_one(capsys: Capture) -> None:
    # The tanh and the spectral norm leave little that can overflow; an absurd weight does it.
    assert train("--no-report", "--latent-weight", "1e38", "--lower-lr", "1e30") == cli.FAILED
    message = capsys.readouterr().err
    assert "diverged at step" in message
    assert message.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILEVEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no command"):
        main(["nothing"])


COMMANDS = [
    "",
    "demo",
    "train",
    "presets",
    "sample",
    "evaluate",
    "report",
    "bench",
    "bench solvers",
    "features",
]


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train {name}" for name in IMAGE_METHODS)])
def test_help_is_plain_fits_the_screen_and_has_examples(command: str, capsys: Capture) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:\n  bilevel" in text
    assert text.isascii()
    assert not re.search(r"[$\\]|SUPPRESS", text)
    assert max(map(len, text.splitlines())) <= 80


def test_help_of_a_method_shows_its_own_options_and_defaults(capsys: Capture) -> None:
    def shown(arguments: str) -> str:
        assert main(["train", *arguments.split(), "--help"]) == 0
        return " ".join(capsys.readouterr().out.split())

    bidvl, vae, everything = shown("bidvl"), shown("vae"), shown("")
    assert "model: bidvl:" in bidvl
    assert "--proper" not in bidvl
    assert "of the upper level (energy) (default: 0.0001)" in bidvl
    assert "of the upper level (energy) (default: 0.001)" in vae
    assert "--lower-lr" not in vae
    assert "--unroll-steps" not in vae
    assert "(energy) (default: by METHOD)" in everything
    assert "model: bism, vages:" in everything
    assert "upper-level steps (default: 300000)" in shown("--preset cifar10")


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bilevel ")
    assert main([]) == cli.BAD_USAGE


def test_every_setting_is_explained() -> None:
    assert all(setting.help for setting in training_settings())
    for method in IMAGE_METHODS.values():
        assert all(setting.help for setting in model_settings(method.kind))


# ---------------------------------------------------------------------- presets and data


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_preset_names_method_and_data_and_yields_to_the_command_line(home: Path) -> None:
    few = ["--num-steps", "2", "--no-report"]
    assert main(["train", "--preset", "digits", *few, "--ratio", "0.2"]) == 0
    config = config_of(home / "runs" / "bidvl-digits-1")
    assert (config["method"], config["notes"]["data"]) == ("BiDVL", "digits")
    training = {**DIGITS.settings().model_dump(mode="json"), "num_steps": 2}
    assert config["training"] == training
    assert {name: config["model"][name] for name in DIGITS.model} == {**DIGITS.model, "ratio": 0.2}
    small = ["--width", "4", "--latent-dim", "2", "--batch-size", "20"]
    fits = ["--data", "few.npz", "--side", "32", *small]
    assert main(["train", "--preset", "vae-mnist", *few, *fits]) == 0
    config = config_of(home / "runs" / "vae-mnist-1")
    assert (config["method"], config["model"]["shape"]) == ("VAE", [1, 32, 32])
    # images of another shape, if they are asked for
    kept = ["--data", "few.npz", "--side", "8", "--channels", "1", *small]
    assert main(["train", "--preset", "advil-cifar10", *few, *kept]) == 0
    config = config_of(home / "runs" / "advil-cifar10-1")
    assert (config["method"], config["model"]["shape"]) == ("AdvIL", [1, 8, 8])
    assert config["training"]["lower_steps"] == 1


def test_images_are_loaded_the_same_way_when_a_run_is_resumed(home: Path, capsys: Capture) -> None:
    assert train("--run", "r", "--no-report", "--side", "16", "--limit", "50") == 0
    config = config_of(home / "r")
    assert config["model"]["shape"] == [1, 16, 16]
    assert config["notes"]["data_options"] == {"side": 16, "limit": 50}
    assert "`--side` is 32, but" in refused(capsys, "train --run r --resume --side 32")
    assert main(["train", "--run", "r", "--resume", "--side", "16", "--no-report"]) == 0


def test_a_dry_run_writes_nothing(home: Path, capsys: Capture) -> None:
    assert train("--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"time +\d+ s  here \(cpu, \d+ threads\), at \S+ s a step", out)
    assert "nothing was written" in out
    assert not (home / "runs").exists()


def test_presets_are_listed_and_shown_in_full(capsys: Capture) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    together = " ".join(listed.split())
    for preset in PRESETS.values():
        assert preset.about in together
    assert max(map(len, listed.splitlines())) <= 100
    assert re.search(
        r"^cifar10 +BiDVL +14.6 M +300,000 +cuda +\S.* 1 h 57 min$", listed, re.MULTILINE
    )
    assert main(["presets", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert records.keys() == PRESETS.keys()
    assert records["digits"]["meant_for"] == "cpu"
    assert records["digits"]["seconds_at_least"]["20 TFLOP/s"] < 1
    assert main(["presets", "CelebA64"]) == 0
    shown = capsys.readouterr().out
    for words in ("the code has 1.0", "celeba64", "crop      160", "ratio          0.1"):
        assert words in shown
    for name, value in PRESETS["celeba64"].settings().model_dump().items():
        text = "-" if value is None else str(value)
        assert isinstance(value, tuple) or re.search(rf"^  {name} +{text}$", shown, re.MULTILINE)


def test_only_options_that_are_passed_on_are_offered() -> None:
    names = {setting.name for setting in model_settings(IMAGE_METHODS["vae"].kind)}
    assert names == {"latent_dim", "width", "statistics"}
    assert "variant" in {setting.name for setting in model_settings(IMAGE_METHODS["bidvl"].kind)}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on_and_does(home: Path) -> None:
    start = [sys.executable, "-m", "bilevel", "train"]
    options = [
        "bidvl",
        "--data",
        "few.npz",
        *TINY,
        "--num-steps",
        "300",
        "--no-report",
        "--run",
        "r",
    ]
    slow = ["--lower-steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*start, *options, *slow],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = home / "r" / "metrics.jsonl"
    wait_for(metrics.exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, errors
    assert "bilevel train --run r --resume" in errors
    assert "Traceback" not in errors
    reached = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 0 < reached < 300
    assert main(["train", "--run", "r", "--resume", "--no-report"]) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == 300
    assert steps == sorted(set(steps))
