"""Train one member of the ensemble: one model, one seed, one validation fold.

in   --config YAML   settings (common.Config); the cache it names, filled by preprocess.py, with train.csv
out  outputs/<model>_seed<S>_fold<F>/
                     best_ema.safetensors (weights and all that infer.py needs), metrics.json, config.yaml,
                     log.csv (a row per epoch), oof.csv (validation predictions), last/ (for --resume);
                     of a locator (task: locate) proposals.csv: where it would crop in its validation fold
run  accelerate launch train.py --config configs/fold0.yaml
     accelerate launch train.py --config configs/fold0.yaml --set seed=1 --set lr=5.0e-5 --resume
     ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train.py --config configs/demo.yaml

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
import typing
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import AP, LABELS, SWAP, UID, Config, Output, SeriesDataset
from dicom import to_lps

ORACLE_NOTE = "oracle_wauc uses annotated crops that no new patient has: a diagnostic, not a score"
SPECIFICITIES = (0.90, 0.95)  # of `Aneurysm Present`
FALSE_PER_SCAN = (0.25, 0.5, 1.0, 2.0)  # proposals away from every annotated point
REACH_MM = 10.0  # a proposal this close to an annotated point finds it
PLACE = ["x_mm", "y_mm", "z_mm"]  # LPS; columns of proposals.csv
KEEP_CHECKPOINTS = 2  # of last/: the newest and one to fall back to


# --- what there is to train on ------------------------------------------------------------------------------


@dataclass
class Data:
    """The series of a run and what its crops are taken from."""

    train_table: pd.DataFrame  # rows of load_table
    val_table: pd.DataFrame
    decoys: np.ndarray  # (M, 3) fractions (z, y, x) of a volume
    proposals: dict[str, np.ndarray] | None  # (n, 3) LPS mm by series
    locator: str  # name of the run whose proposals validation sees, or ""


def load_data(cfg: Config, limit: int = 0) -> Data:
    """All that a run reads before it begins. Raises ValueError where something does not fit."""
    table = load_table(cfg, limit)
    is_val = table["fold"] == cfg.fold
    train_table = table[~is_val].reset_index(drop=True)
    val_table = table[is_val].reset_index(drop=True)
    decoys = collect_decoys(cfg, train_table)
    proposals, locator = load_proposals(cfg, table) if cfg.proposals else (None, "")
    return Data(train_table, val_table, decoys, proposals, locator)


def load_table(cfg: Config, limit: int = 0) -> pd.DataFrame:
    """A row per cached and labelled series, or of `limit` of them: UID, patient, Modality, plane, the 14
    labels, fold.

    Raises ValueError that lists every fault of the labels, or else every fault of the cache, so that one run
    shows them all.
    """
    table = merge_labels(cfg)
    if limit:
        table = table.sample(min(limit, len(table)), random_state=cfg.fold_seed)
    table = table.sort_values(UID, ignore_index=True)
    faults = check_volumes(cfg, table)
    num_patients = table["patient"].nunique()
    if num_patients < cfg.num_folds:
        faults[f"table with fewer patients than num_folds, {cfg.num_folds}"] = [str(num_patients)]
    if faults:
        texts = [f"{len(places)} x {fault}: {', '.join(places[:3])}" for fault, places in faults.items()]
        raise ValueError(f"{cfg.cache}: cannot train: {'; '.join(texts)}")
    table["fold"] = make_folds(table, cfg.num_folds, cfg.fold_seed)
    return table


def merge_labels(cfg: Config) -> pd.DataFrame:
    """The rows of train.csv whose volumes are in the cache, with their patient and plane of index.csv; says
    how many series it leaves out."""
    cache = Path(cfg.cache)
    for name in ("index.csv", "train.csv"):
        if not (cache / name).is_file():
            raise ValueError(
                f"{cache / name}: not found; expected a cache with labels: put train.csv beside the series "
                f"and run python preprocess.py --src dicoms --dst {cache}"
            )
    labels = common.read_label_table(cache / "train.csv")
    if "Modality" not in labels:
        raise ValueError(f"{cache / 'train.csv'}: column missing: Modality; folds are balanced over it")
    index = pd.read_csv(cache / "index.csv", dtype=str, keep_default_na=False)
    table = labels.merge(index[[UID, "status", "patient", "plane"]], on=UID, how="left")
    status = table["status"].fillna("not in the cache")
    is_usable = status.isin(["ok", "doubtful"] if cfg.use_doubtful else ["ok"])
    left_out = status[~is_usable].value_counts().to_dict()
    left_out["without labels"] = len(set(index[UID]) - set(labels[UID]))
    counts = [f"{count} {reason}" for reason, count in left_out.items() if count]
    if counts:
        common.log(f"{cache}: {is_usable.sum()} series; left out: {', '.join(counts)}")
    table = table[is_usable].copy()
    table["patient"] = table["patient"].where(table["patient"] != "", table[UID])
    return table


def check_volumes(cfg: Config, table: pd.DataFrame) -> dict[str, list[str]]:
    """What is wrong with the volumes, and with which: unreadable, of other settings, with shared images."""
    faults, series_of_image = defaultdict(list), {}
    expected = common.volume_settings(cfg)
    for uid in table[UID]:
        try:
            tensors, meta = common.load_volume(common.volume_path(cfg.cache, uid), ["sop_hashes"])
        except (OSError, ValueError) as error:
            faults["unreadable volume"].append(str(error))
            continue
        difference = common.describe_difference(meta["settings"], expected)
        if difference:
            faults[f"volume made with {difference}; preprocess again or change the config"].append(uid)
        others = {series_of_image.setdefault(image, uid) for image in tensors["sop_hashes"].tolist()}
        for other in others - {uid}:
            faults["pair of series that share a (0008,0018) SOPInstanceUID"].append(f"{other} and {uid}")
    return faults


def make_folds(table: pd.DataFrame, num_folds: int, seed: int) -> pd.Series:
    """Fold of every row; a patient's series share one, and the order of the rows does not matter.

    table has `patient`, `Modality` and the 14 labels. Patients come rarest positive location first; each
    goes to the fold that it leaves most even: the least growth of sum((count / total)^2) over the columns, so
    that a rare location weighs more than presence or a modality.
    """
    labels = table[list(LABELS)].astype(float)
    modalities = pd.get_dummies(table["Modality"]).astype(float)
    is_absent = (1 - table[LABELS[AP]]).rename("absent")
    columns = pd.concat([labels, modalities, is_absent], axis=1)
    per_patient = columns.groupby(table["patient"]).sum()  # sorted by patient
    counts = per_patient.to_numpy()  # (patients, columns)
    total = np.maximum(counts.sum(0), 1)
    rarity = np.where(counts > 0, total, np.inf).min(1)
    shuffled = np.random.default_rng([seed, 1]).permutation(len(counts))
    filled = np.zeros((num_folds, counts.shape[1]))
    folds = {}
    for i in shuffled[np.argsort(rarity[shuffled], kind="stable")]:
        growth = (((filled + counts[i]) ** 2 - filled**2) / total**2).sum(1)
        fold = int(np.argmin(growth))  # the lowest fold of several equal ones
        filled[fold] += counts[i]
        folds[per_patient.index[i]] = fold
    return table["patient"].map(folds)


def collect_decoys(cfg: Config, train_table: pd.DataFrame, most: int = 512) -> np.ndarray:
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
    every = max(1, math.ceil(len(points) / most))
    return ((points[::every] + 0.5) / shape).round(4)


def load_proposals(cfg: Config, table: pd.DataFrame) -> tuple[dict[str, np.ndarray], str]:
    """(n, 3) places in LPS mm by series, best first, each from the locator that did not train on it, and the
    name of the locator of this run's fold. Raises ValueError where the locators do not cover the table."""
    folders, proposals = {}, {}
    for path in sorted(glob.glob(f"{cfg.proposals}/proposals.csv")):
        folder = Path(path).parent
        if not (folder / "metrics.json").exists():
            raise ValueError(f"{folder}: this locator is not finished; go on with it (--resume) first")
        locator_cfg = common.load_config(folder / "config.yaml")
        fold = locator_cfg.fold
        other = folders.setdefault(fold, folder)
        if other != folder:
            raise ValueError(
                f"proposals {cfg.proposals!r}: {other} and {folder} validate the same fold; expected one "
                f"locator per fold, for example outputs/locator_*_seed0_fold*"
            )
        folds = [{"num_folds": c.num_folds, "fold_seed": c.fold_seed} for c in (locator_cfg, cfg)]
        rows = pd.read_csv(path, dtype={UID: str})
        if folds[0] != folds[1] or not set(rows[UID]) <= set(table[UID][table["fold"] == fold]):
            difference = common.describe_difference(*folds) or "other series in its fold"
            raise ValueError(f"{folder}: made with {difference}; expected a locator of this run's folds")
        for uid, places in rows.groupby(UID):
            proposals[uid] = places[PLACE].to_numpy()
    num_absent = len(set(table[UID]) - set(proposals))
    if num_absent:
        raise ValueError(
            f"proposals {cfg.proposals!r}: {len(folders)} locator runs lack {num_absent} of {len(table)} "
            f"series; train every fold of the locator first (task: locate)"
        )
    return proposals, folders[cfg.fold].name


