"""Train the rows of the ablation on phantoms and print their table: do localizer crops help a new patient?

in   configs/ablation/*.yaml; phantoms and cache are made in ablation/ where they are missing
out  stdout: Markdown tables; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
run  python tests/ablation.py --seeds 3 --jobs 2
"""

import argparse
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
from common import LABELS, UID

ROOT = Path(__file__).parents[1]
ROWS = {
    "a_slabs": "(a) 32 slabs alone",
    "b_crops": "(b) + localizer crops",
    "c_regularised": "(c) + drop-out and off-switch",
    "d_proposals": "(d) + the locator's proposals as crops",
    "d_scores": "(d+) + the locator's logits",
    "e_locator": "(e) the locator alone",
    "f_combined": "(f) mean of (d+) and (e)",
}
PAIRS = (
    ("b_crops", "a_slabs"),
    ("c_regularised", "b_crops"),
    ("d_proposals", "a_slabs"),
    ("d_scores", "a_slabs"),
    ("d_scores", "e_locator"),
    ("f_combined", "e_locator"),
)


def call(*command: str, threads: int = 0) -> None:
    """Run a script of the project; its messages go to stderr. Raises CalledProcessError."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def train(row: str, seed: int, fold: int, threads: int) -> None:
    """One run, unless it is finished."""
    config = f"configs/ablation/{row}.yaml"
    cfg = common.load_config(ROOT / config, [f"seed={seed}", f"fold={fold}"])
    folder = ROOT / cfg.outputs / cfg.run_name
    if (folder / "metrics.json").exists():
        if common.load_config(folder / "config.yaml") != cfg:
            raise ValueError(f"{folder}: made with other settings than {config} has now; delete it first")
    else:
        settings = ["--set", f"seed={seed}", "--set", f"fold={fold}"]
        call("train.py", "--config", config, *settings, "--resume", threads=threads)


def train_all(seeds: int, num_jobs: int) -> None:
    """Phantoms, cache, and every run that is not finished, num_jobs at a time."""
    if not (ROOT / "ablation/dicoms/train.csv").exists():
        options = ["--matrix", "128", "--modality", "CTA", "--plane", "axial", "--plain"]
        call("tests/phantom.py", "--dst", "ablation/dicoms", "--series", "1600", "--seed", "0", *options)
    folders = ["--src", "ablation/dicoms", "--dst", "ablation/cache"]
    call("preprocess.py", *folders, "--config", "configs/demo.yaml")  # keeps what is there
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    # seed 0 of the locator needs both folds: each proposes for the series that it held out
    locators = [("e_locator", seed, 0) for seed in range(seeds)] + [("e_locator", 0, 1)]
    classifiers = [(row, seed, 0) for row in ROWS if row[0] in "abcd" for seed in range(seeds)]
    for jobs in (locators, classifiers):
        with ThreadPoolExecutor(num_jobs) as pool:
            list(pool.map(lambda job: train(*job, threads), jobs))


def results(row: str, seeds: int) -> tuple[list[dict], pd.DataFrame, np.ndarray]:
    """metrics.json and out-of-fold probabilities (seeds, N, 14) of finished runs of fold 0, their table."""
    folders = [f for seed in range(seeds) for f in (ROOT / "ablation" / row).glob(f"*_seed{seed}_fold0")]
    folders = [folder for folder in folders if (folder / "metrics.json").exists()]
    if not folders:
        print(f"ablation/{row}: no finished run, left out", file=sys.stderr)
        return [], pd.DataFrame(), np.zeros((0, 0, 14))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    tables = [pd.read_csv(folder / "oof.csv", dtype={UID: str, "patient": str}) for folder in folders]
    probs = np.stack([table.set_index(UID).loc[tables[0][UID], list(LABELS)].to_numpy() for table in tables])
    return metrics, tables[0], probs


def mean_metric(metrics: list[dict], name: str, form: str) -> str:
    """Mean over seeds of a value, its low and its high end, where metrics.json has it."""
    found = [m[name] for m in metrics if m.get(name) and None not in m[name]]
    if not found:
        return "–"
    value, low, high = (format(number, form) for number in np.mean(found, axis=0))
    return f"{value} ({low} to {high})"


def line(name: str, truth: np.ndarray, patients: pd.Series, probs: np.ndarray, metrics: list[dict]) -> str:
    """A row of the table: the interval of wAUC is of the mean prediction of all seeds."""
    own = [common.weighted_auc(truth, p)["wauc"] for p in probs]
    spread = common.bootstrap(truth, probs.mean(0), patients)
    together = common.weighted_auc(truth, probs.mean(0))
    cells = [
        name,
        str(len(probs)),
        f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})",
        f"{together['wauc']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})",
        f"{together['auc'][common.AP]:.3f}",
        mean_metric(metrics, "oracle_wauc", ".3f"),
        mean_metric(metrics, "leak", "+.3f"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time; each gets its share of the cores"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, print what is finished")
    args = parser.parse_args()
    if not args.table:
        train_all(args.seeds, args.jobs)
    found = {row: results(row, args.seeds) for row in ROWS if row != "f_combined"}
    probs = {row: found[row][2] for row in found}
    num = min(len(probs["d_scores"]), len(probs["e_locator"]))
    probs["f_combined"] = (probs["d_scores"][:num] + probs["e_locator"][:num]) / 2 if num else np.zeros(0)
    table = next((table for _, table, _ in found.values() if len(table)), None)
    if table is None:
        return 1
    assert all(other[UID].equals(table[UID]) for _, other, _ in found.values() if len(other))
    truth, patients = table[[f"label {label}" for label in LABELS]].to_numpy(float), table["patient"]
    print(f"{len(table)} validation series of {patients.nunique()} patients.\n")
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence | oracle wAUC | leak |")
    print("|---|---|---|---|---|---|---|")
    for row, name in ROWS.items():
        if len(probs[row]):
            print(line(name, truth, patients, probs[row], found[row][0] if row in found else []))
    print("\n| difference in wAUC, mean predictions | 95 % |\n|---|---|")
    for row, base in PAIRS:
        if len(probs[row]) and len(probs[base]):
            value, low, high = common.compare(truth, probs[row].mean(0), probs[base].mean(0), patients)
            names = " less ".join(ROWS[name].split()[0] for name in (row, base))
            print(f"| {names}: {value:+.3f} | {low:+.3f} to {high:+.3f} |")
    print()
    for row in ("d_proposals", "d_scores"):
        gain = mean_metric(found[row][0], "gain_of_proposals", "+.3f")
        print(f"Gain of {ROWS[row].split()[0]} by its proposals, against decoys: {gain}.")
    for title, key in (("recall within 10 mm", "recall_10mm"), ("false per negative", "false_per_negative")):
        print(f"Locator, {title}: {mean_metric(found['e_locator'][0], key, '.2f')}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
