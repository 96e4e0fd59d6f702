"""Write a Kaggle-shaped set of DICOM files: heads with arteries, some with aneurysms, and their labels.

in   anatomy.yaml beside this file: the average head; every other number is drawn from --seed
     --backgrounds DIR    any tree of CT and MR series of heads without aneurysms, to draw the arteries into
out  --dst DIR    series/<SeriesInstanceUID>/<SOPInstanceUID>.dcm, train.csv, train_localizers.csv
run  python tests/phantom.py --dst dicoms --series 160 --seed 0
     python tests/phantom.py --dst dicoms --series 160 --backgrounds normal_scans

A head is a set of shells, ellipsoids and tubes in millimetres, painted onto the grid that a scanner would
have acquired, or onto a real scan: the outline of its skin says where the arteries lie, and they take on its
resolution and noise. CT becomes CTA; MR becomes MRA, MRI T2 or MRI T1post. Real scans are mirrored at random,
resized by up to 7 % and written with new UIDs and a new PatientID, but a face stays a face, and a scan comes
back under many patients: test on other scans. A series that shows no head down to the skull base is named on
stderr and left out.

Patients, anatomy, acquisition, noise and aneurysms have generators of their own, so that only an aneurysm's
voxels tell its label: --no-aneurysms-drawn writes the same set without those voxels.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import yaml
from numpy import ndarray
from numpy.linalg import inv, norm
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import compress
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.interpolate import Akima1DInterpolator
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import LABELS, LOCATIONS, MODALITIES
from dicom import Series, VolumeSettings, canonical_grid, find_series, make_volume, read_series, to_lps

PREVALENCE = 0.45  # of patients; the challenge's training set has 0.43
SHARE_TWO_SERIES = 0.15  # patients who were scanned twice, each time with the same head
SHARE_TWO_ANEURYSMS = 0.2  # of the positive patients
DIAMETER_MM = (2.0, 12.0)

TABLE = ["SeriesInstanceUID", "PatientAge", "PatientSex", "Modality", *LABELS]  # columns of train.csv
POINTS = ["SeriesInstanceUID", "SOPInstanceUID", "coordinates", "location"]  # and of train_localizers.csv
FORMS = {  # transfer syntax, and how often of 20 series
    "explicit": (ExplicitVRLittleEndian, 5),
    "implicit": (ImplicitVRLittleEndian, 3),
    "big endian": (ExplicitVRBigEndian, 1),
    "deflated": (DeflatedExplicitVRLittleEndian, 1),
    "RLE": (RLELossless, 2),
    "JPEG 2000": (JPEG2000Lossless, 2),
    "JPEG-LS": (JPEGLSLossless, 1),
    "monochrome1": (ExplicitVRLittleEndian, 1),
    "enhanced": (ExplicitVRLittleEndian, 3),
    "enhanced JPEG 2000": (JPEG2000Lossless, 1),
}
ENCODERS = {JPEG2000Lossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", RLELossless: "pydicom"}

ANATOMY = yaml.safe_load(Path(__file__).with_name("anatomy.yaml").read_text())
INFUNDIBULA = ["pcom", "choroidal", "ophthalmic", "sca", "pica", "m2_temporal", "aica"]  # may begin as cones
TWIG_PARENTS = ["m1", "m2_superior", "m2_inferior", "a2", "pericallosal", "callosomarginal", "pca", "sca"]
Vessels = dict[tuple[str, int], "Tube"]  # by name and side: +1 left, -1 right, 0 midline
Box = tuple[slice, slice, slice]


def generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """A generator for each patient or series and purpose, so that one more draw moves nothing elsewhere."""
    return np.random.default_rng([seed, number, zlib.crc32(purpose.encode())])


def uid(*parts: object) -> str:
    """A UID of 64 characters that depends on `parts` alone."""
    return generate_uid(entropy_srcs=["/".join(map(str, ("phantom", *parts)))])  # else 1, 12 would be 11, 2


# --- who is in the set: patients, series, aneurysms ---------------------------------------------------------


@dataclass(frozen=True)
class Aneurysm:
    """A dome on an artery: its label, its place on the vessel, its size and direction in the head's frame."""

    location: str
    vessel: str
    side: int
    place: float  # along the vessel, in units of its template points
    direction: tuple[float, float, float]
    diameter_mm: float
    aspect: float  # length along the direction over width


@dataclass(frozen=True)
class Background:
    """A real series of a head, and how the head lies in it."""

    uid: str
    files: list[Path]
    modality: str  # CT or MR
    plane: str
    pose: ndarray  # (4, 4), the head's frame to LPS mm
    scale: ndarray  # (3,) of this head, relative to the average one


@dataclass(frozen=True)
class Job:
    """One series of the set, as far as it is known before its voxels are drawn."""

    seed: int
    number: int
    patient: int
    modality: str
    plane: str
    form: str  # how the pixels are stored, one of FORMS
    matrix: int
    aneurysms: tuple[Aneurysm, ...]
    draw_aneurysms: bool
    background: Background | None = None

    def generator(self, purpose: str) -> np.random.Generator:
        """Random numbers of this series for one purpose."""
        return generator(self.seed, self.number, purpose)


def deal(seed: int, purpose: str, cards: list, count: int) -> list:
    """`count` cards from shuffled decks in turn: every card comes up soon, and a longer set starts alike."""
    rng = generator(seed, 0, purpose)
    dealt = []
    while len(dealt) < count:
        dealt += [cards[i] for i in rng.permutation(len(cards))]
    return dealt[:count]


def plan(
    series: int, seed: int, matrix: int, modality: str, plane: str, plain: bool = False, draw: bool = True
) -> list[Job]:
    """Patients with one or two series each, their aneurysms, and how each series is acquired and stored."""
    modalities = ["CTA"] * 4 + ["MRA"] * 3 + ["MRI T2"] * 2 + ["MRI T1post"]
    planes = ["axial"] * 6 + ["coronal", "sagittal"] * 2
    forms = [form for form, (_, share) in FORMS.items() for _ in range(share)]
    modalities = deal(seed, "modality", modalities if modality == "all" else [modality], series)
    planes = deal(seed, "plane", planes if plane == "mixed" else [plane], series)
    forms = deal(seed, "form", ["explicit"] if plain else forms, series)
    visits = [1 + (generator(seed, p, "visits").random() < SHARE_TWO_SERIES) for p in range(series)]
    patients = np.repeat(np.arange(series), visits).tolist()
    locations = iter(deal(seed, "location", list(LOCATIONS), 2 * series))
    phase = generator(seed, 0, "prevalence").random()
    aneurysms = []
    for patient in range(series):
        rng = generator(seed, patient, "aneurysms")
        is_positive = (phase + 0.6180339887 * patient) % 1 < PREVALENCE  # golden ratio: even over any range
        count = is_positive * (2 if rng.random() < SHARE_TWO_ANEURYSMS else 1)
        aneurysms.append(tuple(draw_aneurysm(next(locations), rng) for _ in range(count)))
    return [
        Job(seed, n, patients[n], modalities[n], planes[n], forms[n], matrix, aneurysms[patients[n]], draw)
        for n in range(series)
    ]


