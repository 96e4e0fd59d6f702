"""Write a Kaggle-shaped set of real DICOM files: heads with arteries, some with aneurysms, and their labels.

in   nothing: every number is drawn from --seed
out  --dst DIR    series/<SeriesInstanceUID>/<SOPInstanceUID>.dcm, train.csv, train_localizers.csv
run  python tests/phantom.py --dst dicoms --series 160 --seed 0

A head is a set of shells, ellipsoids and tubes in millimetres, painted straight onto the grid that a scanner
would have acquired. Patients, anatomy, acquisition, noise and aneurysms have generators of their own, so that
only an aneurysm's voxels tell its label: --no-aneurysms-drawn writes the same set without those voxels.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import LABELS, LOCATIONS, MODALITIES

PREVALENCE = 0.45  # of patients; the challenge's training set has 0.43
SHARE_TWO_SERIES = 0.15  # patients who were scanned twice, each time with the same head
SHARE_TWO_ANEURYSMS = 0.2  # of the positive patients

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

# --- anatomy ------------------------------------------------------------------------------------------------
# Millimetres from the vertex in the head's frame: x to the patient's left, y to the back, z up. The left half
# of the arterial tree stands here, the right one is its mirror image; branches share a point with a parent.
# fmt: off
ICA_TOP, ICA_PCOM, ACA_ACOM, PCA_PCOM = (15.5, -12, -92), (14.5, -13, -96), (2.5, -23, -89), (10, 6, -94)
MCA_FORK, ACA_FORK, VA_PICA = (33, -12, -91), (4.5, -37, -62), (9, 19, -139)
VB_JUNCTION, TIP = (0, 12, -127), (0, 4, -96)
PAIRED = {  # name: radius at the start and at the end, points
    "ica": (2.5, 1.9, [(25, 20, -290), (26, 18, -230), (26, 12, -165), (27, 8, -138), (22, 2, -128),
                       (14, -4, -123), (11, -7, -116), (12, -18, -112), (12, -24, -107), (12.5, -21, -102),
                       (13.5, -16, -99), ICA_PCOM, ICA_TOP]),
    "m1": (1.5, 1.35, [ICA_TOP, (24, -14, -90), MCA_FORK]),
    "m2 superior": (1.1, 0.7, [MCA_FORK, (38, -9, -85), (41, 0, -76), (40, 12, -68), (54, 20, -56),
                               (60, 14, -44)]),
    "m2 inferior": (1.1, 0.7, [MCA_FORK, (38, -6, -91), (41, 4, -87), (43, 18, -82), (54, 30, -76),
                               (58, 44, -66)]),
    "m2 temporal": (0.8, 0.5, [(24, -14, -90), (30, -20, -96), (40, -20, -100), (50, -12, -102)]),
    "a1": (1.2, 1.1, [ICA_TOP, (9, -18, -90), ACA_ACOM]),
    "a2": (1.1, 1.0, [ACA_ACOM, (3.5, -30, -83), (4.5, -38, -73), ACA_FORK]),
    "pericallosal": (0.9, 0.6, [ACA_FORK, (4, -28, -51), (3.5, -8, -44), (3.5, 14, -44)]),
    "callosomarginal": (0.8, 0.5, [ACA_FORK, (5, -44, -52), (5, -36, -36), (5, -18, -28)]),
    "pcom": (0.8, 0.8, [ICA_PCOM, (13.5, -6, -97), (12, 1, -96), PCA_PCOM]),
    "ophthalmic": (0.7, 0.5, [(12.5, -21, -102), (14, -28, -103), (19, -42, -104)]),
    "choroidal": (0.6, 0.4, [ICA_TOP, (18, -4, -92), (21, 6, -89)]),
    "pca": (1.2, 0.7, [TIP, (5, 4.5, -95), PCA_PCOM, (17, 12, -92), (21, 24, -88), (17, 42, -84),
                       (12, 58, -80)]),
    "sca": (0.7, 0.5, [(0, 5, -100), (8, 9, -99), (18, 20, -95), (22, 34, -94)]),
    "aica": (0.6, 0.4, [(0, 7.5, -117), (11, 10, -119), (22, 14, -121)]),
    "vertebral": (1.4, 1.4, [(15, 22, -290), (15, 22, -215), (16, 23, -178), (18, 30, -158), (14, 25, -148),
                             VA_PICA, VB_JUNCTION]),
    "pica": (0.8, 0.5, [VA_PICA, (15, 24, -140), (16, 31, -134), (10, 38, -131), (5, 42, -136)]),
}
MIDLINE = {
    "acom": (0.8, 0.8, [ACA_ACOM, (0, -23.6, -89), (-2.5, -23, -89)]),
    "basilar": (1.6, 1.6, [VB_JUNCTION, (0, 7.5, -117), (0, 5.5, -108), (0, 5, -100), TIP]),
}
PAIRED_VEINS = {
    "transverse": (3.5, 3.5, [(0, 78, -92), (25, 70, -98), (48, 46, -104), (50, 26, -122), (32, 20, -144),
                              (29, 24, -200), (29, 26, -290)]),
    "internal cerebral": (0.9, 1.1, [(2, -8, -66), (2, 10, -62), (0, 32, -66)]),
    "middle cerebral": (1.2, 1.0, [(14, -24, -112), (34, -26, -100), (52, -16, -84), (58, -4, -66)]),
}
MIDLINE_VEINS = {
    "sagittal sinus": (2.0, 4.0, [(0, -76, -50), (0, -56, -26), (0, -12, -11), (0, 40, -22), (0, 74, -60),
                                  (0, 78, -92)]),
    "straight sinus": (1.8, 2.5, [(0, 32, -66), (0, 54, -78), (0, 78, -92)]),
}
SITES = {  # vessel, first and last place in units of its points, direction of the dome
    "Infraclinoid Internal Carotid Artery": [
        ("ica", 6, 8.3, (0.8, -0.4, 0.2)), ("ica", 4, 5.5, (0.5, 0.3, 0.8))],
    "Supraclinoid Internal Carotid Artery": [
        ("ica", 9.4, 10.4, (-0.7, -0.2, 0.7)), ("ica", 11.8, 12, (0, 0.2, 1))],
    "Middle Cerebral Artery": [("m1", 2, 2, (1, -0.2, -0.1)), ("m1", 1.9, 2, (0.8, -0.6, -0.4)),
                               ("m2 superior", 1, 2.2, (0.8, -0.6, 0.2))],
    "Anterior Communicating Artery": [
        ("acom", 0.3, 1.7, (0, -0.9, 0.5)), ("acom", 0.3, 1.7, (0, -0.4, -0.9))],
    "Anterior Cerebral Artery": [("a2", 2.9, 3, (0.2, -0.8, 0.6)), ("a1", 0.7, 1.3, (0.1, -0.2, 0.9))],
    "Posterior Communicating Artery": [("ica", 11, 11, (0.4, 0.9, -0.4))],
    "Basilar Tip": [("basilar", 4, 4, (0, -0.1, 1))],
    "Other Posterior Circulation": [
        ("vertebral", 4.9, 5.1, (0.7, 0.1, 0.6)), ("pca", 1.8, 3.2, (0.4, -0.1, 0.9)),
        ("basilar", 0.9, 2.2, (0.6, -0.8, 0)), ("sca", 0.4, 0.8, (0.6, -0.5, 0.5))],
}
INFUNDIBULA = ["pcom", "choroidal", "ophthalmic", "sca", "pica", "m2 temporal", "aica"]  # may begin as cones
PARTS = [  # in order: tissue, centre, half-axes, degrees turned about z; x > 0 stands for both sides
    ("csf", (0, -9, -97), (20, 22, 9), 0), ("csf", (34, -9, -88), (13, 9, 5), 0),  # basal and Sylvian cistern
    ("csf", (0, 14, -108), (11, 8, 22), 0), ("brain", (0, 17, -108), (10, 10, 24), 0),  # brain stem
    ("csf", (10, 4, -56), (6, 32, 8), 8), ("csf", (24, 26, -72), (5, 14, 8), 20),  # lateral ventricles
    ("csf", (0, 2, -74), (2.5, 12, 9), 0), ("csf", (0, 31, -114), (6, 5, 9), 0),  # third, fourth
    ("soft", (0, -15, -111), (9, 8, 5), 0), ("bone", (34, 8, -131), (26, 8, 9), 38),  # pituitary, petrous
    ("bone", (0, -5, -108), (9, 2.5, 7), 0), ("bone", (0, 1, -124), (12, 4, 12), 0),  # dorsum sellae, clivus
    ("bone", (16, -27, -102), (3.5, 5, 2.5), 0), ("bone", (34, -31, -101), (20, 4, 2.5), -8),  # skull base
    ("air", (0, -26, -118), (10, 11, 7), 0), ("air", (9, -78, -92), (8, 4, 8), 0),  # sinuses: middle, front
    ("air", (26, -44, -138), (12, 13, 13), 0), ("air", (6, -48, -125), (5, 20, 13), 0),  # maxillary, nose
    ("fat", (31, -56, -108), (16, 20, 14), 14), ("csf", (31, -65, -108), (11, 11, 11), 0),  # orbit, eye
    ("bone", (0, 24, -185), (17, 15, 26), 0), ("air", (0, -22, -190), (9, 7, 50), 0),  # spine, airway
]
GREY = {  # HU for CT; arbitrary for MR, 1000 near the brightest; noise is a standard deviation
    "CTA": dict(air=-1000, soft=45, bone=900, brain=36, csf=8, fat=-70, artery=360, vein=220, noise=14),
    "MRA": dict(air=0, soft=170, bone=60, brain=230, csf=110, fat=260, artery=720, vein=250, noise=22),
    "MRI T2": dict(air=0, soft=260, bone=60, brain=380, csf=850, fat=520, artery=60, vein=90, noise=22),
    "MRI T1post": dict(air=0, soft=300, bone=70, brain=380, csf=140, fat=620, artery=800, vein=780, noise=20),
}
# fmt: on


def generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """A generator for each patient or series and purpose, so that one more draw moves nothing elsewhere."""
    return np.random.default_rng([seed, number, zlib.crc32(purpose.encode())])


def uid(*parts: object) -> str:
    """A UID of 64 characters that depends on `parts` alone."""
    return generate_uid(entropy_srcs=["/".join(map(str, ("phantom", *parts)))])  # else 1, 12 would be 11, 2


# --- who is in the set: patients, series, aneurysms ---------------------------------------------------------


@dataclass(frozen=True)
class Aneurysm:
    """A dome on an artery: its label, its place on the vessel, its shape in the head's frame."""

    location: str
    vessel: str
    side: int  # +1 left, -1 right, 0 midline
    place: float  # along the vessel, in units of its template points
    direction: tuple[float, float, float]
    diameter_mm: float
    aspect: float  # length along the direction over width


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
    modalities = deal(seed, "modality", modalities, series) if modality == "all" else [modality] * series
    planes = deal(seed, "plane", planes, series) if plane == "mixed" else [plane] * series
    forms = ["explicit"] * series if plain else deal(seed, "form", forms, series)
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


