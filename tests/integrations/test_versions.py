"""A library of a version that qcore does not work with is named when it is needed, and works on without qcore."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_model

from qcore.errors import IncompatibleVersion
from qcore.integrations.versions import VERSIONS, check

ROOT = Path(__file__).parents[2]
COMMAND = r'run: pip install --upgrade "{library}>={oldest}"'


def metadata(folder: Path, library: str, version: str) -> dict[str, str]:
    """An environment in which the metadata of ``library`` says ``version``: the first on the path is believed."""
    place = folder / "path" / f"{library}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")
    return {**os.environ, "PYTHONPATH": str(place.parent)}


def run(program: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


OLD_TRANSFORMERS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import qcore
    import transformers.quantizers.auto
assert any("qcore cannot be used from transformers: QcoreConfig needs" in str(each.message) for each in caught), caught
assert "qcore" not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
try:
    qcore.QcoreConfig
except ImportError as error:
    assert isinstance(error, qcore.errors.IncompatibleVersion)
    print(error)
"""


def test_an_old_transformers_is_named_and_goes_on_working_without_qcore(tmp_path: Path) -> None:
    said = run(OLD_TRANSFORMERS, metadata(tmp_path, "transformers", "4.57.1"))
    expected = COMMAND.format(library="transformers", oldest="5.12.1")
    assert said.strip() == f"QcoreConfig needs transformers 5.12.1 or later, this is 4.57.1; {expected}"


OLD_ACCELERATE = """
import qcore
try:
    qcore.QcoreConfig("nf4")
except qcore.errors.IncompatibleVersion as error:
    print(error)
"""


def test_an_old_accelerate_is_named_before_transformers_takes_it_for_none(tmp_path: Path) -> None:
    said = run(OLD_ACCELERATE, metadata(tmp_path, "accelerate", "1.0.1"))
    assert said.strip() == (
        'QcoreConfig needs accelerate 1.1 or later, this is 1.0.1; run: pip install --upgrade "accelerate>=1.1"'
    )


@pytest.mark.parametrize(("library", "version"), [("transformers", "4.57.1"), ("accelerate", "1.0.1")])
def test_the_command_line_says_so_in_one_line(tmp_path: Path, library: str, version: str) -> None:
    source = save_model("llama", tmp_path / "float")
    arguments = ["quantize", str(source), "-o", str(tmp_path / "out")]
    program = f"from qcore.cli.main import main; main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=metadata(tmp_path, library, version)
    )
    oldest = VERSIONS[library][0]
    expected = f"qcore: this command needs {library} {oldest} or later, this is {version}; "
    assert done.stderr.strip() == expected + COMMAND.format(library=library, oldest=oldest)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


# On an old PEFT, or a new one that has lost a function: what is done first decides.
PEFT = """
import warnings
warnings.simplefilter("error", UserWarning)
{first}
import qcore, torch
from peft import HRAConfig, LoraConfig, get_peft_model

class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.q_proj = layer

plain = get_peft_model(Model(torch.nn.Linear(64, 64)), LoraConfig(target_modules=["q_proj"]))
assert type(plain.base_model.model.q_proj).__module__.startswith("peft"), "float models are PEFT's own business"
for layer in (qcore.nn.Linear4bit(64, 64), qcore.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
    for config in (LoraConfig(target_modules=["q_proj"]), HRAConfig(target_modules=["q_proj"])):
        model = Model(layer)
        try:
            get_peft_model(model, config)
        except qcore.errors.IncompatibleVersion as error:
            print(error)
        assert model.q_proj is layer
"""


def test_an_old_peft_is_named_when_it_meets_a_quantized_layer(tmp_path: Path) -> None:
    said = run(PEFT.format(first=""), metadata(tmp_path, "peft", "0.18.1")).splitlines()
    expected = (
        'PEFT on quantized layers needs peft 0.20 or later, this is 0.18.1; run: pip install --upgrade "peft>=0.20"'
    )
    assert said == [expected] * 4


def test_a_new_peft_that_lost_what_qcore_uses_is_named_too(tmp_path: Path) -> None:
    lost = "import peft.tuners.lora.bnb, peft.utils.integrations; del peft.utils.integrations.dequantize_bnb_weight"
    said = run(PEFT.format(first=lost), metadata(tmp_path, "peft", "0.99.0")).splitlines()
    assert len(said) == 4
    newest = VERSIONS["peft"][1]
    assert all(
        re.fullmatch(
            r"PEFT on quantized layers does not work with peft 0\.99\.0 yet \(.*dequantize_bnb_weight.*\); "
            rf'upgrade qcore-quant, or run: pip install "peft>=0\.20,<={re.escape(newest)}"',
            line,
        )
        for line in said
    ), said


@pytest.mark.parametrize("version", ["0.20", "0.20.0", "0.20.0.dev0", "0.21.2", "1", "0.20.1+local"])
def test_a_version_from_the_floor_on_is_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    check("peft", "a feature")


@pytest.mark.parametrize("version", ["0.19.1", "0.2", "0", "0.19.9rc1"])
def test_a_version_below_the_floor_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(IncompatibleVersion, match=f"a feature needs peft 0.20 or later, this is {version};"):
        check("peft", "a feature")


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "no-such-library", ("3.1", "3.2"))
    with pytest.raises(IncompatibleVersion, match=r'or later, which is not installed; run: pip install --upgrade "no-'):
        check("no-such-library", "a feature")
    check("no-such-library", "a feature", required=False)


def test_the_floors_are_those_of_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for library, (oldest, _) in VERSIONS.items():
        assert set(re.findall(rf'"{library}>=([\d.]+)"', text)) == {oldest}, library
