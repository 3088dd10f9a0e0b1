"""Draw docs/report.png, the top of a run's report, by chromium: `python docs/picture.py runs/demo`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1000, 900
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]


def main() -> None:
    page, out = Path(sys.argv[1], "report.html").resolve(), Path(__file__).with_name("report.png")
    with tempfile.TemporaryDirectory() as profile:
        shot = [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={out}", page.as_uri()]
        subprocess.run(["chromium", *OPTIONS, *shot], check=True)
    Image.open(out).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(out, optimize=True)


if __name__ == "__main__":
    main()
