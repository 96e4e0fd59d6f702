"""infer.py: what a user meets (through subprocesses), and the functions behind it; members are tiny."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import phantom
import pytest
import torch
from conftest import write_cached_series
from safetensors.torch import save_file

import common
import infer
from common import AP, LABELS, SWAP, UID, Config, Output, SeriesDataset
from dicom import Volume, VolumeSettings, find_series, make_volume, read_series, to_lps

ROOT = Path(__file__).parents[1]
VOLUME = VolumeSettings(base_slices=8, img_size=64)
BASE = Config(model_name="test_efficientnet", pretrained=False, volume=VOLUME, drop_path_rate=0.0)
POINTS = [{"specificity": 0.9, "threshold": 0.2, "sensitivity": 0.7}]
FULL = infer.Plan(False, 5)
PATCHED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import infer
answer_series, calls = infer.answer_series, []
def noisy(*args):
    print("a library prints"); os.system("echo so does a child")
    calls.append(args)
    if len(calls) == 6 and "SIGNAL" in os.environ:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return answer_series(*args)
infer.answer_series = noisy
sys.exit(infer.main())
"""


def write_run(outputs: Path, weights: int, val_uids: list[str], locator: str = "", **settings) -> None:
    """A member with random weights, strong enough that inputs move its logits."""
    cfg = replace(BASE, **settings)
    torch.manual_seed(weights)
    model = common.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if cfg.task == "locate":
            model.find.bias.fill_(-1.0)
    decoys = np.random.default_rng(weights).random((20, 3)).tolist()
    meta = {"prior": np.linspace(0.1, 0.4, 14).tolist(), "val_uids": val_uids, "decoys": decoys}
    meta |= {"locator": locator, "operating_points": POINTS}
    (outputs / cfg.run_name).mkdir(parents=True)
    common.save_checkpoint(outputs / cfg.run_name / infer.CHECKPOINT, model, cfg, meta)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Ten series as DICOM and as a cache, and an ensemble of two folds with their locators."""
    work = tmp_path_factory.mktemp("infer")
    phantom.make_set(work / "dicoms", 10, 3, matrix=48, plane="axial", plain=True)
    series, _ = find_series(work / "dicoms" / "series")
    (work / "cache").mkdir()
    index = [f"{UID},status,reason,patient"]
    for uid, files in series.items():
        volume = make_volume(read_series(files, uid), VOLUME)
        meta = {"affine": volume.affine.tolist(), "spacing_mm": volume.spacing_mm, "doubts": []}
        meta["settings"] = common.volume_settings(BASE)
        path = common.volume_path(work / "cache", uid)
        common.save_volume(path, volume.voxels, np.zeros((0, 3)), np.zeros(0), meta)
        index.append(f"{uid},ok,,{uid[-3:]}")
    (work / "cache" / "index.csv").write_text("\n".join(index))
    shutil.copy(work / "dicoms" / "train.csv", work / "cache")
    uids, outputs = sorted(series), work / "outputs"
    for fold, val_uids in enumerate((uids[:5], uids[5:9])):  # the last series is held out by none
        locator = f"locator_test_efficientnet_seed0_fold{fold}"
        write_run(outputs, fold, val_uids, locator, fold=fold, proposals="outputs/locator_*_seed0_fold*")
        settings = {"task": "locate", "locator_width": 8, "ensemble_weight": 0.5}
        write_run(outputs, 10 + fold, val_uids, fold=fold, **settings)
    write_run(outputs, 20, uids[:5], model_name="test_resnet", max_localizer_crops=0)
    (outputs / "unfinished_seed0_fold0").mkdir()
    return work


def run(work: Path, *arguments: str, code: int = 0, start: tuple = (str(ROOT / "infer.py"),), **environment):
    """stdout and stderr of infer.py, run as a user does in the folder `work`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *start, *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def read_table(source: Path | io.StringIO) -> pd.DataFrame:
    return pd.read_csv(source, dtype={UID: str}).set_index(UID)


