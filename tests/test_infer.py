"""infer.py: what a user meets (through subprocesses), and the functions behind it; members are tiny."""

import argparse
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pandas as pd
import phantom
import pydicom
import torch
from conftest import expect_refusal, write_cached_series
from pytest import approx, fixture, mark, raises
from safetensors.torch import load_file, save_file

import common
import infer
from common import AP, LABELS, SWAP, UID, Config, Output, SeriesDataset
from dicom import Volume, VolumeSettings, make_volume, read_series, to_lps
from infer import CHECKPOINT, Scan, Source, choose_series, find_image, find_source, parse_arguments

ROOT = Path(__file__).parents[1]
VOLUME = VolumeSettings(base_slices=8, img_size=64)
BASE = Config(model_name="test_efficientnet", pretrained=False, volume=VOLUME, drop_path_rate=0.0)
PRIOR = np.linspace(0.1, 0.4, 14)
RATES = [(0.9, 0.1), (0.95, 0.2), (0.99, 0.999)]  # specificity and threshold
POINTS = [dict(specificity=rate, threshold=low, sensitivity=0.7, positives=20) for rate, low in RATES]
NOISY = """
import infer, os, signal, sys
answer_series, calls = infer.answer_series, []
def noisy(*args):
    calls.append(os.system("echo so does a child") or print("a library prints"))
    if len(calls) == 6 and "SIGNAL" in os.environ:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return answer_series(*args)
infer.answer_series = noisy
sys.exit(infer.main())
"""


def write_run(outputs: Path, weights: int, val_uids: list[str], locator: str = "", **settings) -> None:
    """A member with random weights, strong enough that inputs move its logits."""
    torch.manual_seed(weights)
    cfg = replace(BASE, **settings)
    model = common.build_model(cfg).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    if cfg.task == "locate":
        model.find.bias.fill_(-1.0)
    decoys = np.random.default_rng(weights).random((20, 3)).tolist()
    meta = {"prior": PRIOR.tolist(), "val_uids": val_uids, "decoys": decoys, "locator": locator}
    (outputs / cfg.run_name).mkdir(parents=True)
    path = outputs / cfg.run_name / CHECKPOINT
    common.save_checkpoint(path, model, cfg, meta | {"operating_points": POINTS})


@fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Ten series of nine patients as DICOM and as a cache, and an ensemble of two folds with locators."""
    work = tmp_path_factory.mktemp("infer")
    phantom.make_set(work / "dicoms", 10, 3, matrix=48, plane="axial", plain=True)
    uids, outputs = sorted(path.name for path in (work / "dicoms" / "series").iterdir()), work / "outputs"
    for path in (work / "dicoms" / "series").glob("*/*"):
        dataset = pydicom.dcmread(path)
        dataset.PatientID = f"patient {max(1, uids.index(path.parent.name))}"
        dataset.save_as(path)
    command = ["--src", "dicoms", "--dst", "cache", "--set", "base_slices=8", "--set", "img_size=64"]
    run(work, *command, start=(str(ROOT / "preprocess.py"),))
    for fold, val_uids in enumerate((uids[:5], uids[5:9])):  # the last series is held out by none
        locator = f"locator_test_efficientnet_seed0_fold{fold}"
        write_run(outputs, fold, val_uids, locator, fold=fold, proposals="outputs/locator_*_seed0_fold*")
        settings = {"task": "locate", "locator_width": 8, "ensemble_weight": 0.5}
        write_run(outputs, 10 + fold, val_uids, fold=fold, **settings)
    write_run(outputs, 20, uids[:5], model_name="test_resnet", max_localizer_crops=0)
    (outputs / "unfinished_seed0_fold0").mkdir()
    (work / "longer.csv").write_text(f"{','.join([UID, *LABELS])}\n{uids[0]}\n9.1\n9.2\n")
    return work


def run(work: Path, *arguments: str, code: int = 0, start: tuple = (str(ROOT / "infer.py"),), **environment):
    """stdout and stderr of infer.py, run as a user does in the folder `work`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *start, *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def read_table(source: Path | io.StringIO) -> pd.DataFrame:
    return pd.read_csv(source, dtype={UID: str}).set_index(UID)


