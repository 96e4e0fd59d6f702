"""Train the rows of the ablation on phantoms and print their table: do localizer crops help a new patient?

in   configs/ablation/*.yaml; phantoms and cache are made in ablation/ where they are missing
out  stdout: Markdown tables; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
run  python tests/ablation.py --seeds 3 --jobs 2
"""

import json
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
PAIRS = ("b a", "c b", "d a", "d e", "f e")  # a difference is the first less the second


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


def read_results(row: str, seeds: int) -> tuple[list[dict], pd.DataFrame, np.ndarray]:
    """metrics.json and out-of-fold probabilities (seeds, N, 14) of finished runs of fold 0, their table."""
    folders = [f for seed in range(seeds) for f in (ROOT / "ablation" / row).glob(f"*_seed{seed}_fold0")]
    folders = [folder for folder in folders if (folder / "metrics.json").exists()]
    if not folders:
        return [], pd.DataFrame(), np.zeros((0, 0, 14))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    tables = [pd.read_csv(folder / "oof.csv", dtype={UID: str, "patient": str}) for folder in folders]
    probs = np.stack([table.set_index(UID).loc[tables[0][UID], list(LABELS)].to_numpy() for table in tables])
    return metrics, tables[0], probs


def mean_metric(metrics: list[dict], name: str, form: str) -> str:
    """Mean over seeds of a value, its low and its high end, where metrics.json has it."""
    triples = [m[name] for m in metrics if m.get(name) and None not in m[name]]
    if not triples:
        return "–"
    value, low, high = (format(number, form) for number in np.mean(triples, axis=0))
    return f"{value} ({low} to {high})"


def format_row(row: str, truth: np.ndarray, patients: pd.Series, probs: np.ndarray, metrics: list) -> str:
    """A row of the table: the interval of wAUC is of the mean prediction of all seeds."""
    waucs = [common.weighted_auc(truth, p)["wauc"] for p in probs]
    together, aucs = probs.mean(0), common.bootstrap_aucs(truth, probs.mean(0), patients, 2000)
    low, high = common.percentile_interval(common.bootstrap_waucs(aucs, truth))
    score = common.weighted_auc(truth, together)
    cells = [
        f"{np.mean(waucs):.3f} ({min(waucs):.3f} to {max(waucs):.3f})",
        f"{score['wauc']:.3f} ({low:.3f} to {high:.3f}) | {score['auc'][AP]:.3f}",
        f"{mean_metric(metrics, 'oracle_wauc', '.3f')} | {mean_metric(metrics, 'leak', '+.3f')}",
    ]
    return f"| {ROWS[row]} | {len(probs)} | {' | '.join(cells)} |"


def main() -> int:
    parser = common.make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each gets its share of cores")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    args = parser.parse_args()
    if not args.table:
        train_all(args.seeds, args.jobs)
    results = {row: read_results(row, args.seeds) for row in ROWS if row != "f_combined"}
    tables = [table for _, table, _ in results.values() if len(table)]
    if not tables:
        return 1
    assert all(table[UID].equals(tables[0][UID]) for table in tables)
    metrics, probs = {row: results[row][0] for row in results}, {row: results[row][2] for row in results}
    pairs = list(zip(probs["d_proposals"], probs["e_locator"], strict=False))
    probs["f_combined"] = np.array(pairs).mean(1) if pairs else np.array([])
    truth, patients = tables[0][[f"label {label}" for label in LABELS]].to_numpy(float), tables[0]["patient"]
    print(f"{len(truth)} validation series of {patients.nunique()} patients.\n")
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence | oracle wAUC | leak |")
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        if len(probs[row]):
            print(format_row(row, truth, patients, probs[row], metrics.get(row, [])))
    print("\n| difference in wAUC, mean predictions | 95 % |\n|---|---|")
    for pair in PAIRS:
        first, second = (probs[row] for letter in pair.split() for row in ROWS if row[0] == letter)
        if len(first) and len(second):
            values = common.compare_waucs(truth, first.mean(0), second.mean(0), patients)
            value, low, high = (f"{number:+.3f}" for number in values)
            print(f"| {pair.replace(' ', ' less ')}: {value} | {low} to {high} |")
    print(f"\nLocator, recall within 10 mm: {mean_metric(metrics['e_locator'], 'recall_10mm', '.2f')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
