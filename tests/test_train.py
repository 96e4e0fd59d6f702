"""train.py: the batch, the schedule, honest validation, and runs that end the same whatever happens."""

import contextlib
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from unittest.mock import Mock

import numpy as np
import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY, change, expect_refusal, flip_bit, random_table, write_cache, write_cached_series
from pytest import MonkeyPatch, approx, fixture, mark, raises
from safetensors.torch import load_file

import common
import train
from common import AP, LABELS, UID, Config, SeriesDataset, load_run, volume_path
from train import load_table, make_folds, refuse_leak

ROOT = Path(__file__).parents[1]
QUICK = change(TINY, epochs=4, batch_size=4, num_folds=4, precision="no", workers=0, bootstrap=50, lr=1e-3)
NAME = "test_efficientnet_seed0_fold0"
TRAIN = str(ROOT / "train.py")
NO_NORM = {"model_name": "test_vit", "ema_decay": 0.9, "clip_grad": 0.0}  # no BatchNorm
NORM = {"batch_size": 3, "tag": "norm"}
NEUTRAL = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0] + [1.0] * 8  # augmentation that changes nothing
MOVES = [{}, {0: 1}, {1: 30}, {2: 1.2}, {3: 15, 4: -10}, {0: 1, 1: -20, 2: 0.9, 3: 9}]
SPREADS = {"NEARLY THE SAME FOR ALL": 0.02, "kept epoch 1,": 0.2, "are NaN or infinite": math.nan}
CLOCKS = ["seconds", "data_wait"]  # columns of log.csv that no two runs share
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NO_DECOYS = np.zeros((0, 3))
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@fixture(scope="module")
def quick(tmp_path_factory) -> Config:
    """A quick recipe with a cache of 32 series."""
    return write_cache(tmp_path_factory.mktemp("cache"), random_table(32), QUICK)


def arguments(folder: Path, cfg: Config, *options: str) -> list[str]:
    """Options of a run below folder/outputs."""
    path = folder / f"{cfg.run_name}.yaml"
    path.write_text(yaml.safe_dump(common.config_to_dict(change(cfg, outputs=str(folder / "outputs")))))
    return ["--config", str(path), *options]


def run(folder: Path, cfg: Config, *options: str, code: int = 0) -> str:
    """stderr of train.py's main in this process."""
    errors = io.StringIO()
    torch.set_num_threads(1)  # sums have other last bits with more; the processes started here have one too
    with MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors), raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["train.py", *arguments(folder, cfg, *options)])
        AcceleratorState._reset_state(reset_partial_state=True)
        sys.exit(train.main())
    assert ended.value.code == code, errors.getvalue()
    return errors.getvalue()


def start(folder: Path, *command: str) -> subprocess.Popen:
    """A script as a user starts it, with TORCHRUN before it on two CPU processes."""
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> Path:
    """The run folder below folder/outputs, once an epoch is saved."""
    while not list(folder.glob("outputs/*/last/*.pt")) and process.poll() is None:
        time.sleep(0.02)
    (run_folder,) = folder.glob("outputs/*")
    return run_folder


def list_children(process: subprocess.Popen) -> list[int]:
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text()) | {"seconds": None}


def outcome(folder: Path) -> dict:
    """Weights, predictions, metrics and epochs of a run, to the last bit."""
    last, log = train.load_last(folder), pd.read_csv(folder / "log.csv").drop(columns=CLOCKS)
    states = (last["model"], last["ema"], load_file(folder / common.CHECKPOINT))
    weights = [{name: value.numpy().tobytes() for name, value in state.items()} for state in states]
    texts = {"log": log.to_csv(), "oof": (folder / "oof.csv").read_text()}
    return {"weights": weights} | texts | read_metrics(folder)


