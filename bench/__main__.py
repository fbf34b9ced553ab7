"""``python -m bench``: all benchmarks, one after the other."""

from __future__ import annotations

import subprocess
import sys

for module in ("bench.end_to_end", "bench.table"):
    print(f"\n== {module}", flush=True)
    subprocess.run([sys.executable, "-m", module, *sys.argv[1:]], check=True)
