"""DICOM files -> `Series` -> `Volume`: the only path from files to the voxels of a model.

`frames.py` reads the images. Space is LPS millimetres (x to the left, y to the back, z to the head), voxels
are indexed (z, y, x). Imports no torch, so that worker processes start fast.
"""

import errno
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import compress
from pathlib import Path

import cv2
import numpy as np
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view
from numpy.linalg import inv, norm
from numpy.polynomial.polynomial import polyfit

from frames import (
    Frames,
    Stack,
    image_difference,
    image_kind,
    image_number,
    is_between,
    key_value,
    make_frames,
    modality_of,
    read_header,
    read_identity,
    read_unpacked,
    repair_values,
    rescale_values,
    slice_step,
    thumbnail,
)

SAME_POSITION_MM = 0.02  # closer slices share a position
PLANES = ("sagittal", "coronal", "axial")  # slices lie along x, y, z
X, Y, Z = np.eye(3)
USUAL_DIRECTIONS = ((Y, -Z), (X, -Z), (X, Y))  # of rows and columns in these planes
BLANK = "blank"
# What tells the volumes of one series apart, in the order tried; then the order of images does.
VOLUME_KEYS = (
    "ImageType EchoNumbers EchoTime TemporalPositionIdentifier DiffusionBValue AcquisitionNumber "
    "AcquisitionTime TriggerTime StackID"
)
VOLUME_VERSION = 2  # to be raised with each change of the code that changes a volume's voxels


@dataclass(frozen=True)
class VolumeSettings:
    """What shapes a volume beside its files."""

    base_slices: int = 32  # axial slabs per volume
    img_size: int = 384  # rows and columns of a volume and of a crop
    roi_mm: float = 200.0  # side of the square box, centred on the head
    roi_top_mm: float = 160.0  # depth of the box below the top of the head
    roi_skip_mm: float = 0.0  # the box begins so far below the top, where air above the head shows the top
    ct_window: tuple[float, float] = (0.0, 600.0)  # HU; -125..225 would saturate contrast-filled arteries
    mr_percentiles: tuple[float, float] = (1.0, 99.8)  # of the series' own region


