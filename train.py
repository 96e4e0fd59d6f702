"""Train one member of the ensemble: one model, one seed, one validation fold.

in   --config YAML   settings (common.Config); the cache it names, filled by preprocess.py, with train.csv
out  outputs/<model>_seed<S>_fold<F>/
                     best_ema.safetensors (weights and all that infer.py needs), metrics.json, config.yaml,
                     log.csv (a row per epoch), oof.csv (validation predictions), last/ (for --resume),
                     proposals.csv (of a locator: where it would crop in its validation fold)
run  accelerate launch train.py --config configs/fold0.yaml
     accelerate launch train.py --config configs/fold0.yaml --set seed=1 --set lr=5.0e-5 --resume
     ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train.py --config configs/demo.yaml

`accelerate launch` takes every GPU, --num_processes 1 one, and --quiet leaves out the launcher's traceback.
lr belongs to the global batch, batch_size x processes x accumulation: with more processes lower batch_size.
Validation sees what a new patient has: no annotated crop ever, only decoys or a locator's proposals.
A stopped or killed run goes on after its last finished epoch and ends with the same bits.
exit 0 trained, 1 refused or failed (one line says why), 2 wrong usage, 130 or 143 stopped by a signal.
"""

import fcntl
import glob
import io
import math
import os
import shutil
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from time import perf_counter

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own exception is lost in some of the imports

import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather_object
from numpy import ndarray
from numpy.random import SeedSequence, default_rng
from pandas import DataFrame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

import common
from common import LABELS, PLACE, PRESENT, SWAP, UID, Config, Run, SeriesDataset, log, read_csv, write_atomic
from dicom import VolumeSettings, to_lps

SPECIFICITIES = (0.90, 0.95)  # of `Aneurysm Present`
FALSE_PER_SCAN = (0.25, 0.5, 1.0, 2.0)  # proposals away from every annotated point
REACH_MM = 10.0  # a proposal this close to an annotated point finds it
PROPOSAL_COLUMNS = [UID, *PLACE, "score", "label"]
MIN_SPREAD = 0.02  # of 90 % of the predicted probabilities; below it they do not tell series apart


# --- the series to train on ---------------------------------------------------------------------------------
def load_table(cfg: Config, limit: int | None = None) -> DataFrame:
    """A row per labelled series with a volume: patient, Modality, plane, labels, fold, points, points_mm."""
    path = Path(cfg.cache, "train.csv")
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected the labels in the cache: put train.csv beside the series and "
            f"run python preprocess.py --src dicoms --dst {cfg.cache}, with the --config of this run"
        )
    labels = common.read_label_table(path)
    columns = [UID, "status", "patient", "plane"]
    index = read_csv(path.with_name("index.csv"), columns, dtype=str)[columns]
    table = labels.merge(index, on=UID, how="left")
    table["patient"] = table["patient"].fillna(table[UID])
    status = table["status"].fillna("not in the cache")
    is_usable = status.isin(["ok", "doubtful"] if cfg.use_doubtful else ["ok"])
    if not is_usable.all():
        left_out = status[~is_usable].value_counts().to_dict()
        log(f"{cfg.cache}: {is_usable.sum()} series; left out, with their number: {left_out}")
    table = table[is_usable].sort_values(UID, ignore_index=True)[:limit]
    table = table.join(read_points(cfg, table[UID]))
    patients, merged = None, table["patient"]
    while not merged.equals(patients):  # patients with equal volumes are one, on through all of their series
        patients = merged
        merged = patients.groupby(table["twin"]).transform("min").groupby(patients).transform("min")
    table["patient"] = merged
    num_patients = table["patient"].nunique()
    if num_patients < cfg.num_folds:
        raise ValueError(
            f"{cfg.cache}: {num_patients} patients with labels and a volume for {cfg.num_folds} folds; lower "
            f"num_folds, or see that train.csv names the series of index.csv"
        )
    return table.assign(fold=make_folds(table, cfg.num_folds, cfg.fold_seed))