def draw_aneurysm(location: str, rng: np.random.Generator) -> Aneurysm:
    """An aneurysm of 3-9 mm, median 6, somewhere on the arteries that the location's name covers."""
    side = 1 if location.startswith("Left ") else -1 if location.startswith("Right ") else 0
    sites = SITES[location.removeprefix("Left ").removeprefix("Right ")]
    vessel, first, last, direction = sites[rng.integers(len(sites))]
    if side == 0 and vessel in PAIRED:
        side = int(rng.choice([-1, 1]))
    direction = np.array(direction) / np.linalg.norm(direction) + rng.normal(0, 0.25, 3)
    direction = tuple((direction / np.linalg.norm(direction) * [side or 1, 1, 1]).tolist())
    diameter_mm = float(np.clip(6.0 * np.exp(rng.normal(0, 0.3)), 3, 9))
    place, aspect = rng.uniform(first, last), rng.uniform(0.9, 1.35)
    return Aneurysm(location, vessel, side, place, direction, diameter_mm, aspect)


# --- the patient: a head and its vessels in the head's frame ------------------------------------------------


@dataclass
class Tube:
    """A vessel: points (n, 3) mm, radii (n,) mm, and steps (n,), their places in units of template points."""

    points: np.ndarray
    radii: np.ndarray
    steps: np.ndarray

    def at(self, place: float) -> tuple[np.ndarray, float]:
        """Centre (3,) and radius at a place counted in template points."""
        centre = np.array([np.interp(place, self.steps, self.points[:, axis]) for axis in range(3)])
        return centre, float(np.interp(place, self.steps, self.radii))


