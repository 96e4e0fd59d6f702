"""Turn DICOM series into fixed-size cached volumes.

in   --src DIR    any tree of DICOM files; where there are labels, with train.csv and train_localizers.csv in
                  it or beside it
out  --dst DIR    <SeriesInstanceUID>.safetensors: volume uint8 (Z, H, W), annotated points and their labels;
                  index.csv: a row per series, failures with their reason; train.csv: a copy of the labels;
                  <uid>.failed.json and seconds.csv: what the index is rebuilt from besides the volumes
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
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common import (
    LABELS,
    LOCATIONS,
    MODALITIES,
    UID,
    Series,
    canonical_grid,
    find_series,
    load_config,
    load_volume,
    make_volume,
    progress,
    read_series,
    remove_leftovers,
    run_isolated,
    safe_uid,
    save_volume,
    tensor_sum,
    to_voxel,
    volume_settings,
    write_atomic,
)

INDEX_COLUMNS = (
    *(UID, "status", "reason", "modality", "plane", "patient", "age", "sex", "num_slices", "rows", "cols"),
    *("slice_mm", "row_mm", "col_mm", "thickness_mm", "coverage_mm", "transfer_syntax"),
    *("num_points", "points_inside", "notes", "seconds", "source"),
)
LABEL_TABLE, POINT_TABLE, INDEX, SECONDS = "train.csv", "train_localizers.csv", "index.csv", "seconds.csv"


def say(text: str) -> None:
    """A line for people, without breaking the progress bar."""
    tqdm.write(text, file=sys.stderr)


# --- labels and points --------------------------------------------------------------------------------------


def find_table(src: Path, name: str) -> Path | None:
    """The CSV in --src or in the folder above it (--src may be the `series` folder itself)."""
    return next((folder / name for folder in (src, src.absolute().parent) if (folder / name).is_file()), None)


def read_labels(path: Path) -> pd.DataFrame:
    """train.csv, indexed by SeriesInstanceUID as text. Raises ValueError that names every fault."""
    table = pd.read_csv(path, dtype={UID: str})
    missing = [name for name in (UID, *LABELS) if name not in table]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, missing))}; expected {UID} and the 14 labels"
        )
    faults = [
        f"{name} holds {value!r} (expected 0 or 1)"
        for name in LABELS
        for value in table.loc[~table[name].isin([0, 1]), name].unique()[:3]
    ]
    if "Modality" in table:
        odd = sorted(set(table["Modality"].astype(str)) - set(MODALITIES))
        faults += [f"Modality {value!r} (expected one of {', '.join(MODALITIES)})" for value in odd]
    faults += [
        f"series {uid} has {count} rows" for uid, count in table[UID].value_counts().items() if count > 1
    ][:5]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    if "PatientAge" in table:
        table["PatientAge"] = pd.to_numeric(table["PatientAge"], errors="coerce")  # for the index alone
    return table.set_index(table[UID].map(safe_uid))


def read_points(path: Path) -> dict[str, list[list]]:
    """train_localizers.csv as {uid: [[SOPInstanceUID, x, y, frame or None, index into LABELS], ...]}, x and y
    in pixels of that image, frames counted from 0. Raises ValueError naming the first faulty lines."""
    points: dict[str, list[list]] = {}
    faults = []
    table = pd.read_csv(path, dtype=str)
    columns = [UID, "SOPInstanceUID", "coordinates", "location"]
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
    for line, (uid, sop_uid, coordinates, location) in enumerate(
        table[columns].itertuples(index=False), start=2
    ):
        try:
            place = ast.literal_eval(coordinates)
            frame = place.get("f")
            point = [
                str(sop_uid),
                float(place["x"]),
                float(place["y"]),
                None if frame is None else int(frame),
            ]
        except (ValueError, SyntaxError, AttributeError, KeyError, TypeError):
            faults.append(f"line {line}: coordinates {coordinates!r}, expected {{'x': 258.4, 'y': 261.4}}")
            continue
        if location not in LOCATIONS:
            faults.append(f"line {line}: unknown location {location!r}")
            continue
        points.setdefault(safe_uid(str(uid)), []).append([*point, LABELS.index(location)])
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path}: {'; '.join(faults[:5])}{more}")
    return points


# --- one series ---------------------------------------------------------------------------------------------


def fingerprint(files: list[Path], points: list[list]) -> str:
    """What a volume was made from: names and sizes of the files (-1: gone), and the annotated points."""
    names = sorted((path.name, path.stat().st_size if path.exists() else -1) for path in files)
    return hashlib.sha256(json.dumps([names, points]).encode()).hexdigest()[:16]


def cache_series(job: dict) -> dict:
    """Read one series, write its volume; runs in a worker. Returns {seconds} or {fatal: line} if the disk
    refuses."""
    start = time.perf_counter()
    uid, cfg, dst = job["uid"], job["cfg"], job["dst"]
    series = read_series(job["files"], uid)
    volume = make_volume(series, cfg)
    notes = [*series.notes, *volume.notes]
    if series.skipped:
        path, why = series.skipped[0]
        notes.append(f"{len(series.skipped)} of {len(job['files'])} files left out: {path.name}: {why}")
    voxels, labels = place_points(series, volume.affine, job["points"], notes)
    meta = describe(series) | {
        "uid": uid,
        "affine": volume.affine.tolist(),
        "spacing_mm": volume.spacing_mm,
        "settings": volume_settings(cfg),
        "source": job["source"],
        "num_points": len(job["points"]),
        "points_inside": count_inside(voxels, volume.voxels.shape),
        "notes": notes,
    }
    meta["age"], meta["sex"] = meta["age"] or job["age"], meta["sex"] or job["sex"]
    try:
        sop_uids = {sop_uid for sop_uid, _ in series.geometry}
        save_volume(dst / f"{uid}.safetensors", volume.voxels, voxels, labels, meta, sop_uids)
        (dst / f"{uid}.failed.json").unlink(missing_ok=True)
    except OSError as error:
        return {"fatal": f"cannot write to {dst}: {error.strerror}"}
    return {"seconds": time.perf_counter() - start}


def place_points(
    series: Series, affine: np.ndarray, points: list[list], notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Annotated points as voxels (P, 3) of the volume and their labels (P,); a point without its image is
    noted."""
    places, labels = [], []
    for sop_uid, x, y, frame, label in points:
        try:
            places.append(series.point(sop_uid, x, y, frame))
        except (KeyError, ValueError) as error:
            notes.append(f"point left out ({LABELS[label]}): {error}")
            continue
        labels.append(label)
    voxels = to_voxel(np.array(places).reshape(-1, 3), affine)
    return voxels.astype(np.float32), np.array(labels, np.int64)


