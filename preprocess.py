"""Turn DICOM series into fixed-size cached volumes.

in   --src DIR    any tree of DICOM files; where there are labels, with train.csv and train_localizers.csv in
                  it or beside it
out  --dst DIR    <SeriesInstanceUID>.safetensors: volume uint8 (Z, H, W), annotated points and their labels;
                  index.csv: a row per series, failures with their reason; train.csv: a copy of the labels;
                  <uid>.failed.json: what the index is rebuilt from besides the volumes
run  python preprocess.py --src dicoms --dst cache

Run it again at any time: finished series are kept, failed and changed ones are done (again), the index is
rebuilt from the folder. Several machines share one destination: torchrun, accelerate launch and Slurm arrays
are recognised by their environment, --shard 0/4 ... 3/4 works everywhere. A series that crashes a decoder,
hangs (--timeout) or needs too much memory (--memory-gb) costs only itself.

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
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

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
    *(UID, "status", "reason", "modality", "plane", "patient", "age", "sex", "num_slices", "rows", "cols"),
    *("slice_mm", "row_mm", "col_mm", "thickness_mm", "coverage_mm", "transfer_syntax"),
    *("num_points", "points_inside", "notes", "source"),
)
LABEL_TABLE, POINT_TABLE, INDEX = "train.csv", "train_localizers.csv", "index.csv"

# --- labels and points --------------------------------------------------------------------------------------


def find_table(src: Path, name: str) -> Path | None:
    """The CSV in --src or in the folder above it (--src may be the `series` folder itself)."""
    return next((folder / name for folder in (src, src.absolute().parent) if (folder / name).is_file()), None)


def read_points(path: Path) -> dict[str, list[list]]:
    """train_localizers.csv as {uid: [[SOPInstanceUID, x, y, frame or None, index into LABELS], ...]}, x and y
    in pixels of that image, frames counted from 0. Raises ValueError naming the first faulty lines."""
    columns = [UID, "SOPInstanceUID", "coordinates", "location"]
    table = pd.read_csv(path, dtype=str)
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"{path}: columns missing: {', '.join(missing)}; expected {', '.join(columns)}")
    points: dict[str, list[list]] = {}
    faults = []
    rows = table[columns].itertuples(index=False)
    for line, (uid, sop_uid, coordinates, location) in enumerate(rows, start=2):
        try:
            x, y, frame = parse_coordinates(coordinates)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
            continue
        if location not in LOCATIONS:
            faults.append(f"line {line}: unknown location {location!r}")
            continue
        points.setdefault(safe_uid(str(uid)), []).append([str(sop_uid), x, y, frame, LABELS.index(location)])
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path}: {'; '.join(faults[:5])}{more}")
    return points


def parse_coordinates(text: str) -> tuple[float, float, int | None]:
    """(x, y, frame or None) of `{'x': 258.4, 'y': 261.4, 'f': 12}`."""
    try:
        place = ast.literal_eval(text)
        frame = place.get("f")
        return float(place["x"]), float(place["y"]), None if frame is None else int(frame)
    except (ValueError, SyntaxError, AttributeError, KeyError, TypeError):
        raise ValueError(f"coordinates {text!r}, expected {{'x': 258.4, 'y': 261.4}}") from None


# --- one series ---------------------------------------------------------------------------------------------


def fingerprint(files: list[Path], points: list[list]) -> str:
    """What a volume was made from: names and sizes of the files (-1: gone), and the annotated points."""
    names = sorted((path.name, path.stat().st_size if path.exists() else -1) for path in files)
    return hashlib.sha256(json.dumps([names, points]).encode()).hexdigest()[:16]


def cache_series(job: dict) -> str | OSError:
    """Read one series and write its volume, unless the cache has it from the same files and settings.

    Runs in a worker. Returns "cached" or "kept", or the error with which the disk refused the volume.
    """
    uid, cfg, path = job["uid"], job["cfg"], volume_path(job["dst"], job["uid"])
    settings, source = volume_settings(cfg), fingerprint(job["files"], job["points"])
    cached = read_metadata(path)
    if cached and cached["source"] == source and cached["settings"] == settings:
        failure_path(job["dst"], uid).unlink(missing_ok=True)
        return "kept"
    series = read_series(job["files"], uid)
    volume = make_volume(series, cfg.volume)
    notes = [*series.notes, *volume.notes]
    if series.skipped:
        file, reason = series.skipped[0]
        notes.append(f"{len(series.skipped)} of {len(job['files'])} files left out: {file.name}: {reason}")
    points, point_labels, problems = place_points(series, volume.affine, job["points"])
    meta = describe_series(series, job["age"], job["sex"]) | {
        "uid": uid,
        "affine": volume.affine.tolist(),
        "spacing_mm": volume.spacing_mm,
        "settings": settings,
        "source": source,
        "num_points": len(job["points"]),
        "points_inside": int(is_inside(points, volume.voxels.shape).sum()),
        "notes": notes + problems,
    }
    try:
        sop_uids = {sop_uid for sop_uid, _ in series.geometry}
        save_volume(path, volume.voxels, points, point_labels, meta, sop_uids)
        failure_path(job["dst"], uid).unlink(missing_ok=True)
    except OSError as error:
        return error
    return "cached"


def place_points(
    series: Series, affine: np.ndarray, points: list[list]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Annotated points as voxels (P, 3) of the volume, their labels (P,), and a note for each point whose
    image is not there."""
    places, labels, problems = [], [], []
    for sop_uid, x, y, frame, label in points:
        try:
            places.append(series.point(sop_uid, x, y, frame))
            labels.append(label)
        except (KeyError, ValueError) as error:
            problems.append(f"point left out ({LABELS[label]}): {error}")
    voxels = to_voxel(np.array(places).reshape(-1, 3), affine)
    return voxels.astype(np.float32), np.array(labels, np.int64), problems