def test_folds_keep_patients_together_and_spread_what_is_rare_whatever_the_rows_order_and_the_names():
    table = random_table(600)  # two series of every third patient
    folds = make_folds(table, 5, seed=0)
    assert folds.groupby(table["patient"]).nunique().max() == 1
    assert not make_folds(table, 5, seed=1).equals(folds)
    renamed = table.assign(patient=table["patient"].str[::-1]).sample(frac=1, random_state=1)
    assert make_folds(renamed, 5, seed=0).sort_index().equals(folds)
    folds = make_folds(table.assign(patient=table[UID]), 5, seed=0)
    counts = table[list(LABELS)].join(pd.get_dummies(table["Modality"])).groupby(folds).sum()
    spread = (counts.max() - counts.min()).to_numpy()
    assert spread[:13].max() <= 2  # two locations a series at most
    assert spread[AP] <= 3 and spread[14:].max() <= 6


def test_series_in_doubt_are_counted_and_left_out_and_all_faults_reported_at_once(tmp_path, capsys):
    table = random_table(20)
    cfg = write_cache(tmp_path, table, QUICK)
    write_cached_series(tmp_path, "1.2.14", cfg, [], seed=13)  # the noise of 1.2.13, whose patient has 1.2.12
    index = pd.read_csv(tmp_path / "index.csv", dtype=str)
    index.loc[[1, 2], "status"], index.loc[3, "status"], index.loc[4, "patient"] = "doubtful", "failed", ""
    index.drop(index=[5, 6, 7]).to_csv(tmp_path / "index.csv", index=False)
    patients = load_table(cfg).set_index(UID)["patient"]
    assert set(patients.index) == set(table[UID].drop([1, 2, 3, 5, 6, 7])) and patients["1.2.4"] == "1.2.4"
    counts = "{'not in the cache': 3, 'doubtful': 2, 'failed': 1}"
    assert f"14 series; left out, with their number: {counts}" in capsys.readouterr().err
    assert len(load_table(change(cfg, use_doubtful=True))) == 16 and len(load_table(cfg, limit=8)) == 8
    paths = [volume_path(tmp_path, uid) for uid in table[UID]]
    paths[15].unlink()
    write_cached_series(tmp_path, "1.2.16", change(QUICK, roi_mm=150.0), [], seed=6)
    paths[17].write_bytes(paths[18].read_bytes())  # the same images twice
    paths[19].write_bytes(b"cut short")
    text = expect_refusal(f"4 faults: {paths[15]}: no such volume", load_table, cfg)
    assert f"{paths[16]}: made with roi_mm 150.0 (expected 160.0); use preprocess.py --config" in text
    assert "1.2.17 and 1.2.18 share a (0008,0018) SOPInstanceUID" in text
    assert f"{paths[19]}: not a readable" in text and patients["1.2.12"] == patients["1.2.14"]
    table.drop(columns="Modality").to_csv(tmp_path / "train.csv", index=False)
    expect_refusal(r"train\.csv: columns missing: 'Modality'", load_table, cfg)


def augment(image: torch.Tensor, place: list, changes: dict[int, float]) -> tuple:
    """The image (C, H, W), labels 2, 6 and 13, and a point at (label, z, y, x), with changed values."""
    points = torch.full((1, 8, 4), -1.0)
    points[0, 0] = torch.tensor(place)
    labels = torch.zeros(1, 14)
    labels[0, [2, 6, 13]] = 1
    values = torch.tensor([NEUTRAL])
    values[0, [*changes]] = torch.Tensor([*changes.values()])
    batch = {"image": image[None], "labels": labels, "points": points, "augment": values}
    return train.augment(batch, TINY)


def test_flip_gain_and_offset_reach_slabs_and_crops_and_dropout_its_slab():
    image = torch.randint(0, 128, (11, 32, 32), dtype=torch.uint8)
    images, labels, points = augment(image, [2.0, 3.0, 10.0, 12.0], {0: 1, 5: 1.2, 6: 0.1, 14: 0.0})
    image[7] = 0  # the last of 8 slabs
    assert torch.allclose(images[0], image.flip(-1) / 255 * 1.2 + 0.1, atol=1e-5)
    assert labels[0].nonzero().flatten().tolist() == [3, 6, 13] and (points[:, 1:, 0] == -1).all()
    assert points[0, 0].tolist() == approx([3, 3, 10, 19], abs=1e-4)


