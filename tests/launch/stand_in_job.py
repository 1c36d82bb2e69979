"""In place of `launch.train` as a job of a sweep: takes a tenth of a second, and what it is told.

`wait=<file>` waits for a file to appear or for SIGTERM, which `deaf=1` notes and does not follow;
`code=<n>` ends with that code.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

given: dict[str, str] = dict(each.split("=", 1) for each in sys.argv[1:])
run = Path(given["runs_dir"], given["run.name"])
run.mkdir(parents=True, exist_ok=True)


def stop(number, frame):
    (run / "stopped").write_text(signal.Signals(number).name)
    if not given.get("deaf"):
        sys.exit(75)


# Before there is the file that tests wait for, for what they do then.
signal.signal(signal.SIGTERM, stop)
with (run / "starts.jsonl").open("a") as file:
    row = {
        "pid": os.getpid(),
        "began": time.time(),
        "environment": dict(os.environ),
        "given": given,
    }
    file.write(json.dumps(row) + "\n")
if awaited := given.get("wait"):
    while not Path(awaited).exists():
        time.sleep(0.02)
if code := given.get("code"):
    print("error: key=value -> made to fail -> do not")
    sys.exit(int(code))
(run / "summary.json").write_text(json.dumps({"step": 3, "val/loss": float(given["loss"])}))
with (run / "starts.jsonl").open("a") as file:
    file.write(json.dumps({"ended": time.time()}) + "\n")
