"""Measure this project against what people use and against the floor, on one machine, in one run.

in   preprocess    nothing: writes its own series into a temporary folder
out  Markdown tables on stdout; progress on stderr
run  python tests/bench.py preprocess

Every round runs all candidates in turn, so that a busy machine slows all alike; figures are medians over the
rounds [smallest, largest]. One process, one thread, files in the page cache, unless the table says otherwise.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import pydicom
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from common import Config, make_volume, read_series, run_isolated

CTA_LOW, CTA_HIGH = 0.0, 600.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rounds(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
        say(f"round {number} of {repeats}")
    return seconds


def spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def ratios(seconds: list[float], base: list[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, base, strict=True)]


# --- preprocess ---------------------------------------------------------------------------------------------


def write_ct(
    folder: Path, slices: int, size: int, slice_mm: float, syntax: str = ExplicitVRLittleEndian
) -> None:
    """A CT head (shell of bone, brain, noise) that fills the slices' height, int16, one file per slice."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 8, (size, size + slices)).astype(np.float32)
    pixel_mm = 230 / size
    y, x = (np.mgrid[:size, :size] - size / 2) * pixel_mm
    series_uid, study_uid = generate_uid(entropy_srcs=["series"]), generate_uid(entropy_srcs=["study"])
    for i in range(slices):
        z = (i + 0.5) / slices  # 0 at the bottom, 1 at the vertex
        shrink = np.sqrt(max(1 - z**4, 0))
        radius = np.hypot(x / (75 * shrink + 1e-3), y / (92 * shrink + 1e-3))
        hu = np.where(radius < 0.9, 40.0, np.where(radius < 1.0, 1100.0, -1000.0)) + noise[:, i : i + size]
        stored = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(i)])
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
            ds.SOPClassUID,
            ds.SOPInstanceUID,
        )
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
        ds.Modality, ds.PatientID, ds.InstanceNumber = "CT", "bench", i + 1
        ds.Rows, ds.Columns, ds.PixelSpacing = size, size, [round(pixel_mm, 6)] * 2
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [float(x[0, 0]), float(y[0, 0]), round(i * slice_mm, 4)]
        ds.SliceThickness = slice_mm
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
        ds.PixelData = stored.tobytes()
        if syntax != ExplicitVRLittleEndian:
            ds.compress(syntax)
        ds.save_as(folder / f"{generate_uid(entropy_srcs=['name', str(i)])}.dcm", enforce_file_format=True)


def this_project(folder: Path) -> np.ndarray:
    return make_volume(read_series(folder), Config()).voxels


def read_whole(folder: Path) -> list[pydicom.Dataset]:
    """Every file with its pixels, sorted by z: what the notebooks start with."""
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda ds: float(ds.ImagePositionPatient[2]))


def notebook(folder: Path) -> np.ndarray:
    """The public notebooks' way: rescale, window and resize every slice, then linear zoom to 32 slices."""
    images = []
    for ds in read_whole(folder):
        hu = ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        image = (np.clip((hu - CTA_LOW) / (CTA_HIGH - CTA_LOW), 0, 1) * 255).astype(np.uint8)
        images.append(cv2.resize(image, (384, 384), interpolation=cv2.INTER_LINEAR))
    volume = np.stack(images).astype(np.float32)
    at = np.linspace(0, len(volume) - 1, 32)
    below = np.minimum(at.astype(int), len(volume) - 2)
    share = (at - below)[:, None, None].astype(np.float32)
    return (volume[below] * (1 - share) + volume[below + 1] * share).astype(np.uint8)


def slab_means(folder: Path) -> np.ndarray:
    """Means of whole slabs, every file parsed by pydicom."""
    slices = read_whole(folder)
    slabs = []
    for part in np.array_split(np.arange(len(slices)), 32):
        total = np.zeros(slices[0].pixel_array.shape, np.float32)
        for i in part:
            ds = slices[i]
            stored = ds.pixel_array
            low, high = (
                (v - float(ds.RescaleIntercept)) / float(ds.RescaleSlope) for v in (CTA_LOW, CTA_HIGH)
            )
            total += np.clip(stored, int(low), int(high))
        mean = (total / len(part) - low) * (255 / (high - low))
        slabs.append(cv2.resize(mean, (384, 384), interpolation=cv2.INTER_AREA).astype(np.uint8))
    return np.stack(slabs)


def simple_itk(folder: Path) -> object:
    """SimpleITK's series reader alone, without any resampling."""
    import SimpleITK

    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    return SimpleITK.ReadImage(names)


def floor(folder: Path) -> int:
    """Reading all bytes."""
    return sum(len(path.read_bytes()) for path in folder.iterdir())


