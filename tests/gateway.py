"""A stand-in for the challenge's server and gateway, as strict as the real one is described to be.

in   --data DIR   a folder per series, as below `series/`, of which it keeps the 25 tags of the hidden test
out  --out CSV    SeriesInstanceUID and the 14 probabilities that the script under test answered
run  python tests/gateway.py --data dicoms/series --out answers.csv -- infer.py --serve --outputs outputs

The script gets a package `kaggle_evaluation` made here; `predict` is called from another thread, as a gRPC
server does. Code 1 after an exception in it, a wrong answer, a late start, or a KAGGLE_SHARED left full.
"""

import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pydicom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import LABELS, UID, make_parser

START_LIMIT_S, CALL_LIMIT_S = 15 * 60, 30 * 60
TAGS = """BitsAllocated BitsStored Columns FrameOfReferenceUID HighBit ImageOrientationPatient PixelData
    ImagePositionPatient InstanceNumber Modality PatientID PhotometricInterpretation PixelRepresentation
    PixelSpacing PlanarConfiguration RescaleIntercept RescaleSlope RescaleType Rows SOPClassUID SOPInstanceUID
    SamplesPerPixel SliceThickness SpacingBetweenSlices StudyInstanceUID TransferSyntaxUID"""


def strip_tags(source: Path, target: Path) -> None:
    """Copy a DICOM file with the tags of the hidden test alone, and its pixels."""
    dataset = pydicom.dcmread(source)
    for element in list(dataset):
        if element.keyword not in TAGS.split():
            del dataset[element.tag]
    dataset.save_as(target)


def play(predict: Callable, data: Path, out: Path, started: float) -> None:
    """Send every series, one at a time, and write the answers."""
    shared, rows = Path(os.environ["KAGGLE_SHARED"]), []
    if time.monotonic() - started > START_LIMIT_S:
        raise TimeoutError(f"the server was not up within {START_LIMIT_S} s")
    if not isinstance(predict, types.FunctionType) or predict.__name__ != "predict":
        raise ValueError(f"the endpoint is {predict!r}; expected a plain function named predict")
    with ThreadPoolExecutor(1) as thread:
        for folder in sorted(path for path in data.iterdir() if path.is_dir()):
            shutil.copytree(folder, shared / folder.name, copy_function=strip_tags)
            limit_s = CALL_LIMIT_S if rows else None  # the first call may take longer
            answer = thread.submit(predict, str(shared / folder.name)).result(timeout=limit_s)
            is_row = isinstance(answer, pd.DataFrame) and list(answer.columns) == list(LABELS)
            if not is_row or len(answer) != 1 or not answer.iloc[0].between(0, 1).all():
                raise ValueError(f"predict returned {answer!r}; expected one row of the 14 probabilities")
            rows.append([folder.name, *answer.iloc[0]])
            if not shared.is_dir() or list(shared.iterdir()):
                raise ValueError(f"{shared} was not emptied and made again after {folder.name}")
    pd.DataFrame(rows, columns=[UID, *LABELS]).to_csv(out, index=False)


def main() -> None:
    parser = make_parser(__doc__)
    for name in ("--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("script", nargs="+", help="-- infer.py --serve ...")
    args, started = parser.parse_args(), time.monotonic()

    def start_server(predict: Callable) -> types.SimpleNamespace:
        """A server with the real one's two ways to start (the real `serve` waits for another container)."""
        start = partial(play, predict, args.data, args.out, started)
        return types.SimpleNamespace(serve=start, run_local_gateway=start)

    server, script = types.ModuleType("kaggle_evaluation"), types.ModuleType("__main__")
    server.RSNAInferenceServer = start_server
    sys.modules |= {server.__name__: server, f"{server.__name__}.rsna_inference_server": server}
    sys.argv, script.__file__ = args.script, args.script[0]  # worker processes import it by its file
    sys.modules |= {"__main__": script, "__mp_main__": script}
    exec(compile(Path(script.__file__).read_text(), script.__file__, "exec"), script.__dict__)


if __name__ == "__main__":
    main()
