"""DICOM files -> header -> frames -> `Series` -> `Volume`: the one path from a file to the voxels of a model.

Reads top to bottom: settings -> header -> frames -> `read_series` -> grid -> `make_volume`. Space is LPS
millimetres (x to the patient's left, y to the back, z to the head); voxels are indexed (z, y, x). Imports
neither torch nor `common`, so that worker processes start fast.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import math
import os
import re
import struct
import typing
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

# --- settings -----------------------------------------------------------------------------------------------

VOLUME_VERSION = 1  # to be raised with each change of the code that changes a volume's voxels


@dataclass(frozen=True)
class VolumeSettings:
    """What shapes a volume beside its files."""

    base_slices: int = 32  # axial slabs per volume
    img_size: int = 384  # rows and columns of a volume and of a crop
    roi_mm: float = 200.0  # side of the square box, centred on the head
    roi_top_mm: float = 160.0  # depth of the box below the top of the head
    ct_window: tuple[float, float] = (0.0, 600.0)  # HU; -125..225 would saturate contrast-filled arteries
    mr_percentiles: tuple[float, float] = (1.0, 99.8)  # of the series' own region


# --- reading ------------------------------------------------------------------------------------------------

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"  # transfer syntaxes, PS3.5 A
BIG_ENDIAN, DEFLATED, RLE = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
DECODERS = {  # compressed transfer syntax -> packages that decode it
    RLE: "pylibjpeg pylibjpeg-rle",
    **{f"1.2.840.10008.1.2.4.{n}": "pylibjpeg pylibjpeg-libjpeg" for n in (50, 51, 57, 70)},  # JPEG
    **{f"1.2.840.10008.1.2.4.{n}": "pyjpegls" for n in (80, 81)},  # JPEG-LS
    **{f"1.2.840.10008.1.2.4.{n}": "pylibjpeg pylibjpeg-openjpeg" for n in (90, 91)},  # JPEG 2000
}
MAX_PIXEL_BYTES = 2**31  # of one file, decoded
MAX_FRAME_PIXELS = 2**26  # 8192 x 8192
MAX_UNPACKED_BYTES = 2**29  # of one deflated or gzipped file
SAME_POSITION_MM = 0.02  # closer slices share a position
PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a delimiter


def _tags(names: str) -> dict[int, tuple[str, str]]:
    """tag -> (name, VR) of attributes named as in PS3.6."""
    return {tag_for_keyword(name): (name, dictionary_VR(name)[:2]) for name in names.split()}


WANTED = _tags(  # the attributes that reading uses
    "TransferSyntaxUID ImageType SOPClassUID SOPInstanceUID Modality ComplexImageComponent PatientID "
    "PatientSex PatientAge SliceThickness EchoTime EchoNumbers SpacingBetweenSlices TriggerTime "
    "ReconstructionDiameter DiffusionBValue SeriesInstanceUID AcquisitionNumber InstanceNumber "
    "ImagePositionPatient ImageOrientationPatient TemporalPositionIdentifier SliceLocation StackID "
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing "
    "BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit "
    "RescaleIntercept RescaleSlope"
)
IN_FRAME = WANTED | {  # the same in a functional group (PS3.3 C.7.6.16.2), where some have another tag
    0x00089007: ("ImageType", "CS"),  # FrameType
    0x00189082: ("EchoTime", "FD"),  # EffectiveEchoTime
    0x00209128: ("TemporalPositionIdentifier", "UL"),  # TemporalPositionIndex
    0x00209153: ("TriggerTime", "FD"),  # NominalCardiacTriggerDelayTime
    0x00209156: ("AcquisitionNumber", "US"),  # FrameAcquisitionNumber
}
FUNCTIONAL_GROUPS = _tags(
    "MREchoSequence MRDiffusionSequence CardiacSynchronizationSequence MRImageFrameTypeSequence "
    "CTImageFrameTypeSequence FrameContentSequence PlanePositionSequence PlaneOrientationSequence "
    "PixelMeasuresSequence PixelValueTransformationSequence"
)
BINARY = {"US": "H", "UL": "I", "FD": "d"}
NUMBER = rb" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)? *"
NUMBERS = re.compile(NUMBER + rb"(\\" + NUMBER + rb")*")
CHARACTER_SET = re.compile(rb"[A-Z0-9_ \\]*")


def safe_uid(uid: str) -> str:
    """`uid` if it is safe as a file name (a UID, or another identifier such as ID_0a1b), else one made of its
    SHA-256."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", uid):
        return uid
    return "2.25." + str(int(hashlib.sha256(uid.encode(errors="surrogatepass")).hexdigest(), 16))[:38]