def place_on(backgrounds: list[Background], jobs: list[Job], modality: str, plane: str) -> list[Job]:
    """The jobs on real series, a head for each patient: CT becomes CTA, MR one of the others."""
    real_modality = {"all": ("CT", "MR"), "CTA": ("CT",)}.get(modality, ("MR",))
    fitting = [b for b in backgrounds if b.modality in real_modality and plane in (b.plane, "mixed")]
    if not fitting:
        raise ValueError(
            f"no {plane} {' or '.join(real_modality)} head among {len(backgrounds)} series; expected one "
            f"for --modality {modality} --plane {plane}. Use --modality all --plane mixed, or add scans."
        )
    names = ["MRA"] * 3 + ["MRI T2"] * 2 + ["MRI T1post"] * 2 if modality == "all" else [modality]
    names = deal(jobs[0].seed, "real modality", names, len(jobs))
    heads = deal(jobs[0].seed, "real head", fitting, len(jobs))
    placed = []
    for job in jobs:
        real = heads[job.patient]
        name = "CTA" if real.modality == "CT" else names[job.number]
        placed.append(replace(job, modality=name, plane=real.plane, background=real))
    return placed


def draw_aneurysm(location: str, rng: np.random.Generator) -> Aneurysm:
    """An aneurysm of 2-12 mm, median 6, somewhere on the arteries that the location's name covers."""
    side = 1 if location.startswith("Left ") else -1 if location.startswith("Right ") else 0
    sites = ANATOMY["sites"][location.removeprefix("Left ").removeprefix("Right ")]
    vessel, first, last, direction = sites[rng.integers(len(sites))]
    if side == 0 and ANATOMY["arteries"][vessel]["paired"]:
        side = int(rng.choice([-1, 1]))
    direction = direction / norm(direction) + rng.normal(0, 0.35, 3)
    direction = tuple((direction / norm(direction) * [side or 1, 1, 1]).tolist())
    diameter_mm = float(np.clip(6 * np.exp(rng.normal(0, 0.38)), *DIAMETER_MM))
    place, aspect = rng.uniform(first, last), rng.uniform(0.9, 1.6)
    return Aneurysm(location, vessel, side, place, direction, diameter_mm, aspect)


# --- the patient: a head and its vessels in the head's frame ------------------------------------------------


@dataclass
class Tube:
    """A vessel: points (n, 3) mm, radii (n,) mm, and steps (n,), their places in units of template points."""

    points: ndarray
    radii: ndarray
    steps: ndarray

    def locate(self, place: float) -> tuple[ndarray, float]:
        """Centre (3,) and radius at a place counted in template points."""
        centre = np.array([np.interp(place, self.steps, column) for column in self.points.T])
        return centre, float(np.interp(place, self.steps, self.radii))


@dataclass
class Sac:
    """An aneurysm's body, neck and lobes, as short tubes; its centre (3,) and half of its width in mm."""

    tubes: list[Tube]
    centre: ndarray
    half_mm: float


@dataclass
class Head:
    """One patient: scale of the skull, vessels, calcified plaques, sacs in the order of the aneurysms, and
    parts: tissue, centre (3,), half-axes (3,), degrees turned about z."""

    scale: ndarray
    arteries: list[Tube]
    veins: list[Tube]
    plaques: list[Tube]
    sacs: list[Sac]
    parts: list[tuple[str, ndarray, ndarray, float]]


def curve(points: ndarray, step_mm: float = 2.5) -> tuple[ndarray, ndarray]:
    """Smooth curve through (n, 3) points: samples (m, 3) about `step_mm` apart and their places (m,)."""
    counts = np.ceil(norm(np.diff(points, axis=0), axis=1) / step_mm).astype(int)
    places = [i + np.arange(count) / count for i, count in enumerate(counts)]
    places = np.append(np.concatenate(places), len(counts))
    return Akima1DInterpolator(np.arange(len(points)), points)(places), places


class Anatomy:
    """How one patient differs from the average head: bends of the whole tree, tortuosity, calibre."""

    def __init__(self, rng: np.random.Generator, scale: ndarray) -> None:
        self.rng, self.scale = rng, scale
        self.rate, self.phase = rng.normal(0, 1 / 25, (5, 3)), rng.uniform(0, 2 * np.pi, 5)
        self.height_mm = rng.normal(0, [0.7, 1.6, 1.6], (5, 3))
        self.tortuosity, self.calibre = np.exp(rng.normal(0, [0.5, 0.12]))
        self.moved: dict[tuple[float, ...], ndarray] = {}

    def move(self, point: ndarray) -> ndarray:
        """A template point in this patient, always the same, so that branches stay on their parents."""
        key = tuple(point.tolist())
        if key not in self.moved:
            bend = np.sin(self.rate @ point + self.phase) @ self.height_mm
            self.moved[key] = point * self.scale + bend + self.rng.normal(0, 0.9, 3)
        return self.moved[key]

    def grow(self, template: ndarray, radii: list[float]) -> Tube:
        """A vessel through template points (n, 3): it winds between them, its radius wobbles, and it may have
        a loop or an ectasia that could pass for an aneurysm."""
        rng, last = self.rng, len(template) - 1
        points, steps = curve(np.array([self.move(point) for point in template]))
        lengths_mm = norm(np.diff(template, axis=0), axis=1)
        bends_mm = self.tortuosity * np.minimum(0.09 * lengths_mm, 1.8)
        bends_mm *= rng.choice([1, 3], last, p=[0.95, 0.05])
        bends = rng.normal(0, 1, (last, 3)) * bends_mm[:, None]
        points = points + bends[np.minimum(steps.astype(int), last - 1)] * np.sin(np.pi * steps)[:, None] ** 2
        widths = 1 + np.interp(steps, np.arange(last + 1), rng.normal(0, 0.11, last + 1))
        ectasia = np.exp(-4 * (steps - rng.uniform(0, last)) ** 2)
        widths += ectasia * rng.uniform(0.2, 0.6) * (rng.random() < 0.08)
        return Tube(points, np.interp(steps, [0, last], radii) * widths * self.calibre, steps)

    def grow_all(self, templates: dict[str, dict]) -> Vessels:
        """Every vessel of a table, on both sides where it is paired."""
        vessels = {}
        for name, template in templates.items():
            for side in (1, -1) if template["paired"] else (0,):
                points = template["points"] * np.array([side or 1, 1, 1])
                vessels[name, side] = self.grow(points, template["radii"])
        return vessels


def make_head(job: Job) -> Head:
    """A job's patient; on a real series, as large as the real head. Aneurysms take no part in its draws."""
    rng = generator(job.seed, job.patient, "anatomy")
    scale = np.clip(rng.normal(1, 0.045, 3), 0.9, 1.1)
    scale = job.background.scale if job.background else scale
    anatomy = Anatomy(rng, scale)
    arteries, veins = anatomy.grow_all(ANATOMY["arteries"]), anatomy.grow_all(ANATOMY["veins"])
    vary_arteries(arteries, rng)
    for vein in veins.values():
        vein.radii *= rng.uniform(0.4, 1.2)
    sacs = []
    for number, aneurysm in enumerate(job.aneurysms):
        artery = arteries[aneurysm.vessel, aneurysm.side]
        sacs.append(make_sac(aneurysm, artery, generator(job.seed, job.patient, f"sac {number}")))
    twigs = [grow_twig(arteries, rng) for _ in range(rng.integers(15, 60))]
    plaques = [grow_plaque(arteries, rng) for _ in range(rng.poisson(3) * rng.integers(2))]
    parts = place_parts(scale, rng)
    return Head(scale, [*arteries.values(), *twigs], list(veins.values()), plaques, sacs, parts)


