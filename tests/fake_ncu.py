"""Stands in for ncu where there is none: ``FAKE_NCU`` names what it does, ``FAKE_CSV`` its report.

Started like ncu, it writes ``-o`` and ``--log-file``; only ``runs`` runs the test.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONNECTED = "==PROF== Connected to process 4242 (/opt/somewhere/bin/python3.12)\n"
PROFILED = '==PROF== Profiling "rms_norm_kernel" - {}: 0%....50%....100% - 41 passes\n'
ENDED = "==PROF== Disconnected from process 4242\n"
FAILED = "==ERROR== The application returned an error code (1).\n"
NOTHING = "==WARNING== No kernels were profiled.\n"
SAID = {  # behaviour -> the log of ncu
    "profiled": CONNECTED + PROFILED.format(0) + ENDED + "==PROF== Report: x.ncu-rep\n",
    "barred": CONNECTED + "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to "
    "access NVIDIA GPU Performance Counters on the target device 0.\n" + ENDED,
    "nothing": CONNECTED + ENDED + NOTHING,
    "failing": CONNECTED + FAILED + NOTHING,
    "choosy": CONNECTED + "==ERROR== Failed to find metric lts__t_sector_hit_rate.pct\n" + FAILED,
}


def main() -> None:
    words, mode = sys.argv[1:], os.environ.get("FAKE_NCU", "profiled")
    if words == ["--version"]:
        print("NVIDIA (R) Nsight Compute Command Line Profiler\nVersion 2025.3.1.0 (build 0)")
        return
    if words[0] == "--import":
        print(Path(os.environ["FAKE_CSV"]).read_text())
        return
    calls = Path(os.environ["FAKE_CALLS"])
    with calls.open("a") as file:
        file.write(json.dumps(words) + "\n")
    facts = Path(os.environ["NCU_FACTS"])
    if mode == "second hangs" and len(calls.read_text().splitlines()) < 2:
        mode = "profiled"
    if mode in ("hangs", "second hangs"):
        time.sleep(60)
    asked = words[words.index("--metrics") + 1]
    if mode == "choosy" and "lts__t_sector_hit_rate.pct" not in asked:
        mode = "profiled"
    if mode == "runs":
        subprocess.run(words[words.index(sys.executable) :], check=False)
        mode = "nothing"
    elif mode == "nothing":
        print("SKIPPED [1] tests/test_x.py:3: needs sm89 for fp8; this is sm80")
    if mode == "threads":
        facts.write_text(json.dumps({"device": "cuda"}))
        mode = "nothing" if "--nvtx-include" in words else "profiled"
    if mode == "profiled":
        facts.write_text(json.dumps({"device": "cuda", "bytes_moved": 1e6, "flops": 2e6}))
        Path(words[words.index("-o") + 1]).write_bytes(b"not what the library reads")
    if mode == "failing":
        print("E   AssertionError: output is 12.1 dB from eager's\nFAILED tests/test_x.py::test_y")
    Path(words[words.index("--log-file") + 1]).write_text(SAID[mode])
    sys.exit(0 if mode == "profiled" else 1)


if __name__ == "__main__":
    main()
