"""train.py: the batch, the schedule, honest validation, and runs that end the same whatever happens on the
way."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY, random_table, write_cache
from safetensors.torch import load_file

import common
import train
from common import LABELS, UID

ROOT = Path(__file__).parents[1]
QUICK = replace(TINY, epochs=8, batch_size=4, num_folds=4, precision="no", workers=0, bootstrap=50, lr=1e-3)


def write_config(folder: Path, cfg: common.Config) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(cfg)))))
    return path


def start(folder: Path, cfg: common.Config, *options: str, processes: int = 1) -> subprocess.Popen:
    """train.py as a user starts it (torchrun for two CPU processes), in a folder of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    command = [*launcher, str(ROOT / "train.py"), "--config", str(write_config(folder, cfg)), *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, cfg: common.Config, *options: str, processes: int = 1, code: int = 0) -> str:
    process = start(folder, cfg, *options, processes=processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out == ""
    return err


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, random_table(40), QUICK)
    return folder


# --- the batch ----------------------------------------------------------------------------------------------


def random_batch(num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.full((num, 8, 4), -1.0)
    points[:, 0] = torch.tensor([2.0, 3.0, 10.0, 12.0])
    points[:, 1] = torch.tensor([6.0, 1.0, 4.0, 31.0])
    labels = torch.zeros(num, 14)
    labels[:, [2, 6, 13]] = 1
    return torch.rand(num, 11, 32, 32, generator=generator), labels, points


def test_flip_is_an_involution_on_image_labels_and_points():
    images, labels, points = random_batch()
    flip = torch.tensor([True, False, True])
    once = train.flip_samples(images, labels, points, flip)
    assert once[1][0].nonzero().flatten().tolist() == [3, 6, 13] and torch.equal(once[1][1], labels[1])
    assert once[2][0, 0].tolist() == [3, 3, 10, 19] and once[2][0, 1].tolist() == [6, 1, 4, 0]
    assert (once[2][:, 2:, 0] == -1).all()
    assert torch.equal(once[0][0], images[0].flip(-1)) and torch.equal(once[0][1], images[1])
    for before, after in zip(
        (images, labels, points[..., :1]), (once[0], once[1], once[2][..., :1]), strict=True
    ):
        assert not torch.equal(before, after)
    twice = train.flip_samples(*once, flip)
    valid = points[..., 0] >= 0
    assert torch.equal(twice[0], images) and torch.equal(twice[1], labels)
    assert torch.equal(twice[2][valid], points[valid]) and torch.equal(twice[2][..., 0], points[..., 0])


@pytest.mark.parametrize(
    "changes",
    [{}, {0: 1.0}, {1: 30.0}, {2: 1.2}, {3: 15.0, 4: -10.0}, {7: 1.0}, {0: 1, 1: -20, 2: 0.9, 3: 9, 7: -1}],
)
def test_points_go_where_augmentation_takes_their_place(changes):
    cfg = replace(TINY, max_localizer_crops=0)
    image = torch.zeros(1, 8, 32, 32, dtype=torch.uint8)
    image[0, 3, 11:14, 19:22] = 250  # a spot around z 3, y 12, x 20
    points = torch.full((1, 8, 4), -1.0)
    points[0, 0] = torch.tensor([4.0, 3.0, 12.0, 20.0])
    values = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0] + [1.0] * 8])
    for index, value in changes.items():
        values[0, index] = value
    batch = {"image": image, "labels": torch.zeros(1, 14), "points": points, "augment": values}
    images, _, moved = train.augment(batch, cfg)
    weight = images[0] / images.sum()
    axes = torch.meshgrid(torch.arange(8.0), torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centre = [float((weight * axis).sum()) for axis in axes]
    assert images.sum() > 5
    assert centre == pytest.approx(moved[0, 0, 1:].tolist(), abs=0.1)


def test_augmentation_of_nothing_is_the_image_itself():
    batch = {"image": torch.randint(0, 256, (2, 11, 32, 32), dtype=torch.uint8)}
    neutral = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0] + [1.0] * 8).repeat(2, 1)
    _, labels, points = random_batch(2)
    images, _, same = train.augment(batch | {"labels": labels, "points": points, "augment": neutral}, TINY)
    assert torch.allclose(images, batch["image"] / 255, atol=1e-5) and torch.allclose(same, points, atol=1e-4)