Part = tuple[str, np.ndarray, np.ndarray, float]  # tissue, centre (3,), half-axes (3,), degrees about z


@dataclass
class Head:
    """One patient: scale of the skull, vessels, parts, domes (centre, direction, half-width, half-length)."""

    scale: np.ndarray
    arteries: dict[tuple[str, int], Tube]
    veins: dict[tuple[str, int], Tube]
    domes: list[tuple[np.ndarray, np.ndarray, float, float]]
    parts: list[Part]


def spline(points: np.ndarray, step_mm: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Catmull-Rom curve through (n, 3) points: samples (m, 3) about `step_mm` apart and their places (m,)."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    counts = np.maximum(1, np.rint(np.linalg.norm(np.diff(points, axis=0), axis=1) / step_mm)).astype(int)
    places = [i + np.arange(count) / count for i, count in enumerate(counts)]
    places = np.append(np.concatenate(places), len(points) - 1)
    index = np.minimum(places.astype(int), len(points) - 2)
    t = (places - index)[:, None]
    a, b, c, d = (padded[index + i] for i in range(4))
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve, places


def make_head(seed: int, patient: int, aneurysms: tuple[Aneurysm, ...]) -> Head:
    """Jittered anatomy of one patient. The aneurysms take no part in any draw."""
    rng = generator(seed, patient, "anatomy")
    scale = np.clip(rng.normal(1, 0.035, 3), 0.93, 1.07)
    rate, phase = (
        rng.normal(0, 1 / 25, (5, 3)),
        rng.uniform(0, 2 * np.pi, 5),
    )  # five waves bend the whole tree
    height_mm = rng.normal(0, [0.6, 1.4, 1.4], (5, 3))
    moved: dict[tuple[float, ...], np.ndarray] = {}

    def place(point: tuple[float, ...]) -> np.ndarray:
        """A template point in this patient, always the same, so that branches stay on their parents."""
        if point not in moved:
            bend = np.sin(rate @ np.array(point) + phase) @ height_mm
            moved[point] = np.array(point) * scale + bend + rng.normal(0, 0.7, 3)
        return moved[point]

    def grow(radius: tuple[float, float], template: list, side: int) -> Tube:
        """A vessel on that side, its radius wobbling, some with a bend that may pass for an aneurysm."""
        mirrored = [place((side * p[0] if side else p[0], *p[1:])) for p in template]
        points, steps = spline(np.array(mirrored))
        wobble = np.interp(steps, np.arange(len(template)), rng.normal(0, 0.08, len(template)))
        radii = np.interp(steps, [0, len(template) - 1], radius) * (1 + wobble) * size
        if rng.random() < 0.4:  # leaves its course between two template points
            bump = np.sin(np.pi * steps) ** 2 * (steps.astype(int) == rng.integers(len(template) - 1))
            points = points + bump[:, None] ** 2 * rng.normal(0, 2.5, 3)
        return Tube(points, radii, steps)

    size = np.clip(rng.normal(1, 0.08), 0.85, 1.2)
    arteries = {(n, 0): grow((a, b), p, 0) for n, (a, b, p) in MIDLINE.items()}
    arteries |= {(n, s): grow((a, b), p, s) for s in (1, -1) for n, (a, b, p) in PAIRED.items()}
    veins = {(n, 0): grow((a, b), p, 0) for n, (a, b, p) in MIDLINE_VEINS.items()}
    veins |= {(n, s): grow((a, b), p, s) for s in (1, -1) for n, (a, b, p) in PAIRED_VEINS.items()}
    narrow_and_widen(arteries, rng)
    parts = place_parts(scale, rng)
    domes = [dome(a, arteries[a.vessel, a.side]) for a in aneurysms]
    return Head(scale, arteries, veins, domes, parts)


def narrow_and_widen(arteries: dict[tuple[str, int], Tube], rng: np.random.Generator) -> None:
    """Hypoplastic arteries, and infundibula: cones under 3 mm where a branch leaves; changes the tubes."""
    for side in (1, -1):
        for name in ("a1", "pcom", "vertebral"):
            arteries[name, side].radii *= rng.choice([1, 0.6], p=[0.8, 0.2])
        for name in INFUNDIBULA:
            width, length, is_present = rng.uniform(1.0, 1.45), rng.uniform(2.0, 4.0), rng.random() < 0.25
            tube = arteries[name, side]
            along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(tube.points, axis=0), axis=1))]
            if is_present:
                tube.radii = np.maximum(tube.radii, width * (1 - along / (2 * length)))


