"""Labels, settings, folds, the metric, the sample, models and checkpoints of common.py."""

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, random_table, write_cached_series
from sklearn.metrics import roc_auc_score

import common
from common import LABELS, SWAP, UID, Config

ROOT = Path(__file__).parents[1]


# --- labels and settings ------------------------------------------------------------------------------------


def test_swap_exchanges_left_and_right_names_and_nothing_else():
    for i, j in enumerate(SWAP):
        expected = LABELS[i].replace("Left", "?").replace("Right", "Left").replace("?", "Right")
        assert LABELS[j] == expected
    assert [SWAP[i] for i in SWAP] == list(range(14))


def test_the_settings_users_know_have_their_known_values():
    cfg = Config()
    known = dict(base_slices=32, max_localizer_crops=3, p_localizer_dropout=0.30, p_global_localizer_off=0.10)
    known |= dict(
        img_size=384, model_name="maxvit_base_tf_384", epochs=34, batch_size=2, label_smoothing=0.02
    )
    assert {name: getattr(cfg, name) for name in known} == known
    assert cfg.in_chans == 35 and cfg.crop_mm == 48.0 and cfg.precision == "fp16"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_project_loads(path):
    cfg = common.load_config(path)
    assert cfg == common.config_from_dict(json.loads(json.dumps(asdict(cfg))))
    if path.stem.startswith("fold"):
        assert cfg == replace(common.load_config(path.parent / "base.yaml"), fold=int(path.stem[4:]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("img_sise: 96", "unknown setting 'img_sise'; the nearest is 'img_size'"),
        ("lr: 1e-4", "expected float (YAML reads 1e-4 as text: write 1.0e-4)"),
        (
            "precision: no",
            'precision is False, expected str (YAML reads no as False: write "no" with its quotes)',
        ),
        ("epochs: 3.5", "epochs is 3.5, expected int"),
        ("epochs: true", "epochs is True, expected int"),
        ("precision: fp8", "expected one of 'fp16', 'bf16', 'no'"),
        ("p_flip: 1.5", "expected a share between 0 and 1"),
        ("accumulation: 0", "accumulation is 0, expected more than 0"),
        ("max_localizer_crops: -1", "expected 0 or more"),
        ("ct_window: 600.0", "ct_window is 600.0, expected"),
        ("task: locate", "max_localizer_crops is 3, expected 0: task locate takes slabs alone"),
        ("fold: 5", "expected 0 to 4"),
        ("- fold", "found a list"),
        ("a: [", "not valid YAML"),
        ("base: gone.yaml", "no such config file"),
    ],
)
def test_a_wrong_config_is_refused_with_the_reason(tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        common.load_config(tmp_path / "c.yaml")
    assert complaint in str(error.value)


def test_set_overrides_yaml_and_yaml_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 1.0e-3\nepochs: 5\nseed: 1")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nepochs: 6\nseed: 2")
    cfg = common.load_config(
        tmp_path / "own.yaml", ["seed=3", "ct_window=[0, 500]", "pretrained=w.safetensors"]
    )
    assert (cfg.lr, cfg.epochs, cfg.seed, cfg.ct_window) == (1e-3, 6, 3, (0.0, 500.0))
    assert cfg.pretrained == "w.safetensors" and cfg.batch_size == Config().batch_size
    assert common.load_config(None, ["tracker="]).tracker == ""
    with pytest.raises(ValueError, match="not a YAML value; quote it"):
        common.load_config(None, ["proposals=*_seed0"])


# --- folds and the metric -----------------------------------------------------------------------------------


def test_folds_keep_patients_together_and_do_not_depend_on_row_order():
    table = random_table(300)
    folds = common.make_folds(table, 5, seed=0)
    assert table.groupby("patient")[UID].count().max() == 2
    assert folds.groupby(table.set_index(UID)["patient"]).nunique().max() == 1
    shuffled = common.make_folds(table.sample(frac=1, random_state=1), 5, seed=0)
    assert shuffled.sort_index().equals(folds.sort_index())
    assert not common.make_folds(table, 5, seed=1).equals(folds)


def test_folds_spread_presence_modalities_and_every_location():
    table = random_table(600).drop(columns="patient")
    table["patient"] = table[UID]
    folds = common.make_folds(table, 5, seed=0).loc[table[UID]].to_numpy()
    counts = table.groupby(folds)[list(LABELS)].sum()
    assert (counts.max() - counts.min())[list(common.LOCATIONS)].max() <= 2  # two locations a series at most
    assert counts["Aneurysm Present"].max() - counts["Aneurysm Present"].min() <= 3
    sizes = table.groupby([folds, "Modality"]).size().unstack()
    assert (sizes.max() - sizes.min()).max() <= 6
    single = table[table[list(common.LOCATIONS)].sum(axis=1) <= 1]
    folds = common.make_folds(single, 5, seed=0).loc[single[UID]].to_numpy()
    counts = single.groupby(folds)[list(common.LOCATIONS)].sum()
    assert (counts.max() - counts.min()).max() <= 1  # as even as whole numbers allow


