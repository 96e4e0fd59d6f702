"""Turn DICOM series into fixed-size cached volumes.

in   --src DIR    any tree of DICOM files; where there are labels, with train.csv and train_localizers.csv in
                  it or beside it
out  --dst DIR    <SeriesInstanceUID>.safetensors: volume uint8 (Z, H, W), annotated points and their labels;
                  index.csv: a row per series with its status: ok, doubtful (a volume that looks wrong) or
                  failed, with the reason; train.csv: a copy of the labels, and its sum in train.csv.sha256;
                  <uid>.failed.txt: what the index is rebuilt from besides the volumes; .patient_key: with
                  which the index hides each PatientID
run  python preprocess.py --src dicoms --dst cache

Run it again at any time: finished series are kept, failed and changed ones are done (again), the index is
rebuilt from the folder. A series counts as changed by the names, sizes and samples of its files (12 kB of
each), not by their place or date. Several machines share one destination: torchrun, accelerate launch and
Slurm arrays are recognised by their environment, --shard 0/4 ... 3/4 works everywhere. A series that crashes
a decoder, hangs (--timeout) or needs too much memory (--memory-gb) costs only itself. --verify compares
volumes, index and labels with what they should be; running again heals what it finds.

exit code  0  all well
           1  nothing could be done, or the disk refused to take more
           2  wrong usage
           3  finished, some series failed: named on stderr and in index.csv; 0 under torchrun and accelerate,
              which would stop the other processes
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import csv
import functools
import hashlib
import hmac
import io
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import (
    LABELS,
    LOCATIONS,
    UID,
    describe_difference,
    is_inside,
    load_config,
    load_volume,
    log,
    make_parser,
    parse_age,
    progress,
    read_csv,
    read_label_table,
    remove_leftovers,
    run_isolated,
    save_volume,
    usable_cores,
    volume_path,
    volume_settings,
    write_atomic,
)
from dicom import Series, canonical_grid, find_series, make_volume, read_series, safe_uid, to_voxel

INDEX_COLUMNS = (
    f"{UID} status reason modality plane patient age sex num_slices rows cols slice_mm row_mm col_mm "
    "thickness_mm coverage_mm transfer_syntax num_points points_inside notes source"
).split()
LABEL_TABLE, POINT_TABLE, LABEL_SUM = "train.csv", "train_localizers.csv", "train.csv.sha256"
INDEX = "index.csv"
log_shard = functools.partial(log, everywhere=True)  # what concerns one shard alone

# --- labels and points --------------------------------------------------------------------------------------


def find_table(src: Path, name: str) -> Path | None:
    """The CSV in --src or in the folder above it (--src may be the `series` folder itself)."""
    return next((folder / name for folder in (src, src.absolute().parent) if (folder / name).is_file()), None)


def read_points(path: Path) -> dict[str, list[list]]:
    """train_localizers.csv as {uid: [[SOPInstanceUID, x, y, frame or None, index into LABELS], ...]}, x and y
    in pixels of that image, frames counted from 0. Raises ValueError naming the first faulty lines."""
    columns = [UID, "SOPInstanceUID", "coordinates", "location"]
    rows = read_csv(path, columns, dtype=str)[columns].itertuples(index=False)
    points: dict[str, list[list]] = {}
    faults = []
    for line, (uid, sop_uid, coordinates, location) in enumerate(rows, start=2):
        try:
            if location not in LOCATIONS:
                raise ValueError(f"unknown location {location!r:.60}")
            point = [sop_uid, *parse_coordinates(coordinates), LABELS.index(location)]
            points.setdefault(safe_uid(str(uid)), []).append(point)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
    if faults:
        raise ValueError(f"{path}: {len(faults)} faults: {'; '.join(faults[:5])}")
    return points


def parse_coordinates(text: str) -> tuple[float, float, int | None]:
    """(x, y, frame or None) of `{'x': 258.4, 'y': 261.4, 'f': 12}`; ValueError if it is not of that kind."""
    try:
        place = ast.literal_eval(text if len(text) <= 200 else "")
        x, y, frame = float(place["x"]), float(place["y"]), place.get("f")
        frame = None if frame is None else int(frame)
        if max(abs(x), abs(y)) < 2**16 and (frame or 0) in range(2**31):
            return x, y, frame
    except Exception:  # of many kinds; all mean the same, which is said below
        pass
    raise ValueError(f"coordinates {text!r:.60}, expected {{'x': 258.4, 'y': 261.4}} in pixels")


# --- one series ---------------------------------------------------------------------------------------------


def fingerprint(files: list[Path], points: list[list], key: bytes) -> str:
    """What a volume was made from: name, size and samples (start, middle and end) of each file, the annotated
    points, and the key of its patient. 0.03 s for 1,000 files in memory, nothing where reading follows."""
    digest = hmac.new(key, str(points).encode(), "sha256")
    for path in sorted(files):
        with open(path, "rb", buffering=0) as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode(errors="surrogateescape"))
            for start in (0, size // 2, max(0, size - 4096)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def cache_series(job: dict) -> str | OSError:
    """Read one series and write its volume, unless the cache has it from the same files and settings.

    Runs in a worker. Returns "cached" or "kept", or the error with which the disk refused the volume.
    """
    uid, cfg, path = job["uid"], job["cfg"], volume_path(job["dst"], job["uid"])
    failure = job["dst"] / f"{uid}.failed.txt"
    settings, source = volume_settings(cfg), fingerprint(job["files"], job["points"], job["key"])
    if is_current(path, source, settings):
        failure.unlink(missing_ok=True)
        return "kept"
    series = read_series(job["files"], uid)
    volume = make_volume(series, cfg.volume)
    notes = [*series.notes, *volume.notes]
    if series.skipped:
        file, reason = series.skipped[0]
        notes.append(f"{len(series.skipped)} of {len(job['files'])} files left out: {file.name}: {reason}")
    points, point_labels, problems = place_points(series, volume.affine, job["points"])
    meta = describe_series(series, job) | {
        "uid": uid,
        "affine": volume.affine.tolist(),
        "spacing_mm": volume.spacing_mm,
        "settings": settings,
        "source": source,
        "num_points": len(job["points"]),
        "points_inside": int(is_inside(points, volume.voxels.shape).sum()),
        "notes": without_folders(notes + problems, job["files"]),
        "doubts": without_folders(volume.doubts, job["files"]),
    }
    try:
        sop_uids = {sop_uid for sop_uid, _ in series.geometry}
        save_volume(path, volume.voxels, points, point_labels, meta, sop_uids)
        failure.unlink(missing_ok=True)
    except OSError as error:
        return error
    return "cached"


def is_current(path: Path, source: str, settings: dict) -> bool:
    """Whether there is an undamaged volume, made from this source with these settings."""
    try:
        meta = check_volume(path)
    except (FileNotFoundError, ValueError):
        return False
    return meta["source"] == source and meta["settings"] == settings


def without_folders(texts: list[str], files: list[Path]) -> list[str]:
    """The texts with the names of files, but not with where these lie: that may name a patient."""
    for folder in {path.parent for path in files}:
        texts = [text.replace(f"{folder}{os.sep}", "") for text in texts]
    return texts


def place_points(
    series: Series, affine: np.ndarray, points: list[list]
) -> tuple[np.ndarray, list[int], list[str]]:
    """Annotated points as voxels (P, 3) of the volume, their labels (P,), and a note for each point whose
    image is not there."""
    places, labels, problems = [], [], []
    for sop_uid, x, y, frame, label in points:
        try:
            places.append(series.point(sop_uid, x, y, frame))
            labels.append(label)
        except ValueError as error:
            problems.append(f"point left out ({LABELS[label]}): {error}")
    return to_voxel(np.array(places).reshape(-1, 3), affine), labels, problems


def describe_series(series: Series, job: dict) -> dict:
    """The index's columns that follow from the series; age and sex are the label table's where the files have
    none."""
    frame = series.frames[0]
    low, high = canonical_grid(series).extent_mm(0)
    slice_mm, row_mm, col_mm = (round(float(length), 4) for length in series.spacing_mm)
    years = parse_age(series.age or job["labels"].get("PatientAge"))
    sex = series.sex or str(job["labels"].get("PatientSex"))[:1]
    patient = hmac.digest(job["key"], series.patient.encode(errors="surrogatepass"), "sha256").hex()[:12]
    return {
        "modality": series.modality,
        "plane": series.plane,
        "patient": patient if series.patient else "",
        "age": "" if math.isnan(years) else int(years),
        "sex": sex if sex in ("F", "M") else "",
        "num_slices": len(series.frames),
        "rows": frame.rows,
        "cols": frame.cols,
        "slice_mm": slice_mm,
        "row_mm": row_mm,
        "col_mm": col_mm,
        "thickness_mm": round(frame.header.get("SliceThickness", 0), 4) or "",
        "coverage_mm": round(high - low, 2),  # along z
        "transfer_syntax": series.transfer_syntax,
    }


# --- the cache's folder -------------------------------------------------------------------------------------


def read_patient_key(dst: Path) -> bytes:
    """The random key of a cache, the same for all its shards: made by the first that comes."""
    path = dst / ".patient_key"
    with contextlib.suppress(FileExistsError), open(path, "xb") as file:
        file.write(secrets.token_bytes(32))
    for _ in range(50):  # the process that made it may not have written it yet
        if len(key := path.read_bytes()) == 32:
            return key
        time.sleep(0.1)
    raise ValueError(f"{path}: found {len(key)} bytes, expected 32; delete it and run again")


def check_volume(path: Path, names: Sequence[str] | None = None) -> dict:
    """Metadata of a cached volume. ValueError where what was read (all tensors, or those named) differs from
    its sum, its name from its series, or its shape from its settings."""
    tensors, meta = load_volume(path, names)
    settings = meta["settings"]
    shape = (settings["base_slices"], settings["img_size"], settings["img_size"])
    if names is None and tensors["volume"].shape != shape:
        raise ValueError(
            f"{path}: shape {tensors['volume'].shape}, expected {shape}; run preprocess.py again"
        )
    if meta["uid"] != path.stem:
        raise ValueError(f"{path}: holds series {meta['uid']}; run preprocess.py again")
    return meta


def read_cache(dst: Path) -> dict[str, dict]:
    """uid -> metadata of every readable volume in dst; the others count as missing."""
    cached = {}
    for path in sorted(dst.glob("*.safetensors")):
        try:
            cached[path.stem] = check_volume(path, names=())
        except ValueError as error:
            log_shard(f"counts as missing: {error}")
    return cached


def record_failure(job: dict, reason: str) -> None:
    """Say and write down why a series failed; a volume made from other files or with other settings goes."""
    uid, dst = job["uid"], job["dst"]
    [reason] = without_folders([reason], job["files"])
    log_shard(f"{uid}: failed: {reason}")
    write_atomic(dst / f"{uid}.failed.txt", reason.encode(errors="backslashreplace"))
    volume_path(dst, uid).unlink(missing_ok=True)


def index_rows(dst: Path, cached: dict[str, dict]) -> list[dict]:
    """Rows of the index in the order of UIDs, from the folder alone."""
    rows = {}
    for path in dst.glob("*.failed.txt"):
        uid = path.name.removesuffix(".failed.txt")
        with contextlib.suppress(FileNotFoundError):  # another process succeeded meanwhile
            rows[uid] = {UID: uid, "status": "failed", "reason": path.read_text(errors="replace")}
    for uid, meta in cached.items():
        status = "doubtful" if meta["doubts"] else "ok"
        reason, notes = "; ".join(meta["doubts"]), "; ".join(meta["notes"])
        rows[uid] = meta | {UID: uid, "status": status, "reason": reason, "notes": notes}
    return [rows[uid] for uid in sorted(rows)]


def render_index(rows: list[dict]) -> bytes:
    """The rows as CSV; what is not UTF-8 in a file's name comes out as an escape such as \\udce4."""
    text = io.StringIO()
    writer = csv.DictWriter(text, INDEX_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def write_index(dst: Path) -> list[dict]:
    """Rebuild index.csv; -> its rows."""
    rows = index_rows(dst, read_cache(dst))
    write_atomic(dst / INDEX, render_index(rows))
    return rows


def copy_labels(path: Path, dst: Path) -> None:
    """Copy the label table to dst, with its sum beside it."""
    if path.absolute() != (dst / LABEL_TABLE).absolute():
        write_atomic(dst / LABEL_TABLE, path.read_bytes())
    write_atomic(dst / LABEL_SUM, file_sum(dst / LABEL_TABLE).encode())


def file_sum(path: Path) -> str:
    """SHA-256 of a file, "" without one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def verify(dst: Path) -> int:
    """Compare every volume, the index and the label table with what they should be; exit code."""
    paths = sorted(dst.glob("*.safetensors"))
    if not paths:
        log(f"{dst}: no volumes to verify")
        return 1
    cached, faults = {}, []
    with progress(len(paths), desc="verify") as bar:
        for path in paths:
            try:
                cached[path.stem] = check_volume(path)
            except ValueError as error:
                faults.append(str(error))
            bar.update()
    label_sum = dst / LABEL_SUM
    if label_sum.is_file() and label_sum.read_text(errors="replace") != file_sum(dst / LABEL_TABLE):
        faults.append(f"{dst / LABEL_TABLE}: differs from {LABEL_SUM}; run preprocess.py again")
    differing = set(render_index(index_rows(dst, cached)).splitlines())
    if (dst / INDEX).is_file():
        differing ^= set((dst / INDEX).read_bytes().splitlines())
    for uid in sorted({line.split(b",")[0].decode(errors="replace") for line in differing}):
        faults.append(f"{dst / INDEX}: row of {uid} differs from the folder; run preprocess.py again")
    for fault in faults:
        log(fault)
    log(f"{dst}: {len(cached)} of {len(paths)} volumes agree with their sums; {len(faults)} faults")
    return 3 if faults else 0


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, has_config=True)
    add = parser.add_argument
    add("--src", type=Path, help="tree of DICOM files")
    add("--dst", type=Path, required=True, help="the cache's folder; made if missing")
    add("--workers", type=int, default=usable_cores(), help="processes (default: %(default)s)")
    add("--timeout", type=float, default=600, help="seconds per series (default: 600)")
    add("--memory-gb", type=float, default=4, help="per process (default: 4)")
    add("--shard", type=parse_shard, default=shard_of(os.environ), metavar="I/N", help="every Nth series")
    add("--limit", type=int, default=sys.maxsize, help="take only the first N series")
    add("--overwrite", action="store_true", help="make volumes of other settings again")
    add("--verify", action="store_true", help="only compare what is in --dst with its sums")
    args = parser.parse_args(arguments)
    if not args.verify and args.src is None:
        parser.error("--src DIR is missing: where are the DICOM files?")
    folder = args.dst if args.verify else args.src
    if not folder.is_dir():
        parser.error(f"{folder}: no such folder")
    if min(args.workers, args.timeout, args.memory_gb, args.limit) <= 0:
        parser.error("--workers, --timeout, --memory-gb and --limit: expected more than 0")
    try:
        args.cfg = load_config(args.config, args.set)
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N-1, for example 0/4")
    return int(match[1]), int(match[2])


def shard_of(environment: dict) -> str:
    """I/N of this process among those that torchrun, accelerate launch or a Slurm array started."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return f"{environment['RANK']}/{environment['WORLD_SIZE']}"
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        return f"{index}/{environment['SLURM_ARRAY_TASK_COUNT']}"
    return "0/1"


def read_tables(src: Path) -> tuple[Path | None, dict[str, dict], dict[str, list[list]]]:
    """(path of the label table, its rows by series, annotated points) of a source; what is missing is
    said."""
    labels_path, points_path = find_table(src, LABEL_TABLE), find_table(src, POINT_TABLE)
    labels = read_label_table(labels_path).set_index(UID).to_dict("index") if labels_path else {}
    points = read_points(points_path) if points_path else {}
    if not labels_path:
        log(f"no labels: no {LABEL_TABLE} in {src} or above it; train.py will need one in the cache")
    elif not points:
        log(f"no annotated points: no {POINT_TABLE} in {src} or above it, or an empty one")
    return labels_path, labels, points


def list_series(src: Path, dst: Path) -> dict[str, list[Path]]:
    """uid -> files below src; how many other files there are, and the first of them, is said."""
    series, strays = find_series(src, skip=dst)
    strays = [stray for stray in strays if stray[0].name not in (LABEL_TABLE, POINT_TABLE)]
    if strays:
        examples = "; ".join(f"{path}: {reason}" for path, reason in strays[:3])
        log(f"{len(strays)} files left out: {examples}")
    if not series:
        raise ValueError(f"{src}: found no DICOM series; expected DICOM files, at any depth")
    return series


def check_cache(args: argparse.Namespace, cached: dict[str, dict], uids: list[str], has_points: bool) -> None:
    """Raises ValueError where this run would spoil what an earlier one made."""
    settings = volume_settings(args.cfg)
    others = [meta["settings"] for meta in cached.values() if meta["settings"] != settings]
    if others and not args.overwrite:
        difference = describe_difference(others[0], settings)
        raise ValueError(
            f"{args.dst}: {len(others)} volumes have other settings: {difference}. Choose another --dst, or "
            f"--overwrite to make them again"
        )
    annotated = [uid for uid in uids if uid in cached and cached[uid]["num_points"]]
    if annotated and not has_points:
        raise ValueError(
            f"{volume_path(args.dst, annotated[0])}: has annotated points, but there is no {POINT_TABLE} in "
            f"{args.src} or above it; expected it there, or the points would be lost"
        )


def preprocess(args: argparse.Namespace) -> int:
    """The whole run; exit code. Raises ValueError (input that cannot be right) and OSError (disk)
    for main."""
    labels_path, labels, points = read_tables(args.src)
    series = list_series(args.src, args.dst)
    index, count = args.shard
    uids = sorted(series)[: args.limit][index::count]
    args.dst.mkdir(parents=True, exist_ok=True)
    check_cache(args, read_cache(args.dst), uids, bool(points))
    if labels_path:
        copy_labels(labels_path, args.dst)

    shared = {"cfg": args.cfg, "dst": args.dst, "key": read_patient_key(args.dst)}
    jobs = (
        dict(shared, uid=uid, files=series[uid], points=points.get(uid, []), labels=labels.get(uid, {}))
        for uid in uids
    )
    results = run_isolated(
        cache_series, jobs, workers=args.workers, timeout_s=args.timeout, memory_gb=args.memory_gb
    )
    outcomes = collections.Counter()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with progress(len(uids), desc="preprocess", show=is_main) as bar, contextlib.closing(results):
            for job, outcome, reason in results:
                if isinstance(outcome, OSError):
                    raise outcome
                if reason:
                    record_failure(job, reason)
                    outcome = "failed"
                outcomes[outcome] += 1
                bar.update()
    finally:
        rows = write_index(args.dst)
    counts = f"{outcomes['cached']} cached, {outcomes['kept']} kept, {outcomes['failed']} failed"
    shard = f"shard {index} of {count}: " if count > 1 else ""
    log_shard(f"{args.dst}: {shard}{len(uids)} series, {counts}")
    in_shard = set(uids)
    summarise([row for row in rows if row[UID] in in_shard])
    absent = sorted(set(labels) - set(series))
    if absent:
        log(f"{len(absent)} series of {LABEL_TABLE} have no files: {', '.join(absent[:3])}")
    return exit_code(outcomes, is_launched=count > 1 and "RANK" in os.environ)


def summarise(rows: list[dict]) -> None:
    """Say what the index has on these series."""
    inside, total = (sum(row.get(name, 0) for row in rows) for name in ("points_inside", "num_points"))
    if total:
        share = f"{inside} of {total} annotated points ({100 * inside / total:.1f} %)"
        log_shard(f"{share} lie inside the volumes")
    for row in rows:
        if row["status"] == "doubtful":
            log_shard(f"{row[UID]}: doubtful: {row['reason']}")
    noted = sum(bool(row.get("notes")) for row in rows)
    if noted:
        log_shard(f"{noted} series with notes on repairs and assumptions: column `notes` of {INDEX}")


def exit_code(outcomes: dict[str, int], is_launched: bool) -> int:
    """0, 1 or 3 as the docstring says."""
    if outcomes["failed"] and is_launched:
        log_shard("exit code 0 all the same: a launcher would stop the other processes")
    if is_launched or not outcomes["failed"]:
        return 0
    return 3 if outcomes["cached"] + outcomes["kept"] else 1


def main() -> int:
    args = parse_arguments()

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        return verify(args.dst) if args.verify else preprocess(args)
    except (ValueError, OSError) as error:
        log_shard(f"preprocess.py: {error}")
        return 1
    except SystemExit as error:
        log_shard("preprocess.py: interrupted; what is finished is kept, run it again to go on")
        return error.code
    finally:
        remove_leftovers(args.dst)


if __name__ == "__main__":
    sys.exit(main())