def arguments(work: Path, *more: str) -> argparse.Namespace:
    args = parse_arguments(["--src", f"{work}/cache", "--outputs", f"{work}/outputs", *more])
    return argparse.Namespace(**vars(args), is_main=True)


def load(work: Path, *more: str, devices: tuple = (torch.device("cpu"),)) -> infer.Ensemble:
    return infer.load_ensemble(arguments(work, *more), devices, common.volume_settings(BASE))


def blank_scan(grey: int = 0) -> Scan:
    voxels = np.full((8, 64, 64), grey, np.uint8)
    return Scan({VOLUME: Volume(voxels, np.diag([4.0, 3.0, 3.0, 1.0]), [], ["air is bright"])})


@fixture(scope="session")
def reference(work) -> pd.DataFrame:
    """infer.py on the cache, mirrored view included, while a library and a child process print to stdout."""
    stdout, stderr = run(work, "--tta", "--labels", "cache/train.csv", start=("-c", NOISY))
    table = read_table(io.StringIO(stdout))
    assert len(stdout.splitlines()) == 11 and list(table.columns) == list(LABELS)
    assert list(table.index) == sorted(path.stem for path in (work / "cache").glob("*.safetensors"))
    assert table.to_numpy().min() >= 0 and table.to_numpy().max() <= 1 and table.std().min() > 0
    messages = ["unfinished_seed0_fold0", "so does a child", "no --src: predicting the training cache"]
    messages += ["auc_present", "10 series of 9 patients", "10 rows, 0 of them the prior"]
    messages += ["(no interval: ", "10 of 10 scored series were not held out by all members"]
    assert all(text in stderr for text in messages), stderr
    return table


def test_rows_are_the_weighted_mean_of_what_validation_computes(work, reference):
    uid, total = reference.index[0], np.zeros(14)
    rows = common.read_label_table(work / "cache" / "train.csv").query(f"{UID} == @uid")
    tensors, meta = common.load_volume(common.volume_path(work / "cache", uid))
    paths = (work / "outputs").glob(f"*/{CHECKPOINT}")
    runs = {path.parent.name: common.load_run(path.parent) for path in paths}
    for run_ in runs.values():
        run_.model.requires_grad_(False)
        cfg, proposals = replace(run_.cfg, cache=str(work / "cache")), None
        if name := run_.meta["locator"]:
            maps = runs[name].model(torch.from_numpy(tensors["volume"])[None].float() / 255).maps[0].detach()
            peaks = common.propose(torch.sigmoid(maps).numpy(), np.array(meta["affine"]), runs[name].cfg)
            proposals = {uid: peaks[:, :3]}
            assert len(peaks) == 3
        dataset = SeriesDataset(cfg, rows, "deploy", np.array(run_.meta["decoys"]), proposals)
        image = dataset[0]["image"][None].float() / 255
        probs = [torch.sigmoid(run_.model(view).logits)[0].numpy() for view in (image, image.flip(-1))]
        total += cfg.ensemble_weight * (probs[0] + probs[1][SWAP]) / 2
    assert len(runs) == 5  # of the weights 1, 1, 1, 0.5 and 0.5
    assert np.abs(total / 4.0 - reference.loc[uid].to_numpy()).max() < 1e-5