def read_points(cfg: Config, uids: pd.Series) -> DataFrame:
    """Annotated points (P, 3) by series, in voxels and in LPS mm. ValueError lists all faulty volumes."""
    rows = []
    faults = []
    series_of_image = {}
    expected = common.volume_settings(cfg)
    for uid in uids:
        path = common.volume_path(cfg.cache, uid)
        try:
            tensors, meta = common.load_volume(path, ["points", "sop_hashes"])
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        if difference := common.describe_difference(meta["settings"], expected):
            faults.append(f"{path}: made with {difference}; use preprocess.py --config, or other settings")
        others = {series_of_image.setdefault(image, uid) for image in tensors["sop_hashes"].tolist()}
        twin = series_of_image.setdefault(meta["volume_sum"], uid)
        if twin != uid:
            log(f"{twin} and {uid} have equal volumes: taken as of one patient")
        faults += [f"{other} and {uid} share a (0008,0018) SOPInstanceUID" for other in others - {uid}]
        points = tensors["points"]
        rows.append({"points": points, "points_mm": to_lps(points, np.array(meta["affine"])), "twin": twin})
    if faults:
        raise ValueError(f"{cfg.cache}: cannot train, {len(faults)} faults: {'; '.join(faults[:5])}")
    return DataFrame(rows)


def make_folds(table: DataFrame, num_folds: int, seed: int) -> pd.Series:
    """Fold of every row, by patient, whatever the rows' order and the patients' names (each cache hides them
    by another key). Patients come rarest location first; each goes to the fold that it leaves most even, by
    the growth of sum((count / total)^2), where a rare location weighs more."""
    columns = table[LABELS].join(pd.get_dummies(table["Modality"]))
    columns["absent"] = 1 - table[PRESENT]
    patients = table.groupby("patient")[UID].transform("min")  # the first of a patient's series names it
    per_patient = columns.groupby(patients).sum()
    counts = per_patient.to_numpy(float)  # (patients, columns)
    total = np.maximum(counts.sum(0), 1)
    rarity = np.where(counts > 0, total, np.inf).min(1)
    shuffled = default_rng([seed, 1]).permutation(len(counts))
    filled = np.zeros((num_folds, counts.shape[1]))
    folds = pd.Series(0, index=per_patient.index)
    for i in shuffled[np.argsort(rarity[shuffled], kind="stable")]:
        grown = (filled + counts[i]) ** 2 - filled**2
        growth = (grown / total**2).sum(1)
        fold = growth.argmin()  # the lowest fold of several equal ones
        filled[fold] += counts[i]
        folds.iloc[i] = fold
    return patients.map(folds)


def collect_decoys(cfg: Config, train_table: DataFrame) -> ndarray:
    """(M, 3) annotated places of training series as fractions (z, y, x); ValueError if a locator has none."""
    shape = (cfg.volume.base_slices, cfg.volume.img_size, cfg.volume.img_size)
    points = np.concatenate(train_table["points"].tolist())
    points = points[common.is_inside(points, shape)]
    if not len(points) and cfg.task == "locate":
        raise ValueError(
            f"{cfg.cache}: no annotated point in {len(train_table)} training series; task locate learns from "
            f"them: put train_localizers.csv beside the DICOM files and run preprocess.py again"
        )
    return ((points + 0.5) / shape).round(4)


def refuse_leak(cfg: Config, table: DataFrame) -> None:
    """ValueError if the run that `pretrained` names trained on series that validate here."""
    path = Path(str(cfg.pretrained), common.CHECKPOINT)
    if path.is_file():
        _, meta = common.read_safetensors(path, "checkpoint", names=[])
        is_new = table[UID].isin(meta["val_uids"])
        num_leaked = (~is_new & (table["fold"] == cfg.fold)).sum()
        if is_new.any() and num_leaked:  # some held out there: both have the same data
            raise ValueError(f"{cfg.pretrained}: trained on {num_leaked} series that validate; take its fold")


def load_proposals(cfg: Config, table: DataFrame) -> tuple:
    """Places (n, 3) in LPS mm by series, from the locator that did not train on it; this fold's locator."""
    if not cfg.proposals:
        return None, ""
    places = {}
    locators = []
    val_uids = table[UID][table["fold"] == cfg.fold]
    for path in sorted(glob.glob(f"{cfg.proposals}/metrics.json")):  # of finished runs
        folder = Path(path).parent
        rows = read_csv(folder / "proposals.csv", PROPOSAL_COLUMNS, dtype={UID: str})
        for uid, peaks in rows.groupby(UID):
            places[uid] = peaks[PLACE].to_numpy()
        if rows[UID].isin(val_uids).any():
            locators.append(folder.name)
    missing = set(table[UID]) - places.keys()
    if missing or len(locators) != 1:
        raise ValueError(
            f"proposals {cfg.proposals!r}: {len(missing)} series have none, fold {cfg.fold} has those of "
            f"{', '.join(locators) or 'none'}; expected one finished locator: train all its folds (task: "
            f"locate) with these series and num_folds"
        )
    return places, locators[0]


