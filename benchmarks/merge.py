"""Memory and time of merging two models of 1 GB each, in a process of its own.

    python benchmarks/merge.py [--gigabytes 1] [--folder FOLDER]

Prints the process's peak memory, imports included, and the time; exits with 1 above 600 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from retune.model.weights import write_safetensors

LIMIT = 600  # MB
HIDDEN = 1024
MERGE = """
import resource, sys, time
from pathlib import Path
from retune.stages.merge import merge
start = time.perf_counter()
merge(models=sys.argv[1:3], weights=[0.5, 0.5], out=Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - start)
"""


def make(folder: Path, gigabytes: float, seed: int) -> None:
    """A checkpoint shaped as a large multilingual encoder: one tensor holds most of the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "xlm-roberta", "dtype": "float32"}))
    rows = int(gigabytes * 1e9 / 4 / HIDDEN)
    shapes = {"embeddings.word_embeddings.weight": (rows * 3 // 5, HIDDEN)}
    shapes |= {f"encoder.layer.{i}.weight": (rows // 60, HIDDEN) for i in range(24)}

    def pieces(shape: tuple[int, int]):
        rng = np.random.default_rng(seed)
        for start in range(0, shape[0], 4096):
            yield rng.standard_normal((min(4096, shape[0] - start), HIDDEN), np.float32)

    write_safetensors(
        folder / "model.safetensors",
        [(name, "F32", shape, lambda shape=shape: pieces(shape)) for name, shape in shapes.items()],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--folder", type=Path, help="where to make the models; a temporary folder where not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folders = [Path(temporary) / name for name in ("base", "tuned", "merged")]
        for seed, folder in enumerate(folders[:2]):
            make(folder, options.gigabytes, seed)
        start = time.perf_counter()
        command = [sys.executable, "-c", MERGE, *map(str, folders)]
        peak, seconds = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        size = (folders[2] / "model.safetensors").stat().st_size / 1e9
    print(
        f"2 models of {size:.2f} GB: peak {peak:.0f} MB, {seconds:.1f} s ({time.perf_counter() - start:.1f} s in all)"
    )
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
