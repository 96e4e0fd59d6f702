"""Train the rows of the ablation on phantoms and print their table: do localizer crops help a new patient?

in   configs/ablation/*.yaml; phantoms and cache are made in ablation/ where they are missing
out  stdout: Markdown tables; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
run  python tests/ablation.py --seeds 3 --jobs 2
"""

import itertools
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
ROWS = {
    "a_slabs": "(a) 32 slabs alone",
    "b_crops": "(b) + localizer crops",
    "c_regularised": "(c) + drop-out and off-switch",
    "d_proposals": "(d) + the locator's proposals as crops",
    "e_locator": "(e) the locator alone",
    "f_combined": "(f) mean of (d) and (e)",
}
PAIRS = ("ba", "cb", "da", "de", "fe")  # the first less the second


def call(*command: str, **environment: str) -> None:
    """Run a script of the project; its messages go to stderr. Raises CalledProcessError."""
    subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, check=True)


def train_all(seeds: int, num_jobs: int) -> None:
    """Phantoms, cache, and every run that is not finished, num_jobs at a time."""
    if not (ROOT / "ablation/dicoms/train.csv").exists():
        options = ["--matrix", "128", "--modality", "CTA", "--plane", "axial", "--plain"]
        call("tests/phantom.py", "--dst", "ablation/dicoms", "--series", "1600", "--seed", "0", *options)
    folders = ["--src", "ablation/dicoms", "--dst", "ablation/cache"]
    call("preprocess.py", *folders, "--config", "configs/ablation/base.yaml")  # skips finished series
    threads = str(max(1, common.usable_cores() // num_jobs))

    def train(row: str, seed: int, fold: int) -> None:  # refuses to go on with a run of other settings
        settings = ["--set", f"seed={seed}", "--set", f"fold={fold}", "--resume"]
        call("train.py", "--config", f"configs/ablation/{row}.yaml", *settings, OMP_NUM_THREADS=threads)

    # seed 0 of the locator needs both folds: each proposes for the series that it did not train on
    locators = [("e_locator", seed, 0) for seed in range(seeds)] + [("e_locator", 0, 1)]
    classifiers = [(row, seed, 0) for row in ROWS if row[0] in "abcd" for seed in range(seeds)]
    for jobs in (locators, classifiers):
        with ThreadPoolExecutor(num_jobs) as pool:
            list(pool.map(train, *zip(*jobs, strict=True)))


def read_oof(row: str, seeds: int) -> list[pd.DataFrame]:
    """Out-of-fold predictions of the finished runs of a row, a table per seed, all in the same order."""
    runs = [f for seed in range(seeds) for f in ROOT.glob(f"ablation/{row}/*_seed{seed}_fold0/metrics.json")]
    tables = [pd.read_csv(path.with_name("oof.csv"), dtype={UID: str, "patient": str}) for path in runs]
    return [table.sort_values(UID, ignore_index=True) for table in tables]


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--seeds", type=common.positive_int, default=3)
    parser.add_argument("--jobs", type=common.positive_int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    args = parser.parse_args()
    if not args.table:
        train_all(args.seeds, args.jobs)
    oof = {row: read_oof(row, args.seeds) for row in ROWS}
    table, *others = itertools.chain(*oof.values())
    assert all(other[UID].equals(table[UID]) for other in others)
    probs = {row: [table[list(LABELS)].to_numpy() for table in tables] for row, tables in oof.items()}
    for pair in zip(probs["d_proposals"], probs["e_locator"], strict=False):
        probs["f_combined"].append(np.mean(pair, axis=0))
    truth = table[[f"label {label}" for label in LABELS]].to_numpy(float)
    print(f"{len(truth)} validation series of {table['patient'].nunique()} patients.\n")
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence |\n|---|---|---|---|---|")
    means, draws = {}, {}  # by letter; the draws of patients are the same for all rows
    for row in filter(probs.get, ROWS):
        mean = np.mean(probs[row], axis=0)
        score = common.weighted_auc(truth, mean)
        means[row[0]] = score["wauc"]
        aucs = common.bootstrap_aucs(truth, mean, table["patient"], 2000)
        draws[row[0]] = common.combine_aucs(aucs, truth)
        low, high = common.percentile_interval(draws[row[0]])
        waucs = [common.weighted_auc(truth, p)["wauc"] for p in probs[row]]
        seeds = f"{len(waucs)} | {np.mean(waucs):.3f} ({min(waucs):.3f} to {max(waucs):.3f})"
        interval = f"{score['wauc']:.3f} ({low:.3f} to {high:.3f})"
        print(f"| {ROWS[row]} | {seeds} | {interval} | {score['auc'][AP]:.3f} |")
    print("\n| difference in wAUC, mean predictions | 95 % |\n|---|---|")
    for first, second in PAIRS:
        if first in means and second in means:
            low, high = common.percentile_interval(draws[first] - draws[second])
            name = f"{first} less {second}: {means[first] - means[second]:+.3f}"
            print(f"| {name} | {low:+.3f} to {high:+.3f} |")


if __name__ == "__main__":
    main()