def place_parts(scale: np.ndarray, rng: np.random.Generator) -> list[Part]:
    """PARTS in this patient, on both sides."""
    parts = []
    for tissue, centre, axes, turn in PARTS:
        axes = np.array(axes) * scale * rng.normal(1, 0.06, 3)
        for side in (1, -1) if centre[0] else (1,):
            where = np.array(centre) * scale * [side, 1, 1] + rng.normal(0, 0.6, 3)
            parts.append((tissue, where, axes, side * turn))
    return parts


def dome(aneurysm: Aneurysm, artery: Tube) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Centre, unit direction, half-width and half-length of an aneurysm that sits on its vessel's wall."""
    on_vessel, radius = artery.at(aneurysm.place)
    direction, half = np.array(aneurysm.direction), aneurysm.diameter_mm / 2
    centre = on_vessel + direction * (0.7 * radius + 0.75 * half * aneurysm.aspect)
    return centre, direction, half, half * aneurysm.aspect


# --- the scan: where the voxels lie -------------------------------------------------------------------------


@dataclass
class Scan:
    """Geometry and contrast of one acquisition; affine maps voxels (z, y, x, 1) to LPS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    thickness_mm: float
    pose: np.ndarray  # (4, 4), the head's frame to LPS
    grey: dict[str, float]


def rotation(degrees: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def make_scan(job: Job) -> Scan:
    """Field of view, spacing, coverage and obliqueness as scanners of that modality have them."""
    rng = generator(job.seed, job.number, "scan")
    is_ct, is_axial = job.modality == "CTA", job.plane == "axial"
    pose = np.eye(4)
    pose[:3, :3] = rotation(np.clip(rng.normal(0, 3.5, 3), -8, 8))
    pose[:3, 3] = rng.uniform(-60, 60, 3)
    pose[2, 3] += rng.choice([0.0, 900.0, -1400.0])  # the table's zero
    # in the plane: MR may have a narrow field of view, and pixels taller than wide
    fov_mm, is_narrow = rng.uniform(212, 245), rng.random() < 0.5
    ratio = rng.choice([1.0, 1.2], p=[0.85, 0.15])
    pixel_mm = fov_mm / job.matrix
    row_mm = pixel_mm * (1.0 if is_ct else ratio)
    rows = round(fov_mm / row_mm)
    cols = round(0.84 * job.matrix) if is_narrow and not is_ct and job.plane != "sagittal" else job.matrix
    # along the normal: a small matrix gets wider spacing, but thick slices stay as they are
    low, high = {"CTA": (0.6, 1.25), "MRA": (0.5, 1.0), "MRI T2": (3, 5), "MRI T1post": (1, 3)}[job.modality]
    spacing_mm = rng.uniform(low, high) * (max(1.0, pixel_mm / 0.75) if high < 2 else 1)
    thickness_mm = spacing_mm * rng.choice([0.8, 0.9, 1.0] if job.modality == "MRI T2" else [1.0, 1.0, 1.3])
    has_neck, neck_mm, is_slab = rng.random() < 0.3, rng.uniform(-270, -215), rng.random() < 0.4
    bottom_mm, top_mm = rng.uniform(-178, -162), rng.uniform(6, 14)
    if is_axial:
        row, col, centre = (1, 0, 0), (0, 1, 0), (0, 0, 0)
        bottom_mm = neck_mm if is_ct and has_neck else bottom_mm
        if job.modality == "MRA" and is_slab:  # time of flight of the arteries alone
            top_mm = -45
    elif job.plane == "coronal":
        row, col, centre, bottom_mm, top_mm = (1, 0, 0), (0, 0, -1), (0, 0, -95), -104, 104
    else:
        row, col, centre, bottom_mm, top_mm = (0, 1, 0), (0, 0, -1), (0, 0, -95), -84, 84
    turn = rotation(np.clip(rng.normal(0, 5, 3), -9, 9) * (not (is_ct and is_axial)))
    tilt = rotation(np.array([rng.choice([0, 10, -12], p=[0.9, 0.05, 0.05]) * (is_ct and is_axial), 0, 0]))
    row, col = turn @ row, turn @ col
    step = np.cross(row, col) * rng.choice([1 if is_axial else -1, 1]) * spacing_mm
    col = tilt @ col  # a tilted gantry: the slices lean, the table still moves along z
    offset = np.array([*rng.uniform(-4, 4, 2), 0]) + centre
    first = (pose @ [*offset, 1])[:3] + step / spacing_mm * bottom_mm
    affine = np.eye(4)
    affine[:3, :3] = np.stack([step, col * row_mm, row * pixel_mm], axis=1)
    affine[:3, 3] = first - affine[:3, 1] * (rows - 1) / 2 - affine[:3, 2] * (cols - 1) / 2
    shape = (int((top_mm - bottom_mm) / spacing_mm) + 1, rows, cols)
    factors = dict(zip(("artery", "vein", "noise"), rng.uniform(0.85, 1.15, 3), strict=True))
    grey = {name: value * factors.get(name, 1) for name, value in GREY[job.modality].items()}
    return Scan(shape, affine, thickness_mm, pose, grey)


# --- painting -----------------------------------------------------------------------------------------------


def coordinates(affine: np.ndarray, box: tuple[slice, ...]) -> list[np.ndarray]:
    """x, y and z in mm of every voxel in a box, each of the box's shape."""
    k, j, i = (np.arange(s.start, s.stop, dtype=np.float32) for s in box)
    a = affine.astype(np.float32)
    return [(a[r, 0] * k + a[r, 3])[:, None, None] + (a[r, 1] * j)[:, None] + a[r, 2] * i for r in range(3)]