def count_inside(voxels: np.ndarray, shape: tuple[int, int, int]) -> int:
    return int(((voxels >= -0.5) & (voxels <= np.array(shape) - 0.5)).all(axis=1).sum())


def years(age: str) -> str:
    """(0010,1010) PatientAge such as 063Y or 018M in whole years; empty where it is none (PS3.5 6.2, AS)."""
    match = re.fullmatch(r"(\d{3})([DWMY])", age.strip())
    return str(int(match[1]) // {"D": 365, "W": 52, "M": 12, "Y": 1}[match[2]]) if match else ""


def describe(series: Series) -> dict:
    """The index's columns that follow from the series."""
    frame = series.frames[0]
    low, high = canonical_grid(series).extent_mm(0)
    slice_mm, row_mm, col_mm = (round(float(length), 4) for length in series.spacing_mm)
    return {
        "modality": series.modality,
        "plane": series.plane,
        "patient": series.patient,
        "age": years(series.age),
        "sex": series.sex if series.sex in ("F", "M") else "",
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


def read_metadata(path: Path) -> dict[str, str] | None:
    """Metadata of a cached volume; None if there is no such file or it is damaged (then it is made again)."""
    try:
        return load_volume(path, names=())[1]
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors has its own error type for damaged headers
        say(f"{path}: damaged, counts as missing: {error}")
        return None


def is_current(meta: dict[str, str] | None, source: str, settings: dict) -> bool:
    """Whether a volume was made from these files with these settings."""
    return bool(meta) and meta.get("source") == source and json.loads(meta.get("settings", "{}")) == settings


def find_other_settings(dst: Path, settings: dict) -> list[str]:
    """What differs, for each volume in dst that was made with other settings."""
    others = []
    for path in sorted(dst.glob("*.safetensors")):
        meta = read_metadata(path)
        found = json.loads(meta.get("settings", "{}")) if meta else settings
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            others.append(
                "; ".join(f"{key} {found.get(key)!r} there, {settings[key]!r} now" for key in changed)
            )
    return others


def record_failure(dst: Path, job: dict, reason: str, settings: dict) -> None:
    """Write <uid>.failed.json; a volume made from other files or with other settings goes away."""
    volume = dst / f"{job['uid']}.safetensors"
    if is_current(read_metadata(volume), job["source"], settings):
        return  # another run on this cache succeeded meanwhile
    record = {"uid": job["uid"], "reason": reason, "source": job["source"]}
    write_atomic(dst / f"{job['uid']}.failed.json", json.dumps(record, sort_keys=True).encode())
    volume.unlink(missing_ok=True)


def index_rows(dst: Path) -> list[dict]:
    """A row per series, from the folder alone."""
    rows = {}
    for path in sorted(dst.glob("*.failed.json")):
        with contextlib.suppress(FileNotFoundError):  # another run succeeded meanwhile
            failure = json.loads(path.read_text())
            rows[failure["uid"]] = {"status": "failed", **failure}
    seconds = {}
    if (dst / SECONDS).exists():
        with open(dst / SECONDS, newline="") as file:
            seconds = dict(
                row for row in csv.reader(file) if len(row) == 2
            )  # a killed run may leave half a line
    for path in sorted(dst.glob("*.safetensors")):
        meta = read_metadata(path)
        if meta:
            notes = "; ".join(json.loads(meta.get("notes", "[]")))
            rows[path.stem] = meta | {"status": "ok", "notes": notes, "seconds": seconds.get(path.stem, "")}
    return [{name: rows[uid].get(name, "") for name in INDEX_COLUMNS} | {UID: uid} for uid in sorted(rows)]


def list_results(dst: Path) -> set[tuple[str, int]]:
    """(name, time of change) of all volumes and failures."""
    found = set()
    for path in (*dst.glob("*.safetensors"), *dst.glob("*.failed.json")):
        with contextlib.suppress(FileNotFoundError):  # taken away by another run meanwhile
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def write_index(dst: Path) -> list[dict]:
    """Rebuild index.csv; again if another process finished a series meanwhile, so the last writer's is
    complete."""
    before = None
    while before != (now := list_results(dst)):
        before = now
        rows = index_rows(dst)
        text = io.StringIO()
        writer = csv.DictWriter(text, INDEX_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(dst / INDEX, text.getvalue().encode())
    return rows


def verify(dst: Path) -> int:
    """Compare every volume with its sum; exit code."""
    paths = sorted(dst.glob("*.safetensors"))
    if not paths:
        say(f"{dst}: no volumes to verify")
        return 1
    bad = 0
    for path in tqdm(paths, desc="verify", unit=" series", file=sys.stderr, mininterval=0.5):
        try:
            tensors, meta = load_volume(path)
            fault = "" if tensor_sum(tensors) == meta.get("sha256") else "contents differ from their sha256"
        except Exception as error:  # any damage is a finding, whatever safetensors calls it
            fault = f"unreadable: {error}"
        if fault:
            bad += 1
            say(f"{path}: {fault}; delete it and run again")
    say(f"{dst}: {len(paths) - bad} of {len(paths)} volumes agree with their sums")
    return 3 if bad else 0


# --- the command --------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", type=Path, help="tree of DICOM files")
    parser.add_argument("--dst", type=Path, required=True, help="the cache's folder; made if missing")
    parser.add_argument("--config", help="YAML file; only the settings of the volume matter here")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds per series (default: 600)"
    )
    parser.add_argument("--memory-gb", type=float, default=4, metavar="GB", help="per process (default: 4)")
    parser.add_argument(
        "--shard", type=parse_shard, default=None, metavar="I/N", help="0/N ... N-1/N: every Nth series"
    )
    parser.add_argument("--overwrite", action="store_true", help="make volumes of other settings again")
    parser.add_argument(
        "--verify", action="store_true", help="only compare the volumes in --dst with their sums"
    )
    args = parser.parse_args(arguments)
    if not args.verify and args.src is None:
        parser.error("--src DIR is missing: where are the DICOM files?")
    if not args.verify and not args.src.is_dir():
        parser.error(f"--src {args.src}: no such folder")
    if args.verify and not args.dst.is_dir():
        parser.error(f"--dst {args.dst}: no such folder")
    if args.workers < 1 or args.timeout <= 0 or args.memory_gb <= 0:
        parser.error("--workers, --timeout and --memory-gb: expected more than 0")
    try:
        args.cfg = load_config(args.config, args.set)
        args.shard = args.shard or shard_of(os.environ)
    except ValueError as error:
        parser.error(str(error))
    return args


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 0 to N-1, for example 0/4")
    return int(index), int(count)


def shard_of(environment: dict) -> tuple[int, int]:
    """(index, count) of this process among those that torchrun, accelerate launch or a Slurm array
    started."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return checked_shard(environment["RANK"], environment["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = (
            int(environment.get("SLURM_ARRAY_TASK_MIN", 0)),
            int(environment.get("SLURM_ARRAY_TASK_STEP", 1)),
        )
        index = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        return checked_shard(str(index), environment["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1


def checked_shard(index: str, count: str) -> tuple[int, int]:
    if not 0 <= int(index) < int(count):
        raise ValueError(f"the environment says process {index} of {count}; expected 0 to {int(count) - 1}")
    return int(index), int(count)


def is_ours(path: Path, args: argparse.Namespace) -> bool:
    """Whether a path below --src is input: not the cache itself, the tables, or the vessel masks."""
    inside = path.relative_to(args.src).parts if path.is_relative_to(args.src) else path.parts
    is_cached = path.absolute().parent == args.dst.absolute()  # it has no folders
    return (
        "segmentations" not in inside[:-1] and path.name not in (LABEL_TABLE, POINT_TABLE) and not is_cached
    )


def jobs(
    args: argparse.Namespace,
    series: dict,
    uids: list[str],
    points: dict,
    table: pd.DataFrame | None,
    skip: Callable,
) -> Iterator[dict]:
    """What is left to do, one at a time; for a finished series with the same source and settings skip()
    instead."""
    settings = volume_settings(args.cfg)
    for uid in uids:
        source = fingerprint(series[uid], points.get(uid, []))
        meta = read_metadata(args.dst / f"{uid}.safetensors")
        if meta and int(meta.get("num_points", 0)) and not points:
            raise ValueError(
                f"{args.dst / uid}.safetensors: has annotated points, but there is no {POINT_TABLE} in "
                f"{args.src} or above it; expected it there, or the points would be lost"
            )
        if is_current(meta, source, settings):
            (args.dst / f"{uid}.failed.json").unlink(missing_ok=True)
            skip()
            continue
        row = table.loc[uid] if table is not None and uid in table.index else {}
        age, sex = row.get("PatientAge"), str(row.get("PatientSex"))[:1]
        yield {
            "uid": uid,
            "files": series[uid],
            "points": points.get(uid, []),
            "source": source,
            "cfg": args.cfg,
            "dst": args.dst,
            "age": "" if pd.isna(age) else f"{float(age):.0f}",
            "sex": sex if sex in ("F", "M") else "",
        }


def preprocess(args: argparse.Namespace) -> int:
    """The whole run; exit code. Raises ValueError (input that cannot be right) and OSError (disk)
    for main."""
    start = time.perf_counter()
    labels_path, points_path = find_table(args.src, LABEL_TABLE), find_table(args.src, POINT_TABLE)
    table = read_labels(labels_path) if labels_path else None
    points = read_points(points_path) if points_path else {}
    if table is not None and not points:
        say(f"no annotated points: no {POINT_TABLE} in {args.src} or above it, or an empty one")
    series, strays = find_series(args.src)
    series = {
        uid: kept
        for uid, files in series.items()
        if (kept := [path for path in files if is_ours(path, args)])
    }
    strays = [(path, reason) for path, reason in strays if is_ours(path, args)]
    for path, reason in strays[:5]:
        say(f"{path}: left out: {reason}")
    if len(strays) > 5:
        say(f"... and {len(strays) - 5} more files that are no DICOM images")
    if not series:
        raise ValueError(f"{args.src}: found no DICOM series; expected DICOM files, at any depth")
    args.dst.mkdir(parents=True, exist_ok=True)
    remove_leftovers(args.dst)
    settings = volume_settings(args.cfg)
    others = find_other_settings(args.dst, settings)
    if others and not args.overwrite:
        raise ValueError(
            f"{args.dst}: holds {len(others)} volumes made with other settings ({others[0]}). "
            f"Choose another --dst, or --overwrite to make them again."
        )
    if labels_path and labels_path.absolute() != (args.dst / LABEL_TABLE).absolute():
        write_atomic(args.dst / LABEL_TABLE, labels_path.read_bytes())

    index, count = args.shard
    uids = sorted(series)[index::count]
    num_kept = num_new = num_failed = 0
    bar = progress(len(uids), desc="preprocess")

    def skip() -> None:
        nonlocal num_kept
        num_kept += 1
        bar.update()

    work = run_isolated(
        cache_series,
        jobs(args, series, uids, points, table, skip),
        workers=min(args.workers, max(1, len(uids))),
        timeout_s=args.timeout,
        memory_gb=args.memory_gb,
    )
    with bar, contextlib.closing(work), open(args.dst / SECONDS, "a") as seconds:
        for job, result, reason in work:
            if reason is not None:
                num_failed += 1
                record_failure(args.dst, job, reason, settings)
                say(f"{job['uid']}: failed: {reason}")
            elif "fatal" in result:
                raise OSError(result["fatal"])
            else:
                num_new += 1
                seconds.write(f"{job['uid']},{result['seconds']:.2f}\n")
                seconds.flush()
            bar.update()
    rows = write_index(args.dst)
    seconds = time.perf_counter() - start
    counts = f"{num_new} series cached, {num_kept} kept from before, {num_failed} failed"
    say(f"{args.dst}: {f'shard {index} of {count}: ' if count > 1 else ''}{counts}; {seconds:.1f} s")
    for line in summary([row for row in rows if row[UID] in set(uids)]):
        say(line)
    absent = sorted(set(table.index) - set(series)) if table is not None else []
    if absent:
        first = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "")
        say(f"{len(absent)} series of {LABEL_TABLE} have no files: {first}")
    others = find_other_settings(args.dst, settings)
    if others:
        say(f"{len(others)} volumes have other settings still: of other shards, or of series not below --src")
    if num_failed and count > 1 and "RANK" in os.environ:
        say("exit code 0 all the same: a launcher would stop the other processes")
        return 0
    return 0 if num_failed == 0 else 3 if num_new + num_kept else 1


def summary(rows: list[dict]) -> list[str]:
    """Lines on what the index says of these series."""
    cached = [row for row in rows if row["status"] == "ok"]
    inside, total = (sum(int(row[name] or 0) for row in cached) for name in ("points_inside", "num_points"))
    noted = sum(bool(row["notes"]) for row in cached)
    lines = []
    if total:
        lines.append(
            f"{inside} of {total} annotated points ({100 * inside / total:.1f} %) lie inside the volumes"
        )
    if noted:
        lines.append(f"{noted} series with notes on repairs and assumptions: column `notes` of {INDEX}")
    return lines


def main() -> int:
    args = parse_arguments()
    if args.verify:
        return verify(args.dst)

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        return preprocess(args)
    except (ValueError, OSError) as error:
        say(f"preprocess.py: {error}")
        with contextlib.suppress(OSError):  # said above
            if isinstance(error, OSError) and args.dst.is_dir():
                write_index(args.dst)
        return 1
    except SystemExit as error:
        if args.dst.is_dir():
            write_index(args.dst)
        say(f"preprocess.py: interrupted; what is finished is kept, run it again to go on in {args.dst}")
        return error.code
    finally:
        if args.dst.is_dir():
            remove_leftovers(args.dst)


if __name__ == "__main__":
    sys.exit(main())
