"""Train one member of the ensemble: one model, one seed, one validation fold.

in   --config YAML   settings (common.Config); the cache it names, filled by preprocess.py, with train.csv
out  outputs/<model>_seed<S>_fold<F>/
                     best_ema.safetensors (weights and all that infer.py needs), metrics.json, config.yaml,
                     log.csv (a row per epoch), oof.csv (validation predictions), last/ (for --resume);
                     of a locator (task: locate) proposals.csv: where it would crop in its validation fold
run  accelerate launch train.py --config configs/fold0.yaml
     accelerate launch train.py --config configs/fold0.yaml --set seed=1 --set lr=5.0e-5 --resume
     ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train.py --config configs/demo.yaml

`accelerate launch` takes every GPU of the machine; --num_processes 1 takes one, and --quiet leaves out the
launcher's own traceback after a failure. lr belongs to the global batch, batch_size x processes x
accumulation, which the first line names: with more processes lower batch_size, or raise lr.

Validation sees what a new patient has: no annotated crop ever, only decoys or a locator's proposals.
A run that was stopped or killed goes on after its last finished epoch and ends with the same bits.
exit 0 trained, 1 refused or failed (one line says why), 2 wrong usage, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import AP, LABELS, SWAP, UID, Config, Output, SeriesDataset
from dicom import to_lps

ORACLE_NOTE = "oracle_wauc uses annotated crops that no new patient has: a diagnostic, not a score"
SPECIFICITIES = (0.90, 0.95)  # of `Aneurysm Present`
FALSE_PER_SCAN = (0.25, 0.5, 1.0, 2.0)  # proposals away from every annotated point
REACH_MM = 10.0  # a proposal this close to an annotated point finds it
PLACE = ["x_mm", "y_mm", "z_mm"]  # LPS
PROPOSAL_COLUMNS = [UID, *PLACE, "score", "label"]
KEEP_CHECKPOINTS = 2  # of last/: the newest and one to fall back to


# --- the series to train on ---------------------------------------------------------------------------------


def load_table(cfg: Config, limit: int = 10**9) -> pd.DataFrame:
    """A row per cached and labelled series, or for the first `limit` of them: UID, patient, Modality, plane,
    the 14 labels, fold.

    Raises ValueError that lists every fault of the labels, or else every fault of the cache, so that one run
    shows them all.
    """
    table = merge_labels(cfg)
    table = table.sort_values(UID, ignore_index=True)[:limit].copy()
    faults = check_volumes(cfg, table)
    num_patients = table["patient"].nunique()
    if num_patients < cfg.num_folds:
        faults[f"table with fewer patients than num_folds, {cfg.num_folds}"] = [str(num_patients)]
    if faults:
        texts = []
        for fault, places in faults.items():
            texts.append(f"{len(places)} x {fault}: {', '.join(places[:3])}")
        raise ValueError(f"{cfg.cache}: cannot train: {'; '.join(texts)}")
    table["fold"] = make_folds(table, cfg.num_folds, cfg.fold_seed)
    return table


def merge_labels(cfg: Config) -> pd.DataFrame:
    """The rows of train.csv whose volumes are in the cache, with their patient and plane of index.csv; says
    how many series it leaves out."""
    cache = Path(cfg.cache)
    files = [cache / "index.csv", cache / "train.csv"]
    if not all(path.is_file() for path in files):
        raise ValueError(
            f"{cache}: lacks index.csv or train.csv; expected a cache with labels: put train.csv beside the "
            f"series and run python preprocess.py --src dicoms --dst {cache}"
        )
    labels = common.read_label_table(cache / "train.csv")
    if "Modality" not in labels:
        raise ValueError(f"{cache / 'train.csv'}: column missing: Modality; folds are balanced over it")
    index = pd.read_csv(cache / "index.csv", dtype=str, keep_default_na=False)
    table = labels.merge(index[[UID, "status", "patient", "plane"]], on=UID, how="left")
    status = table["status"].fillna("not in the cache")
    is_usable = status.isin(["ok", "doubtful"] if cfg.use_doubtful else ["ok"])
    left_out = status[~is_usable].value_counts().to_dict()
    is_labelled = index[UID].isin(labels[UID])
    left_out["without labels"] = (~is_labelled).sum()
    counts = [f"{count} {reason}" for reason, count in left_out.items() if count]
    if counts:
        common.log(f"{cache}: {is_usable.sum()} series; left out: {', '.join(counts)}")
    table = table[is_usable].copy()
    table["patient"] = table["patient"].where(table["patient"] != "", table[UID])
    return table


def check_volumes(cfg: Config, table: pd.DataFrame) -> dict[str, list[str]]:
    """What is wrong with the volumes, and with which: unreadable, of other settings, with shared images."""
    faults = defaultdict(list)
    series_of_image = {}
    expected = common.volume_settings(cfg)
    for uid in table[UID]:
        try:
            tensors, meta = common.load_volume(common.volume_path(cfg.cache, uid), ["sop_hashes"])
        except (OSError, ValueError) as error:
            faults["unreadable volume"].append(str(error))
            continue
        difference = common.describe_difference(meta["settings"], expected)
        if difference:
            faults[f"volume made with {difference}; use preprocess.py --config, or other settings"].append(
                uid
            )
        others = {series_of_image.setdefault(image, uid) for image in tensors["sop_hashes"].tolist()}
        for other in others - {uid}:
            faults["pair of series that share a (0008,0018) SOPInstanceUID"].append(f"{other} and {uid}")
    return faults


def make_folds(table: pd.DataFrame, num_folds: int, seed: int) -> pd.Series:
    """Fold of every row; a patient's series share one. Neither the order of the rows matters nor the names of
    the patients, which each cache hides by another key.

    table has UID, `patient`, `Modality` and the 14 labels. Patients come rarest positive location first; each
    goes to the fold that it leaves most even: the least growth of sum((count / total)^2) over the columns, so
    that a rare location weighs more than presence or a modality.
    """
    labels = table[list(LABELS)].astype(float)
    modalities = pd.get_dummies(table["Modality"]).astype(float)
    is_absent = (1 - table[LABELS[AP]]).rename("absent")
    columns = pd.concat([labels, modalities, is_absent], axis=1)
    patients = table.groupby("patient")[UID].transform("min")  # the first of a patient's series names it
    per_patient = columns.groupby(patients).sum()
    counts = per_patient.to_numpy()  # (patients, columns)
    total = np.maximum(counts.sum(0), 1)
    rarity = np.where(counts > 0, total, np.inf).min(1)
    shuffled = np.random.default_rng([seed, 1]).permutation(len(counts))
    filled = np.zeros((num_folds, counts.shape[1]))
    folds = {}
    for i in shuffled[np.argsort(rarity[shuffled], kind="stable")]:
        grown = (filled + counts[i]) ** 2 - filled**2
        growth = (grown / total**2).sum(1)
        fold = int(np.argmin(growth))  # the lowest fold of several equal ones
        filled[fold] += counts[i]
        folds[per_patient.index[i]] = fold
    return patients.map(folds)


def collect_decoys(cfg: Config, train_table: pd.DataFrame) -> np.ndarray:
    """(M, 3) annotated places of the training series as fractions (z, y, x) of the volume; empty without
    crops."""
    if not cfg.num_crops:
        return np.zeros((0, 3))
    shape = (cfg.volume.base_slices, cfg.volume.img_size, cfg.volume.img_size)
    parts = []
    for uid in train_table[UID]:
        tensors, _ = common.load_volume(common.volume_path(cfg.cache, uid), ["points"])
        parts.append(tensors["points"])
    points = np.concatenate(parts)
    points = points[common.is_inside(points, shape)]
    if not len(points):
        common.log("no annotated points in the training folds: all crop channels stay empty")
    return ((points + 0.5) / shape).round(4)


def load_proposals(cfg: Config, table: pd.DataFrame) -> tuple[dict[str, np.ndarray] | None, str]:
    """(n, 3) places in LPS mm by series, best first, each from the locator that did not train on it, and the
    name of the locator of this run's fold; None without `proposals`.

    Raises ValueError unless there is one finished locator for each of this run's folds.
    """
    if not cfg.proposals:
        return None, ""
    names = {}
    proposals = {}
    for path in sorted(glob.glob(f"{cfg.proposals}/proposals.csv")):
        folder = Path(path).parent
        locator_cfg = common.load_config(folder / "config.yaml")
        fold = locator_cfg.fold
        rows = pd.read_csv(path, dtype={UID: str})
        is_finished = (folder / "metrics.json").exists()
        has_folds = (locator_cfg.num_folds, locator_cfg.fold_seed) == (cfg.num_folds, cfg.fold_seed)
        has_series = set(rows[UID]) == set(table[UID][table["fold"] == fold])
        if not (is_finished and has_folds and has_series):
            raise ValueError(
                f"{folder}: finished {is_finished}, num_folds {locator_cfg.num_folds}, fold_seed "
                f"{locator_cfg.fold_seed}, {rows[UID].nunique()} series in fold {fold}; expected a finished "
                f"locator of num_folds {cfg.num_folds}, fold_seed {cfg.fold_seed} and this run's series"
            )
        if fold in names:
            raise ValueError(f"proposals: {folder} and {names[fold]} validate the same fold; expected one")
        names[fold] = folder.name
        for uid, places in rows.groupby(UID):
            proposals[uid] = places[PLACE].to_numpy()
    if len(names) < cfg.num_folds:
        raise ValueError(
            f"proposals {cfg.proposals!r}: locators of {len(names)} of {cfg.num_folds} folds; train every "
            f"fold of the locator first (task: locate)"
        )
    return proposals, names[cfg.fold]


# --- the batch ----------------------------------------------------------------------------------------------


def augment(batch: dict[str, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Apply each sample's drawn augmentation on the device: -> images (B, C, H, W) in [0, 1], labels, points.

    Flip (all channels, labels swapped), slab shift and drop-out, rotation, scale and shift in plane (slabs
    only: crops have a centre to themselves), gain and offset (all). What only moves bytes happens before they
    become floats. points (B, 8, 4) follow; label -1 means that a row holds no point.
    """
    images = batch["image"]
    labels = batch["labels"]
    points = batch["points"].clone()
    slabs = cfg.volume.base_slices
    extent = images.shape[-1]
    values = batch["augment"][:, : common.NUM_AUGMENT, None, None]
    flip, degrees, scale, dx, dy, gain, offset, step = values.unbind(1)  # each (B, 1, 1)
    is_shown = batch["augment"][:, common.NUM_AUGMENT :]

    # Labels and crops of mirrored samples; the grid below mirrors slabs and points on the way.
    is_flipped = flip[:, 0] > 0.5  # (B, 1)
    labels = torch.where(is_flipped, labels[:, SWAP], labels)
    swap = points.new_tensor([*SWAP, -1])  # the last one for rows without a point
    names = points[..., 0]
    points[..., 0] = torch.where(is_flipped, swap[names.long()], names)
    crops = images[:, slabs:]
    crops = torch.where(is_flipped[..., None, None], common.mirror(crops), crops)

    source = torch.arange(slabs, device=images.device) - step[:, 0].long()  # (B, Z)
    is_shown = is_shown * ((source >= 0) & (source < slabs))
    rows = torch.arange(len(images), device=images.device)[:, None]
    moved = images[rows, source.clamp(0, slabs - 1)]
    moved = moved * is_shown[..., None, None].to(images.dtype)
    points[..., 1:2] += step

    # out(p) = in(mirror(R p / scale + shift)) in [-1, 1] coordinates; a point moves by the inverse.
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.cat([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    shift = torch.cat([dx, dy], dim=1) * 2 / cfg.volume.roi_mm  # (B, xy, 1)
    mirrored = torch.cat([1 - 2 * flip, torch.ones_like(flip)], dim=1)
    theta = torch.cat([rotation / scale, shift], dim=2) * mirrored
    grid = F.affine_grid(theta, moved.shape, align_corners=False)
    moved = F.grid_sample(moved.float(), grid, align_corners=False)  # 0 outside
    centred = (2 * points[..., [3, 2]] + 1) / extent - 1  # (B, 8, xy)
    centred = (centred * mirrored.mT - shift.mT) @ rotation * scale
    points[..., [3, 2]] = ((centred + 1) * extent - 1) / 2

    images = torch.cat([moved, crops.float()], dim=1)
    pixels = images.flatten(2)  # a view
    pixels.mul_(gain / 255).add_(offset).clamp_(0, 1)
    return images, labels, points


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(B,) binary cross entropy of logits (B, 14), mean over labels; targets are smoothing/2 and 1 -
    smoothing/2."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)


def map_targets(
    points: Tensor, shape: torch.Size, stride: int, spacing_mm: Tensor, sigma_mm: float
) -> Tensor:
    """Targets of maps of that shape (B, 13, Z, h, w): Gaussians around points (B, 8, 4: label, z, y, x in
    voxels), 1 in the cell nearest to each. spacing_mm (B, 3) is the volume's; cells are stride voxels wide.
    """
    targets = points.new_zeros(shape)
    step = points.new_tensor([1, stride, stride])
    axes = [torch.arange(size, device=points.device) for size in shape[2:]]
    cells = torch.cartesian_prod(*axes).view(*shape[2:], 3)  # (Z, h, w, zyx)
    centres = cells * step + (step - 1) / 2  # voxels
    for b, p in (points[..., 0] >= 0).nonzero().tolist():
        away_mm = (centres - points[b, p, 1:]) * spacing_mm[b]
        squared = (away_mm**2).sum(-1)
        bump = torch.exp(-squared / (2 * sigma_mm**2))
        is_in_volume = squared.min() <= ((spacing_mm[b] * step) ** 2).sum()
        if is_in_volume:
            bump.view(-1)[squared.argmin()] = 1
        label_map = targets[b, int(points[b, p, 0])]
        torch.maximum(label_map, bump, out=label_map)
    return targets


def map_loss(maps: Tensor, targets: Tensor) -> Tensor:
    """(B,) loss of heat maps (B, 13, Z, h, w; logits of p q), summed over cells.

    Finding: focal, where cells near a point weigh (1 - target)^4 less as negatives (CornerNet,
    arXiv:1808.01244, eq. 1), which copes with one positive in 10,000 cells. Naming: cross entropy of q in the
    points' cells.
    """
    log_probs = F.logsigmoid(maps.float())
    log_find = torch.logsumexp(log_probs, 1).clamp(max=-1e-6)  # p: the sum over arteries
    find = log_find.exp()
    target = targets.amax(1)
    positive_loss = -((1 - find) ** 2) * log_find
    negative_loss = -((1 - target) ** 4) * find**2 * torch.log1p(-find)
    finding = torch.where(target == 1, positive_loss, negative_loss)
    naming = (log_find[:, None] - log_probs) * (targets == 1)
    return finding.flatten(1).sum(1) + naming.flatten(1).sum(1)


def sample_losses(output: Output, labels: Tensor, points: Tensor, spacing_mm: Tensor, cfg: Config) -> Tensor:
    """(B,) float32 loss of every sample: its labels, and its maps where the model makes them."""
    losses = label_loss(output.logits, labels, cfg.label_smoothing)
    if output.maps is not None:
        shape = output.maps.shape
        targets = map_targets(points, shape, cfg.locator_stride, spacing_mm, cfg.heatmap_sigma_mm)
        losses = losses + cfg.heatmap_weight * map_loss(output.maps, targets)
    return losses


# --- the loop -----------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is, in plain values."""

    identity: dict  # of the run; see describe_run
    epoch: int = 0  # finished ones
    updates: int = 0  # that changed the weights: a scaler may skip some
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)  # rows of log.csv
    best: dict = field(default_factory=lambda: {"epoch": 0, "wauc": -math.inf, "val_loss": math.inf})


@dataclass
class TrainState:
    """All that training changes."""

    raw: nn.Module
    model: nn.Module  # raw, wrapped by DDP where there are several processes
    ema: nn.Module  # timm's ModelEmaV3
    optimizer: torch.optim.Optimizer
    progress: Progress


def train_epoch(
    cfg: Config, accelerator: Accelerator, state: TrainState, dataset: SeriesDataset
) -> tuple[float, float]:
    """The updates of one epoch -> (this rank's losses added up, seconds that it waited for data).

    Raises FloatingPointError at a loss that is NaN or infinite.
    """
    progress = state.progress
    rank = accelerator.process_index
    plan = plan_epoch(len(dataset), cfg, progress.epoch, rank, accelerator.num_processes)
    total = cfg.epochs * len(plan)
    warmup = max(1, round(cfg.warmup_epochs * len(plan)))
    loss_sum = 0.0
    waits = []
    dataset.epoch = progress.epoch
    indices = [indices for update in plan for indices, _ in update]
    batches = load_batches(dataset, indices, cfg, accelerator.device, waits)
    bar = common.progress(len(plan), f"epoch {progress.epoch + 1}", accelerator.is_main_process)
    state.model.train()
    for number, update in enumerate(plan):
        # Drop path draws from torch's generator. Seeded by the place in the run alone, it repeats after a
        # resume, whatever the process has drawn before.
        seeds = np.random.SeedSequence([cfg.seed, progress.epoch, number, rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(progress.updates, total, warmup, cfg)
        losses = []
        for _, weight in update:
            batch = next(batches)
            images, labels, points = augment(batch, cfg)
            with accelerator.autocast():
                output = state.model(images)
            batch_losses = sample_losses(output, labels, points, batch["spacing_mm"], cfg)
            # Gradients add up over the batches of an update, and DDP averages them over ranks.
            accelerator.backward(batch_losses.sum() * weight)
            losses.append(batch_losses.detach() * (weight > 0))
        if cfg.clip_grad:
            accelerator.clip_grad_norm_(state.model.parameters(), cfg.clip_grad)
        state.optimizer.step()
        state.optimizer.zero_grad()
        # Where gradients overflow in fp16 the scaler skips the step; the rate and the EMA wait as well.
        if not accelerator.optimizer_step_was_skipped:
            progress.updates += 1
            state.ema.update(state.raw, step=progress.updates)
        loss_sum += add_losses(torch.cat(losses), update, dataset, number)
        bar.update()
    bar.close()
    share_batchnorm(state, accelerator.num_processes)
    return loss_sum, sum(waits)


def plan_epoch(
    num: int, cfg: Config, epoch: int, rank: int, world: int
) -> list[list[tuple[list[int], float]]]:
    """The batches that a rank sees, by update: sample indices, and the weight of their losses in the
    gradient. Over all ranks every sample comes once.

    The order depends on (seed, epoch) alone, so two processes of half the batch see in every update what one
    process sees. The last update shares what is left as evenly as it can. A rank that gets nothing works
    along on sample 0 with weight 0, since the others wait for its gradients.
    """
    order = np.random.default_rng([cfg.seed, epoch]).permutation(num)
    size = cfg.batch_size * world * cfg.accumulation
    plan = []
    for start in range(0, num, size):
        group = order[start : start + size]
        num_steps = math.ceil(len(group) / (cfg.batch_size * world))
        parts = np.array_split(group, num_steps * world)[rank::world]
        weight = world / len(group)  # DDP averages over ranks, so scale: each sample weighs 1 / len(group)
        update = []
        for part in parts:
            update.append((part.tolist(), weight) if len(part) else ([0], 0.0))
        plan.append(update)
    return plan


def learning_rate(update: int, total: int, warmup: int, cfg: Config) -> float:
    """Rate of update number `update` (from 0): linear warm-up to cfg.lr, then a half cosine to cfg.min_lr at
    the end."""
    if update < warmup:
        return cfg.lr * (update + 1) / warmup
    share = min(1.0, (update - warmup) / max(1, total - warmup))
    height = (1 + math.cos(math.pi * share)) / 2
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * height


def add_losses(losses: Tensor, update: list[tuple], dataset: SeriesDataset, number: int) -> float:
    """The sum of an update's losses; synchronises with the GPU, once per update."""
    total = losses.sum().item()
    if not math.isfinite(total):
        uids = [dataset.uids[i] for indices, _ in update for i in indices]
        raise FloatingPointError(
            f"loss is {losses.tolist()} in epoch {dataset.epoch + 1}, update {number + 1}, series "
            f"{', '.join(uids)}; lower lr or clip_grad, or check these series"
        )
    return total


def share_batchnorm(state: TrainState, world: int) -> None:
    """Give all ranks the BatchNorm statistics of rank 0: DDP agrees on weights alone."""
    if world > 1:
        from timm.utils.distributed import distribute_bn

        distribute_bn(state.ema.module, world, reduce=False)
        distribute_bn(state.raw, world, reduce=False)


def load_batches(
    dataset: SeriesDataset, batches: list[list[int]], cfg: Config, device: torch.device, waits: list[float]
) -> Iterator[dict[str, Tensor]]:
    """The batches of these indices, in their order, on the device; waits takes the seconds waited for each.

    The loader is made anew each epoch, so its processes see the epoch's number. Raises ValueError that names
    the series which could not be loaded.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    items = iter(loader)
    # PyTorch's handler would report a dead process wherever training stands; next() notices it as well, and
    # knows the series.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for indices in batches:
        clock = time.perf_counter()
        try:
            batch = next(items)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            uids = ", ".join(dataset.uids[i] for i in indices)
            raise ValueError(f"series {uids}: {reason}") from error
        waits.append(time.perf_counter() - clock)
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def start_worker(_: int) -> None:
    """One thread per loader process: they share the cores with the training process. Signals go to all
    processes of a job; that one answers, and ends its loaders."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


# --- validation ---------------------------------------------------------------------------------------------


def predict(
    model: nn.Module, dataset: SeriesDataset, cfg: Config, accelerator: Accelerator
) -> tuple[np.ndarray, list[list]]:
    """Logits (N, 14) of every item, on every rank, and of a model with maps the rows of proposals.csv."""
    model.eval()
    order = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    answers = []
    for batch in load_batches(dataset, batches, cfg, accelerator.device, []):
        with torch.inference_mode(), accelerator.autocast():
            output = model(batch["image"].float() / 255)
        logits = output.logits.float().cpu().numpy()
        spacing_mm = batch["spacing_mm"].cpu().numpy()
        affine = batch["affine"].cpu().numpy()
        for i, index in enumerate(batch["index"].tolist()):
            places = []
            if output.maps is not None:
                probs = output.maps[i].float().sigmoid().cpu().numpy()
                peaks = common.propose(probs, spacing_mm[i], cfg)
                peaks[:, :3] = to_lps(peaks[:, :3], affine[i])
                places = [[dataset.uids[index], *peak] for peak in peaks.tolist()]
            answers.append((index, logits[i], places))
    answers = sorted(gather_object(answers), key=lambda answer: answer[0])
    indices, logits, places = zip(*answers, strict=True)
    assert indices == tuple(range(len(dataset))), "validation sees each series exactly once"
    return np.stack(logits), list(itertools.chain(*places))


def write_best(run: common.Run, val_table: pd.DataFrame, logits: np.ndarray, places: list[list]) -> None:
    """best_ema.safetensors, oof.csv and for a locator proposals.csv, each atomic."""
    labels = list(LABELS)
    oof = val_table[[UID, "patient", "Modality", "plane"]].rename(columns={"Modality": "modality"})
    oof[labels] = common.sigmoid(logits)
    oof[[f"label {label}" for label in labels]] = val_table[labels]
    write_table(run.folder / "oof.csv", oof)
    if places:
        table = pd.DataFrame(places, columns=PROPOSAL_COLUMNS).astype({"label": int})
        write_table(run.folder / "proposals.csv", table)
    points = operating_points(val_table, oof[LABELS[AP]].to_numpy(), run.cfg.bootstrap)
    meta = run.meta | {"operating_points": points}
    common.save_checkpoint(run.folder / "best_ema.safetensors", run.model, run.cfg, meta)


def write_table(path: Path, table: pd.DataFrame) -> None:
    common.write_atomic(path, table.to_csv(index=False, float_format="%.12g").encode())


# --- metrics ------------------------------------------------------------------------------------------------


def finish(
    folder: Path, cfg: Config, accelerator: Accelerator, val_table: pd.DataFrame, progress: Progress
) -> None:
    """metrics.json of the best epoch, read back from its files."""
    accelerator.wait_for_everyone()
    run = common.load_run(folder, accelerator.device)
    probs = pd.read_csv(folder / "oof.csv")[list(LABELS)].to_numpy()
    metrics = common.score(val_table, probs, cfg.bootstrap)
    if run.meta["decoys"]:
        metrics |= measure_leak(run, cfg, accelerator, val_table, probs)
    if not accelerator.is_main_process:
        return
    if (folder / "proposals.csv").exists():
        metrics |= score_proposals(folder, cfg, val_table)
    is_gpu = accelerator.device.type == "cuda"
    modules = ("torch", "timm", "accelerate", "numpy")
    metrics |= {
        "operating_points": run.meta["operating_points"],
        "best_epoch": progress.best["epoch"],
        "epochs": progress.epoch,
        "history": progress.history,
        "seconds": round(progress.seconds, 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 3) if is_gpu else None,
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "precision": effective_precision(accelerator),
        "num_processes": accelerator.num_processes,
        "versions": {name: importlib.metadata.version(name) for name in modules},
    }
    metrics = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no NaN
    common.write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    best = progress.best
    common.log(
        f"{folder}: best epoch {best['epoch']}, wAUC {best['wauc']:.4f} (95 % interval "
        f"{best['low']:.4f} to {best['high']:.4f}, {metrics['num_patients']} patients); without an AUC, as "
        f"of one class: {', '.join(metrics['undefined']) or 'none'}"
    )


def measure_leak(
    run: common.Run, cfg: Config, accelerator: Accelerator, val_table: pd.DataFrame, probs: np.ndarray
) -> dict:
    """What the same weights score with annotated crops, and how much more that is: a diagnostic alone."""
    dataset = SeriesDataset(cfg, val_table, "oracle", np.array(run.meta["decoys"]))
    logits, _ = predict(run.model, dataset, cfg, accelerator)
    oracle = common.score(val_table, logits, cfg.bootstrap)
    patients = val_table["patient"]
    return {
        "oracle_wauc": [oracle["wauc"], oracle["low"], oracle["high"]],
        "leak": common.compare_waucs(dataset.labels, logits, probs, patients, cfg.bootstrap),
        "oracle_note": ORACLE_NOTE,
    }


def operating_points(val_table: pd.DataFrame, scores: np.ndarray, draws: int) -> list[dict]:
    """Sensitivity of `Aneurysm Present`, scores (N,), at each of SPECIFICITIES; see measure_sensitivity."""
    is_present = (val_table[LABELS[AP]] == 1).to_numpy()
    rows = np.flatnonzero(is_present)
    positives = np.stack([scores[rows], rows], axis=1)
    negatives = scores[~is_present]
    points = []
    for specificity in SPECIFICITIES:
        allowed = (1 - specificity) * len(negatives)
        point = measure_sensitivity(positives, negatives, allowed, val_table, draws)
        points.append({"specificity": specificity, **point})
    return points


def score_proposals(folder: Path, cfg: Config, val_table: pd.DataFrame) -> dict:
    """How well a locator's proposals find annotated points, within REACH_MM: all of them (recall_10mm: value,
    low, high), and those above a threshold that lets FALSE_PER_SCAN others pass (froc)."""
    rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
    hits = []  # of each point the best score of a place near it, or 0, and the point's row of val_table
    misses = []  # scores of places away from all points
    for i, uid in enumerate(val_table[UID]):
        tensors, meta = common.load_volume(common.volume_path(cfg.cache, uid), ["points"])
        points_mm = to_lps(tensors["points"], np.array(meta["affine"]))
        proposals = rows[rows[UID] == uid]
        scores = proposals["score"].to_numpy()
        away_mm = np.linalg.norm(points_mm[:, None] - proposals[PLACE].to_numpy(), axis=2)
        is_near = away_mm <= REACH_MM  # (points, proposals)
        best = (is_near * scores).max(axis=1, initial=0)
        hits += [(score, i) for score in best]
        misses += scores[~is_near.any(axis=0)].tolist()
    froc = []
    for rate in (*FALSE_PER_SCAN, math.inf):
        point = measure_sensitivity(hits, misses, rate * len(val_table), val_table, cfg.bootstrap)
        froc.append({"false_per_scan": rate, **point})
    every = froc.pop()
    return {
        "num_proposals": common.NUM_PROPOSALS,
        "recall_10mm": [every["sensitivity"], every["low"], every["high"]],
        "froc": froc,
    }


def measure_sensitivity(
    positives: list, negatives: Sequence, allowed: float, val_table: pd.DataFrame, draws: int
) -> dict:
    """Share of positives above the lowest threshold that at most `allowed` negatives exceed, with its 95 %
    interval over patients.

    negatives are scores above 0, positives pairs of a score and its row of val_table.
    """
    ranked = [*sorted(negatives, reverse=True), 0.0]
    highest = ranked[int(min(allowed + 1e-9, len(negatives)))]  # of the negatives that must not pass
    threshold = math.ceil(1e6 * highest) / 1e6  # rounded up, so that the last bits do not matter
    scores, rows = np.reshape(positives, (-1, 2)).T
    draws = common.patient_weights(val_table["patient"], draws)
    every_row = np.ones((1, len(val_table)))
    weights = np.concatenate([every_row, *draws])
    weights = weights[:, rows.astype(int)]
    with np.errstate(invalid="ignore"):
        shares = (weights @ (scores > threshold)) / weights.sum(1)
    low, high = common.percentile_interval(shares[1:])
    return {"threshold": threshold, "sensitivity": shares[0], "low": low, "high": high}


# --- checkpoints for --resume -------------------------------------------------------------------------------


def describe_run(cfg: Config, table: pd.DataFrame, world: int) -> dict:
    """What a resumed run must share with the run that it goes on with."""
    settings = common.config_to_dict(cfg)
    for name in ("cache", "outputs", "workers", "tracker", "ensemble_weight"):
        del settings[name]
    data = common.text_sum(table[[UID, "fold", *LABELS]].to_csv())
    return settings | {"processes": world, "series and labels": data}


def list_parts(state: TrainState, accelerator: Accelerator) -> dict:
    """What has a state_dict to be saved."""
    parts = {"model": state.raw, "ema": state.ema.module, "optimizer": state.optimizer}
    return parts | ({"scaler": accelerator.scaler} if accelerator.scaler else {})


def save_last(folder: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Write last/<epoch>.pt, which ends with the SHA-256 of what stands before it, then prune older ones."""
    states = {name: part.state_dict() for name, part in list_parts(state, accelerator).items()}
    states["progress"] = asdict(state.progress)
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    (folder / "last").mkdir(exist_ok=True)
    common.write_atomic(folder / "last" / f"{state.progress.epoch:04d}.pt", buffer.getbuffer())
    common.remove_leftovers(folder / "last")
    for old in sorted((folder / "last").glob("*.pt"))[:-KEEP_CHECKPOINTS]:
        old.unlink()


def load_last(folder: Path) -> dict | None:
    """The states of the newest checkpoint that verifies, and `progress`; None without one."""
    for path in sorted((folder / "last").glob("*.pt"), reverse=True):
        data = memoryview(path.read_bytes())
        states = data[:-32]
        is_intact = hashlib.sha256(states).digest() == data[-32:]
        if is_intact:
            return torch.load(io.BytesIO(states), map_location="cpu", weights_only=True)
        common.log(f"{path}: differs from its sum; falling back to the one before")
    return None


# --- the command --------------------------------------------------------------------------------------------


def train(cfg: Config, accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Everything from an empty run folder to metrics.json; see the top of the file."""
    folder = Path(cfg.outputs) / cfg.run_name
    is_main = accelerator.is_main_process
    with fail_together(accelerator):
        table = load_table(cfg, args.limit)
        train_table = table[table["fold"] != cfg.fold]
        val_table = table[table["fold"] == cfg.fold]
        decoys = collect_decoys(cfg, train_table)
        proposals, locator = load_proposals(cfg, table)
        identity = describe_run(cfg, table, accelerator.num_processes)
        state = begin(folder, cfg, accelerator, identity, args)
    train_set = SeriesDataset(cfg, train_table, "train", decoys, proposals)
    val_set = SeriesDataset(cfg, val_table, "deploy", decoys, proposals)
    meta = {
        "prior": train_table[list(LABELS)].mean().round(6).tolist(),
        "decoys": decoys.tolist(),
        "val_uids": val_set.uids,
        "locator": locator,
    }
    val_labels = torch.tensor(val_set.labels)
    progress = state.progress
    state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)
    with fail_together(accelerator):
        lock = claim_folder(folder, cfg, args.overwrite) if is_main else None
    settings = {key: str(value) for key, value in common.config_to_dict(cfg).items()}
    accelerator.init_trackers("aneurysm", settings)
    announce(folder, cfg, accelerator, state, len(train_set), len(val_set))
    while progress.epoch < min(cfg.epochs, progress.best["epoch"] + (cfg.patience or cfg.epochs)):
        clock = time.perf_counter()
        loss_sum, waited = train_epoch(cfg, accelerator, state, train_set)
        logits, places = predict(state.ema.module, val_set, cfg, accelerator)
        seconds = time.perf_counter() - clock
        metrics = common.score(val_table, logits, cfg.bootstrap)
        row = {
            "epoch": progress.epoch + 1,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": sum(gather_object([loss_sum])) / len(train_set),
            "val_loss": label_loss(torch.tensor(logits), val_labels, cfg.label_smoothing).mean().item(),
            "wauc": metrics["wauc"],
            "low": metrics["low"],
            "high": metrics["high"],
            "seconds": seconds,
            "data_wait": waited / seconds,
        }
        add_epoch(progress, row, cfg)
        accelerator.log(row, step=progress.epoch)
        if is_main:
            if progress.best is row:
                best_meta = meta | {"epoch": progress.epoch, "wauc": row["wauc"]}
                best_run = common.Run(folder, state.ema.module, cfg, best_meta)
                write_best(best_run, val_table, logits, places)
            write_table(folder / "log.csv", pd.DataFrame(progress.history))
            save_last(folder, state, accelerator)
    finish(folder, cfg, accelerator, val_table, progress)
    if lock:
        lock.close()


def begin(
    folder: Path, cfg: Config, accelerator: Accelerator, identity: dict, args: argparse.Namespace
) -> TrainState:
    """Model, EMA and optimizer, new or from the last checkpoint. Raises ValueError where the folder holds a
    run that this one would spoil."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    is_used = (folder / "metrics.json").exists() or (folder / "last").exists()
    if is_used and not (args.resume or args.overwrite):
        raise ValueError(
            f"{folder}: holds a run; --resume goes on with it, --overwrite starts again, another tag, "
            f"seed or fold gets another folder"
        )
    last = load_last(folder) if args.resume else None
    progress = Progress(**last["progress"]) if last else Progress(identity)
    difference = common.describe_difference(progress.identity, identity)
    if difference:
        raise ValueError(
            f"{folder}: cannot resume, the run was begun with {difference}; resume with the same, or start "
            f"again with --overwrite"
        )
    torch.manual_seed(cfg.seed)
    model = common.build_model(cfg, pretrained=last is None).to(accelerator.device)
    # a fused step that the fp16 scaler skips is not reported as skipped
    fused = accelerator.scaler is None
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )
    ema = ModelEmaV3(model, decay=cfg.ema_decay, use_warmup=True, foreach=True)
    state = TrainState(model, model, ema, optimizer, progress)
    if last:
        for name, part in list_parts(state, accelerator).items():
            part.load_state_dict(last[name])
        common.log(f"resumed after epoch {progress.epoch}")
    return state


def announce(
    folder: Path, cfg: Config, accelerator: Accelerator, state: TrainState, num_train: int, num_val: int
) -> None:
    """One line on what is about to run."""
    precision = effective_precision(accelerator)
    world = accelerator.num_processes
    num_weights = sum(p.numel() for p in state.raw.parameters())
    common.log(
        f"{folder}: {num_train} series train, {num_val} validate; {num_weights / 1e6:.1f} M weights; "
        f"batch {cfg.batch_size} x {world} processes x accumulation {cfg.accumulation} = "
        f"{cfg.batch_size * world * cfg.accumulation} series per update, lr {cfg.lr:g}; "
        f"{accelerator.device.type}, precision {precision}"
        + (f" ({cfg.precision} was asked for, which needs a GPU)" if precision != cfg.precision else "")
    )


def add_epoch(progress: Progress, row: dict, cfg: Config) -> None:
    """Count an epoch that has ended, and say how it went."""
    progress.epoch += 1
    progress.seconds += row["seconds"]
    progress.history.append(row)
    # where wAUC is undefined, in a fold with one class, the loss decides; the first of equals stays
    is_best = row["wauc"] > progress.best["wauc"]
    if math.isnan(row["wauc"]):
        is_best = row["val_loss"] < progress.best["val_loss"]
    if is_best:
        progress.best = row
    left_s = (cfg.epochs - progress.epoch) * progress.seconds / progress.epoch
    common.log(
        f"epoch {progress.epoch}/{cfg.epochs}: train loss {row['train_loss']:.4f}, validation "
        f"{row['val_loss']:.4f}, wAUC {row['wauc']:.4f} ({row['low']:.3f} to {row['high']:.3f}), "
        f"{row['seconds']:.0f} s; {left_s / 60:.0f} min left"
    )


def effective_precision(accelerator: Accelerator) -> str:
    """What really runs: fp16 asked for on a CPU is fp32 without a word from Accelerate."""
    if accelerator.scaler is not None:
        return "fp16"
    return "bf16" if accelerator.native_amp and accelerator.mixed_precision == "bf16" else "no"


@contextlib.contextmanager
def fail_together(accelerator: Accelerator) -> Iterator[None]:
    """What fails in this block on one rank ends all of them, with one line and exit code 1."""
    error = ""
    try:
        yield
    except (ValueError, OSError) as raised:
        error = str(raised)
    errors = [text for text in gather_object([error]) if text]
    if errors:
        common.log(f"train.py: {errors[0]}")
        common.exit_rank(1)


def claim_folder(folder: Path, cfg: Config, overwrite: bool) -> io.TextIOBase:
    """Make the run's folder, empty with overwrite, and write the settings. Returns its open lock, which a
    second run waits for in vain: it gets a ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        # unlike flock's it is not inherited, so loaders that outlive a killed run do not hold it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"{folder}: another run is writing here; wait for it, or change tag, seed or fold"
        ) from None
    except OSError as error:
        common.log(f"{folder}: not locked ({error.strerror}); let no second run write here")
    common.remove_leftovers(folder)
    for path in folder.iterdir() if overwrite else []:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    text = yaml.safe_dump(common.config_to_dict(cfg), sort_keys=False)
    common.write_atomic(folder / "config.yaml", text.encode())
    return lock


def fit_workers(cfg: Config) -> Config:
    """The config with as many loader processes as /dev/shm has room for: batches travel through it, however
    they are shared, and Docker gives it 64 MB."""
    if not os.path.isdir("/dev/shm"):
        return cfg
    disk = os.statvfs("/dev/shm")
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch_bytes = cfg.batch_size * cfg.in_chans * cfg.volume.img_size**2
    num_batches = disk.f_bavail * disk.f_frsize // num_processes // batch_bytes
    # a loader works two batches ahead; another one is in use, and one on its way
    workers = min(cfg.workers, max(0, (num_batches - 2) // 2))
    if workers < cfg.workers:
        common.log(
            f"/dev/shm has room for {num_batches} batches: workers {workers}, not {cfg.workers}; docker run "
            f"--shm-size=1g makes more"
        )
    return replace(cfg, workers=workers)


def stop(number: int, _frame: object) -> None:
    """End at once at a signal (an exception could be lost in a destructor); finished epochs are saved."""
    if int(os.environ.get("RANK", 0)) == 0:
        name = signal.Signals(number).name
        text = f"\ntrain.py: stopped by {name}; --resume goes on after the last finished epoch\n"
        os.write(2, text.encode())
    for loader in multiprocessing.active_children():
        loader.kill()
    os._exit(128 + number)


def main() -> int:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  started with 2>&-
    parser = common.make_parser(__doc__, has_config=True)
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and end")
    parser.add_argument("--limit", type=int, default=10**9, metavar="N", help="a quick look: N series alone")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in the folder, if any")
    either.add_argument("--overwrite", action="store_true", help="delete what the run folder holds")
    args = parser.parse_args()
    if args.limit <= 0:
        parser.error(f"--limit {args.limit}: expected more than 0")
    try:
        cfg = fit_workers(common.load_config(args.config, args.set))
        if args.print_config:
            print(yaml.safe_dump(common.config_to_dict(cfg), sort_keys=False), end="", flush=True)
            return 0
        if cfg.tracker and importlib.util.find_spec(cfg.tracker) is None:
            raise ValueError(f"tracker: {cfg.tracker} is not installed; install it, or set tracker to ''")
    except (ValueError, OSError) as error:
        common.log(f"train.py: {error}")
        return 1
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        accelerator = Accelerator(
            mixed_precision=cfg.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else the environment's
            log_with=cfg.tracker or None,
            project_dir=Path(cfg.outputs) / cfg.run_name if cfg.tracker else None,
        )
        is_alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
        if is_alone and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
            torch.set_num_threads(common.usable_cores())  # accelerate launch has set OMP_NUM_THREADS=1
        train(cfg, accelerator, args)
        accelerator.end_training()
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if "out of memory" in reason or "can't allocate memory" in reason:
            reason += (
                ". Lower batch_size (and raise accumulation), set grad_checkpointing: true, or lower img_size"
            )
        elif isinstance(error, RuntimeError) and "Connection" not in reason:  # to a process that has failed
            raise
        common.log(f"train.py: {reason}", everywhere=True)
        return 1
    return 0


if __name__ == "__main__":
    common.exit_rank(main())