# --- reading ------------------------------------------------------------------------------------------------
def safe_uid(uid: str) -> str:
    """`uid` if it is safe as a file name (a UID, or the like of ID_0a1b), else a UID made of its SHA-256."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", uid):
        return uid
    digest = hashlib.sha256(uid.encode(errors="surrogatepass")).hexdigest()
    return "2.25." + str(int(digest, 16))[:38]


def natural_key(path: Path) -> list:
    """Sort key of a path in which `I10` follows `I9`."""
    return [(int(digits or 0), text) for digits, text in re.findall("([0-9]*)([^0-9]*)", str(path))]


def find_series(root: Path) -> tuple:
    """Series under `root`, a folder of any depth: (uid -> files, [(file that is not an image, reason)]).

    A folder named by a UID is one series if its first image has the same (0020,000E) SeriesInstanceUID or
    none; its other files are not opened, so a million files take seconds. Elsewhere images are grouped by
    SeriesInstanceUID, or by their folder's name, and never across (0010,0020) PatientIDs: a name that several
    series claim gets a number (`2024.03.01-1of2`). Damaged images count to their folder's largest series.
    Folders `segmentations` (vessel masks) and tables (.csv) are left out. Links are followed once."""
    groups = defaultdict(lambda: defaultdict(list))
    rejected = []

    def add_unreadable(error: OSError) -> None:
        groups[name_series(error.filename)][""].append(Path(error.filename))

    walked = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=add_unreadable):
        real = os.path.realpath(folder)
        if real in walked:
            subfolders.clear()
            continue
        walked.add(real)
        subfolders[:] = sorted(set(subfolders) - {"segmentations"})
        files = [Path(folder, name) for name in sorted(names) if not name.endswith(".csv")]
        for (series, patient), members in group_files(folder, files, rejected).items():
            groups[series][patient] += members
    claims = defaultdict(list)
    for (uid, _), by_patient in groups.items():
        if len(by_patient) == 2:  # images without a PatientID join those of the only patient
            without_id = by_patient.pop("", [])
            next(iter(by_patient.values())).extend(without_id)
        claims[uid] += by_patient.values()
    series = {}
    for uid, claimants in claims.items():
        count = len(claimants)
        for number, members in enumerate(claimants, start=1):
            series[uid if count == 1 else safe_uid(f"{uid}-{number}of{count}")] = members
    return series, rejected


def name_series(folder: str) -> tuple:
    """(uid, folder where it is only the folder's name) of images without a SeriesInstanceUID."""
    name = os.path.basename(os.path.abspath(folder))
    is_uid = re.fullmatch(r"[0-2](\.(0|[1-9][0-9]*))+", name)  # PS3.5 9.1; the date 2024.03.01 is not one
    return safe_uid(name), "" if is_uid else folder


def group_files(folder: str, files: list, rejected: list) -> dict:
    """Images of a folder by (series as in `name_series`, PatientID); (other file, reason) into `rejected`."""
    by_name = name_series(folder)
    is_uid = not by_name[1]
    groups = defaultdict(list)
    damaged, strays = [], []
    for path in files:
        try:
            identity = read_identity(path)
        except ValueError as error:
            strays.append((path, str(error)))
            continue
        if identity is None:
            damaged.append(path)
            continue
        uid, patient = identity
        if is_uid and not groups and uid in ("", by_name[0]):
            return {(by_name, patient): files}
        series = (safe_uid(uid), "") if uid else by_name
        groups[series, patient].append(path)
    if is_uid and files and not groups:
        return {(by_name, ""): files}
    rejected += strays
    if groups:
        max(groups.values(), key=len).extend(damaged)
    # empty files alone are not a series; one that may not be looked at could be an image
    elif any(not os.path.isfile(path) or os.path.getsize(path) for path in damaged):
        groups[by_name, ""] = damaged
    else:
        rejected += [(path, "empty file") for path in damaged]
    return groups


@dataclass
class Series:
    """One volume: frames sorted along +normal. Pixels are decoded when asked for, kept until `forget`."""

    uid: str
    modality: str  # CT or MR
    patient: str  # (0010,0020) PatientID, "" where absent
    frames: Frames
    positions_mm: ndarray  # (n,) along the normal
    normal: ndarray  # (3,)
    affine: ndarray  # (4, 4) (z, y, x) -> LPS mm; least squares where gaps are uneven; sheared if tilted
    spacing_mm: tuple  # slice (median gap), row, column
    plane: str  # axial, coronal or sagittal: the nearest
    notes: list  # everything that was left out, assumed or repaired
    skipped: list  # (file that is not a slice, reason)
    geometry: dict  # (SOPInstanceUID, frame index) -> every image, left-out ones too
    doubts: list  # why the volume may be wrong

    def stored(self, i: int) -> ndarray:
        """(rows, cols) integers of slice `i`, read-only. ValueError naming a file that does not decode."""
        frame = self.frames[i]
        try:
            return frame.stored
        except ValueError as error:
            raise ValueError(f"{frame.path}, frame {frame.index}: {error}") from error

    def forget(self, i: int | None = None) -> None:
        """Free the stored values of slice `i`, or of all."""
        for frame in self.frames if i is None else [self.frames[i]]:
            vars(frame).pop("stored", None)
        if i is None:
            read_unpacked.cache_clear()

    def point(self, sop_uid: str, x: float, y: float, f: int | None = None) -> ndarray:
        """(3,) LPS mm of column `x`, row `y` of an image, `f` its frame (from 0). ValueError if unknown."""
        if f is None and (sop_uid, 1) in self.geometry:
            raise ValueError(f"series {self.uid}: {sop_uid} has several frames, and no frame is named")
        frame = self.geometry.get((sop_uid, f or 0))
        if frame is None or np.isnan(frame.position).any():
            raise ValueError(f"series {self.uid}: no image {sop_uid}, frame {f or 0}, with a position")
        row_mm, col_mm = frame.spacing_mm
        return frame.position + x * col_mm * frame.row_dir + y * row_mm * frame.col_dir


def read_series(source: Path | list, uid: str | None = None) -> Series:
    """One volume from a folder of any depth or a list of files, of the images of series `uid` if any, else of
    all: those that agree in series, size, orientation and pixel spacing (`select_geometry`), one per position
    (`place_slices`). ValueError in one line if none: mosaics, projections, radiographs, reports."""
    where = f"{len(source)} files" if isinstance(source, list) else str(source)
    if not isinstance(source, list):
        source = [Path(folder, name) for folder, _, names in os.walk(source) for name in names] or [source]
    frames, skipped = read_frames(sorted(source, key=natural_key), where)
    stack = Stack(frames, where, [], [])
    is_other = [frame.header.get("SeriesInstanceUID", uid) != uid for frame in frames]
    if uid and not all(is_other):
        stack.leave_out(is_other, "images of other series left out")
    drop_copies(stack)
    orient_frames(stack)
    geometry = index_images(stack.frames)
    select_geometry(stack)
    drop_slabs(stack)
    add_remarks(stack)
    geometry |= index_images(place_slices(stack))
    header = stack.frames[0].header
    placement = measure_stack(stack)
    repair_values(stack)
    return Series(
        uid=safe_uid(uid or header.get("SeriesInstanceUID") or where),
        modality=modality_of(header),
        patient=header.get("PatientID", ""),
        frames=stack.frames,
        notes=stack.notes,
        skipped=skipped,
        geometry=geometry,
        doubts=stack.doubts,
        **placement,
    )


def read_frames(paths: list, where: str) -> tuple:
    """(images, files that are not slices). ValueError without any image, or where a tenth is damaged."""
    frames, skipped, num_intact = [], [], 0
    for path in paths:
        try:
            header = read_header(path)
            num_intact += 1
            frames += make_frames(path, header)
        except ValueError as error:
            skipped.append((path, str(error)))
            cause = error.__cause__
            if getattr(cause, "errno", None) not in (None, errno.EINVAL):
                raise ValueError(f"{path}: {error}; not the file's fault: check its path and disk") from error
    reasons = [f"{path.name}: {reason}" for path, reason in skipped]
    if not frames:
        raise ValueError(f"{where}: no CT or MR slice in {len(paths)} files. {'; '.join(reasons[:3])}")
    damaged = [text for text in reasons if ": truncated" in text or ": damaged" in text]
    num_images = num_intact + len(damaged)
    if len(damaged) > max(1, num_images // 10):
        raise ValueError(
            f"{where}: {len(damaged)} of {num_images} images are damaged ({damaged[0]}); expected at most a "
            f"tenth. Copy the series again"
        )
    return frames, skipped


def index_images(frames: Frames) -> dict:
    """(SOPInstanceUID, frame index) -> image, without UIDs that images at several places share."""
    images = defaultdict(list)
    for frame in frames:
        images[frame.sop_uid, frame.index].append(frame)
    return {key: members[0] for key, members in images.items() if count_places(members) == 1}


def count_places(frames: Frames) -> int:
    return len({frame.position.tobytes() for frame in frames})


def drop_copies(stack: Stack) -> None:
    """Leave out images that repeat the SOPInstanceUID, the position and the number of one before."""
    seen = set()
    is_copy = []
    for i, frame in enumerate(stack.frames):
        key = frame.sop_uid or i, frame.position.tobytes(), image_number(frame)
        is_copy.append(key in seen)
        seen.add(key)
    stack.leave_out(is_copy, "copies of images left out: same SOPInstanceUID and position")


def add_remarks(stack: Stack) -> None:
    """Note what was assumed for the images, each once with its number."""
    for text, count in Counter(text for frame in stack.frames for text in frame.remarks).items():
        remark = f"{text} ({count} of {len(stack.frames)} images)"
        stack.notes.append(remark)
        if text.startswith("no valid (0028,0030)"):
            stack.doubts.append(remark)


def orient_frames(stack: Stack) -> None:
    """Frames without a valid (0020,0037) ImageOrientationPatient get the plane that positions lie across."""
    frames = stack.frames
    is_missing = [np.isnan(frame.row_dir[0]) for frame in frames]
    if not any(is_missing):
        return
    points = [frame.position for frame in frames if np.isfinite(frame.position[0])]
    extent = np.ptp(np.percentile(points or [X], (10, 90), axis=0), axis=0)
    text = f"no valid (0020,0037) ImageOrientationPatient in {sum(is_missing)} of {len(frames)} images"
    plane = 2
    if extent.max() > SAME_POSITION_MM:
        plane = extent.argmax()
        stack.notes.append(f"{text}: {PLANES[plane]} by their positions")
    else:
        stack.doubts.append(f"{text}, nor positions: axial assumed")
    for frame in compress(frames, is_missing):
        frame.row_dir, frame.col_dir = USUAL_DIRECTIONS[plane]


def frame_points(frames: Frames) -> ndarray:
    """(n, 3) positions"""
    return np.array([frame.position for frame in frames])


def image_numbers(frames: Frames) -> ndarray:
    """(n,) integers"""
    return np.array([image_number(frame) for frame in frames])


def positions_along_normal(frames: Frames) -> ndarray:
    """(n,) mm"""
    return frame_points(frames) @ frames[0].normal


def distinct_positions(frames: Frames) -> ndarray:
    """Sorted mm along the normal; images closer than SAME_POSITION_MM share one."""
    positions = np.sort(positions_along_normal(frames))
    return positions[np.diff(positions, prepend=-np.inf) > SAME_POSITION_MM]


def rank_positions(frames: Frames) -> ndarray:
    """(n,) which of the distinct positions each frame has."""
    return np.searchsorted(distinct_positions(frames), positions_along_normal(frames), side="right") - 1


def select_geometry(stack: Stack) -> None:
    """Leave the largest group of images that agree in series, kind, size, orientation and pixel spacing."""
    alike = defaultdict(list)
    for frame in stack.frames:
        series = frame.header.get("SeriesInstanceUID") or frame.header.get("PatientID")
        alike[image_kind(frame.header), series, frame.rows, frame.cols].append(frame)
    groups = []
    for key, frames in alike.items():
        for group in group_by_geometry(frames):
            groups.append((key[0] == "slice", count_places(group), len(group), key, group))
    groups.sort(key=lambda group: group[:3], reverse=True)
    is_slice, num_places, _, key, best = groups[0]
    kind, best_series, *_ = key
    if not is_slice:
        if num_places < 3:
            raise ValueError(f"{stack.where}: {len(stack.frames)} {kind} images, no volume")
        stack.notes.append(f"the images call themselves {kind}: ImageType {best[0].header['ImageType']}")
    num_alike = len(alike[key])
    if num_alike >= 8 and len(best) < 0.6 * num_alike:
        stack.doubts.append(f"{len(best)} of {num_alike} images agree in orientation and pixel spacing")
    for *_, (kind, series, rows, cols), frames in groups[1:]:
        other = " of another series" if series != best_series else ""
        row_mm, col_mm = frames[0].spacing_mm
        stack.notes.append(
            f"{len(frames)} images{other} left out: {kind}, {rows} x {cols} pixels of {row_mm:.3g} x "
            f"{col_mm:.3g} mm, normal {frames[0].normal.round(2) + 0.0}"
        )
    stack.frames = best


def group_by_geometry(frames: Frames) -> list:
    """Groups of equal pixel spacing (0.2 %) and orientation (0.02 from the median; of a few images 0.001)."""
    tolerance = 0.02 if len(frames) >= 8 else 0.001
    geometry = np.array([[*10 * np.log(f.spacing_mm), *f.row_dir, *f.col_dir] for f in frames])
    groups, rest = [], np.arange(len(frames))
    while len(rest):
        # where several orientations are none in the majority, the first takes the median's place
        for centre in (np.median(geometry[rest], axis=0), geometry[rest[0]]):
            is_near = np.abs(geometry[rest] - centre).max(axis=1) < tolerance
            if is_near.any():
                break
        groups.append([frames[i] for i in rest[is_near]])
        rest = rest[~is_near]
    return groups


def drop_slabs(stack: Stack) -> None:
    """Leave out images of another (0018,0050) SliceThickness among the usual ones: thick slabs, projections
    of thin slices. A scan whose thickness changes on the way has them side by side instead."""
    thickness = np.array([frame.header.get("SliceThickness") or np.nan for frame in stack.frames])
    sizes, counts = np.unique(thickness[thickness > 0], return_counts=True)
    if len(sizes) < 2:
        return
    usual = sizes[2 * counts >= counts.max()].min()
    is_slab = (thickness > 1.35 * usual) | (thickness < usual / 1.35)
    positions = positions_along_normal(stack.frames)
    others, slabs = positions[~is_slab], positions[is_slab]
    is_among = (slabs > others.min()) & (slabs < others.max())
    if is_among.sum() > 0.5 * len(slabs):
        stack.leave_out(
            is_slab, f"images left out: thicker or thinner than the {usual:g} mm slices among them"
        )


def place_slices(stack: Stack) -> Frames:
    """Leave one image per position along +normal; returns every image with its position. Sources of positions
    are tried until nearly all images differ in position, and neighbours are alike."""
    num_images = len(stack.frames)
    first = None
    for source, is_certain, frames in position_sources(stack.frames):
        attempt = Stack(frames, stack.where, [f"slices placed by {source}"] if source else [], [])
        drop_strays(attempt)
        select_volume(attempt)
        num_positions = len(distinct_positions(attempt.frames))
        first = first or (attempt, frames, num_positions, source)
        is_full = len(attempt.frames) <= max(1.1 * num_positions, num_positions + 1)
        is_stack = num_positions > 1 or num_images == 1
        if is_full and is_stack and (is_certain or is_ordered(attempt.frames, first[2])):
            break
        if not source and is_comb(attempt.frames):
            break
    else:
        attempt, frames, num_positions, source = first
        counts = np.bincount(rank_positions(attempt.frames))
        if num_positions > 1 and (counts == np.median(counts)).mean() < 0.9:
            raise ValueError(
                f"{stack.where}: {len(attempt.frames)} images share {num_positions} positions, and neither "
                f"(0020,1041) SliceLocation, (0020,0013) InstanceNumber nor file names tell them apart"
            )
        num_numbers = len(set(image_numbers(attempt.frames)))
        if num_images >= 8 and (num_positions == 1 or source or num_numbers < len(attempt.frames)):
            stack.doubts.append(f"{num_images} images without plausible positions: the slices are a guess")
        select_labelled(attempt, count_visits(attempt.frames), "InstanceNumber")
    slices = take_one_per_position(attempt.frames)
    stack.notes += attempt.notes
    num_others = len(attempt.frames) - len(slices)
    if num_others:
        stack.notes.append(f"{num_others} images left out at positions that others hold")
    if num_images >= 8 and len(slices) <= num_images / 8:
        stack.doubts.append(f"{len(slices)} slices of {num_images} images")
    stack.frames = slices
    return frames


def position_sources(frames: Frames) -> Iterator:
    """(where positions come from, whether they are beyond doubt, frames so placed), the best source first."""
    is_known = np.isfinite(frame_points(frames)[:, 0])
    if is_known.all():
        yield "", True, frames
    locations = np.array([frame.header.get("SliceLocation", np.nan) for frame in frames])
    if np.ptp(locations) > SAME_POSITION_MM:
        yield "(0020,1041) SliceLocation", True, place_on_line(frames, locations, 1.0)[0]
    if is_known.all() and len(frames) < 8:
        return
    step, tag = slice_step(frames[0].header, frames[0].spacing_mm[0])
    for name, values in (
        ("(0020,0013) InstanceNumber", image_numbers(frames)),
        ("the order of file names", np.arange(len(frames))),
    ):
        placed, line_step = place_on_line(frames, values, step)
        is_certain = abs(line_step - step) < 0.1 * step
        yield f"{name} times {line_step or step:.4g} mm ({tag})", is_certain, placed
    if is_known.any():
        yield f"the {is_known.sum()} known positions", True, list(compress(frames, is_known))


def place_on_line(frames: Frames, values: ndarray, step_mm: float) -> tuple:
    """(frames on the line that known positions follow by `values` to half a millimetre, its step), else
    (frames in steps of `step_mm` along the normal, in the direction in which known positions grow, 0)."""
    points = frame_points(frames)
    is_known = np.isfinite(points[:, 0])
    known, known_values = points[is_known], values[is_known]
    step, line_step = step_mm * frames[0].normal, 0.0
    if len(np.unique(known_values)) > 1 and np.ptp(known, axis=0).max() > SAME_POSITION_MM:
        origin, slope = polyfit(known_values, known, 1)
        errors = origin + np.outer(known_values, slope) - known
        if np.abs(errors).max() < 0.51:
            step, line_step = slope, norm(slope)
        elif slope @ frames[0].normal < 0:
            step = -step
    start = np.median(known - np.outer(known_values, step), axis=0) if len(known) else np.zeros(3)
    positions = start + np.outer(values, step)
    placed = [replace(f, position=position) for f, position in zip(frames, positions, strict=True)]
    return placed, line_step


def is_comb(frames: Frames) -> bool:
    """Whether frames lie at even positions, most of them alone, and the others repeat slices: these are like
    the slice at their position, and InstanceNumbers do not run along the stack."""
    frames = sorted(frames, key=image_number)
    ranks, gaps = rank_positions(frames), np.diff(distinct_positions(frames))
    counts, steps = np.bincount(ranks), np.diff(ranks)
    if (counts == 1).mean() < 0.4 or len(gaps) < 7 or np.percentile(gaps, 90) > 1.5 * np.median(gaps):
        return False
    if (steps >= 0).all() or (steps <= 0).all():
        return False
    near = far = 0.0
    for rank in np.flatnonzero(counts > 1)[:24]:
        first, *_, last = np.flatnonzero(ranks == rank)
        distant = np.argmax(ranks == (rank + len(counts) // 4) % len(counts))
        near += image_difference(frames[first], frames[last])
        far += image_difference(frames[first], frames[distant])
    return near < 0.5 * far


def drop_strays(stack: Stack) -> None:
    """Leave out a few frames (a tenth at most) beyond a wide gap, or far from those numbered next to them."""
    places = distinct_positions(stack.frames)
    gaps = np.diff(places)
    if len(gaps) < 5:
        return
    gap = np.median(gaps)
    holes = places[1:][gaps > max(4 * gap, 30)]
    clusters = np.searchsorted(holes, positions_along_normal(stack.frames), side="right")
    is_stray = clusters != np.bincount(clusters).argmax()
    by_number = np.argsort(image_numbers(stack.frames), kind="stable")
    # around each the two before and the two after, mirrored at the ends
    windows = sliding_window_view(np.pad(by_number, 2, mode="reflect"), 5)
    points = frame_points(stack.frames)
    jumps = norm(points[by_number] - np.median(points[windows], axis=1), axis=1)
    steps = norm(np.diff(points[by_number], axis=0), axis=1)
    is_stray[by_number] |= jumps > 3 * max(gap, np.median(steps))
    if is_stray.sum() <= max(1, len(points) // 10):
        place = stack.frames[is_stray.argmax()].position.round(1).tolist()
        stack.leave_out(is_stray, f"images left out: far from the others, one at {place} mm")


def is_ordered(frames: Frames, num_shared: int) -> bool:
    """Whether the order is plausible: each slice is more like the next than like one far away, and than the
    one as far on as images share the best source's `num_shared` positions, and images are not all alike."""
    if len(frames) < 8:
        return True
    frames = take_one_per_position(frames)
    lag = max(2, len(frames) // num_shared) if num_shared > 1 else 2
    far_lag = len(frames) // 4
    starts = range(lag - 1, len(frames) - max(lag, far_lag), lag)[-24:]
    near, later, far = (
        sum(image_difference(frames[i], frames[i + step]) for i in starts) for step in (1, lag, far_lag)
    )
    images = np.array([thumbnail(frames[i]) for i in starts])
    contrast = np.abs(images - images.mean(axis=(1, 2), keepdims=True)).sum()
    return near < 0.85 * later and near < 0.5 * far and far > 0.05 * contrast


def count_sweeps(frames: Frames, values: list) -> ndarray:
    """For each frame, how often the stack was run through before it, in the order of values."""
    sweeps = np.zeros(len(frames), int)
    if len(frames) < 2:
        return sweeps
    order = sorted(range(len(frames)), key=values.__getitem__)
    positions = positions_along_normal(frames)
    steps = np.diff(positions[order])
    steps *= np.sign(np.median(steps))
    is_return = steps < -0.5 * np.ptp(positions)
    if (steps < 0).sum() <= is_return.sum() + 0.1 * len(frames):
        sweeps[order[1:]] = np.cumsum(is_return)
    return sweeps


def count_visits(frames: Frames) -> ndarray:
    """For each frame, how many of lower InstanceNumber share its position."""
    ranks = rank_positions(frames)
    order = np.lexsort((image_numbers(frames), ranks))
    visits = np.arange(len(frames)) - np.searchsorted(ranks[order], ranks[order])
    return visits[np.argsort(order)]


def alternate(frames: Frames) -> ndarray:
    """0 and 1 in turn along the normal where gaps are by turns wide and narrow, else 0."""
    gaps = np.diff(distinct_positions(frames))
    if len(gaps) < 8:
        return np.zeros(len(frames))
    narrow, wide = sorted(np.percentile(gaps[start::2], (10, 90)).tolist() for start in (0, 1))
    return rank_positions(frames) % 2 * (narrow[1] < 0.8 * wide[0])


def select_volume(stack: Stack) -> None:
    """Leave a single volume where an attribute, or the order of images, tells several complete ones apart."""
    for name in VOLUME_KEYS.split():
        select_labelled(stack, [key_value(frame, name) for frame in stack.frames], name)
    for name in ("InstanceNumber", "AcquisitionTime", "order of files"):
        values = [key_value(frame, name) for frame in stack.frames]
        select_labelled(stack, count_sweeps(stack.frames, values), name)
    select_labelled(stack, alternate(stack.frames), "alternating gaps")


def select_labelled(stack: Stack, labels: list | ndarray, name: str) -> None:
    """Leave the fullest volume (`is_volume`) of one label; in CT, of full ones that with filled vessels."""
    if len(set(labels)) == 1:
        return
    volumes = defaultdict(list)
    for frame, label in zip(stack.frames, labels, strict=True):
        volumes[label].append(frame)
    places = distinct_positions(stack.frames)
    ordered = [volumes[label] for label in sorted(volumes)]
    complete = [volume for volume in ordered if is_volume(volume, places, len(stack.frames))]
    if not complete:
        return
    counts = np.array([len(distinct_positions(volume)) for volume in complete])
    most, best = counts.max(), complete[counts.argmax()]
    full = list(compress(complete, counts >= 0.9 * most))
    if len(full) > 1 < most and name != "ImageType" and best[0].is_ct:
        low, high = np.median([distinct_positions(volume)[[0, -1]] for volume in full], axis=0)
        shared = low + (high - low) * np.linspace(0.2, 0.8, 6)
        best = max(full, key=lambda volume: measure_brightness(volume, shared))
    stack.notes.append(f"{len(complete)} volumes by {name}: one of them kept ({len(best)} images)")
    stack.frames = best


def is_volume(frames: Frames, places: ndarray, num_all: int) -> bool:
    """Whether frames cover the `places` of `num_all` images: they lie at nearly all of these (at all where
    few share places), or are even slices without room for others. MR may take odd slices before even."""
    positions = distinct_positions(frames)
    if len(positions) >= (0.9 if num_all > 1.1 * len(places) else 1.0) * len(places):
        return True
    if len(positions) < max(3, len(places) / 4):
        return False
    gaps = np.diff(positions)
    gap = np.median(gaps)
    thickness = frames[0].header.get("SliceThickness") or gap
    distances = np.abs(np.subtract.outer(places, positions)).min(axis=1)
    others = distances[distances > SAME_POSITION_MM]
    narrow, wide = np.percentile(np.diff(places), (25, 75))
    return (
        np.percentile(gaps, 90) < 1.5 * gap
        and gap < 1.7 * thickness
        and (others < 0.6 * gap).sum() > 0.8 * len(others)
        and (wide > 1.2 * narrow or frames[0].is_ct)
    )


def measure_brightness(frames: Frames, places: ndarray) -> float:
    """Sum of mean values at some places along the normal, interpolated between slices."""
    frames = take_one_per_position(frames)
    positions = positions_along_normal(frames)
    after = np.searchsorted(positions, places).clip(1, len(frames) - 1)
    neighbours = np.unique([after - 1, after])
    means = [thumbnail(frames[k]).mean() for k in neighbours]
    return np.interp(places, positions[neighbours], means).sum()


def take_one_per_position(frames: Frames) -> Frames:
    """Frames along +normal; where several share a position, the one whose InstanceNumber fits the others'."""
    frames = [frames[i] for i in np.argsort(positions_along_normal(frames), kind="stable")]
    ranks = rank_positions(frames)
    numbers = image_numbers(frames)
    is_single = np.bincount(ranks)[ranks] == 1
    expected = np.interp(ranks, ranks[is_single], numbers[is_single]) if is_single.any() else -1e12
    order = np.lexsort((numbers, np.abs(numbers - expected), ranks))
    return [frames[i] for i in order[np.diff(ranks[order], prepend=-1) > 0]]


def measure_stack(stack: Stack) -> dict:
    """How sorted frames lie, as fields of `Series`; gaps and tilt are noted."""
    first, normal = stack.frames[0], stack.frames[0].normal
    points = frame_points(stack.frames)
    positions = points @ normal
    if len(points) == 1:
        gap, source = slice_step(first.header, first.spacing_mm[0])
        start, step = points[0], gap * normal
        stack.notes.append(f"a single slice: {gap:.4g} mm thick ({source})")
    else:
        gaps = np.diff(positions)
        gap, widest = float(np.median(gaps)), gaps.argmax()
        start, step = polyfit(np.arange(len(points)), points, 1)
        _, drift = polyfit(positions, points, 1)  # by mm along the normal
        tilt = norm(drift - normal)
        if gaps[widest] > 1.5 * gap:
            stack.notes.append(
                f"slices missing or uneven: gaps of more than 1.5 x the median {gap:.3f} mm: "
                f"{(gaps > 1.5 * gap).sum()}, the widest of {gaps[widest]:.3f} mm after slice {widest}"
            )
        if tilt > 1e-3:
            stack.notes.append(f"tilted: the stack leaves the slice normal by {tilt:.4f} mm per mm")
    row_mm, col_mm = first.spacing_mm
    affine = np.eye(4)
    affine[:3] = np.column_stack([step, row_mm * first.col_dir, col_mm * first.row_dir, start])
    return {
        "positions_mm": positions,
        "normal": normal,
        "affine": affine,
        "spacing_mm": (gap, row_mm, col_mm),
        "plane": PLANES[np.abs(normal).argmax()],
    }


# --- volume -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Volume:
    """A series as the models see it."""

    voxels: ndarray  # (Z, H, W) uint8
    affine: ndarray  # (4, 4) from (z, y, x, 1) to LPS mm
    notes: list
    doubts: list  # why it may be wrong, the series' doubts among them

    @property
    def spacing_mm(self) -> list:
        """[z, y, x]"""
        return norm(self.affine[:3, :3], axis=0).tolist()


@dataclass(frozen=True)
class Box:
    """The region of interest in canonical millimetres, along (z, y, x)."""

    low: ndarray  # (3,) mm of the lower edges
    steps: ndarray  # (3,) mm per voxel
    shape: ndarray  # (3,) voxels
    window: ndarray  # (2,) pixels along the image axes that cover the box, and one more
    starts: ndarray  # (n, 2) first pixel of the window in each image: gantry tilt moves it

    def edges(self, axis: int) -> ndarray:
        """(shape + 1,) mm of the voxels' edges along an axis."""
        return self.low[axis] + self.steps[axis] * np.arange(self.shape[axis] + 1)

    def middles(self, axis: int) -> ndarray:
        """(shape,) mm of the voxels' middles along an axis."""
        return self.edges(axis)[:-1] + self.steps[axis] / 2


@dataclass(frozen=True)
class Grid:
    """Where a series' pixels lie along the canonical axes (z, y, x), reached by permutation and flips alone.
    Millimetres along an axis are an LPS point's dot product with its direction; slices (k) grow with them."""

    series: Series
    directions: ndarray  # (3, 3) a row per canonical axis: its unit vector in LPS
    through: int  # the axis across slices: 0 axial, 1 coronal, 2 sagittal
    image_axes: ndarray  # (2,)
    is_transposed: int  # 1: image[row, column] -> image[column, row]
    flips: ndarray  # (2,) after that: 1, or -1 where an image axis runs backwards
    steps: ndarray  # (2,) mm per pixel along the image axes
    shape: ndarray  # (2,) pixels along the image axes
    order: list  # (n,) index into series.frames
    frames: Frames  # in this order
    centres: ndarray  # (n,) mm along `through`
    spans: ndarray  # (n, 2) mm that each slice stands for
    edges: ndarray  # (n, 2) mm of the outer edge of each slice's first pixel
    faults: dict  # index into series.frames, of those decoded so far -> "", BLANK or an error

    def image(self, k: int) -> ndarray:
        """Stored values of slice k along its canonical axes, zeros if they cannot be decoded (`faults`)."""
        i = self.order[k]
        try:
            stored = self.series.stored(i)
        except ValueError as error:
            self.faults[i] = str(error)
            return np.zeros(self.shape, np.int16)
        rows, columns = stored.shape  # two pixels that differ spare the look at all
        is_blank = stored[0, 0] == stored[rows // 2, columns // 2] and np.ptp(stored) == 0
        self.faults[i] = BLANK if is_blank else ""
        image = stored.T if self.is_transposed else stored
        return image[:: self.flips[0], :: self.flips[1]]

    @property
    def extents_mm(self) -> ndarray:
        """(3, 2) outer edges of what was scanned along each axis, in the image those of the middle slice."""
        low = self.edges[len(self.edges) // 2]
        along = np.column_stack([low, low + self.shape * self.steps])
        across = self.spans.min(), self.spans.max()
        return np.insert(along, self.through, across, axis=0)


def canonical_grid(series: Series, faults: dict | None = None) -> Grid:
    """The grid of a series' usable slices, as far as `faults` are known: neither broken nor blank but at the
    ends. Its axes lean as the scan does, so that nothing is interpolated but across slices."""
    first, normal = series.frames[0], series.normal
    stored = np.stack([normal, np.cross(normal, first.row_dir), first.row_dir])
    cosines = stored[:, ::-1]  # of a growing slice, row and column number with z, y, x
    through = np.abs(cosines[0]).argmax()
    image_axes = np.delete(range(3), through)
    is_transposed = np.abs(cosines[1, image_axes]).argmax()
    image_numbers = [2, 1] if is_transposed else [1, 2]
    permutation = np.insert(image_numbers, through, 0)
    signs = np.where(cosines[permutation, range(3)] < 0, -1, 1)
    directions = stored[permutation] * signs[:, None]
    shape = np.array([0, first.rows, first.cols])[image_numbers]
    steps = np.array(series.spacing_mm)[image_numbers]
    flips = signs[image_axes]
    pixels_before = np.where(flips < 0, shape - 0.5, 0.5)
    faults = faults or {}
    positions = frame_points(series.frames) @ directions.T  # (n, 3) mm of the first stored pixel
    order = [i for i in np.argsort(positions[:, through]).tolist() if faults.get(i, "") in ("", BLANK)]
    filled = [k for k, i in enumerate(order) if faults.get(i) == ""] or [0]
    order = [i for k, i in enumerate(order) if faults.get(i) != BLANK or not filled[0] < k < filled[-1]]
    positions = positions[order]
    centres = positions[:, through]
    return Grid(
        series=series,
        directions=directions,
        through=through,
        image_axes=image_axes,
        is_transposed=is_transposed,
        flips=flips,
        steps=steps,
        shape=shape,
        order=order,
        frames=[series.frames[i] for i in order],
        centres=centres,
        spans=slice_spans(centres, series.spacing_mm[0]),
        edges=positions[:, image_axes] - pixels_before * steps,
        faults=faults,
    )


def slice_spans(centres: ndarray, thickness_mm: float) -> ndarray:
    """(n, 2) mm that each of n growing slices stands for: to the midpoints between neighbours, but at most
    0.75 of the median gap (a missing slice leaves a hole); a single slice is thickness_mm wide."""
    gaps = np.diff(centres)
    usual = np.median(gaps) if len(gaps) else thickness_mm
    gaps = np.minimum(gaps, 1.5 * usual)
    half = np.pad(gaps, 1, constant_values=usual) / 2
    return np.column_stack([centres - half[:-1], centres + half[1:]])


def slab_weights(spans: ndarray, edges: ndarray) -> tuple:
    """(weights (Z, n) of n slices in Z slabs by overlap with their spans (n, 2), rows sum to 1; share (Z,) of
    each slab that spans cover). A slab that no span touches is interpolated."""
    first, last = spans.T
    low, high = edges[:-1, None], edges[1:, None]
    overlap_mm = np.minimum(high, last) - np.maximum(low, first)
    weights = np.maximum(overlap_mm, 0)
    covered = weights.sum(axis=1) / np.diff(edges)
    is_hole = covered < 1e-6
    middles = (low + high)[is_hole, 0] / 2
    weights[is_hole] = line_weights(spans.mean(axis=1), middles)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights, covered


def line_weights(centres: ndarray, targets: ndarray) -> ndarray:
    """Weights (P, n) of linear interpolation between n growing centres at P targets; constant beyond ends."""
    return np.column_stack([np.interp(targets, centres, row) for row in np.eye(len(centres))])


def to_voxel(points_lps: ndarray, affine: ndarray) -> ndarray:
    """LPS mm (P, 3) -> voxels (P, 3), (z, y, x); voxel centres are whole numbers."""
    return to_lps(points_lps, inv(affine))


def to_lps(voxels: ndarray, affine: ndarray) -> ndarray:
    """Voxels (P, 3), (z, y, x) -> LPS mm (P, 3)."""
    points = np.asarray(voxels, float).reshape(-1, 3)
    return points @ affine[:3, :3].T + affine[:3, 3]


def make_volume(series: Series, settings: VolumeSettings) -> Volume:
    """The box below the top of the head as settings.base_slices slabs of settings.img_size pixels, uint8.

    The box is measured from the top, because that is the end that every head scan shares. It is roi_mm wide,
    centred on the head, and roi_top_mm deep, along z cut to what was scanned. A slab is the mean of its
    slices, weighted by overlap, because single slices 5 mm apart would miss most aneurysms; pixels are area
    means or, where the image grows, linear, 0 outside of it. ct_window, in MR mr_percentiles of the box,
    become 0..255. Up to 30 slices outside of it show the head. ValueError if over a tenth do not decode."""
    num_slices, num_rendered = len(series.frames), 0
    grid = canonical_grid(series)
    # All over again without the slices that turn out faulty: they came out as zeros, or are blank.
    while len(grid.order) != num_rendered:
        num_rendered = len(grid.order)
        notes = []
        box = place_box(grid, settings, notes)
        limits = choose_limits(grid, box, settings)
        weights, covered = weigh_slices(grid, box)
        voxels = render_box(grid, box, weights, limits)
        series.forget()
        errors = [fault for fault in grid.faults.values() if fault not in ("", BLANK)]
        if len(errors) > max(1, num_slices // 10) or len(errors) == num_slices:
            raise ValueError(errors[0])
        grid = canonical_grid(series, grid.faults)
    num_blank = num_slices - len(errors) - len(grid.order)
    if errors:
        notes.append(f"{len(errors)} slices left out, they cannot be decoded: {errors[0]}")
    if num_blank:
        notes.append(f"{num_blank} slices left out, they are blank")
    doubts = series.doubts + doubt_voxels(grid, box, voxels, covered, notes)
    affine = np.eye(4)
    affine[:3, :3] = grid.directions.T * box.steps
    affine[:3, 3] = grid.directions.T @ (box.low + box.steps / 2)
    return Volume(voxels, affine, notes, doubts)


def place_box(grid: Grid, settings: VolumeSettings, notes: list) -> Box:
    """The box under the head, less its upper roi_skip_mm where the scan shows the top and twice as much. Its
    edge is moved to the middle slice's nearest pixel edge, so that resizing is exact."""
    bottom, covered = grid.extents_mm[0]
    head = find_head(grid)
    if head is None:
        notes.append("head not found: the box starts at the top of the scan, centred on it")
        head = covered, *grid.extents_mm[1:].mean(axis=1)
    side_mm = settings.roi_mm
    low = np.array(head) - side_mm / 2
    low[0] = max(head[0] - settings.roi_top_mm, bottom)
    depth_mm = head[0] - low[0]
    if covered - head[0] > 2 and depth_mm > 2 * settings.roi_skip_mm:
        depth_mm -= settings.roi_skip_mm
    size_mm = np.array([depth_mm, side_mm, side_mm])
    shape = np.array([settings.base_slices, settings.img_size, settings.img_size])
    axes = grid.image_axes
    middle = grid.extents_mm[axes, 0]
    pixels = np.rint((low[axes] - middle) / grid.steps)
    low[axes] = middle + pixels * grid.steps
    window = np.ceil(size_mm[axes] / grid.steps - 1e-6).astype(int) + 1
    if window.max() > 8192:
        raise ValueError(f"(0028,0030) PixelSpacing {grid.steps.min():g} mm: expected at least 0.03 mm")
    starts = np.rint((low[axes] - grid.edges) / grid.steps).astype(int)
    return Box(low, size_mm / shape, shape, window, starts)


def weigh_slices(grid: Grid, box: Box) -> tuple:
    """`slab_weights` along `through`, 0 beside the scan; linear where slices not across z are sparse."""
    weights, covered = slab_weights(grid.spans, box.edges(grid.through))
    if grid.through != 0 and np.median(np.diff(grid.spans)) > box.steps[grid.through]:
        weights = line_weights(grid.centres, box.middles(grid.through))
    weights[~is_scanned(grid, box, grid.through)] = 0
    return weights, covered


def is_scanned(grid: Grid, box: Box, axis: int) -> ndarray:
    """Of the voxels along an axis, whether their middles lie in what was scanned."""
    return is_between(box.middles(axis), tuple(grid.extents_mm[axis]))


def render_box(grid: Grid, box: Box, weights: ndarray, limits: tuple) -> ndarray:
    """Voxels (Z, H, W) from the weights (voxels along `through`, slices). Slices are clipped, or bone would
    outshine an artery, then merged, then resized once per slab: both are linear, so the order is free."""
    shape = box.shape[grid.image_axes]
    factors = grid.steps / box.steps[grid.image_axes]
    slabs = np.zeros((len(weights), *shape), np.uint8)
    # neighbouring slabs share slices
    load = lru_cache(maxsize=2)(partial(load_window, grid, box, limits))
    for z in np.flatnonzero(weights.any(axis=1)):
        merged, offset = np.zeros(box.window, np.float32), 0.0
        for k in np.flatnonzero(weights[z]):
            window, gain, bias = load(k)
            weight = float(weights[z, k])
            cv2.scaleAdd(window, gain * weight, merged, merged)
            offset += bias * weight
        merged += np.float32(offset)
        slab = resize_exactly(merged, factors, shape)
        slabs[z] = np.clip(slab, 0, 1) * 255 + 0.5
    return np.ascontiguousarray(np.moveaxis(slabs, 0, grid.through))


def load_window(grid: Grid, box: Box, limits: tuple, k: int) -> tuple:
    """(window, gain, bias): stored values of slice k in the box, (h, w) float32, clipped at the limits, the
    lower one outside of the image and for padding. limits -> 0..1 is gain * window + bias."""
    frame = grid.frames[k]
    # As stored; dark lies above bright where the slope is negative.
    dark, bright = ((value - frame.intercept) / frame.slope for value in limits)
    low, high = map(np.float32, sorted((dark, bright)))
    image = crop_image(grid, k, box)
    rows, columns = image.shape
    top, left = box.starts[k]
    window = np.empty(box.window, np.float32)
    inside = window[max(-top, 0) :, max(-left, 0) :][:rows, :columns]
    if inside.shape != window.shape:
        window[:] = dark
    np.clip(image, low, high, out=inside)
    if frame.padding:
        inside[is_between(image, frame.padding)] = dark
    grid.series.forget(grid.order[k])
    gain = 1 / (bright - dark)
    return window, gain, -dark * gain


def crop_image(grid: Grid, k: int, box: Box) -> ndarray:
    """Stored values of slice k in the box, as far as its image reaches, at its position to a whole pixel."""
    first = box.starts[k]
    (top, left), (bottom, right) = np.maximum((first, first + box.window), 0)
    return grid.image(k)[top:bottom, left:right]


def resize_exactly(image: ndarray, factors: ndarray, shape: ndarray) -> ndarray:
    """(h, w) float32 scaled by factors from the upper left edge on, by area or linearly, cut to shape."""
    for method, (y, x) in (
        (cv2.INTER_AREA, np.minimum(factors, 1)),
        (cv2.INTER_LINEAR, np.maximum(factors, 1)),
    ):
        image = cv2.resize(image, None, fx=x, fy=y, interpolation=method)
    rows, columns = shape
    return image[:rows, :columns]


def choose_limits(grid: Grid, box: Box, settings: VolumeSettings) -> tuple:
    """ct_window, or mr_percentiles of the rescaled pixels in the box (up to 30,000 of each of 16 slices).
    Padding counts as black air in a magnitude image, and not at all where zero is far from all tissue."""
    if grid.series.modality == "CT":
        return settings.ct_window
    edges = box.edges(grid.through)
    starts, ends = grid.spans.T
    is_inside = (ends > edges[0]) & (starts < edges[-1])
    samples = [np.zeros(0, np.float32)]
    for k in pick_evenly(np.flatnonzero(is_inside), 16):
        stored = crop_image(grid, k, box)
        stride = 1 + math.isqrt(stored.size // 30_000)
        values = rescale_values(grid.frames[k], stored[::stride, ::stride])
        if not grid.faults[grid.order[k]]:
            samples.append(values.ravel())
    values = np.concatenate(samples)
    if np.isnan(values).all():
        return 0.0, 1.0
    dark, bright = np.nanpercentile(values, settings.mr_percentiles).tolist()
    if 0 <= dark < 2 * (bright - dark):
        dark, bright = np.percentile(np.nan_to_num(values), settings.mr_percentiles).tolist()
    return dark, bright if bright > dark else dark + 1


def pick_evenly(items: ndarray, count: int) -> list:
    """At most `count` of the items, evenly spread, first and last among them."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items)))
    return items[picks.round().astype(int)].tolist()


def doubt_voxels(grid: Grid, box: Box, voxels: ndarray, covered: ndarray, notes: list) -> list:
    """What makes voxels implausible, of what was scanned in the box: every slab, every third pixel."""
    doubts = []
    z, y, x = size_mm = np.ptp(grid.extents_mm, axis=1)
    is_across = np.arange(3) == grid.through
    least_mm = np.where(is_across, 25, 60)
    if len(grid.order) < 5 or (size_mm < least_mm).any():
        size = f"{z:.3g} x {y:.3g} x {x:.3g} mm (z, y, x); expected: 5, 25 mm across them, 60 mm along them"
        doubts.append(f"too little of a head: slices: {len(grid.order)}, {size}")
    strides = np.where(is_across, 1, 3)
    indices = [np.flatnonzero(is_scanned(grid, box, axis))[:: strides[axis]] for axis in range(3)]
    slabs = np.moveaxis(voxels[np.ix_(*indices)], grid.through, 0)
    if slabs.size == 0:
        return doubts
    is_covered = covered[indices[grid.through]] >= 0.5
    is_empty = np.ptp(slabs, axis=(1, 2)) == 0
    if grid.through != 0:  # beside the head there may be only dark air
        is_empty &= slabs[:, 0, 0] > 127
    for is_poor, why in ((~is_covered, "interpolated over missing slices"), (is_empty, "empty")):
        if is_poor.any():
            notes.append(f"{is_poor.mean():.0%} of the slabs ({is_poor.sum()}) are {why}")
    shares = np.bincount(slabs.ravel(), minlength=256) / slabs.size
    for share, limit, what in (
        ((is_empty | ~is_covered).mean(), 0.25, "is of one value, or interpolated over missing slices"),
        (shares[230:].sum(), 0.5, "is nearly white"),
        (shares.max(), 0.95, f"has the grey value {shares.argmax()}"),
    ):
        if share > limit:
            doubts.append(f"{share:.0%} of the volume {what}")
    return doubts


# --- head ---------------------------------------------------------------------------------------------------
def find_head(grid: Grid) -> tuple | None:
    """(top, centre y, centre x) of the head in mm, or None, from up to 24 slices at about 3 mm per pixel.
    Top: the highest level where the head's cross-section exceeds 1000 mm2 (in a narrow scan 28 mm times its
    width); between axial slices bisected down to 2 mm. Centre: of the bounding box over 100 mm below it."""
    factors = np.maximum(1, np.rint(3.0 / grid.steps)).astype(int)
    pixel_mm = grid.steps * factors
    load = cache(partial(shrink_slice, grid, factors))
    picks = pick_evenly(np.arange(len(grid.order)), 24)
    samples = list(map(load, picks))
    least_range = 0.02 * np.ptp(np.percentile(samples, (1, 99)))
    images = [image for image in samples if np.ptp(image) > least_range]
    if not images:
        return None
    is_ct = grid.series.modality == "CT"
    threshold = -300.0 if is_ct else choose_threshold(images)

    def mask_slice(k: int) -> ndarray:
        has_content = np.ptp(load(k)) > least_range  # else it shows no head, however bright
        return mask_head(load(k), threshold, is_ct) * has_content

    masks = {k: mask_slice(k) for k in picks}
    head = {k: largest_component(mask, mask) for k, mask in masks.items()}
    least_mm2 = min(1000, *28 * np.ptp(grid.extents_mm[1:], axis=1))
    if grid.through == 0:
        follow_head(masks, head)
        top = find_axial_top(grid, head, mask_slice, least_mm2 / pixel_mm.prod())
    else:
        top = find_sliced_top(grid, head, pixel_mm, least_mm2)
    if top is None:
        return None
    return top, *find_centre(grid, head, pixel_mm, top)


def find_axial_top(grid: Grid, head: dict, mask_slice: Callable, least_pixels: float) -> float | None:
    """mm of the top by bisection between the highest sample with a head and the next; `head` gets more."""
    large = [k for k, mask in head.items() if mask.sum() > least_pixels]
    if not large:
        return None
    inside = max(large)
    above = min((k for k in head if k > inside), default=inside)
    while above - inside > 1 and grid.centres[above] - grid.centres[inside] > 2.0:
        k = (inside + above) // 2
        mask = largest_component(mask_slice(k), head[inside])
        if mask.sum() > least_pixels:
            inside = k
            head[k] = mask
        else:
            above = k
    return grid.spans[inside, 1]


def find_sliced_top(grid: Grid, head: dict, pixel_mm: ndarray, least_mm2: float) -> float | None:
    """mm of the top: the highest row (of z) whose pixels in all samples make up the cross-section."""
    centres = grid.centres[list(head)]
    # mm through the stack that a sample stands for
    depths_mm = np.gradient(centres) if len(head) > 1 else np.diff(grid.spans[0])
    widths = np.stack(list(head.values())).sum(axis=2)  # (samples, rows) pixels
    areas_mm2 = depths_mm @ widths * pixel_mm[1]
    rows = np.flatnonzero(areas_mm2 > least_mm2)
    if len(rows) == 0:
        return None
    bottom, covered = grid.extents_mm[0]
    return min(bottom + pixel_mm[0] * (rows[-1] + 1), covered)


def find_centre(grid: Grid, head: dict, pixel_mm: ndarray, top: float) -> ndarray:
    """(2,) mm (y, x) of the middle of the head's bounding box over 100 mm below the top."""
    numbers, *pixels = np.nonzero(np.stack(list(head.values())))
    slices = np.array(list(head))[numbers]
    in_image = grid.edges[slices] + (np.transpose(pixels) + 0.5) * pixel_mm
    points = np.insert(in_image, grid.through, grid.centres[slices], axis=1)  # (n, 3)
    points = points[points[:, 0] < top]
    box = points[points[:, 0] >= min(top - 100, points[:, 0].max()), 1:]
    return (box.min(axis=0) + box.max(axis=0)) / 2


def shrink_slice(grid: Grid, factors: ndarray, k: int) -> ndarray:
    """Rescaled slice k as means over blocks of `factors` pixels, float32; padding as air, or darker."""
    frame = grid.frames[k]
    values = rescale_values(frame, grid.image(k))
    if frame.padding:
        air = -1024 if grid.series.modality == "CT" else 0
        values[np.isnan(values)] = np.nanmin(values, initial=air)
    blocks = np.maximum(1, grid.shape // factors)
    rows, columns = blocks * factors
    return cv2.resize(values[:rows, :columns], blocks[::-1].tolist(), interpolation=cv2.INTER_AREA)


def choose_threshold(images: list) -> float:
    """Threshold for MR: half of Otsu's, since dark tissue is head, but at least a tenth of the range."""
    values = np.ravel(images)
    low, high = np.percentile(values, (1, 99)).tolist()
    scaled = np.interp(values, (low, high), (0, 255)).astype(np.uint8)
    level, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)
    return low + max(0.5 * level / 255, 0.1) * (high - low)


def mask_head(image: ndarray, threshold: float, is_ct: bool) -> ndarray:
    """Mask uint8 of what is brighter, less structures thinner than 3 pixels (table). MR: with dark insides,
    since the skull is a dark ring. CT: with all inside the skull, which may be hollow or have a defect."""
    kernel = None  # OpenCV's default, 3 x 3 pixels
    mask = (image > threshold).astype(np.uint8)
    if is_ct:
        bone = (image > 100).astype(np.uint8)
        bone = cv2.morphologyEx(bone, cv2.MORPH_CLOSE, kernel, iterations=2)
        skull = cv2.findNonZero(largest_component(bone, bone))
        if skull is not None:
            cv2.fillConvexPoly(mask, cv2.convexHull(skull), 1)
    else:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(mask, contours, -1, 1, cv2.FILLED)
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)


def largest_component(mask: ndarray, near: ndarray) -> ndarray:
    """The connected part of a mask that shares most pixels with `near`; zeros if there is none."""
    _, labels = cv2.connectedComponents(mask)
    sizes = np.bincount(labels[near > 0], minlength=1)
    sizes[0] = 0  # background
    return mask * (labels == sizes.argmax())


def follow_head(masks: dict, head: dict) -> None:
    """Reduce the head to components that lie on each other: up and down from the largest of all."""
    seed = max(head, key=lambda k: head[k].sum())
    upwards = [k for k in head if k > seed]
    downwards = [k for k in reversed(head) if k < seed]
    for side in (upwards, downwards):
        last = head[seed]
        for k in side:
            last = head[k] = largest_component(masks[k], last)