@mark.parametrize("changes", MOVES)
def test_points_go_where_augmentation_takes_their_place(changes):
    image = torch.zeros(8, 32, 32, dtype=torch.uint8)
    image[3, 11:14, 19:22] = 250  # a spot around z 3, y 12, x 20
    images, _, points = augment(image, [4.0, 3.0, 12.0, 20.0], changes)
    centre = (images[0].numpy() * np.indices((8, 32, 32))).sum(axis=(1, 2, 3)) / images.sum().item()
    assert images.sum() > 5 and centre == approx(points[0, 0, 1:].numpy(), abs=0.1)


def test_label_targets_are_1_and_99_hundredths_and_map_targets_1_at_the_point_falling_off_in_millimetres():
    logits = torch.tensor([[0.99, 0.01]]).logit()
    least = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))
    assert train.label_loss(logits, torch.tensor([[1.0, 0.0]]), 0.02).item() == approx(least, abs=1e-6)
    points = torch.full((1, 8, 4), -1.0)
    points[0, 0] = torch.tensor([5.0, 2.0, 11.5, 19.5])  # the centre of cell (2, 1, 2) at stride 8
    spacing = torch.tensor([[4.0, 1.0, 1.0]])
    cfg = change(TINY, locator_stride=8, heatmap_sigma_mm=4.0)
    targets = train.map_targets(points, (1, 13, 8, 4, 4), spacing, cfg)
    assert (targets == 1).nonzero().tolist() == [[0, 5, 2, 1, 2]] and targets[0, 4].sum() == 0
    assert targets[0, 5, [1, 3], 1, 2].tolist() == approx([math.exp(-0.5)] * 2)
    assert targets[0, 5, 2, 1, 3].item() == approx(math.exp(-0.5 * 4))


def test_rate_warms_up_then_falls_as_a_half_cosine():
    cfg = change(TINY, lr=1.0, min_lr=0.1, epochs=11, warmup_epochs=1)
    rates = [train.learning_rate(update, 10, cfg) for update in range(110)]
    assert rates[0] == approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == approx((1 + 0.1) / 2) and rates[-1] == approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@mark.parametrize("task", ["classify", "locate"])
def test_fp16_skips_steps_that_overflow_and_rate_and_ema_wait(quick, tmp_path, task):
    """Autocast and the scaler of fp16, which Accelerate leaves out on the CPU."""
    cfg = change(quick, task=task, warmup_epochs=0)
    accelerator, options = Accelerator(cpu=True), Namespace(resume=True)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    state = train.begin(tmp_path, cfg, accelerator, {}, options)
    state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)
    types = set()
    layer = next(m for m in state.raw.modules() if isinstance(m, torch.nn.Conv2d))
    layer.register_forward_hook(lambda *args: types.add(args[-1].dtype))
    dataset = SeriesDataset(cfg, load_table(cfg)[:8], "train", NO_DECOYS)
    after = [*state.raw.parameters(), *state.ema.module.parameters()]
    before = [p.clone() for p in after]
    train.train_epoch(cfg, accelerator, state, dataset)
    assert state.progress.updates == 0 and all(map(torch.equal, before, after))
    assert accelerator.scaler.get_scale() == 2.0**58  # halved at each of two updates
    accelerator.scaler.update(new_scale=64.0)
    train.train_epoch(cfg, accelerator, state, dataset)
    assert state.progress.updates == 2 and not any(map(torch.equal, before[:3], after[:3]))
    assert all(torch.isfinite(p).all() for p in after) and types == {torch.float16}
    (tmp_path / "last").mkdir()
    train.save_last(tmp_path, state)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    resumed = train.begin(tmp_path, cfg, accelerator, {}, options)
    assert accelerator.scaler.get_scale() == 64.0 and resumed.progress.updates == 2