class Canvas:
    """A volume of grey values on one grid, painted with soft edges one voxel wide (partial volume)."""

    def __init__(self, shape: tuple[int, int, int], affine: np.ndarray, thickness_mm: float) -> None:
        self.values = np.zeros(shape, np.float32)
        self.affine, self.inverse = affine, np.linalg.inv(affine)
        self.per_mm = np.linalg.norm(self.inverse[:3, :3], axis=1)  # voxels per mm along each index
        self.width_mm = (np.linalg.norm(affine[:3, 1]) + np.linalg.norm(affine[:3, 2]) + thickness_mm) / 3

    def box(self, points: np.ndarray, reach_mm: float) -> tuple[slice, ...]:
        """Voxels within `reach_mm` of the points (n, 3), cut to the volume."""
        voxels = points @ self.inverse[:3, :3].T + self.inverse[:3, 3]
        low = np.floor(voxels.min(0) - reach_mm * self.per_mm).astype(int)
        high = np.ceil(voxels.max(0) + reach_mm * self.per_mm).astype(int) + 1
        return tuple(
            slice(max(0, a), max(0, min(b, n))) for a, b, n in zip(low, high, self.values.shape, strict=True)
        )

    def ellipsoid(self, value: float, centre: np.ndarray, frame: np.ndarray, axes: np.ndarray) -> None:
        """Paint an ellipsoid: frame (3, 3) has its axes' directions in rows, axes (3,) half their mm."""
        box = self.box(centre[None], axes.max() + self.width_mm)
        if min(s.stop - s.start for s in box) <= 0:
            return
        x, y, z = (c - np.float32(m) for c, m in zip(coordinates(self.affine, box), centre, strict=True))
        u = (frame / axes[:, None]).astype(np.float32)
        radius = np.sqrt(sum((u[r, 0] * x + u[r, 1] * y + u[r, 2] * z) ** 2 for r in range(3)))
        alpha = np.clip(0.5 - (radius - 1) * np.float32(axes.min() / self.width_mm), 0, 1)
        view = self.values[box]
        view += alpha * (np.float32(value) - view)

    def tubes(self, value: float, tubes: list[Tube]) -> None:
        """Paint the union of tubes: each voxel's share is that of the segment that fills it most."""
        share = np.zeros_like(self.values)
        for tube in tubes:
            for (a, ra), (b, rb) in pairwise(zip(tube.points, tube.radii, strict=True)):
                box = self.box(np.array([a, b]), max(ra, rb) + self.width_mm)
                if min(s.stop - s.start for s in box) <= 0:
                    continue
                x, y, z = (c - np.float32(m) for c, m in zip(coordinates(self.affine, box), a, strict=True))
                d = (b - a).astype(np.float32)
                t = np.clip((x * d[0] + y * d[1] + z * d[2]) / (d @ d + np.float32(1e-6)), 0, 1)
                gap = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
                fill = min(
                    1.0, np.pi * (0.5 * (ra + rb) / self.width_mm) ** 2
                )  # of a voxel wider than the vessel
                alpha = np.clip(
                    0.5 - (gap - (ra + t * np.float32(rb - ra))) / np.float32(self.width_mm), 0, fill
                )
                np.maximum(share[box], alpha, out=share[box])
        self.values += share * (np.float32(value) - self.values)


