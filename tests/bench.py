"""Measure this project against what people use and against the floor, on one machine, in one run.

in   nothing: series, noise to train on, and members with random weights go into a temporary folder
out  Markdown tables on stdout; progress on stderr
run  python tests/bench.py preprocess

Every round runs all candidates in turn, so that a busy machine slows all alike; figures are medians over the
rounds [smallest, largest]. One process, one thread, files in the page cache, unless the table says otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
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
from conftest import change, random_table, write_cache
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

import common
import infer
from common import Config, run_isolated
from dicom import VolumeSettings, make_volume, read_series

CTA_LOW, CTA_HIGH = 0.0, 600.0
Seconds = dict[str, list[float]]  # of each candidate in each round


def time_rounds(candidates: dict[str, Callable[[], float | None]], repeats: int) -> Seconds:
    """Seconds of each candidate in each round, as it returns them or else of the call, after one round that
    does not count."""
    seconds: Seconds = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            stated = run()
            took = stated if isinstance(stated, float) else time.perf_counter() - start
            seconds[name] += [took] * (number > 0)
        common.log(f"round {number} of {repeats}")
    return seconds


def spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def print_table(header: str, seconds: Seconds, base: str, per: int = 1) -> None:
    """Markdown rows: seconds of each candidate divided by `per`, and their share of the base's."""
    print(f"\n| {header} | seconds | of {base} |\n|---|---|---|")
    for name, values in seconds.items():
        shares = [a / b for a, b in zip(values, seconds[base], strict=True)]
        each = [value / per for value in values]
        print(f"| {name} | {spread(each)} | {spread(shares, '.2f')} |")


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
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
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
    return make_volume(read_series(folder), VolumeSettings()).voxels


def read_all(folder: Path) -> list[pydicom.Dataset]:
    """Every file with its pixels, sorted by z: what the notebooks start with."""
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda ds: float(ds.ImagePositionPatient[2]))


def notebook(folder: Path) -> np.ndarray:
    """The public notebooks' way: rescale, window and resize every slice, then linear zoom to 32 slices."""
    images = []
    for ds in read_all(folder):
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
    slices = read_all(folder)
    slabs = []
    for part in np.array_split(np.arange(len(slices)), 32):
        total = np.zeros(slices[0].pixel_array.shape, np.float32)
        for i in part:
            slope, intercept = float(slices[i].RescaleSlope), float(slices[i].RescaleIntercept)
            low, high = (CTA_LOW - intercept) / slope, (CTA_HIGH - intercept) / slope
            total += np.clip(slices[i].pixel_array, int(low), int(high))
        mean = (total / len(part) - low) * (255 / (high - low))
        slabs.append(cv2.resize(mean, (384, 384), interpolation=cv2.INTER_AREA).astype(np.uint8))
    return np.stack(slabs)


def measure_volume(folder: Path) -> int:
    """A worker's job: as preprocess.py does it, without writing. Returns the process' peak memory in MiB."""
    this_project(folder)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def spin(steps: int) -> float:
    """A worker's job without memory or disk: what a second process can gain at best."""
    return sum(i * 1e-9 for i in range(steps))


def time_workers(function: Callable, item: object, workers: int) -> float:
    """Seconds per item over nine items for each process; the first of each, with its imports, does not
    count."""
    start, items = 0.0, [item] * 9 * workers
    answers = run_isolated(function, items, workers=workers, timeout_s=600, memory_gb=4)
    for number, (_, _, reason) in enumerate(answers, start=1):
        if reason:
            raise RuntimeError(reason)
        if number == workers:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (8 * workers)


def bench_plain(folder: Path, repeats: int, title: str) -> None:
    """Table of all methods on an uncompressed series."""
    candidates = {
        "this project (read_series + make_volume)": lambda: this_project(folder),
        "- of it read_series": lambda: read_series(folder),
        "notebook method": lambda: notebook(folder),
        "slab means through pydicom": lambda: slab_means(folder),
        "floor: reading all bytes": lambda: [path.read_bytes() for path in folder.iterdir()],
    }
    print_table(title, time_rounds(candidates, repeats), "notebook method")


def bench_packed(root: Path, slices: int, size: int, repeats: int) -> None:
    """Tables of what a compressed series takes beyond its decoding by pydicom with the same decoder."""
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        folder = root / syntax
        write_ct(folder, slices, size, 160 / slices, syntax)
        datasets = read_all(folder)

        def decode(datasets: list[Dataset] = datasets) -> None:
            for ds in datasets:
                ds._pixel_array, ds._pixel_id = None, {}  # pydicom keeps what it decoded
                _ = ds.pixel_array

        candidates = {"decoding": decode, "everything": lambda folder=folder: this_project(folder)}
        seconds = time_rounds(candidates, repeats)
        print_table(f"{syntax.name}, a slice of {slices}", seconds, "decoding", per=slices)


