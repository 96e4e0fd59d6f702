"""Measure this project against what people use and against the floor, on one machine, in one run.

in   nothing: series, noise to train on, and members with random weights go into a temporary folder
out  Markdown tables on stdout; progress on stderr
run  python tests/bench.py preprocess     (or train, infer: --series N a round, --model, --img-size)
     python tests/bench.py train --config configs/locator.yaml --set batch_size=2

Every round runs all candidates in turn, so that a busy machine slows all alike; figures are medians over the
rounds [smallest, largest]. One process, one thread, files in the page cache, unless the table says otherwise.
"""

import argparse
import os
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import pydicom
import torch
from conftest import change, random_table, write_cache
from pydicom.pixels import get_decoder
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

import common
import infer
from common import Config
from dicom import VolumeSettings, make_volume, read_series

SLICES, SIZE = 400, 512  # of the series to preprocess


def compare(title: str, repeats: int, candidates: dict[str, Callable], per: int = 1) -> None:
    """Run the candidates in turn, `repeats` times after one round that does not count. Markdown rows: seconds
    of each, as it returns them or else of the call, divided by `per`; and their share of the first one's."""
    seconds = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            stated = run()
            took = stated if isinstance(stated, float) else time.perf_counter() - start
            seconds[name] += [took / per] * (number > 0)
        common.log(f"round {number} of {repeats}")
    base, *_ = candidates
    print(f"\n| {title} | seconds | of {base} |\n|---|---|---|")
    for name, values in seconds.items():
        shares = np.divide(values, seconds[base])
        print(f"| {name} | {spread(values)} | {spread(shares, '.2f')} |")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    return f"{np.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


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
        ds.PixelData = np.rint(hu - float(ds.RescaleIntercept)).clip(0).astype(np.int16).tobytes()
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
        image = (np.clip(hu / 600, 0, 1) * 255).astype(np.uint8)
        images.append(cv2.resize(image, (384, 384), interpolation=cv2.INTER_LINEAR))
    volume = np.stack(images).astype(np.float32)
    position = np.linspace(0, len(volume) - 1, 32)
    below = np.minimum(position.astype(int), len(volume) - 2)
    share = (position - below)[:, None, None].astype(np.float32)
    return (volume[below] * (1 - share) + volume[below + 1] * share).astype(np.uint8)


def decode(datasets: list[pydicom.Dataset]) -> list[tuple]:
    return [get_decoder(ds.file_meta.TransferSyntaxUID).as_array(ds) for ds in datasets]


def bench_preprocess(args: argparse.Namespace, root: Path) -> None:
    """A plain series against the notebooks' way; compressed ones against their decoding by pydicom alone."""
    for depth_mm, share in ((320, "half"), (160, "all")):
        folder = root / share
        write_ct(folder, SLICES, depth_mm)
        candidates = {
            "notebook method": partial(run_notebook, folder),
            "this project": partial(make_voxels, folder),
            "reading all bytes": lambda folder=folder: [path.read_bytes() for path in folder.iterdir()],
        }
        compare(f"{SLICES} x {SIZE} x {SIZE}, {share} of the slices in the box", args.repeats, candidates)
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        folder = root / syntax
        write_ct(folder, args.packed, 160, syntax)
        candidates = {"decoding": partial(decode, read_all(folder)), "volume": partial(make_voxels, folder)}
        compare(f"{syntax.name}, a slice of {args.packed}", args.repeats, candidates, per=args.packed)