class Clouds:
    """Smooth random field over a volume: a small array of normal numbers, interpolated slice by slice."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int], num_slices: int) -> None:
        self.small, self.num_slices = rng.standard_normal(shape, dtype=np.float32), num_slices

    def slice(self, k: float, rows: int, cols: int) -> np.ndarray:
        """Field (rows, cols) at slice k."""
        place = np.clip(k / max(1, self.num_slices - 1), 0, 1) * (len(self.small) - 1)
        i = min(int(place), len(self.small) - 2)
        mixed = self.small[i] + (self.small[i + 1] - self.small[i]) * np.float32(place - i)
        return cv2.resize(mixed, (cols, rows), interpolation=cv2.INTER_LINEAR)


def paint_skull(canvas: Canvas, scale: np.ndarray, grey: dict[str, float], clouds: list[Clouds]) -> None:
    """Scalp, skull, skull base, brain with sulci, face and neck, as shells of the depth below the skin."""
    w, to_unit = canvas.width_mm, np.diag([*1 / scale, 1]) @ canvas.affine
    count, rows, cols = canvas.values.shape

    def shells(depth: np.ndarray, *layers: tuple[float, str]) -> np.ndarray:
        """Grey by depth below the skin in mm: each layer from its depth to the next one's."""
        knots, values = [], [grey["air"]]
        for start, tissue in layers:
            knots += [start - w / 2, start + w / 2]
            values += [grey[tissue], grey[tissue]]
        return np.interp(depth, knots, values[:-1]).astype(np.float32)

    for k in range(count):
        x, y, z = (c[0] for c in coordinates(to_unit, (slice(k, k + 1), slice(0, rows), slice(0, cols))))
        dz = (z + 80) / np.where(z > -80, np.float32(80), np.float32(120))
        skull = (1 - np.sqrt((x / 75) ** 2 + (y / 95) ** 2 + dz**2)) * 82
        neck = np.minimum((1 - np.sqrt((x / 56) ** 2 + ((y - 20) / 60) ** 2)) * 58, -110 - z)
        base = -147 + 24 / (1 + np.exp((y - 10) / 4)) + 22 / (1 + np.exp((y + 28) / 3)) + 3 * np.sin(x / 9)
        above = shells(skull, (0, "soft"), (2.5, "fat"), (6, "bone"), (11.5, "csf"), (13.5, "brain"))
        floor = shells(skull, (0, "soft"), (2.5, "fat"), (7, "bone"))
        below = shells(np.maximum(skull, neck), (0, "soft"), (2.5, "fat"), (7, "soft"))
        values = below + np.clip((z - base + 7) / w, 0, 1) * (floor - below)
        values += np.clip((z - base) / w, 0, 1) * (above - values)
        coarse, fine = (c.slice(k, rows, cols) for c in clouds)
        sulci = (
            np.clip(1.5 * fine - 1.2, 0, 1)
            * np.clip((34 - skull) / 8, 0, 1)
            * np.clip((skull - 12.5) / w, 0, 1)
        )
        values += sulci * np.clip((z - base) / w, 0, 1) * (grey["csf"] - values)
        canvas.values[k] = values + 0.12 * (coarse + 0.6 * fine) * np.maximum(values, 0)


