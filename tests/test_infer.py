"""infer.py: what a user sees (through subprocesses), and the functions behind it; members are tiny."""

import argparse
import ast
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

import numpy as np
import pandas as pd
import phantom
import pytest
import torch

import common
import infer
from common import AP, LABELS, SWAP, UID, Config, SeriesDataset, Volume

ROOT = Path(__file__).parents[1]
BASE = Config(
    model_name="test_efficientnet", pretrained=False, img_size=64, base_slices=8, drop_path_rate=0.0
)
NOISE = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import common, infer
load_run = common.load_run
def noisy(*args):
    print("a library prints"); os.system("echo so does a child")
    return load_run(*args)
common.load_run = noisy
sys.exit(infer.main())
"""
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import infer
open_partial, kept = infer.open_partial, []
def deadly(*args):
    done, keep = open_partial(*args)
    def keep_five(answer):
        keep(answer)
        kept.append(answer)
        if len(kept) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    return done, keep_five
infer.open_partial = deadly
sys.exit(infer.main())
"""


def write_run(outputs: Path, weights: int, val_uids: list[str], **settings) -> None:
    """A member with random weights, strong enough that inputs move its logits."""
    cfg = replace(BASE, **settings)
    torch.manual_seed(weights)
    model = common.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if cfg.task == "locate":
            model.find.bias.fill_(-1.0)
    meta = {"prior": np.linspace(0.1, 0.4, 14).tolist(), "fold": cfg.fold, "val_uids": val_uids}
    meta |= {"decoys": np.random.default_rng(weights).random((20, 3)).tolist()}
    meta["locator"] = Path(
        cfg.proposals.replace("*", "test_efficientnet", 1).replace("*", str(cfg.fold))
    ).name
    (outputs / cfg.run_name).mkdir(parents=True)
    common.save_checkpoint(outputs / cfg.run_name / "best_ema.safetensors", model, cfg, meta)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Ten series as DICOM and as a cache, and an ensemble of two folds with their locators."""
    work = tmp_path_factory.mktemp("infer")
    phantom.make_set(work / "dicoms", 10, 3, matrix=48, plane="axial", plain=True)
    labels = pd.read_csv(work / "dicoms" / "train.csv", dtype={UID: str})
    cache = work / "cache"
    cache.mkdir()
    labels.to_csv(cache / "train.csv", index=False)
    points = pd.read_csv(work / "dicoms" / "train_localizers.csv", dtype=str)
    rows = []
    for uid, files in common.find_series(work / "dicoms" / "series")[0].items():
        series = common.read_series(files, uid)
        volume = common.make_volume(series, BASE)
        own = points[points[UID] == uid]
        places = [
            series.point(
                row.SOPInstanceUID, **{k: float(v) for k, v in ast.literal_eval(row.coordinates).items()}
            )
            for row in own.itertuples()
        ]
        voxels = common.to_voxel(np.array(places).reshape(-1, 3), volume.affine)
        meta = {"uid": uid, "affine": volume.affine.tolist(), "spacing_mm": volume.spacing_mm}
        meta["settings"] = common.volume_settings(BASE)
        kinds = np.array([LABELS.index(name) for name in own["location"]], np.int64)
        common.save_volume(cache / f"{uid}.safetensors", volume.voxels, voxels, kinds, meta)
        rows.append((uid, "ok", "", series.patient, series.plane))
    columns = [UID, "status", "reason", "patient", "plane"]
    pd.DataFrame(rows, columns=columns).to_csv(cache / "index.csv", index=False)
    uids = sorted(row[0] for row in rows)
    locators = "outputs/locator_*_seed0_fold*"
    for fold, val_uids in enumerate((uids[:5], uids[5:9])):  # the last series is held out by none
        write_run(work / "outputs", fold, val_uids, fold=fold, proposals=locators)
        write_run(
            work / "outputs",
            10 + fold,
            val_uids,
            fold=fold,
            task="locate",
            max_localizer_crops=0,
            locator_width=8,
            ensemble_weight=0.5,
        )
    write_run(work / "outputs", 20, uids[:5], model_name="test_maxvit", max_localizer_crops=0)
    (work / "outputs" / "unfinished_seed0_fold0").mkdir()
    return work


def run(work: Path, *arguments: str, code: int = 0, start: tuple = (str(ROOT / "infer.py"),), **environment):
    """stdout and stderr of infer.py, run as a user does in the folder `work`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *start, *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def table_of(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), dtype={UID: str}).set_index(UID)