# --- the batch ----------------------------------------------------------------------------------------------


def augment(batch: dict[str, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Apply each sample's drawn augmentation on the device: -> images (B, C, H, W) in [0, 1], labels, points.

    Flip (all channels, labels swapped), slab shift and drop-out, rotation, scale and shift in plane (slabs
    only: crops have their own centre), gain and offset (all). What only moves bytes happens before they
    become floats. points (B, 8, 4) follow; label -1 means that a row holds no point.
    """
    images, labels, points = batch["image"], batch["labels"], batch["points"].clone()
    slabs, extent = cfg.volume.base_slices, images.shape[-1]
    values = batch["augment"][:, : common.NUM_AUGMENT, None, None]
    flip, degrees, scale, dx, dy, gain, offset, step = values.unbind(1)  # each (B, 1, 1)
    is_shown = batch["augment"][:, common.NUM_AUGMENT :]

    # Labels and crops of mirrored samples; the grid below mirrors slabs and points on the way.
    is_flipped = flip[:, 0] > 0.5  # (B, 1)
    labels = torch.where(is_flipped, labels[:, SWAP], labels)
    swap = points.new_tensor([*SWAP, -1])  # the last one for rows without a point
    points[..., 0] = torch.where(is_flipped, swap[points[..., 0].long()], points[..., 0])
    crops = images[:, slabs:]
    crops = torch.where(is_flipped[..., None, None], common.mirror(crops), crops)

    source = torch.arange(slabs, device=images.device) - step[:, 0].long()  # (B, Z)
    is_shown = is_shown * ((source >= 0) & (source < slabs))
    rows = torch.arange(len(images), device=images.device)[:, None]
    moved = images[rows, source.clamp(0, slabs - 1)] * is_shown[..., None, None].to(images.dtype)
    points[..., 1:2] += step

    # out(p) = in(mirror(R p / scale + shift)) in [-1, 1] coordinates; a point moves by the inverse.
    angle = torch.deg2rad(degrees)
    rotation = torch.cat([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    shift = torch.cat([dx, dy], dim=1) * 2 / cfg.volume.roi_mm  # (B, xy, 1)
    mirrored = torch.cat([1 - 2 * flip, torch.ones_like(flip)], dim=1)
    theta = torch.cat([rotation / scale, shift], dim=2) * mirrored
    grid = F.affine_grid(theta, moved.shape, align_corners=False)
    moved = F.grid_sample(moved.float(), grid, align_corners=False)  # 0 outside
    centred = ((2 * points[..., [3, 2]] + 1) / extent - 1) * mirrored.mT - shift.mT  # (B, 8, xy)
    points[..., [3, 2]] = ((centred @ rotation * scale + 1) * extent - 1) / 2

    images = torch.cat([moved, crops.float()], dim=1)
    images.flatten(2).mul_(gain / 255).add_(offset).clamp_(0, 1)  # in place, through a view
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
    axes = torch.meshgrid(*(torch.arange(n, device=points.device) for n in shape[2:]), indexing="ij")
    cells = torch.stack(axes, dim=-1) * step + (step - 1) / 2  # (Z, h, w, 3) voxels
    for b, p in (points[..., 0] >= 0).nonzero().tolist():
        squared = (((cells - points[b, p, 1:]) * spacing_mm[b]) ** 2).sum(-1)
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
    find, target = log_find.exp(), targets.amax(1)
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
    progress, rank = state.progress, accelerator.process_index
    plan = plan_epoch(len(dataset), cfg, progress.epoch, rank, accelerator.num_processes)
    total, warmup = cfg.epochs * len(plan), max(1, round(cfg.warmup_epochs * len(plan)))
    dataset.epoch, loss_sum, waits = progress.epoch, 0.0, []
    loader = load_batches(dataset, [indices for update in plan for indices, _ in update], cfg, waits)
    bar = common.progress(len(plan), f"epoch {progress.epoch + 1}", accelerator.is_main_process)
    state.model.train()
    for number, update in enumerate(plan):
        # Drop path draws from torch's generator. Seeded by the place in the run alone, it repeats after a
        # resume, whatever the process has drawn before.
        torch.manual_seed(hash_seed(cfg.seed, progress.epoch, number, rank))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(progress.updates, total, warmup, cfg)
        losses = []
        for i, (_, weight) in enumerate(update, start=1):
            batch = {
                name: value.to(accelerator.device, non_blocking=True) for name, value in next(loader).items()
            }
            # Gradients add up over the update's batches; ranks exchange them with the last one only.
            with accelerator.no_sync(state.model) if i < len(update) else contextlib.nullcontext():
                images, labels, points = augment(batch, cfg)
                with accelerator.autocast():
                    output = state.model(images)
                batch_losses = sample_losses(output, labels, points, batch["spacing_mm"], cfg)
                accelerator.backward(batch_losses.sum() * weight)
            losses.append(batch_losses.detach())
        if cfg.clip_grad:
            accelerator.clip_grad_norm_(state.model.parameters(), cfg.clip_grad)
        state.optimizer.step()
        state.optimizer.zero_grad()
        # Where gradients overflow in fp16 the scaler skips the step; the rate and the EMA wait as well.
        if not accelerator.optimizer_step_was_skipped:
            progress.updates += 1
            state.ema.update(state.raw, step=progress.updates)
        loss_sum += add_losses(losses, update, dataset, f"epoch {progress.epoch + 1}, update {number + 1}")
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
        weight = world / len(group)  # DDP averages over ranks, so scale
        plan.append([(part.tolist(), weight) if len(part) else ([0], 0.0) for part in parts])
    return plan


def learning_rate(update: int, total: int, warmup: int, cfg: Config) -> float:
    """Rate of update number `update` (from 0): linear warm-up to cfg.lr, then a half cosine to cfg.min_lr at
    the end."""
    if update < warmup:
        return cfg.lr * (update + 1) / warmup
    share = min(1.0, (update - warmup) / max(1, total - warmup))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * share)) / 2


def add_losses(losses: list[Tensor], update: list[tuple], dataset: SeriesDataset, place: str) -> float:
    """The sum of an update's losses; synchronises with the GPU, once per update."""
    total = 0.0
    for values, (indices, weight) in zip(losses, update, strict=True):
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                f"loss is {values.tolist()} in {place}, series {name_series(dataset, indices)}; lower lr or "
                f"clip_grad, or look at these series"
            )
        total += float(values.sum()) * (weight > 0)
    return total


def name_series(dataset: SeriesDataset, indices: list[int]) -> str:
    return ", ".join(dataset.uids[i] for i in indices)


def share_batchnorm(state: TrainState, world: int) -> None:
    """Give all ranks the BatchNorm statistics of rank 0: DDP agrees on weights alone."""
    if world > 1:
        from timm.utils.distributed import distribute_bn

        distribute_bn(state.ema.module, world, reduce=False)
        distribute_bn(state.raw, world, reduce=False)


def hash_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def load_batches(
    dataset: SeriesDataset, batches: list[list[int]], cfg: Config, waits: list[float]
) -> Iterator[dict[str, Tensor]]:
    """The batches of these indices, in their order; waits takes the seconds waited for each.

    The loader is made anew each epoch, so its processes see the epoch's number. Raises ValueError that names
    the series which could not be loaded.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=cfg.workers,
        pin_memory=torch.cuda.is_available(),
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
            raise ValueError(f"series {name_series(dataset, indices)}: {reason}") from error
        waits.append(time.perf_counter() - clock)
        yield batch


def start_worker(_: int) -> None:
    """One thread per loader process: they share the cores with the training process. Signals go to all
    processes of a job; that one answers, and ends its loaders."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


# --- validation ---------------------------------------------------------------------------------------------


def predict(
    model: nn.Module, dataset: SeriesDataset, cfg: Config, accelerator: Accelerator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits (N, 14) of every item on every rank, and where the model makes maps {uid: proposals (n, 5)}:
    x, y, z in LPS mm, score, label.

    Raises RuntimeError unless each index arrives exactly once.
    """
    model.eval()
    order = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    rows = []
    for batch in load_batches(dataset, batches, cfg, []):
        with torch.inference_mode(), accelerator.autocast():
            output = model(batch["image"].to(accelerator.device).float() / 255)
        logits = output.logits.float().cpu().numpy()
        places = [None] * len(logits) if output.maps is None else find_places(output.maps, batch, cfg)
        rows += zip(batch["index"].tolist(), logits, places, strict=True)
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    if [index for index, _, _ in rows] != list(range(len(dataset))):
        raise RuntimeError(f"validation saw {len(rows)} rows; expected each of {len(dataset)} series once")
    logits = np.stack([values for _, values, _ in rows])
    broken = [i for i, values in enumerate(logits) if not np.isfinite(values).all()]
    if broken:
        raise FloatingPointError(
            f"validation: logits of {len(broken)} of {len(rows)} series are NaN or infinite, first "
            f"{dataset.uids[broken[0]]}; lower lr, or set precision: 'no'"
        )
    return logits, {dataset.uids[index]: places for index, _, places in rows if places is not None}


def find_places(maps: Tensor, batch: dict[str, Tensor], cfg: Config) -> list[np.ndarray]:
    """Of each sample the likeliest places (n, 5) of its maps: x, y, z in LPS mm, score, label."""
    places = []
    for i, probs in enumerate(torch.sigmoid(maps.float()).cpu().numpy()):
        peaks = common.propose(probs, batch["spacing_mm"][i].numpy(), cfg)
        peaks[:, :3] = to_lps(peaks[:, :3], batch["affine"][i].numpy())
        places.append(peaks)
    return places


def score_epoch(val_table: pd.DataFrame, logits: np.ndarray, cfg: Config) -> dict[str, float]:
    """The columns of log.csv that validation fills."""
    truth = torch.tensor(val_table[list(LABELS)].to_numpy(np.float32))
    loss = label_loss(torch.tensor(logits), truth, cfg.label_smoothing).mean()
    metrics = common.score(val_table, logits, cfg.bootstrap)
    row = {name: metrics[name] for name in ("wauc", "low", "high")}
    return row | {"auc_present": metrics["per_label"][LABELS[AP]]["auc"], "val_loss": float(loss)}


def is_better(row: dict, best: dict) -> bool:
    """Higher wAUC; where it is undefined (a fold with one class), lower validation loss. The first of equals
    stays."""
    if math.isnan(row["wauc"]):
        return row["val_loss"] < best["val_loss"]
    return row["wauc"] > best["wauc"]


def write_best(
    folder: Path, model: nn.Module, cfg: Config, data: Data, row: dict, logits: np.ndarray, places: dict
) -> None:
    """best_ema.safetensors, oof.csv and for a locator proposals.csv, each atomic."""
    labels = list(LABELS)
    oof = data.val_table[[UID, "patient", "Modality", "plane"]].rename(columns={"Modality": "modality"})
    oof[labels] = common.sigmoid(logits)
    oof[[f"label {label}" for label in labels]] = data.val_table[labels]
    common.write_atomic(folder / "oof.csv", oof.to_csv(index=False, float_format="%.12g").encode())
    if places:
        rows = [[uid, *place] for uid, rows in places.items() for place in rows.tolist()]
        table = pd.DataFrame(rows, columns=[UID, *PLACE, "score", "label"]).astype({"label": int})
        common.write_atomic(folder / "proposals.csv", table.to_csv(index=False).encode())
    meta = {
        "prior": data.train_table[labels].mean().round(6).tolist(),
        "decoys": data.decoys.tolist(),
        "fold": cfg.fold,
        "val_uids": data.val_table[UID].tolist(),
        "locator": data.locator,
        "operating_points": operating_points(data.val_table, oof[LABELS[AP]].to_numpy(), cfg.bootstrap),
        "epoch": row["epoch"],
        "wauc": row["wauc"],
    }
    common.save_checkpoint(folder / "best_ema.safetensors", model, cfg, meta)


# --- metrics ------------------------------------------------------------------------------------------------


def finish(folder: Path, cfg: Config, accelerator: Accelerator, data: Data, progress: Progress) -> None:
    """metrics.json of the best epoch, read back from its files."""
    accelerator.wait_for_everyone()
    probs = pd.read_csv(folder / "oof.csv")[list(LABELS)].to_numpy()
    metrics = common.score(data.val_table, probs, cfg.bootstrap)
    metrics["operating_points"] = operating_points(data.val_table, probs[:, AP], cfg.bootstrap)
    if len(data.decoys):
        metrics |= measure_leak(folder, cfg, accelerator, data, probs)
    if not accelerator.is_main_process:
        return
    if (folder / "proposals.csv").exists():
        metrics |= score_proposals(folder, cfg, data.val_table)
    device, peak = "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    modules = ("torch", "timm", "accelerate", "numpy")
    metrics |= {
        "best_epoch": progress.best["epoch"],
        "epochs": progress.epoch,
        "history": progress.history,
        "seconds": round(progress.seconds, 1),
        "peak_memory_gb": round(peak, 3),
        "device": device,
        "precision": effective_precision(accelerator),
        "num_processes": accelerator.num_processes,
        "versions": {name: importlib.import_module(name).__version__ for name in modules},
        "finished": True,
    }
    metrics = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no NaN
    common.write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    common.log(
        f"{folder}: best epoch {metrics['best_epoch']:.0f}, wAUC {metrics['wauc']} (95 % interval "
        f"{metrics['low']} to {metrics['high']}, {metrics['num_patients']} patients)"
    )


def measure_leak(folder: Path, cfg: Config, accelerator: Accelerator, data: Data, probs: np.ndarray) -> dict:
    """What the same weights score with annotated crops, and how much more that is: a diagnostic alone."""
    model = common.load_run(folder, accelerator.device).model
    dataset = SeriesDataset(cfg, data.val_table, "oracle", data.decoys)
    logits, _ = predict(model, dataset, cfg, accelerator)
    oracle = common.score(data.val_table, logits, cfg.bootstrap)
    patients = data.val_table["patient"]
    return {
        "oracle_wauc": [oracle[name] for name in ("wauc", "low", "high")],
        "leak": common.compare_waucs(dataset.labels, logits, probs, patients, cfg.bootstrap),
        "oracle_note": ORACLE_NOTE,
    }


def operating_points(val_table: pd.DataFrame, scores: np.ndarray, draws: int) -> list[dict]:
    """Sensitivity of `Aneurysm Present`, scores (N,), at each of SPECIFICITIES; see sensitivity_at."""
    rows, is_positive = np.arange(len(scores)), (val_table[LABELS[AP]] == 1).to_numpy()
    positives = scores[is_positive], rows[is_positive]
    negatives = scores[~is_positive], rows[~is_positive]
    weights = draw_weights(val_table, draws)
    points = []
    for specificity in SPECIFICITIES:
        allowed = (1 - specificity) * weights[:, ~is_positive].sum(1)
        point = sensitivity_at(positives, negatives, weights, allowed)
        points.append({"specificity": specificity, **point})
    return points


def score_proposals(folder: Path, cfg: Config, val_table: pd.DataFrame) -> dict:
    """How well a locator's proposals find annotated points, within REACH_MM: all of them (recall_10mm: value,
    low, high), and those above a threshold that lets FALSE_PER_SCAN others pass (froc)."""
    rows = pd.read_csv(folder / "proposals.csv", dtype={UID: str})
    best, false = [], []  # (score, row of val_table): the best near a point, 0 for none; far from all
    for i, uid in enumerate(val_table[UID]):
        tensors, meta = common.load_volume(common.volume_path(cfg.cache, uid), ["points"])
        points = to_lps(tensors["points"], np.array(meta["affine"]))
        proposals = rows[rows[UID] == uid]
        scores = proposals["score"].to_numpy()
        is_near = np.linalg.norm(points[:, None] - proposals[PLACE].to_numpy(), axis=2) <= REACH_MM
        best += [(score, i) for score in (is_near * scores).max(axis=1, initial=0)]
        false += [(score, i) for score in scores[~is_near.any(axis=0)]]
    best, false = ((np.array([s for s, _ in p]), np.array([i for _, i in p], int)) for p in (best, false))
    weights = draw_weights(val_table, cfg.bootstrap)
    overall = sensitivity_at(best, false, weights, np.full(len(weights), np.inf))
    froc = []
    for rate in FALSE_PER_SCAN:
        point = sensitivity_at(best, false, weights, rate * weights.sum(1))
        froc.append({"false_per_scan": rate, **point})
    recall = [overall[name] for name in ("sensitivity", "low", "high")]
    return {"num_proposals": common.NUM_PROPOSALS, "recall_10mm": recall, "froc": froc}


def sensitivity_at(positives: tuple, negatives: tuple, weights: np.ndarray, allowed: np.ndarray) -> dict:
    """Share of the positives that score above the lowest threshold which no more than `allowed` (D,) negatives
    exceed, with its 95 % interval.

    positives and negatives are scores (n,), above 0, and rows (n,) of the table that they belong to; weights
    (D, N) say how often each row counts: once in the first draw, then as the bootstrap drew it.
    """
    scores, rows = negatives
    order = np.argsort(-scores)
    is_over = weights[:, rows[order]].cumsum(1) > allowed[:, None] + 1e-9
    first = np.where(is_over.any(1), is_over.argmax(1), len(scores))
    thresholds = np.append(scores[order], 0.0)[first]
    scores, rows = positives
    with np.errstate(invalid="ignore"):
        passing = weights[:, rows] * (scores > thresholds[:, None])
        shares = passing.sum(1) / weights[:, rows].sum(1)
    low, high = common.percentile_interval(shares[1:])
    return {"threshold": thresholds[0], "sensitivity": shares[0], "low": low, "high": high}


def draw_weights(val_table: pd.DataFrame, draws: int) -> np.ndarray:
    """(1 + draws, N): ones, then how often each row counts in a draw of patients."""
    ones = np.ones((1, len(val_table)))
    return np.concatenate([ones, *common.patient_weights(val_table["patient"], draws)])


# --- checkpoints for --resume -------------------------------------------------------------------------------


def describe_run(cfg: Config, data: Data, world: int) -> dict:
    """What a resumed run must share with the run that it goes on with."""
    settings = common.config_to_dict(cfg)
    for name in ("cache", "outputs", "workers", "tracker", "ensemble_weight"):
        del settings[name]
    tables = [table[[UID, *LABELS]].to_csv() for table in (data.train_table, data.val_table)]
    return settings | {"processes": world, "series and labels": common.text_sum(tables)}


def list_parts(state: TrainState, accelerator: Accelerator) -> dict[str, typing.Any]:
    """What has a state_dict to be saved."""
    parts = {"model": state.raw, "ema": state.ema.module, "optimizer": state.optimizer}
    return parts | ({"scaler": accelerator.scaler} if accelerator.scaler else {})


def save_last(folder: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Write last/<epoch>.pt, which ends with the SHA-256 of what stands before it, then prune older ones."""
    states = {name: part.state_dict() for name, part in list_parts(state, accelerator).items()}
    buffer = io.BytesIO()
    torch.save(states | {"progress": asdict(state.progress)}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    (folder / "last").mkdir(exist_ok=True)
    common.write_atomic(folder / "last" / f"{state.progress.epoch:04d}.pt", buffer.getbuffer())
    common.remove_leftovers(folder / "last")
    for old in sorted((folder / "last").glob("*.pt"))[:-KEEP_CHECKPOINTS]:
        old.unlink()


def load_last(folder: Path) -> dict | None:
    """The states of the newest checkpoint that verifies, and `progress`; None without checkpoints. Says when
    it falls back."""
    paths = sorted((folder / "last").glob("*.pt"), reverse=True)
    for path in paths:
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            return torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        common.log(f"{path}: differs from its sum; falling back to the one before")
    if paths:
        raise ValueError(f"{folder / 'last'}: no checkpoint verifies; start again with --overwrite")
    return None


# --- the command --------------------------------------------------------------------------------------------


def train(cfg: Config, accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Everything from an empty run folder to metrics.json; see the top of the file."""
    folder, is_main = Path(cfg.outputs) / cfg.run_name, accelerator.is_main_process
    with fail_together(accelerator):
        data = load_data(cfg, args.limit)
        state = begin(folder, cfg, accelerator, describe_run(cfg, data, accelerator.num_processes), args)
    state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)
    with locked(folder, accelerator):
        if is_main:
            prepare_folder(folder, cfg, args.overwrite)
        if cfg.tracker:
            accelerator.init_trackers("aneurysm", {key: str(value) for key, value in asdict(cfg).items()})
        announce(folder, cfg, accelerator, data, state)
        train_set = SeriesDataset(cfg, data.train_table, "train", data.decoys, data.proposals)
        val_set = SeriesDataset(cfg, data.val_table, "deploy", data.decoys, data.proposals)
        progress = state.progress
        while progress.epoch < min(cfg.epochs, progress.best["epoch"] + (cfg.patience or cfg.epochs)):
            clock = time.perf_counter()
            loss_sum, waited = train_epoch(cfg, accelerator, state, train_set)
            logits, places = predict(state.ema.module, val_set, cfg, accelerator)
            seconds = time.perf_counter() - clock
            row = {
                "epoch": progress.epoch + 1,
                "lr": state.optimizer.param_groups[0]["lr"],
                "train_loss": sum(gather_object([loss_sum])) / len(train_set),
                **score_epoch(data.val_table, logits, cfg),
                "seconds": seconds,
                "data_wait": waited / seconds,
            }
            row = {name: round(float(value), 6) for name, value in row.items()}
            progress.epoch += 1
            progress.seconds += seconds
            progress.history.append(row)
            accelerator.log(row, step=progress.epoch)
            report_epoch(progress, cfg)
            if is_better(row, progress.best):
                progress.best = row
                if is_main:
                    write_best(folder, state.ema.module, cfg, data, row, logits, places)
            if is_main:
                log_text = pd.DataFrame(progress.history).to_csv(index=False)
                common.write_atomic(folder / "log.csv", log_text.encode())
                save_last(folder, state, accelerator)
        finish(folder, cfg, accelerator, data, progress)


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
            f"{folder}: holds a run; --resume goes on with it, --overwrite starts again, another tag, seed or "
            f"fold gives a folder of its own"
        )
    last = load_last(folder) if args.resume else None
    progress = Progress(**last["progress"]) if last else Progress(identity)
    difference = common.describe_difference(progress.identity, identity)
    if difference:
        raise ValueError(
            f"{folder}: cannot resume, the run was begun with {difference}; resume with the same settings and "
            f"data, or start again with --overwrite"
        )
    torch.manual_seed(cfg.seed)
    model = common.build_model(cfg, pretrained=last is None).to(accelerator.device)
    # a fused step that the fp16 scaler skips is not reported as skipped
    fused = accelerator.scaler is None
    optimizer = create_optimizer_v2(model, "adamw", lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    ema = ModelEmaV3(model, decay=cfg.ema_decay, use_warmup=True, foreach=True)
    state = TrainState(model, model, ema, optimizer, progress)
    if last:
        for name, part in list_parts(state, accelerator).items():
            part.load_state_dict(last[name])
        common.log(f"resumed after epoch {progress.epoch}")
    return state


def prepare_folder(folder: Path, cfg: Config, overwrite: bool) -> None:
    """Write the settings; with overwrite delete what an earlier run left, but for the lock."""
    for path in folder.iterdir() if overwrite else []:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    text = yaml.safe_dump(common.config_to_dict(cfg), sort_keys=False)
    common.write_atomic(folder / "config.yaml", text.encode())


def announce(folder: Path, cfg: Config, accelerator: Accelerator, data: Data, state: TrainState) -> None:
    """One line on what is about to run."""
    precision, num_weights = effective_precision(accelerator), sum(p.numel() for p in state.raw.parameters())
    world = accelerator.num_processes
    common.log(
        f"{folder}: {len(data.train_table)} series train, {len(data.val_table)} validate; "
        f"{num_weights / 1e6:.1f} M weights; batch {cfg.batch_size} x {world} processes x "
        f"{cfg.accumulation} = {cfg.batch_size * world * cfg.accumulation} per update, lr {cfg.lr:g}; "
        f"{accelerator.device.type}, precision {precision}"
        + (f" ({cfg.precision} was asked for, which needs a GPU)" if precision != cfg.precision else "")
    )


def report_epoch(progress: Progress, cfg: Config) -> None:
    """One line on the epoch that has ended."""
    row, left = progress.history[-1], cfg.epochs - progress.epoch
    common.log(
        f"epoch {progress.epoch}/{cfg.epochs}: train loss {row['train_loss']:.4f}, validation "
        f"{row['val_loss']:.4f}, wAUC {row['wauc']:.4f} ({row['low']:.3f} to {row['high']:.3f}), "
        f"{row['seconds']:.0f} s; {left * progress.seconds / progress.epoch / 60:.0f} min left"
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
        raise SystemExit(1)


@contextlib.contextmanager
def locked(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold folder/.lock for the run; a second run in the same folder is refused."""
    with fail_together(accelerator):
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115
            try:
                # unlike flock it is not inherited, so loaders that outlive a killed run do not hold it
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"{folder}: another run is writing here; wait for it, or change tag, seed or fold"
                ) from None
            except OSError as error:
                common.log(f"{folder}: not locked ({error.strerror}); let no second run write here")
    with fail_together(accelerator):
        if not (folder / ".lock").exists():
            raise ValueError(f"{folder}: not seen by every process; several machines need one shared folder")
    yield
    if accelerator.is_main_process:
        lock.close()


def use_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` gives a single CPU process one thread (OMP_NUM_THREADS=1): let it use all cores."""
    is_launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if is_launched and accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(common.usable_cores())


def stop(number: int, _frame: object) -> None:
    """End the run at a signal; the last finished epoch is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


def parse_arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__, has_config=True)
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and end")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="a quick look: N series alone")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with an unfinished run, if there is one")
    either.add_argument("--overwrite", action="store_true", help="delete what the run folder holds")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    try:
        cfg = common.load_config(args.config, args.set)
        if cfg.tracker and importlib.util.find_spec(cfg.tracker) is None:
            raise ValueError(f"tracker: {cfg.tracker} is not installed; install it, or set tracker to ''")
    except (ValueError, OSError) as error:
        common.log(f"train.py: {error}")
        return 1
    if args.print_config:
        yaml.safe_dump(common.config_to_dict(cfg), sys.stdout, sort_keys=False)
        return 0
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        accelerator = Accelerator(
            mixed_precision=cfg.precision,
            gradient_accumulation_steps=1,  # else the environment sets it
            log_with=cfg.tracker or None,
            project_dir=Path(cfg.outputs) / cfg.run_name if cfg.tracker else None,
        )
        use_cores(accelerator)
        train(cfg, accelerator, args)
        accelerator.end_training()
    except SystemExit as ended:
        if ended.code > 128:
            name = signal.Signals(ended.code - 128).name
            common.log(f"train.py: stopped by {name}; --resume goes on after the last finished epoch")
        return ended.code
    except (ValueError, FloatingPointError, OSError) as error:
        common.log(f"train.py: {error}", everywhere=True)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        common.log(
            f"train.py: out of memory ({reason}). Lower batch_size (and raise accumulation), set "
            f"grad_checkpointing: true, or lower img_size",
            everywhere=True,
        )
        return 1
    return 0


if __name__ == "__main__":
    common.exit_rank(main())