def render(head: Head, scan: Scan, job: Job) -> np.ndarray:
    """Grey values (z, y, x) float32 of the scan: HU for CT. Thick slices are the mean of thinner ones."""
    pixel_mm = np.linalg.norm(scan.affine[:3, 2])
    parts = max(1, round(scan.thickness_mm / (1.6 * pixel_mm)))
    spacing_mm = np.linalg.norm(scan.affine[:3, 0])
    rng = generator(job.seed, job.number, "texture")
    clouds = [Clouds(rng, shape, scan.shape[0]) for shape in ((10, 12, 12), (30, 34, 34))]
    bias = Clouds(rng, (4, 4, 4), scan.shape[0])
    flow = generator(job.seed, job.number, "flow").uniform(0.88, 1.0, len(head.domes))  # slower in a dome
    total = np.zeros(scan.shape, np.float32)
    for part in range(parts):
        shift = np.eye(4)
        shift[0, 3] = ((part + 0.5) / parts - 0.5) * scan.thickness_mm / spacing_mm
        to_head = np.linalg.inv(scan.pose) @ scan.affine @ shift
        canvas = Canvas(scan.shape, to_head, scan.thickness_mm / parts)
        paint_skull(canvas, head.scale, scan.grey, clouds)
        for tissue, centre, axes, turn in head.parts:
            canvas.ellipsoid(scan.grey[tissue], centre, rotation(np.array([0, 0, turn])).T, axes)
        canvas.tubes(scan.grey["vein"], list(head.veins.values()))
        canvas.tubes(scan.grey["artery"], list(head.arteries.values()))
        if job.draw_aneurysms:
            for (centre, direction, half, length), share in zip(head.domes, flow, strict=True):
                frame = np.linalg.svd(direction[None])[2]  # its first row is the direction
                canvas.ellipsoid(scan.grey["artery"] * share, centre, frame, np.array([length, half, half]))
        total += canvas.values / parts
    noise = generator(job.seed, job.number, "noise")
    for k, image in enumerate(total):
        first = noise.standard_normal(image.shape, dtype=np.float32) * scan.grey["noise"]
        if job.modality == "CTA":
            image += first
        else:  # the magnitude of a complex signal: Rician, not zero in air
            second = noise.standard_normal(image.shape, dtype=np.float32) * scan.grey["noise"]
            image *= np.exp(0.18 * bias.slice(k, *image.shape))
            np.hypot(image + first, second, out=image)
    return total


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
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    along = scan.affine[:3, :3] / spacing_mm
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
        ImageOrientationPatient=[round(v, 8) for v in (*along[:, 2], *along[:, 1])],
        SamplesPerPixel=1,
        Rows=scan.shape[1],
        Columns=scan.shape[2],
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


