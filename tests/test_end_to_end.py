"""The whole way, as a user goes it: DICOM -> cache -> folds -> submission -> report; what the README says."""

import io
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from phantom import make_set
from test_infer import run as run_python

import common
from common import AP, LABELS, UID

ROOT = Path(__file__).parents[1]
TINY = {"model_name": "test_efficientnet", "pretrained": False, "img_size": 64, "base_slices": 16}
TINY |= {"num_folds": 2, "epochs": 1, "workers": 0, "bootstrap": 100}


def run(folder: Path, command: str, code: int = 0, **environment: str) -> str:
    """stdout of a command in folder, as the README writes it; stderr of one that fails."""
    module = "-m accelerate.commands.accelerate_cli"
    words = shlex.split(command.removeprefix("python ").replace("accelerate launch", f"{module} launch"))
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    stdout, stderr = run_python(folder, *words, code=code, start=(), **environment)
    return stderr if code else stdout


def test_the_three_commands_lead_from_dicom_to_a_submission_and_a_report(tmp_path):
    make_set(tmp_path / "dicoms", series=16, seed=0, matrix=48)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run(tmp_path, "python preprocess.py --src dicoms --dst cache --config tiny.yaml")
    run(tmp_path, "accelerate launch train.py --config tiny.yaml")
    text = run(tmp_path, "python infer.py")
    table = pd.read_csv(io.StringIO(text), dtype={UID: str})
    assert list(table.columns) == [UID, *LABELS] and table[list(LABELS)].stack().between(0, 1).all()
    known = pd.read_csv(tmp_path / "dicoms/train.csv", dtype={UID: str})
    assert sorted(table[UID]) == sorted(known[UID])
    assert run(tmp_path, "python infer.py --src dicoms") == text  # and the same bytes from DICOM
    page = run(tmp_path, "python eda.py")
    assert page.lstrip().lower().startswith("<!doctype html") and len(page) > 20_000


def test_the_documented_train_command_says_in_one_line_what_it_lacks_without_a_hub(tmp_path):
    make_set(tmp_path / "dicoms", series=10, seed=0, matrix=40, plain=True)
    run(tmp_path, "python preprocess.py --src dicoms --dst cache")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    text = run(tmp_path, "python train.py --config configs/fold0.yaml", code=1, **offline)
    last = text.strip().splitlines()[-1]
    assert "pretrained weights of maxvit_base_tf_384.in21k_ft_in1k could not be loaded. Give a local" in last
    assert "pretrained: PATH.safetensors" in last and "or pretrained: false" in last
    assert "Traceback" not in text


def test_every_command_of_the_readme_parses():
    text = (ROOT / "README.md").read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).splitlines()
    inline = re.findall(r"`!?([^`\n]*\b(?:python|accelerate launch|torchrun) [^`\n]*\.py [^`\n]*)`", text)
    commands = [command for command in [*lines, *inline] if command and not command.startswith("#")]
    assert len(commands) >= 14 and {"--multi_gpu", "--serve"} <= set(" ".join(commands).split())
    targets, helps = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)), {}
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert words[1] in targets, command
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        arguments = words[words.index(script) + 1 :]
        script = script.removeprefix("/kaggle/input/repo/")
        if script not in helps:
            helps[script] = run(ROOT, f"python {script} --help")
        for word, value in zip(arguments, [*arguments[1:], ""], strict=True):
            if word.startswith("--"):
                option = re.escape(word.split("=")[0])
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps[script]), f"{command}: {word}"
            if word.startswith("configs/") and "$" not in word:
                assert (ROOT / word).is_file(), command
            if word == "--set" and "$" not in value and "..." not in value:
                common.load_config(None, [value])


def test_the_wheels_for_kaggle_leave_its_numpy_alone(tmp_path):
    text = (ROOT / "README.md").read_text()
    command = re.search(r"pip (download -r requirements-kaggle\.txt [^`]*) -d wheels", text)
    words = [sys.executable, "-m", "pip", *shlex.split(command[1]), "-d", str(tmp_path), "--quiet"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip()[-200:]}")
    wheels = sorted(tmp_path.glob("*.whl"))
    assert len(wheels) == 7 and sum(path.stat().st_size for path in wheels) < 13e6
    for path in wheels:
        (wheel,) = distributions(path=[str(path)])
        needs = [Requirement(text) for text in wheel.requires or []]
        assert all(need.specifier.contains("1.26.4") for need in needs if need.name == "numpy"), path.name


@pytest.mark.skipif(not (ROOT / "demo/control.csv").is_file(), reason="needs the outcome of `make demo`")
def test_the_demo_learned_aneurysms_and_nothing_else():
    truth = pd.read_csv(ROOT / "demo/held_out/train.csv", dtype={UID: str}).set_index(UID)
    lows, highs = {}, {}
    for name in ("submission", "control"):
        table = pd.read_csv(ROOT / f"demo/{name}.csv", dtype={UID: str})
        labels = truth.loc[table[UID], list(LABELS)].to_numpy(float)
        assert 30 <= labels[:, AP].sum() <= 70 and len(table) == 100
        weights = common.patient_weights(table[UID], 2000)
        aucs = common.column_aucs(labels, table[list(LABELS)].to_numpy(), weights)
        lows[name], highs[name] = np.quantile(aucs[:, AP], [0.025, 0.975])
    assert lows["submission"] > 0.5
    assert lows["control"] < 0.5 < highs["control"] < 0.75  # of the same heads, their aneurysms erased