def test_a_loader_that_dies_or_a_volume_cut_short_is_named(tmp_path):
    cfg = write_cache(tmp_path, random_table(6), QUICK)

    class Killed(SeriesDataset):
        def __getitem__(self, index: int) -> dict:
            return super().__getitem__(index) if index != 3 else os.kill(os.getpid(), SIGKILL)

    path = volume_path(tmp_path, "1.2.3")
    cases = [(Killed, 2, "^DataLoader worker .* exited unexpectedly")]
    cases += [(SeriesDataset, workers, f"{path}: not a readable volume") for workers in (0, 1)]
    for kind, workers, complaint in cases:
        dataset = kind(change(cfg, workers=workers), random_table(6), "train", NO_DECOYS)
        batches = train.load_batches(dataset, [[0, 1], [2, 3], [4]], torch.device("cpu"))
        assert "\n" not in expect_refusal(f"{complaint}.* series 1.2.2, 1.2.3 were", list, batches)
        path.write_bytes(path.read_bytes()[:-100])


@mark.parametrize("megabytes, workers", [(64, 2), (5, 0), (4000, 4)])
def test_no_more_loaders_than_dev_shm_has_room_for(megabytes, workers, monkeypatch, capsys):
    """A batch of the default recipe has 2 x 35 x 384 x 384 bytes, 9.8 MB: 6 of them fit into 64 MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=megabytes * 2**20))
    assert train.fit_workers(Config()).workers == workers
    assert ("/dev/shm has room" in capsys.readouterr().err) == (workers < 4)


def test_sensitivity_has_its_threshold_and_from_5_positives_an_interval():
    scores, allowed, negatives = [0.95, 0.9, 0.85, 0.2, 0.1], {0.9: 1.0, 0.95: 0.5}, np.arange(10) / 10
    (ninety, ninety_five), (fewer, _), (none, _) = (
        train.measure_sensitivity("specificity", allowed, scores[:num], range(num), negatives, 200)
        for num in (5, 4, 0)
    )
    # 1 of 10 negatives may pass: the threshold is the second highest, 0.8; of 5 % none may
    assert 0 <= ninety.pop("low") < 3 / 5 < ninety.pop("high") <= 1
    expected = {"specificity": 0.9, "threshold": 0.8, "sensitivity": 3 / 5, "positives": 5, "draws_used": 200}
    assert ninety == expected and ninety_five["threshold"] == 0.9 and ninety_five["sensitivity"] == 1 / 5
    expected |= {"sensitivity": 3 / 4, "positives": 4, "draws_used": 0, "low": math.nan, "high": math.nan}
    assert fewer == approx(expected, nan_ok=True)
    assert none["threshold"] == 0.8 and math.isnan(none["sensitivity"])


def test_weights_of_a_run_that_trained_on_validation_series_are_refused(undisturbed, quick):
    table, cfg = load_table(quick), change(quick, pretrained=str(undisturbed))
    refuse_leak(cfg, table)  # the same fold
    refuse_leak(cfg, table.assign(**{UID: "9"}))  # other data
    num = (table["fold"] == 1).sum()
    complaint = f"trained on {num} series that validate; take its fold"
    expect_refusal(complaint, refuse_leak, change(cfg, fold=1), table)


def test_froc_counts_points_found_and_places_far_from_all_points():
    points_mm = [np.array([[100.0, 60, 8]])] * 2 + [np.zeros((0, 3))] * 2
    table = pd.DataFrame({UID: list("0123"), "patient": list("abcd"), "points_mm": points_mm})
    rows = [["0", 95, 60, 8, 0.9, 4], ["0", 0, 0, 0, 0.3, 4], ["1", 100, 69, 8, 0.35, 1]]
    rows += [["2", 0, 0, 0, 0.7, 2], ["3", 100, 60, 8, 0.4, 2]]
    peaks = pd.DataFrame(rows, columns=train.PROPOSAL_COLUMNS)
    metrics = train.score_proposals(table, peaks, draws=50)
    assert metrics["recall_10mm"][0] == 1.0
    # false places score 0.7, 0.4, 0.3 in 4 scans; one may pass at 0.25 a scan, so the threshold is 0.4
    froc = [(p["false_per_scan"], p["threshold"], p["sensitivity"]) for p in metrics["froc"]]
    expected = [(0.25, 0.4, 0.5), (0.5, 0.3, 1.0), (1.0, 0.0, 1.0), (2.0, 0.0, 1.0)]
    assert np.array(froc) == approx(np.array(expected), abs=2e-6)  # scores are float32


@fixture(scope="module")
def undisturbed(quick, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, quick)
    return folder / "outputs" / NAME


def test_a_run_leaves_what_users_expect_and_predicts_without_annotated_points(undisturbed, quick, tmp_path):
    names = {"best_ema.safetensors", "metrics.json", "config.yaml", "oof.csv", "log.csv", "last", ".lock"}
    assert {path.name for path in undisturbed.iterdir()} == names
    metrics, loaded = read_metrics(undisturbed), load_run(undisturbed)
    meta = loaded.meta
    log, oof = pd.read_csv(undisturbed / "log.csv"), pd.read_csv(undisturbed / "oof.csv", dtype={UID: str})
    table = load_table(quick)
    val_table, train_table = table[table["fold"] == 0], table[table["fold"] != 0]
    assert oof[UID].tolist() == meta["val_uids"] == val_table[UID].tolist() and 0 < len(oof) < 32
    assert not set(train_table["patient"]) & set(oof["patient"])
    truth, probs = val_table[list(LABELS)].to_numpy(float), oof[list(LABELS)].to_numpy()
    assert metrics["wauc"] == approx(common.weighted_auc(truth, probs)["wauc"])
    assert metrics["low"] is None and metrics["draws_used"] <= 5  # of 50: no interval
    assert log["epoch"].tolist() == [1, 2, 3, 4] and log["wauc"].max() == metrics["wauc"] == meta["wauc"]
    assert log["epoch"][log["wauc"].argmax()] == metrics["best_epoch"] == meta["epoch"]
    assert (probs[truth[:, AP] == 0, AP] <= meta["operating_points"][0]["threshold"]).mean() >= 0.9
    assert meta["prior"] == approx(train_table[list(LABELS)].mean().tolist(), abs=1e-6)
    cfg = write_cache(tmp_path, random_table(32), loaded.cfg, with_points=False)
    table = load_table(cfg)
    dataset = SeriesDataset(cfg, table[table["fold"] == 0], "deploy", np.array(meta["decoys"]))
    logits, _ = train.predict(loaded.model, dataset, Accelerator(cpu=True))
    assert 1 / (1 + np.exp(-logits)) == approx(probs, abs=1e-6) and logits.std() > 0


def test_a_killed_run_resumes_to_the_same_bits(undisturbed, quick, tmp_path, monkeypatch):
    """Its loader, stopped with it and alive, holds no lock."""
    cfg = change(quick, workers=1)
    process = start(tmp_path, TRAIN, *arguments(tmp_path, cfg))
    folder, loaders = wait_for_checkpoint(tmp_path, process), []
    while not loaders and process.poll() is None:  # each epoch starts one
        os.kill(process.pid, SIGCONT)
        time.sleep(0.01)
        os.killpg(process.pid, SIGSTOP)
        loaders = list_children(process)
    assert "another run is writing here" in run(tmp_path, cfg, "--resume", code=1)
    os.kill(process.pid, SIGKILL)  # not its loader
    process.wait()
    assert loaders and all(map(common.is_running, loaders)) and not (folder / "metrics.json").exists()
    train.claim_folder(folder, cfg)
    os.killpg(process.pid, SIGKILL)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # it changes nothing
    assert "resumed after epoch" in run(tmp_path, change(cfg, workers=0), "--resume")
    assert outcome(folder) == outcome(undisturbed)


@mark.parametrize("number, code", [(SIGTERM, 143), (SIGINT, 130)])
def test_a_stopped_run_ends_with_one_line_and_the_code_of_its_signal(number, code, quick, tmp_path):
    """The signal goes to the process group, as a scheduler or a terminal sends it: also to the loader."""
    process = start(tmp_path, TRAIN, *arguments(tmp_path, change(quick, workers=1, epochs=1000)))
    folder = wait_for_checkpoint(tmp_path, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    assert err.endswith(f"\ntrain.py: stopped by {number.name}; --resume goes on after the last epoch\n")
    assert not (folder / "metrics.json").exists() and not list(folder.glob("**/*.tmp"))


def test_damaged_checkpoints_are_skipped_and_used_folders_refused(undisturbed, quick, tmp_path, monkeypatch):
    folder = shutil.copytree(undisturbed, tmp_path / "outputs" / NAME)
    newest = folder / "last" / "0004.pt"
    data = newest.read_bytes()
    for place in (0, None, -40, -1):
        newest.write_bytes(data)
        flip_bit(newest, place)
        assert train.load_last(folder)["progress"]["epoch"] == 3, place
    assert "differs from its sum; falling back" in run(tmp_path, quick, "--resume")
    assert outcome(folder) == outcome(undisturbed)
    assert "holds a run; --resume goes on with it, another tag, seed or fold" in run(tmp_path, quick, code=1)
    relabelled = write_cache(tmp_path / "relabelled", random_table(32, seed=1), quick)
    assert "cannot resume with series and labels" in run(tmp_path, relabelled, "--resume", code=1)
    assert "batch_size 2 (expected 4)" in run(tmp_path, change(quick, batch_size=2), "--resume", code=1)
    assert outcome(folder) == outcome(undisturbed)
    run(tmp_path, quick, "--resume")  # of a finished run: the same again
    assert outcome(folder) == outcome(undisturbed)
    monkeypatch.setattr(train.fcntl, "lockf", Mock(side_effect=OSError(38, "Function not implemented")))
    assert "not locked (Function not implemented)" in run(tmp_path, quick, "--resume")


@fixture(scope="module")
def pair(quick, tmp_path_factory) -> Path:
    """The folder of what one pair of processes trained: runs tagged `half` and `norm`, every config (with
    test_efficientnet for maxvit_base_tf_384; fold0 to 4 are base.yaml), and a classifier with proposals."""
    folder = tmp_path_factory.mktemp("pair")
    small = dict(num_folds=2, batch_size=2, accumulation=1, epochs=1, bootstrap=20, workers=0, precision="no")
    small |= dict(volume=replace(TINY.volume, img_size=64), cache=str(folder / "cache"), pretrained=False)
    write_cache(folder / "cache", random_table(16), replace(TINY, **small))
    runs = [change(quick, **NO_NORM, batch_size=1, accumulation=2, tag="half"), change(quick, **NORM)]
    for path in sorted(ROOT.glob("configs/**/[!f]*.yaml")):
        cfg = common.load_config(path)
        name = TINY.model_name if cfg.model_name.startswith("maxvit_base") else cfg.model_name
        runs.append(replace(cfg, **small, model_name=name, tag=path.stem))
    runs.append(replace(runs[-1], fold=1))
    runs.append(replace(TINY, **small, proposals=f"{folder}/outputs/{runs[-1].run_name[:-1]}*"))
    commands = [["train.py", *arguments(folder, cfg)] for cfg in runs]
    (folder / "all.py").write_text(f"""import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train
