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
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

import common
import infer
from common import Config, run_isolated
from dicom import VolumeSettings, make_volume, read_series

CTA_LOW, CTA_HIGH = 0.0, 600.0
SLICES, SIZE = 400, 512  # of the series to preprocess
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
        print(f"| {name} | {spread([value / per for value in values])} | {spread(shares, '.2f')} |")


def write_ct(folder: Path, slices: int, depth_mm: float, syntax: str = "") -> None:
    """A CT head (shell of bone, brain, noise) that fills the slices' height, int16, one file per slice."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 8, (SIZE, SIZE + slices))
    y, x = (np.mgrid[:SIZE, :SIZE] - SIZE / 2) * 230 / SIZE
    for i in range(slices):
        shrink = np.sqrt(1 - ((i + 0.5) / slices) ** 4)  # from the bottom to the vertex
        radius = np.hypot(x / (75 * shrink), y / (92 * shrink))
        hu = np.where(radius < 0.9, 40.0, np.where(radius < 1.0, 1100.0, -1000.0)) + noise[:, i : i + SIZE]
        ds = pydicom.examples.ct
        ds.Rows, ds.Columns, ds.PixelSpacing = SIZE, SIZE, [round(230 / SIZE, 6)] * 2
        ds.ImagePositionPatient = [x[0, 0], y[0, 0], round(i * depth_mm / slices, 4)]
        ds.SliceThickness, ds.InstanceNumber = depth_mm / slices, i + 1
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(i)])
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        stored = np.rint(hu - float(ds.RescaleIntercept)).astype(np.int16)
        ds.PixelData = np.maximum(stored, 0).tobytes()
        if syntax:
            ds.compress(syntax)
        ds.save_as(folder / f"{ds.SOPInstanceUID}.dcm")


def make_voxels(folder: Path) -> np.ndarray:
    return make_volume(read_series(folder), VolumeSettings()).voxels


def read_all(folder: Path) -> list[pydicom.Dataset]:
    """Every file with its pixels, sorted by z: what the notebooks start with."""
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[2])


def run_notebook(folder: Path) -> np.ndarray:
    """The public notebooks' way: rescale, window and resize every slice, then linear zoom to 32 slices."""
    images = []
    for ds in read_all(folder):
        hu = ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        image = (np.clip((hu - CTA_LOW) / (CTA_HIGH - CTA_LOW), 0, 1) * 255).astype(np.uint8)
        images.append(cv2.resize(image, (384, 384), interpolation=cv2.INTER_LINEAR))
    volume = np.stack(images).astype(np.float32)
    position = np.linspace(0, len(volume) - 1, 32)
    below = np.minimum(position.astype(int), len(volume) - 2)
    share = (position - below)[:, None, None].astype(np.float32)
    return (volume[below] * (1 - share) + volume[below + 1] * share).astype(np.uint8)


def average_slabs(folder: Path) -> np.ndarray:
    """Means of 32 slabs, every file parsed by pydicom."""
    datasets, slabs = read_all(folder), []
    low = CTA_LOW - float(datasets[0].RescaleIntercept)  # as stored
    high = low + CTA_HIGH - CTA_LOW
    for part in np.array_split(np.arange(len(datasets)), 32):
        total = np.zeros((SIZE, SIZE), np.float32)
        for i in part:
            total += np.clip(datasets[i].pixel_array, int(low), int(high))
        mean = (total / len(part) - low) * (255 / (high - low))
        slabs.append(cv2.resize(mean, (384, 384), interpolation=cv2.INTER_AREA).astype(np.uint8))
    return np.stack(slabs)


def read_peak() -> int:
    """Peak memory of this process in MiB; ru_maxrss would be the parent's at the fork."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def measure_volume(folder: Path) -> int:
    """A worker's job: as preprocess.py does it, without writing. Returns its peak memory."""
    make_voxels(folder)
    return read_peak()


def spin(steps: int) -> float:
    """A worker's job without memory or disk: what a second process can gain at best."""
    return sum(i * 1e-9 for i in range(steps))


def time_workers(function: Callable, item: object, workers: int) -> float:
    """Seconds per item over nine items for each process; the first of each, with its imports, is left out."""
    start, items = 0.0, [item] * 9 * workers
    answers = run_isolated(function, items, workers=workers, timeout_s=600, memory_gb=4)
    for number, (_, _, reason) in enumerate(answers, start=1):
        if reason:
            raise RuntimeError(reason)
        if number == workers:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (8 * workers)


