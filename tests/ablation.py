"""Train the rows of the ablation on phantoms and print their table: what helps to find more?

in   configs/ablation/*.yaml; phantoms and caches are made in ablation/ where they are missing
out  stdout: a Markdown table; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
run  python tests/ablation.py --series 1600 --seeds 3 --jobs 2     (hours; --table prints what is finished)
"""

import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from common import AP, LABELS, UID

ROOT = Path(__file__).parents[1]
CLASSIFY = "task=classify epochs=8 "
NO_CROPS = CLASSIFY + "max_localizer_crops=0 "
ROWS = {  # what it is, config, settings
    "slabs": ("35 channels from scratch, no crops", "base", NO_CROPS + "pretrained=false"),
    "weights": ("+ ImageNet weights", "base", NO_CROPS),
    "crops": ("+ annotated crops", "base", CLASSIFY + "p_localizer_dropout=0 p_global_localizer_off=0"),
    "regularised": ("+ drop-out and off-switch of crops", "base", CLASSIFY),
    "proposals": ("+ proposals of the locator", "base", CLASSIFY + "proposals=ablation/locator/*_seed0_*"),
    "scratch": ("locator from scratch, 32 slabs", "base", "pretrained=false"),
    "locator": ("+ ImageNet weights", "base", ""),
    "locator32": ("+ box from 30 mm below the top", "slabs32", ""),
    "window32": ("+ 11 slabs a sample, 9 epochs: the same cost", "slabs32", "train_slabs=11 epochs=9"),
    "window64": ("+ 22 of 64 slabs a sample", "slabs64", "train_slabs=22 epochs=9"),
    "window96": ("+ 33 of 96 slabs a sample", "slabs96", "train_slabs=33 epochs=9"),
    "locator64": ("locator, all of 64 slabs, 3 epochs", "slabs64", ""),
    "locator96": ("locator, all of 96 slabs, 3 epochs", "slabs96", ""),
}


def call(*command: str, **environment: str) -> None:
    """Run a script of the project; its messages go to stderr. Raises CalledProcessError."""
    subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, check=True)


def train_all(series: int, seeds: int, num_jobs: int) -> None:
    """Phantoms, caches, and every run that is not finished, num_jobs at a time."""
    if not (ROOT / "ablation/dicoms/train.csv").exists():
        call("tests/phantom.py", "--dst=ablation/dicoms", f"--series={series}", "--matrix=128", "--plain")
    configs = sorted({f"configs/ablation/{config}.yaml" for _, config, _ in ROWS.values()})
    caches = [common.load_config(ROOT / config).cache for config in configs]
    call("preprocess.py", "--src", "ablation/dicoms", "--dst", *caches, "--config", *configs)
    threads = str(max(1, common.usable_cores() // num_jobs))

    def train(row: str, seed: int, fold: int) -> None:  # refuses to go on with a run of other settings
        _, config, settings = ROWS[row]
        pairs = [f"seed={seed}", f"fold={fold}", f"outputs=ablation/{row}", *settings.split()]
        options = [f"--config=configs/ablation/{config}.yaml", *(f"--set={pair}" for pair in pairs)]
        call("train.py", "--resume", *options, OMP_NUM_THREADS=threads)

    # seed 0 of the locator needs both folds: each proposes for the series that it did not train on
    runs = [("locator", 0, 1), *itertools.product(ROWS, range(seeds), [0])]
    for is_classifier in (False, True):
        jobs = [run for run in runs if ROWS[run[0]][2].startswith(CLASSIFY) == is_classifier]
        with ThreadPoolExecutor(num_jobs) as pool:
            list(pool.map(train, *zip(*jobs, strict=True)))


def read_oof(row: str) -> list[pd.DataFrame]:
    """Out-of-fold predictions of the finished runs of a row, a table per seed, all in the same order."""
    runs = sorted(ROOT.glob(f"ablation/{row}/*_fold0/metrics.json"))
    tables = [pd.read_csv(path.with_name("oof.csv"), dtype={UID: str, "patient": str}) for path in runs]
    return [table.sort_values(UID, ignore_index=True) for table in tables]


def main() -> None:
    parser = common.make_parser(__doc__)
    for name, default in {"series": 1600, "seeds": 3, "jobs": 2}.items():
        parser.add_argument(f"--{name}", type=common.positive_int, default=default)
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    args = parser.parse_args()
    if not args.table:
        train_all(args.series, args.seeds, args.jobs)
    oof = {row: tables for row in ROWS if (tables := read_oof(row))}
    table, *others = itertools.chain(*oof.values())
    same = [UID, *(f"label {label}" for label in LABELS)]
    assert all(other[same].equals(table[same]) for other in others), "runs on other series in ablation/"
    truth = table[same[1:]].to_numpy(float)
    print(f"{len(truth)} validation series of {table['patient'].nunique()} patients.\n")
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence | less the row above |")
    print("|---|---|---|---|---|---|")
    wauc = draws = math.nan  # of the row above; all rows draw the same patients
    for row, (text, *_) in ROWS.items():
        probs = [table[list(LABELS)].to_numpy() for table in oof.get(row, [])]
        if not probs:
            wauc = draws = math.nan
            continue
        mean = np.mean(probs, axis=0)
        score = common.weighted_auc(truth, mean)
        aucs = common.column_aucs(truth, mean, common.patient_weights(table["patient"], 2000))
        above, above_draws, wauc, draws = wauc, draws, score["wauc"], common.combine_aucs(aucs, truth)
        waucs = [common.weighted_auc(truth, p)["wauc"] for p in probs]
        seeds = f"{len(waucs)} | {np.mean(waucs):.3f} ({min(waucs):.3f} to {max(waucs):.3f})"
        interval = "{:.3f} to {:.3f}".format(*pd.Series(draws).quantile([0.025, 0.975]))
        gain = "{:+.3f} to {:+.3f}".format(*pd.Series(draws - above_draws).quantile([0.025, 0.975]))
        gain = f"{wauc - above:+.3f} ({gain})" if above == above and text.startswith("+") else ""
        print(f"| {text} | {seeds} | {wauc:.3f} ({interval}) | {score['auc'][AP]:.3f} | {gain} |")


if __name__ == "__main__":
    main()