def test_auc_with_weights_and_ties_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    truth, scores, weights = rng.random(80) < 0.3, rng.random(80).round(1), rng.integers(0, 4, (5, 80))
    assert len(set(scores)) < 80  # ties are there
    ours = common.weighted_ranks_auc(truth, scores, weights.astype(float))
    theirs = [roc_auc_score(truth, scores, sample_weight=w) for w in weights]
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_wauc_is_half_presence_and_half_the_mean_of_the_defined_locations():
    labels, probs = np.zeros((4, 14)), np.full((4, 14), 0.5)
    labels[:2, 13], probs[:, 13] = 1, [0.9, 0.2, 0.3, 0.1]  # 3 of 4 pairs right
    labels[0, 0], probs[:, 0] = 1, [0.9, 0.1, 0.1, 0.1]  # perfect
    labels[1, 6], probs[:, 6] = 1, [0.5, 0.5, 0.5, 0.5]  # ties: one half
    result = common.weighted_auc(labels, probs)
    assert result["wauc"] == pytest.approx((0.75 + (1 + 0.5) / 2) / 2)
    assert len(result["undefined"]) == 11 and result["positives"][13] == 2


def test_wauc_of_one_class_is_undefined_and_says_so():
    result = common.weighted_auc(np.zeros((3, 14)), np.random.default_rng(0).random((3, 14)))
    assert np.isnan(result["wauc"]) and result["undefined"] == list(LABELS)


def test_predictions_that_are_no_numbers_have_no_score():
    labels = np.eye(14)
    with pytest.raises(ValueError, match="1 of 196 predictions are no numbers"):
        common.weighted_auc(labels, np.where(np.arange(196).reshape(14, 14) == 5, np.nan, 0.5))