def vary_arteries(arteries: Vessels, rng: np.random.Generator) -> None:
    """Missing and thin arteries, fetal PCA, infundibula (cones where a branch leaves); changes the tubes."""
    for side in (1, -1):
        for name in INFUNDIBULA:
            tube, (width, length) = arteries[name, side], rng.uniform([1.0, 2.0], [1.7, 4.0])
            distance_mm = norm(tube.points - tube.points[0], axis=1)
            if rng.random() < 0.3:
                tube.radii = np.maximum(tube.radii, width * (1 - distance_mm / (2 * length)))
        if rng.random() < 0.15:  # fetal: the carotid feeds the posterior cerebral artery
            arteries["pcom", side].radii *= 1.5
            arteries["pca", side].radii[arteries["pca", side].steps < 2] *= rng.uniform(0.3, 0.7)
        for name in ("a1", "vertebral", "pcom"):
            arteries[name, side].radii *= rng.uniform(0.45, 0.8) if rng.random() < 0.2 else 1
        for name, chance in (("a1", 0.05), ("pcom", 0.25), ("ophthalmic", 0.3), ("choroidal", 0.3)):
            if rng.random() < chance:
                del arteries[name, side]


def grow_twig(arteries: Vessels, rng: np.random.Generator) -> Tube:
    """A side branch of 10 to 40 mm that wanders off an artery and tapers to nothing."""
    parent = arteries[str(rng.choice(TWIG_PARENTS)), int(rng.choice([1, -1]))]
    start, radius = parent.locate(rng.uniform(0.5, parent.steps[-1]))
    heading, points = rng.normal(0, 1, 3), [start]
    for _ in range(rng.integers(2, 6)):
        heading = heading / norm(heading) + rng.normal(0, 0.45, 3)
        points.append(points[-1] + heading * rng.uniform(4, 7))
    samples, steps = curve(np.array(points), step_mm=3.0)
    radii = min(0.7 * radius, rng.uniform(0.3, 0.7)) * np.linspace(1, 0.3, len(samples))
    return Tube(samples, radii, steps)


def grow_plaque(arteries: Vessels, rng: np.random.Generator) -> Tube:
    """A streak of calcium in the wall of a carotid siphon or a vertebral artery."""
    name, first, last = [("ica", 4, 11), ("ica", 6, 9), ("vertebral", 4, 6)][rng.integers(3)]
    tube, place = arteries[name, int(rng.choice([1, -1]))], rng.uniform(first, last)
    (start, radius), (end, _) = tube.locate(place), tube.locate(place + rng.uniform(0.1, 0.7))
    offset = rng.normal(0, 1, 3)
    offset *= radius / norm(offset)
    return Tube(np.array([start, end]) + offset, rng.uniform(0.4, 1.1, 2), np.arange(2))


def make_sac(aneurysm: Aneurysm, artery: Tube, rng: np.random.Generator) -> Sac:
    """A bent body on a neck, with up to three lobes; the aneurysm's diameter is that of the body."""
    on_vessel, radius = artery.locate(aneurysm.place)
    direction, half = np.array(aneurysm.direction), aneurysm.diameter_mm / 2
    centre = on_vessel + direction * (0.8 * radius + 0.7 * half * aneurysm.aspect)
    along, bend = direction * half * (0.45 * aneurysm.aspect - 0.15), rng.normal(0, 0.15 * half, 3)
    body, widths = [centre - along + bend, centre, centre + along + bend], rng.uniform(0.55, 1, 3)
    widths[1] = 1
    shapes = [(body, half * widths), ([on_vessel, centre], half * rng.uniform(0.35, 0.8, 2))]
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        outward = direction + rng.normal(0, 0.8, 3)
        tip = centre + outward / norm(outward) * half * rng.uniform(0.7, 1.05)
        shapes.append(([centre, tip], half * rng.uniform(0.3, 0.6, 2)))
    tubes = [Tube(np.array(points), radii, np.arange(len(radii))) for points, radii in shapes]
    return Sac(tubes, centre, half)


def place_parts(scale: ndarray, rng: np.random.Generator) -> list[tuple[str, ndarray, ndarray, float]]:
    """The parts of the average head in this patient, on both sides."""
    parts = []
    for tissue, sides, chance, centre, half_axes, turn in ANATOMY["parts"]:
        is_present, half_axes = rng.random() < chance, half_axes * scale * rng.normal(1, 0.15, 3)
        for side in (1, -1)[:sides]:
            moved = centre * scale * [side, 1, 1] + rng.normal(0, 1.2, 3)
            if is_present:
                parts.append((tissue, moved, half_axes, side * turn))
    return parts


# --- a real head --------------------------------------------------------------------------------------------


def find_backgrounds(root: Path) -> list[Background]:
    """Every series below `root` that shows a head down to the skull base; stderr names each other one."""
    backgrounds, series_files = [], find_series(root)[0]
    for series_uid, files in sorted(series_files.items()):
        try:
            backgrounds.append(fit_head(read_series(files, series_uid), files))
        except ValueError as error:
            print(f"{files[0].parent}: left out: {error}", file=sys.stderr)
    if not backgrounds:
        raise ValueError(f"{root}: no head among {len(series_files)} series; expected CT or MR heads")
    return backgrounds


def fit_head(series: Series, files: list[Path]) -> Background:
    """Where the vertex and the middle of a real head lie, and its size, from the outline of its skin.

    The scan may begin below the vertex: an ellipsoid of the average head's proportions says how far, by how
    fast the outline grows from the top. ValueError if this is not a head, or ends above the skull base.
    """
    settings = VolumeSettings(40, 64, 256.0, 160.0, (-250.0, 150.0), (1.0, 99.0))
    volume, grid = make_volume(series, settings), canonical_grid(series)
    step_mm, scanned_mm = np.array(volume.spacing_mm), [np.ptp(grid.extent_mm(axis)) for axis in range(3)]
    # (Z, 2, 2) from the top downwards: low and high edge, by y and x
    bounds = np.array([outline(slab) for slab in volume.voxels[::-1]])
    sizes_mm = np.diff(bounds, axis=1)[:, 0] * step_mm[1:]
    depths_mm = (np.arange(len(bounds)) + 0.5) * step_mm[0]
    upper = (depths_mm < 90) & (sizes_mm.min(1) > 0)
    extent = " x ".join(f"{mm:.0f}" for mm in scanned_mm)
    if upper.sum() < 8 or min(scanned_mm[1:]) < 20 or max(scanned_mm[1:]) < 150:
        raise ValueError(f"{extent} mm (z, y, x) without the outline of a head; expected 80 x 150 x 20 mm")
    length_mm, width_mm = np.percentile(sizes_mm[upper], 90, axis=0)
    if scanned_mm[2] < 150:  # a slab of sagittal slices
        width_mm = length_mm * 150 / 190
    if scanned_mm[1] < 150:  # of coronal ones
        length_mm = width_mm * 190 / 150
    if not (150 < length_mm < 235 and 1.03 * width_mm < length_mm < 1.6 * width_mm):
        raise ValueError(f"an outline of {length_mm:.0f} x {width_mm:.0f} mm; expected a head, 190 x 150 mm")
    scale = np.clip([width_mm / 150, length_mm / 190, (width_mm / 150 + length_mm / 190) / 2], 0.85, 1.15)
    largest = int(scanned_mm[2] > scanned_mm[1])
    above_mm = fit_vertex(depths_mm[upper], sizes_mm[upper, largest], 80 * scale[2])
    reach_mm = above_mm + len(bounds) * step_mm[0]
    if reach_mm < 112 * scale[2]:
        raise ValueError(f"it ends {reach_mm:.0f} mm below the vertex; expected {112 * scale[2]:.0f} mm")
    middle = np.median(bounds[upper].mean(1), axis=0) - 0.5
    vertex = to_lps([len(bounds) - 0.5 + above_mm / step_mm[0], *middle], volume.affine)[0]
    pose = make_pose((volume.affine[:3, :3] / step_mm)[:, ::-1], vertex)
    return Background(series.uid, files, series.modality, series.plane, pose, scale)