def describe_series(series: Series, age: str, sex: str) -> dict:
    """The index's columns that follow from the series; age and sex are the label table's, for files that have
    none."""
    frame = series.frames[0]
    low, high = canonical_grid(series).extent_mm(0)
    slice_mm, row_mm, col_mm = (round(float(length), 4) for length in series.spacing_mm)
    years = parse_age(series.age or age)
    sexes = [letter for letter in (series.sex, sex[:1]) if letter in ("F", "M")]
    return {
        "modality": series.modality,
        "plane": series.plane,
        "patient": series.patient,
        "age": "" if math.isnan(years) else int(years),
        "sex": sexes[0] if sexes else "",
        "num_slices": len(series.frames),
        "rows": int(frame.rows),
        "cols": int(frame.cols),
        "slice_mm": slice_mm,
        "row_mm": row_mm,
        "col_mm": col_mm,
        "thickness_mm": round(float(frame.thickness_mm), 4) if frame.thickness_mm else "",
        "coverage_mm": round(high - low, 2),  # along z
        "transfer_syntax": str(series.transfer_syntax),
    }


# --- the cache's folder -------------------------------------------------------------------------------------


def failure_path(dst: Path, uid: str) -> Path:
    return dst / f"{uid}.failed.json"


def read_metadata(path: Path) -> dict | None:
    """Metadata of a cached volume; None if there is no such file or it is damaged (then it is made again)."""
    try:
        return load_volume(path, names=())[1]
    except FileNotFoundError:
        return None
    except ValueError as error:
        log(f"damaged, counts as missing: {error}", everywhere=True)
        return None


def read_cache(dst: Path) -> dict[str, dict]:
    """uid -> metadata of every readable volume in dst."""
    cached = {path.stem: read_metadata(path) for path in sorted(dst.glob("*.safetensors"))}
    return {uid: meta for uid, meta in cached.items() if meta}


def describe_others(cached: dict[str, dict], settings: dict) -> str:
    """How many volumes were made with other settings, and what differs in the first of them; "" if none."""
    differences = [describe_difference(meta["settings"], settings) for meta in cached.values()]
    differences = [text for text in differences if text]
    return f"{len(differences)} volumes made with other settings: {differences[0]}" if differences else ""


def record_failure(dst: Path, uid: str, reason: str, before: dict | None) -> None:
    """Write <uid>.failed.json, and delete the volume from `before`, which was made from other files or with
    other settings. Nothing happens where another run on this cache made a new one meanwhile."""
    path = volume_path(dst, uid)
    if read_metadata(path) not in (None, before):
        return
    record = {"uid": uid, "reason": reason}
    write_atomic(failure_path(dst, uid), json.dumps(record, sort_keys=True).encode())
    path.unlink(missing_ok=True)