# --- the batch ----------------------------------------------------------------------------------------------
def augment(batch: dict, cfg: Config) -> tuple:
    """Apply each sample's drawn augmentation on the device: -> images (B, C, H, W) in [0, 1], labels, points.
    Flip, gain and offset reach all channels; drop-out and what moves in plane the slabs alone, since crops
    have a centre to themselves. points (B, 8, 4) follow; label -1: a row holds none."""
    images = batch["image"]
    points = batch["points"].clone()
    values = batch["augment"][..., None, None]
    flip, degrees, scale, dx, dy, gain, offset = values[:, : common.NUM_AUGMENT].unbind(1)  # (B, 1, 1)
    is_shown = values[:, common.NUM_AUGMENT :]  # (B, Z, 1, 1)
    slabs = is_shown.shape[1]
    # Labels and crops of mirrored samples; the grid below mirrors slabs and points on the way.
    is_flipped = flip[:, 0] > 0.5  # (B, 1)
    labels = torch.where(is_flipped, batch["labels"][:, SWAP], batch["labels"])
    swap = points.new_tensor([*SWAP, -1])  # the last one for rows without a point
    points[..., 0] = torch.where(is_flipped, swap[points[..., 0].long()], points[..., 0])
    crops = images[:, slabs:]
    crops = torch.where(is_flipped[..., None, None], crops.flip(-1), crops)
    moved = images[:, :slabs] * is_shown
    # out(p) = in(mirror(R p / scale + shift)) in [-1, 1] coordinates; a point moves by the inverse.
    angle = torch.deg2rad(degrees)
    cos = angle.cos()
    sin = angle.sin()
    rotation = torch.cat([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    shift = torch.cat([dx, dy], dim=1) * 2 / cfg.volume.roi_mm  # (B, xy, 1)
    mirrored = 1 - 2 * torch.cat([flip, 0 * flip], dim=1)
    theta = torch.cat([rotation / scale, shift], dim=2) * mirrored
    grid = F.affine_grid(theta, moved.shape, align_corners=False)
    moved = F.grid_sample(moved, grid, align_corners=False)  # 0 outside
    extent = images.shape[-1]
    centred = (2 * points[..., [3, 2]] + 1) / extent - 1  # (B, 8, xy)
    centred = (centred * mirrored.mT - shift.mT) @ rotation * scale
    points[..., [3, 2]] = ((centred + 1) * extent - 1) / 2
    images = torch.cat([moved, crops], dim=1)
    images.mul_(gain[..., None] / 255).add_(offset[..., None]).clamp_(0, 1)
    return images, labels, points


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """(B,) binary cross entropy of logits (B, 14), mean over labels, with smoothed targets."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)


def map_targets(points: Tensor, shape: torch.Size, spacing_mm: Tensor, cfg: Config) -> Tensor:
    """Targets of maps of that shape (B, 13, Z, h, w): Gaussians around points (B, 8, 4: label, z, y, x in
    voxels), 1 in the cell nearest to each. spacing_mm (B, 3) is of voxels; cells are locator_stride wide."""
    step = points.new_tensor([1, cfg.locator_stride, cfg.locator_stride])
    cells = torch.ones(shape[2:], device=points.device).nonzero()  # (N, zyx)
    centres = cells * step + (step - 1) / 2  # voxels
    targets = points.new_zeros(*shape[:2], len(cells))
    for b, p in (points[..., 0] >= 0).nonzero().tolist():
        away_mm = (centres - points[b, p, 1:]) * spacing_mm[b]
        squared = (away_mm**2).sum(-1)
        bump = torch.exp(-squared / (2 * cfg.heatmap_sigma_mm**2))
        is_in_volume = squared.min() <= ((spacing_mm[b] * step) ** 2).sum()
        if is_in_volume:
            bump[squared.argmin()] = 1
        label_map = targets[b, int(points[b, p, 0])]
        torch.maximum(label_map, bump, out=label_map)
    return targets.view(shape)


def map_loss(maps: Tensor, targets: Tensor) -> Tensor:
    """(B,) loss of heat maps (B, 13, Z, h, w; logits of p q), summed over cells. Finding: focal, with less
    weight on negatives near points (CornerNet, arXiv:1808.01244, eq. 1). Naming: cross entropy at points."""
    log_probs = F.logsigmoid(maps.float())
    log_find = torch.logsumexp(log_probs, 1).clamp(max=-1e-6)  # p: the sum over arteries
    find = log_find.exp()
    target = targets.amax(1)
    positive_loss = -((1 - find) ** 2) * log_find
    negative_loss = -((1 - target) ** 4) * find**2 * torch.log1p(-find)
    finding = torch.where(target == 1, positive_loss, negative_loss)
    naming = (log_find[:, None] - log_probs) * (targets == 1)
    return finding.flatten(1).sum(1) + naming.flatten(1).sum(1)


# --- the loop -----------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """How far a run is, in plain values."""

    identity: dict  # of the run; see describe_run
    epoch: int = 0  # finished ones
    updates: int = 0  # that changed the weights: a scaler may skip some
    history: list = field(default_factory=list)  # rows of log.csv
    metrics: dict = field(default_factory=dict)  # of the best epoch


@dataclass
class TrainState:
    """All that training changes."""

    raw: nn.Module
    model: nn.Module  # raw, wrapped by DDP where there are several processes
    ema: nn.Module  # timm's ModelEmaV3
    optimizer: torch.optim.Optimizer
    progress: Progress
    parts: dict  # what has a state_dict to be saved, by name


def train_epoch(cfg: Config, accelerator: Accelerator, state: TrainState, dataset: SeriesDataset) -> tuple:
    """One epoch -> (this rank's losses added up, seconds it waited for data); ValueError at a NaN loss."""
    progress = state.progress
    rank = accelerator.process_index
    plan = plan_epoch(len(dataset), cfg, progress.epoch, rank, accelerator.num_processes)
    loss_sum = waited = 0.0
    dataset.epoch = progress.epoch
    indices = [indices for update in plan for indices, _ in update]
    batches = load_batches(dataset, indices, accelerator.device)
    bar = common.progress(len(plan), f"epoch {progress.epoch + 1}")
    state.model.train()
    for number, update in enumerate(plan):
        # Drop path draws from torch's generator: seeded by the place in the run, it repeats after a resume.
        seeds = SeedSequence([cfg.seed, progress.epoch, number, rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(progress.updates, len(plan), cfg)
        losses = []
        for _, weight in update:
            clock = perf_counter()
            batch = next(batches)
            waited += perf_counter() - clock
            images, labels, points = augment(batch, cfg)
            with accelerator.autocast():
                output = state.model(images, batch["first"])
            batch_losses = label_loss(output.logits, labels, cfg.label_smoothing)
            if output.maps is not None:
                targets = map_targets(points, output.maps.shape, batch["spacing_mm"], cfg)
                batch_losses = batch_losses + cfg.heatmap_weight * map_loss(output.maps, targets)
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
        update_loss = torch.cat(losses).sum().item()  # waits for the GPU, once per update
        if not math.isfinite(update_loss):
            uids = [dataset.uids[i] for indices, _ in update for i in indices]
            raise ValueError(
                f"loss is {update_loss} in epoch {progress.epoch + 1}, update {number + 1}, series "
                f"{', '.join(uids)}; lower lr or clip_grad, or check these series"
            )
        loss_sum += update_loss
        bar.update()
    bar.close()
    # DDP agrees on weights alone, so rank 0 gives the others its BatchNorm statistics.
    broadcast([*state.raw.buffers(), *state.ema.module.buffers()])
    return loss_sum, waited


def plan_epoch(num: int, cfg: Config, epoch: int, rank: int, world: int) -> list:
    """The batches that a rank sees, by update: sample indices, and the weight of their losses in the
    gradient. The order depends on (seed, epoch) alone: two processes of half the batch see in every update
    what one sees. A rank that gets nothing of the last takes sample 0 at weight 0: the others wait for it."""
    order = default_rng([cfg.seed, epoch]).permutation(num)
    size = cfg.batch_size * world
    plan = []
    for group in np.split(order, range(size * cfg.accumulation, num, size * cfg.accumulation)):
        num_steps = math.ceil(len(group) / size)
        parts = np.array_split(group, num_steps * world)[rank::world]
        weight = world / len(group)  # DDP averages over ranks, so scale: each sample weighs 1 / len(group)
        plan.append([(part.tolist(), weight) if len(part) else ([0], 0.0) for part in parts])
    return plan


def learning_rate(update: int, per_epoch: int, cfg: Config) -> float:
    """Rate of an update (from 0): linear warm-up to cfg.lr, then a half cosine that ends at cfg.min_lr."""
    warmup = max(1, round(cfg.warmup_epochs * per_epoch))
    if update < warmup:
        return cfg.lr * (update + 1) / warmup
    share = (update - warmup) / (cfg.epochs * per_epoch - warmup)
    height = (1 + math.cos(math.pi * share)) / 2
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * height


def load_batches(dataset: SeriesDataset, batches: Iterable, device: torch.device) -> Iterator:
    """The batches on the device, from a new loader, which sees the epoch. ValueError names a lost series."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=dataset.cfg.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    items = iter(loader)
    # PyTorch's handler would report a dead process wherever training stands; next() knows its series.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for indices in batches:
        try:
            batch = next(items)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            uids = ", ".join(dataset.uids[i] for i in indices)
            raise ValueError(f"{reason} (while series {uids} were loaded)") from error
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def start_worker(_: int) -> None:
    """One thread per loader process, beside the one that ends it with the training process, which answers
    signals. PyTorch looks for that process every 5 s, in vain if it ends while a loader starts."""
    threading.Thread(target=common.exit_with_parent, daemon=True).start()
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


# --- validation and metrics ---------------------------------------------------------------------------------
def predict(model: nn.Module, dataset: SeriesDataset, accelerator: Accelerator) -> tuple:
    """On every rank: logits (N, 14), and a locator's proposals, the rows of proposals.csv."""
    model.eval()
    order = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    batches = BatchSampler(order, dataset.cfg.batch_size, drop_last=False)
    answers = []
    for batch in load_batches(dataset, batches, accelerator.device):
        with torch.inference_mode(), accelerator.autocast():
            output = model(batch["image"].float() / 255)
        logits = output.logits.float().cpu().numpy()
        for i, index in enumerate(batch["index"].tolist()):
            rows = []
            if output.maps is not None:
                maps = output.maps[i].float().sigmoid().cpu().numpy()
                peaks = common.propose(maps, batch["affine"][i].cpu().numpy(), dataset.cfg)
                rows = [[dataset.uids[index], *peak] for peak in peaks.tolist()]
            answers.append((index, logits[i], rows))
    _, logits, rows = zip(*sorted(gather_object(answers)), strict=True)
    return np.stack(logits), DataFrame(chain(*rows), columns=PROPOSAL_COLUMNS)


def write_best(run: Run, row: dict, val_table: DataFrame, logits: ndarray, proposals: DataFrame) -> dict:
    """Weights, oof.csv and a locator's proposals.csv, atomic -> what metrics.json says beside its scores."""
    draws = run.cfg.bootstrap
    oof = val_table[[UID, "patient", "Modality", "plane"]].rename(columns={"Modality": "modality"})
    oof[LABELS] = common.sigmoid(logits)
    write_table(run.folder / "oof.csv", oof.join(val_table[LABELS].add_prefix("label ")))
    presence = oof[PRESENT]
    low, high = presence.quantile([0.05, 0.95])
    is_present = val_table[PRESENT] == 1
    negatives = presence[~is_present]
    values = SPECIFICITIES if common.MIN_PATIENTS <= len(negatives) < len(presence) else ()
    allowed = {value: (1 - value) * len(negatives) for value in values}
    points = measure_sensitivity(
        "specificity", allowed, presence[is_present], oof["patient"][is_present], negatives, draws
    )
    is_constant = bool(high - low < MIN_SPREAD)
    metrics = {"best_epoch": row["epoch"], "operating_points": points, "is_nearly_constant": is_constant}
    run.meta |= {"epoch": row["epoch"], "wauc": row["wauc"], "operating_points": points}
    if run.cfg.task == "locate":
        write_table(run.folder / "proposals.csv", proposals.astype({"label": int}))
        metrics |= score_proposals(val_table, proposals, draws)
    common.save_checkpoint(run.folder / common.CHECKPOINT, run.model, run.cfg, run.meta)
    return metrics


def write_table(path: Path, table: DataFrame) -> None:
    write_atomic(path, table.to_csv(index=False, float_format="%.12g").encode())


def score_proposals(val_table: DataFrame, proposals: DataFrame, draws: int) -> dict:
    """recall_10mm: [share, low, high] of annotated points with a proposal; froc: at FALSE_PER_SCAN."""
    hits = []  # of each point the best score of a proposal near it, or 0
    patients = []  # of each point
    misses = []  # scores of proposals away from all points
    for row in val_table.itertuples():
        peaks = proposals[proposals[UID] == row.SeriesInstanceUID]
        away_mm = np.linalg.norm(row.points_mm[:, None] - peaks[PLACE].to_numpy(), axis=2)
        is_near = away_mm <= REACH_MM  # (points, proposals)
        scores = peaks["score"].to_numpy(np.float32)
        hits.extend((is_near * scores).max(axis=1, initial=0))
        patients.extend([row.patient] * len(is_near))
        misses.extend(scores[~is_near.any(axis=0)])
    allowed = {rate: rate * len(val_table) for rate in (*FALSE_PER_SCAN, math.inf)}
    *froc, every = measure_sensitivity("false_per_scan", allowed, hits, patients, misses, draws)
    return {"recall_10mm": [every["sensitivity"], every["low"], every["high"]], "froc": froc}


def measure_sensitivity(
    name: str, allowed: dict, scores: Sequence, patients: Sequence, negatives: Sequence, draws: int
) -> list:
    """For each value of `name` the share of scores above the lowest threshold that at most the allowed number
    of negatives exceed, with its 95 % interval over the patients; fewer than MIN_PATIENTS have none."""
    ranked = [*sorted(negatives, reverse=True), 0.0]
    points = []
    for value, number in allowed.items():
        highest = ranked[int(min(number + 1e-9, len(negatives)))]  # of the negatives that must not pass
        threshold = math.ceil(1e6 * highest) / 1e6  # rounded up, so that the last bits do not matter
        is_above = pd.Series(scores, dtype=float) > threshold
        drawn = np.empty(0)
        if len(scores):
            weights = common.patient_weights(patients, draws)
            drawn = weights @ is_above / weights.sum(1)
        point = {"threshold": threshold, "sensitivity": float(is_above.mean()), "positives": len(scores)}
        points.append({name: value} | point | common.summarise_draws(drawn, [len(set(patients))]))
    return points


def finish(folder: Path, accelerator: Accelerator, progress: Progress) -> None:
    """metrics.json: the scores of the best epoch and how the run went."""
    is_gpu = accelerator.device.type == "cuda"
    metrics = progress.metrics | {
        "epochs": progress.epoch,
        "seconds": round(sum(row["seconds"] for row in progress.history), 1),
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 3) if is_gpu else None,
        "precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "timm", "accelerate", "numpy")},
    }
    log(
        f"{folder}: kept epoch {metrics['best_epoch']}, wAUC {common.describe_wauc(metrics)}, "
        f"{metrics['num_patients']} patients; {len(metrics['undefined'])} labels of one class without an AUC"
    )
    if metrics["is_nearly_constant"]:
        log(
            f"{folder}: PREDICTIONS ARE NEARLY THE SAME FOR ALL SERIES, 90 % of them within {MIN_SPREAD}: "
            f"they tell nothing, whatever they score; train longer, or change lr or pretrained"
        )
    common.write_json(folder / "metrics.json", metrics)


# --- checkpoints for --resume -------------------------------------------------------------------------------
def describe_run(cfg: Config, table: DataFrame, accelerator: Accelerator) -> dict:
    """What a resumed run must share with the run that it goes on with."""
    settings = common.config_to_dict(replace(cfg, cache="", outputs="", workers=0, ensemble_weight=1.0))
    labels = common.text_sum(table[[UID, "fold", *LABELS]].to_csv())
    num, precision = accelerator.num_processes, accelerator.mixed_precision
    return settings | {"processes": num, "precision": precision, "series and labels": labels[:8]}


def save_last(folder: Path, state: TrainState) -> None:
    """Write last/<epoch>.pt, which ends with the SHA-256 of what stands before it, then prune older ones."""
    states = {name: part.state_dict() for name, part in state.parts.items()}
    buffer = io.BytesIO()
    torch.save(states | {"progress": asdict(state.progress)}, buffer)
    buffer.write(sha256(buffer.getbuffer()).digest())
    last = folder / "last"
    write_atomic(last / f"{state.progress.epoch:04d}.pt", buffer.getbuffer())
    common.remove_leftovers(last)
    for old in sorted(last.glob("*.pt"))[:-2]:  # the newest, and one to fall back to, stay
        old.unlink()


def load_last(folder: Path) -> dict | None:
    """The states of the newest checkpoint that verifies, and `progress`; None without one."""
    for path in sorted((folder / "last").glob("*.pt"), reverse=True):
        data = memoryview(path.read_bytes())
        states = data[:-32]
        if sha256(states).digest() == data[-32:]:
            return torch.load(io.BytesIO(states), map_location="cpu", weights_only=True)
        log(f"{path}: differs from its sum; falling back to the one before")
    return None


# --- the command --------------------------------------------------------------------------------------------
def train(cfg: Config, accelerator: Accelerator, args: Namespace) -> None:
    """Everything from an empty run folder to metrics.json; see the top of the file."""
    folder = Path(cfg.outputs) / cfg.run_name
    is_main = accelerator.is_main_process
    with fail_together(accelerator):
        table = load_table(cfg, args.limit)
        is_val = table["fold"] == cfg.fold
        train_table, val_table = table[~is_val], table[is_val]
        decoys = collect_decoys(cfg, train_table)
        refuse_leak(cfg, table)
        proposals, locator = load_proposals(cfg, table)
        state = begin(folder, cfg, accelerator, describe_run(cfg, table, accelerator), args)
        if is_main:
            claim_folder(folder, cfg)
    train_set = SeriesDataset(cfg, train_table, "train", decoys, proposals)
    val_set = SeriesDataset(cfg, val_table, "deploy", decoys, proposals)
    meta = {
        "prior": train_table[LABELS].mean().round(6).tolist(),
        "decoys": decoys.tolist(),
        "val_uids": val_set.uids,
        "locator": locator,
    }
    run = Run(folder, state.ema.module, cfg, meta)
    progress = state.progress
    state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)
    log(
        f"{folder}: {len(train_set)} series with {len(decoys)} annotated points train, {len(val_set)} "
        f"validate; batch {cfg.batch_size} x {accelerator.num_processes} processes x accumulation "
        f"{cfg.accumulation} = {cfg.batch_size * accelerator.num_processes * cfg.accumulation} series per "
        f"update, lr {cfg.lr:g}; {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )
    accelerator.init_trackers("aneurysm", {key: str(value) for key, value in progress.identity.items()})
    while progress.epoch < min(cfg.epochs, find_best(progress.history, cfg) + (cfg.patience or cfg.epochs)):
        clock = perf_counter()
        loss_sum, waited = train_epoch(cfg, accelerator, state, train_set)
        logits, proposed = predict(run.model, val_set, accelerator)
        seconds = perf_counter() - clock
        progress.epoch += 1
        metrics = common.score(val_table, logits, cfg.bootstrap)
        val_losses = label_loss(torch.tensor(logits), torch.tensor(val_set.labels), cfg.label_smoothing)
        row = {
            "epoch": progress.epoch,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": sum(gather_object([loss_sum])) / len(train_set),
            "val_loss": val_losses.mean().item(),
            **{name: metrics[name] for name in ("wauc", "low", "high")},
            "seconds": seconds,
            "data_wait": waited / seconds,
        }
        progress.history.append(row)
        log(
            f"epoch {progress.epoch}/{cfg.epochs}: loss {row['train_loss']:.4f}, validation "
            f"{row['val_loss']:.4f}, wAUC {common.describe_wauc(metrics)}, "
            f"{seconds:.0f} s; {seconds * (cfg.epochs - progress.epoch) / 60:.0f} min left"
        )
        accelerator.log(row, step=progress.epoch)
        if is_main:
            if find_best(progress.history, cfg) == progress.epoch:
                progress.metrics = metrics | write_best(run, row, val_table, logits, proposed)
            write_table(folder / "log.csv", DataFrame(progress.history))
            save_last(folder, state)
    if is_main:
        finish(folder, accelerator, progress)
    accelerator.end_training()


def begin(folder: Path, cfg: Config, accelerator: Accelerator, identity: dict, args: Namespace) -> TrainState:
    """Model, EMA and optimizer, new or from the last checkpoint. ValueError where they would spoil a run."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    if (folder / common.CHECKPOINT).exists() and not args.resume:
        raise ValueError(
            f"{folder}: holds a run; --resume goes on with it, another tag, seed or fold gets another "
            f"folder; delete this one to start again"
        )
    last = load_last(folder) if args.resume else None
    progress = Progress(**last["progress"]) if last else Progress(identity)
    if difference := common.describe_difference(identity, progress.identity):
        raise ValueError(
            f"{folder}: cannot resume with {difference}; resume as the run was begun, or delete the folder "
            f"to start again"
        )
    torch.manual_seed(cfg.seed)
    model = common.build_model(cfg, pretrained=not last).to(accelerator.device)
    fused = accelerator.scaler is None  # a fused step that fp16's scaler skips is not reported as skipped
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=cfg.weight_decay, fused=fused)
    ema = ModelEmaV3(model, decay=cfg.ema_decay, use_warmup=True)
    parts = {"model": model, "ema": ema.module, "optimizer": optimizer}
    if accelerator.scaler:
        parts["scaler"] = accelerator.scaler
    if last:
        for name, part in parts.items():
            part.load_state_dict(last[name])
        log(f"resumed after epoch {progress.epoch}")
    return TrainState(model, model, ema, optimizer, progress, parts)


def find_best(history: list, cfg: Config) -> int:
    """The epoch to keep, 0 of none: of most wAUC, or least loss where that is undefined (one class)."""
    if cfg.keep == "last":
        return len(history)
    scores = [-row["val_loss"] if math.isnan(row["wauc"]) else row["wauc"] for row in history]
    return int(np.argmax(scores)) + 1 if scores else 0


@contextmanager
def fail_together(accelerator: Accelerator) -> Iterator:
    """What fails in this block on one rank ends all of them, with one line and exit code 1."""
    error = ""
    try:
        yield
    except (ValueError, OSError) as raised:
        error = str(raised)
    error = max(gather_object([error]))  # "" where no rank has one
    if error:
        log(f"train.py: {error}")
        common.exit_rank(1)


def claim_folder(folder: Path, cfg: Config) -> None:
    """Make the run's folder, lock it until this process ends, write the settings; ValueError if locked."""
    (folder / "last").mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        # unlike flock's it is not inherited, so loaders that outlive a killed run do not hold it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing here; change tag, seed or fold") from None
    except OSError as error:
        log(f"{folder}: not locked ({error.strerror}); let no second run write here")
    common.remove_leftovers(folder)
    text = yaml.safe_dump(common.config_to_dict(cfg), sort_keys=False)
    write_atomic(folder / "config.yaml", text.encode())


def fit_workers(cfg: Config) -> Config:
    """The config with no more loaders than /dev/shm has room for: batches pass through it. Docker: 64 MB."""
    if not os.path.isdir("/dev/shm"):
        return cfg
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch_bytes = cfg.batch_size * cfg.in_chans * cfg.volume.img_size**2
    num_batches = shutil.disk_usage("/dev/shm").free // num_processes // batch_bytes
    # a loader works two batches ahead; another one is in use, and one on its way
    workers = min(cfg.workers, max(0, (num_batches - 2) // 2))
    if workers < cfg.workers:
        log(
            f"/dev/shm has room for {num_batches} batches: workers {workers}, not {cfg.workers}; docker run "
            f"--shm-size=1g makes more"
        )
    return replace(cfg, workers=workers)


def stop(number: int, _frame: object) -> None:
    """End at once at a signal (an exception could be lost in a destructor); finished epochs are saved."""
    if os.environ.get("RANK", "0") == "0":
        msg = f"\ntrain.py: stopped by {signal.Signals(number).name}; --resume goes on after the last epoch\n"
        os.write(2, msg.encode())
    os._exit(128 + number)


def make_accelerator(cfg: Config) -> Accelerator:
    """Accelerate's object, in a precision that the device has."""
    precision = cfg.precision
    if precision == "fp16" and PartialState().device.type == "cpu":
        log("precision fp16 needs a GPU: this run has no mixed precision")
        precision = "no"
    accelerator = Accelerator(
        mixed_precision=precision, log_with=cfg.tracker or None, project_dir=Path(cfg.outputs) / cfg.run_name
    )
    accelerator.gradient_accumulation_steps = 1  # whatever the environment sets
    is_alone = accelerator.num_processes == torch.get_num_threads() == 1  # more threads: the user's choice
    if is_alone and "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # accelerate launch has set OMP_NUM_THREADS=1
        torch.set_num_threads(common.usable_cores())
    return accelerator


def main() -> int:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  started with 2>&-
    parser = common.make_parser(__doc__, VolumeSettings, Config)
    parser.add_argument("--config", metavar="YAML", help="settings; without it their defaults")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and end")
    parser.add_argument(
        "--limit", type=common.positive_int, metavar="N", help="a quick look: N series, into OUTPUTS_limitN"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, if any")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        cfg = fit_workers(common.load_config(args.config, args.set))
        if args.limit:  # a quick look is not a member of an ensemble
            cfg = replace(cfg, outputs=f"{cfg.outputs}_limit{args.limit}")
        if args.print_config:
            yaml.safe_dump(common.config_to_dict(cfg), sys.stdout, sort_keys=False)
            return 0
        if cfg.tracker and not find_spec(cfg.tracker):
            raise ValueError(f"tracker: {cfg.tracker} is not installed; install it, or set tracker to ''")
        train(cfg, make_accelerator(cfg), args)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if "out of memory" in reason:
            reason += ". Lower batch_size (raise accumulation) or img_size, or set grad_checkpointing: true"
        elif isinstance(error, RuntimeError) and "Connection" not in reason:  # to a process that has failed
            raise
        # before the ranks are joined all fail alike, and the main one tells
        log(f"train.py: {reason}", everywhere=torch.distributed.is_initialized())
        return 1
    return 0


if __name__ == "__main__":
    common.exit_rank(main())
