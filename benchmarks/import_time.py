"""What `import taskkd` adds to `import torch`: CPU seconds, median of several fresh processes each; bar 0.3 s."""

from __future__ import annotations

import statistics
import subprocess
import sys

BAR = 0.3
MEASURE = "import time, torch; start = time.process_time(); import taskkd; print(time.process_time() - start)"


def main() -> int:
    """Print the median; 1 if it is over the bar."""
    times = [
        float(subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True).stdout) for _ in range(3)
    ]
    print(f"import taskkd over import torch: {statistics.median(times):.3f} s of CPU (bar {BAR})")
    return int(statistics.median(times) > BAR)


if __name__ == "__main__":
    sys.exit(main())