def index_rows(dst: Path, cached: dict[str, dict]) -> dict[str, dict]:
    """uid -> row of the index, all text, from the folder alone."""
    rows = {}
    for path in sorted(dst.glob("*.failed.json")):
        with contextlib.suppress(FileNotFoundError):  # another run succeeded meanwhile
            failure = json.loads(path.read_text())
            rows[failure["uid"]] = {"status": "failed", **failure}
    for uid, meta in cached.items():
        rows[uid] = meta | {"status": "ok", "notes": "; ".join(meta["notes"])}
    return {
        uid: {name: str(rows[uid].get(name, "")) for name in INDEX_COLUMNS} | {UID: uid}
        for uid in sorted(rows)
    }


def write_index(dst: Path, cached: dict[str, dict]) -> dict[str, dict]:
    """Rebuild index.csv; -> its rows."""
    rows = index_rows(dst, cached)
    text = io.StringIO()
    writer = csv.DictWriter(text, INDEX_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_atomic(dst / INDEX, text.getvalue().encode())
    return rows


def verify(dst: Path) -> int:
    """Compare every volume with its sums; exit code."""
    paths = sorted(dst.glob("*.safetensors"))
    if not paths:
        log(f"{dst}: no volumes to verify")
        return 1
    faults = 0
    with progress(len(paths), desc="verify") as bar:
        for path in paths:
            try:
                load_volume(path)
            except ValueError as error:
                faults += 1
                log(str(error))
            bar.update()
    log(f"{dst}: {len(paths) - faults} of {len(paths)} volumes agree with their sums")
    return 3 if faults else 0


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, has_config=True)
    add = parser.add_argument
    add("--src", type=Path, help="tree of DICOM files")
    add("--dst", type=Path, required=True, help="the cache's folder; made if missing")
    add("--workers", type=int, default=usable_cores(), help="processes (default: %(default)s)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds per series (default: 600)")
    add("--memory-gb", type=float, default=4, metavar="GB", help="per process (default: 4)")
    shard = shard_of(os.environ)
    add("--shard", type=parse_shard, default=shard, metavar="I/N", help="0/N ... N-1/N: every Nth series")
    add("--overwrite", action="store_true", help="make volumes of other settings again")
    add("--verify", action="store_true", help="only compare the volumes in --dst with their sums")
    args = parser.parse_args(arguments)
    if not args.verify and args.src is None:
        parser.error("--src DIR is missing: where are the DICOM files?")
    for name in ["dst"] if args.verify else ["src"]:
        if not getattr(args, name).is_dir():
            parser.error(f"--{name} {getattr(args, name)}: no such folder")
    if args.workers < 1 or args.timeout <= 0 or args.memory_gb <= 0:
        parser.error("--workers, --timeout and --memory-gb: expected more than 0")
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


def read_tables(src: Path) -> tuple[Path | None, pd.DataFrame | None, dict[str, list[list]]]:
    """(path of the label table, the table by series, annotated points) of a source; what is missing is
    said."""
    labels_path, points_path = find_table(src, LABEL_TABLE), find_table(src, POINT_TABLE)
    table = read_label_table(labels_path).set_index(UID) if labels_path else None
    points = read_points(points_path) if points_path else {}
    if labels_path and not points:
        log(f"no annotated points: no {POINT_TABLE} in {src} or above it, or an empty one")
    return labels_path, table, points


def list_series(src: Path, dst: Path) -> dict[str, list[Path]]:
    """uid -> files below src; other files are named on stderr."""
    series, strays = find_series(src, skip=dst)
    strays = [stray for stray in strays if stray[0].name not in (LABEL_TABLE, POINT_TABLE)]
    for path, reason in strays[:5]:
        log(f"{path}: left out: {reason}")
    if len(strays) > 5:
        log(f"... and {len(strays) - 5} more files that are not DICOM images")
    if not series:
        raise ValueError(f"{src}: found no DICOM series; expected DICOM files, at any depth")
    return series


def make_job(
    args: argparse.Namespace, uid: str, files: list[Path], points: dict, table: pd.DataFrame
) -> dict:
    """What `cache_series` needs to know of one series."""
    row = table.loc[uid] if table is not None and uid in table.index else {}
    return {
        "uid": uid,
        "files": files,
        "points": points.get(uid, []),
        "cfg": args.cfg,
        "dst": args.dst,
        "age": str(row.get("PatientAge", "")),
        "sex": str(row.get("PatientSex", "")),
    }