def bench_infer(args: argparse.Namespace, root: Path) -> None:
    """infer.py from DICOM against the bare forward of five members with random weights."""
    num, folder, outputs = args.series, root / "1.2", root / "members"
    write_ct(folder, 200, 160)
    settings = {"model_name": args.model, "img_size": args.img_size, "pretrained": False}
    for fold in range(5):
        cfg = change(Config(), fold=fold, num_folds=5, **settings)
        decoys = np.random.default_rng(fold).random((100, 3)).tolist()
        meta = {"prior": [0.1] * 14, "decoys": decoys, "val_uids": [], "locator": ""}
        path = outputs / cfg.run_name / infer.CHECKPOINT
        path.parent.mkdir(parents=True)
        common.save_checkpoint(path, common.build_model(cfg), cfg, meta)
    options = infer.parse_arguments(["--src", "bench", "--outputs", str(outputs)])
    options.is_main = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ensemble = infer.load_ensemble(options, [device])
    image = np.random.default_rng(0).integers(0, 256, (35, args.img_size, args.img_size), dtype=np.uint8)

    def run_bare() -> None:
        """For every series a forward pass per member, each answer fetched; nothing overlaps."""
        for _, member in product(range(num), ensemble.members):
            infer.predict_views(member, image, False)

    def run_ours() -> float:
        """Seconds of infer.py's loop for num copies of a series, as the second to the last take."""
        times_s = []
        source = infer.Source({f"1.{i}": sorted(folder.iterdir()) for i in range(num)})
        answers = infer.answer_all(
            ensemble, source, list(source.series), options, save=lambda _: times_s.append(time.perf_counter())
        )
        assert not any(answer.reason for answer in answers), answers
        return np.ptp(times_s) * num / (num - 1)

    candidates = {"bare forward": run_bare, "infer.py from DICOM": run_ours}
    compare(f"a series, 5 x {args.model}, {args.img_size} px", args.repeats, candidates, per=num)


def bench_train(args: argparse.Namespace, root: Path) -> None:
    """Updates of train.py and of a bare loop: models, batches and precision alike, weights random."""
    import train

    settings = [] if args.config else [f"model_name={args.model}", f"img_size={args.img_size}"]
    overrides = [*settings, *args.set, "pretrained=false", "epochs=1000", f"cache={root}"]
    cfg = train.fit_workers(common.load_config(args.config, overrides))
    table, accelerator, waits = random_table(args.series), train.make_accelerator(cfg), []
    write_cache(root, table, cfg)
    dataset = common.SeriesDataset(cfg, table, "train", np.full((1, 3), 0.5))
    state = train.begin(root / "run", cfg, accelerator, {}, argparse.Namespace(resume=False))
    state.model, state.optimizer = accelerator.prepare(state.raw, state.optimizer)

    def run_ours() -> float:
        times_s = []
        bar = SimpleNamespace(update=lambda: times_s.append(time.perf_counter()), close=lambda: None)
        with unittest.mock.patch("common.progress", lambda *_: bar):
            _, waited = train.train_epoch(cfg, accelerator, state, dataset)
        state.progress.epoch += 1
        waits.append(waited)
        return np.ptp(times_s) / (len(times_s) - 1) / cfg.accumulation

    run_ours()
    is_gpu = accelerator.device.type == "cuda"
    memory = f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if is_gpu else "CPU"
    batch = next(train.load_batches(dataset, [range(cfg.batch_size)], accelerator.device))
    images, labels, _ = train.augment(batch, cfg)
    model = common.build_model(cfg).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(enabled=accelerator.scaler is not None)

    def run_bare() -> float:
        """Seconds of forward, backward and AdamW, mean of five."""
        start = time.perf_counter()
        for _ in range(5):
            with accelerator.autocast():
                logits = model(images).logits
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        loss.item()  # waits for the GPU
        return (time.perf_counter() - start) / 5

    title = f"{cfg.model_name}, {cfg.volume.img_size} px, {accelerator.mixed_precision}, batch {len(images)}"
    compare(title, args.repeats, {"bare": run_bare, "ours": run_ours})
    print(f"\nours: {memory}; waited for data in an epoch of {args.series} series: {spread(waits)} s")


def main() -> None:
    parser = common.make_parser(__doc__)
    benches = {"preprocess": bench_preprocess, "train": bench_train, "infer": bench_infer}
    parser.add_argument("command", choices=benches)
    for name, default in {"repeats": 5, "packed": 40, "series": 12, "img-size": 256}.items():
        parser.add_argument(f"--{name}", type=common.positive_int, default=default)
    parser.add_argument("--model", default="maxvit_rmlp_pico_rw_256")
    parser.add_argument("--config", help="of train: a config instead of --model and --img-size")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="of train")
    args = parser.parse_args()
    if args.command != "train":
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        benches[args.command](args, Path(root))


if __name__ == "__main__":
    main()