def test_intensity_and_slab_dropout_reach_the_slabs_they_name():
    batch = {"image": torch.full((1, 11, 32, 32), 100, dtype=torch.uint8)}
    values = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 1.2, 0.1, 0.0] + [1.0] * 7 + [0.0]])
    _, labels, points = random_batch(1)
    images, _, _ = train.augment(batch | {"labels": labels, "points": points, "augment": values}, TINY)
    assert images[0, :7].numpy() == pytest.approx(100 / 255 * 1.2 + 0.1, abs=1e-5)
    assert images[0, 7].numpy() == pytest.approx(0.1) and images[0, 8].numpy() == pytest.approx(
        100 / 255 * 1.2 + 0.1
    )


def test_smoothed_targets_are_one_and_99_hundredths():
    logits = torch.tensor([[math.log(0.99 / 0.01), math.log(0.01 / 0.99)]])
    entropy = -(0.99 * math.log(0.99) + 0.01 * math.log(0.01))  # the least possible loss
    assert train.label_loss(logits, torch.tensor([[1.0, 0.0]]), 0.02).item() == pytest.approx(
        entropy, abs=1e-6
    )


def test_map_targets_are_one_at_the_points_cell_and_fall_off_in_millimetres():
    points = torch.full((1, 8, 4), -1.0)
    points[0, 0] = torch.tensor([5.0, 2.0, 11.5, 19.5])  # the centre of cell (2, 1, 2) at stride 8
    spacing = torch.tensor([[4.0, 1.0, 1.0]])
    targets = train.map_targets(points, (1, 13, 8, 4, 4), 8, spacing, sigma_mm=4.0)
    assert targets[0, 5, 2, 1, 2] == 1 and (targets == 1).sum() == 1 and targets[0, 4].sum() == 0
    assert targets[0, 5, 3, 1, 2].item() == pytest.approx(math.exp(-0.5)) == targets[0, 5, 1, 1, 2].item()
    assert targets[0, 5, 2, 1, 3].item() == pytest.approx(math.exp(-0.5 * 4))


# --- the schedule -------------------------------------------------------------------------------------------


