"""Measure this project against what people use and against the floor, on one machine, in one run.

in   preprocess    nothing: writes its own series into a temporary folder
     train         nothing: the same, from noise
     infer         nothing: the same, and members with random weights
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
from dataclasses import replace
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

import common
import infer
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


# --- infer --------------------------------------------------------------------------------------------------


def write_members(outputs: Path, num: int, **settings) -> None:
    """num runs with random weights, as train.py leaves them."""
    for fold in range(num):
        cfg = Config(fold=fold, num_folds=max(num, 2), pretrained=False, **settings)
        decoys = np.random.default_rng(fold).random((100, 3)).tolist()
        meta = {"prior": [0.1] * 14, "decoys": decoys, "fold": fold, "val_uids": []}
        (outputs / cfg.run_name).mkdir(parents=True)
        model = common.build_model(cfg)
        common.save_checkpoint(outputs / cfg.run_name / "best_ema.safetensors", model, cfg, meta)


def load_members(outputs: Path, *options: str) -> tuple[infer.Ensemble, argparse.Namespace]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = infer.parse_arguments(["--src", "bench", "--outputs", f"{outputs}/*", *options])
    args.precision = "fp16" if device == "cuda" else "no"
    return infer.load_ensemble(args, torch.device(device), None), args


def stream(
    ensemble: infer.Ensemble,
    args: argparse.Namespace,
    files: list[Path],
    num: int,
    ready: tuple | None = None,
) -> dict:
    """infer.py's loop: seconds per series after the first, of it in the members; memory in MiB after each.

    ready: what reading gives, if the loop is to be measured without it.
    """
    answered, forward_s, memory = [], [], []
    predict, read = infer.predict_series, infer.read_all

    def timed(*arguments) -> tuple:
        result = predict(*arguments)
        forward_s.append(sum(result[1]))
        return result

    def keep(answer: infer.Answer) -> None:
        answered.append(time.perf_counter())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        if answer.reason:
            raise RuntimeError(answer.reason)

    infer.predict_series = timed
    if ready:
        infer.read_all = lambda source, uids, *_: ((uid, ready, None) for uid in uids)
    try:
        source = infer.Source(False, {f"1.{i}": files for i in range(num)}, {})
        infer.answer_all(ensemble, source, sorted(source.series), args, keep)
    finally:
        infer.predict_series, infer.read_all = predict, read
    return {
        "wall": (answered[-1] - answered[0]) / (num - 1),
        "forward": sum(forward_s[1:]) / (num - 1),
        "memory": memory,
    }


def split_reading(files: list[Path], cfg: Config) -> tuple[float, float, float]:
    """Seconds for the headers, for decoding, and for the rest of make_volume, in one process."""
    decode, spent = common.decode, []

    def timed(frame: common.Frame) -> np.ndarray:
        start = time.perf_counter()
        image = decode(frame)
        spent.append(time.perf_counter() - start)
        return image

    common.decode = timed
    try:
        _, headers, volume = infer.read_dicom(("1.2", files), [cfg])
    finally:
        common.decode = decode
    return headers, sum(spent), volume - sum(spent)


def bench_infer(args: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    cv2.setNumThreads(1)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the other core reads
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_ct(root / "series", args.slices, args.size, 160 / args.slices)
        files = sorted((root / "series").iterdir())
        settings = {"model_name": args.model, "img_size": args.img_size}
        write_members(root / "members", args.members, **settings)
        ensemble, options = load_members(root / "members")
        if args.tta:
            options.tta = True
        cfg, voters = ensemble.configs[0], ensemble.members
        ready = infer.read_dicom(("1.2", files), ensemble.configs)
        images = [infer.make_image(member, "1.2", ready[0][0], None) for member in voters]

        def bare() -> float:
            """The members' forward passes alone, on ready images, each answer fetched."""
            start = time.perf_counter()
            for _ in range(args.series):
                for member, image in zip(voters, images, strict=True):
                    infer.look(ensemble, member, image, options.tta)
            return (time.perf_counter() - start) / args.series

        def notebook_flow() -> float:
            """Read all, preprocess as notebooks do, then a forward per fold (and view): nothing overlaps."""
            start = time.perf_counter()
            for _ in range(args.series):
                slabs = np.stack([cv2.resize(slab, cfg_size) for slab in notebook(root / "series")])
                image = np.concatenate([slabs, images[0][len(slabs) :]])
                for member in voters:
                    infer.look(ensemble, member, image, False)
                    if options.tta:
                        infer.look(ensemble, member, np.ascontiguousarray(image[..., ::-1]), False)
            return (time.perf_counter() - start) / args.series

        cfg_size = (cfg.img_size, cfg.img_size)
        names = {
            "bare": "bare forward of the members",
            "loop": "infer.py with volumes at hand: crops, queue, mean of members",
            "ours": "infer.py from DICOM, reading in the background",
            "notebook": "notebook flow",
        }
        found: dict[str, list] = {name: [] for name in (*names, "rest", "reading")}
        for number in range(args.repeats + 1):
            ours = stream(ensemble, options, files, args.series)
            one = {"bare": bare(), "ours": ours["wall"], "rest": ours["wall"] - ours["forward"]}
            one["loop"] = stream(ensemble, options, files, args.series, ready)["wall"]
            one |= {"notebook": notebook_flow(), "reading": split_reading(files, cfg)}
            if number:
                for name, value in one.items():
                    found[name].append(value)
            say(f"round {number} of {args.repeats}")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
        print(
            f"\n{args.members} x {args.model}, {args.img_size} px, {options.precision}, mirrored view "
            f"{'on' if options.tta else 'off'}, {device}; {args.slices} x {args.size} x {args.size} CT, "
            f"{options.workers} reading process(es), {args.series} series a round; "
            f"load of the machine before it {load:.1f} on {os.cpu_count()} cores\n"
        )
        print("| seconds per series | | of the bare forward |\n|---|---|---|")
        for name, text in names.items():
            share = spread(ratios(found[name], found["bare"]), ".2f")
            print(f"| {text} | {spread(found[name])} | {share} |")
        print(
            f"| of infer.py: waiting for a volume, and all beside the members | {spread(found['rest'])} | |"
        )
        for name, values in zip(
            ("headers", "decoding", "volume"), zip(*found["reading"], strict=True), strict=True
        ):
            print(f"| in the background: {name} | {spread(list(values))} | |")
        hours = statistics.median(found["ours"]) * 2500 / 3600
        print(f"\n2,500 such series would take {hours:.2f} h of the 12 h that the challenge gives.")

        small = root / "small"
        write_ct(small, 60, 128, 2.6)
        write_members(root / "tiny", 1, model_name="test_efficientnet", img_size=64)
        memory = stream(*load_members(root / "tiny"), sorted(small.iterdir()), 200)["memory"]
        print(
            f"\nMemory of the parent after 20, 100 and 200 series: {memory[19]:.0f}, {memory[99]:.0f}, "
            f"{memory[199]:.0f} MiB."
        )
        print_locator_share(ensemble.device, args.repeats)  # last, for its MaxViT-B stays in memory


