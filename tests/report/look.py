"""Pages to look at: ``make look`` takes their screenshots, prints them, and fails on any message in the console.

Needs a Chromium, which only few machines have, so it is no part of the suite; what the suite can see of a page
without a browser is in ``test_page.py``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from made_up import plan, proved
from test_page import PAGES

from refold.report.page import render
from refold.report.summary import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
LOOKS = {
    "light": ("--window-size=1280,1800",),
    "dark": ("--window-size=1280,1800", "--blink-settings=preferredColorScheme=0"),
    "phone": ("--window-size=500,2400",),
    "print": ("--no-pdf-header-footer",),
}


def main() -> int:
    """The exit status: 1 if a page said something, 2 if there is no browser."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"look: needs one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="refold-look-"))
    said = []
    for name, page in {**PAGES, "large": Page("large", plan(200), proved(200))}.items():
        path = folder / f"{name.replace(' ', '-')}.html"
        path.write_text(render(page), encoding="utf-8")
        for look, flags in LOOKS.items():
            printed = look == "print"
            picture = path.with_name(f"{path.stem}-{look}.{'pdf' if printed else 'png'}")
            shot = f"--{'print-to-pdf' if printed else 'screenshot'}={picture}"
            with tempfile.TemporaryDirectory() as profile:
                command = [browser, *QUIET, *flags, f"--user-data-dir={profile}", shot]
                done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
            said += [f"{picture.name}: {line}" for line in done.stderr.splitlines() if "CONSOLE" in line]
            if not picture.exists():
                said.append(f"{picture.name}: no picture ({done.stderr[-300:]})")
    print("\n".join(said) or f"Nothing in the console. Look at {folder}/*")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