def bench_scaling(folder: Path, repeats: int) -> None:
    """Tables of what a second worker gains, also for a pure computation; and a worker's memory."""
    for name, function, item in (("volume", measure_volume, folder), ("computation", spin, 3_000_000)):
        candidates = {
            f"{workers} process(es)": lambda w=workers, f=function, item=item: time_workers(f, item, w)
            for workers in (1, 2)
        }
        print_table(f"{name}, an item", time_rounds(candidates, repeats), "1 process(es)")
    ((_, peak_mib, _),) = run_isolated(measure_volume, [folder], workers=1, timeout_s=600, memory_gb=4)
    print(f"\nPeak memory of a worker, imports included: {peak_mib} MiB")


def bench_preprocess(args: argparse.Namespace) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    shape = f"{args.slices} x {args.size} x {args.size} int16"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for depth_mm, share in ((160, "all"), (320, "half")):
            folder = root / share
            write_ct(folder, args.slices, args.size, depth_mm / args.slices)
            bench_plain(folder, args.repeats, f"{shape}, {share} of the slices inside the region")
        bench_packed(root, args.packed, args.size, args.repeats)
        bench_scaling(root / "all", args.repeats)


# --- infer --------------------------------------------------------------------------------------------------


def load_members(outputs: Path, num: int, *options: str, **settings) -> tuple:
    """An ensemble of num runs with random weights, and infer.py's arguments."""
    for fold in range(num):
        cfg = change(Config(), fold=fold, num_folds=max(num, 2), pretrained=False, **settings)
        decoys = np.random.default_rng(fold).random((100, 3)).tolist()
        meta = {"prior": [0.1] * 14, "decoys": decoys, "val_uids": [], "locator": ""}
        (outputs / cfg.run_name).mkdir(parents=True)
        path = outputs / cfg.run_name / infer.CHECKPOINT
        common.save_checkpoint(path, common.build_model(cfg), cfg, meta)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = infer.parse_arguments(["--src", "bench", "--outputs", str(outputs), *options])
    args.is_main = False
    return infer.load_ensemble(args, [device]), args


def answer_many(
    ensemble: infer.Ensemble, args: argparse.Namespace, folder: Path, num: int, memory: list[float]
) -> float:
    """Seconds of infer.py's loop for num copies of a series, as the second to the last take; `memory` gets
    the MiB after each."""
    times_s = []

    def save(answer: infer.Answer) -> None:
        if answer.reason:
            raise RuntimeError(answer.reason)
        times_s.append(time.perf_counter())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)

    source = infer.Source(False, {f"1.{i}": sorted(folder.iterdir()) for i in range(num)}, {})
    infer.answer_all(ensemble, source, list(source.series), args, save)
    return (times_s[-1] - times_s[0]) * num / (num - 1)


def bench_infer(args: argparse.Namespace) -> None:
    """infer.py from DICOM against the members' bare forward and the notebooks' flow."""
    cv2.setNumThreads(1)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the other core reads
    with tempfile.TemporaryDirectory() as temporary:
        root, size = Path(temporary), (args.img_size, args.img_size)
        folder = root / "1.2"
        write_ct(folder, args.slices, args.size, 160 / args.slices)
        options = ["--tta"] if args.tta else []
        settings = {"model_name": args.model, "img_size": args.img_size}
        ensemble, options = load_members(root / "members", args.members, *options, **settings)
        image = np.random.default_rng(0).integers(0, 256, (35, *size), dtype=np.uint8)

        def forward() -> None:
            """The members' forward passes alone, on a ready image, each answer fetched."""
            for _ in range(args.series):
                for member in ensemble.members:
                    infer.predict_views(member, image, args.tta)

        def notebook_flow() -> None:
            """Read all, preprocess as notebooks do, then a forward per fold (and view): nothing overlaps."""
            for _ in range(args.series):
                slabs = np.stack([cv2.resize(slab, size) for slab in notebook(folder)])
                image[: len(slabs)] = slabs
                for member in ensemble.members:
                    for view in (image, image[..., ::-1])[: 1 + args.tta]:
                        infer.predict_views(member, view, False)

        def ours() -> float:
            return answer_many(ensemble, options, folder, args.series, [])

        name = "infer.py from DICOM, reading in the background"
        candidates = {"bare forward": forward, name: ours, "notebook flow": notebook_flow}
        seconds = time_rounds(candidates, args.repeats)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
        print(f"\n{args.members} x {args.model}, {args.img_size} px, {1 + args.tta} view(s), {device}")
        print(f"{args.slices} x {args.size} x {args.size} CT, {options.workers} reading process(es)")
        print_table("a series", seconds, "bare forward", per=args.series)
        write_ct(root / "small", 60, 128, 2.6)
        tiny = load_members(root / "tiny", 1, model_name="test_efficientnet", img_size=64)
        memory = []
        answer_many(*tiny, root / "small", 200, memory)
        sizes = [round(memory[i]) for i in (19, 99, 199)]
        print(f"\nMiB of the parent after 20, 100 and 200 series: {sizes}")
        print_locator_share(ensemble.devices[0], args.repeats)  # last, for its MaxViT-B stays in memory