def assert_same(table: pd.DataFrame, reference: pd.DataFrame) -> None:
    assert list(table.index) == list(reference.index)
    assert np.abs(table.to_numpy() - reference.to_numpy()).max() < 1e-6


def arguments(work: Path, *more: str) -> argparse.Namespace:
    common_ones = ["--src", str(work / "cache"), "--outputs", str(work / "outputs")]
    args = infer.parse_arguments([*common_ones, *more])
    args.is_main = True
    return args


def load(work: Path, *more: str, devices: tuple = ("cpu",)) -> infer.Ensemble:
    devices = [torch.device(name) for name in devices]
    return infer.load_ensemble(arguments(work, *more), devices, common.volume_settings(BASE))


def blank_scan(grey: int = 0, doubts: tuple = ()) -> infer.Scan:
    voxels = np.full((8, 64, 64), grey, np.uint8)
    return infer.Scan({VOLUME: Volume(voxels, np.diag([4.0, 3.0, 3.0, 1.0]), [], list(doubts))}, [])


def answer(ensemble: infer.Ensemble, scan: infer.Scan, args: argparse.Namespace) -> infer.Answer:
    deadline = infer.begin_deadline(ensemble, args)
    return infer.answer_series(ensemble, ("1.2.3", scan, ""), FULL, deadline, args)


@pytest.fixture(scope="session")
def reference(work) -> pd.DataFrame:
    """infer.py on the cache, mirrored view included, while a library and a child process print to stdout."""
    stdout, stderr = run(work, str(ROOT), "--tta", "--labels", "cache/train.csv", start=("-c", PATCHED))
    table = read_table(io.StringIO(stdout))
    assert len(stdout.splitlines()) == 11 and list(table.columns) == list(LABELS)
    assert list(table.index) == sorted(path.stem for path in (work / "cache").glob("*.safetensors"))
    assert table.to_numpy().min() >= 0 and table.to_numpy().max() <= 1 and table.std().min() > 0
    assert "unfinished_seed0_fold0" in stderr and "so does a child" in stderr and "wAUC" in stderr
    assert "no --src: predicting the training cache" in stderr and "10 rows, 0 of them the prior" in stderr
    assert "10 of 10 scored series were not held out by all members" in stderr
    return table


# --- the table ----------------------------------------------------------------------------------------------


def test_rows_are_the_weighted_mean_of_what_validation_computes(work, reference):
    uid, total, weights = reference.index[0], np.zeros(14), 0.0
    labels = common.read_label_table(work / "cache" / "train.csv")
    paths = (work / "outputs").glob(f"*/{infer.CHECKPOINT}")
    runs = {path.parent.name: common.load_run(path.parent) for path in paths}
    assert len(runs) == 5
    for run_ in runs.values():
        cfg, proposals = replace(run_.cfg, cache=str(work / "cache")), None
        if name := run_.meta["locator"]:
            tensors, meta = common.load_volume(common.volume_path(cfg.cache, uid))
            with torch.no_grad():
                maps = runs[name].model(torch.from_numpy(tensors["volume"])[None].float() / 255).maps[0]
            peaks = common.propose(torch.sigmoid(maps).numpy(), np.array(meta["spacing_mm"]), runs[name].cfg)
            proposals = {uid: to_lps(peaks[:, :3], np.array(meta["affine"]))}
            assert len(peaks) == 3
        rows, decoys = labels[labels[UID] == uid], np.array(run_.meta["decoys"])
        image = SeriesDataset(cfg, rows, "deploy", decoys, proposals)[0]["image"][None].float() / 255
        with torch.no_grad():
            probs = [torch.sigmoid(run_.model(view).logits)[0].numpy() for view in (image, image.flip(-1))]
        total += cfg.ensemble_weight * (probs[0] + probs[1][SWAP]) / 2
        weights += cfg.ensemble_weight
    assert weights == 4.0
    assert np.abs(total / weights - reference.loc[uid].to_numpy()).max() < 1e-5