def test_rate_warms_up_then_falls_as_a_half_cosine():
    cfg = replace(TINY, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(u, 110, 10, cfg) for u in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == pytest.approx((1 + 0.1) / 2) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("num", [1, 7, 16, 41])
def test_two_ranks_of_half_the_batch_see_what_one_sees(num):
    one = train.plan_epoch(num, 0, 3, batch=4, world=1, accumulation=2)
    two = train.plan_epoch(num, 0, 3, batch=2, world=2, accumulation=2)
    assert len(one) == len(two) == math.ceil(num / 8)
    for group, other in zip(one, two, strict=True):
        seen = np.concatenate([part for step in group for part in step])
        assert sorted(seen) == sorted(np.concatenate([part for step in other for part in step]))
    everything = np.concatenate([part for group in two for step in group for part in step])
    assert sorted(everything) == list(range(num))
    assert max(len(part) for group in two for step in group for part in step) <= 2


# --- before training ----------------------------------------------------------------------------------------


def test_every_fault_of_the_data_is_reported_at_once(tmp_path):
    table = random_table(20)
    write_cache(tmp_path, table, QUICK)
    labels = pd.read_csv(tmp_path / "train.csv", dtype={UID: str})
    labels.loc[0, "Modality"], labels.loc[1, LABELS[3]] = "PET", 7
    extra = labels.iloc[2:3].assign(**{UID: "9.9"})
    pd.concat([labels, labels.iloc[3:4], extra]).iloc[:, :].drop(index=4).to_csv(
        tmp_path / "train.csv", index=False
    )
    (tmp_path / f"{table[UID][5]}.safetensors").unlink()
    path = tmp_path / f"{table[UID][6]}.safetensors"
    path.write_bytes((tmp_path / f"{table[UID][7]}.safetensors").read_bytes())  # the same images twice
    (tmp_path / f"{table[UID][8]}.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError) as error:
        train.load_table(replace(QUICK, cache=str(tmp_path)))
    for complaint in (
        "Modality not in",
        "label other than 0 and 1",
        "listed twice",
        "9.9",
        f"without labels in train.csv: {table[UID][4]}",
        f"{table[UID][5]}.safetensors: missing",
        f"{table[UID][8]}.safetensors: not readable",
        f"SOPInstanceUID: {table[UID][6]} and {table[UID][7]}",
    ):
        assert complaint in str(error.value), complaint


def test_a_cache_of_other_settings_is_refused(cache):
    with pytest.raises(ValueError, match=r"40 x made with other settings: roi_mm 160.0 \(config: 150.0\)"):
        train.load_table(replace(QUICK, cache=str(cache), roi_mm=150.0))


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, replace(QUICK, cache=str(cache)))
    return folder / "outputs" / "test_efficientnet_seed0_fold0"


def assert_same_run(folder: Path, expected: Path) -> None:
    ours, theirs = load_file(folder / "best_ema.safetensors"), load_file(expected / "best_ema.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    last = [max((p / "last").glob("[0-9]*")) for p in (folder, expected)]
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (load_file(path / name) for path in last)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert (folder / "oof.csv").read_bytes() == (expected / "oof.csv").read_bytes()
    a, b = (json.loads((p / "metrics.json").read_text()) for p in (folder, expected))
    timing = ("seconds", "data_wait")
    for metrics in (a, b):
        metrics["history"] = [{k: v for k, v in row.items() if k not in timing} for row in metrics["history"]]
    changing = {"seconds", "peak_memory_gb"}
    assert {k: v for k, v in a.items() if k not in changing} == {
        k: v for k, v in b.items() if k not in changing
    }


def test_a_run_leaves_what_users_expect(undisturbed, cache):
    names = {"best_ema.safetensors", "metrics.json", "config.yaml", "oof.csv", "log.csv", "last"}
    assert names <= {p.name for p in undisturbed.iterdir()}
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    oof = pd.read_csv(undisturbed / "oof.csv", dtype={UID: str})
    table = train.load_table(replace(QUICK, cache=str(cache)))
    held_out = table[table["fold"] == 0]
    assert oof[UID].tolist() == held_out[UID].tolist() and 0 < len(oof) < 40
    truth = held_out[list(LABELS)].to_numpy(float)
    assert metrics["wauc"] == pytest.approx(common.weighted_auc(truth, oof[list(LABELS)].to_numpy())["wauc"])
    assert metrics["low"] <= metrics["wauc"] <= metrics["high"] and metrics["precision"] == "no"
    assert metrics["leak"][0] == pytest.approx(metrics["oracle_wauc"][0] - metrics["wauc"])
    assert metrics["leak"][1] <= metrics["leak"][0] <= metrics["leak"][2]
    assert "wauc_without_proposals" not in metrics  # there were none
    assert set(metrics["undefined"]) == {n for n in LABELS if held_out[n].nunique() < 2}
    assert len(metrics["history"]) == 8 == len(pd.read_csv(undisturbed / "log.csv"))
    meta = common.load_run(undisturbed).meta
    assert meta["val_uids"] == held_out[UID].tolist()
    kept = table[table["fold"] != 0]
    assert not set(kept["patient"]) & set(oof["patient"])
    assert meta["prior"] == pytest.approx(kept[list(LABELS)].mean().tolist(), abs=1e-6)


def test_validation_logits_do_not_depend_on_annotated_points(undisturbed, cache, tmp_path):
    """The held-out series without their points: the same logits to the last bit."""
    import accelerate

    write_cache(tmp_path, random_table(40), QUICK, with_points=False)
    loaded = common.load_run(undisturbed)
    accelerator, logits = accelerate.Accelerator(cpu=True), []
    for folder in (cache, tmp_path):
        cfg = replace(loaded.cfg, cache=str(folder))
        table = train.load_table(cfg)
        held_out = table[table["fold"] == 0]
        dataset = common.SeriesDataset(cfg, held_out, "deploy", np.array(loaded.meta["decoys"]))
        logits.append(train.predict(loaded.model, dataset, cfg, accelerator)[0])
    assert np.array_equal(*logits) and logits[0].std() > 0
    reported = pd.read_csv(undisturbed / "oof.csv")[list(LABELS)].to_numpy()
    assert common.sigmoid(logits[0]) == pytest.approx(reported, abs=1e-5)


def test_logits_that_are_not_finite_are_no_validation(cache):
    import accelerate

    cfg = replace(QUICK, cache=str(cache))
    table = train.load_table(cfg)
    dataset, model = common.SeriesDataset(cfg, table, "deploy", np.zeros((0, 3))), common.build_model(cfg)
    torch.nn.init.constant_(model.net.conv_stem.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=f"40 of 40 series are not finite, first {table[UID][0]}"):
        train.predict(model, dataset, cfg, accelerate.Accelerator(cpu=True))


def test_killed_runs_resume_to_the_same_bits(undisturbed, cache, tmp_path):
    cfg, rng, kills = replace(QUICK, cache=str(cache)), np.random.default_rng(0), 0
    folder = tmp_path / "outputs" / "test_efficientnet_seed0_fold0"
    for _ in range(3):
        process = start(tmp_path, cfg, "--resume")
        begun, wait = time.time(), rng.uniform(0.1, 1.5)
        while process.poll() is None and not (folder / "last").exists() and time.time() - begun < 60:
            time.sleep(0.05)
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills
    if not (folder / "metrics.json").exists():
        run(tmp_path, cfg, "--resume")
    assert_same_run(folder, undisturbed)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> Path:
    """The run folder below `folder`, once its first epoch is saved."""
    while not list(folder.glob("outputs/*/last/0001*")) and process.poll() is None:
        time.sleep(0.02)
    (last,) = folder.glob("outputs/*/last")
    return last.parent


def test_sigterm_saves_and_exits_143_and_a_damaged_checkpoint_is_passed_over(undisturbed, cache, tmp_path):
    """The signal goes to the whole process group, as a scheduler sends it: also to the loader's worker."""
    cfg = replace(QUICK, cache=str(cache), workers=1)
    process = start(tmp_path, cfg)
    folder = wait_for_checkpoint(tmp_path, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert not (folder / "metrics.json").exists()
    assert "holds an unfinished run" in run(tmp_path, cfg, code=1)
    assert "batch_size 4 (now 2)" in run(tmp_path, replace(cfg, batch_size=2), "--resume", code=1)
    newest = max((folder / "last").glob("[0-9]*"))
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    assert "falling back to the one before" in run(tmp_path, cfg, "--resume")
    assert_same_run(folder, undisturbed)
    assert "holds a finished run" in run(tmp_path, cfg, "--resume", code=1)
    gone = replace(cfg, pretrained="gone.safetensors")
    assert "no such file" in run(tmp_path, gone, "--overwrite", code=1)
    assert_same_run(folder, undisturbed)  # a run that cannot begin has deleted nothing


def test_two_processes_follow_one_and_resume_to_the_same_bits(cache, tmp_path):
    """A model without BatchNorm: half the batch on each of two processes is the same training."""
    cfg = replace(QUICK, cache=str(cache), model_name="test_vit", ema_decay=0.9, clip_grad=0.0)
    folders = [tmp_path / name for name in ("one", "two", "killed")]
    for folder in folders:
        folder.mkdir()
    run(folders[0], cfg)
    half = replace(cfg, batch_size=2)
    run(folders[1], half, processes=2)
    logs = [pd.read_csv(f / "outputs" / "test_vit_seed0_fold0" / "log.csv") for f in folders[:2]]
    assert logs[0]["lr"].tolist() == logs[1]["lr"].tolist()
    for name in ("train_loss", "val_loss"):
        assert logs[0][name].to_numpy() == pytest.approx(logs[1][name].to_numpy(), abs=1e-4)
    process = start(folders[2], half, processes=2)
    killed = wait_for_checkpoint(folders[2], process)
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    # ranks live on without their launcher
    subprocess.run(["pkill", "-KILL", "-f", str(folders[2])], check=False)
    process.communicate()
    assert not (killed / "metrics.json").exists()
    time.sleep(0.5)
    run(folders[2], half, "--resume", processes=2)
    assert_same_run(killed, folders[1] / killed.relative_to(folders[2]))


def test_two_processes_with_batchnorm_resume_to_the_same_bits_within_an_epoch(cache, tmp_path):
    cfg = replace(QUICK, cache=str(cache), batch_size=3)  # of 30: BatchNorm wants 2
    folders = [tmp_path / name for name in ("undisturbed", "stopped")]
    for folder in folders:
        folder.mkdir()
    run(folders[0], cfg, processes=2)
    process = start(folders[1], cfg, processes=2)
    stopped = wait_for_checkpoint(folders[1], process)
    process.terminate()  # the launcher passes it on
    process.communicate(timeout=60)
    newest = max((stopped / "last").glob("[0-9]*"))
    assert not newest.name.endswith("_000000") and not (stopped / "metrics.json").exists()
    run(folders[1], cfg, "--resume", processes=2)
    assert_same_run(stopped, folders[0] / stopped.relative_to(folders[1]))


def test_accumulated_batches_follow_one_large_batch(cache, tmp_path):
    """30 series in updates of 4 end with one of 2: also that one weighs right."""
    cfg = replace(QUICK, cache=str(cache), model_name="test_vit", epochs=2, ema_decay=0.9, clip_grad=0.0)
    logs = []
    for name, own in (("whole", cfg), ("parts", replace(cfg, batch_size=1, accumulation=4))):
        (tmp_path / name).mkdir()
        run(tmp_path / name, own)
        logs.append(pd.read_csv(tmp_path / name / "outputs" / "test_vit_seed0_fold0" / "log.csv"))
    assert logs[0]["lr"].tolist() == logs[1]["lr"].tolist()
    for name in ("train_loss", "val_loss"):
        assert logs[0][name].to_numpy() == pytest.approx(logs[1][name].to_numpy(), abs=1e-4)


def test_out_of_memory_says_which_settings_to_lower(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train", full)
    monkeypatch.setattr(sys, "argv", ["train.py", "--set", f"outputs={tmp_path}", "--set", "precision='no'"])
    assert train.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(name in line for name in ("batch_size", "accumulation", "grad_checkpointing", "img_size"))


def test_a_second_run_in_the_same_folder_is_refused(cache, tmp_path):
    cfg = replace(QUICK, cache=str(cache), epochs=200)
    first = start(tmp_path, cfg)
    wait_for_checkpoint(tmp_path, first)
    assert "another run is writing here" in run(tmp_path, cfg, "--resume", code=1)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()


def test_locator_learns_writes_proposals_and_a_classifier_uses_them(cache, tmp_path):
    locator = replace(QUICK, cache=str(cache), task="locate", max_localizer_crops=0, epochs=1, num_folds=2)
    for fold in (0, 1):
        run(tmp_path, replace(locator, fold=fold))
    folder = tmp_path / "outputs" / "locator_test_efficientnet_seed0_fold0"
    rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(rows[UID]) == set(common.load_run(folder).meta["val_uids"])
    assert rows.groupby(UID).size().max() == metrics["num_proposals"] == 3
    value, low, high = metrics["recall_10mm"]
    assert 0 <= low <= value <= high <= 1
    assert (metrics["score_threshold"] is None) == (value < 0.5)
    classifier = replace(
        locator,
        task="classify",
        max_localizer_crops=2,
        proposals=str(tmp_path / "outputs/locator_*_seed0_fold*"),
    )
    run(tmp_path, classifier)
    metrics = json.loads((tmp_path / "outputs/test_efficientnet_seed0_fold0/metrics.json").read_text())
    table = train.load_table(classifier)
    locators = train.find_locators(classifier)
    assert locators == {0: folder, 1: folder.with_name("locator_test_efficientnet_seed0_fold1")}
    assert common.load_run(tmp_path / "outputs/test_efficientnet_seed0_fold0").meta["locator"] == folder.name
    found = train.load_proposals(classifier, table, locators)
    oof = pd.concat(pd.read_csv(p, dtype={UID: str}) for p in tmp_path.glob("outputs/locator_*/oof.csv"))
    probs = oof.set_index(UID)[list(LABELS)].loc[list(found)].to_numpy()
    assert common.sigmoid(np.stack([p.logits for p in found.values()])) == pytest.approx(probs, abs=1e-9)
    assert len(found) == len(table) == 40
    gain, without = metrics["gain_of_proposals"], metrics["wauc_without_proposals"]
    assert gain[0] == pytest.approx(metrics["wauc"] - without[0]) and gain[1] <= gain[0] <= gain[2]
    slabs_alone = replace(classifier, max_localizer_crops=0, seed=2)
    run(tmp_path, slabs_alone)  # it takes the locator's logits; without crops its places add nothing
    metrics = json.loads((tmp_path / "outputs/test_efficientnet_seed2_fold0/metrics.json").read_text())
    assert metrics["gain_of_proposals"] == [0, 0, 0]
    with pytest.raises(ValueError, match="its volumes have other settings"):
        train.find_locators(replace(classifier, img_size=64))
    assert "num_folds 2" in run(tmp_path, replace(classifier, num_folds=4, seed=1), code=1)
    other = folder.with_name("locator_test_efficientnet_seed1_fold0")
    shutil.copytree(folder, other)
    both = replace(classifier, seed=1, proposals=str(tmp_path / "outputs/locator_*"))
    assert "hold out the same fold" in run(tmp_path, both, code=1)
    (folder / "metrics.json").unlink()
    assert "not finished" in run(tmp_path, replace(classifier, seed=1), code=1)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_series(cache, tmp_path):
    err = run(
        tmp_path,
        replace(QUICK, cache=str(cache), lr=1e30, clip_grad=0.0, epochs=1, warmup_epochs=0.0),
        code=1,
    )
    assert "loss is" in err and "epoch 1, update" in err and "series 1.2." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--set", "lrr=1"], 1, "the nearest is 'lr'"),
        (["--set", "cache=nowhere"], 1, "expected a cache with labels"),
        (["--set", "tracker=wandb"], 1, "wandb is not installed"),
        (["--frobnicate"], 2, "unrecognized arguments"),
    ],
)
def test_a_users_mistake_is_one_line(cache, tmp_path, options, code, complaint):
    err = run(tmp_path, replace(QUICK, cache=str(cache)), *options, code=code)
    assert complaint in err and "Traceback" not in err
    assert code == 2 or len(err.strip().splitlines()) == 1


def test_the_bench_of_the_loop_still_fits_it():
    options = ["--model", "test_vit", "--img-size", "160", "--series", "4", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench.py"), "train", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train.py's epoch" in done.stdout and "Share of time waiting on data" in done.stdout