def print_locator_share(device: torch.device, repeats: int) -> None:
    """What a locator adds to one MaxViT-B member: forward passes at 384 px, with the peaks of its maps."""
    root = Path(__file__).parents[1] / "configs"
    locator, member = (common.load_config(root / f"{name}.yaml") for name in ("locator", "fold0"))
    models = [common.build_model(cfg).eval().to(device) for cfg in (locator, member)]
    image = torch.rand(1, member.in_chans, member.img_size, member.img_size, device=device)
    spacing_mm = np.array([5.0, 0.5, 0.5])

    def locate() -> None:
        maps = torch.sigmoid(models[0](image[:, : locator.base_slices])[1][0]).cpu().numpy()
        common.find_peaks(maps, spacing_mm, 3, locator.min_peak_mm, locator.locator_stride)

    with torch.inference_mode():
        seconds = rounds({"locator": locate, "member": lambda: models[1](image).cpu()}, repeats)
    share = spread(ratios(seconds["locator"], seconds["member"]), ".2f")
    print(
        f"\nThe locator ({locator.model_name}) takes {spread(seconds['locator'])} s a series, {share} of one "
        f"{member.model_name} member's {spread(seconds['member'])} s (forward, {member.img_size} px, fp32)."
    )


# --- train --------------------------------------------------------------------------------------------------