def natural_key(path: Path) -> list:
    """Sort key of a path in which `I10` follows `I9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", str(path)))]


HEAD_BYTES = 2**20  # find_series reads at most so much of a file, and unpacks at most so much
UID_NAME = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")  # PS3.5 9.1, so that the date 2024.03.01 is not one


def find_series(root: Path, skip: Path | None = None) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """Series under `root`, a folder of any depth: (uid -> files, [(file that is not an image, reason)]).

    A folder named by a UID is one series if its first image has the same (0020,000E) SeriesInstanceUID or
    none; its other files are not opened, so a million files take seconds. Elsewhere images are grouped by
    SeriesInstanceUID, across folders; those without it are a series of their folder's name. Images of
    different (0010,0020) PatientID are never one series: a name that several series claim gets a number
    (`2024.03.01-1of2`). A damaged image that does not say where it belongs counts as one of the largest
    series of its folder, a folder that cannot be read as a series. Folders called `segmentations` (vessel
    masks) and the files in the folder `skip` are left out.
    """
    groups: dict[tuple[str, str], dict[str, list[Path]]] = {}
    rejected: list[tuple[Path, str]] = []
    for folder, files in walk_folders(root, skip, rejected):
        for (series, patient), members in group_files(folder, files, rejected).items():
            groups.setdefault(series, {}).setdefault(patient, []).extend(members)
    claims: dict[str, list[list[Path]]] = {}
    for (uid, _), by_patient in groups.items():
        without_id = by_patient.pop("", [])
        if len(by_patient) == 1:
            next(iter(by_patient.values())).extend(without_id)
        elif without_id:
            by_patient[""] = without_id
        claims.setdefault(uid, []).extend(by_patient.values())
    series = {}
    for uid, claimants in claims.items():
        for number, members in enumerate(claimants, start=1):
            count = len(claimants)
            series[uid if count == 1 else safe_uid(f"{uid}-{number}of{count}")] = members
    return series, rejected


def walk_folders(
    root: Path, skip: Path | None, rejected: list[tuple[Path, str]]
) -> typing.Iterator[tuple[Path, list[Path] | None]]:
    """Every real folder under `root` once, in order, and its regular files (None if it cannot be read); what
    else lies in it (a pipe, a broken link) goes to `rejected`. Links are followed."""
    walked, pending = set(), [root]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in walked:
            continue
        walked.add(real)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield folder, None
            continue
        files, subfolders = [], []
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            if is_folder:
                subfolders.append(Path(entry.path))
            elif is_file:
                files.append(Path(entry.path))
            else:
                rejected.append((Path(entry.path), "not a regular file"))
        pending += [path for path in reversed(subfolders) if path.name != "segmentations"]
        yield folder, [] if skip and real == os.path.realpath(skip) else files


def group_files(
    folder: Path, files: list[Path] | None, rejected: list[tuple[Path, str]]
) -> dict[tuple[tuple[str, str], str], list[Path]]:
    """((uid, folder where it is only the folder's name), PatientID) -> images of one folder, as `find_series`
    says; files that are not images go to `rejected`."""
    name = os.path.basename(os.path.abspath(folder))
    is_uid = bool(UID_NAME.fullmatch(name))
    by_name = (safe_uid(name), "" if is_uid else str(folder))
    if files is None:
        return {(by_name, ""): [folder]}
    series: dict[tuple[tuple[str, str], str], list[Path]] = {}
    damaged, strays = [], []
    for path in files:
        try:
            identity = read_identity(path)
        except ValueError as error:
            strays.append((path, str(error)))
            continue
        if identity is None:
            damaged.append(path)
            continue
        uid, patient = identity
        if is_uid and not series and uid in ("", name):
            return {(by_name, patient): files}
        series.setdefault(((safe_uid(uid), "") if uid else by_name, patient), []).append(path)
    if is_uid and files and not series:
        return {(by_name, ""): files}
    rejected += strays
    # empty files alone are not a series; one that may not be looked at could be an image
    if any(not os.path.isfile(path) or os.path.getsize(path) for path in damaged):
        series = series or {(by_name, ""): []}
    if series:
        max(series.values(), key=len).extend(damaged)
    else:
        rejected += [(path, "empty file") for path in damaged]
    return series


def _one_line_errors(function: typing.Callable) -> typing.Callable:
    """Whatever goes wrong inside becomes a ValueError of one line: what parsers raise on hostile bytes, and a
    decoder's own BaseException (pylibjpeg-rle: PanicException). Interrupts and exits pass through."""

    @functools.wraps(function)
    def wrapped(*args: object) -> object:
        try:
            return function(*args)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(kind + " ".join(str(error).split())[:300]) from error

    return wrapped


@_one_line_errors
def read_identity(path: Path) -> tuple[str, str] | None:
    """((0020,000E) SeriesInstanceUID, (0010,0020) PatientID) of an image, "" where absent; None if it is too
    damaged to tell, empty or blank. ValueError if it is not an image.

    A file costs bounded time and memory, whatever it holds: at most HEAD_BYTES are read and unpacked.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            for limit in (2**14, 2**18, HEAD_BYTES):
                file.seek(0)
                head = unpack_head(file.read(limit))
                if not head.strip(b"\0"):
                    return None
                is_dicom = head[128:132] == b"DICM"
                if not is_dicom and head[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
                    raise ValueError("not DICOM")
                try:
                    header = _walk_header(head)
                except struct.error:  # longer, or cut short
                    continue
                except ValueError:  # unusual
                    header = parse_head(head)
                if "Rows" in header:
                    break
            else:
                header = parse_head(head)
    except OSError:
        return None
    kind = header.get("SOPClassUID", "")
    name = pydicom.uid.UID_dictionary.get(kind, ("",))[0]
    if name and "Image Storage" not in name:
        raise ValueError(f"not an image: {name}")
    if "Rows" in header:
        return header.get("SeriesInstanceUID", ""), header.get("PatientID", "")
    if name or (is_dicom and not kind):
        return None
    raise ValueError(f"not an image: no (0028,0010) Rows, (0008,0016) SOPClassUID {kind or 'missing'}")


def unpack_head(head: bytes) -> bytes:
    """The first bytes of a file, unpacked where the file is gzipped or its dataset deflated."""
    with contextlib.suppress(zlib.error):
        if head[:2] == b"\x1f\x8b":
            head = zlib.decompressobj(31).decompress(head, HEAD_BYTES)
        if DEFLATED.encode() in head[:1024]:
            end = 144 + int.from_bytes(head[140:144], "little")  # of the file meta group, PS3.10 7.1
            dataset = zlib.decompressobj(-15).decompress(head[end:], HEAD_BYTES)
            head = head[:end].replace(DEFLATED.encode(), EXPLICIT.encode() + b"\0\0\0") + dataset
    return head


def parse_head(head: bytes) -> dict[str, str]:
    """What `read_identity` asks for, as far as the first bytes of a file tell, through pydicom."""
    names = ("SOPClassUID", "SeriesInstanceUID", "PatientID", "Rows")
    tags = [tag_for_keyword(name) for name in names]
    header = {}
    try:
        dataset = pydicom.filereader.read_partial(
            io.BytesIO(head), lambda tag, vr, length: tag > tags[-1], force=True, specific_tags=tags
        )
        for name in names:
            if name in dataset:
                header[name] = (dataset.get_item(name).value or b"").decode("latin-1").strip(" \0")
        stated = dataset.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID", "")
        header["SOPClassUID"] = str(stated)
    except Exception:  # pydicom raises many kinds on damaged bytes; what is known by then counts
        return header
    return header


@_one_line_errors
def read_header(path: Path) -> dict:
    """What one file says of its images. ValueError with the reason if it is no DICOM image, or damaged.

    The attributes of WANTED by name (numbers as a tuple; absent where missing, empty or unreadable), and
      spans        for each frame the (offset, length) pieces of its pixel data
      pixel_data   (VR, offset, length) of the element; length UNDEFINED if it is encapsulated
      little       byte order
      packed       offsets count in the unpacked file (`open_unpacked`)
      groups       for each frame the attributes of its functional groups, or None
      unreadable   what did not parse
    """
    return fast_header(path) or slow_header(path)


def fast_header(path: Path) -> dict | None:
    """`read_header` in 0.1 ms for plain little-endian files. None at the slightest doubt (odd VR, length or
    order, functional groups, a value that does not parse): then pydicom has to look at it."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for limit in (2**14, 2**18, 2**22):
            try:
                header = _walk_header(os.pread(file.fileno(), limit, 0))
            except ValueError:
                return None
            except struct.error:  # the header is longer
                continue
            header["spans"] = locate_frames(header, size, lambda at, n: os.pread(file.fileno(), n, at))
            return header
    return None


SHORT_VRS = set(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = set(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # two reserved bytes, then a 4-byte length
EXPLICIT_ELEMENT, IMPLICIT_ELEMENT = struct.Struct("<HH2sH"), struct.Struct("<HHI")


def _walk_header(head: bytes) -> dict:
    """The wanted elements before the pixel data. ValueError on doubt, struct.error where `head` ends."""
    if head[128:140] != b"DICM\x02\0\0\0UL\x04\0":
        raise ValueError("no file meta group length")
    position, last, explicit = 144, 0x00020000, True
    meta_end = 144 + int.from_bytes(_slice(head, 140, 4), "little")
    header: dict = {"little": True, "packed": False, "groups": None, "unreadable": []}
    while True:
        if position == meta_end:
            syntax = header.get("TransferSyntaxUID")
            explicit = syntax != IMPLICIT
            vr = _slice(head, position + 4, 2)
            if syntax not in (IMPLICIT, EXPLICIT, *DECODERS) or explicit != (vr.isalpha() and vr.isupper()):
                raise ValueError("another transfer syntax, or VRs that do not fit it")
        tag, vr, length, value = _element(head, position, explicit)
        if tag <= last or tag >> 16 == 0x5200 or (tag >> 16 == 2) != (position < meta_end):
            raise ValueError("tags out of order, or functional groups")
        last = tag
        if tag >= PIXEL_DATA - 2:
            if tag != PIXEL_DATA or vr not in (b"OB", b"OW", b""):
                raise ValueError("odd pixel data")
            header["pixel_data"] = (vr.decode() or "OW", value, length)
            return header
        if length == UNDEFINED:
            if vr != b"SQ" and not (vr == b"" and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"):
                raise ValueError("undefined length outside of a sequence")
            position = _skip_sequence(head, value, explicit)
            continue
        position = value + length
        if tag >> 16 == 2 and position > meta_end:
            raise ValueError("the file meta group is longer than it says")
        if tag == 0x00080005 and not (vr in (b"CS", b"") and CHARACTER_SET.fullmatch(head, value, position)):
            raise ValueError("odd SpecificCharacterSet")  # pydicom may refuse the file
        if tag in WANTED:
            name, expected = WANTED[tag]
            if vr and vr.decode() != expected and (vr, expected) != (b"SS", "US"):
                raise ValueError("another VR")
            parsed = parse_value(expected, _slice(head, value, length), "little")
            if parsed is not None:
                header[name] = parsed


def _slice(head: bytes, position: int, length: int) -> bytes:
    if position + length > len(head):
        raise struct.error("end of the bytes read so far")
    return head[position : position + length]


def _element(head: bytes, position: int, explicit: bool) -> tuple[int, bytes, int, int]:
    """(tag, VR, length, position of the value) of the little-endian element at `position`."""
    if not explicit:
        group, element, length = IMPLICIT_ELEMENT.unpack_from(head, position)
        return group << 16 | element, b"", length, position + 8
    group, element, vr, length = EXPLICIT_ELEMENT.unpack_from(head, position)
    tag = group << 16 | element
    if vr in SHORT_VRS:
        return tag, vr, length, position + 8
    if vr in LONG_VRS and length == 0:
        return tag, vr, int.from_bytes(_slice(head, position + 8, 4), "little"), position + 12
    if group == 0xFFFE:  # items and delimiters have no VR
        return tag, b"", int.from_bytes(vr, "little") | length << 16, position + 8
    raise ValueError("odd VR")


def _skip_sequence(head: bytes, position: int, explicit: bool, depth: int = 0) -> int:
    """End of the undefined-length sequence whose first item starts at `position`."""
    while True:
        tag, _, length, position = _element(head, position, explicit=False)
        if tag == 0xFFFEE0DD and length == 0:
            return position
        if tag != 0xFFFEE000 or depth > 8:
            raise ValueError("odd sequence")
        end = position + length  # of the item; far away where the length is undefined
        while position != end:
            tag, vr, inner, position = _element(head, position, explicit)
            if tag == 0xFFFEE00D and inner == 0 and length == UNDEFINED:
                break
            if tag >> 16 == 0xFFFE or position > end or (inner == UNDEFINED and vr != b"SQ"):
                raise ValueError("odd item")
            position += inner
            if inner == UNDEFINED:
                position = _skip_sequence(head, position - inner, explicit, depth + 1)


def parse_value(vr: str, raw: bytes, order: str) -> tuple | str | None:
    """Numbers as a tuple, text unpadded, None if empty. ValueError if malformed. `order`: little or big."""
    if vr in BINARY:
        count = len(raw) // struct.calcsize("=" + BINARY[vr])
        values = struct.unpack(f"{'>' if order == 'big' else '<'}{count}{BINARY[vr]}", raw)
    elif vr in ("DS", "IS"):
        text = raw.strip(b" \0")
        if text and not NUMBERS.fullmatch(text):
            raise ValueError(f"{text[:40]!r} is no number")
        values = tuple(map(float, text.split(b"\\"))) if text else ()
    else:
        return raw.decode("latin-1").strip(" \0") or None
    if not all(abs(value) < 1e12 for value in values):  # NaN too
        raise ValueError(f"{values[:6]} is out of range")
    return values or None


def slow_header(path: Path) -> dict:
    """`read_header` of any file, through pydicom."""
    with open_unpacked(path) as (file, is_deflated):
        start = file.read(132)
        has_preamble = start[128:] == b"DICM"
        if not start:
            raise ValueError("empty file")
        if not has_preamble and start[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
            raise ValueError("not DICOM: no DICM after 128 bytes, and group 0002 or 0008 does not come first")
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=not has_preamble)
        at_pixels = file.tell()
        size = file.seek(0, os.SEEK_END)

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        if dataset.file_meta.get("MediaStorageSOPClassUID") == "1.2.840.10008.1.3.10":
            raise ValueError("a DICOMDIR, no image")
        implicit, little = dataset.original_encoding
        order = "little" if little else "big"
        header, unreadable = _attributes(dataset, WANTED, order)
        header |= {"little": little, "packed": isinstance(file, io.BytesIO), "unreadable": unreadable}
        guess = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
        syntax = DEFLATED if is_deflated else str(dataset.file_meta.get("TransferSyntaxUID") or guess)
        header["TransferSyntaxUID"] = syntax
        element = read(at_pixels, 12)
        tag = int.from_bytes(element[:2], order) << 16 | int.from_bytes(element[2:4], order)
        if len(element) < 8 or tag != PIXEL_DATA:
            kind = header.get("Modality") or "no (0008,0060) Modality"
            raise ValueError(f"no image ({kind}): no (7FE0,0010) PixelData")
        if element[4:8] in (b"OB\0\0", b"OW\0\0", b"UN\0\0"):
            length = int.from_bytes(element[8:], order)
            header["pixel_data"] = (element[4:6].decode(), at_pixels + 12, length)
        else:
            header["pixel_data"] = ("OW", at_pixels + 8, int.from_bytes(element[4:8], order))
        header["groups"] = _functional_groups(dataset, order)
        header["spans"] = locate_frames(header, size, read)
        return header


def _attributes(dataset: pydicom.Dataset, table: dict, order: str) -> tuple[dict, list[str]]:
    """(the attributes of `table` in a dataset by name, those that do not parse)."""
    found, unreadable = {}, []
    for tag, (name, vr) in table.items():
        if tag not in dataset:
            continue
        try:
            element = dataset.get_item(tag)
            expected = (None, "UN", "US", "SS") if vr == "US" else (None, "UN", vr)
            if isinstance(element, RawDataElement) and element.VR in expected:
                value = parse_value(vr, element.value or b"", order)
            else:  # written with another VR: what pydicom makes of it
                value = dataset[tag].value
                values = [] if value is None else [value] if isinstance(value, str | float | int) else value
                kind = "DS" if vr in BINARY or vr == "IS" else vr
                value = parse_value(kind, "\\".join(map(str, values)).encode(), order)
        except Exception as error:  # pydicom raises many kinds; the attribute counts as missing, and is noted
            reason = " ".join(str(error).split())[:80]
            unreadable.append(f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {name} does not parse: {reason}")
            continue
        if value is not None:
            found[name] = value
    return found, unreadable


def _functional_groups(dataset: pydicom.Dataset, order: str) -> list[dict] | None:
    """For each frame of an enhanced file what its own and the shared functional groups say, else None."""

    def flat(item: pydicom.Dataset) -> dict:
        sequences = [item[tag].value for tag in FUNCTIONAL_GROUPS if tag in item]
        parts = [_attributes(sequence[0], IN_FRAME, order)[0] for sequence in sequences if sequence]
        return {name: value for part in parts for name, value in part.items()}

    shared, frames = (dataset[tag].value if tag in dataset else None for tag in (0x52009229, 0x52009230))
    common = flat(shared[0]) if shared else {}
    return [common | flat(item) for item in frames] if frames else [common] if shared else None


@contextlib.contextmanager
def open_unpacked(path: Path) -> typing.Iterator[tuple[typing.BinaryIO, bool]]:
    """(`path` open for reading, whether its dataset was deflated). A gzipped or deflated file is unpacked in
    memory, at most MAX_UNPACKED_BYTES; a deflated dataset then looks like explicit VR little endian."""
    with open(path, "rb") as file:
        head = file.read(2**16)
        file.seek(0)
        if head[:2] == b"\x1f\x8b":
            head = _inflate(file.read(), 31)
            file = io.BytesIO(head)
        is_deflated = head[128:132] == b"DICM" and DEFLATED.encode() in head[: 2**16]
        if is_deflated:
            data = file.read()
            end = 144 + int.from_bytes(data[140:144], "little")  # of the file meta group, PS3.10 7.1
            meta = data[:end].replace(DEFLATED.encode(), EXPLICIT.encode() + b"\0\0\0")
            file = io.BytesIO(meta + _inflate(data[end:], -15))
        yield file, is_deflated


def _inflate(data: bytes, window_bits: int) -> bytes:
    """Unpacked `data`; what grows beyond MAX_UNPACKED_BYTES is refused before it takes the memory."""
    unpacked = zlib.decompressobj(window_bits).decompress(data, MAX_UNPACKED_BYTES + 1)
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise ValueError(f"unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB: a decompression bomb?")
    return unpacked


def whole(header: dict, name: str, default: int = 0) -> int:
    """First value of an attribute as an int."""
    return int(header[name][0]) if name in header else default


def locate_frames(header: dict, size: int, read: typing.Callable[[int, int], bytes]) -> list[tuple]:
    """For each frame the (offset, length) pieces of its pixel data in a file of `size` bytes, of which
    `read(offset, length)` gives some. ValueError if the image is absurd or the file too short.

    Without (0028,0008) NumberOfFrames, native frames are counted from the length of the pixel data,
    compressed ones from the offset table or the fragments that start a code stream (RLE: every fragment is a
    frame).
    """
    rows, cols, bits = whole(header, "Rows"), whole(header, "Columns"), whole(header, "BitsAllocated")
    samples, stated = whole(header, "SamplesPerPixel", 1), whole(header, "NumberOfFrames")
    _, offset, length = header["pixel_data"]
    what = f"{max(stated, 1)} frames of {rows} x {cols} pixels of {samples} x {bits} bits"
    if rows < 1 or cols < 1 or samples not in (1, 3) or bits not in (8, 16, 32) or stated < 0:
        raise ValueError(f"unreadable image: {what}; expected 1 or 3 samples of 8, 16 or 32 bits")
    if rows * cols > MAX_FRAME_PIXELS:
        raise ValueError(f"absurd size: {what}, limit {MAX_FRAME_PIXELS} pixels")
    frame_bytes = rows * cols * samples * bits // 8
    if header.get("PhotometricInterpretation") == "YBR_FULL_422" and length != UNDEFINED:
        frame_bytes = rows * cols * 2
    if length == UNDEFINED:
        syntax = header["TransferSyntaxUID"]
        if syntax in (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED):
            raise ValueError(f"compressed pixel data, but (0002,0010) TransferSyntaxUID is {syntax}")
        spans = _fragments_by_frame(stated, offset, size, read, syntax == RLE)
    else:
        count, there = stated or max(1, length // frame_bytes), max(0, min(length, size - offset))
        if there < count * frame_bytes:
            raise ValueError(f"truncated: {there} of {count * frame_bytes} bytes of pixel data ({what})")
        spans = [((offset + i * frame_bytes, frame_bytes),) for i in range(count)]
    if frame_bytes * len(spans) > MAX_PIXEL_BYTES:
        raise ValueError(f"absurd size: {what}, limit {MAX_PIXEL_BYTES >> 20} MiB")
    return spans


def _fragments_by_frame(
    stated: int, offset: int, size: int, read: typing.Callable[[int, int], bytes], is_rle: bool
) -> list[tuple]:
    """Pieces of encapsulated pixel data by frame (PS3.5 A.4); `stated` is 0 where no number is given."""
    fragments, starts_stream, table, first = [], [], None, 0
    while offset + 8 <= size:
        start = read(offset, 12)
        length = int.from_bytes(start[4:8], "little")
        if start[:4] == b"\xfe\xff\xdd\xe0":
            break
        if start[:4] != b"\xfe\xff\x00\xe0":
            raise ValueError("damaged: no item where the next fragment of compressed pixel data should be")
        if offset + 8 + length > size:
            raise ValueError(f"truncated: {size - offset - 8} bytes left for a fragment of {length}")
        if table is None:
            table, first = read(offset + 8, length), offset + 8 + length
        else:
            fragments.append((offset + 8, length))
            starts_stream.append(start[8:10] in (b"\xff\xd8", b"\xff\x4f") or start[8:12] == b"\0\0\0\x0c")
        offset += 8 + length
    if not fragments:
        raise ValueError("truncated: compressed pixel data without a fragment")
    if stated == len(fragments) or (is_rle and not stated):
        return [(fragment,) for fragment in fragments]
    if stated == 1:
        return [tuple(fragments)]
    offsets = {int.from_bytes(table[i : i + 4], "little") for i in range(0, len(table), 4)}
    in_table = [fragment[0] - 8 - first in offsets for fragment in fragments]
    for is_start in (in_table, starts_stream):
        starts = [i for i, start in enumerate(is_start) if start]
        if starts[:1] == [0] and stated in (0, len(starts)):
            return [tuple(fragments[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
    raise ValueError(f"damaged: {len(fragments)} fragments of compressed data for {stated or 'some'} frames")


@dataclass(frozen=True)
class Frame:
    """One image: where it lies (LPS mm), what its stored values mean, and where its pixels are."""

    path: Path
    index: int  # in the file, from 0
    header: dict  # of the file (`read_header`), overlaid with the frame's own attributes
    sop_uid: str
    position: np.ndarray | None  # (3,) centre of the pixel in row 0, column 0
    row_dir: np.ndarray  # (3,) direction of a growing column index
    col_dir: np.ndarray  # (3,) direction of a growing row index
    spacing_mm: tuple[float, float]  # between rows, between columns
    thickness_mm: float  # 0 where absent
    rows: int
    cols: int
    slope: float  # value = slope * stored + intercept
    intercept: float
    padding: tuple[int, int] | None  # first and last of the stored values that are no tissue


@dataclass
class Series:
    """One volume: frames sorted along +normal. Pixels are decoded when asked for, kept until `forget`."""

    uid: str
    modality: str  # CT or MR
    patient: str  # (0010,0020) PatientID; like age and sex "" where absent
    age: str
    sex: str
    frames: list[Frame]
    positions_mm: np.ndarray  # (n,) along the normal
    normal: np.ndarray  # (3,)
    affine: (
        np.ndarray
    )  # (4, 4) (z, y, x) -> LPS mm; exact for even gaps, else least squares; sheared if tilted
    spacing_mm: tuple[float, float, float]  # slice (median gap), row, column
    plane: str  # axial, coronal or sagittal: the nearest
    transfer_syntax: str
    notes: list[str]  # everything that was left out, assumed or repaired
    skipped: list[tuple[Path, str]]  # files that are no slices, with the reason
    geometry: dict[tuple[str, int], Frame]  # (SOPInstanceUID, frame index) -> every image, left-out ones too
    _stored: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def stored(self, i: int) -> np.ndarray:
        """(rows, cols) stored values of slice `i`, integers; may be read-only. ValueError naming the file if
        it cannot be decoded; the volume can do without the slice."""
        if i not in self._stored:
            try:
                self._stored[i] = decode(self.frames[i])
            except ValueError as error:
                raise ValueError(f"{self.frames[i].path}, frame {self.frames[i].index}: {error}") from error
        return self._stored[i]

    def forget(self, i: int | None = None) -> None:
        """Free the stored values of slice `i`, or of all."""
        if i is None:
            self._stored.clear()
            _unpacked.cache_clear()
        else:
            self._stored.pop(i, None)

    def rescale(self, i: int) -> tuple[float, float]:
        """(slope, intercept) of slice `i` after repairs; an inverted MONOCHROME1 has a negative slope."""
        return self.frames[i].slope, self.frames[i].intercept

    def padding(self, i: int) -> tuple[int, int] | None:
        """First and last of the stored values of slice `i` that are padding, or None."""
        return self.frames[i].padding

    def values(self, i: int) -> np.ndarray:
        """(rows, cols) float32 rescaled values of slice `i` (CT: HU). Padding: -1024 in CT, 0 in MR."""
        stored, (slope, intercept), padding = self.stored(i), self.rescale(i), self.padding(i)
        values = stored.astype(np.float32)
        values *= slope
        values += intercept
        if padding:
            values[(stored >= padding[0]) & (stored <= padding[1])] = -1024 if self.modality == "CT" else 0
        return values

    def point(self, sop_uid: str, x: float, y: float, f: int | None = None) -> np.ndarray:
        """(3,) LPS mm of column `x`, row `y` of an image, `f` its frame (from 0). ValueError if unknown."""
        if f is None and (sop_uid, 1) in self.geometry:
            raise ValueError(f"series {self.uid}: {sop_uid} has several frames, and no frame is named")
        frame = self.geometry.get((sop_uid, int(f or 0)))
        if frame is None or frame.position is None:
            raise ValueError(
                f"series {self.uid}: no image {sop_uid}, frame {f or 0}, with a position of its own"
            )
        row_mm, col_mm = frame.spacing_mm
        return frame.position + x * col_mm * frame.row_dir + y * row_mm * frame.col_dir


@_one_line_errors
def decode(frame: Frame) -> np.ndarray:
    """(rows, cols) stored values of a frame: decompressed, colour as luminance, masked to BitsStored."""
    header = frame.header
    pieces = header["spans"][frame.index]
    if header["packed"]:
        unpacked = _unpacked(frame.path, os.stat(frame.path).st_mtime_ns)
        data = b"".join(unpacked[offset : offset + length] for offset, length in pieces)
    else:
        with open(frame.path, "rb", buffering=0) as file:
            data = b"".join(os.pread(file.fileno(), length, offset) for offset, length in pieces)
    if len(data) != sum(length for _, length in pieces):
        raise ValueError("the file became shorter while it was read")
    if header["pixel_data"][0] == "OW" and not header["little"] and len(data) == frame.rows * frame.cols:
        data = (
            np.frombuffer(data + bytes(len(data) % 2), "u2").byteswap().tobytes()[: len(data)]
        )  # 8-bit in words
    allocated, high_bit = whole(header, "BitsAllocated"), whole(header, "HighBit", -1)
    bits, signed = whole(header, "BitsStored", allocated), whole(header, "PixelRepresentation") == 1
    bits = bits if 1 <= bits <= allocated else allocated
    high_bit = high_bit if bits - 1 <= high_bit < allocated else bits - 1
    if header["pixel_data"][2] != UNDEFINED and whole(header, "SamplesPerPixel", 1) == 1:
        dtype = np.dtype(f"{'<' if header['little'] else '>'}{'i' if signed else 'u'}{allocated // 8}")
        stored = np.frombuffer(data, dtype).reshape(frame.rows, frame.cols)
        return mask_stored(stored.astype(dtype.newbyteorder("="), copy=False), bits, high_bit, signed)
    return mask_stored(_decode_with_pydicom(frame, data, bits), bits, bits - 1, signed)


@functools.lru_cache(maxsize=1)
def _unpacked(path: Path, _changed: int) -> memoryview:
    """A packed file's unpacked bytes, kept until the next one so that its frames do not unpack it again."""
    with open_unpacked(path) as (file, _):
        return file.getbuffer()


def mask_stored(array: np.ndarray, bits: int, high_bit: int, signed: bool) -> np.ndarray:
    """The `bits` bits up to `high_bit`, sign-extended if `signed`; others (overlays, garbage) go."""
    size = array.dtype.itemsize * 8
    array = array.view(f"{'i' if signed else 'u'}{size // 8}")
    if bits >= size:
        return array
    array = np.left_shift(array, max(size - 1 - high_bit, 0))
    return np.right_shift(array, size - bits, out=array)


def _decode_with_pydicom(frame: Frame, data: bytes, bits: int) -> np.ndarray:
    """(rows, cols) of compressed or colour pixel data through pydicom and its plug-ins."""
    header, is_native = frame.header, frame.header["pixel_data"][2] != UNDEFINED
    uid = pydicom.uid.UID(EXPLICIT if is_native else header["TransferSyntaxUID"])
    samples = whole(header, "SamplesPerPixel", 1)
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        raise ValueError(f"there is no decoder for transfer syntax {uid.name} ({uid})") from None
    if not decoder.is_available:
        raise ValueError(f"transfer syntax {uid.name} ({uid}) needs a decoder: pip install {DECODERS[uid]}")
    if not is_native:
        _check_stream(data, uid, (frame.rows, frame.cols, samples))
    default = "RGB" if samples == 3 else "MONOCHROME2"
    array, _ = decoder.as_array(
        data if is_native else encapsulate([data]),
        index=0,
        rows=frame.rows,
        columns=frame.cols,
        number_of_frames=1,
        samples_per_pixel=samples,
        bits_allocated=whole(header, "BitsAllocated"),
        bits_stored=bits,
        pixel_representation=whole(header, "PixelRepresentation"),
        photometric_interpretation=header.get("PhotometricInterpretation", default),
        planar_configuration=whole(header, "PlanarConfiguration"),
        pixel_keyword="PixelData",
    )
    if array.ndim == 3:
        array = (array @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(array.dtype)  # ITU-R BT.601
    if array.shape != (frame.rows, frame.cols):
        raise ValueError(f"decoded to {array.shape}, expected {(frame.rows, frame.cols)}")
    return np.ascontiguousarray(array)


def _check_stream(data: bytes, uid: str, expected: tuple[int, int, int]) -> None:
    """Refuses a code stream of another size than stated: 600 bytes can ask a decoder for gigabytes."""
    found, start = None, data.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000: SOC, SIZ
    if uid == RLE:
        return
    if start >= 0:
        width, height, left, top = struct.unpack_from(">4I", data, start + 8)
        found = (height - top, width - left, *struct.unpack_from(">H", data, start + 40))
    at = 2 if start < 0 else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:  # JPEG, JPEG-LS: segments up to the frame header SOFn
        marker = data[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            found = (*struct.unpack_from(">2H", data, at + 5), data[at + 9])
            break
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if found != expected:
        raise ValueError(f"the code stream holds {found} rows, columns, samples; the header says {expected}")


MIP_TYPES = {"MIP", "MINIP", "MIN IP", "MAX IP", "PROJECTION IMAGE", "PROJECTION", "VOLUME RENDERED", "VRT"}
SCOUT_TYPES = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "REF_SURVIEW"}
PHASE_TYPES = {"P", "PHASE", "R", "REAL", "I", "IMAGINARY", "PHASE MAP", "B0", "B0 MAP"}


def _image_types(header: dict) -> list[str]:
    return header.get("ImageType", "").upper().split("\\")


def modality_of(header: dict) -> str:
    """(0008,0060) Modality, else what (0008,0016) SOPClassUID implies, else ""."""
    stem = ".".join(header.get("SOPClassUID", "").split(".")[:9])
    implied = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}
    return header.get("Modality") or implied.get(stem, "")


def _refuse_what_is_no_slice(header: dict) -> None:
    types, modality = _image_types(header), modality_of(header)
    if modality not in ("CT", "MR", ""):
        raise ValueError(f"(0008,0060) Modality {modality}: not CT or MR")
    if "MOSAIC" in types or ("VFRAME" in types and "ImagePositionPatient" not in header):
        raise ValueError(f"a volume tiled in one image: (0008,0008) ImageType {header['ImageType']}")
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise ValueError("(0028,0004) PhotometricInterpretation PALETTE COLOR: colours without grey values")
    is_placed = header["groups"] or "ImagePositionPatient" in header
    if whole(header, "SamplesPerPixel", 1) == 3 and not is_placed:
        raise ValueError("a colour image without (0020,0032) ImagePositionPatient: a report or screenshot")


def frames_of(path: Path, header: dict) -> list[tuple[Frame, list[str]]]:
    """The images of one file, each with what was assumed for it. ValueError if they are no CT or MR slices.

    Orientation missing or not orthogonal: axial. Spacing missing: (0018,1100) ReconstructionDiameter over the
    matrix, else 1 mm. Frames without positions of their own: from the file's position, else 0, along +normal
    in steps of (0018,0088) SpacingBetweenSlices, else (0018,0050) SliceThickness, else the row spacing.
    """
    _refuse_what_is_no_slice(header)
    frames, groups = [], header["groups"] or []
    for index in range(len(header["spans"])):
        own = groups[index] if index < len(groups) else groups[0] if len(groups) == 1 else {}
        tags = header | own if own else header
        assumed = list(header["unreadable"])
        directions = _directions(tags.get("ImageOrientationPatient"))
        if directions is None:
            assumed.append("no valid (0020,0037) ImageOrientationPatient: axial assumed")
            directions = np.eye(3)[:2]
        spacing = tags.get("PixelSpacing", ())
        spacing = spacing * 2 if len(spacing) == 1 else spacing
        if len(spacing) != 2 or not all(1e-3 < value < 1e3 for value in spacing):
            diameter = tags.get("ReconstructionDiameter", (0,))[0] / max(tags["Rows"][0], tags["Columns"][0])
            spacing = (diameter,) * 2 if 1e-3 < diameter < 1e3 else (1.0, 1.0)
            assumed.append(f"no valid (0028,0030) PixelSpacing: {spacing[0]:.4g} mm assumed")
        position = tags.get("ImagePositionPatient", ())
        position = np.array(position) if len(position) == 3 and max(map(abs, position)) < 1e5 else None
        if len(header["spans"]) > 1 and "ImagePositionPatient" not in own:
            count = "" if "NumberOfFrames" in header else "number and "
            step, why = slice_step(tags, spacing[0])
            assumed.append(f"frames without {count}position placed {step:.4g} mm apart along +normal ({why})")
            position = np.zeros(3) if position is None else position
            position = position + index * step * np.cross(*directions)
        slope = tags.get("RescaleSlope", (1.0,))[0]
        if slope == 0:
            assumed.append("(0028,1053) RescaleSlope is 0: 1 assumed")
        frame = Frame(
            path=path,
            index=index,
            header=tags,
            sop_uid=header.get("SOPInstanceUID", ""),
            position=position,
            row_dir=directions[0],
            col_dir=directions[1],
            spacing_mm=spacing,
            thickness_mm=max(tags.get("SliceThickness", (0.0,))[0], 0.0),
            rows=whole(tags, "Rows"),
            cols=whole(tags, "Columns"),
            slope=slope or 1.0,
            intercept=tags.get("RescaleIntercept", (0.0,))[0],
            padding=_padding(tags),
        )
        frames.append((frame, assumed))
    return frames


def slice_step(tags: dict, row_mm: float) -> tuple[float, str]:
    """(mm from slice to slice, the attribute that says so) where positions do not tell."""
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        step = abs(tags.get(name, (0.0,))[0])
        if 1e-3 < step < 1e3:
            return step, name
    return row_mm, "the row spacing"


@functools.lru_cache(maxsize=256)
def _directions(orientation: tuple | None) -> np.ndarray | None:
    """(2, 3) unit row and column directions, or None if they are missing, zero or not orthogonal."""
    if orientation is None or len(orientation) != 6 or max(map(abs, orientation)) > 1e3:
        return None
    directions = np.array(orientation).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    if lengths.min() < 1e-3 or abs(directions[0] @ directions[1]) > 0.02 * lengths.prod():
        return None
    return directions / lengths


def _padding(tags: dict) -> tuple[int, int] | None:
    """(0028,0120) PixelPaddingValue to (0028,0121) PixelPaddingRangeLimit, in the sign of stored values."""
    if "PixelPaddingValue" not in tags:
        return None
    first = whole(tags, "PixelPaddingValue")
    ends = [first, whole(tags, "PixelPaddingRangeLimit", first)]
    if whole(tags, "PixelRepresentation") == 1:
        bits = whole(tags, "BitsAllocated")
        ends = [end - 2**bits if end >= 2 ** (bits - 1) else end for end in ends]
    return min(ends), max(ends)


def read_series(source: Path | list[Path], uid: str | None = None) -> Series:
    """One volume from a folder of any depth, or from a list of files.

    Files are recognised by content. Images of series `uid` are used if there are any, else all. The volume is
    the largest group (by positions) of CT or MR images that agree in series, size, orientation (1e-3) and
    pixel spacing (1e-3 relative); scouts and projections (MIP) only where nothing else is there. One image is
    kept per position (`_one_volume`). ValueError (one line) if there is no volume: mosaics, projections,
    radiographs, reports.
    """
    where = f"{len(source)} files" if isinstance(source, list) else str(source)
    paths = source if isinstance(source, list) else [Path(source)]
    if paths == [Path(where)] and paths[0].is_dir():
        paths = [Path(folder, name) for folder, _, names in os.walk(where) for name in names]
    found, intact, skipped, notes = [], [], [], []
    for path in sorted(paths, key=natural_key):
        try:
            header = read_header(path)
            intact.append(path)
            found += frames_of(path, header)
        except ValueError as error:
            skipped.append((path, str(error)))
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):
                raise ValueError(f"{path}: {error}; the disk is at fault, not the file: try again") from error
    damaged = [(path, reason) for path, reason in skipped if reason.startswith(("truncated", "damaged"))]
    num_images = len(intact) + len(damaged)
    if found and len(damaged) > max(1, num_images // 10):
        path, reason = damaged[0]
        raise ValueError(
            f"{where}: {len(damaged)} of {num_images} images are damaged ({path.name}: {reason}); expected "
            f"at most a tenth. Copy the series again"
        )
    if not found:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:3])
        raise ValueError(f"{where}: no CT or MR slice in {len(paths)} files. {reasons}")
    frames, assumed = [frame for frame, _ in found], {id(frame): texts for frame, texts in found}
    geometry = _by_image(frames)
    frames = _largest_group(frames, uid, where, notes)
    for text, count in collections.Counter(text for frame in frames for text in assumed[id(frame)]).items():
        notes.append(f"{text} ({count} of {len(frames)} images)")
    frames = _placed(frames, notes)
    geometry |= _by_image(frames)
    frames = _one_volume(frames, notes)
    header = frames[0].header
    modality, patient = modality_of(header), header.get("PatientID", "")
    if not modality:
        modality = "CT" if min(frame.intercept for frame in frames) <= -500 else "MR"
        notes.append(f"no (0008,0060) Modality: {modality} assumed from (0028,1052) RescaleIntercept")
    normal, affine, spacing, positions = _stack(frames, notes)
    return Series(
        uid=safe_uid(uid or header.get("SeriesInstanceUID") or os.path.abspath(frames[0].path.parent)),
        modality=modality,
        patient=patient,
        age=header.get("PatientAge", ""),
        sex=header.get("PatientSex", ""),
        frames=_repaired(frames, modality, notes),
        positions_mm=positions,
        normal=normal,
        affine=affine,
        spacing_mm=spacing,
        plane=("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())],
        transfer_syntax=header["TransferSyntaxUID"],
        notes=notes,
        skipped=skipped,
        geometry=geometry,
    )


def _by_image(frames: list[Frame]) -> dict[tuple[str, int], Frame]:
    """(SOPInstanceUID, frame index) -> image. A UID that files at several places share tells nothing: left
    out."""
    images: dict[tuple[str, int], Frame] = {}
    shared = set()
    for frame in frames:
        first = images.setdefault((frame.sop_uid, frame.index), frame)
        if not np.array_equal(first.position, frame.position):
            shared.add((frame.sop_uid, frame.index))
    return {key: frame for key, frame in images.items() if key not in shared}


def _image_kind(frame: Frame) -> str:
    types = set(_image_types(frame.header))
    return "projection" if types & MIP_TYPES else "scout" if types & SCOUT_TYPES else "slice"


def _largest_group(frames: list[Frame], uid: str | None, where: str, notes: list[str]) -> list[Frame]:
    """The images of one stack, as `read_series` says; the others are noted."""
    if uid and any(frame.header.get("SeriesInstanceUID") == uid for frame in frames):
        own = [frame for frame in frames if frame.header.get("SeriesInstanceUID", uid) == uid]
        if len(own) < len(frames):
            notes.append(f"{len(frames) - len(own)} images of other series left out")
        frames = own
    groups: list[tuple[tuple, np.ndarray, list[Frame]]] = []  # what must be equal, what nearly, members
    members_of: dict[tuple, list[Frame]] = {}
    for frame in frames:
        equal = (frame.header.get("SeriesInstanceUID", ""), _image_kind(frame), frame.rows, frame.cols)
        exact = (*equal, *frame.spacing_mm, *frame.row_dir.tolist(), *frame.col_dir.tolist())
        if exact not in members_of:
            nearly = np.array([*np.log(frame.spacing_mm), *frame.row_dir, *frame.col_dir])
            same = [g for g in groups if g[0] == equal and np.abs(g[1] - nearly).max() < 1e-3]
            if not same:
                same = [(equal, nearly, [])]
                groups += same
            members_of[exact] = same[0][2]
        members_of[exact].append(frame)

    def rank(group: tuple) -> tuple:
        (_, kind, *_), _, members = group
        points = [frame.position for frame in members if frame.position is not None]
        at = np.sort(points @ np.cross(members[0].row_dir, members[0].col_dir)) if points else np.zeros(0)
        positions = len(members) - len(at) + (np.diff(at) > SAME_POSITION_MM).sum() + bool(len(at))
        return kind == "slice", positions, len(members)

    best = max(groups, key=rank)
    if best[0][1] == "projection" and rank(best)[1] == 1:
        raise ValueError(f"{where}: {len(frames)} projection images (MIP), no volume")
    for equal, nearly, members in groups:
        _, kind, rows, cols = equal
        if members is not best[2]:
            other = " of another series" if equal[0] != best[0][0] else ""
            row_mm, col_mm = np.exp(nearly[:2])
            direction = np.array2string(np.cross(nearly[2:5], nearly[5:]), precision=2, suppress_small=True)
            notes.append(
                f"{len(members)} images{other} left out: {kind}, {rows} x {cols} pixels of {row_mm:.3g} x "
                f"{col_mm:.3g} mm, normal {direction}"
            )
        elif kind != "slice":
            notes.append(f"the images call themselves {kind}: ImageType {members[0].header['ImageType']}")
    return best[2]


def _number(frame: Frame, name: str) -> float | None:
    return frame.header[name][0] if name in frame.header else None


def _placed(frames: list[Frame], notes: list[str]) -> list[Frame]:
    """Every frame with a position. Where (0020,0032) ImagePositionPatient is all the same, by (0020,1041)
    SliceLocation if that differs. Where it is missing, in this order: on the straight line that the others
    follow by InstanceNumber; at (0020,1041) SliceLocation; at (0020,0013) InstanceNumber, else the rank of
    the file name, times `slice_step`; all but the first along +normal. Each is noted."""
    normal = np.cross(frames[0].row_dir, frames[0].col_dir)
    known = [frame for frame in frames if frame.position is not None]
    missing = len(frames) - len(known)
    locations = [_number(frame, "SliceLocation") for frame in frames]
    has_locations = None not in locations and np.ptp(locations) > SAME_POSITION_MM
    if not missing:
        is_one_place = np.ptp([frame.position for frame in frames], axis=0).max() < SAME_POSITION_MM
        if not (is_one_place and has_locations):
            return frames
        notes.append("(0020,0032) ImagePositionPatient is one and the same: (0020,1041) SliceLocation used")
        offsets = [mm - locations[0] for mm in locations]
        return [replace(f, position=f.position + mm * normal) for f, mm in zip(frames, offsets, strict=True)]
    if known:
        line = _line_by_number(known)
        placed = [frame if frame.position is not None else _on_line(frame, line) for frame in frames]
        placed = [frame for frame in placed if frame.position is not None]
        notes.append(
            f"{missing} of {len(frames)} images without (0020,0032) ImagePositionPatient: "
            f"{len(frames) - len(placed)} left out, the others placed by (0020,0013) InstanceNumber"
        )
        return placed
    step, why = slice_step(frames[0].header, frames[0].spacing_mm[0])
    numbers = [_number(frame, "InstanceNumber") for frame in frames]
    if has_locations:
        how, at = "(0020,1041) SliceLocation", locations
    elif None not in numbers and len(set(numbers)) == len(numbers):
        how, at = f"(0020,0013) InstanceNumber times {step:.4g} mm ({why})", np.array(numbers) * step
    else:
        how, at = f"the order of file names times {step:.4g} mm ({why})", np.arange(len(frames)) * step
    notes.append(f"no (0020,0032) ImagePositionPatient: slices placed along +normal by {how}")
    return [replace(frame, position=mm * normal) for frame, mm in zip(frames, at, strict=True)]


def _line_by_number(frames: list[Frame]) -> np.ndarray | None:
    """(2, 3) start and step of the line that positions follow by InstanceNumber to 0.1 mm, or None."""
    numbered = [frame for frame in frames if "InstanceNumber" in frame.header]
    design = np.array([(1.0, _number(frame, "InstanceNumber")) for frame in numbered]).reshape(-1, 2)
    positions = np.array([frame.position for frame in numbered]).reshape(-1, 3)
    if len(np.unique(design, axis=0)) < 2:
        return None
    line = np.linalg.lstsq(design, positions, rcond=None)[0]
    return line if np.abs(design @ line - positions).max() < 0.1 else None


def _on_line(frame: Frame, line: np.ndarray | None) -> Frame:
    if line is None or "InstanceNumber" not in frame.header:
        return frame
    return replace(frame, position=np.array([1.0, _number(frame, "InstanceNumber")]) @ line)


def _type_order(frame: Frame) -> tuple:
    """Magnitude first, phase, real and imaginary last; original before derived."""
    types = [*_image_types(frame.header), frame.header.get("ComplexImageComponent", "").upper()]
    is_magnitude = any(word in ("M", "MAGNITUDE") or word.startswith("M_") for word in types)
    return 0 if is_magnitude else 2 if PHASE_TYPES & set(types) else 1, "DERIVED" in types, tuple(types)


VOLUME_KEYS = (  # what tells the volumes of one series apart, in the order tried
    *("ImageType", "EchoNumbers", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue"),
    *("AcquisitionNumber", "TriggerTime", "StackID"),
)


def _one_volume(frames: list[Frame], notes: list[str]) -> list[Frame]:
    """One frame per position, sorted along +normal.

    Copies (same SOPInstanceUID, frame and position) go first. Then, while positions are shared, each
    attribute of VOLUME_KEYS in turn: if one of its values occurs at every position (second round: at 90 % of
    them), the images with the first such value stay (magnitude before phase, absent before small before
    large). What still shares a position is settled by the lowest InstanceNumber.
    """
    at = np.array([frame.position for frame in frames]) @ np.cross(frames[0].row_dir, frames[0].col_dir)
    order = np.argsort(at, kind="stable")
    place = np.zeros(len(frames), int)  # of each frame, the rank of its position
    place[order[1:]] = np.cumsum(np.diff(at[order]) > SAME_POSITION_MM)
    images: dict[tuple, tuple[int, Frame]] = {}
    for i, frame in enumerate(frames):
        images.setdefault((frame.sop_uid or i, frame.index, place[i]), (place[i], frame))
    kept, num_places = list(images.values()), int(place.max()) + 1
    if len(kept) < len(frames):
        notes.append(f"{len(frames) - len(kept)} copies of images left out: same SOPInstanceUID and position")

    def value_of(frame: Frame, name: str) -> tuple:
        if name == "ImageType":
            return _type_order(frame)
        return name in frame.header, frame.header.get(name, "")

    for share, name in itertools.product((1.0, 0.9), VOLUME_KEYS):
        if len(kept) == num_places:
            break
        values = collections.defaultdict(list)
        for p, frame in kept:
            values[value_of(frame, name)].append((p, frame))
        complete = [v for v in sorted(values) if len({p for p, _ in values[v]}) >= share * num_places]
        if len(values) > 1 and complete:
            kept = values[complete[0]]
            notes.append(f"{len(values)} volumes by {name}: the first complete one kept ({len(kept)} images)")
    kept.sort(key=lambda item: (item[0], value_of(item[1], "InstanceNumber")))
    first = [frame for i, (p, frame) in enumerate(kept) if i == 0 or kept[i - 1][0] != p]
    if len(first) < len(kept):
        notes.append(f"{len(kept) - len(first)} images left out at positions taken by a lower InstanceNumber")
    return first


def _stack(frames: list[Frame], notes: list[str]) -> tuple[np.ndarray, np.ndarray, tuple, np.ndarray]:
    """(normal, affine, spacing, positions along the normal) of sorted frames; gaps and tilt are noted."""
    normal = np.cross(frames[0].row_dir, frames[0].col_dir)
    normal /= np.linalg.norm(normal)
    points = np.array([frame.position for frame in frames])  # (n, 3)
    at, (row_mm, col_mm) = points @ normal, frames[0].spacing_mm
    if len(frames) == 1:
        gap, why = slice_step(frames[0].header, row_mm)
        start, step = points[0], gap * normal
        notes.append(f"a single slice: {gap:.4g} mm thick ({why})")
    else:
        gaps = np.diff(at)
        gap, widest = float(np.median(gaps)), int(gaps.argmax())
        start, step = np.polynomial.polynomial.polyfit(np.arange(len(at)), points, 1)
        origin, drift = np.polynomial.polynomial.polyfit(at, points, 1)  # by mm along the normal
        tilt = np.linalg.norm(drift - normal)
        bend = np.abs(points - np.outer(at, drift) - origin).max()
        if gaps[widest] > 1.5 * gap:
            notes.append(
                f"{(gaps > 1.5 * gap).sum()} gaps of more than 1.5 x the median {gap:.3f} mm, the widest of "
                f"{gaps[widest]:.3f} mm after slice {widest}: slices missing or uneven"
            )
        if tilt > 1e-3:
            notes.append(f"tilted: the stack leaves the slice normal by {tilt:.4f} mm per mm")
        if bend > 0.5:
            notes.append(f"slices lie up to {bend:.2f} mm beside a straight stack")
    affine = np.eye(4)
    affine[:3] = np.stack([step, row_mm * frames[0].col_dir, col_mm * frames[0].row_dir, start], axis=1)
    return normal, affine, (gap, row_mm, col_mm), at


def _repaired(frames: list[Frame], modality: str, notes: list[str]) -> list[Frame]:
    """Values that the pixels contradict, put right for the whole series by a look at three slices."""
    header = frames[0].header
    signed = whole(header, "PixelRepresentation") == 1
    if modality == "CT":
        stated = {frame.intercept for frame in frames if "RescaleIntercept" in frame.header}
        usual = stated.pop() if len(stated) == 1 else -1024.0 if not stated and not signed else None
        lacking = sum("RescaleIntercept" not in frame.header for frame in frames)
        if lacking and usual:
            notes.append(f"no (0028,1052) RescaleIntercept in {lacking} CT images: {usual:g} assumed")
            frames = [f if "RescaleIntercept" in f.header else replace(f, intercept=usual) for f in frames]
    may_be_hu = modality == "CT" and signed and all(-1100 < frame.intercept < -900 for frame in frames)
    is_mono1 = header.get("PhotometricInterpretation") == "MONOCHROME1"
    samples = []
    if may_be_hu or is_mono1:
        for frame in (frames[len(frames) * k // 4] for k in (1, 2, 3)):
            with contextlib.suppress(ValueError):  # told when the slice is used
                samples.append((decode(frame), frame.padding))
    if may_be_hu and samples and _is_hu(samples):
        notes.append("(0028,1052) RescaleIntercept near -1024, but the stored values are HU: 0 used")
        frames = [replace(frame, intercept=0.0) for frame in frames]
    if is_mono1 and samples and _has_bright_border([stored for stored, _ in samples]):
        notes.append("(0028,0004) PhotometricInterpretation MONOCHROME1 with a bright background: inverted")
        ends = -1 if signed else 2 ** whole(header, "BitsStored", 16) - 1  # lowest plus highest stored value
        frames = [replace(f, slope=-f.slope, intercept=f.intercept + f.slope * ends) for f in frames]
    f = frames[0]
    if modality == "CT" and f.padding and -500 < f.slope * f.padding[1] + f.intercept < 3000:
        notes.append(f"(0028,0120) PixelPaddingValue {f.padding[1]} would be tissue: not used")
        frames = [replace(frame, padding=None) for frame in frames]
    return frames


def _is_hu(samples: list[tuple]) -> bool:
    """Whether stored CT values are HU: 5 % of the pixels (padding aside) are air near -1000, and of those
    above 300 less than half lie at 1024 +- 100, where soft tissue would be if 1024 were still to be
    subtracted."""
    values = np.concatenate([s[(s < p[0]) | (s > p[1])] if p else s.ravel() for s, p in samples])
    high = values[values > 300]
    has_air = ((values > -1050) & (values < -950)).sum() > 0.05 * values.size
    return bool(has_air and ((high > 924) & (high < 1224)).sum() <= 0.5 * high.size)


def _has_bright_border(samples: list[np.ndarray]) -> bool:
    border = np.concatenate([edge for s in samples for edge in (s[0], s[-1], s[:, 0], s[:, -1])])
    return bool(np.median(border) > np.median(np.concatenate([s.ravel() for s in samples])))


# --- volume -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """A series as the models see it: voxels uint8 (Z, H, W), affine (4, 4) from (z, y, x, 1) to LPS mm,
    notes."""

    voxels: np.ndarray
    affine: np.ndarray
    notes: list[str]
    doubts: list[str] = field(default_factory=list)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(z, y, x)"""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))


@dataclass(frozen=True)
class Box:
    """The region of interest in canonical millimetres: lower edges, mm per voxel and voxels along
    (z, y, x)."""

    low: np.ndarray
    steps: np.ndarray
    shape: tuple[int, int, int]

    def edges(self, axis: int) -> np.ndarray:
        """(shape + 1,) mm of the voxels' edges along an axis."""
        return self.low[axis] + self.steps[axis] * np.arange(self.shape[axis] + 1)


@dataclass(frozen=True)
class Grid:
    """Where a series' pixels lie along the canonical axes (z, y, x), reached by permutation and flips alone.

    Millimetres along an axis are the dot product of an LPS point and the axis' direction. Slices are counted
    (k) in the order of growing millimetres; the image axes are the two canonical axes other than `through`.
    """

    series: Series
    directions: np.ndarray  # (3, 3) a row per canonical axis: its unit vector in LPS
    through: int  # the axis across slices: 0 axial, 1 coronal, 2 sagittal
    order: np.ndarray  # (n,) index into series.frames
    centres: np.ndarray  # (n,) mm along `through`
    spans: np.ndarray  # (n, 2) mm that each slice stands for
    image_axes: tuple[int, int]
    is_transposed: bool  # image[row, column] -> image[column, row]
    is_flipped: tuple[bool, bool]  # after that
    steps: np.ndarray  # (2,) mm per pixel along the image axes
    shape: tuple[int, int]  # pixels along the image axes
    edges: np.ndarray  # (n, 2) mm of the outer edge of each slice's first pixel: gantry tilt moves it
    lost: dict[int, str]  # index into series.frames -> why it cannot be decoded; grows while decoding

    def image(self, k: int) -> np.ndarray:
        """Stored values of slice k along its canonical axes. One that cannot be decoded is written to `lost`
        and comes out as zeros; ValueError if these are more than a tenth of the series."""
        i = int(self.order[k])
        try:
            stored = self.series.stored(i)
        except ValueError as error:
            self.lost[i] = str(error)
            if len(self.lost) > max(1, len(self.series.frames) // 10) or len(self.lost) == len(
                self.series.frames
            ):
                raise
            return np.zeros(self.shape, np.int16)
        image = stored.T if self.is_transposed else stored
        return image[:: -1 if self.is_flipped[0] else 1, :: -1 if self.is_flipped[1] else 1]

    def extent_mm(self, axis: int) -> tuple[float, float]:
        """Outer edges of what was scanned along a canonical axis (in the image: of the middle slice)."""
        if axis == self.through:
            return float(self.spans.min()), float(self.spans.max())
        side = self.image_axes.index(axis)
        low = float(self.edges[len(self.edges) // 2, side])
        return low, low + self.shape[side] * float(self.steps[side])


def canonical_grid(series: Series, lost: dict[int, str] | None = None) -> Grid:
    """The best of the six permutations by the sum of |cosines|, then flips; every slice keeps its own
    position."""
    first = series.frames[0]
    normal = np.asarray(series.normal, float) / np.linalg.norm(series.normal)
    along_row = np.asarray(first.row_dir, float) - normal * np.dot(first.row_dir, normal)
    along_row /= np.linalg.norm(along_row)
    along_column = np.cross(normal, along_row)
    along_column *= np.sign(np.dot(along_column, first.col_dir))
    stored = np.stack(
        [normal, along_column, along_row]
    )  # LPS directions of growing slice, row and column number
    cosines = stored[:, ::-1]  # with z, y, x
    axes = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(cosines[axes, range(3)])))
    signs = np.where(cosines[axes, range(3)] < 0, -1.0, 1.0)
    directions = stored[list(axes)] * signs[:, None]

    through = axes.index(0)
    image_axes = tuple(axis for axis in range(3) if axis != through)
    shape = tuple(int((0, first.rows, first.cols)[axes[axis]]) for axis in image_axes)
    steps = np.array([float(series.spacing_mm[axes[axis]]) for axis in image_axes])
    is_flipped = tuple(bool(signs[axis] < 0) for axis in image_axes)

    lost = {} if lost is None else lost
    kept = np.array([i for i in range(len(series.frames)) if i not in lost])
    centres_mm = (
        np.array([series.frames[i].position for i in kept], float) @ directions.T
    )  # (n, 3) of the first pixel
    order = np.argsort(centres_mm[:, through], kind="stable")
    centres_mm = centres_mm[order]
    first_pixel = np.where(
        is_flipped, np.array(shape) - 0.5, 0.5
    )  # pixels from the view's lower edge to its centre
    return Grid(
        series=series,
        directions=directions,
        through=through,
        order=kept[order],
        centres=centres_mm[:, through],
        spans=slice_spans(centres_mm[:, through], float(series.spacing_mm[0])),
        image_axes=image_axes,
        is_transposed=axes[image_axes[0]] == 2,
        is_flipped=is_flipped,
        steps=steps,
        shape=shape,
        edges=centres_mm[:, image_axes] - first_pixel * steps,
        lost=lost,
    )


def slice_spans(centres: np.ndarray, thickness_mm: float) -> np.ndarray:
    """(n, 2): the interval that each of n growing slices stands for: to the midpoints between neighbours, but
    at most 0.75 of the median gap to either side (a missing slice leaves a hole); thickness_mm where there is
    only one."""
    gaps = np.diff(centres)
    usual = float(np.median(gaps[gaps > 1e-6])) if (gaps > 1e-6).any() else thickness_mm
    half = np.minimum(gaps, 1.5 * usual) / 2
    return np.stack([centres - np.r_[usual / 2, half], centres + np.r_[half, usual / 2]], axis=1)


def slab_weights(spans: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (Z, n) of n slices in Z slabs, by how much of the slab each span (n, 2) covers; rows sum to 1.

    A slab that no span touches (missing slices) is interpolated between its neighbours; the second result
    (Z,) says which. Beyond all spans the nearest slice counts.
    """
    low, high = edges[:-1, None], edges[1:, None]  # (Z, 1)
    weights = np.clip(np.minimum(high, spans[:, 1]) - np.maximum(low, spans[:, 0]), 0, None)
    is_hole = weights.sum(axis=1) < 1e-6 * np.diff(edges)
    weights[is_hole] = line_weights(spans.mean(axis=1), (edges[:-1] + edges[1:])[is_hole] / 2)
    return weights / weights.sum(axis=1, keepdims=True), is_hole


def line_weights(centres: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Weights (P, n) of linear interpolation between n growing centres at P places; the nearest beyond the
    ends."""
    at = np.interp(places, centres, np.arange(len(centres)))  # fractional slice number
    return np.clip(1 - np.abs(at[:, None] - np.arange(len(centres))), 0, None)


def to_voxel(points_lps: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """LPS mm (P, 3) -> voxels (P, 3), (z, y, x); voxel centres are whole numbers."""
    inverse = np.linalg.inv(affine)
    return np.asarray(points_lps, float).reshape(-1, 3) @ inverse[:3, :3].T + inverse[:3, 3]


def to_lps(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels (P, 3), (z, y, x) -> LPS mm (P, 3)."""
    return np.asarray(voxels, float).reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]


def make_volume(series: Series, settings: VolumeSettings) -> Volume:
    """The box below the top of the head as settings.base_slices slabs of settings.img_size pixels, uint8.

    The box is roi_mm wide, centred on the head, and roi_top_mm deep, along z cut to what was scanned. A slab
    is the area-weighted mean of the slices in it; pixels are area means where
    the image shrinks, linear where it grows, at equal mm in both directions, 0 outside of the image. CT:
    ct_window becomes 0..255; else mr_percentiles of the box. Slices outside are not decoded, except up to 30
    to find the head.
    """
    lost: dict[int, str] = {}
    while True:  # once more without the slices that could not be decoded
        num_lost, notes = len(lost), []
        grid = canonical_grid(series, lost)
        head = find_head(grid)
        if head is None:
            notes.append("head not found: the box starts at the top of the scan, centred on it")
            head = (grid.extent_mm(0)[1], *(sum(grid.extent_mm(axis)) / 2 for axis in (1, 2)))
        box = _box(grid, head, settings)
        limits = (
            tuple(settings.ct_window) if series.modality == "CT" else _percentiles(grid, box, settings, notes)
        )
        slabs = _axial_slabs if grid.through == 0 else _sliced_slabs
        voxels = slabs(grid, box, limits, notes)  # (Z, H, W) uint8
        series.forget()
        if len(lost) == num_lost:
            break
    if lost:
        notes.append(f"{len(lost)} slices left out, they cannot be decoded: {lost[min(lost)]}")
    affine = np.eye(4)
    affine[:3, :3] = grid.directions.T * box.steps
    affine[:3, 3] = grid.directions.T @ (box.low + box.steps / 2)
    return Volume(voxels, affine, notes)


def _box(grid: Grid, head: tuple[float, float, float], settings: VolumeSettings) -> Box:
    """The box under a head's (top, centre y, centre x) in mm. Along the image axes its edge is moved to the
    nearest pixel edge of the middle slice, so that resizing is exact."""
    bottom, covered = grid.extent_mm(0)
    top = min(head[0], covered)
    low = np.array(
        [max(top - settings.roi_top_mm, bottom), head[1] - settings.roi_mm / 2, head[2] - settings.roi_mm / 2]
    )
    steps = np.array([(top - low[0]) / settings.base_slices, *[settings.roi_mm / settings.img_size] * 2])
    for axis, step in zip(grid.image_axes, grid.steps, strict=True):
        start = grid.extent_mm(axis)[0]
        low[axis] = start + round((low[axis] - start) / step) * step
    return Box(low, steps, (settings.base_slices, settings.img_size, settings.img_size))


def _window_size(grid: Grid, box: Box) -> tuple[int, int]:
    """Pixels along the image axes that cover the box, and one more."""
    axes = list(grid.image_axes)
    size = np.ceil(np.array(box.shape)[axes] * box.steps[axes] / grid.steps - 1e-6).astype(int) + 1
    if size.max() > 8192:
        raise ValueError(f"(0028,0030) PixelSpacing {grid.steps.min():g} mm: expected at least 0.03 mm")
    return tuple(int(length) for length in size)


def _overlap(grid: Grid, k: int, box: Box, size: tuple[int, int]) -> tuple[tuple, tuple]:
    """Slices of image k and of a window of `size` pixels at the box's lower edge, where the two overlap. The
    slice's own position counts, to a whole pixel, so gantry tilt is corrected."""
    source, target = [], []
    for side, axis in enumerate(grid.image_axes):
        start = round(float((box.low[axis] - grid.edges[k, side]) / grid.steps[side]))
        first = min(max(start, 0), grid.shape[side])
        last = max(min(start + size[side], grid.shape[side]), first)
        source.append(slice(first, last))
        target.append(slice(first - start, last - start) if last > first else slice(0, 0))
    return tuple(source), tuple(target)


def _load_window(
    grid: Grid, k: int, box: Box, limits: tuple[float, float], out: np.ndarray
) -> tuple[float, float]:
    """Fill out (h, w) float32 with the stored values of slice k from the box's lower edge on, clipped at the
    limits; outside of the image and for padding the lower one. Returns (gain, bias): limits -> 0..1 is gain *
    out + bias."""
    i = int(grid.order[k])
    slope, intercept = grid.series.rescale(i)
    dark, bright = ((value - intercept) / slope for value in limits)  # as stored; dark > bright if slope < 0
    source, target = _overlap(grid, k, box, out.shape)
    image, inside = grid.image(k)[source], out[target]
    if inside.shape != out.shape:
        out[:] = dark
    np.clip(
        image, np.float32(min(dark, bright)), np.float32(max(dark, bright)), out=inside, casting="same_kind"
    )
    padding = grid.series.padding(i)
    if padding is not None:
        inside[(image >= padding[0]) & (image <= padding[1])] = dark
    grid.series.forget(i)
    return 1 / (bright - dark), -dark / (bright - dark)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """0..1 -> 0..255, rounded; what lies beyond is clipped."""
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def resize_exactly(image: np.ndarray, factors: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale (h, w) float32 by factors per axis, its outer upper left edge staying in place, then cut to
    shape: area means along an axis that shrinks, linear along one that grows."""
    for shrinks, method in ((True, cv2.INTER_AREA), (False, cv2.INTER_LINEAR)):
        fy, fx = (float(factor) if (factor < 1) == shrinks else 1.0 for factor in factors)
        if fy != 1 or fx != 1:
            image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=method)
    return image[: shape[0], : shape[1]]


def _axial_slabs(grid: Grid, box: Box, limits: tuple[float, float], notes: list[str]) -> np.ndarray:
    """(Z, H, W) of slices stacked along z: merged to slabs at their own resolution, then each slab resized
    once."""
    weights, is_hole = slab_weights(grid.spans, box.edges(0))
    if is_hole.any():
        notes.append(f"{int(is_hole.sum())} slabs lie where slices are missing: interpolated")
    image = np.empty(_window_size(grid, box), np.float32)
    voxels = np.empty(box.shape, np.uint8)
    loaded = None
    for z in range(box.shape[0]):
        slab, offset = np.zeros_like(image), 0.0
        for k in np.flatnonzero(weights[z]):
            if k != loaded:  # a slice on an edge belongs to two slabs
                gain, bias = _load_window(grid, loaded := int(k), box, limits, out=image)
            cv2.scaleAdd(image, gain * float(weights[z, k]), slab, slab)
            offset += bias * float(weights[z, k])
        slab += np.float32(offset)
        voxels[z] = _to_uint8(resize_exactly(slab, grid.steps / box.steps[1:], box.shape[1:]))
    return voxels


def _sliced_slabs(grid: Grid, box: Box, limits: tuple[float, float], notes: list[str]) -> np.ndarray:
    """(Z, H, W) of coronal or sagittal slices. z lies in the image, so each slice becomes (Z, side) first;
    then the slices are spread over rows or columns: area means where they lie denser than voxels, linear
    where sparser."""
    edges = box.edges(grid.through)
    places = (edges[:-1] + edges[1:]) / 2
    if np.median(np.diff(grid.spans)) > box.steps[grid.through]:
        weights = line_weights(grid.centres, places)
    else:
        weights, _ = slab_weights(grid.spans, edges)
    first, last = grid.extent_mm(grid.through)
    weights[(places < first) | (places > last)] = 0

    axes = list(grid.image_axes)
    shape = tuple(box.shape[axis] for axis in axes)
    factors = grid.steps / box.steps[axes]
    image = np.empty(_window_size(grid, box), np.float32)
    slabs = {}
    for k in np.flatnonzero(weights.any(axis=0)):
        gain, bias = _load_window(grid, int(k), box, limits, out=image)
        image *= np.float32(gain)
        image += np.float32(bias)
        slabs[k] = resize_exactly(image, factors, shape)
    voxels = np.zeros((len(places), *shape), np.float32)
    for place, k in np.argwhere(weights):
        cv2.scaleAdd(slabs[k], float(weights[place, k]), voxels[place], voxels[place])
    return np.ascontiguousarray(np.moveaxis(_to_uint8(voxels), 0, grid.through))


def _percentiles(grid: Grid, box: Box, settings: VolumeSettings, notes: list[str]) -> tuple[float, float]:
    """mr_percentiles of the rescaled pixels in the box (up to 30,000 of each of up to 16 slices, no
    padding)."""
    edges = box.edges(grid.through)
    inside = np.flatnonzero((grid.spans[:, 1] > edges[0]) & (grid.spans[:, 0] < edges[-1]))
    samples = [np.zeros(0, np.float32)]
    for k in _evenly(inside, 16):
        i = int(grid.order[k])
        part = grid.image(int(k))[_overlap(grid, int(k), box, _window_size(grid, box))[0]]
        stride = 1 + math.isqrt(part.size // 30_000)
        part = part[::stride, ::stride]
        padding = grid.series.padding(i)
        kept = part if padding is None else part[(part < padding[0]) | (part > padding[1])]
        slope, intercept = grid.series.rescale(i)
        samples.append(kept.ravel().astype(np.float32) * np.float32(slope) + np.float32(intercept))
    values = np.concatenate(samples)
    if values.size == 0:
        notes.append("no pixel in the box: the volume is empty")
        return 0.0, 1.0
    dark, bright = (float(value) for value in np.percentile(values, settings.mr_percentiles))
    if bright <= dark:
        notes.append(f"one intensity ({dark:g}) nearly all over the box")
        return dark, dark + 1.0
    return dark, bright


def _evenly(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the items, evenly spread, first and last among them."""
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def find_head(grid: Grid) -> tuple[float, float, float] | None:
    """(top, centre y, centre x) of the head in mm, from up to 24 slices at about 3 mm per pixel; None without
    one.

    Top: the highest place where the head's cross-section exceeds 1000 mm2 (28 mm times the scan's width in a
    narrow scan); between axial slices bisected down to one slice or 2 mm. Centre: of the bounding box over
    100 mm below it.
    """
    factors = np.maximum(1, np.rint(3.0 / grid.steps)).astype(int)
    pixel_mm = grid.steps * factors
    small = {int(k): _small_slice(grid, int(k), factors) for k in _evenly(np.arange(len(grid.order)), 24)}
    is_ct = grid.series.modality == "CT"
    threshold = -300.0 if is_ct else _dark_tissue(np.concatenate([image.ravel() for image in small.values()]))
    masks = {k: _foreground(image, threshold, is_ct) for k, image in small.items()}
    least_mm2 = min(1000.0, 28.0 * min(high - low for low, high in map(grid.extent_mm, (1, 2))))
    if grid.through == 0:
        masks = _follow(grid, masks)
        large = [k for k, mask in masks.items() if mask.sum() * pixel_mm.prod() > least_mm2]
        if not large:
            return None
        good = max(large)
        bad = min((k for k in masks if k > good), default=good)
        while bad - good > 1 and grid.centres[bad] - grid.centres[good] > 2.0:
            k = (good + bad) // 2
            mask = _part(_foreground(_small_slice(grid, k, factors), threshold, is_ct), near=masks[good])
            if mask.sum() * pixel_mm.prod() > least_mm2:
                good, masks[k] = k, mask
            else:
                bad = k
        top = float(grid.spans[good, 1])
    else:
        masks = {k: _part(mask) for k, mask in masks.items()}
        centres = grid.centres[list(masks)]
        depths = (
            np.gradient(centres) if len(masks) > 1 else np.diff(grid.spans[0])
        )  # mm that each sample stands for
        lengths_mm = np.stack([mask.sum(axis=1) for mask in masks.values()]) * pixel_mm[1]  # (n, rows)
        rows = np.flatnonzero(depths @ lengths_mm > least_mm2)
        if len(rows) == 0:
            return None
        bottom, covered = grid.extent_mm(0)
        top = min(bottom + float((rows[-1] + 1) * pixel_mm[0]), covered)
    return (top, *_centre_below(grid, masks, pixel_mm, top))


def _centre_below(
    grid: Grid, masks: dict[int, np.ndarray], pixel_mm: np.ndarray, top: float
) -> tuple[float, float]:
    """(y, x) mm: the middle of the masks' bounding box between top and 100 mm below."""
    bounds: dict[int, list[float]] = {1: [], 2: []}
    for k, mask in masks.items():
        if grid.through != 0:
            rows_mm = grid.edges[k, 0] + (np.arange(len(mask)) + 0.5) * pixel_mm[0]
            mask = mask * ((rows_mm > top - 100) & (rows_mm < top))[:, None]
        if not mask.any() or (grid.through == 0 and not top - 100 <= grid.centres[k] <= top):
            continue
        for side, axis in enumerate(grid.image_axes):
            if axis != 0:
                there = np.flatnonzero(mask.any(axis=1 - side))
                bounds[axis] += list(
                    grid.edges[k, side] + np.array([there[0], there[-1] + 1]) * pixel_mm[side]
                )
        if grid.through != 0:
            bounds[grid.through] += list(grid.spans[k])
    return tuple(
        sum(grid.extent_mm(a)) / 2 if not v else float(min(v) + max(v)) / 2 for a, v in bounds.items()
    )


def _small_slice(grid: Grid, k: int, factors: np.ndarray) -> np.ndarray:
    """Rescaled slice k as means over blocks of `factors` pixels, float32; padding as the slice's lowest
    value."""
    i = int(grid.order[k])
    slope, intercept = grid.series.rescale(i)
    rows, columns = (max(1, length // factor) for length, factor in zip(grid.shape, factors, strict=True))
    values = grid.image(k)[: rows * factors[0], : columns * factors[1]]
    if values.dtype not in (np.uint8, np.int16, np.uint16):  # what OpenCV resizes as it is
        values = values.astype(np.float32)
    padding = grid.series.padding(i)
    if padding is not None:
        is_padding = (values >= padding[0]) & (values <= padding[1])
        kept = values[~is_padding] if not is_padding.all() else values
        values = np.where(is_padding, kept.min() if slope > 0 else kept.max(), values)
    small = cv2.resize(np.ascontiguousarray(values), (columns, rows), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _dark_tissue(values: np.ndarray) -> float:
    """Threshold for MR: half of Otsu's, since dark tissue is head, but at least a tenth of the range (1st to
    99th percentile), since noise is not."""
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    if high <= low:
        return high
    scaled = (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    level, _ = cv2.threshold(scaled.reshape(1, -1), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return low + max(0.5 * level / 255, 0.1) * (high - low)


def _foreground(image: np.ndarray, threshold: float, is_ct: bool) -> np.ndarray:
    """Mask uint8 of what is brighter, without structures thinner than 3 pixels (table, headrest). MR: with
    its dark insides, because the skull is a dark ring there."""
    mask = (image > threshold).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    if not is_ct:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        mask = cv2.drawContours(mask, contours, -1, 1, cv2.FILLED)
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)


def _part(mask: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
    """The largest connected part of a mask, or the one that shares most pixels with `near`; zeros if there is
    none."""
    _, labels = cv2.connectedComponents(mask, connectivity=8)
    sizes = np.bincount(labels.ravel() if near is None else labels[near > 0])
    if len(sizes) < 2 or sizes[1:].max() == 0:
        return np.zeros_like(mask)
    return (labels == 1 + int(sizes[1:].argmax())).astype(np.uint8)


def _follow(grid: Grid, masks: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """One part per slice: the largest of all, and up and down from it the part over the last one; nothing
    beyond 30 mm without any."""
    kept = {k: np.zeros_like(mask) for k, mask in masks.items()}
    largest = {k: _part(mask) for k, mask in masks.items()}
    seed = max(largest, key=lambda k: int(largest[k].sum()))
    kept[seed] = largest[seed]
    for side in ([k for k in masks if k > seed], [k for k in reversed(masks) if k < seed]):
        last = before = seed
        for k in side:
            is_near = abs(grid.centres[before] - grid.centres[last]) <= 30
            kept[k] = _part(masks[k], near=kept[last]) if is_near else kept[k]
            last, before = (k if kept[k].any() else last), k
    return kept