def test_dicom_gives_the_rows_of_the_cache_also_when_killed_beside_broken_series(work, reference):
    tree, out = work / "tree", work / "out[1].csv"
    shutil.copytree(work / "dicoms" / "series", tree)
    for uid, content in (("1.2.3", b"not DICOM"), ("1.2.4", b"")):
        (tree / uid).mkdir()
        (tree / uid / "a.dcm").write_bytes(content)
    (tree / reference.index[0] / "lost.dcm").write_bytes(b"not DICOM")
    (work / "list.csv").write_text("\n".join([UID, "1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]))
    options = ["--src", "tree", "--tta", "--out", out.name, "--series-list", "list.csv"]
    run(work, *options, start=("-c", NOISY), code=-signal.SIGKILL, SIGNAL="SIGKILL")
    (rows,) = (path for path in work.iterdir() if path.name.startswith(".out[1].csv."))
    assert not out.exists() and len(rows.read_text().splitlines()) == 4
    rows.write_text(rows.read_text() + f"{reference.index[0]},0.5,0.")
    stdout, stderr = run(work, *options, code=3)
    assert stdout == "" and "4 of 13 rows are complete" in stderr  # the fifth was the prior of 1.2.5
    assert f"{reference.index[0]}: 1 files left out, the first lost.dcm: " in stderr
    again = run(work, *options, code=3)[1]
    assert "10 of 13 rows are complete" in again and again.count("answered by the prior") == 3
    table = read_table(out)
    assert list(table.index) == ["1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]
    pd.testing.assert_frame_equal(table.loc[reference.index], reference, rtol=0, atol=1e-6)
    assert np.allclose(table.loc[["1.2.3", "1.2.4", "1.2.5"]], PRIOR, atol=1e-7)


def test_two_processes_answer_every_series_once_and_like_one(work, reference):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "infer.py"))
    run(work, "--tta", "--out", "two.csv", start=launch)
    pd.testing.assert_frame_equal(read_table(work / "two.csv"), reference, rtol=0, atol=1e-6)
    again = run(work, "--tta", "--out", "two.csv", start=launch)[1]
    assert again.count("two.csv: 5 of 5 rows are complete") == 2 and "10 rows, 0 of them" in again


def test_a_gateway_gets_the_same_rows_from_the_25_tags_of_the_hidden_test_or_the_prior(work, reference):
    shutil.copytree(work / "dicoms" / "series", work / "hidden")
    (work / "hidden" / "0.1").mkdir()
    dataset = pydicom.dcmread(next((work / "hidden" / reference.index[0]).iterdir()))
    dataset.PixelData = dataset.PixelData[:100]
    dataset.save_as(work / "hidden" / "0.1" / "a.dcm")
    module = work / "site" / "kaggle_evaluation" / "rsna_inference_server.py"
    module.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "gateway.py", module)
    options = {"code": 3, "KAGGLE_SHARED": str(work / "shared"), "PYTHONPATH": "site"}
    options |= {"GATEWAY_DATA": "hidden", "GATEWAY_OUT": "answers.csv"}
    stdout, stderr = run(work, "--serve", "--tta", **options)
    assert stdout == "" and "11 rows, 1 of them the prior" in stderr
    table = read_table(work / "answers.csv")
    pd.testing.assert_frame_equal(table.iloc[1:], reference, rtol=0, atol=1e-6)
    assert np.allclose(table.loc["0.1"], PRIOR)
    stderr = run(work, "--serve", "--budget-hours", "1e-9", **options)[1]
    assert stderr.count("the time is over: 1 series get the prior") == 11 and "11 rows, 11 of them" in stderr


@mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_with_one_line_and_its_code(work, name, code):
    stdout, stderr = run(work, start=("-c", NOISY), code=code, SIGNAL=name)
    assert stdout == "" and f"stopped by {name}" in stderr and "Traceback" not in stderr


@mark.parametrize("words, text", [
    ("--limit 1 > /dev/full", "stdout: No space left on device"),
    ("--limit 1 >&-", "stdout or stderr is closed"),
    ("--outputs cache", "--outputs cache: no run of train.py"),
    ("--serve", "--serve: No module named 'kaggle_evaluation'"),
    ("--src nothing", "--src nothing: no such folder; expected a folder"),
    ("--src longer.csv", "--src longer.csv: a file; expected a folder"),
    ("--out longer.csv --limit 1", "--out longer.csv: no submission, or 2 other series; name"),
    ("--out cache/train.csv", "--out cache/train.csv: no submission, or 0 other series; name"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_place(work, words, text):
    command = f"{sys.executable} {ROOT / 'infer.py'} {words}"
    done = subprocess.run(command, shell=True, cwd=work, capture_output=True, text=True)
    assert done.returncode == 1 and text in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_wrong_usage_has_code_2_and_the_help_lists_each_option_once(capsys):
    for option in ("--limit=0", "--workers=1.5", "--budget-hours=0", "--lim=1", "--out=no/a.csv", "--out=/"):
        with raises(SystemExit, match="2"):
            parse_arguments([option])
        assert option.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    names = vars(parse_arguments([])).keys() - {"started"}
    with raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    listed = re.findall(r"^(?:in |out|how|) +(--[\w-]+) .*", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(listed) == sorted("--" + name.replace("_", "-") for name in names)


def test_the_heaviest_members_stand_first_and_lie_beside_the_locator_that_their_run_names(work):
    alone, spread = load(work), load(work, devices=(torch.device("cpu"), torch.device("cpu:1")))
    assert [member.run.cfg.ensemble_weight for member in alone.members] == [1.0, 1.0, 1.0, 0.5, 0.5]
    devices = [str(member.device) for member in spread.members]
    assert sorted(devices) in (2 * ["cpu"] + 3 * ["cpu:1"], 3 * ["cpu"] + 2 * ["cpu:1"])
    for member in spread.members:
        locator = member.locator or member
        assert (locator.run.folder.name if member.locator else "") == member.run.meta["locator"]
        assert locator.device == member.device
    probs = [infer.predict_series(ensemble, "1.2", blank_scan(), 5)[0] for ensemble in (alone, spread)]
    assert np.array_equal(*probs)


def test_what_speaks_against_a_run_is_said_and_a_bad_one_never_spoils_the_good_ones(work, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    write_run(outputs, 0, ["1.2"], "locator_gone", fold=2)
    write_run(outputs, 1, ["1.2"], seed=1, volume=replace(VOLUME, base_slices=6))
    good = common.load_run(outputs / "test_efficientnet_seed0_fold2")
    (good.folder / "last").mkdir()
    (outputs / "test_efficientnet_seed1_fold0" / "metrics.json").write_text('{"is_nearly_constant": true}')
    both = infer.load_ensemble(arguments(work, "--outputs", str(outputs)), [torch.device("cpu")])
    assert sorted(model.run.cfg.volume.base_slices for model in both.models) == [6, 8]
    assert "seed1_fold0: its predictions are nearly the same for all series" in capsys.readouterr().err
    state = load_file(good.folder / CHECKPOINT)
    config = common.config_to_dict(good.cfg) | {"img_size": 10**9}
    changes = [{"config": config}, {"prior": None}, {"decoys": [[0.5, float("inf"), 0.5]]}]
    for i, meta in enumerate([*(good.meta | change for change in changes), [1, 2]]):
        (outputs / f"bad{i}").mkdir()
        save_file(state, outputs / f"bad{i}" / CHECKPOINT, {"run": json.dumps(meta)})
    (member,) = load(work, "--outputs", str(outputs)).members
    text = capsys.readouterr().err
    assert member.run.cfg.fold == 2 and member.locator is None and "Traceback" not in text
    assert "decoys instead of proposals, as its locator locator_gone is missing" in text
    assert "test_efficientnet_seed1_fold0: the cache does not fit: base_slices 8 (expected 6)" in text
    assert "test_efficientnet_seed0_fold2: this run of train.py is not finished" in text
    assert all(f"left out: {outputs}/bad{i}" in text for i in range(4))


def test_an_artery_on_the_other_side_is_doubtful_and_a_score_says_what_it_leaves_out(work, tmp_path):
    ensemble, maps = load(work), np.zeros((13, 8, 8, 8), np.float32)
    maps[4, 3, 4, 0], maps[5, 6, 4, 0] = 0.9, 0.8  # left and right MCA, far on the right
    answer, other = (infer.Answer(uid, PRIOR) for uid in ("1.2", "1.3"))
    outputs = {ensemble.members[-1]: Output(np.zeros((1, 14)), maps)}  # a locator's
    infer.explain_series(answer, ensemble, blank_scan(), outputs, tmp_path)
    doubts = [row["doubts"][1:] for row in json.loads((tmp_path / "1.2.findings.json").read_text())]
    assert doubts == [[f"{LABELS[4]}, but 84 mm on the other side of the middle"], []]
    labels = pd.DataFrame(1, ["1.2", "8", "9"], ["Modality", *LABELS]).rename_axis(UID).reset_index()
    text = infer.describe_score([answer, other], labels, ensemble.members)
    assert "a patient each; left out: 1 without labels, 2 without a prediction" in text


def test_proposals_reach_a_classifier_of_another_volume_in_millimetres(work, monkeypatch):
    classifier = next(member for member in load(work).members if member.locator)
    coarse, scan, places = VolumeSettings(base_slices=4, img_size=32), blank_scan(), []
    classifier.locator.run.cfg = replace(classifier.locator.run.cfg, volume=coarse)
    maps = np.full((13, 4, 4, 4), 0.01, np.float32)
    maps[4, 3, 1, 2] = 0.9  # its cells are 8 pixels wide: voxel (3, 11.5, 19.5) of the locator's volume
    scan.volumes[coarse] = Volume(np.zeros((4, 32, 32), np.uint8), np.diag([8.0, 6.0, 6.0, 1.0]), [], [])
    scan.volumes[VOLUME].affine[:3, 3] = [2, 1, 1]  # beside voxels of 4, 3 and 3 mm
    monkeypatch.setattr(infer, "predict_views", lambda member, *_: Output(np.zeros((1, 14)), maps))
    monkeypatch.setattr(common, "cut_crop", lambda volume, place, *_: places.append(place) or 0)
    infer.run_member(classifier, "1.2", scan, False, {})
    assert places[0] == approx([(24 - 2) / 4, (69 - 1) / 3, (117 - 1) / 3])


def test_a_member_not_finite_is_left_out_and_a_row_of_none_is_the_prior(work, tmp_path, capsys, monkeypatch):
    ensemble, rows, args = load(work), [], arguments(work, "--explain", str(tmp_path))
    (first, *_, last), item = ensemble.members, (("1.2.3", None), blank_scan(), None)
    with torch.no_grad():
        next(first.run.model.parameters()).fill_(float("nan"))
    for members in ([first], [last], [first, last]):
        ensemble.members = members
        rows.append(infer.answer_series(ensemble, item, 5, args))
        assert any(tmp_path.iterdir()) == (last in members)  # the prior has no findings
    assert np.array_equal(rows[1].probs, rows[2].probs) and not np.array_equal(rows[1].probs, PRIOR)
    assert np.allclose(rows[0].probs, PRIOR) and rows[0].reason
    text = capsys.readouterr().err
    assert "1.2.3: doubtful, but used: air is bright" in text and "NaN or infinite" in text
    assert "answered by the prior, which is not a finding: FloatingPointError('no member gave finite" in text
    error = RuntimeError("CUDA error: an illegal memory access")  # every later row would be the prior
    monkeypatch.setattr(infer, "predict_series", Mock(side_effect=error))
    complaint = r"CUDA error: an illegal memory.*1\.2\.3"
    expect_refusal(complaint, infer.answer_series, ensemble, item, 5, args, kind=OSError)


@mark.parametrize("hard_last", [False, True])
@mark.parametrize("hours", [0.3, 1, 2, 3, 4, 5, 6, 7, 8.5, 9, 12])
def test_2500_uneven_series_never_end_late_and_nothing_is_cut_where_there_is_time(hours, hard_last):
    rng, seconds, plans = np.random.default_rng(int(10 * hours)), hours * 3600, []
    size = rng.lognormal(0, 0.7, 2500)
    size = np.sort(size) if hard_last else size
    reads_s = size * (1 + 20 * (rng.random(2500) < 0.01))  # one in a hundred stalls
    views_s = np.cumsum([0, 1.2, 1.2, 1.2, 1.2, 1.2, 0.3, *[0] * 5, 0.7 * 6.3])  # of a plan's views
    clock = is_read = 60.0
    deadline = infer.Deadline(0.0, seconds, 6, 12, clock)
    for i in range(2500):
        plans.append(deadline.plan_views(clock, 2500 - i))
        if plans[-1] == 0:
            break
        is_read = max(is_read, clock - 2) + reads_s[i]  # reading runs ahead of the models
        forward_s = views_s[plans[-1]] * rng.uniform(0.9, 1.1) + 20 * (i == 0)  # the GPU starts once
        clock = max(clock, is_read) + forward_s + 0.05
        deadline.observe(clock, forward_s, plans[-1])
    everything_s = np.maximum(reads_s, views_s[12]).sum()
    assert clock < seconds
    if hours < 8:
        assert everything_s > seconds and clock > 0.9 * seconds  # the time is used
        assert hours < 2 or plans[-1] > 0 or len(plans) > 2400
    if 5 <= hours < 8 and not hard_last:
        assert set(plans) == {6, 12}  # the mirrored view goes before members do
    if hours > 8 and not hard_last:
        assert everything_s < 0.97 * seconds and set(plans) == {12}


def test_damaged_and_foreign_volumes_of_a_cache_cost_only_themselves(work, tmp_path):
    good = sorted((work / "cache").glob("*.safetensors"))[0]
    shutil.copy(good, tmp_path)
    (tmp_path / "9.2.safetensors").write_bytes(good.read_bytes()[:5000])
    write_cached_series(tmp_path, "9.3", replace(BASE, volume=replace(VOLUME, roi_mm=150.0)), [])
    (tmp_path / "index.csv").write_text(f"{UID},status,reason\n1.4,failed,no slices\n1.5,ok,\n")
    texts = {"9.2": "not a readable", "9.3": "roi_mm", "1.4": "no slices", "1.5": "missing"}
    scans = infer.read_scans(find_source(tmp_path), [*texts, good.stem], {VOLUME}, arguments(work))
    reasons = {uid: reason for (uid, _), _, reason in scans}
    assert reasons.pop(good.stem) is None and all(texts[uid] in reasons[uid] for uid in texts)
    tree = tmp_path / "tree"  # of DICOM files, beside which other programs' files do not make it a cache
    shutil.copytree(work / "dicoms" / "series" / good.stem, tree / good.stem)
    (tree / "index.csv").write_text("name;size\na;1\n")
    save_file({"weights": torch.zeros(9)}, tree / "weights.safetensors")
    assert list(find_source(tree).series) == [good.stem]


def test_a_list_of_series_is_read_with_marks_semicolons_blanks_and_empty_lines(tmp_path):
    path, source = tmp_path / "list.csv", Source({})
    texts = ["\ufeff1.2\r\n1.3\r\n", f"{UID};Left\n1.2;0\n\n1.3;1\n1.2;0\n", " 1.2 \n\n 1.3\n"]
    for text in (*texts, f'Modality,"{UID}"\nCTA,"1.2"\nMRA,"1.3"\n'):
        path.write_text(text, encoding="utf-8")
        assert choose_series(source, path) == ["1.2", "1.3"]
    path.write_text(f"\n{UID}\n")
    expect_refusal("lists no series", choose_series, source, path)


def test_rows_of_other_members_or_settings_lie_in_another_file(work, tmp_path):
    ensemble, state = load(work), argparse.Namespace(process_index=0, num_processes=1)
    for options, num_models, num_files in (((), 5, 1), ((), 5, 1), (("--tta",), 5, 2), ((), 4, 3)):
        args = arguments(work, "--out", str(tmp_path / "out.csv"), *options)
        ensemble.models = ensemble.models[:num_models]
        assert infer.answer_share(ensemble, Source({}), ["1.2"], args, state)[0].reason
        assert len(list(tmp_path.iterdir())) == num_files


def test_a_place_is_the_one_that_series_point_gives_back_and_none_beyond_half_a_gap(work):
    folder, coarse = next((work / "dicoms" / "series").iterdir()), replace(VOLUME, base_slices=6, img_size=32)
    series = read_series(folder, folder.name)
    scan = infer.read_dicom((folder.name, sorted(folder.iterdir())), {VOLUME, coarse})
    assert scan.patient.startswith("patient ")
    assert len(pickle.dumps(scan.series)) < 48 * 48 * len(series.frames)  # no pixels are sent
    for settings, volume in scan.volumes.items():  # decoded once
        assert np.array_equal(volume.voxels, make_volume(series, settings).voxels)
    for point_mm in to_lps([[3, 20.0, 40.0], [5, 33.3, 7.1]], scan.volumes[VOLUME].affine):
        image = find_image(point_mm, series)
        named_mm = series.point(image["SOPInstanceUID"], image["column"], image["row"], image["frame"])
        away_mm = point_mm - named_mm
        along_mm = away_mm @ series.normal
        assert abs(along_mm) <= series.spacing_mm[0] / 2 + 1e-6  # the nearest image
        assert np.linalg.norm(away_mm - along_mm * series.normal) < 0.05
    gap_mm = series.spacing_mm[0] * series.normal
    for frame, step_mm in ((series.frames[0], -gap_mm), (series.frames[-1], gap_mm)):
        assert find_image(frame.position + 0.4 * step_mm, series)["SOPInstanceUID"] == frame.sop_uid
        assert find_image(frame.position + 0.6 * step_mm, series) == {}


def test_one_scan_is_answered_in_words_with_a_picture_that_glows_where_heat_is_high_and_where_to_look(work):
    (folder, other, *_), pictures = (work / "dicoms" / "series").iterdir(), work / "pictures"
    _, stderr = run(work, "--src", str(folder), "--explain", "pictures")
    assert f"{folder.name}: Aneurysm Present 0." in stderr
    assert "above 0.200, threshold of specificity 0.95, sensitivity 0.70 of 20" in stderr
    assert "below 0.999, threshold of specificity 0.99" in stderr
    assert cv2.imread(str(pictures / f"{folder.name}.png")).shape[0] > 300
    assert f"  pictures/{folder.name}.findings.json: " in stderr
    path, other_path = (pictures / f"{uid}.findings.json" for uid in (folder.name, other.name))
    findings = json.loads(path.read_text())
    assert 1 <= len(findings) <= 3 and findings[0]["score"] == max(row["score"] for row in findings)
    for row in findings:
        assert 0.2 < row[LABELS[AP]] < 0.999 and row["artery"] in LABELS[:AP]
        assert row["operating_points"] == [point | {"is_passed": point != POINTS[2]} for point in POINTS]
    known = {UID, LABELS[AP], "operating_points", "notes", "doubts", "artery", "score", "voxel", "lps_mm"}
    assert set(findings[0]) == known | {"SOPInstanceUID", "frame", "column", "row"}
    (work / "one.csv").write_text(other.name)
    run(work, "--explain", "pictures", "--series-list", "one.csv")
    assert set(json.loads(other_path.read_text())[0]) == known  # from the cache
    assert json.loads(path.read_text()) == findings  # an earlier scan's stay
    everything = json.loads((pictures / "findings.json").read_text())
    assert {row[UID] for row in everything} == {folder.name, other.name} and findings[0] in everything
    options = ("--outputs", "outputs/test_resnet_seed0_fold0", "--limit", "1", "--explain", "none")
    assert "no locator among the members" in run(work, *options)[1]
    assert [path.read_text() for path in (work / "none").iterdir()] == ["[]"]
    (volume,) = blank_scan(90).volumes.values()
    findings = [{UID: "1.2", LABELS[AP]: 0.5, "voxel": [5, 20, 30], "artery": "", "score": 0, "doubts": []}]
    for heat, low, high in ((0.02, 0, 0), (0.9, 0.2, 1)):
        png = infer.draw_findings(volume, np.full((8, 64, 64), heat, np.float32), findings)
        blue, _, red = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR).astype(int).T
        width = int(0.85 * len(red))  # without the colour bar
        assert low <= (red[:width] - blue[:width] > 40).mean() <= high


def test_a_shifted_view_is_the_locators_answer_on_a_box_half_a_slab_lower(work):
    folder, name = next((work / "dicoms" / "series").iterdir()), "locator_test_efficientnet_seed0_fold0"
    model, probs = common.load_run(work / "outputs" / name).model, []
    for settings in (VOLUME, replace(VOLUME, roi_top_mm=170.0, roi_skip_mm=10.0)):  # slabs of 20 mm
        image = torch.from_numpy(make_volume(read_series(folder), settings).voxels)[None].float() / 255
        for view, columns in ((image, range(14)), (image.flip(-1), SWAP)):
            probs.append(model(view).logits[0, columns].sigmoid().detach().numpy())
    stdout, _ = run(work, "--src", str(folder), "--outputs", f"outputs/{name}", "--tta", "shift")
    row = read_table(io.StringIO(stdout)).loc[folder.name]
    assert np.abs(row - np.mean(probs, 0)).max() < 1e-5 < 1e-3 < np.abs(probs[0] - probs[2]).max()
    assert "--tta shift: cache is a cache; expected DICOM files" in run(work, "--tta", "shift", code=1)[1]