class Loops:
    """This project's epoch and a bare one, on the same model, series and batches."""

    def __init__(self, cache: Path, args: argparse.Namespace):
        import accelerate
        import conftest

        import train

        self.cfg = replace(
            Config(),
            cache=str(cache),
            model_name=args.model,
            img_size=args.img_size,
            pretrained=False,
            precision=args.precision,
            workers=args.workers,
            batch_size=args.batch,
            epochs=1000,
            channels_last=True,
        )
        self.table = conftest.random_table(args.series)
        if not (cache / "index.csv").exists():
            conftest.write_cache(cache, self.table, self.cfg)
        self.train, self.accelerator = train, accelerate.Accelerator(mixed_precision=args.precision)
        decoys = np.random.default_rng(0).random((50, 3))
        self.dataset = common.SeriesDataset(self.cfg, self.table, "train", decoys)
        self.stop, self.waits = train.StopSignal(), []
        if args.only != "bare":  # the peak memory of one shall not hold the other's weights
            self.trainee, self.progress = train.begin(self.cfg, self.accelerator, None)
        if args.only != "ours":
            self.bare = common.build_model(self.cfg).to(self.accelerator.device).train()
            self.optimizer = torch.optim.AdamW(self.bare.parameters(), fused=True)
        items = [self.dataset[i] for i in range(args.batch)]
        self.images = torch.stack([item["image"] for item in items]).to(self.accelerator.device).float() / 255
        self.labels = torch.stack([item["labels"] for item in items]).to(self.accelerator.device)

    def wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def run_bare(self) -> None:
        """Forward, backward, AdamW on one batch that stays on the device: no data, EMA or augmentation."""
        for _ in range(math.ceil(len(self.dataset) / self.cfg.batch_size)):
            with self.accelerator.autocast():
                logits = self.bare(self.images)
            torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.wait()

    def run_ours(self) -> None:
        start = time.perf_counter()
        args = (self.cfg, self.accelerator, self.trainee, self.dataset, self.progress, self.stop, None)
        waited = self.train.train_epoch(*args)
        self.wait()
        self.progress |= {"group": 0, "epoch": self.progress["epoch"] + 1}
        self.waits.append(waited / (time.perf_counter() - start))


def bench_train(args: argparse.Namespace) -> None:
    """The training loop against a bare one; with --only, one of them alone and its peak memory on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        loops = Loops(cache, args)
        candidates = {"bare": loops.run_bare, "ours": loops.run_ours}
        if args.only:
            rounds({args.only: candidates[args.only]}, 1)
            on_gpu = loops.accelerator.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0
            status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's at the fork
            print(peak or int(status.split("VmHWM:")[1].split()[0]) / 2**10)
            return
        seconds = rounds(candidates, args.repeats)
    peaks = {}
    for name in candidates:
        command = [sys.executable, *sys.argv, "--only", name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    steps = math.ceil(args.series / args.batch)
    print(
        f"| {args.model}, 35 x {args.img_size} px, batch {args.batch} | s per update | of bare | "
        "peak MiB | of bare |"
    )
    print("|---|---|---|---|---|")
    names = {
        "bare": "bare forward, backward, AdamW",
        "ours": "train.py's epoch: + data, augmentation, EMA, Accelerate",
    }
    for name, title in names.items():
        own = [value / steps for value in seconds[name]]
        ratio = spread(ratios(seconds[name], seconds["bare"]), ".2f")
        print(
            f"| {title} | {spread(own)} | {ratio} | {peaks[name]:.0f} | {peaks[name] / peaks['bare']:.2f} |"
        )
    print(
        f"\nShare of time waiting on data: {spread(loops.waits, '.3f')} with {args.workers} loader processes."
    )


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
    command = commands.add_parser("train", help="this training loop against a bare one")
    command.add_argument("--model", default="maxvit_rmlp_pico_rw_256")
    command.add_argument("--img-size", type=int, default=256)
    command.add_argument("--batch", type=int, default=2)
    command.add_argument("--series", type=int, default=16, help="per round")
    command.add_argument("--workers", type=int, default=0)
    command.add_argument("--precision", default="no")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--only", choices=("bare", "ours"), help=argparse.SUPPRESS)
    command.set_defaults(run=bench_train)
    command = commands.add_parser("infer", help="DICOM to probabilities, with random members")
    command.add_argument("--model", default="maxvit_rmlp_pico_rw_256")
    command.add_argument("--img-size", type=int, default=256)
    command.add_argument("--members", type=int, default=5)
    command.add_argument("--tta", action="store_true")
    command.add_argument("--slices", type=int, default=200)
    command.add_argument("--size", type=int, default=512)
    command.add_argument("--series", type=int, default=12, help="per round")
    command.add_argument("--repeats", type=int, default=3)
    command.set_defaults(run=bench_infer)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