def arguments(work: Path, *more: str) -> argparse.Namespace:
    args = infer.parse_arguments(
        ["--src", str(work / "cache"), "--outputs", str(work / "outputs/*_seed*"), *more]
    )
    args.precision = "no"
    return args


def load(work: Path, *more: str) -> infer.Ensemble:
    return infer.load_ensemble(arguments(work, *more), torch.device("cpu"), common.volume_settings(BASE))


@pytest.fixture(scope="session")
def reference(work) -> pd.DataFrame:
    """infer.py on the cache, mirrored view included, while a library and a child process print to stdout."""
    assert len(common.find_series(work / "dicoms" / "series")[0]) == 10
    stdout, stderr = run(work, str(ROOT), "--tta", "--labels", "cache/train.csv", start=("-c", NOISE))
    table = table_of(stdout)
    assert "unfinished_seed0_fold0" in stderr and "so does a child" in stderr and "wAUC" in stderr
    assert "the score is too high: 9 series trained some of the members" in stderr
    assert len(stdout.splitlines()) == 11
    return table


# --- the table ----------------------------------------------------------------------------------------------


def test_the_table_has_a_sorted_row_per_series_and_nothing_else_is_on_stdout(work, reference):
    assert list(reference.columns) == list(LABELS)
    assert list(reference.index) == sorted(path.stem for path in (work / "cache").glob("*.safetensors"))
    assert ((reference >= 0) & (reference <= 1)).all(axis=None)
    assert reference.std().min() > 0  # the members do look at the series


def test_rows_are_the_weighted_mean_of_what_validation_computes(work, reference):
    uid = reference.index[0]
    labels = pd.read_csv(work / "cache" / "train.csv", dtype={UID: str})
    runs = [common.load_run(folder) for folder in sorted((work / "outputs").glob("*_fold*"))[:-1]]
    runs = {run.cfg.run_name: run for run in runs}
    assert len(runs) == 5
    total, weights = np.zeros(14), 0.0
    for run_ in runs.values():
        cfg, found = replace(run_.cfg, cache=str(work / "cache")), None
        tensors, meta = common.load_volume(work / "cache" / f"{uid}.safetensors")
        if cfg.proposals:
            locator = runs[f"locator_test_efficientnet_seed0_fold{cfg.fold}"].model
            with torch.no_grad():
                scores, maps = locator(torch.from_numpy(tensors["volume"])[None].float() / 255)
            spacing_mm = np.array(json.loads(meta["spacing_mm"]))
            peaks = common.find_peaks(torch.sigmoid(maps[0]).numpy(), spacing_mm, 3, cfg.min_peak_mm, 8)
            found = {uid: common.Proposal(peaks[:, :3], scores[0].numpy())}
            assert len(peaks) == 3
        rows = labels[labels[UID] == uid]
        decoys = np.array(run_.meta["decoys"])
        dataset = SeriesDataset(cfg, rows, "deploy", decoys, found)
        image, scores = dataset[0]["image"][None].float() / 255, dataset[0]["scores"][None]
        views = [(image, scores), (image.flip(-1), scores[:, SWAP])]
        assert cfg.has_scores == bool(scores.any())
        with torch.no_grad():
            outputs = [run_.model(*(view if cfg.has_scores else view[:1])) for view in views]
        logits = [output[0] if isinstance(output, tuple) else output for output in outputs]
        probs = [torch.sigmoid(own)[0].numpy() for own in logits]
        total += cfg.ensemble_weight * (probs[0] + probs[1][SWAP]) / 2
        weights += cfg.ensemble_weight
    assert weights == 4.0
    assert np.abs(total / weights - reference.loc[uid].to_numpy()).max() < 1e-5