def check_cache(args: argparse.Namespace, cached: dict[str, dict], uids: list[str], has_points: bool) -> None:
    """Raises ValueError where this run would spoil what an earlier one made."""
    others = describe_others(cached, volume_settings(args.cfg))
    if others and not args.overwrite:
        raise ValueError(f"{args.dst}: {others}. Choose another --dst, or --overwrite to make them again")
    annotated = [uid for uid in uids if uid in cached and cached[uid]["num_points"]]
    if annotated and not has_points:
        raise ValueError(
            f"{volume_path(args.dst, annotated[0])}: has annotated points, but there is no {POINT_TABLE} in "
            f"{args.src} or above it; expected it there, or the points would be lost"
        )


def preprocess(args: argparse.Namespace) -> int:
    """The whole run; exit code. Raises ValueError (input that cannot be right) and OSError (disk)
    for main."""
    start = time.perf_counter()
    labels_path, table, points = read_tables(args.src)
    series = list_series(args.src, args.dst)
    index, count = args.shard
    uids = sorted(series)[index::count]
    args.dst.mkdir(parents=True, exist_ok=True)
    cached = read_cache(args.dst)
    check_cache(args, cached, uids, bool(points))
    if labels_path and labels_path.absolute() != (args.dst / LABEL_TABLE).absolute():
        write_atomic(args.dst / LABEL_TABLE, labels_path.read_bytes())

    outcomes = collections.Counter()
    jobs = (make_job(args, uid, series[uid], points, table) for uid in uids)
    workers = min(args.workers, max(1, len(uids)))
    results = run_isolated(
        cache_series, jobs, workers=workers, timeout_s=args.timeout, memory_gb=args.memory_gb
    )
    with progress(len(uids), desc="preprocess", show=index == 0) as bar, contextlib.closing(results):
        for job, outcome, reason in results:
            if reason:
                record_failure(args.dst, job["uid"], reason, cached.get(job["uid"]))
                log(f"{job['uid']}: failed: {reason}", everywhere=True)
                outcome = "failed"
            if isinstance(outcome, OSError):
                raise outcome
            outcomes[outcome] += 1
            bar.update()

    cached = read_cache(args.dst)
    rows = write_index(args.dst, cached)
    counts = "{cached} series cached, {kept} kept from before, {failed} failed".format_map(outcomes)
    shard = f"shard {index} of {count}: " if count > 1 else ""
    log(f"{args.dst}: {shard}{counts}; {time.perf_counter() - start:.1f} s", everywhere=True)
    summarise([rows[uid] for uid in uids if uid in rows])
    others = describe_others(cached, volume_settings(args.cfg))
    if others:
        log(f"{others}; they belong to other shards, or to series not below --src")
    absent = sorted(set(table.index) - set(series)) if table is not None else []
    if absent:
        first = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "")
        log(f"{len(absent)} series of {LABEL_TABLE} have no files: {first}")
    return exit_code(outcomes, is_launched=count > 1 and "RANK" in os.environ)


def summarise(rows: Iterable[dict]) -> None:
    """Say what the index has on these series."""
    cached = [row for row in rows if row["status"] != "failed"]
    inside, total = (sum(int(row[name]) for row in cached) for name in ("points_inside", "num_points"))
    if total:
        share = f"{inside} of {total} annotated points ({100 * inside / total:.1f} %)"
        log(f"{share} lie inside the volumes", everywhere=True)
    noted = sum(bool(row["notes"]) for row in cached)
    if noted:
        log(
            f"{noted} series with notes on repairs and assumptions: column `notes` of {INDEX}",
            everywhere=True,
        )


def exit_code(outcomes: dict[str, int], is_launched: bool) -> int:
    """0, 1 or 3 as the docstring says."""
    if not outcomes["failed"]:
        return 0
    if is_launched:
        log("exit code 0 all the same: a launcher would stop the other processes", everywhere=True)
        return 0
    return 3 if outcomes["cached"] + outcomes["kept"] else 1


def main() -> int:
    args = parse_arguments()
    if args.verify:
        return verify(args.dst)

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = 1
    try:
        return preprocess(args)
    except (ValueError, OSError) as error:
        log(f"preprocess.py: {error}", everywhere=True)
        is_stopped_at_work = isinstance(error, OSError)
    except SystemExit as error:
        log("preprocess.py: interrupted; what is finished is kept, run it again to go on", everywhere=True)
        code, is_stopped_at_work = error.code, True
    finally:
        if args.dst.is_dir():
            remove_leftovers(args.dst)
    if is_stopped_at_work and args.dst.is_dir():
        with contextlib.suppress(OSError):  # the disk is full, and that was said
            write_index(args.dst, read_cache(args.dst))
    return code


if __name__ == "__main__":
    sys.exit(main())
