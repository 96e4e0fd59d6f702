"""Small things that several test files share: a tiny config, random labels, a cache without DICOM."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import common
from common import LABELS, UID, Config
from dicom import VolumeSettings


def change(cfg: Config, **settings) -> Config:
    """The config with other values of some settings, by their names in YAML."""
    return common.config_from_dict(common.config_to_dict(cfg) | settings)


def expect_refusal(pattern: str, function: Callable, *arguments: object, kind: type = ValueError) -> str:
    """The message of the error that the call raises, of this kind and with this pattern in it."""
    with pytest.raises(kind, match=pattern) as error:
        function(*arguments)
    return str(error.value)


def flip_bit(path: Path, position: int | None = None) -> None:
    """Change the lowest bit of one byte of a file, by default of the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


VOLUME = VolumeSettings(base_slices=8, img_size=32, roi_mm=160.0)
TINY = Config(model_name="test_efficientnet", pretrained=False, drop_path_rate=0.0, volume=VOLUME)


def random_table(num: int, seed: int = 0) -> pd.DataFrame:
    """Labels of num series: 45 % positive with one or two locations, two series for every third patient."""
    rng, labels = np.random.default_rng(seed), np.zeros((num, 14), int)
    for i in np.flatnonzero(rng.random(num) < 0.45):
        labels[i, [*rng.choice(13, size=rng.integers(1, 3), replace=False), 13]] = 1
    table = pd.DataFrame(labels, columns=list(LABELS))
    table.insert(0, UID, [f"1.2.{i}" for i in range(num)])
    table["Modality"] = rng.choice(common.MODALITIES, num)
    table["patient"] = [f"p{i - (i % 3 == 1)}" for i in range(num)]
    return table.assign(plane="axial")


def write_cached_series(folder: Path, uid: str, cfg: Config, points: list, seed: int = 0) -> np.ndarray:
    """A cached volume of noise with the given (label, z, y, x) points; returns the volume."""
    shape = (cfg.volume.base_slices, cfg.volume.img_size, cfg.volume.img_size)
    volume = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    points = np.array(points, np.float32).reshape(-1, 4)
    spacing_mm = [4.0] + 2 * [cfg.volume.roi_mm / cfg.volume.img_size]
    affine = np.eye(4)  # (z, y, x) -> LPS mm
    affine[:3, :3] = np.diag(spacing_mm)[::-1]
    meta = {"uid": uid, "spacing_mm": spacing_mm, "affine": affine.tolist(), "doubts": [], "patient": ""}
    meta["settings"] = common.volume_settings(cfg)
    path = common.volume_path(folder, uid)
    common.save_volume(path, volume, points[:, 1:], points[:, 0], meta, sop_uids=[f"{uid}.1"])
    return volume


def write_cache(folder: Path, table: pd.DataFrame, cfg: Config, with_points: bool = True) -> Config:
    """What preprocess.py leaves for train.py: a volume per series, index.csv and train.csv; its config."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in table.reset_index(drop=True).iterrows():
        points = [(k, 2 + k % 4, 8 + k, 24 - k) for k in range(13) if row[LABELS[k]] and with_points]
        write_cached_series(folder, row[UID], cfg, points, i)
    index = table[[UID, "patient", "plane"]].assign(status="ok", reason="", modality="CT")
    index.to_csv(folder / "index.csv", index=False)
    table.drop(columns=["patient", "plane"]).to_csv(folder / "train.csv", index=False)
    return replace(cfg, cache=str(folder))
