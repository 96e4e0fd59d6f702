"""Train the rows of the ablation on phantoms and print their table: do localizer crops help a new patient?

in   configs/ablation/*.yaml; phantoms and cache are made in ablation/ where they are missing
out  stdout: a Markdown table; ablation/<row>/...: the runs. Finished runs are kept, so it can be run again.
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
    "e_locator": "(e) the locator alone",
}


def call(*command: str, threads: int = 0) -> None:
    """Run a script of the project; its messages go to stderr. Raises CalledProcessError."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def train(row: str, seed: int, fold: int, threads: int) -> None:
    """One run, unless it is finished."""
    config = f"configs/ablation/{row}.yaml"
    cfg = common.load_config(ROOT / config, [f"seed={seed}", f"fold={fold}"])
    if not (ROOT / cfg.outputs / cfg.run_name / "metrics.json").exists():
        call(
            "train.py",
            "--config",
            config,
            "--set",
            f"seed={seed}",
            "--set",
            f"fold={fold}",
            "--resume",
            threads=threads,
        )


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


def line(name: str, table: pd.DataFrame, probs: np.ndarray, metrics: list[dict] | None) -> str:
    """A row of the table. The interval is of the mean prediction of all seeds, by bootstrap over patients."""
    truth = table[[f"label {label}" for label in LABELS]].to_numpy(float)
    own = [common.weighted_auc(truth, p)["wauc"] for p in probs]
    spread = common.bootstrap(truth, probs.mean(0), table["patient"])
    together = common.weighted_auc(truth, probs.mean(0))
    oracle = [m["oracle_wauc"] for m in metrics or [] if m.get("oracle_wauc") is not None]
    cells = [
        name,
        str(len(probs)),
        f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})",
        f"{together['wauc']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})",
        f"{together['auc'][common.AP]:.3f}",
        f"{np.mean(oracle):.3f}" if oracle else "–",
        f"{np.mean(oracle) - np.mean(own):+.3f}" if oracle else "–",
    ]
    return f"| {' | '.join(cells)} |"


def train_all(seeds: int, num_jobs: int) -> None:
    """Phantoms, cache, and every run that is not finished, num_jobs at a time."""
    if not (ROOT / "ablation/dicoms/train.csv").exists():
        options = ["--matrix", "128", "--modality", "CTA", "--plane", "axial", "--plain"]
        call("tests/phantom.py", "--dst", "ablation/dicoms", "--series", "400", "--seed", "0", *options)
    call(
        "preprocess.py",
        "--src",
        "ablation/dicoms",
        "--dst",
        "ablation/cache",
        "--config",
        "configs/demo.yaml",
    )
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    # seed 0 of the locator needs both folds: each proposes for the series that it held out
    locators = [("e_locator", 0, 0), ("e_locator", 0, 1)] + [
        ("e_locator", seed, 0) for seed in range(1, seeds)
    ]
    others = [(row, seed, 0) for row in ROWS if row[0] in "abc" for seed in range(seeds)]
    proposed = [("d_proposals", seed, 0) for seed in range(seeds)]
    for jobs in (locators[:2], others + proposed + locators[2:]):
        with ThreadPoolExecutor(num_jobs) as pool:
            list(pool.map(lambda job: train(*job, threads), jobs))


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
    print("| row | seeds | wAUC, mean (range) | of their mean (95 %) | AUC presence | oracle wAUC | leak |")
    print("|---|---|---|---|---|---|---|")
    found = {row: results(row, args.seeds) for row in ROWS}
    for row, name in ROWS.items():
        metrics, table, probs = found[row]
        if metrics:
            print(line(name, table, probs, metrics))
    (_, table, with_crops), (located_metrics, other, located) = found["d_proposals"], found["e_locator"]
    num = min(len(with_crops), len(located))
    if num:
        assert table[UID].equals(other[UID])
        together = (with_crops[:num] + 10 * located[:num]) / 11
        print(line("(f) mean of (d) and (e), 1 : 10", table, together, None))
    if located_metrics:
        recall = np.mean([m["recall_10mm"][0] for m in located_metrics])
        false = np.mean([m["false_per_negative"][0] for m in located_metrics])
        print(
            f"\nLocator: recall within 10 mm among 3 proposals {recall:.2f}, false ones per negative series "
            f"{false:.2f}; {len(other)} validation series."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