train.Accelerator.end_training = lambda _: None  # keep the pair
for sys.argv in {commands!r}:
    assert train.main() == 0, sys.argv
    train.PartialState().wait_for_everyone()
if os.environ["RANK"] == "1":
    train.load_table = lambda *_: open("a file that rank 1 lacks")
sys.argv.append("--resume")
train.main()""")
    _, errors = start(folder, *TORCHRUN, "all.py").communicate(timeout=400)
    assert "batch 2 x 2 processes x accumulation 1 = 4 series per update, lr 0.002" in errors
    assert errors.count("train.py: ") == errors.count("'a file that rank 1 lacks'\n") == 1, errors
    metrics = [read_metrics(path.parent) for path in folder.glob("outputs/*/metrics.json")]
    assert len(metrics) == len(runs) >= 8 and all(m["num_processes"] == 2 for m in metrics)
    return folder / "outputs"


def test_two_processes_and_accumulated_batches_follow_one_large_batch(pair, quick, tmp_path):
    """The last update of 4 of the 23 series has 3: in its second step one process has nothing to do."""
    run(tmp_path, change(quick, **NO_NORM))
    paths = (pair / "test_vit_half_seed0_fold0", tmp_path / "outputs/test_vit_seed0_fold0")
    ours, theirs = (pd.read_csv(path / "log.csv") for path in paths)
    assert ours["lr"].tolist() == theirs["lr"].tolist()
    for name in ("train_loss", "val_loss"):
        assert ours[name].to_numpy() == approx(theirs[name].to_numpy(), abs=1e-4)


def test_two_processes_with_batchnorm_resume_to_the_same_bits_after_a_kill(pair, quick, tmp_path):
    cfg = change(quick, **NORM)
    command = [TRAIN, *arguments(tmp_path, cfg, "--resume")]
    process = start(tmp_path, *TORCHRUN, *command)
    killed, children = wait_for_checkpoint(tmp_path, process), list_children(process)
    for pid in (process.pid, *children):  # ranks live on without their launcher
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
    process.communicate()
    assert len(children) >= 2 and not (killed / "metrics.json").exists()
    _, errors = start(tmp_path, *TORCHRUN, *command).communicate(timeout=300)
    assert "resumed after epoch" in errors and outcome(killed) == outcome(pair / killed.name)


def test_a_locator_writes_proposals_and_a_classifier_of_other_volumes_uses_them(pair, tmp_path):
    name = "locator_tf_efficientnet_lite0_locator_small_seed0_fold"
    for fold in "01":
        folder = shutil.copytree(pair / f"{name}{fold}", tmp_path / f"outputs/{name}{fold}")
    rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
    assert rows[UID].unique().tolist() == load_run(folder).meta["val_uids"]
    assert rows.groupby(UID).size().max() == 3 and len(read_metrics(folder)["froc"]) == 4
    cfg = change(QUICK, proposals=f"{tmp_path}/outputs/locator_*_seed0_fold*", num_folds=2, fold=1, epochs=1)
    cfg = write_cache(tmp_path / "cache", random_table(16), change(cfg, batch_size=3))
    run(tmp_path, cfg)
    assert load_run(tmp_path / "outputs" / f"{NAME[:-1]}1").meta["locator"] == folder.name
    places, _ = train.load_proposals(cfg, load_table(cfg))
    assert len(places) == 16
    for uid, peaks in rows.groupby(UID):
        assert np.array_equal(places[uid], peaks[["x_mm", "y_mm", "z_mm"]])
    other = change(cfg, seed=1)
    shutil.copytree(folder, folder.with_name("locator_twin_seed1_fold1"))
    complaint = "0 series have none, fold 1 has those of {}, {}; expected one finished locator"
    both, folds = change(other, proposals=str(tmp_path / "outputs/locator_*")), change(other, num_folds=3)
    assert complaint.format(folder.name, "locator_twin_seed1_fold1") in run(tmp_path, both, code=1)
    assert complaint.format(f"{name}0", f"{name}1") in run(tmp_path, folds, code=1)
    (folder / "metrics.json").unlink()  # not finished
    complaint = f"{rows[UID].nunique()} series have none, fold 1 has those of none; expected one"
    assert complaint in run(tmp_path, other, code=1)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_located(quick, tmp_path):
    wild = change(quick, lr=1e3, clip_grad=0.0, warmup_epochs=0.0, label_smoothing=0.0, weight_decay=1e8)
    err = run(tmp_path, wild, code=1)
    assert "loss is" in err and "epoch 1, update" in err and "series 1.2." in err


@mark.parametrize("last_line, spread", SPREADS.items())
def test_predictions_nearly_the_same_or_not_finite_are_named(quick, tmp_path, monkeypatch, last_line, spread):
    """Around probability 0.5 a logit counts a quarter: 90 % of these lie within 0.01 and 0.1."""
    logits = np.linspace(-spread, spread, 9, dtype=np.float32)[:, None].repeat(14, axis=1)
    monkeypatch.setattr(train, "train_epoch", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(train, "predict", lambda *_: (logits, ()))
    err = run(tmp_path, change(quick, epochs=1), code=math.isnan(spread))
    assert last_line in err.splitlines()[-1]
    for path in tmp_path.glob("outputs/*/metrics.json"):
        assert read_metrics(path.parent)["is_nearly_constant"] == (spread == 0.02)


def test_patience_ends_a_run_that_does_not_get_better(quick, tmp_path):
    run(tmp_path, change(quick, lr=1e-9, epochs=9, patience=1))
    metrics = read_metrics(tmp_path / "outputs" / NAME)
    assert metrics["epochs"] == metrics["best_epoch"] + 1 < 9
    run(tmp_path, change(quick, lr=1e-9, epochs=2, keep="last", tag="last"))  # as good as the first
    assert read_metrics(next(tmp_path.glob("outputs/*_last_*")))["best_epoch"] == 2


def test_a_lack_of_memory_names_the_settings_to_lower_and_a_full_disk_the_file(quick, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(train, "make_accelerator", Mock(side_effect=error))
    (line,) = run(tmp_path, QUICK, code=1).strip().splitlines()
    assert all(name in line for name in ("batch_size", "accumulation", "grad_checkpointing", "img_size"))
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        err = run(tmp_path, quick, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert err.strip().splitlines()[-1].endswith("best_ema.safetensors'") and "File too large" in err


MISTAKES = {
    "lrr=1": "the nearest is 'lr'",
    "cache=nowhere": "nowhere/train.csv: no such file; expected the labels in the cache",
    "pretrained=gone.safetensors": "gone.safetensors: no such file",
    "num_folds=100": "21 patients with labels and a volume for 100 folds; lower num_folds",
}


@mark.parametrize("setting", MISTAKES)
def test_a_users_mistake_is_one_line_and_leaves_no_folder(quick, tmp_path, setting):
    (line,) = run(tmp_path, quick, "--set", setting, code=1).strip().splitlines()
    assert MISTAKES[setting] in line and not (tmp_path / "outputs").exists()


def test_a_locator_without_annotated_points_is_refused_and_print_config_prints_the_resolved_settings(
    tmp_path, capsys
):
    cfg = write_cache(tmp_path, random_table(32), change(QUICK, epochs=1), with_points=False)
    (line,) = run(tmp_path, change(cfg, task="locate"), code=1).splitlines()
    assert "no annotated point in 23 training series" in line and "put train_localizers.csv beside" in line
    assert "23 series with 0 annotated points train, 9 validate" in run(tmp_path, cfg)
    run(tmp_path, QUICK, "--set", "lr=0.5", "--print-config")
    printed = common.config_from_dict(yaml.safe_load(capsys.readouterr().out))
    assert printed == change(QUICK, lr=0.5, outputs=str(tmp_path / "outputs"))


def test_the_bench_of_the_loop_still_fits_it():
    options = ["--model", "test_vit", "--img-size", "160", "--series", "4", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "train", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "ours: CPU; waited for data" in done.stdout, done.stderr