def bench_packed(root: Path, slices: int, repeats: int) -> None:
    """Tables of what a compressed series takes beyond its decoding by pydicom with the same decoder."""
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        write_ct(root / syntax, slices, 160, syntax)
        datasets = read_all(root / syntax)

        def decode(datasets: list[pydicom.Dataset] = datasets) -> None:
            for ds in datasets:
                ds._pixel_array, ds._pixel_id = None, {}  # pydicom keeps what it decoded
                _ = ds.pixel_array

        candidates = {"decoding": decode, "everything": lambda folder=root / syntax: make_voxels(folder)}
        seconds = time_rounds(candidates, repeats)
        print_table(f"{syntax.name}, a slice of {slices}", seconds, "decoding", per=slices)


def bench_preprocess(args: argparse.Namespace) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for depth_mm, share in ((320, "half"), (160, "all")):
            folder = Path(temporary) / share
            write_ct(folder, SLICES, depth_mm)
            candidates = {
                "this project": lambda folder=folder: make_voxels(folder),
                "notebook method": lambda folder=folder: run_notebook(folder),
                "slab means through pydicom": lambda folder=folder: average_slabs(folder),
                "reading all bytes": lambda folder=folder: [path.read_bytes() for path in folder.iterdir()],
            }
            title = f"{SLICES} x {SIZE} x {SIZE} int16, {share} of the slices inside the region"
            print_table(title, time_rounds(candidates, args.repeats), "notebook method")
        bench_packed(Path(temporary), args.packed, args.repeats)
        for name, function, item in (("volume", measure_volume, folder), ("computation", spin, 3_000_000)):
            candidates = {
                f"{workers} process(es)": lambda w=workers, f=function, item=item: time_workers(f, item, w)
                for workers in (1, 2)
            }
            print_table(f"{name}, an item", time_rounds(candidates, args.repeats), "1 process(es)")
        ((_, peak_mib, _),) = run_isolated(measure_volume, [folder], workers=1, timeout_s=600, memory_gb=4)
    print(f"\nPeak memory of a worker, imports included: {peak_mib} MiB")


def load_members(outputs: Path, num: int, model: str, img_size: int) -> tuple:
    """An ensemble of num runs with random weights, and infer.py's arguments."""
    for fold in range(num):
        cfg = change(Config(), fold=fold, num_folds=5, pretrained=False, model_name=model, img_size=img_size)
        decoys = np.random.default_rng(fold).random((100, 3)).tolist()
        meta = {"prior": [0.1] * 14, "decoys": decoys, "val_uids": [], "locator": ""}
        (outputs / cfg.run_name).mkdir(parents=True)
        path = outputs / cfg.run_name / infer.CHECKPOINT
        common.save_checkpoint(path, common.build_model(cfg), cfg, meta)
    args = infer.parse_arguments(["--src", "bench", "--outputs", str(outputs)])
    args.is_main = False
    return infer.load_ensemble(args, [torch.device("cuda" if torch.cuda.is_available() else "cpu")]), args


def answer_many(ensemble: infer.Ensemble, args: argparse.Namespace, folder: Path, num: int) -> tuple:
    """(seconds of infer.py's loop for num copies of a series, as the second to the last take; MiB after
    each)."""
    times_s, memory = [], []

    def save(answer: infer.Answer) -> None:
        if answer.reason:
            raise RuntimeError(answer.reason)
        times_s.append(time.perf_counter())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20)

    source = infer.Source(False, {f"1.{i}": sorted(folder.iterdir()) for i in range(num)}, {})
    infer.answer_all(ensemble, source, list(source.series), args, save)
    return (times_s[-1] - times_s[0]) * num / (num - 1), memory


