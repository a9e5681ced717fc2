"""Measure `medmamba pretrain ingest` and the reading of crops, and write a CSV.

    python pretrain/results/ingest.py pretrain/results/ingest.csv [NAME=FOLDER_OF_CTS ...]

Times are CPU seconds of one process with one thread, start-up and imports (about a second) included.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np

from medmamba.bench.commit import commit_of
from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.store import Store

SHAPE_XYZ = (512, 512, 300)
SPACING_MM = (0.8, 0.8, 1.5)
CROPS = (96, 128, 160)


def synthetic_ct(path: Path, seed: int) -> None:
    """A body with bones and a table in air, noise of 12 HU, as .nii.gz."""
    generator = np.random.default_rng(seed)
    x, y, z = np.ogrid[-1:1:512j, -1:1:512j, -1:1:300j]
    hu = np.full(SHAPE_XYZ, -1000, np.float32)
    hu[(x / 0.85) ** 2 + (y / 0.6) ** 2 + 0 * z < 1] = 40
    hu[((x - 0.1 * np.sin(4 * z)) / 0.4) ** 2 + ((y - 0.05) / 0.35) ** 2 < 1] = -850
    hu[x**2 + ((y - 0.4) / 1.2) ** 2 + 0.02 * np.sin(60 * z) < 0.015] = 700
    hu[:, 480:486] = -100
    hu += generator.normal(0, 12, SHAPE_XYZ).astype(np.float32)
    image = nibabel.Nifti1Image(hu.round().clip(-1024, 3071).astype(np.int16), np.diag([*SPACING_MM, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def ingest(folder: Path, store: Path) -> dict[str, object]:
    command = [
        sys.executable,
        "-m",
        "medmamba.cli",
        "pretrain",
        "ingest",
        str(folder),
        "--out",
        str(store),
        "--jobs",
        "1",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    records = Store(store).records.values()
    cpu = used.ru_utime + used.ru_stime
    accepted = [record for record in records if record.status == "accepted"]
    return {
        "images": len(records),
        "accepted": len(accepted),
        "source_mib": round(sum(path.stat().st_size for path in folder.rglob("*.nii.gz")) / 2**20, 1),
        "stored_mib": round(sum(record.size_bytes for record in accepted) / 2**20, 1),
        "cpu_s": round(cpu, 2),
        "cpu_s_per_image": round(cpu / len(records), 3),
        "wall_s": round(time.perf_counter() - start, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def crops(store: Path, size: int) -> dict[str, object]:
    reader = CropReader(store, (size,) * 3)
    generator = np.random.default_rng(0)
    drawn = [reader.draw(generator) for _ in range(60)]
    reader.read(drawn[0])
    start = time.process_time()
    for crop in drawn:
        reader.read(crop)
    return {"cpu_s_per_crop": round((time.process_time() - start) / len(drawn), 5)}


def main(out: Path, folders: dict[str, Path]) -> None:
    facts = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("medmamba", "numpy", "blosc2", "SimpleITK", "nibabel")},
        "commit": commit_of(Path(__file__)),
    }
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1, 3):
            folder = Path(scratch) / f"synthetic_{count}"
            folder.mkdir()
            for seed in range(count):
                # In a process of its own: a child's peak of memory counts what its parent held when it was started.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    pool.submit(synthetic_ct, folder / f"{seed}.nii.gz", seed).result()
            folders = {f"{count} x 512 x 512 x 300 int16, synthetic": folder, **folders}
        for k, (name, folder) in enumerate(folders.items()):
            store = Path(scratch) / f"store_{k}"
            rows.append({"step": "ingest", "images_are": name, **ingest(folder, store)})
            if folder.name == "synthetic_3":
                rows += [{"step": f"crop {size}", "images_are": name, **crops(store, size)} for size in CROPS]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*columns, *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    print(out.read_text())


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), {name: Path(path) for name, _, path in (text.partition("=") for text in sys.argv[2:])})
