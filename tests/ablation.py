"""Train the rows of the ablation on phantoms and print their table: do localizer crops help a new patient?

in   configs/ablation/*.yaml; phantoms and cache are made in ablation/ where they are missing
out  stdout: Markdown tables; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
run  python tests/ablation.py --seeds 3 --jobs 2
"""

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
PAIRS = ("b less a", "c less b", "d less a", "d less e", "f less e")


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


def read_results(row: str, seeds: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The table of fold 0 and its out-of-fold probabilities (seeds, N, 14) by finished runs."""
    runs = [f for seed in range(seeds) for f in ROOT.glob(f"ablation/{row}/*_seed{seed}_fold0/metrics.json")]
    tables = [pd.read_csv(path.with_name("oof.csv"), dtype={UID: str, "patient": str}) for path in runs]
    if not tables:
        return pd.DataFrame(), np.zeros((0, 0, 14))
    probs = [table.set_index(UID).loc[tables[0][UID], list(LABELS)].to_numpy() for table in tables]
    return tables[0], np.stack(probs)


def draw_waucs(truth: np.ndarray, probs: np.ndarray, patients: pd.Series) -> tuple[float, np.ndarray]:
    """wAUC of the mean prediction of all seeds, and of 2,000 draws of patients, the same for all rows."""
    aucs = common.bootstrap_aucs(truth, probs.mean(0), patients, 2000)
    return common.weighted_auc(truth, probs.mean(0))["wauc"], common.combine_aucs(aucs, truth)


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--seeds", type=common.positive_int, default=3)
    parser.add_argument("--jobs", type=common.positive_int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    args = parser.parse_args()
    if not args.table:
        train_all(args.seeds, args.jobs)
    results = {row: read_results(row, args.seeds) for row in ROWS if row != "f_combined"}
    tables = [table for table, _ in results.values() if len(table)]
    if not tables:
        return 1
    assert all(table[UID].equals(tables[0][UID]) for table in tables)
    probs = {row: result[1] for row, result in results.items()}
    pairs = list(zip(probs["d_proposals"], probs["e_locator"], strict=False))
    probs["f_combined"] = np.array(pairs).mean(1) if pairs else np.array([])
    truth, patients = tables[0][[f"label {label}" for label in LABELS]].to_numpy(float), tables[0]["patient"]
    print(f"{len(truth)} validation series of {patients.nunique()} patients.\n")
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence |\n|---|---|---|---|---|")
    drawn = {row: draw_waucs(truth, probs[row], patients) for row in ROWS if len(probs[row])}
    for row, (value, draws) in drawn.items():
        waucs = [common.weighted_auc(truth, p)["wauc"] for p in probs[row]]
        low, high = common.percentile_interval(draws)
        presence = common.weighted_auc(truth, probs[row].mean(0))["auc"][AP]
        seeds = f"{len(waucs)} | {np.mean(waucs):.3f} ({min(waucs):.3f} to {max(waucs):.3f})"
        print(f"| {ROWS[row]} | {seeds} | {value:.3f} ({low:.3f} to {high:.3f}) | {presence:.3f} |")
    print("\n| difference in wAUC, mean predictions | 95 % |\n|---|---|")
    for pair in PAIRS:
        first, second = (drawn.get(row) for name in pair.split(" less ") for row in ROWS if row[0] == name)
        if first and second:
            low, high = common.percentile_interval(first[1] - second[1])
            print(f"| {pair}: {first[0] - second[0]:+.3f} | {low:+.3f} to {high:+.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