def test_bootstrap_draws_patients_not_rows():
    rng = np.random.default_rng(0)
    labels = np.tile((rng.random((40, 1)) < 0.5).astype(float), (1, 14))
    probs = labels * 0.2 + rng.random((40, 14))
    alone = common.bootstrap(labels, probs, range(40))
    copied = common.bootstrap(np.repeat(labels, 5, 0), np.repeat(probs, 5, 0), np.repeat(np.arange(40), 5))
    assert 0 < alone["low"] < common.weighted_auc(labels, probs)["wauc"] < alone["high"] < 1
    assert copied["high"] - copied["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)


def test_bootstrap_says_how_many_draws_lost_a_class():
    labels = np.zeros((6, 14))
    labels[0] = 1  # a draw without the first patient (1/3 of all) has no positive
    result = common.bootstrap(labels, np.random.default_rng(0).random((6, 14)), range(6))
    assert result["draws_used"] == pytest.approx(2000 * (1 - (5 / 6) ** 6), rel=0.1)


# --- the sample ---------------------------------------------------------------------------------------------


def test_crop_is_centred_on_its_point_and_covers_crop_mm():
    cfg = replace(TINY, img_size=64, crop_mm=40.0, crop_depth_mm=4.0)  # 2.5 mm a pixel: 16 pixels become 64
    volume = np.zeros((8, 64, 64), np.uint8)
    volume[4, 30, 20] = 255
    crop = common.cut_crop(volume, np.array([4.0, 30.0, 20.0]), np.array([5.0, 2.5, 2.5]), cfg)
    y, x = np.nonzero(crop)
    assert (y.mean(), x.mean()) == pytest.approx((31.5, 31.5), abs=0.01)
    assert 4 <= len(set(x)) <= 8  # one pixel became four, smoothed
    assert not common.cut_crop(volume, np.array([6.0, 30.0, 20.0]), np.array([5.0, 2.5, 2.5]), cfg).any()


def test_crop_projects_the_slabs_within_reach():
    cfg = replace(TINY, crop_depth_mm=8.0)
    volume = np.zeros((8, 32, 32), np.uint8)
    volume[3] = 90  # 4 mm slabs: 8 mm reach 2 slabs up and down of slab 4
    args = (volume, np.array([4.0, 16.0, 16.0]), np.array([4.0, 1.5, 1.5]))
    assert common.cut_crop(*args, cfg)[16, 16] == 18  # a fifth
    assert common.cut_crop(*args, replace(cfg, crop_projection="max"))[16, 16] == 90


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(tmp_path):
    cfg, table = replace(TINY, cache=str(tmp_path)), random_table(3)
    for i, uid in enumerate(table[UID]):
        write_cached_series(
            tmp_path, uid, cfg, [(2, 3, 10, 12), (5, 4, 20, 9), (6, 1, 4, 4), (7, 2, 8, 8)], i
        )
    decoys = np.random.default_rng(0).random((20, 3))

    def item(index: int, **changes) -> dict:
        options = dict(epoch=0) | changes
        return common.SeriesDataset(
            replace(cfg, seed=options.pop("seed", 0)), table, "train", decoys, **options
        )[index]

    same, again = item(1), item(1)
    assert same["image"].shape == (8 + 3, 32, 32) and same["image"].dtype == torch.uint8
    for name in same:
        assert torch.equal(torch.as_tensor(same[name]), torch.as_tensor(again[name])), name
    for other in (item(1, epoch=1), item(1, seed=1)):
        assert torch.equal(same["image"][:8], other["image"][:8])
        assert not torch.equal(same["augment"], other["augment"])


def test_switches_of_the_crops_do_what_their_names_say(tmp_path):
    cfg, table = replace(TINY, cache=str(tmp_path), crop_jitter_mm=0.0), random_table(1)
    volume = write_cached_series(tmp_path, table[UID][0], cfg, [(2, 3, 10, 12)])
    spacing = np.array([4.0, 5.0, 5.0])
    annotated = common.cut_crop(volume, np.array([3.0, 10.0, 12.0]), spacing, cfg)
    decoys = np.array([[0.7, 0.7, 0.5]])

    def crops(**changes) -> np.ndarray:
        own = replace(cfg, **changes)
        return common.SeriesDataset(own, table, "train", decoys)[0]["image"][8:].numpy()

    plain = crops(p_localizer_dropout=0.0, p_global_localizer_off=0.0)
    assert (plain[0] == annotated).all() and plain[1].any() and (plain[1] == plain[2]).all()
    dropped = crops(p_localizer_dropout=1.0, p_global_localizer_off=0.0)
    assert (dropped[0] == plain[1]).all()  # a decoy stands where the annotated crop was
    assert not crops(p_global_localizer_off=1.0).any()


def test_deployment_sees_no_annotated_point(tmp_path):
    cfg, table = replace(TINY, cache=str(tmp_path / "with")), random_table(4)
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        for i, uid in enumerate(table[UID]):
            write_cached_series(tmp_path / folder, uid, cfg, [(2, 3, 10, 12)] if folder == "with" else [], i)
    decoys = np.random.default_rng(0).random((20, 3))
    for i in range(4):
        with_points = common.SeriesDataset(cfg, table, "deploy", decoys)[i]
        without = common.SeriesDataset(
            replace(cfg, cache=str(tmp_path / "without")), table, "deploy", decoys
        )[i]
        assert torch.equal(with_points["image"], without["image"]) and with_points["image"][8:].any()
        assert (with_points["points"] == -1).all()
        oracle = common.SeriesDataset(cfg, table, "oracle", decoys)[i]
        assert not torch.equal(oracle["image"], with_points["image"])


def test_proposals_stand_where_decoys_would(tmp_path):
    cfg, table = replace(TINY, cache=str(tmp_path)), random_table(1)
    uid = table[UID][0]
    volume = write_cached_series(tmp_path, uid, cfg, [])
    places = np.array([[2.0, 8.0, 8.0], [5.0, 20.0, 20.0]])
    proposals = {uid: common.Proposal(places, np.arange(14.0))}
    item = common.SeriesDataset(cfg, table, "deploy", np.full((1, 3), 0.4), proposals)[0]
    crops = item["image"][8:].numpy()
    assert item["scores"].tolist() == list(range(14))
    for k, place in enumerate(places):
        assert (crops[k] == common.cut_crop(volume, place, np.array([4.0, 5.0, 5.0]), cfg)).all()
    assert crops[2].any()


# --- models and checkpoints ---------------------------------------------------------------------------------


def test_peaks_come_highest_first_and_far_enough_apart():
    maps = np.zeros((13, 8, 4, 4), np.float32)
    maps[3, 2, 1, 1], maps[3, 2, 1, 2], maps[9, 7, 3, 0] = 0.9, 0.8, 0.5
    peaks = common.find_peaks(maps, np.array([4.0, 1.0, 1.0]), num=3, min_mm=10.0, stride=8)
    assert peaks[:, 3:].tolist() == pytest.approx(np.array([[0.9, 3], [0.5, 9]]))  # 0.8 lies 8 mm from 0.9
    assert peaks[0, :3].tolist() == [2, 8 + 3.5, 8 + 3.5]


def test_locator_maps_add_up_to_its_finding_and_peak_at_its_logits():
    cfg = replace(TINY, task="locate", max_localizer_crops=0)
    logits, maps = common.build_model(cfg).eval()(torch.rand(2, 8, 32, 32))
    assert maps.shape == (2, 13, 8, 4, 4) and logits.shape == (2, 14)
    assert torch.equal(logits[:, :13], maps.flatten(2).amax(-1))
    found = torch.sigmoid(maps).sum(1).flatten(1).amax(1)
    assert torch.allclose(found, torch.sigmoid(logits[:, 13]), atol=1e-6) and found.std() > 0


def test_a_classifier_adds_to_the_logits_of_its_locator():
    cfg = replace(TINY, proposals="outputs/locator_*")
    model = common.build_model(cfg).eval()
    images, scores = torch.rand(2, cfg.in_chans, 32, 32), torch.randn(2, 14)
    own = model.net((images - 0.5) / 0.5)
    assert own.std() > 0 and torch.allclose(model(images, scores), own + scores, atol=1e-6)
    assert common.build_model(replace(cfg, locator_scores=False)).scores is None


@pytest.mark.parametrize("task", ["classify", "locate"])
def test_a_checkpoint_rebuilds_its_model(tmp_path, task):
    cfg = replace(TINY, task=task, max_localizer_crops=0 if task == "locate" else 3)
    model = common.build_model(cfg).eval()
    meta = {
        "prior": [0.1] * 14,
        "decoys": [],
        "fold": 0,
        "val_uids": ["1.2"],
        "epoch": 1,
    }
    common.save_checkpoint(tmp_path / "best_ema.safetensors", model, cfg, meta)
    run = common.load_run(tmp_path)
    images = torch.rand(1, cfg.in_chans, 32, 32)
    ours, theirs = model(images), run.model(images)
    assert torch.equal(ours[0] if task == "locate" else ours, theirs[0] if task == "locate" else theirs)
    assert run.cfg == cfg and run.meta["val_uids"] == ["1.2"]


def test_a_broken_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        common.load_run(tmp_path)
    (tmp_path / "best_ema.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        common.load_run(tmp_path)


def test_pretrained_weights_come_from_a_local_file_with_the_stem_adapted(tmp_path):
    import timm
    from safetensors.torch import save_file

    rgb = timm.create_model("test_efficientnet", num_classes=1000)
    save_file(rgb.state_dict(), tmp_path / "w.safetensors")
    cfg = replace(TINY, pretrained=str(tmp_path / "w.safetensors"))
    net = common.build_model(cfg, pretrained=True).net
    stem, source = net.conv_stem.weight, rgb.conv_stem.weight
    assert stem.shape[1] == cfg.in_chans and torch.allclose(stem[:, :3], source * 3 / cfg.in_chans)
    assert torch.equal(net.blocks[0][0].conv.weight, rgb.blocks[0][0].conv.weight)
    with pytest.raises(ValueError, match="no such file"):
        common.build_model(replace(cfg, pretrained="gone.safetensors"), pretrained=True)


def test_an_unknown_model_is_refused_with_near_names():
    with pytest.raises(ValueError, match="maxvit_base_tf_384"):
        common.build_model(replace(TINY, model_name="maxvit_base_384"))


@pytest.mark.parametrize("name", ["test_resnet", "densenet121"])  # the latter knows no drop_path_rate
def test_networks_that_lack_a_setting_are_built_without_it(name):
    assert common.build_model(replace(TINY, model_name=name))(torch.rand(2, 11, 32, 32)).shape == (2, 14)


@pytest.mark.parametrize("task", ["classify", "locate"])
def test_gradient_checkpointing_changes_memory_not_gradients(task):
    cfg = replace(TINY, task=task, max_localizer_crops=0, drop_rate=0.0)
    torch.manual_seed(0)
    plain, frugal = common.build_model(cfg), common.build_model(replace(cfg, grad_checkpointing=True))
    frugal.load_state_dict(plain.state_dict())
    images, gradients, saved = torch.rand(2, 8, 32, 32), [], []
    for model in (plain, frugal):
        saved.append(0)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.train()(images)
        (output if task == "classify" else output[0]).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, atol=1e-4)
    assert saved[1] < 0.9 * saved[0]


def test_importing_common_loads_neither_timm_nor_matplotlib():
    tree = ast.parse((ROOT / "common.py").read_text())
    names = {a.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "torch" in names and not names & {"timm", "matplotlib", "accelerate"}