def test_dicom_and_cache_give_the_same_rows_also_when_killed_and_resumed_beside_broken_series(
    work, reference
):
    tree, out = work / "tree", work / "out[1].csv"
    shutil.copytree(work / "dicoms" / "series", tree)
    for uid, content in (("1.2.3", b"not DICOM"), ("1.2.4", b"")):
        (tree / uid).mkdir()
        (tree / uid / "a.dcm").write_bytes(content)
    (work / "list.csv").write_text("\n".join([UID, "1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]))
    options = ["--src", "tree", "--tta", "--out", out.name, "--series-list", "list.csv"]
    neighbour = work / "out1.csv.partial.csv"
    neighbour.write_text("of another run")
    run(work, str(ROOT), *options, start=("-c", PATCHED), code=-signal.SIGKILL, SIGNAL="SIGKILL")
    partial = work / "out[1].csv.partial.csv"
    assert not out.exists() and len(partial.read_text().splitlines()) == 2 + 4
    partial.write_text(partial.read_text() + f"{reference.index[0]},0.5,0.")

    stdout, stderr = run(work, *options, code=3)
    assert stdout == "" and not partial.exists() and neighbour.exists()
    assert "4 series were answered before" in stderr  # the fifth was the prior of 1.2.5, which is tried again
    table = read_table(out)
    assert list(table.index) == ["1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]
    assert_same(table.loc[reference.index], reference)
    assert np.allclose(table.loc[["1.2.3", "1.2.4", "1.2.5"]], np.linspace(0.1, 0.4, 14), atol=1e-7)


def test_two_processes_answer_every_series_once_and_like_one(work, reference):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "infer.py"))
    run(work, "--tta", "--out", "two.csv", start=launch)
    assert_same(read_table(work / "two.csv"), reference)
    assert not list(work.glob("two.csv.partial*"))


def test_a_gateway_gets_the_same_answers_from_the_25_tags_of_the_hidden_test(work, reference):
    start = (str(ROOT / "tests" / "gateway.py"), "--data", "dicoms/series", "--out", "answers.csv", "--strip")
    serve = ("--", str(ROOT / "infer.py"), "--serve", "--tta")
    stdout, stderr = run(work, *serve, start=start, KAGGLE_SHARED=str(work / "shared"))
    assert stdout == "" and "10 rows, 0 of them the prior" in stderr
    assert_same(read_table(work / "answers.csv"), reference)


def test_sigterm_and_sigint_end_with_one_line_and_their_code(work):
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        stdout, stderr = run(work, str(ROOT), start=("-c", PATCHED), code=code, SIGNAL=name)
        assert stdout == "" and f"stopped by {name}" in stderr and "Traceback" not in stderr


def test_a_table_that_cannot_be_written_is_one_line_that_names_the_place(work):
    endings = {"> /dev/full": "No space left on device: 'stdout'", ">&-": "stdout or stderr is closed"}
    for ending, text in {**endings, "--out missing/a.csv": "missing"}.items():
        command = f"{sys.executable} {ROOT / 'infer.py'} --limit 1 {ending}"
        done = subprocess.run(command, shell=True, cwd=work, capture_output=True, text=True)
        assert done.returncode == 1 and text in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# --- members ------------------------------------------------------------------------------------------------


def test_the_heaviest_members_stand_first_and_locators_propose_for_the_run_that_names_them(work):
    members = load(work).members
    assert [member.run.cfg.ensemble_weight for member in members] == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert [member.name for member in members[:3]] == sorted(member.name for member in members[:3])
    for member in members:
        assert bool(member.locator) == bool(member.run.meta["locator"])
        assert not member.locator or member.locator.run.cfg.fold == member.run.cfg.fold


def test_runs_are_a_folder_of_runs_a_run_or_a_glob_also_with_brackets_in_its_name(work, tmp_path, capsys):
    outputs = tmp_path / "heads [a]"
    shutil.copytree(work / "outputs", outputs)
    assert len(infer.find_runs(str(outputs))) == 5
    assert "without best_ema.safetensors: unfinished_seed0_fold0" in capsys.readouterr().err
    single = outputs / "test_resnet_seed0_fold0"
    assert infer.find_runs(str(single)) == [single]
    assert len(infer.find_runs(str(work / "outputs" / "locator_*"))) == 2
    with pytest.raises(ValueError, match="no such folder, or an empty one"):
        infer.find_runs("nothing/*")


def test_members_without_their_locator_or_with_other_volumes_are_named(work, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    write_run(outputs, 0, ["1.2"], "locator_gone", fold=2)
    write_run(outputs, 1, ["1.2"], seed=1, volume=replace(VOLUME, base_slices=6))
    (member,) = load(work, "--outputs", str(outputs)).members
    text = capsys.readouterr().err
    assert member.run.cfg.fold == 2 and member.locator is None
    assert "decoys instead of proposals, as its locator locator_gone is missing" in text
    assert "test_efficientnet_seed1_fold0: the cache does not fit: base_slices 8 (expected 6)" in text
    both = infer.load_ensemble(arguments(work, "--outputs", str(outputs)), [torch.device("cpu")])
    assert sorted(settings.base_slices for settings in both.settings) == [6, 8]


def test_a_bad_checkpoint_never_spoils_the_good_ones(work, tmp_path, capsys):
    shutil.copytree(work / "outputs" / "test_resnet_seed0_fold0", tmp_path / "good")
    good = common.load_run(tmp_path / "good")
    state = {name: value.contiguous() for name, value in good.model.state_dict().items()}
    config = common.config_to_dict(good.cfg)
    bad = {
        "list": [1, 2],
        "no_prior": good.meta | {"prior": None},
        "infinite_decoys": good.meta | {"decoys": [[0.5, float("inf"), 0.5]]},
        "infinite_weight": good.meta | {"config": config | {"ensemble_weight": float("inf")}},
        "absurd_size": good.meta | {"config": config | {"img_size": 10**9}},
        "text_config": good.meta | {"config": "maxvit"},
        "text_points": good.meta | {"operating_points": "often"},
    }
    for name, meta in bad.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / infer.CHECKPOINT, {"run": json.dumps(meta)})
    ensemble = load(work, "--outputs", str(tmp_path))
    assert [member.run.folder.name for member in ensemble.members] == ["good"]
    text = capsys.readouterr().err
    assert all(f"left out: {tmp_path / name}" in text for name in bad) and "Traceback" not in text


def test_files_decoded_once_serve_volumes_of_different_settings(work):
    files = sorted(next((work / "dicoms" / "series").iterdir()).iterdir())
    settings = [VOLUME, replace(VOLUME, base_slices=6, img_size=32)]
    for each, volume in infer.read_dicom(("1.2", files), settings).volumes.items():
        alone = make_volume(read_series(files, "1.2"), each)
        assert np.array_equal(volume.voxels, alone.voxels) and np.array_equal(volume.affine, alone.affine)


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
    assert places[0] == pytest.approx([(24 - 2) / 4, (69 - 1) / 3, (117 - 1) / 3])


def test_models_share_the_devices_and_a_classifier_lies_beside_its_locator(work):
    spread = load(work, devices=("cpu", "cpu:1"))
    devices = [str(member.device) for member in spread.members]
    assert set(devices) == {"cpu", "cpu:1"} and 2 <= devices.count("cpu") <= 3
    assert all(member.device == member.locator.device for member in spread.members if member.locator)
    alone, both = (infer.predict_series(e, "1.2", blank_scan(), FULL)[0] for e in (load(work), spread))
    assert np.array_equal(alone, both)


def test_a_member_that_is_not_finite_is_left_out_and_a_row_without_members_is_the_prior(work, capsys):
    ensemble = load(work)
    first, *_, last = ensemble.members
    ensemble.members = [last]
    good = answer(ensemble, blank_scan(), arguments(work))
    with torch.no_grad():
        next(first.run.model.parameters()).fill_(float("nan"))
    ensemble.members = [first, last]
    assert np.array_equal(answer(ensemble, blank_scan(), arguments(work)).probs, good.probs)
    assert "NaN or infinite" in capsys.readouterr().err
    ensemble.members = [first]
    row = answer(ensemble, blank_scan(), arguments(work))
    assert np.array_equal(row.probs, ensemble.prior) and "no member" in row.reason


def test_a_gpu_that_is_gone_stops_the_run_instead_of_giving_priors(work, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(infer, "predict_series", broken)
    with pytest.raises(OSError, match=r"1\.2\.3: RuntimeError: CUDA error: an illegal memory access"):
        answer(load(work), blank_scan(), arguments(work))


# --- never late ---------------------------------------------------------------------------------------------


def simulate(hours: float, seed: int, hard_last: bool = False, num: int = 2500) -> tuple[float, list, float]:
    """Seconds at the end for num series of uneven cost, the plans, and the seconds that all of it takes."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 0.7, num)
    size = np.sort(size) if hard_last else size
    reads_s = size * (1 + 20 * (rng.random(num) < 0.01))  # one in a hundred stalls
    forwards_s = np.array([1.2, 1.2, 1.2, 1.2, 1.2, 0.3])
    start_s = clock = is_read = 60.0
    deadline, plans = infer.Deadline(hours * 3600, infer.Plan(True, 6), start_s), []
    for i in range(num):
        plans.append(deadline.next_plan(clock, num - i))
        if plans[-1].num_members == 0:
            break
        is_read = max(is_read, clock - 2) + reads_s[i]  # reading runs ahead of the models
        views = 1.7 if plans[-1].is_mirrored else 1.0
        forward_s = forwards_s[: plans[-1].num_members].sum() * views * rng.uniform(0.9, 1.1)
        forward_s += 20 if i == 0 else 0  # the first series starts the GPU
        clock = max(clock, is_read) + forward_s + 0.05
        deadline.observe(clock, forward_s, plans[-1])
    everything_s = sum(max(read_s, 1.7 * forwards_s.sum()) for read_s in reads_s)
    return clock, plans, everything_s


@pytest.mark.parametrize("hard_last", [False, True])
def test_2500_uneven_series_never_end_late_and_use_the_time(hard_last):
    for hours in (0.3, 1, 2, 3, 4, 5, 6, 7):
        clock, plans, everything_s = simulate(hours, seed=int(10 * hours), hard_last=hard_last)
        assert everything_s > hours * 3600
        assert 0.9 * hours * 3600 < clock < hours * 3600
        if hours >= 2:
            assert plans[-1].num_members > 0 or len(plans) > 2400
        if hours >= 5 and not hard_last:
            assert {plan.num_members for plan in plans} == {6}  # the mirrored view goes before members do


def test_nothing_is_cut_when_there_is_time():
    for hours, seed in ((8.5, 0), (9, 1), (12, 2)):
        clock, plans, everything_s = simulate(hours, seed)
        assert 0.6 < everything_s / (hours * 3600) < 0.97
        assert set(plans) == {infer.Plan(True, 6)} and clock < hours * 3600


def test_when_the_time_is_over_the_rest_is_the_prior_and_a_started_series_is_finished(work, capsys):
    args, ensemble = arguments(work, "--budget-hours", "1"), load(work)
    source = infer.find_source(work / "cache")
    args.started = time.monotonic() - 3600 * 0.985  # over the 98 % after which no series starts
    answers = infer.answer_all(ensemble, source, sorted(source.series), args, lambda answer: None)
    assert [answer.reason for answer in answers] == ["no time left"] * 10
    assert "10 series get the prior" in capsys.readouterr().err
    _, outputs = infer.predict_series(ensemble, "1", blank_scan(), FULL, time.monotonic())
    assert len(set(outputs) - {ensemble.members[0].locator.name}) == 1  # no second member starts


def test_predict_answers_whatever_comes(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "SHARED", tmp_path / "shared")
    ensemble = infer.load_ensemble(arguments(work), [torch.device("cpu")])
    prior, answers, bar = [ensemble.prior.tolist()], [], common.progress(9, "series", show=False)
    (tmp_path / "shared" / "1.2.3").mkdir(parents=True)
    (tmp_path / "shared" / "1.2.3" / "a.dcm").write_bytes(b"DICM" * 100)
    predict = infer.make_predict(ensemble, arguments(work, "--serve"), answers, bar)
    assert predict.__name__ == "predict"
    assert predict(str(tmp_path / "shared" / "1.2.3")).to_numpy().tolist() == prior
    assert (tmp_path / "shared").is_dir() and not list((tmp_path / "shared").iterdir())
    assert list(predict(None).columns) == list(LABELS)
    folder = next((work / "dicoms" / "series").iterdir())
    over = arguments(work, "--serve", "--budget-hours", "1e-9")
    assert infer.make_predict(ensemble, over, answers, bar)(str(folder)).to_numpy().tolist() == prior
    assert [bool(answer.reason) for answer in answers] == [True] * 3
    assert "no time left" in capsys.readouterr().err


def test_without_kaggles_package_serve_is_one_line(work):
    assert "kaggle_evaluation" in run(work, "--serve", code=1)[1].splitlines()[-1]


# --- the series ---------------------------------------------------------------------------------------------


def test_damaged_and_foreign_volumes_of_a_cache_cost_only_themselves(work, tmp_path):
    good = sorted((work / "cache").glob("*.safetensors"))[0]
    shutil.copy(good, tmp_path)
    (tmp_path / "9.2.safetensors").write_bytes(good.read_bytes()[:5000])
    write_cached_series(tmp_path, "9.3", replace(BASE, volume=replace(VOLUME, roi_mm=150.0)), [])
    index = f"{UID},status,reason,patient\n1.4,failed,no slices,\n1.5,ok,,p\n"
    (tmp_path / "index.csv").write_text(index)
    uids = ["9.2", "9.3", "1.4", "1.5", good.stem]
    scans = infer.read_scans(infer.find_source(tmp_path), uids, [VOLUME], arguments(work))
    reasons = {uid: reason for uid, _, reason in scans}
    assert reasons[good.stem] == "" and "roi_mm" in reasons["9.3"] and "not a readable" in reasons["9.2"]
    assert "no slices" in reasons["1.4"] and "missing" in reasons["1.5"]


def test_a_doubtful_volume_is_used_and_named(work, capsys):
    assert answer(load(work), blank_scan(doubts=("air is bright",)), arguments(work)).reason == ""
    assert "1.2.3: doubtful, but used: air is bright" in capsys.readouterr().err


def test_other_programs_files_do_not_make_a_dicom_tree_a_cache(work, tmp_path):
    uid = next((work / "dicoms" / "series").iterdir()).name
    shutil.copytree(work / "dicoms" / "series" / uid, tmp_path / uid)
    (tmp_path / "index.csv").write_text("name;size\na;1\n")
    save_file({"weights": torch.zeros(9)}, tmp_path / "weights.safetensors")
    source = infer.find_source(tmp_path)
    assert not source.is_cache and list(source.series) == [uid]
    with pytest.raises(ValueError, match="no such folder"):
        infer.find_source(tmp_path / "nothing")


def test_a_list_of_series_is_read_with_marks_semicolons_blanks_and_empty_lines(tmp_path):
    path, source = tmp_path / "list.csv", infer.Source(False, {}, {})
    texts = ["\ufeff1.2\r\n1.3\r\n", f"{UID};Left\n1.2;0\n\n1.3;1\n1.2;0\n", " 1.2 \n\n 1.3\n"]
    for text in [*texts, f'Modality,"{UID}"\nCTA,"1.2"\nMRA,"1.3"\n']:
        path.write_text(text, encoding="utf-8")
        assert infer.choose_series(source, path) == ["1.2", "1.3"]
    path.write_text(f"\n{UID}\n")
    with pytest.raises(ValueError, match="lists no series"):
        infer.choose_series(source, path)


def test_finished_rows_of_other_members_or_settings_are_refused(work, tmp_path):
    ensemble, path = load(work), tmp_path / "out.csv.partial.csv"
    identity = infer.describe_run(ensemble, arguments(work), 1)
    _, save = infer.open_partial(path, identity)
    save(infer.Answer("1.2", np.full(14, 1 / 3)))
    save(infer.Answer("1.3", np.full(14, 0.5), "unreadable"))
    done, _ = infer.open_partial(path, identity)
    assert list(done) == ["1.2"] and done["1.2"].probs.tolist() == [1 / 3] * 14
    others = [infer.describe_run(ensemble, arguments(work, "--tta"), 1)]
    ensemble.models.pop()
    others.append(infer.describe_run(ensemble, arguments(work), 1))
    for other in others:
        with pytest.raises(ValueError, match="from other members or settings"):
            infer.open_partial(path, other)


# --- explanations -------------------------------------------------------------------------------------------


def test_a_place_is_the_one_that_series_point_gives_back(work):
    folder = next((work / "dicoms" / "series").iterdir())
    series = read_series(folder, folder.name)
    volume = make_volume(series, VOLUME)
    for voxel in ([3, 20.0, 40.0], [5, 33.3, 7.1]):
        place, point_mm = infer.describe_place(voxel, volume, series.frames), to_lps(voxel, volume.affine)[0]
        image = (place["SOPInstanceUID"], place["column"], place["row"], place["frame"])
        away_mm = point_mm - series.point(*image)
        along_mm = away_mm @ series.normal
        assert abs(along_mm) <= series.spacing_mm[0] / 2 + 1e-6  # the nearest image
        assert place["distance_mm"] == pytest.approx(abs(along_mm), abs=0.006)
        assert np.linalg.norm(away_mm - along_mm * series.normal) < 0.05
        assert place["lps_mm"] == pytest.approx(point_mm, abs=0.006)


def test_one_scan_is_answered_in_words_with_a_picture_and_where_to_look(work):
    folder, pictures = next((work / "dicoms" / "series").iterdir()), work / "pictures"
    _, stderr = run(work, "--src", str(folder), "--explain", "pictures")
    assert f"{folder.name}: Aneurysm Present 0." in stderr
    assert "above 0.20, the threshold of specificity 0.90, sensitivity 0.70" in stderr
    assert cv2.imread(str(pictures / f"{folder.name}.png")).shape[0] > 300
    first, second, _ = json.loads((pictures / "findings.json").read_text())
    assert first["score"] >= second["score"] and first["artery"] in LABELS[:AP]
    in_image = {"SOPInstanceUID", "frame", "column", "row", "distance_mm"}
    assert set(first) == {UID, "artery", "score", "voxel", "lps_mm", *in_image}
    _, stderr = run(work, "--explain", "pictures", "--limit", "1")
    assert "a cache has no image, column and row" in stderr
    assert not in_image & set(json.loads((pictures / "findings.json").read_text())[0])


def test_an_ensemble_without_a_locator_says_that_it_has_no_explanation(work):
    outputs = "outputs/test_resnet_seed0_fold0"
    _, stderr = run(work, "--outputs", outputs, "--limit", "1", "--explain", "none")
    assert "no locator among the members" in stderr and not list((work / "none").glob("*.png"))


def test_low_heat_does_not_glow_and_high_heat_does():
    (volume,) = blank_scan(90).volumes.values()
    finding = {"voxel": [5, 20, 30], "artery": "", "score": 0}
    for heat, low, high in ((0.02, 0, 0), (0.9, 0.2, 1)):
        row = infer.Answer("1.2", np.full(14, 0.5), findings=[finding])
        png = infer.draw_findings(volume, np.full((8, 64, 64), heat, np.float32), row)
        image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR).astype(int)
        panels = image[:, : int(0.85 * image.shape[1])]  # without the colour bar
        assert low <= (panels[..., 2] - panels[..., 0] > 40).mean() <= high