def test_dicom_and_cache_give_the_same_rows_also_when_killed_and_resumed_beside_broken_series(
    work, reference
):
    tree, out = work / "tree", work / "out.csv"
    tree.mkdir()
    for path in (work / "dicoms" / "series").glob("*/*"):
        (tree / path.parent.name).mkdir(exist_ok=True)
        os.link(path, tree / path.parent.name / path.name)
    (tree / "1.2.3").mkdir()
    (tree / "1.2.3" / "a.dcm").write_bytes(b"not DICOM")
    (tree / "1.2.4").mkdir()
    (tree / "1.2.4" / "empty.dcm").write_bytes(b"")
    (tree / "1.2.6").mkdir()
    (work / "list.csv").write_text("\n".join([UID, "1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]))
    assert infer.find_source(tree).failed == {"1.2.6": "an empty folder"}
    options = ["--src", "tree", "--tta", "--out", "out.csv", "--sample-submission", "list.csv"]
    run(work, str(ROOT), *options, start=("-c", KILLED), code=-signal.SIGKILL)
    partial = work / "out.csv.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + 5
    partial.write_text(partial.read_text() + '{"uid": "torn')

    stdout, stderr = run(work, *options, code=3)
    assert stdout == "" and not partial.exists()
    assert "4 series were answered before" in stderr  # the fifth was the prior of 1.2.5, which is tried again
    table = table_of(out.read_text())
    assert list(table.index) == ["1.2.5", *reference.index[::-1], "1.2.3", "1.2.4"]
    good = table.loc[reference.index]
    assert np.abs(good.to_numpy() - reference.to_numpy()).max() < 1e-7
    assert np.allclose(table.loc[["1.2.3", "1.2.4", "1.2.5"]], np.linspace(0.1, 0.4, 14), atol=1e-7)


def test_two_processes_answer_every_series_once_and_like_one(work, reference):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "infer.py"))
    stdout, stderr = run(work, "--tta", start=launch)
    table = table_of(stdout)
    assert "2 processes" in stderr
    assert list(table.index) == list(reference.index)
    assert np.abs(table.to_numpy() - reference.to_numpy()).max() < 1e-6


def test_a_gateway_gets_the_same_answers_from_the_25_tags_of_the_hidden_test(work, reference):
    data = work / "dicoms" / "series"
    start = (str(ROOT / "tests" / "gateway.py"), "--data", str(data), "--out", "answers.csv", "--strip", "--")
    serve = (str(ROOT / "infer.py"), "--serve", "--tta")
    stdout, _ = run(work, *serve, start=start, KAGGLE_SHARED=str(work / "shared"))
    assert stdout == ""
    table = table_of((work / "answers.csv").read_text())
    assert list(table.index) == list(reference.index)
    assert np.abs(table.to_numpy() - reference.to_numpy()).max() < 1e-6


def test_out_of_fold_rows_come_from_members_that_never_saw_the_series(work, reference):
    stdout, stderr = run(work, "--oof", "--explain", "pictures", "--explain-threshold", "0")
    table, uids = table_of(stdout), list(reference.index)
    assert "1 of 10 series left out" in stderr and list(table.index) == uids[:9]
    assert "wAUC" in stderr and "9 series of" in stderr and "plane axial" in stderr
    ensemble = load(work, "--oof")
    for uid, fold in ((uids[0], 0), (uids[6], 1)):
        voters = ensemble.voters(uid, True)
        assert {m.run.cfg.fold for m in voters} == {fold} and len(voters) == (3, 2)[fold]
        volumes, *_ = infer.read_cached(work / "cache" / f"{uid}.safetensors", common.volume_settings(BASE))
        probs, *_ = infer.predict_series(ensemble, voters, uid, volumes, False)
        assert np.abs(probs - table.loc[uid].to_numpy()).max() < 1e-6

    hottest = pd.read_csv(work / "pictures" / "hottest.csv", dtype={UID: str}).set_index(UID)
    labels = pd.read_csv(work / "cache" / "train.csv", dtype={UID: str}).set_index(UID)
    positive = [uid for uid in uids[:9] if labels.loc[uid, LABELS[AP]]]
    assert 2 <= len(positive) < 9
    assert sorted(hottest.index[hottest["distance_mm"].notna()]) == positive
    near = int((hottest["distance_mm"] <= 10).sum())
    assert f"within 10 mm of an annotated point: {near} of {len(positive)} series" in stderr
    for uid in uids[:9]:
        assert (work / "pictures" / f"{uid}.png").read_bytes()[:4] == b"\x89PNG"


# --- members ------------------------------------------------------------------------------------------------


def test_locators_stand_first_and_propose_for_their_own_fold(work):
    ensemble = load(work)
    assert [m.run.cfg.task for m in ensemble.members] == ["locate"] * 2 + ["classify"] * 3
    for member in ensemble.members[2:4]:
        assert member.locator in ensemble.members[:2]
        assert member.locator.run.cfg.fold == member.run.cfg.fold
    assert ensemble.members[4].locator is None


def test_a_classifier_keeps_the_locator_it_was_trained_with(work, tmp_path):
    shutil.copytree(work / "outputs", tmp_path / "outputs")
    settings = {"task": "locate", "max_localizer_crops": 0, "locator_width": 8, "model_name": "test_resnet"}
    write_run(tmp_path / "outputs", 30, [], **settings)
    ensemble = load(work, "--outputs", str(tmp_path / "outputs/*_seed*"))
    names = [member.run.folder.name for member in ensemble.members if member.run.cfg.task == "locate"]
    assert "locator_test_resnet_seed0_fold0" in names and len(names) == 3
    first = next(m for m in ensemble.members if m.run.cfg.proposals and m.run.cfg.fold == 0)
    assert first.locator.run.folder.name == "locator_test_efficientnet_seed0_fold0"


def test_members_without_their_locator_or_with_other_volumes_are_named(work, tmp_path, capsys):
    proposals = "outputs/locator_*_seed0_fold*"
    write_run(tmp_path / "outputs", 0, ["1.2"], fold=2, proposals=proposals, locator_scores=False)
    write_run(tmp_path / "outputs", 0, ["1.2"], fold=3, proposals=proposals)
    write_run(tmp_path / "outputs", 1, ["1.2"], seed=1, base_slices=6)
    (tmp_path / "outputs" / "test_efficientnet_seed0_fold2" / "last").mkdir()
    args = arguments(work, "--outputs", str(tmp_path / "outputs/*"))
    (member,) = infer.load_ensemble(args, torch.device("cpu"), common.volume_settings(BASE)).members
    said = capsys.readouterr().err
    assert member.run.cfg.fold == 2 and member.locator is None and "decoys instead of proposals" in said
    assert "seed0_fold2: still training; its best epoch so far is used" in said
    assert "seed0_fold3: their fold's locator, whose scores they take, is missing" in said
    assert "test_efficientnet_seed1_fold0: needs other volumes: base_slices 6 (cache: 8)" in said
    both = infer.load_ensemble(args, torch.device("cpu"), None)
    assert sorted(cfg.base_slices for cfg in both.configs) == [6, 8]
    with pytest.raises(ValueError, match="none of 0 folders"):
        infer.load_ensemble(arguments(work, "--outputs", "nothing/*"), torch.device("cpu"), None)


def test_one_reading_serves_differing_volumes(work):
    uid, files = next(iter(common.find_series(work / "dicoms" / "series")[0].items()))
    configs = [BASE, replace(BASE, base_slices=6, img_size=32)]
    volumes, *_ = infer.read_dicom((uid, files), configs)
    for volume, cfg in zip(volumes, configs, strict=True):
        alone = common.make_volume(common.read_series(files, uid), cfg)
        assert np.array_equal(volume.voxels, alone.voxels) and np.array_equal(volume.affine, alone.affine)


def test_the_mirrored_view_makes_predictions_equivariant(work):
    ensemble = load(work)
    member = ensemble.members[4]  # without crops, whose decoys do not move along
    voxels = np.random.default_rng(0).integers(0, 256, (8, 64, 64), dtype=np.uint8)
    volume = Volume(voxels, np.diag([4.0, 3.0, 3.0, 1.0]), [])
    mirrored = replace(volume, voxels=np.ascontiguousarray(voxels[..., ::-1]))
    plain = [infer.predict_series(ensemble, [member], "1", [v], False)[0] for v in (volume, mirrored)]
    both = [infer.predict_series(ensemble, [member], "1", [v], True)[0] for v in (volume, mirrored)]
    assert np.abs(plain[0] - plain[1][SWAP]).max() > 1e-3
    assert np.abs(both[0] - both[1][SWAP]).max() < 1e-6


def test_combine_by_hand():
    one, two = np.zeros((1, 14)), np.zeros((2, 14))
    two[0, 0], two[1, 1] = np.log(3), np.log(3)  # p 0.75: left in one view, right in the mirrored one
    probs = infer.combine([one, two], [1.0, 3.0], "probs")
    assert probs[0] == pytest.approx((0.5 + 3 * 0.75) / 4) and probs[1] == pytest.approx(0.5)
    logits = infer.combine([one, two], [1.0, 3.0], "logits")
    assert logits[0] == pytest.approx(1 / (1 + 3**-0.75)) and logits[1] == pytest.approx(0.5)


def test_a_member_that_is_not_finite_is_left_out_and_a_row_without_members_is_the_prior(work, capsys):
    ensemble = load(work)
    volume = Volume(np.zeros((8, 64, 64), np.uint8), np.eye(4), [])
    good = infer.predict_series(ensemble, ensemble.members[4:], "1", [volume], False)[0]
    with torch.no_grad():
        next(ensemble.members[0].run.model.parameters()).fill_(float("nan"))
    voters = [ensemble.members[0], ensemble.members[4]]
    assert np.array_equal(infer.predict_series(ensemble, voters, "1", [volume], False)[0], good)
    assert "logits not finite" in capsys.readouterr().err
    ensemble.members = voters[:1]
    answer, _ = infer.answer_one(ensemble, ("1", ([volume], 0, 0), None), (False, 1), arguments(work))
    assert answer.probs == ensemble.prior.tolist() and "no member" in answer.reason


# --- never stop, never late ---------------------------------------------------------------------------------


def simulate(hours: float, seed: int, hard_last: bool = False, num: int = 2500) -> tuple[float, list, float]:
    """Seconds at the end for num series of uneven cost, the plans, and the seconds that all of it takes."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 0.7, num)
    size = np.sort(size) if hard_last else size
    reads_s = size * (1 + 20 * (rng.random(num) < 0.01))  # one in a hundred stalls
    forwards_s = np.array([0.3, 1.2, 1.2, 1.2, 1.2, 1.2])
    budget, plans, clock, is_read = infer.Budget(hours * 3600, True, 6), [], 60.0, 60.0
    last = clock
    for i in range(num):
        plans.append(budget.plan(clock, num - i))
        tta, members = plans[-1]
        if not members:
            break
        is_read = max(is_read, last - 2) + reads_s[i]  # reading runs ahead of the models
        members_s = forwards_s[:members] * (1.7 if tta else 1.0) * rng.uniform(0.9, 1.1)
        clock = max(clock, is_read) + members_s.sum() + 0.05
        budget.observe(clock - last, reads_s[i], list(members_s), tta)
        last = clock
    whole_s = sum(max(read_s, 1.7 * forwards_s.sum()) for read_s in reads_s)
    return clock, plans, whole_s


def test_a_gpu_that_is_gone_stops_the_run_instead_of_giving_priors(work, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ensemble, args = load(work), arguments(work)
    monkeypatch.setattr(infer, "predict_series", broken)
    with pytest.raises(OSError, match=r"1\.2\.3: CUDA error: an illegal memory access"):
        infer.answer_one(ensemble, ("1.2.3", ([], 0.0, 0.0), None), (False, 5), args)


@pytest.mark.parametrize("hard_last", [False, True])
def test_2500_uneven_series_never_end_late_and_use_the_time(hard_last):
    for hours in (0.3, 1, 2, 3, 4, 5, 6, 7):
        clock, plans, whole_s = simulate(hours, seed=int(10 * hours), hard_last=hard_last)
        assert whole_s > hours * 3600  # all of it does not fit
        assert 0.9 * hours * 3600 < clock < hours * 3600
        if hours >= 2:
            assert plans[-1][1] > 0 or len(plans) > 2400
        if hours >= 5 and not hard_last:
            assert {members for _, members in plans} == {6}  # the mirrored view goes before members do


def test_nothing_is_cut_when_there_is_time():
    for hours, seed in ((8.5, 0), (9, 1), (12, 2)):
        clock, plans, whole_s = simulate(hours, seed)
        assert 0.6 < whole_s / (hours * 3600) < 0.97
        assert set(plans) == {(True, 6)} and clock < hours * 3600


def test_when_the_time_is_over_the_rest_is_the_prior_and_a_started_series_is_finished(work, capsys):
    args = arguments(work, "--budget-hours", "1")
    ensemble, source = load(work), infer.find_source(work / "cache")
    args.started = time.monotonic() - 3600 * 0.985  # over the 98 % after which no series starts
    answers = infer.answer_all(ensemble, source, sorted(source.series), args, lambda answer: None)
    assert [answer.reason for answer in answers] == ["no time left"] * 10
    assert "10 series get the prior" in capsys.readouterr().err
    args.started = time.monotonic() - 3600
    volume = Volume(np.zeros((8, 64, 64), np.uint8), np.eye(4), [])
    answer, members_s = infer.answer_one(ensemble, ("1", ([volume], 0, 0), None), (False, 5), args)
    assert answer.reason == "" and len(members_s) == 1  # no second member starts


def test_predict_answers_whatever_comes(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(infer, "SHARED", tmp_path / "shared")
    ensemble = infer.load_ensemble(arguments(work), torch.device("cpu"), None)
    prior = [ensemble.prior.tolist()]
    (tmp_path / "shared" / "1.2.3").mkdir(parents=True)
    (tmp_path / "shared" / "1.2.3" / "a.dcm").write_bytes(b"DICM" * 100)
    predict = infer.make_predict(ensemble, arguments(work, "--serve"))
    assert predict.__name__ == "predict"
    assert predict(str(tmp_path / "shared" / "1.2.3")).to_numpy().tolist() == prior
    assert (tmp_path / "shared").is_dir() and not list((tmp_path / "shared").iterdir())
    assert list(predict(None).columns) == list(LABELS)
    slow = infer.make_predict(ensemble, arguments(work, "--serve", "--series-timeout", "0.001"))
    folder = next((work / "dicoms" / "series").iterdir())
    assert slow(str(folder)).to_numpy().tolist() == prior
    over = infer.make_predict(ensemble, arguments(work, "--serve", "--budget-hours", "1e-9"))
    assert over(str(folder)).to_numpy().tolist() == prior
    said = capsys.readouterr().err
    assert "took longer than 0.001 s" in said and "no time left" in said


def test_without_kaggles_package_serve_says_so(work, capsys):
    assert infer.serve(arguments(work, "--serve")) == 1
    assert "kaggle_evaluation" in capsys.readouterr().err


def test_damaged_and_foreign_volumes_of_a_cache_cost_only_themselves(work, tmp_path):
    good = sorted((work / "cache").glob("*.safetensors"))[0]
    (tmp_path / good.name).write_bytes(good.read_bytes())
    (tmp_path / "1.2.safetensors").write_bytes(good.read_bytes()[:5000])
    other = common.volume_settings(replace(BASE, roi_mm=150.0))
    tensors = common.load_volume(good)[0]
    meta = {"settings": other, "affine": np.eye(4).tolist()}
    common.save_volume(tmp_path / "1.3.safetensors", tensors["volume"], np.zeros((0, 3)), np.zeros(0), meta)
    index = pd.DataFrame({UID: ["1.4", "1.5"], "status": ["failed", "ok"], "reason": ["no slices", ""]})
    index.to_csv(tmp_path / "index.csv", index=False)
    source = infer.find_source(tmp_path)
    assert "no slices" in source.failed["1.4"] and "gone" in source.failed["1.5"]
    uids = ["1.2", "1.3", good.stem]
    reasons = {uid: reason for uid, _, reason in infer.read_all(source, uids, [BASE], arguments(work))}
    assert reasons[good.stem] is None and "other settings" in reasons["1.3"] and "Error" in reasons["1.2"]


def test_a_partial_of_other_members_or_settings_is_refused(work, tmp_path):
    ensemble = load(work)
    path = tmp_path / "out.csv.partial"
    settings = infer.run_settings(ensemble, arguments(work))
    done, keep = infer.open_partial(path, settings)
    assert done == {}
    keep(infer.Answer("1.2", [0.5] * 14))
    assert list(infer.open_partial(path, settings)[0]) == ["1.2"]
    with pytest.raises(ValueError, match="begun with other tta"):
        infer.open_partial(path, infer.run_settings(ensemble, arguments(work, "--tta")))
    ensemble.members.pop()
    with pytest.raises(ValueError, match="begun with other members"):
        infer.open_partial(path, infer.run_settings(ensemble, arguments(work)))


def test_wrong_usage_ends_with_2(tmp_path, capsys):
    for wrong in (
        ["--workers", "0"],
        ["--budget-hours", "-1"],
        ["--labels", "none.csv"],
        ["--mean", "median"],
    ):
        with pytest.raises(SystemExit) as stopped:
            infer.parse_arguments(wrong)
        assert stopped.value.code == 2
    with pytest.raises(ValueError, match="expected DICOM files"):
        infer.find_source(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        infer.find_source(tmp_path / "nothing")


# --- explanations -------------------------------------------------------------------------------------------


class OneVoxel(torch.nn.Module):
    """The logit of `Aneurysm Present` is one voxel; the heat must be there."""

    def forward(self, images):
        return images[:, 5, 40, 10, None] * torch.ones(14)


def test_the_gradient_is_hottest_at_the_voxel_that_decides(work):
    volume = Volume(np.full((8, 64, 64), 128, np.uint8), np.diag([4.0, 3.0, 3.0, 1.0]), [])
    run_ = common.Run(Path(), OneVoxel(), BASE, {})
    heat = infer.gradient_map(run_, np.full((11, 64, 64), 128, np.uint8), volume, torch.device("cpu"))
    assert heat.shape == (8, 64, 64)
    assert np.unravel_index(heat.argmax(), heat.shape) == (5, 40, 10)


def test_a_locators_peak_is_the_hottest_place_in_millimetres(work, tmp_path):
    ensemble = load(work)
    locator = ensemble.members[0]
    assert locator.run.cfg.locator_stride == 8
    maps = np.full((13, 8, 8, 8), 0.01, np.float32)
    maps[4, 5, 2, 6] = 0.9
    affine = np.eye(4)
    affine[:3] = [[0, 0, 3, -90], [0, 3, 0, -80], [4, 0, 0, -20]]  # (z, y, x) -> LPS
    volume = Volume(np.zeros((8, 64, 64), np.uint8), affine, [])
    answer = infer.Answer("1.2", [0.5] * 14)
    seen = {locator.name: (None, None, maps)}
    hottest = infer.explain(ensemble, [locator], answer, [volume], seen, tmp_path)
    place = [hottest[name] for name in ("z", "y", "x", "x_mm", "y_mm", "z_mm")]
    assert place == [5, 19.5, 51.5, 51.5 * 3 - 90, 19.5 * 3 - 80, 0]  # cell centres are at 8 i + 3.5
    assert (tmp_path / "1.2.png").is_file()


def test_wilson_interval_by_hand():
    assert infer.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert infer.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