def bench_infer(args: argparse.Namespace) -> None:
    """infer.py from DICOM against the members' bare forward and the notebooks' flow."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)  # the other core reads
    num, size = args.series, args.img_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "1.2"
        write_ct(folder, 200, 160)
        ensemble, options = load_members(Path(temporary) / "members", 5, args.model, size)
        image = np.random.default_rng(0).integers(0, 256, (35, size, size), dtype=np.uint8)

        def predict() -> None:
            """A forward pass per member, each answer fetched."""
            for member in ensemble.members:
                infer.predict_views(member, image, False)

        def run_flow() -> None:
            """Read all, preprocess as notebooks do, then a forward per fold: nothing overlaps."""
            image[:32] = [cv2.resize(slab, (size, size)) for slab in run_notebook(folder)]
            predict()

        candidates = {
            "bare forward": lambda: [predict() for _ in range(num)],
            "infer.py from DICOM": lambda: answer_many(ensemble, options, folder, num)[0],
            "notebook flow": lambda: [run_flow() for _ in range(num)],
        }
        seconds = time_rounds(candidates, args.repeats)
        print_table(f"a series, 5 x {args.model}, {size} px", seconds, "bare forward", per=num)
        tiny = load_members(Path(temporary) / "tiny", 1, "test_efficientnet", 64)
        write_ct(Path(temporary) / "small", 40, 160)
        _, memory = answer_many(*tiny, Path(temporary) / "small", 200)
    print(f"\nMiB of the parent after 20, 100 and 200 series: {memory[19]}, {memory[99]}, {memory[199]}")
    bench_locator(args.repeats)  # last, for its MaxViT-B stays in memory


def bench_locator(repeats: int) -> None:
    """What a locator adds to one MaxViT-B member: forward passes at 384 px, with the peaks of its maps."""
    root = Path(__file__).resolve().parents[1] / "configs"
    configs = [common.load_config(root / name) for name in ("locator.yaml", "fold0.yaml")]
    locator, member = (common.build_model(cfg).eval() for cfg in configs)
    image = torch.rand(1, configs[1].in_chans, 384, 384)

    def locate() -> None:
        maps = locator(image[:, : configs[0].in_chans]).maps[0].sigmoid().numpy()
        common.propose(maps, np.array([5.0, 0.5, 0.5]), configs[0])

    with torch.inference_mode():
        seconds = time_rounds({"member": lambda: member(image), "locator": locate}, repeats)
    print_table("a locator beside a member, 384 px", seconds, "member")


def make_loop(name: str, cache: Path, args: argparse.Namespace, waits: list[float]) -> Callable[[], None]:
    """An epoch of train.py ("ours") or a bare one, on models, series and batches alike."""
    from accelerate import Accelerator

    import train

    settings = {"model_name": args.model, "img_size": args.img_size, "precision": "no", "workers": 0}
    cfg = change(Config(), pretrained=False, epochs=1000, cache=str(cache), **settings)
    table, accelerator = random_table(args.series), Accelerator()
    write_cache(cache, table, cfg)
    dataset = common.SeriesDataset(cfg, table, "train", np.full((1, 3), 0.5))
    if name == "ours":
        state = train.begin(cache / "run", cfg, accelerator, {}, argparse.Namespace(resume=0, overwrite=0))
        state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)

        def run_ours() -> None:
            start = time.perf_counter()
            _, waited = train.train_epoch(cfg, accelerator, state, dataset)
            state.progress.epoch += 1
            waits.append(waited / (time.perf_counter() - start))

        return run_ours
    items = [dataset[i] for i in range(cfg.batch_size)]
    images = torch.stack([item["image"] for item in items]).to(accelerator.device) / 255
    labels = torch.stack([item["labels"] for item in items]).to(accelerator.device)
    model = common.build_model(cfg).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run_bare() -> None:
        """Forward, backward, AdamW on a batch that stays on the device."""
        for _ in range(math.ceil(args.series / cfg.batch_size)):
            logits = model(images).logits
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run_bare


def measure_loop(item: tuple) -> int:
    """A worker's job: two epochs of one loop alone. Returns its peak memory."""
    with tempfile.TemporaryDirectory() as cache:
        loop = make_loop(item[0], Path(cache), item[1], [])
        loop()
        loop()
    return read_peak()


def bench_train(args: argparse.Namespace) -> None:
    """The training loop against a bare one, and the peak memory of each."""
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        loops = {name: make_loop(name, Path(root) / name, args, waits) for name in ("bare", "ours")}
        seconds = time_rounds(loops, args.repeats)
    title = f"an update of {args.model}, {args.img_size} px, batch 2"
    print_table(title, seconds, "bare", per=math.ceil(args.series / 2))
    for name in loops:
        limits = {"workers": 1, "timeout_s": 36000, "memory_gb": 100}
        ((_, peak_mib, reason),) = run_isolated(measure_loop, [(name, args)], **limits)
        print(f"\nPeak memory of {name}: {reason or peak_mib} MiB")
    print(f"\nours: an epoch of train.py, of which {spread(waits)} waits for data")


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("command", choices=["preprocess", "train", "infer"])
    parser.add_argument(
        "--repeats", type=common.positive_int, default=5, help="rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--packed", type=common.positive_int, default=40, help="preprocess: compressed slices"
    )
    parser.add_argument("--series", type=common.positive_int, default=12, help="train, infer: series a round")
    parser.add_argument("--model", default="maxvit_rmlp_pico_rw_256", help="train, infer: timm's name")
    parser.add_argument("--img-size", type=common.positive_int, default=256, help="train, infer: pixels")
    args = parser.parse_args()
    benches = {"preprocess": bench_preprocess, "train": bench_train, "infer": bench_infer}
    benches[args.command](args)


if __name__ == "__main__":
    main()
