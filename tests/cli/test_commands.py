"""The commands: what they print, which codes they end with, and that they start fast."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import contents, save_model
from transformers import AutoModelForCausalLM

from qcore.cli.main import run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "float")


def quantize(source: Path, *args: str) -> int:
    return run(["quantize", str(source), "-o", str(source.parent / "out"), "--backend", "cpu_reference", *args])


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from qcore.cli.main import run; code = run(['--help']); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("quantize", "generate", "eval", "info", "bench"))


@pytest.mark.parametrize(
    ("word", "answer"),
    [("quantise", "Did you mean 'quantize'?"), ("benhc", "Did you mean 'bench'?"), ("xyz", "There are: quantize, ")],
)
def test_a_mistyped_command_is_guessed(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word, "model"]) == 2
    assert f"No such command '{word}'. {answer}" in capsys.readouterr().err


def test_quantize_prints_a_table_and_sizes(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrower terminal cuts the names short
    assert quantize(source, "--format", "nf4") == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "down_proj" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[:4] == ["down_proj", "nf4", "3", "22,464"]
    assert 5 < float(cells[-2].rstrip("%")) < 12
    assert "verified" in printed
    assert (source.parent / "out/config.json").is_file()


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--format", "awq", "--round-to-nearest", "--group-size", "8", "--dry-run"], "awq has no place"), ([], "Python")],
)
def test_experts_that_stay_in_floating_point_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    assert quantize(save_model("gpt-oss", tmp_path / "float"), *options) == 0
    printed = capsys.readouterr().err
    assert "6 fused expert weights stay in floating point, such as model.layers.0.mlp.experts.gate_up_proj" in printed
    assert why in printed


def test_a_dry_run_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(source, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert [path.name for path in source.parent.iterdir()] == ["float"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--blocksize", "48"], "expected a power of two from 32 to 4096"),
        (["--skip", "nosuch"], "matches no linear layer"),
        (["--format", "nf5"], "'nf5' is not one of"),
        (["--shard-size", "none"], "is not a size like 500MB or 2GB"),
        (["--nosuch"], "No such option"),
        (["--format", "int8", "--blocksize", "128"], "--format int8 has no blocks"),
        (["--format", "int8", "--no-double-quant"], "--format int8 has no blocks"),
        (["--skip", "*"], "every linear layer is skipped"),
    ],
)
def test_wrong_usage_ends_with_2(
    source: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(source, *args) == 2
    assert message in capsys.readouterr().err


def test_failures_end_with_1(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(source.parent / "nosuch") == 1
    assert "no such folder or file" in capsys.readouterr().err
    assert quantize(source) == 0
    assert quantize(source) == 1
    assert "--force" in capsys.readouterr().err
    assert quantize(source, "--force") == 0
    assert run(["generate", str(source.parent / "nosuch"), "--prompt", "x"]) == 1
    assert run(["quantize", str(source), "-o", str(source.parent / "x"), "--backend", "nosuch"]) == 1


def test_an_interrupt_ends_with_130_and_the_command_goes_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcore.cli.quantize import _Bar

    def interrupted(self: _Bar, shard: str) -> None:
        raise KeyboardInterrupt

    args = ("--shard-size", "40kB")
    with monkeypatch.context() as patch:
        patch.setattr(_Bar, "verifying", interrupted)
        assert quantize(source, *args) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (source.parent / "out").exists()
    assert quantize(source, *args) == 0
    assert len(list((source.parent / "out").glob("*.safetensors"))) > 1


def test_an_interrupted_process_can_be_continued(source: Path) -> None:
    """A signal at any moment leaves either nothing or a folder that the same command completes, to the same bytes."""
    assert quantize(source, "--shard-size", "20kB") == 0
    (source.parent / "out").rename(source.parent / "whole")
    program = (
        "import os, signal, sys; import qcore.formats.quantize as q; from qcore.cli.main import run\n"
        "write, count = q._write_shard, [0]\n"
        "def killing(*args):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args)\n"
        "q._write_shard = killing; sys.exit(run(sys.argv[1:]))"
    )
    command = ["quantize", str(source), "-o", str(source.parent / "out"), "--shard-size", "20kB"]
    killed = subprocess.run(
        [sys.executable, "-c", program, *command, "--backend", "cpu_reference"], capture_output=True
    )
    assert killed.returncode == -9
    assert not (source.parent / "out").exists()
    assert quantize(source, "--shard-size", "20kB") == 0
    assert contents(source.parent / "out") == contents(source.parent / "whole")


@pytest.mark.parametrize(("sent", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_with_a_message_and_leaves_what_was_there(source: Path, sent: str, code: int, word: str) -> None:
    assert quantize(source, "--format", "int8") == 0
    before = contents(source.parent / "out")
    program = (
        "import os, signal, sys; import qcore.formats.quantize as q; from qcore.cli.main import run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "step, count = q._write_step, [0]\n"
        "def signalled(*args):\n"
        "    count[0] += 1\n"
        f"    if count[0] == 5: os.kill(os.getpid(), signal.{sent})\n"
        "    return step(*args)\n"
        "q._write_step = signalled; sys.exit(run(sys.argv[1:]))"
    )
    command = ["quantize", str(source), "-o", str(source.parent / "out"), "--force", "--backend", "cpu_reference"]
    ended = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == f"qcore: {word}"
    assert "the same command goes on where this one stopped" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(source.parent / "out") == before
    assert quantize(source, "--force") == 0
    assert contents(source.parent / "out") != before


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens by Transformers' own model, recomputed from the start each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(count):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_generate_writes_the_likeliest_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    source = save_model("llama", tmp_path / "float", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("the sky is")["input_ids"]
    made = greedy(source, prompt, 6)[len(prompt) :]
    assert 1 not in made, "choose another seed: the model ends its text"
    assert run(["generate", str(source), "--prompt", "the sky is", "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == tokenizer.decode(made, skip_special_tokens=True).split()
    assert "6 new tokens" in err
    assert "tokens/s" in err


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_generate_runs_a_quantized_folder(source: Path, format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(source, "--format", format_) == 0
    out = str(source.parent / "out")
    args = ["generate", out, "--prompt", "light of", "--max-new-tokens", "5", "--backend", "cpu_reference"]
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert run([*args, "--temperature", "5", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_without_a_chat_template_says_so(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(source), "--prompt", "x", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nope", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_generate_refuses_a_device_before_it_loads(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "nosuch", "--prompt", "x", "--device", device]) == 2
    assert f"--device {device}: " in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert importlib.metadata.version("qcore-quant") in capsys.readouterr().out


def test_an_empty_backend_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(source), "-o", str(source.parent / "out"), "--backend", ""]) == 2
    assert "names no backend" in capsys.readouterr().err


def test_info_reads_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["info"]) == 0
    printed = capsys.readouterr().out
    assert str(2**62) not in printed
    assert "'lanes': 'exact'" in printed
    if "model name" in Path("/proc/cpuinfo").read_text():
        assert "device cpu: x86_64" not in printed


def test_eval_measures_perplexity(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = source.parent / "text.txt"
    text.write_text("the sky is blue because light of short waves scatters more in air than long " * 5)
    assert quantize(source, "--no-double-quant") == 0
    capsys.readouterr()
    args = ["eval", str(source.parent / "out"), "--against", str(source), "--text", str(text)]
    assert run([*args, "--tokens", "40", "--window", "20", "--compute-dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["window"]) == (40, 20)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt")["input_ids"][0, :40].view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    models = report["models"]
    assert models[str(source)]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert models[str(source.parent / "out")]["perplexity"] != models[str(source)]["perplexity"]


def test_eval_of_too_short_a_text_is_wrong_usage(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source.parent / "text.txt").write_text("the sky")
    assert run(["eval", str(source), "--text", str(source.parent / "text.txt")]) == 2
    assert "the text has 2 tokens, one window takes 512" in capsys.readouterr().err


def test_info_has_a_key_for_every_known_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"cpu", "cuda", "hip", "cpu_reference"} <= report["backends"].keys()
    for name, status in report["backends"].items():
        assert status["available"] or (status["reason"] and status["fix"]), name
    assert report["backends"]["cpu_reference"]["description"]["ops"]
    assert report["versions"]["torch"] == torch.__version__
    assert "backend" in report["selection"]["serves"]["cpu"]


def test_info_names_a_selection_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcore.backend import registry

    monkeypatch.setenv("QCORE_BACKEND", "nosuch")
    registry.reset()
    try:
        assert run(["info", "--json"]) == 0
        served = json.loads(capsys.readouterr().out)["selection"]["serves"]["cpu"]
        assert "no backend 'nosuch'" in served["error"]
        assert run(["info"]) == 0
        assert "nosuch" in capsys.readouterr().out
    finally:
        monkeypatch.delenv("QCORE_BACKEND")
        registry.reset()