def outline(image: ndarray) -> ndarray:
    """First and last edge of the largest bright part of an image: (2, 2), low and high by row, column."""
    mask = cv2.morphologyEx((image > 40).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    if count < 2:
        return np.zeros((2, 2))
    x, y, width, height, _ = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
    return np.array([[y, x], [y + height, x + width]])


def fit_vertex(depths_mm: ndarray, sizes_mm: ndarray, semi_axis_mm: float) -> float:
    """How far the vertex lies above the scan: the shift of an ellipse that best explains sizes by depth."""
    errors = {}
    for above_mm in range(0, 70, 2):
        height = np.minimum((depths_mm + above_mm) / semi_axis_mm - 1, 0)
        profile = np.sqrt(np.maximum(1 - height**2, 1e-3))
        errors[above_mm] = norm(sizes_mm - profile * (sizes_mm @ profile) / (profile @ profile))
    return float(min(errors, key=errors.get))


# --- the scan: where the voxels lie -------------------------------------------------------------------------


@dataclass
class Scan:
    """Geometry and contrast of one acquisition, in LPS mm."""

    corners: ndarray  # (n, 3) centre of each slice's first pixel
    down: ndarray  # (3,) from row to row
    across: ndarray  # (3,) from column to column
    shape: tuple[int, int]  # rows, columns
    thickness_mm: float
    pose: ndarray  # (4, 4), the head's frame to LPS
    grey: dict[str, float]

    def __post_init__(self) -> None:
        """The unit vector across the slices; slice (the median gap), row and column spacing (3,)."""
        self.normal = np.cross(self.across, self.down) / norm(np.cross(self.across, self.down))
        gap_mm = np.median(np.abs(np.diff(self.corners @ self.normal)))
        self.spacing_mm = np.array([gap_mm, norm(self.down), norm(self.across)])

    def to_pixel(self, point: ndarray) -> tuple[int, float, float] | None:
        """Slice (the nearest), row and column of an LPS point (3,); None outside of the images."""
        distances_mm = np.abs((self.corners - point) @ self.normal)
        k = int(distances_mm.argmin())
        row, col = np.linalg.pinv(np.stack([self.down, self.across], 1)) @ (point - self.corners[k])
        is_inside = 0 <= row <= self.shape[0] - 1 and 0 <= col <= self.shape[1] - 1
        return (k, float(row), float(col)) if is_inside and distances_mm[k] <= self.spacing_mm[0] else None


def rotation(degrees: ndarray) -> ndarray:
    """Rotation (3, 3) about x, then y, then z."""
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def make_pose(turn: ndarray, origin: ndarray) -> ndarray:
    """Affine (4, 4) of a rotation (3, 3) and the place of the origin (3,)."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, origin
    return pose


def make_scan(job: Job) -> Scan:
    """Field of view, spacing, coverage and obliqueness as scanners of that modality have them."""
    if job.background:
        return make_real_scan(job)
    rng, is_ct, is_axial = job.generator("scan"), job.modality == "CTA", job.plane == "axial"
    table_mm = rng.uniform(-60, 60, 3) + np.array([0, 0, rng.choice([0, 900, -1400])])
    pose = make_pose(rotation(np.clip(rng.normal(0, [8, 4, 4]), -16, 16)), table_mm)
    pixel_mm = rng.uniform(212, 245) / job.matrix
    # along the normal: a small matrix gets wider spacing, but thick slices stay as they are
    low, high = {"CTA": (0.6, 1.25), "MRA": (0.5, 1.0), "MRI T2": (3, 5), "MRI T1post": (1, 3)}[job.modality]
    low, high = (low, high) if rng.random() < 0.8 else (1.5, 5)
    spacing_mm = rng.uniform(low, high) * (max(1, pixel_mm / 0.75) if high < 2 else 1)
    thickness_mm = spacing_mm * rng.choice([0.8, 0.9, 1.0, 1.3])
    heights_mm = np.arange(*draw_coverage(job, rng), spacing_mm)
    # a tilted gantry leans the slices, while the table still moves along z; elsewhere the slices turn
    is_upright = is_ct and is_axial
    turn = rotation(np.clip(rng.normal(0, 5, 3), -9, 9) * (not is_upright))
    tilt = rotation([rng.choice([0, 10, -12], p=[0.9, 0.05, 0.05]) * is_upright, 0, 0])
    row = turn @ ((0, 1, 0) if job.plane == "sagittal" else (1, 0, 0))
    col = turn @ ((0, 1, 0) if is_axial else (0, 0, -1))
    step = np.cross(row, col) * (1 if is_axial else rng.choice([1, -1]))
    down, across = tilt @ col * pixel_mm, row * pixel_mm
    centre = pose[:3, 3] + rng.uniform(-4, 4, 3) - pose[:3, 2] * (0 if is_axial else 95)
    corner = centre - (down + across) * (job.matrix - 1) / 2
    corners = corner + heights_mm[:, None] * step
    return Scan(corners, down, across, (job.matrix, job.matrix), thickness_mm, pose, draw_greys(job, rng))


def draw_coverage(job: Job, rng: np.random.Generator) -> tuple[float, float]:
    """First and last millimetre that is scanned along the normal, from the vertex or from the middle."""
    is_part, has_neck, neck_mm = rng.random() < 0.2, rng.random() < 0.3, rng.uniform(-270, -215)
    bottom_mm, top_mm = rng.uniform(-178, -150), rng.uniform(6, 14)
    if job.plane == "coronal":
        return -104, 104
    if job.plane == "sagittal":
        return (-48, 48) if is_part else (-84, 84)
    if job.modality == "MRA" and has_neck:  # time of flight of the arteries alone
        return rng.uniform(-160, -140), rng.uniform(-60, -30)
    return (neck_mm if job.modality == "CTA" and has_neck else bottom_mm), (-25 if is_part else top_mm)


def draw_greys(job: Job, rng: np.random.Generator) -> dict[str, float]:
    """Grey by tissue: HU for CT; MR leans towards another weighting, and no two series are alike."""
    grey = dict(ANATOMY["greys"][job.modality.removeprefix("MRI ")])
    brightness = rng.uniform(0, 1)
    if job.modality == "CTA":
        grey["bone"], grey["calcium"] = rng.uniform(700, 1300), rng.uniform(90, 900)
        grey["artery"] = 180 + 340 * brightness
        grey["vein"], grey["dura"] = grey["artery"] * rng.uniform(0.25, 0.95), rng.uniform(50, 110)
        return grey
    other = ANATOMY["greys"][str(rng.choice(["MRA", "T1", "T2", "T1post"]))]
    lean = rng.uniform(0, 0.6) * rng.integers(2)
    for tissue in grey:
        blend = 0 if tissue in ("artery", "vein") else lean
        grey[tissue] = ((1 - blend) * grey[tissue] + blend * other[tissue]) * np.exp(rng.normal(0, 0.15))
    brain = (grey["grey"] + grey["white"]) / 2
    if job.modality == "MRI T2":
        grey["artery"] = brain * (0.05 + 0.25 * brightness)
    else:
        grey["artery"] = max(grey["artery"], brain * (1.5 + 1.5 * brightness))
    return {tissue: float(value) for tissue, value in grey.items()}


def make_real_scan(job: Job) -> Scan:
    """A real series' geometry, mirrored in half of the series and resized about the vertex, with at most
    about `matrix` columns. The tree lies a little elsewhere each time."""
    rng, (series, factor) = job.generator("real scan"), open_background(job)
    first, pose = series.frames[0], job.background.pose
    vertex = pose[:3, 3]
    mirror = np.diag([rng.choice([1.0, -1.0]), 1, 1])
    change = mirror * rng.uniform(0.93, 1.07)
    down, across = first.col_dir * first.spacing_mm[0], first.row_dir * first.spacing_mm[1]
    corners = np.array([frame.position for frame in series.frames]) + (factor - 1) / 2 * (down + across)
    corners = (corners - vertex) @ change + vertex
    turn = mirror @ pose[:3, :3] @ mirror @ rotation(rng.normal(0, 2.5, 3))
    pose = make_pose(turn, vertex + turn @ rng.normal([0, 0, -8], [1.5, 3, 4]))
    thickness_mm = first.header.get("SliceThickness") or series.spacing_mm[0]
    size = (first.rows // factor, first.cols // factor)
    down, across = down @ change * factor, across @ change * factor
    return Scan(corners, down, across, size, thickness_mm, pose, draw_greys(job, rng))


def open_background(job: Job) -> tuple[Series, int]:
    """A job's real series, and by how much its images shrink to have about `matrix` columns at most."""
    series = read_series(job.background.files, job.background.uid)
    return series, max(1, round(series.frames[0].cols / job.matrix))


# --- painting -----------------------------------------------------------------------------------------------


class Canvas:
    """A volume of values on one grid in the head's frame, painted with soft edges one voxel wide."""

    def __init__(self, scan: Scan, shift_mm: float, thickness_mm: float) -> None:
        self.values = np.zeros((len(scan.corners), *scan.shape), np.float32)
        to_head = inv(scan.pose)
        turn = to_head[:3, :3]
        self.corners = (scan.corners + shift_mm * scan.normal) @ turn.T + to_head[:3, 3]
        self.down, self.across, self.normal = turn @ scan.down, turn @ scan.across, turn @ scan.normal
        self.pixel_mm = scan.spacing_mm[1:]
        self.width_mm = float(self.pixel_mm.sum() + thickness_mm) / 3
        self.heights = self.corners @ self.normal
        self.to_row_col = np.stack([self.down, self.across], 1) / self.pixel_mm**2

    def box(self, points: ndarray, reach_mm: float) -> Box | None:
        """Voxels within `reach_mm` of the points (n, 3), cut to the volume; None if there are none."""
        depths = points @ self.normal
        low, high = depths.min() - reach_mm, depths.max() + reach_mm
        slices = np.flatnonzero((self.heights > low) & (self.heights < high))
        if len(slices) == 0:
            return None
        ends = self.corners[slices[[0, -1]]]
        places = ((points[:, None] - ends) @ self.to_row_col).reshape(-1, 2)
        reach = reach_mm / self.pixel_mm
        low = np.maximum(np.floor(places.min(0) - reach), 0).astype(int)
        high = np.minimum(np.ceil(places.max(0) + reach) + 1, self.values.shape[1:]).astype(int)
        if (high <= low).any():
            return None
        return slice(slices[0], slices[-1] + 1), slice(low[0], high[0]), slice(low[1], high[1])

    def coordinates(self, box: Box, origin: ndarray) -> list[ndarray]:
        """x, y and z in mm from an origin of every voxel in a box, each of the box's shape."""
        rows, cols = (np.arange(side.start, side.stop)[:, None] for side in box[1:])
        offsets = (self.corners[box[0]] - origin, rows * self.down, cols * self.across)
        k, j, i = (offset.astype(np.float32) for offset in offsets)
        return [k[:, None, None, axis] + j[:, None, axis] + i[:, axis] for axis in range(3)]

    def ellipsoid(self, value: float, centre: ndarray, axes: ndarray, turn: float) -> None:
        """Paint an ellipsoid with half-axes (3,) in mm, turned about z by `turn` degrees."""
        box = self.box(centre[None], axes.max() + self.width_mm)
        if box is None:
            return
        x, y, z = self.coordinates(box, centre)
        unit = (rotation([0, 0, turn]).T / axes[:, None]).astype(np.float32)
        radius = np.sqrt(sum((a * x + b * y + c * z) ** 2 for a, b, c in unit))
        share = np.clip(0.5 - (radius - 1) * np.float32(axes.min() / self.width_mm), 0, 1)
        self.values[box] += share * (np.float32(value) - self.values[box])

    def tube(self, tube: Tube, fade_mm: float, strength: float = 1.0) -> None:
        """Add a tube: each voxel takes the share of the segment that fills it most. The share falls by e in
        every `fade_mm` from the skull base, as blood in time of flight is less fresh there."""
        distance_mm = norm(tube.points - [0, 0, -125], axis=1)
        shares = strength * np.exp(-np.maximum(distance_mm - 30, 0) / fade_mm)
        for i in range(len(tube.points) - 1):
            self.segment(tube.points[i : i + 2], tube.radii[i : i + 2], float(shares[i]))

    def segment(self, ends: ndarray, radii: ndarray, most: float) -> None:
        """Add a cone with round ends, points (2, 3) and radii (2,) in mm; its share is `most` inside."""
        box = self.box(ends, radii.max() + self.width_mm)
        if box is None:
            return
        x, y, z = self.coordinates(box, ends[0])
        d, (first, last) = (ends[1] - ends[0]).astype(np.float32), radii.astype(np.float32)
        t = np.clip((x * d[0] + y * d[1] + z * d[2]) / (d @ d + np.float32(1e-6)), 0, 1)
        gap = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
        fill = min(1.0, np.pi * (radii.mean() / self.width_mm) ** 2)  # of a voxel wider than the vessel
        share = np.clip(0.5 - (gap - first - t * (last - first)) / np.float32(self.width_mm), 0, fill)
        np.maximum(self.values[box], share * np.float32(most), out=self.values[box])


class Clouds:
    """Smooth random field over a volume: a small array of normal numbers, interpolated slice by slice."""

    def __init__(self, rng: np.random.Generator, size_mm: float, extent_mm: ndarray, num_slices: int) -> None:
        shape = np.maximum(np.rint(extent_mm / size_mm), 4).astype(int)
        self.small, self.last = rng.standard_normal(shape, dtype=np.float32), max(1, num_slices - 1)

    def slice(self, k: int, shape: tuple[int, int]) -> ndarray:
        """Field (rows, cols) at slice k."""
        place = k / self.last * (len(self.small) - 1)
        i = min(int(place), len(self.small) - 2)
        mixed = self.small[i] + (self.small[i + 1] - self.small[i]) * np.float32(place - i)
        return cv2.resize(mixed, shape[::-1], interpolation=cv2.INTER_CUBIC)


class Tissue:
    """A head without vessels: shells of the depth below the skin, bent by smooth random fields."""

    def __init__(self, canvas: Canvas, head: Head, grey: dict[str, float], rng: np.random.Generator) -> None:
        self.canvas, self.head, self.grey, self.width_mm = canvas, head, grey, canvas.width_mm
        count, *shape = canvas.values.shape
        extent_mm = np.array([np.ptp(canvas.heights), *(canvas.pixel_mm * shape)])
        fold_mm = rng.uniform(8, 14)
        sizes_mm = (70, 70, 70, 18, 8, fold_mm, fold_mm)
        self.clouds = [Clouds(rng, size_mm, extent_mm, count) for size_mm in sizes_mm]
        self.skull_width, self.atrophy = rng.uniform(0.75, 1.35), rng.uniform(0.2, 0.55)

    def paint(self) -> None:
        """Paint all slices, then the head's parts."""
        for k in range(len(self.canvas.values)):
            self.paint_slice(k)
        for tissue, *shape in self.head.parts:
            self.canvas.ellipsoid(self.grey[tissue], *shape)

    def shells(self, depth: ndarray, layers: str) -> ndarray:
        """Grey by depth below the skin: `layers` holds mm and tissue in turn, from outside to inside."""
        names, half_mm = layers.split(), self.width_mm / 2
        knots = np.array([(float(start) - half_mm, float(start) + half_mm) for start in names[::2]])
        greys = np.repeat([self.grey[name] for name in ("air", *names[1::2])], 2)[1:-1]
        return np.interp(depth, knots.ravel(), greys).astype(np.float32)

    def paint_slice(self, k: int) -> None:
        """Scalp, skull, skull base, brain with gyri, face and neck of one slice."""
        rows, cols = shape = self.canvas.values.shape[1:]
        everything = (slice(k, k + 1), slice(0, rows), slice(0, cols))
        x, y, z = (c[0] for c in self.canvas.coordinates(everything, np.zeros(3)))
        *warps, rough, fine, fold, other_fold = (cloud.slice(k, shape) for cloud in self.clouds)
        scale = self.head.scale.astype(np.float32)
        x, y, z = (c / s + 2.5 * warp for c, s, warp in zip((x, y, z), scale, warps, strict=True))
        height = (z + 80) / np.where(z > -80, np.float32(80), np.float32(120))
        skull = (1 - np.sqrt((x / 75) ** 2 + (y / 95) ** 2 + height**2)) * 82 * (1 + 0.06 * rough)
        skull /= self.skull_width ** np.clip(skull / 8, 0, 1)
        neck = np.minimum((1 - np.sqrt((x / 56) ** 2 + ((y - 20) / 60) ** 2)) * 58, -110 - z)
        base = -147 + 24 / (1 + np.exp((y - 10) / 4)) + 22 / (1 + np.exp((y + 28) / 3)) + 4 * rough
        above_base = (z - base) / self.width_mm
        floor = self.shells(skull, "0 soft 1.5 fat 5 soft 7 bone")
        floor += np.clip(1.5 * fine + 0.3, 0, 1) * (skull > 7) * (self.grey["marrow"] - floor)
        below = self.shells(np.maximum(skull, neck), "0 soft 2 fat 7 soft")
        in_face = np.clip(1.3 * fine + 0.4 * rough - 0.4, 0, 1) * (np.maximum(skull, neck) > 2)
        below += in_face * (self.grey["fat"] - below)
        folds = np.minimum(np.abs(fold), np.abs(other_fold))
        septa = np.clip(1.2 - 6 * folds, 0, 1) * (y < -15) * (skull > 7)
        below += septa * (self.grey["bone"] - below)
        values = below + np.clip(above_base + 5 / self.width_mm, 0, 1) * (floor - below)
        values += np.clip(above_base, 0, 1) * (self.paint_brain(x, z, skull, folds) - values)
        self.canvas.values[k] = values + np.float32(0.05) * (rough + fine) * np.maximum(values, 0)

    def paint_brain(self, x: ndarray, z: ndarray, skull: ndarray, fold: ndarray) -> ndarray:
        """Calvaria and brain: sulci run where a random field is near 0, with grey matter beside them."""
        layers = "0 soft 1.5 fat 5 soft 5.6 bone 7 marrow 9 bone 10.5 dura 11.3 csf 13 white"
        values, depth = self.shells(skull, layers), skull - 13
        ridge = 1 - 2.2 * fold - np.clip((depth - 16) / 14, 0, 2)
        cortex = np.maximum(np.clip((ridge - 0.25) / 0.2, 0, 1), np.clip((5 - depth) / 2, 0, 1))
        sulci = np.clip((ridge - 1.1 + self.atrophy) / 0.25, 0, 1)
        falx = np.clip(1 - np.abs(x) / self.width_mm, 0, 1) * np.clip((30 - depth) / 4, 0, 0.7) * (z > -70)
        inside = np.clip(depth / self.width_mm + 0.5, 0, 1)
        for tissue, share in (("grey", cortex), ("csf", sulci), ("dura", falx)):
            values += inside * share * (self.grey[tissue] - values)
        return values


def paint_head(canvases: list[Canvas], head: Head, scan: Scan, job: Job) -> ndarray:
    """Grey values of a head without vessels, from at most two of the layers of its slices; in MR it may have
    moved, which repeats it along the rows' direction."""
    used, rng = canvases[:: max(1, len(canvases) - 1)], job.generator("motion")
    for canvas in used:
        Tissue(canvas, head, scan.grey, job.generator("texture")).paint()
    values = sum(canvas.values for canvas in used) / np.float32(len(used))
    if job.modality != "CTA":
        ghost, shift = max(0, rng.uniform(-0.25, 0.12)), int(rng.integers(8, scan.shape[0] // 2))
        values += np.float32(ghost) * np.roll(values, shift, axis=1)
    return values


def read_background(job: Job, scan: Scan) -> tuple[ndarray, dict[str, float], float]:
    """A real series: grey values (n, rows, cols) float32, grey by tissue to go with its brain, and its noise,
    from what the brain of the middle slice loses in a slight blur. CT in HU; MR with 1000 near the brightest,
    a random gamma, and in half of the T2 series with its contrast turned round."""
    rng, (series, factor) = job.generator("real contrast"), open_background(job)
    is_ct, (rows, cols) = job.modality == "CTA", scan.shape
    images = (series.values(i)[: rows * factor, : cols * factor] for i in range(len(series.frames)))
    values = np.stack([cv2.resize(image, (cols, rows), interpolation=cv2.INTER_AREA) for image in images])
    gamma, is_turned, brightest = rng.uniform(0.7, 1.5), rng.random() < 0.5, rng.uniform(500, 1000)
    if not is_ct:
        values = np.clip(values / max(np.percentile(values, 99.5), 1e-6), 0, 2)
        if job.modality == "MRI T2" and is_turned:
            values = np.clip(values / 0.15 - 0.5, 0, 1) * np.clip(1.1 - values, 0.05, 1)
        values = (brightest * values**gamma).astype(np.float32)
    image = values[len(values) // 2]
    brain = (image > 0) & (image < 80) if is_ct else image > 0.3 * np.percentile(image, 98)
    lost = (image - cv2.GaussianBlur(image, (3, 3), 0.8))[brain]
    noise = float(1.7 * np.median(np.abs(lost))) if brain.any() else 0.0
    if is_ct:
        return values, scan.grey, noise
    scale = 2 * float(np.median(image[brain])) / (scan.grey["grey"] + scan.grey["white"])
    grey = {tissue: value * scale for tissue, value in scan.grey.items()}
    if job.modality != "MRI T2":  # fresh or enhanced blood outshines nearly everything
        grey["artery"] = max(grey["artery"], float(np.percentile(image, 98)) * rng.uniform(0.9, 1.4))
    return values, grey, noise


def render(head: Head, scan: Scan, job: Job) -> ndarray:
    """Grey values (n, rows, cols) float32 of the scan: HU for CT. A thick slice is the mean of thin ones."""
    rng = job.generator("vessels")
    count = min(6, max(1, round(scan.thickness_mm / (1.6 * scan.spacing_mm[2]))))
    shifts_mm = ((np.arange(count) + 0.5) / count - 0.5) * scan.thickness_mm
    canvases = [Canvas(scan, shift_mm, scan.thickness_mm / count) for shift_mm in shifts_mm]
    is_real = bool(job.background)
    if is_real:
        values, grey, noise = read_background(job, scan)
    else:
        values, grey, noise = paint_head(canvases, head, scan, job), scan.grey, 0.0
    fade_mm = rng.uniform(100, 300) if job.modality == "MRA" else 1e6
    strengths = rng.uniform(0.65, 1.0, len(head.sacs)) ** (job.modality != "CTA")  # slow flow in a sac
    arteries = [(tube, fade_mm, 1.0) for tube in head.arteries]
    for sac, strength in zip(head.sacs, strengths, strict=True) if job.draw_aneurysms else ():
        arteries += [(tube, fade_mm, strength) for tube in sac.tubes]
    veins, plaques = ([(tube, 1e6, 1.0) for tube in tubes] for tubes in (head.veins, head.plaques))
    covered = np.zeros_like(values)
    for tissue, tubes in (("vein", veins), ("artery", arteries), ("calcium", plaques)):
        share = cover(canvases, tubes, blur=0.5 if is_real else 0)
        values += share * (np.float32(grey[tissue]) - values)
        np.maximum(covered, share, out=covered)
    acquire(values, covered * np.float32(noise), scan, job)
    return values


def cover(canvases: list[Canvas], tubes: list[tuple[Tube, float, float]], blur: float) -> ndarray:
    """The share (n, rows, cols) of each voxel that tubes fill: the mean over the layers of the slices."""
    total = np.zeros_like(canvases[0].values)
    for canvas in canvases:
        canvas.values[:] = 0
        for tube in tubes:
            canvas.tube(*tube)
        total += canvas.values / np.float32(len(canvases))
    for image in total if blur else ():
        cv2.GaussianBlur(image, (0, 0), blur, dst=image)
    return total


def acquire(values: ndarray, noise: ndarray, scan: Scan, job: Job) -> None:
    """What a scanner adds, in place: blur and noise; in MR also seams, shading and a curve of contrast.
    A real series has them all: its noise, a standard deviation by voxel, is missing in what was painted."""
    rng, noise_rng, shape = job.generator("acquisition"), job.generator("noise"), values.shape[1:]
    sigma, gamma, shading = rng.uniform(0.2, 0.9), np.exp(rng.normal(0, 0.2)), rng.uniform(0, 0.35)
    level = np.float32(np.exp(rng.uniform(*np.log([6, 30]))))
    seam_mm, seam_depth = rng.uniform(25, 45), rng.uniform(0, 0.35) * (job.modality == "MRA")
    bias = Clouds(rng, 60, np.array([240, 240, 240]), len(values))
    for k, image in enumerate(values):
        real, imaginary = noise_rng.standard_normal((2, *shape), dtype=np.float32)
        if job.background:
            image += noise[k] * real
            continue
        cv2.GaussianBlur(image, (0, 0), sigma, dst=image)
        if job.modality == "CTA":
            image += level * real
            continue
        height = scan.corners[k] @ scan.normal / seam_mm
        image *= (1 - seam_depth * (height % 1)) * np.exp(shading * bias.slice(k, shape))
        image[:] = 1000 * (np.maximum(image, 0) / 1000) ** gamma
        np.hypot(image + level * real, level * imaginary, out=image)  # magnitude of a complex signal: Rician


# --- DICOM --------------------------------------------------------------------------------------------------


def dataset(**values: object) -> Dataset:
    """A dataset of these attributes."""
    d = Dataset()
    for name, value in values.items():
        setattr(d, name, value)
    return d


def header(job: Job, scan: Scan) -> Dataset:
    """What all slices of a series share, but for how grey values are stored."""
    rng, is_ct = generator(job.seed, job.patient, "person"), job.modality == "CTA"
    spacing_mm, rows, cols = scan.spacing_mm, *scan.shape
    orientation = [*scan.across / spacing_mm[2], *scan.down / spacing_mm[1]]
    d = dataset(
        SOPClassUID=CTImageStorage if is_ct else MRImageStorage,
        Modality="CT" if is_ct else "MR",
        Manufacturer="Phantom",
        SeriesDescription=f"{job.modality} {job.plane}",
        PatientID=f"PHANTOM-{job.seed}-{job.patient:05d}",
        PatientAge=f"{rng.integers(25, 88):03d}Y",
        PatientSex=str(rng.choice(["F", "M"])),
        PatientPosition="HFS",
        StudyInstanceUID=uid(job.seed, "study", job.number),
        SeriesInstanceUID=uid(job.seed, "series", job.number),
        FrameOfReferenceUID=uid(job.seed, "frame of reference", job.number),
        SeriesNumber=job.number + 1,
        SliceThickness=round(scan.thickness_mm, 4),
        PixelSpacing=[round(v, 6) for v in spacing_mm[1:]],
        ImageOrientationPatient=[round(v, 8) for v in orientation],
        SamplesPerPixel=1,
        Rows=rows,
        Columns=cols,
        PhotometricInterpretation="MONOCHROME1" if job.form == "monochrome1" else "MONOCHROME2",
    )
    # type 2 of the patient, study and image modules: present, may be empty (PS3.3 A.3.3, A.4.3)
    for name in ("PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"):
        setattr(d, name, "")
    if is_ct:
        d.KVP = 100
    else:
        d.SpacingBetweenSlices = round(spacing_mm[0], 4)
        d.ScanningSequence, d.SequenceVariant, d.ScanOptions = "GR", "NONE", ""
        d.MRAcquisitionType, d.EchoTime, d.RepetitionTime, d.EchoTrainLength = "3D", 4, 25, 1
    return d


def store(values: ndarray, job: Job, d: Dataset) -> ndarray:
    """Stored integers (z, y, x) of grey values, in one of four ways; adds the tags that undo it to `d`."""
    is_ct, ways = job.modality == "CTA", ("shifted", "as is", "signed and shifted", "scaled")
    way = ways[job.generator("storage").integers(4)]
    if job.form == "monochrome1":
        way = "shifted"
    is_signed = way in ("as is", "signed and shifted")
    slope, intercept = 0.43 if way == "scaled" and not is_ct else 1, -1024 if is_ct and way != "as is" else 0
    stored = np.rint((values - intercept) / slope)
    stored = np.clip(stored, -32768, 32767) if is_signed else np.clip(stored, 0, 4095)
    d.BitsAllocated, d.BitsStored, d.PixelRepresentation = 16, 16 if is_signed else 12, int(is_signed)
    d.HighBit = d.BitsStored - 1
    if way != "as is":  # else without any rescale tag
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType = intercept, slope, "HU" if is_ct else "US"
    if job.form == "monochrome1":
        stored = 4095 - stored  # low is bright: the complement within BitsStored
    return stored.astype(np.int16 if is_signed else np.uint16)


def save(d: Dataset, stored: ndarray, job: Job, path: Path) -> None:
    """Write one file: `stored` is (rows, cols), or (frames, rows, cols) for a multi-frame one."""
    syntax = FORMS[job.form][0]
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    if syntax in ENCODERS:
        compress(d, syntax, stored, encoding_plugin=ENCODERS[syntax], generate_instance_uid=False)
    else:
        d.file_meta.TransferSyntaxUID = syntax
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        d.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        d["PixelData"].VR = "OW"
    d.save_as(path, enforce_file_format=True)


def write_frames(d: Dataset, stored: ndarray, scan: Scan, job: Job, folder: Path) -> list[tuple[str, int]]:
    """Write the files of a series. Returns SOPInstanceUID and frame of each slice."""
    is_downward = job.generator("order").random() < 0.5
    count = len(stored)
    order = np.arange(count)[:: -1 if is_downward else 1]  # slice of each instance or frame
    positions = [[round(v, 6) for v in corner] for corner in scan.corners]
    if job.form.startswith("enhanced"):
        d.SOPInstanceUID, d.InstanceNumber, d.NumberOfFrames = uid(job.seed, "instance", job.number), 1, count
        to_functional_groups(d, [positions[k] for k in order])
        save(d, stored[order], job, folder / f"{d.SOPInstanceUID}.dcm")
        return [(d.SOPInstanceUID, int(frame)) for frame in np.argsort(order)]
    # sorted names are not in the order of the slices
    names = [uid(job.seed, "instance", job.number, k) for k in range(count)]
    for number, k in enumerate(order):
        d.SOPInstanceUID, d.InstanceNumber, d.ImagePositionPatient = names[k], number + 1, positions[k]
        save(d, stored[k], job, folder / f"{names[k]}.dcm")
    return [(name, 0) for name in names]


def to_functional_groups(d: Dataset, positions: list[list[float]]) -> None:
    """Move geometry and rescale into functional groups, as enhanced CT and MR have them (PS3.3 C.7.6.16)."""
    d.SOPClassUID = EnhancedCTImageStorage if d.Modality == "CT" else EnhancedMRImageStorage
    shared = Dataset()
    for group, names in (
        ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")),
        ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
        ("PixelValueTransformationSequence", ("RescaleIntercept", "RescaleSlope", "RescaleType")),
    ):
        values = {name: d[name].value for name in names if name in d}
        for name in values:
            delattr(d, name)
        if values:
            setattr(shared, group, Sequence([dataset(**values)]))
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number, position in enumerate(positions):
        place = dataset(ImagePositionPatient=position)
        content = dataset(StackID="1", InStackPositionNumber=number + 1)
        groups = {"PlanePositionSequence": Sequence([place]), "FrameContentSequence": Sequence([content])}
        frames.append(dataset(**groups))
    d.PerFrameFunctionalGroupsSequence = Sequence(frames)


# --- the set ------------------------------------------------------------------------------------------------


def truth(job: Job, head: Head, scan: Scan) -> list[tuple[str, ndarray, float]]:
    """(location, centre in LPS mm (3,), half of the diameter) of every aneurysm that a scan covers."""
    covered = []
    for aneurysm, sac in zip(job.aneurysms, head.sacs, strict=True):
        centre = (scan.pose @ [*sac.centre, 1])[:3]
        if scan.to_pixel(centre) is not None:
            covered.append((aneurysm.location, centre, sac.half_mm))
    return covered


def write_series(job: Job, root: Path) -> tuple[dict, list[dict]]:
    """Draw and write one series below `root`; returns its rows of train.csv and train_localizers.csv."""
    head, scan = make_head(job), make_scan(job)
    sacs = truth(job, head, scan)
    d = header(job, scan)
    folder = root / "series" / d.SeriesInstanceUID
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.dcm"):  # the same series, drawn before with other options
        old.unlink()
    names = write_frames(d, store(render(head, scan, job), job, d), scan, job, folder)
    sex = {"F": "Female", "M": "Male"}[d.PatientSex]
    present = {location for location, _, _ in sacs}
    row = dict(zip(TABLE, (d.SeriesInstanceUID, int(d.PatientAge[:3]), sex, job.modality), strict=False))
    row |= {name: int(name in present) for name in LOCATIONS} | {LABELS[-1]: int(bool(present))}
    points = []
    for location, centre, _ in sacs:
        k, y, x = scan.to_pixel(centre)
        name, frame = names[k]
        pixel = {"x": round(x, 3), "y": round(y, 3)} | ({"f": frame} if "NumberOfFrames" in d else {})
        points.append(dict(zip(POINTS, (d.SeriesInstanceUID, name, str(pixel), location), strict=True)))
    return row, points


def make_set(
    dst: Path,
    series: int,
    seed: int,
    matrix: int = 64,
    modality: str = "all",
    plane: str = "mixed",
    plain: bool = False,
    draw_aneurysms: bool = True,
    workers: int = 1,
    backgrounds: Path | None = None,
) -> None:
    """Write a set below `dst`; the same arguments give the same bytes, whatever `workers` is."""
    if matrix < 40:
        raise ValueError(f"--matrix {matrix}: expected 40 or more, the least that OpenJPEG can encode")
    jobs = plan(series, seed, matrix, modality, plane, plain, draw_aneurysms)
    if backgrounds:
        jobs = place_on(find_backgrounds(backgrounds), jobs, modality, plane)
    known = {uid(seed, "series", job.number) for job in jobs}
    foreign = [p.name for p in Path(dst, "series").glob("*") if p.name not in known]
    if foreign:
        raise ValueError(
            f"{dst}/series: {len(foreign)} series of another set; expected none. Remove {dst} first."
        )
    write = partial(write_series, root=Path(dst))
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(write, jobs))
    else:
        results = [write(job) for job in jobs]
    table, points = [row for row, _ in results], [point for _, points in results for point in points]
    pd.DataFrame(table, columns=TABLE).to_csv(dst / "train.csv", index=False)
    pd.DataFrame(points, columns=POINTS).to_csv(dst / "train_localizers.csv", index=False)


def main() -> None:
    """Read the command line, write the set, say what was written on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, planes = parser.add_argument, ["axial", "coronal", "sagittal", "mixed"]
    add("--dst", type=Path, required=True, help="folder to write; made if need be")
    add("--series", type=int, default=160, help="number of series (160)")
    add("--seed", type=int, default=0, help="of everything (0)")
    add("--matrix", type=int, default=256, help="pixels across an image (256)")
    add("--modality", choices=[*MODALITIES, "all"], default="all", help="one of them, or all (all)")
    add("--plane", choices=planes, default="mixed", help="one of them, or mixed (mixed)")
    add("--plain", action="store_true", help="single-frame, uncompressed little endian only")
    add("--backgrounds", type=Path, metavar="DIR", help="real CT and MR heads to draw the arteries into")
    add(
        "--no-aneurysms-drawn",
        dest="draw_aneurysms",
        action="store_false",
        help="same labels and localizers, but no aneurysm",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        make_set(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.dst}: {args.series} series written in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