def print_locator_share(device: torch.device, repeats: int) -> None:
    """What a locator adds to one MaxViT-B member: forward passes at 384 px, with the peaks of its maps."""
    root = Path(__file__).parents[1] / "configs"
    locator, member = (common.load_config(root / name) for name in ("locator.yaml", "fold0.yaml"))
    models = [common.build_model(cfg).eval().to(device) for cfg in (locator, member)]
    size = member.volume.img_size
    image = torch.rand(1, member.in_chans, size, size, device=device)

    def locate() -> None:
        maps = models[0](image[:, : locator.in_chans]).maps
        common.propose(torch.sigmoid(maps[0]).cpu().numpy(), np.array([5.0, 0.5, 0.5]), locator)

    candidates = {"member": lambda: models[1](image).logits.cpu(), "locator": locate}
    with torch.inference_mode():
        seconds = time_rounds(candidates, repeats)
    print_table(f"{locator.model_name} beside {member.model_name}, {size} px, fp32", seconds, "member")


# --- train --------------------------------------------------------------------------------------------------


def make_loops(cache: Path, args: argparse.Namespace, waits: list[float]) -> dict[str, Callable[[], None]]:
    """This project's epoch and a bare one, on models, series and batches alike; with --only, one of them, so
    that its peak memory does not hold the other's weights."""
    from accelerate import Accelerator

    import train

    settings = {"model_name": args.model, "img_size": args.img_size, "precision": args.precision}
    settings |= {"batch_size": args.batch, "workers": args.workers, "epochs": 1000, "cache": str(cache)}
    cfg, table = change(Config(), pretrained=False, **settings), random_table(args.series)
    write_cache(cache, table, cfg)
    accelerator, decoys = Accelerator(mixed_precision=args.precision), np.full((1, 3), 0.5)
    dataset = common.SeriesDataset(cfg, table, "train", decoys)
    items = [dataset[i] for i in range(args.batch)]
    images = torch.stack([item["image"] for item in items]).to(accelerator.device).float() / 255
    labels = torch.stack([item["labels"] for item in items]).to(accelerator.device)
    num_updates, loops = math.ceil(args.series / args.batch), {}
    if args.only != "ours":
        model = common.build_model(cfg).to(accelerator.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def run_bare() -> None:
            """Forward, backward, AdamW on a batch that stays on the device."""
            for _ in range(num_updates):
                with accelerator.autocast():
                    logits = model(images).logits
                torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()

        loops["bare"] = run_bare
    if args.only != "bare":
        fresh = argparse.Namespace(resume=False, overwrite=False)
        state = train.begin(cache / "run", cfg, accelerator, {}, fresh)
        state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)

        def run_ours() -> None:
            start = time.perf_counter()
            _, waited = train.train_epoch(cfg, accelerator, state, dataset)
            state.progress.epoch += 1
            waits.append(waited / (time.perf_counter() - start))

        loops["ours"] = run_ours
    return loops


def bench_train(args: argparse.Namespace) -> None:
    """The training loop against a bare one; with --only, one of them alone and its peak memory on stdout."""
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        loops = make_loops(Path(folder) / "cache", args, waits)
        seconds = time_rounds(loops, 1 if args.only else args.repeats)
    if args.only:
        status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's at the fork
        peak_kib = torch.cuda.max_memory_allocated() // 2**10 if torch.cuda.is_available() else 0
        print((peak_kib or int(status.split("VmHWM:")[1].split()[0])) // 2**10)
        return
    title = f"{args.model}, {args.img_size} px, batch {args.batch}, per update"
    print_table(title, seconds, "bare", per=math.ceil(args.series / args.batch))
    for name in loops:
        command = [sys.executable, *sys.argv, "--only", name]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(f"\nPeak memory of {name}: {peak} MiB")
    print(f"\nours: an epoch of train.py, of which {spread(waits)} waits for data")


MODEL, SERIES = {"model": "maxvit_rmlp_pico_rw_256", "img-size": 256}, {"slices": 400, "size": 512}
TRAIN = {"batch": 2, "series": 16, "workers": 0, "precision": "no", "repeats": 5, "only": ""}
INFER = {"slices": 200, "members": 5, "tta": False, "series": 12, "repeats": 3}
COMMANDS = {  # options with their defaults
    "preprocess": (bench_preprocess, SERIES | {"packed": 40, "repeats": 5}),
    "train": (bench_train, MODEL | TRAIN),
    "infer": (bench_infer, MODEL | SERIES | INFER),
}


def main() -> None:
    parser = common.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, options) in COMMANDS.items():
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        for option, default in options.items():
            if default is False:
                command.add_argument(f"--{option}", action="store_true")
            else:
                command.add_argument(f"--{option}", type=type(default), default=default, help="%(default)s")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
