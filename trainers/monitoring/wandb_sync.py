"""Send a run's offline wandb segments: python -m bigbatch.trainers.monitoring.wandb_sync RUN_DIR

Started by `bigbatch sync`. Every attempt of a run left a segment of its own, all with one run
id; they are sent in the order of the attempts, after `mend` has made them fit for it.
"""

import subprocess
import sys
from pathlib import Path

from bigbatch.trainers.monitoring.wandb_view import mend


def sync(folder: Path) -> int:
    """Send what was not sent yet; returns wandb's exit status."""
    mend(folder)
    files = sorted(folder.glob("offline-run-*/*.wandb"))
    # wandb leaves this mark beside a file that has arrived; sending it twice would rewrite it.
    left = [file for file in files if not Path(f"{file}.synced").exists()]
    if not left:
        print(f"{folder}: nothing left to send, of {len(files)} segments")
        return 0
    command = [sys.executable, "-m", "wandb", "sync", "--yes"]
    return subprocess.run([*command, *(str(f.parent) for f in left)], check=False).returncode


if __name__ == "__main__":
    sys.exit(sync(Path(sys.argv[1]) / "wandb"))
