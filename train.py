"""Train one member of the ensemble: one model, one seed, one validation fold.

in   --config YAML   settings (common.Config); the cache it names, filled by preprocess.py, with train.csv
out  outputs/<model>_seed<S>_fold<F>/
                     best_ema.safetensors (weights and all that infer.py needs), metrics.json, config.yaml,
                     log.csv (a row per epoch), oof.csv (validation predictions), last/ (for --resume);
                     of a locator (task: locate) proposals.csv: where it would crop in its validation fold
run  accelerate launch train.py --config configs/fold0.yaml
     accelerate launch train.py --config configs/fold0.yaml --set seed=1 --set lr=5.0e-5 --resume

Validation sees what a new patient has: no annotated crop ever, only decoys or a locator's proposals.
exit 0 trained, 1 refused or failed (one line says why), 2 wrong usage, 143 stopped by SIGTERM after saving.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import accelerate
import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.nn import functional as F

import common
from common import AP, LABELS, SWAP, UID, Config, Proposal, SeriesDataset

ORACLE_NOTE = "oracle_wauc uses annotated crops that no new patient has: a diagnostic, not a score"
GRACE_S = 30  # that a loader process lives on after SIGTERM; as long as Slurm waits before it kills
KEEP_CHECKPOINTS = 2  # of last/: the newest and one to fall back to


# --- before training: what there is to train on, and every fault in it at once ------------------------------


def load_table(cfg: Config) -> pd.DataFrame:
    """A row per cached and labelled series: UID, patient, Modality, plane, 14 labels, fold.

    Raises ValueError that lists every fault of the cache and the labels, so that one run finds them all.
    """
    cache, faults = Path(cfg.cache), []
    for name, maker in (
        ("index.csv", "python preprocess.py --src dicoms --dst"),
        ("train.csv", "labels beside"),
    ):
        if not (cache / name).is_file():
            raise ValueError(f"{cache / name}: not found; expected a cache with labels: {maker} {cache}")
    labels = pd.read_csv(cache / "train.csv", dtype={UID: str})
    missing = [name for name in (UID, "Modality", *LABELS) if name not in labels]
    if missing:
        raise ValueError(f"{cache / 'train.csv'}: columns missing: {', '.join(missing)}")
    columns = [UID, "status", "reason", "patient", "plane"]
    index = pd.read_csv(cache / "index.csv", dtype=dict.fromkeys(columns, str), keep_default_na=False)[
        columns
    ]

    def fault(rows: pd.Series, what: str) -> None:
        if len(rows):
            faults.append(
                f"{len(rows)} x {what}: {', '.join(map(str, rows[:3]))}{' ...' if len(rows) > 3 else ''}"
            )

    fault(labels[UID][labels[UID].duplicated()], "series listed twice in train.csv")
    fault(labels[UID][~labels["Modality"].isin(common.MODALITIES)], f"Modality not in {common.MODALITIES}")
    fault(labels[UID][~labels[list(LABELS)].isin([0, 1]).all(axis=1)], "label other than 0 and 1")
    fault(
        labels[UID][~labels[UID].isin(index[UID])], f"labelled series without a row in {cache / 'index.csv'}"
    )
    fault(
        index[UID][(index["status"] == "ok") & ~index[UID].isin(labels[UID])],
        "cached series without labels in train.csv",
    )
    table = labels.drop_duplicates(UID).merge(index, on=UID)
    failed = table[table["status"] != "ok"]
    if len(failed):
        say(f"{len(failed)} labelled series failed in preprocessing, left out: {', '.join(failed[UID][:3])}")
    table = table[table["status"] == "ok"].copy()
    table["patient"] = table["patient"].where(
        table["patient"] != "", table[UID]
    )  # no PatientID: one of its own
    expected, other, shared, seen = common.volume_settings(cfg), {}, [], {}
    for uid in table[UID]:
        path = cache / f"{common.safe_uid(uid)}.safetensors"
        if not path.is_file():
            faults.append(f"{path}: missing although the index calls it ok; run preprocess.py again")
            continue
        try:
            tensors, meta = common.load_volume(path, ["sop_hashes"])
            found = json.loads(meta["settings"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            faults.append(f"{path}: not readable ({error}); delete it and run preprocess.py again")
            continue
        if found != expected:
            other.setdefault(json.dumps(found), []).append(uid)
        for sop in tensors["sop_hashes"].tolist():
            if seen.setdefault(sop, uid) != uid:
                shared.append(f"{seen[sop]} and {uid}")
    for found, uids in other.items():
        pairs = [(key, json.loads(found).get(key), value) for key, value in expected.items()]
        differ = ", ".join(f"{key} {own} (config: {value})" for key, own, value in pairs if own != value)
        fault(pd.Series(uids), f"made with other settings: {differ}; preprocess again or change the config")
    fault(pd.Series(sorted(set(shared))), "series that share a (0008,0018) SOPInstanceUID")
    if not faults and len(table):
        table["fold"] = common.make_folds(table, cfg.num_folds, cfg.fold_seed).loc[table[UID]].to_numpy()
        crossing = table.groupby("patient")["fold"].nunique()
        fault(crossing.index[crossing > 1].to_series(), "patient in two folds")
        sizes = table["fold"].value_counts()
        if sizes.get(cfg.fold, 0) == 0 or len(sizes) < 2:
            faults.append(f"{table['patient'].nunique()} patients do not fill {cfg.num_folds} folds")
    if faults or not len(table):
        raise ValueError(f"{cache}: cannot train:\n  " + "\n  ".join(faults or ["no series"]))
    return table.sort_values(UID).reset_index(drop=True)


def training_decoys(cfg: Config, kept: pd.DataFrame, most: int = 512) -> np.ndarray:
    """(M, 3) annotated places of the training series as fractions (z, y, x) of the volume; empty without
    crops."""
    if not cfg.max_localizer_crops:
        return np.zeros((0, 3))
    places = []
    for uid in kept[UID]:
        tensors, _ = common.load_volume(Path(cfg.cache) / f"{common.safe_uid(uid)}.safetensors", ["points"])
        fractions = (tensors["points"] + 0.5) / [cfg.base_slices, cfg.img_size, cfg.img_size]
        places.append(fractions[((fractions >= 0) & (fractions <= 1)).all(axis=1)])
    places = np.concatenate(places)
    if not len(places):
        say("no annotated points in the training folds: all crop channels stay empty")
    every = max(1, math.ceil(len(places) / most))
    return places[::every].round(4)


def find_locators(cfg: Config) -> dict[int, Path]:
    """The finished locator run of each fold that `proposals` matches. ValueError if one does not fit."""
    folders = {}
    for folder in [path.parent for path in sorted(map(Path, glob.glob(f"{cfg.proposals}/proposals.csv")))]:
        if not (folder / "metrics.json").exists():
            raise ValueError(f"{folder}: this locator is not finished; go on with it (--resume) first")
        own = common.load_config(folder / "config.yaml")
        if folders.setdefault(own.fold, folder) != folder:
            raise ValueError(
                f"proposals {cfg.proposals!r}: {folders[own.fold]} and {folder} hold out the same fold; "
                f"expected one locator per fold, for example outputs/locator_*_seed0_fold*"
            )
        if (own.num_folds, own.fold_seed) != (cfg.num_folds, cfg.fold_seed):
            raise ValueError(
                f"{folder}: made with num_folds {own.num_folds}, fold_seed {own.fold_seed}; this run differs"
            )
        if common.volume_settings(own) != common.volume_settings(cfg):
            raise ValueError(f"{folder}: its volumes have other settings; expected those of this run")
    return folders


def load_proposals(cfg: Config, table: pd.DataFrame, locators: dict[int, Path]) -> dict[str, Proposal] | None:
    """Places and logits by series, each from the locator that held its fold out; None without `proposals`."""
    if not cfg.proposals:
        return None
    found = {}
    for fold, folder in locators.items():
        held_out = set(table[UID][table["fold"] == fold])
        rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
        if not set(rows[UID]) <= held_out:
            raise ValueError(
                f"{folder}: proposals for series outside its fold; its folds were made from other data"
            )
        probs = pd.read_csv(folder / "oof.csv", dtype={UID: str}).set_index(UID)[list(LABELS)]
        for uid, part in rows.groupby(UID):
            own_probs = probs.loc[uid].to_numpy(float).clip(1e-9, 1 - 1e-9)
            found[uid] = Proposal(part[["z", "y", "x"]].to_numpy(), np.log(own_probs / (1 - own_probs)))
    absent = set(table[UID]) - set(found)
    if absent:
        raise ValueError(
            f"proposals {cfg.proposals!r}: {len(locators)} locator runs cover {len(found)} of {len(table)} "
            f"series; train every fold of the locator first (task: locate)"
        )
    return found


# --- the batch ----------------------------------------------------------------------------------------------


def augment(batch: dict[str, torch.Tensor], cfg: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply each sample's drawn augmentation on the device: -> images (B, C, H, W) in [0, 1], labels, points.

    Flip (all channels, labels swapped), slab shift and drop-out, rotation, scale and shift in plane (slabs
    only: crops have their own centre), gain and offset (all). What only moves bytes happens before they
    become floats. points (B, 8, 4) follow; label -1 is no point.
    """
    flip, degrees, scale, dx, dy, gain, offset, step = batch["augment"][:, : common.NUM_AUGMENT].unbind(1)
    keep, slabs = batch["augment"][:, common.NUM_AUGMENT :], cfg.base_slices
    images, extent = batch["image"], batch["image"].shape[-1]
    crops, labels, points = flip_samples(images[:, slabs:], batch["labels"], batch["points"], flip > 0.5)

    source = torch.arange(slabs, device=images.device)[None] - step[:, None].long()  # (B, Z)
    kept = ((source >= 0) & (source < slabs)) * keep
    rows = torch.arange(len(images), device=images.device)[:, None]
    moved = images[rows, source.clamp(0, slabs - 1)] * kept[:, :, None, None].to(images.dtype)
    points[..., 1] += step[:, None]

    # out(p) = mirror(in)(R p / scale + shift) in [-1, 1] coordinates; a point moves by the inverse
    angle = torch.deg2rad(degrees)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)
    shift = torch.stack([dx, dy], dim=1) * 2 / cfg.roi_mm
    theta = torch.cat([rotation / scale[:, None, None], shift[:, :, None]], dim=2)
    mirrored = torch.stack([1 - 2 * flip, torch.ones_like(flip)], dim=1)[
        :, :, None
    ]  # the slabs' flip costs nothing
    grid = F.affine_grid(theta * mirrored, moved.shape, align_corners=False)
    moved = F.grid_sample(moved.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    centred = (2 * points[..., [3, 2]] + 1) / extent - 1 - shift[:, None]  # (B, 8, xy)
    turned = torch.einsum("bpi,bij->bpj", centred, rotation) * scale[:, None, None]
    points[..., [3, 2]] = ((turned + 1) * extent - 1) / 2

    images = torch.cat([moved, crops.float()], dim=1)
    images.mul_(gain[:, None, None, None] / 255).add_(offset[:, None, None, None]).clamp_(0, 1)
    return images, labels, points


def flip_samples(
    images: torch.Tensor, labels: torch.Tensor, points: torch.Tensor, flip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mirror the samples where flip (B,) is true: image columns, left and right labels, points and their
    labels."""
    swap = torch.tensor(SWAP, device=images.device)
    images = torch.where(flip[:, None, None, None], common.mirror(images), images)
    labels = torch.where(flip[:, None], labels[:, swap], labels)
    mirrored = points.clone()
    mirrored[..., 3] = images.shape[-1] - 1 - points[..., 3]
    mirrored[..., 0] = torch.where(
        points[..., 0] >= 0, swap[points[..., 0].long().clamp(min=0)], points[..., 0]
    )
    return images, labels, torch.where(flip[:, None, None], mirrored, points)


def inputs(images: torch.Tensor, scores: torch.Tensor, cfg: Config) -> tuple[torch.Tensor, ...]:
    """What the model's forward takes: a classifier with a locator gets that one's logits (B, 14) as well."""
    return (images, scores) if cfg.has_scores else (images,)


def label_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(B,) binary cross entropy of logits (B, 14), mean over labels; targets are smoothing/2 and 1 -
    smoothing/2."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)


def map_targets(
    points: torch.Tensor, shape: torch.Size, stride: int, spacing_mm: torch.Tensor, sigma_mm: float
) -> torch.Tensor:
    """Targets of maps of that shape (B, 13, Z, h, w): Gaussians around points (B, 8, 4: label, z, y, x in
    voxels), 1 in the cell nearest to each. spacing_mm (B, 3) is the volume's; cells are stride voxels wide.
    """
    targets = points.new_zeros(shape)
    step = points.new_tensor([1, stride, stride])
    axes = torch.meshgrid(*(torch.arange(n, device=points.device) for n in shape[2:]), indexing="ij")
    cells = torch.stack(axes, dim=-1) * step + (step - 1) / 2  # (Z, h, w, 3) voxels
    for b, p in (points[..., 0] >= 0).nonzero().tolist():
        away = (cells - points[b, p, 1:]) * spacing_mm[b]
        squared = (away**2).sum(-1)
        bump = torch.exp(-squared / (2 * sigma_mm**2))
        if squared.min() <= ((spacing_mm[b] * step) ** 2).sum():  # not pushed out of the volume
            bump.view(-1)[squared.argmin()] = 1
        map_of_label = targets[b, int(points[b, p, 0])]
        torch.maximum(map_of_label, bump, out=map_of_label)
    return targets


def map_loss(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) loss of heat maps (B, 13, Z, h, w; logits of p q), summed over cells.

    Finding: focal, where cells near a point weigh (1 - target)^4 less as negatives (CornerNet,
    arXiv:1808.01244, eq. 1), which copes with one positive in 10,000 cells. Naming: cross entropy of q in the
    points' cells.
    """
    log_probs = F.logsigmoid(maps.float())
    log_found = torch.logsumexp(log_probs, 1).clamp(max=-1e-6)  # p: the sum over arteries
    found, target = log_found.exp(), targets.amax(1)
    hit = -((1 - found) ** 2) * log_found
    miss = -((1 - target) ** 4) * found**2 * torch.log1p(-found)
    naming = (log_found[:, None] - log_probs) * (targets == 1)
    return torch.where(target == 1, hit, miss).flatten(1).sum(1) + naming.flatten(1).sum(1)


def sample_losses(
    output: torch.Tensor | tuple,
    labels: torch.Tensor,
    points: torch.Tensor,
    spacing_mm: torch.Tensor,
    cfg: Config,
) -> torch.Tensor:
    """(B,) loss of every sample: its labels, and for a locator its maps too."""
    if cfg.task == "classify":
        return label_loss(output, labels, cfg.label_smoothing)
    logits, maps = output
    targets = map_targets(points, maps.shape, cfg.locator_stride, spacing_mm, cfg.heatmap_sigma_mm)
    return label_loss(logits, labels, cfg.label_smoothing) + cfg.heatmap_weight * map_loss(maps, targets)


# --- the schedule -------------------------------------------------------------------------------------------


def learning_rate(update: int, total: int, warmup: int, cfg: Config) -> float:
    """Rate of update number `update` (from 0): linear warm-up to cfg.lr, then a half cosine to cfg.min_lr at
    the end."""
    if update < warmup:
        return cfg.lr * (update + 1) / warmup
    share = (update - warmup) / max(1, total - warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def plan_epoch(
    num: int, seed: int, epoch: int, batch: int, world: int, accumulation: int
) -> list[list[list]]:
    """Who sees what: plan[update][micro step][rank] is an array of sample indices.

    Every sample comes once. The order depends on (seed, epoch) alone, so two processes of half the batch see
    in every update what one process sees. The last update shares what is left as evenly as it can; a rank may
    get nothing.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num)
    plan = []
    for start in range(0, num, batch * world * accumulation):
        group = order[start : start + batch * world * accumulation]
        steps = math.ceil(len(group) / (batch * world))
        parts = np.array_split(group, steps * world)
        plan.append([parts[step * world : (step + 1) * world] for step in range(steps)])
    return plan


# --- checkpoints for --resume -------------------------------------------------------------------------------


def save_last(folder: Path, trainee: Trainee, scaler: torch.amp.GradScaler | None, progress: dict) -> None:
    """Write last/<epoch>_<update>/ aside, sync, rename, then prune older ones. progress.json holds the files'
    sums."""
    from safetensors.torch import save

    target = folder / "last" / f"{progress['epoch']:04d}_{progress['group']:06d}"
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    optimizer = io.BytesIO()
    states = {"optimizer": trainee.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
    torch.save(states, optimizer)
    files, sums = {"optimizer.pt": optimizer.getvalue()}, {}
    for name, module in (("model", trainee.raw), ("ema", trainee.ema.module)):
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        files[f"{name}.safetensors"] = save(tensors)
    for name, data in files.items():
        common.write_atomic(aside / name, data)
        sums[name] = hashlib.sha256(data).hexdigest()
    common.write_atomic(aside / "progress.json", json.dumps({**progress, "sha256": sums}).encode())
    shutil.rmtree(target, ignore_errors=True)
    os.rename(aside, target)
    done = sorted((folder / "last").glob("[0-9]*"))
    half_written = (folder / "last").glob(".*.tmp")  # by a run that was killed
    for old in [*done[:-KEEP_CHECKPOINTS], *half_written]:
        shutil.rmtree(old)


def load_last(folder: Path) -> tuple[dict, dict] | None:
    """State and progress of the newest checkpoint that verifies; None where there is none. Says when it falls
    back."""
    from safetensors.torch import load_file

    checkpoints = sorted((p for p in (folder / "last").glob("[0-9]*")), reverse=True)
    for path in checkpoints:
        try:
            progress = json.loads((path / "progress.json").read_text())
            for name, expected in progress["sha256"].items():
                if hashlib.sha256((path / name).read_bytes()).hexdigest() != expected:
                    raise ValueError(f"{name} does not match its sum")
        except (OSError, ValueError, KeyError) as error:
            say(f"{path}: not usable ({error}); falling back to the one before")
            continue
        state = {name: load_file(path / f"{name}.safetensors") for name in ("model", "ema")}
        return state | torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True), progress
    if checkpoints:
        raise ValueError(f"{folder / 'last'}: no checkpoint verifies; start again with --overwrite")
    return None


@contextlib.contextmanager
def locked(folder: Path, accelerator: accelerate.Accelerator):
    """Hold folder/.lock for the run; a second run in the same folder gets ValueError, on every rank."""
    held = [True]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = [False]
    if not broadcast_object_list(held)[0]:
        raise ValueError(
            f"{folder}: another run is writing here; wait for it, or change seed, fold or outputs"
        )
    if not all(gather_object([(folder / ".lock").exists()])):
        raise ValueError(f"{folder}: not seen by every process; several machines need one shared folder")
    try:
        yield
    finally:
        if accelerator.is_main_process:
            lock.close()


# --- validation ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: torch.nn.Module, dataset: SeriesDataset, cfg: Config, accelerator
) -> tuple[np.ndarray, dict]:
    """Logits (N, 14) of every item on every rank, and for a locator {uid: peaks (n, 5)} (see
    common.find_peaks).

    Raises RuntimeError unless each index arrives exactly once.
    """
    model.eval()
    own = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    batches = [own[i : i + cfg.batch_size] for i in range(0, len(own), cfg.batch_size)]
    rows = []
    for batch in make_loader(dataset, batches, cfg, accelerator):
        images = batch["image"].to(accelerator.device, non_blocking=True).float() / 255
        with accelerator.autocast():
            output = model(*inputs(images, batch["scores"].to(accelerator.device), cfg))
        logits, maps = output if cfg.task == "locate" else (output, None)
        for i, index in enumerate(batch["index"].tolist()):
            peaks = None
            if maps is not None:
                probs = torch.sigmoid(maps[i].float()).cpu().numpy()
                peaks = common.propose(probs, batch["spacing_mm"][i].numpy(), cfg)
            rows.append((index, logits[i].float().cpu().numpy(), peaks))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    if [row[0] for row in rows] != list(range(len(dataset))):
        raise RuntimeError(
            f"validation saw {len(rows)} rows for {len(dataset)} series; expected each exactly once"
        )
    broken = [dataset.uids[index] for index, logits, _ in rows if not np.isfinite(logits).all()]
    if broken:
        raise FloatingPointError(
            f"validation: logits of {len(broken)} of {len(rows)} series are not finite, first {broken[0]}; "
            f"lower lr, or set precision: 'no'"
        )
    return np.stack([row[1] for row in rows]), {
        dataset.uids[row[0]]: row[2] for row in rows if row[2] is not None
    }


def make_loader(
    dataset: SeriesDataset, batches: list, cfg: Config, accelerator
) -> torch.utils.data.DataLoader:
    """A loader of the given index lists, in their order. Made anew each epoch, so workers see the epoch's
    number."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=quiet_worker,
    )


def quiet_worker(_: int) -> None:
    """One thread per loader process: they share the cores with the training process."""
    cv2.setNumThreads(0)
    # a signal to all processes of a job: the parent needs its workers until it has saved
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


def localisation(table: pd.DataFrame, peaks: dict, cfg: Config, reach_mm: float = 10.0) -> dict:
    """How well K proposals find annotated points, each value with its 95 % interval over patients.

    recall_10mm is the share of points with a proposal within reach_mm. false_per_negative counts, in a
    negative series, the proposals that score at least score_threshold: there half of all points are still
    found (nan where K proposals find fewer), so that locators are compared at one recall.
    """
    best = []  # of each series: the highest score near each of its points, -inf where none
    for row in table.itertuples():
        own = peaks[getattr(row, UID)]
        path = Path(cfg.cache) / f"{common.safe_uid(getattr(row, UID))}.safetensors"
        tensors, meta = common.load_volume(path, ["points"])
        away = (tensors["points"][:, None] - own[None, :, :3]) * np.array(json.loads(meta["spacing_mm"]))
        near = np.linalg.norm(away, axis=2) <= reach_mm  # (points, proposals)
        best.append(np.where(near, own[:, 3], -np.inf).max(axis=1, initial=-np.inf))
    scores = np.sort(np.concatenate(best))[::-1]
    threshold = scores[math.ceil(len(scores) / 2) - 1] if len(scores) else -np.inf
    threshold = float(threshold) if np.isfinite(threshold) else float("nan")
    negative = (table[LABELS[AP]] == 0).to_numpy()
    false = np.array([(peaks[uid][:, 3] >= threshold).sum() for uid in table[UID]])
    weights = np.concatenate(list(common.patient_weights(table["patient"], cfg.bootstrap)))  # (draws, N)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> list[float]:
        """Value, low, high of sum(top) / sum(bottom)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return [float(top.sum() / bottom.sum()), *common.interval((weights @ top) / (weights @ bottom))]

    false = false * negative if np.isfinite(threshold) else np.full(len(table), np.nan)
    return {
        "num_proposals": common.NUM_PROPOSALS,
        "recall_10mm": ratio(
            np.array([np.isfinite(b).sum() for b in best]), np.array([len(b) for b in best])
        ),
        "score_threshold": threshold,
        "false_per_negative": ratio(false, negative.astype(float)),
    }


# --- the run ------------------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """What one update changes: the bare model, the same wrapped for DDP and torch.compile, its EMA, the
    optimizer."""

    raw: torch.nn.Module
    model: torch.nn.Module
    ema: torch.nn.Module  # timm's ModelEmaV3
    optimizer: torch.optim.Optimizer


def train(cfg: Config, accelerator: accelerate.Accelerator, resume: bool, overwrite: bool) -> None:
    """Everything from an empty run folder to metrics.json; see the top of the file."""
    folder = Path(cfg.outputs) / cfg.run_name
    table = load_table(cfg)
    held_out = table[table["fold"] == cfg.fold].reset_index(drop=True)
    kept = table[table["fold"] != cfg.fold].reset_index(drop=True)
    locators = find_locators(cfg) if cfg.proposals else {}
    decoys, proposals = training_decoys(cfg, kept), load_proposals(cfg, table, locators)
    dataset = SeriesDataset(cfg, kept, "train", decoys, proposals)
    deployed = SeriesDataset(cfg, held_out, "deploy", decoys, proposals)
    refuse_used_folder(folder, resume, overwrite, accelerator)
    own = identity(cfg, kept, held_out, accelerator.num_processes)
    last = load_last(folder) if resume else None
    if last:
        refuse_other_run(folder, last[1].get("identity", {}), own)
    trainee, progress = begin(cfg, accelerator, last)
    progress["identity"] = own
    if overwrite and accelerator.is_main_process:  # not before the new run has been able to begin
        empty_folder(folder)
    accelerator.wait_for_everyone()
    if cfg.tracker:
        accelerator.init_trackers("aneurysm", config={k: str(v) for k, v in asdict(cfg).items()})
    in_force, num_weights = effective_precision(accelerator), sum(p.numel() for p in trainee.raw.parameters())
    say(
        f"{folder}: {len(kept)} series train, {len(held_out)} validate; {num_weights / 1e6:.1f} M weights; "
        f"{accelerator.num_processes} x {cfg.batch_size} x {cfg.accumulation} per update on "
        f"{accelerator.device.type}, precision {in_force}"
        + (f" ({cfg.precision} was asked for, which needs a GPU)" if in_force != cfg.precision else "")
    )
    meta = {
        "prior": kept[list(LABELS)].mean().round(6).tolist(),
        "decoys": decoys.tolist(),
        "fold": cfg.fold,
        "val_uids": held_out[UID].tolist(),
        "locator": locators[cfg.fold].name if locators else "",  # whose proposals validation saw
    }
    is_main, stop, started = (
        accelerator.is_main_process,
        StopSignal(),
        time.perf_counter() - progress["seconds"],
    )
    if is_main:
        write_config(folder / "config.yaml", cfg)

    def save() -> None:
        progress["seconds"] = time.perf_counter() - started
        loss_sum = sum(gather_object([progress["loss_sum"]]))
        if is_main:
            save_last(folder, trainee, accelerator.scaler, progress | {"loss_sum": loss_sum})
        accelerator.wait_for_everyone()

    while progress["epoch"] < cfg.epochs and not out_of_patience(progress, cfg):
        epoch, clock = progress["epoch"] + 1, time.perf_counter()
        waited = train_epoch(cfg, accelerator, trainee, dataset, progress, stop, save)
        train_loss = sum(gather_object([progress["loss_sum"]])) / len(dataset)
        logits, peaks = predict(trainee.ema.module, deployed, cfg, accelerator)
        seconds = time.perf_counter() - clock
        row = {"epoch": epoch, "lr": progress["lr"], "train_loss": train_loss}
        row |= validation_row(held_out, logits, cfg)
        row |= {"seconds": seconds, "data_wait": waited / seconds}
        row = {key: round(float(value), 6) for key, value in row.items()}
        progress["history"].append(row)
        progress |= {"epoch": epoch, "group": 0, "loss_sum": 0.0}
        say(
            f"epoch {epoch}/{cfg.epochs}: train loss {train_loss:.4f}, validation {row['val_loss']:.4f}, "
            f"wAUC {row['wauc']:.4f} ({row['low']:.3f} to {row['high']:.3f}), {seconds:.0f} s"
        )
        if is_better(row, progress["best"]):
            progress["best"] = row
            if is_main:
                best = meta | {"epoch": epoch, "wauc": row["wauc"]}
                write_best(folder, trainee.ema.module, cfg, best, held_out, logits, peaks)
        if is_main:
            common.write_atomic(
                folder / "log.csv", pd.DataFrame(progress["history"]).to_csv(index=False).encode()
            )
        accelerator.log(row, step=epoch)
        save()
    finish(folder, cfg, accelerator, held_out, decoys, proposals, progress)


def begin(cfg: Config, accelerator, last: tuple[dict, dict] | None) -> tuple[Trainee, dict]:
    """Model, EMA and optimizer, new or from the last checkpoint, and how far the run is."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    torch.manual_seed(cfg.seed)
    model = raw = common.build_model(cfg, pretrained=last is None).to(accelerator.device)
    # fp16: a fused step that the scaler skips is not reported as skipped; before torch 2.4 the CPU has none
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    fused = accelerator.scaler is None and (accelerator.device.type == "cuda" or version >= (2, 4))
    optimizer = create_optimizer_v2(model, "adamw", lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    ema = ModelEmaV3(model, decay=cfg.ema_decay, use_warmup=True, foreach=True)
    if cfg.compile:
        model = torch.compile(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = {
        "epoch": 0,
        "group": 0,
        "updates": 0,
        "lr": 0.0,  # of the last update
        "history": [],
        "best": None,
        "loss_sum": 0.0,
        "seconds": 0.0,
    }
    if last is not None:
        state, progress = last
        raw.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if not accelerator.is_main_process:
            progress["loss_sum"] = 0.0  # the saved one is the sum over ranks
        say(f"resumed after epoch {progress['epoch']} and {progress['group']} updates of the next")
    return Trainee(raw, model, ema, optimizer), progress


def train_epoch(
    cfg: Config, accelerator, trainee: Trainee, dataset: SeriesDataset, progress: dict, stop, save
) -> float:
    """The updates of one epoch from progress["group"] on; -> the seconds spent waiting for data.

    Raises FloatingPointError at a loss that is not finite, SystemExit(143) after SIGTERM with all saved.
    """
    epoch, rank, world = progress["epoch"], accelerator.process_index, accelerator.num_processes
    plan = plan_epoch(len(dataset), cfg.seed, epoch, cfg.batch_size, world, cfg.accumulation)
    total, warmup = cfg.epochs * len(plan), max(1, round(cfg.warmup_epochs * len(plan)))
    todo, waited = plan[progress["group"] :], 0.0
    own = [step[rank] for group in todo for step in group]
    dataset.epoch = epoch
    batches = [part.tolist() if len(part) else [0] for part in own]  # an idle rank works along with weight 0
    loader = iter(make_loader(dataset, batches, cfg, accelerator))
    trainee.model.train()
    bar = common.progress(len(plan), progress["group"], f"epoch {epoch + 1}", accelerator.is_main_process)
    for group in todo:
        # torch's randomness (drop path) depends on the update alone, so a resumed run repeats it
        torch.manual_seed(hash_seed(cfg.seed, epoch, progress["group"], rank))
        progress["lr"] = learning_rate(progress["updates"], total, warmup, cfg)
        for settings in trainee.optimizer.param_groups:
            settings["lr"] = progress["lr"]
        size, seen = sum(len(part) for step in group for part in step), []
        for step in group:
            clock = time.perf_counter()
            item = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(loader).items()}
            waited += time.perf_counter() - clock
            # DDP averages over ranks; every sample of the update shall weigh 1 / size
            weight = world / size if len(step[rank]) else 0.0
            with contextlib.nullcontext() if step is group[-1] else accelerator.no_sync(trainee.model):
                images, labels, points = augment(item, cfg)
                flipped = item["augment"][:, :1] > 0.5
                scores = torch.where(flipped, item["scores"][:, SWAP], item["scores"])
                with accelerator.autocast():
                    output = trainee.model(*inputs(images, scores, cfg))
                losses = sample_losses(output, labels, points, item["spacing_mm"], cfg)
                accelerator.backward(losses.sum() * weight)
            seen.append((losses.detach(), item["index"], weight > 0))
        if cfg.clip_grad:
            accelerator.clip_grad_norm_(trainee.model.parameters(), cfg.clip_grad)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        progress["group"] += 1
        if not accelerator.optimizer_step_was_skipped:
            progress["updates"] += 1
            trainee.ema.update(trainee.raw, step=progress["updates"])
        for losses, index, counts in seen:  # here the device is waited for, once an update
            if not torch.isfinite(losses).all():
                raise FloatingPointError(
                    f"loss is {losses.tolist()} in epoch {epoch + 1}, update {progress['group']}, "
                    f"series {', '.join(dataset.uids[i] for i in index.tolist())}; "
                    f"lower lr or clip_grad, or look at these series"
                )
            progress["loss_sum"] += float(losses.sum()) * counts
        bar.update()
        if stop.asked(accelerator):
            save()
            raise SystemExit(143)
    bar.close()
    if world > 1:  # rank 0's BatchNorm statistics count, as in DDP's forward and in a checkpoint
        from timm.utils.distributed import distribute_bn

        distribute_bn(trainee.ema.module, world, reduce=False)
        distribute_bn(trainee.raw, world, reduce=False)
    return waited


def finish(
    folder: Path,
    cfg: Config,
    accelerator,
    held_out: pd.DataFrame,
    decoys: np.ndarray,
    proposals: dict | None,
    progress: dict,
) -> None:
    """metrics.json of the best epoch, read back from its files; with annotated crops only as a diagnostic."""
    accelerator.wait_for_everyone()
    oof = pd.read_csv(folder / "oof.csv", dtype={UID: str, "patient": str})
    assert oof[UID].tolist() == held_out[UID].tolist()
    probs = oof[list(LABELS)].to_numpy()
    truth, patients = held_out[list(LABELS)].to_numpy(float), held_out["patient"]
    metrics = common.score(held_out, probs, cfg.bootstrap) if accelerator.is_main_process else {}
    # what the same weights score with other crops: "oracle" has the annotated ones
    others = {"oracle": len(decoys) > 0, "deploy": proposals is not None} if cfg.task == "classify" else {}
    for mode in [name for name, wanted in others.items() if wanted]:
        run = common.load_run(folder, accelerator.device)
        kept = {u: replace(p, places=p.places[:0]) for u, p in (proposals or {}).items()}  # its scores alone
        logits, _ = predict(run.model, SeriesDataset(cfg, held_out, mode, decoys, kept), cfg, accelerator)
        if accelerator.is_main_process:
            other = common.sigmoid(logits)
            spread = common.bootstrap(truth, other, patients, cfg.bootstrap)
            value = [common.weighted_auc(truth, other)["wauc"], spread["low"], spread["high"]]
            if mode == "oracle":
                leak = common.compare(truth, other, probs, patients, cfg.bootstrap)
                metrics |= {"oracle_wauc": value, "leak": leak, "oracle_note": ORACLE_NOTE}
            else:
                gain = common.compare(truth, probs, other, patients, cfg.bootstrap)
                metrics |= {"wauc_without_proposals": value, "gain_of_proposals": gain}
    if not accelerator.is_main_process:
        return
    if cfg.task == "locate":
        rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
        columns = ["z", "y", "x", "score", "label"]
        peaks = {uid: rows.loc[rows[UID] == uid, columns].to_numpy(np.float32) for uid in held_out[UID]}
        metrics |= localisation(held_out, peaks, cfg)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    metrics |= {
        "best_epoch": progress["best"]["epoch"],
        "epochs": progress["epoch"],
        "history": progress["history"],
        "seconds": round(progress["seconds"], 1),
        "peak_memory_gb": round(peak, 3),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "precision": effective_precision(accelerator),
        "num_processes": accelerator.num_processes,
        "versions": {
            m: importlib.import_module(m).__version__ for m in ("torch", "timm", "accelerate", "numpy")
        },
        "finished": True,
    }
    common.write_atomic(folder / "metrics.json", json.dumps(clean(metrics), indent=1).encode())
    undefined = (
        f"; without an AUC (one class): {', '.join(metrics['undefined'])}" if metrics["undefined"] else ""
    )
    say(
        f"{folder}: best epoch {metrics['best_epoch']:.0f}, wAUC {metrics['wauc']:.4f} (95 % interval "
        f"{metrics['low']:.4f} to {metrics['high']:.4f}, {metrics['num_patients']} patients){undefined}"
    )


def refuse_used_folder(folder: Path, resume: bool, overwrite: bool, accelerator) -> None:
    """ValueError, on every rank, for a folder that holds a run, unless the user said what to do with it."""
    problem = [""]
    if accelerator.is_main_process and not overwrite:
        if (folder / "metrics.json").exists():
            problem = [f"{folder}: holds a finished run; --overwrite trains it again, or change seed or fold"]
        elif (folder / "last").exists() and not resume:
            problem = [
                f"{folder}: holds an unfinished run; --resume goes on with it, --overwrite starts again"
            ]
    problem = broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])


def empty_folder(folder: Path) -> None:
    """Delete all that an earlier run left, but for the lock that this one holds."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def identity(cfg: Config, kept: pd.DataFrame, held_out: pd.DataFrame, num_processes: int) -> dict:
    """What a resumed run must share with the run that it goes on with: settings, processes, series of each
    part."""
    free = ("cache", "outputs", "workers", "tracker", "ensemble_weight")
    settings = {key: value for key, value in json.loads(json.dumps(asdict(cfg))).items() if key not in free}
    parts = {"training series": kept, "validation series": held_out}
    sums = {name: hashlib.sha256(" ".join(part[UID]).encode()).hexdigest() for name, part in parts.items()}
    return settings | {"processes": num_processes} | sums


def refuse_other_run(folder: Path, begun: dict, now: dict) -> None:
    """ValueError where a resumed run would differ from the one that it goes on with."""
    changed = [key for key in now if begun.get(key) != now[key]]
    differ = [f"{key} {str(begun.get(key))[:40]} (now {str(now[key])[:40]})" for key in changed]
    if differ:
        raise ValueError(
            f"{folder}: cannot resume, the run was begun with {', '.join(differ)}; "
            f"resume with the same, or start again with --overwrite"
        )


def write_best(
    folder: Path, model, cfg: Config, meta: dict, held_out: pd.DataFrame, logits: np.ndarray, peaks: dict
):
    """best_ema.safetensors, oof.csv and for a locator proposals.csv, each atomic."""
    columns = [UID, "patient", "Modality", "plane"]
    oof = held_out[columns].rename(columns={"Modality": "modality"})
    probs = pd.DataFrame(common.sigmoid(logits), columns=list(LABELS))
    truth = held_out[list(LABELS)].rename(columns=lambda name: f"label {name}")
    common.write_atomic(
        folder / "oof.csv",
        pd.concat([oof, probs, truth], axis=1).to_csv(index=False, float_format="%.12g").encode(),
    )
    if peaks:
        rows = pd.concat(
            pd.DataFrame(p, columns=["z", "y", "x", "score", "label"]).assign(**{UID: uid})
            for uid, p in peaks.items()
        )
        rows = rows[[UID, "z", "y", "x", "score", "label"]].astype({"label": int})
        common.write_atomic(folder / "proposals.csv", rows.to_csv(index=False).encode())
    common.save_checkpoint(folder / "best_ema.safetensors", model, cfg, meta)


def validation_row(held_out: pd.DataFrame, logits: np.ndarray, cfg: Config) -> dict:
    truth = held_out[list(LABELS)].to_numpy(float)
    result = common.weighted_auc(truth, logits)
    spread = common.bootstrap(truth, logits, held_out["patient"], cfg.bootstrap)
    loss = label_loss(torch.tensor(logits), torch.tensor(truth).float(), cfg.label_smoothing).mean()
    return {
        "val_loss": float(loss),
        "wauc": result["wauc"],
        "low": spread["low"],
        "high": spread["high"],
        "auc_present": result["auc"][AP],
    }


def write_config(path: Path, cfg: Config) -> None:
    values = json.loads(json.dumps(asdict(cfg)))  # tuples as lists, so that the YAML is ordinary
    common.write_atomic(path, yaml.safe_dump(values, sort_keys=False).encode())


def is_better(row: dict, best: dict | None) -> bool:
    """Higher wAUC; where it is undefined (a fold with one class), lower validation loss. The first of equals
    stays."""
    if best is None:
        return True
    if math.isnan(row["wauc"]) or math.isnan(best["wauc"]):
        return row["val_loss"] < best["val_loss"]
    return round(row["wauc"], 6) > best["wauc"]


def out_of_patience(progress: dict, cfg: Config) -> bool:
    return bool(
        cfg.patience and progress["best"] and progress["epoch"] - progress["best"]["epoch"] >= cfg.patience
    )


class StopSignal:
    """Remembers SIGTERM, so that the loop can end between two updates with a checkpoint."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))

    def asked(self, accelerator) -> bool:
        """Whether any rank was told to stop; all ranks learn it at the same update."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor([float(self.received)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item() > 0)


def use_cores(accelerator: accelerate.Accelerator) -> None:
    """`accelerate launch` gives a single CPU process one thread (OMP_NUM_THREADS=1): let it use all cores."""
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if launched and accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def hash_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def clean(value):
    """JSON has no nan: null instead."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def effective_precision(accelerator: accelerate.Accelerator) -> str:
    """What really runs: fp16 asked for on a CPU is fp32 without a word from Accelerate."""
    if accelerator.scaler is not None:
        return "fp16"
    return "bf16" if accelerator.native_amp and accelerator.mixed_precision == "bf16" else "no"


def say(text: str) -> None:
    """One line on stderr, from the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; without it the defaults of common.Config")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with an unfinished run, if there is one")
    either.add_argument("--overwrite", action="store_true", help="delete what the run folder holds")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    try:
        cfg = common.load_config(args.config, args.set)
        if cfg.tracker and importlib.util.find_spec(cfg.tracker) is None:
            raise ValueError(
                f"tracker: {cfg.tracker} is not installed; pip install {cfg.tracker}, or tracker=''"
            )
        folder = Path(cfg.outputs) / cfg.run_name
        accelerator = accelerate.Accelerator(
            mixed_precision=cfg.precision,
            log_with=cfg.tracker or None,
            project_dir=folder if cfg.tracker else None,
        )
        use_cores(accelerator)
        with locked(folder, accelerator):
            train(cfg, accelerator, args.resume, args.overwrite)
        accelerator.end_training()
    except SystemExit as stopped:  # by SIGTERM, with all saved
        return stopped.code
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(
            f"train.py: out of memory ({str(error).splitlines()[0]}). Lower batch_size (and raise "
            f"accumulation), set grad_checkpointing: true, or lower img_size",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    common.leave(main())