def store(values: np.ndarray, job: Job, d: Dataset) -> np.ndarray:
    """Stored integers (z, y, x) of grey values, in one of four ways; adds the tags that undo it to `d`."""
    is_ct, ways = job.modality == "CTA", ("shifted", "as is", "signed and shifted", "scaled")
    way = ways[generator(job.seed, job.number, "storage").integers(4)]
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


def save(d: Dataset, stored: np.ndarray, job: Job, path: Path) -> None:
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


def write_frames(d: Dataset, stored: np.ndarray, scan: Scan, job: Job, folder: Path) -> list[tuple[str, int]]:
    """Write the files of a series. Returns SOPInstanceUID and frame of each slice."""
    is_downward = generator(job.seed, job.number, "order").random() < 0.5
    count = len(stored)
    order = np.arange(count)[:: -1 if is_downward else 1]  # slice of each instance or frame
    positions = [[round(v, 6) for v in (scan.affine @ [k, 0, 0, 1])[:3]] for k in range(count)]
    if job.form.startswith("enhanced"):
        d.SOPInstanceUID, d.InstanceNumber, d.NumberOfFrames = uid(job.seed, "instance", job.number), 1, count
        to_functional_groups(d, [positions[k] for k in order])
        save(d, stored[order], job, folder / f"{d.SOPInstanceUID}.dcm")
        return [(d.SOPInstanceUID, int(frame)) for frame in np.argsort(order)]
    names = [
        uid(job.seed, "instance", job.number, k) for k in range(count)
    ]  # sorting them sorts nothing else
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


def truth(job: Job) -> list[tuple[str, np.ndarray, float]]:
    """(location, centre in LPS mm (3,), half of the diameter in mm) of every aneurysm of a series."""
    domes, pose = make_head(job.seed, job.patient, job.aneurysms).domes, make_scan(job).pose
    centres = [((pose @ [*centre, 1])[:3], half) for centre, _, half, _ in domes]
    return [(a.location, *found) for a, found in zip(job.aneurysms, centres, strict=True)]


def write_series(job: Job, root: Path) -> tuple[dict, list[dict]]:
    """Draw and write one series below `root`; returns its rows of train.csv and train_localizers.csv."""
    head, scan = make_head(job.seed, job.patient, job.aneurysms), make_scan(job)
    d = header(job, scan)
    folder = root / "series" / d.SeriesInstanceUID
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.dcm"):  # the same series, drawn before with other options
        old.unlink()
    names = write_frames(d, store(render(head, scan, job), job, d), scan, job, folder)
    sex = {"F": "Female", "M": "Male"}[d.PatientSex]
    present = {a.location for a in job.aneurysms}
    row = dict(zip(TABLE, (d.SeriesInstanceUID, int(d.PatientAge[:3]), sex, job.modality), strict=False))
    row |= {name: int(name in present) for name in LOCATIONS} | {LABELS[-1]: int(bool(present))}
    points = []
    for location, centre, _ in truth(job):
        z, y, x = (np.linalg.inv(scan.affine) @ [*centre, 1])[:3].tolist()
        name, frame = names[min(max(round(z), 0), len(names) - 1)]
        where = {"x": round(x, 3), "y": round(y, 3)} | ({"f": frame} if "NumberOfFrames" in d else {})
        points.append(dict(zip(POINTS, (d.SeriesInstanceUID, name, str(where), location), strict=True)))
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
) -> None:
    """Write a whole set below `dst`; the same arguments give the same bytes, whatever `workers` is."""
    if matrix < 40:
        raise ValueError(f"--matrix {matrix}: expected 40 or more, the least that OpenJPEG can encode")
    jobs = plan(series, seed, matrix, modality, plane, plain, draw_aneurysms)
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
    add("--no-aneurysms-drawn", action="store_true", help="same labels and localizers, but no aneurysm")
    add("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    args = parser.parse_args()
    start = time.perf_counter()
    kind, draw = (args.modality, args.plane, args.plain), not args.no_aneurysms_drawn
    try:
        make_set(args.dst, args.series, args.seed, args.matrix, *kind, draw, args.workers)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.dst}: {args.series} series written in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