def has_simple_itk() -> bool:
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        return False
    return True


def volume_of(folder: Path) -> int:
    """A worker's job: as preprocess.py does it, without writing. Returns the process' peak memory in MiB."""
    this_project(folder)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def spin(steps: int) -> float:
    """A worker's job without memory or disk: what a second process can gain at best."""
    value = 0.0
    for i in range(steps):
        value += i * 1e-9
    return value


def in_workers(function: Callable, items: list, workers: int) -> tuple[float, list]:
    """(seconds per item, results) in so many processes; the first item of each, with its imports, does not
    count."""
    results, start = [], 0.0
    for _, result, reason in run_isolated(function, items, workers=workers, timeout_s=600, memory_gb=4):
        if reason:
            raise RuntimeError(reason)
        results.append(result)
        if len(results) == workers:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (len(items) - workers), results


def bench_plain(folder: Path, repeats: int, title: str) -> None:
    """Table of all methods on an uncompressed series."""
    candidates = {
        "this project (read_series + make_volume)": lambda: this_project(folder),
        "- of it read_series": lambda: read_series(folder),
        "notebook method": lambda: notebook(folder),
        "slab means through pydicom": lambda: slab_means(folder),
        "floor: reading all bytes": lambda: floor(folder),
    }
    if has_simple_itk():
        candidates["SimpleITK's series reader alone"] = lambda: simple_itk(folder)
    seconds = rounds(candidates, repeats)
    print(f"\n{title}\n\n| method | seconds | of the notebook method |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {spread(values)} | {spread(ratios(values, seconds['notebook method']))} |")


def bench_packed(root: Path, slices: int, size: int, repeats: int) -> None:
    """Table of what a compressed series takes beyond its decoding."""
    print(
        f"\n{slices} compressed slices: everything against decoding alone (pydicom with the same decoder)\n"
    )
    print("| transfer syntax | decoding, ms per slice | this project / decoding |\n|---|---|---|")
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        folder = root / syntax
        write_ct(folder, slices, size, 160 / slices, syntax)
        datasets = read_whole(folder)

        def decode(datasets: list[Dataset] = datasets) -> None:
            for ds in datasets:
                ds._pixel_array, ds._pixel_id = None, {}  # pydicom keeps what it decoded
                _ = ds.pixel_array

        seconds = rounds({"decode": decode, "all": lambda folder=folder: this_project(folder)}, repeats)
        each_ms = spread([1000 * value / slices for value in seconds["decode"]], ".1f")
        share = spread(ratios(seconds["all"], seconds["decode"]), ".2f")
        print(f"| {syntax.name} | {each_ms} | {share} |")


def bench_scaling(folder: Path, repeats: int) -> None:
    """Table of what a second worker gains, in turn with a pure computation; and a worker's memory."""
    jobs = {"volumes": (volume_of, folder), "a pure computation": (spin, 3_000_000)}
    gains: dict[str, list[float]] = {name: [] for name in jobs}
    peak_mib = 0
    for number in range(repeats):
        for name, (function, item) in jobs.items():
            one, results = in_workers(function, [item] * 9, 1)
            two, _ = in_workers(function, [item] * 18, 2)
            gains[name].append(one / two)
            peak_mib = max(peak_mib, *results) if function is volume_of else peak_mib
        say(f"round {number + 1} of {repeats}")
    print("\n| work | items per second, 2 processes against 1 |\n|---|---|")
    for name, values in gains.items():
        print(f"| {name} | {spread(values, '.2f')} |")
    print(f"\nPeak memory of a worker, imports included: {peak_mib} MiB")


def bench_preprocess(args: argparse.Namespace) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    shape = f"{args.slices} x {args.size} x {args.size} int16"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        head, body = root / "head", root / "body"
        write_ct(head, args.slices, args.size, 160 / args.slices)
        write_ct(body, args.slices, args.size, 320 / args.slices)
        bench_plain(head, args.repeats, f"{shape}, uncompressed, 160 mm: every slice lies inside the region")
        bench_plain(
            body, args.repeats, f"{shape}, uncompressed, 320 mm: half of the slices lie inside the region"
        )
        bench_packed(root, args.packed, args.size, args.repeats)
        bench_scaling(head, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preprocess", help="DICOM to volume")
    command.add_argument("--slices", type=int, default=400)
    command.add_argument("--size", type=int, default=512)
    command.add_argument("--packed", type=int, default=40, help="slices of each compressed series")
    command.add_argument("--repeats", type=int, default=5)
    command.set_defaults(run=bench_preprocess)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
