"""The page in a real browser: it renders, its script runs, and nothing is wider than a phone."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from elastic_megatron.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", () => {
  const seen = parent.document.documentElement.dataset;
  const rows = [...document.querySelectorAll("table.family tbody tr")];
  seen.rows = rows.filter((row) => row.getBoundingClientRect().height > 15).length;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  const chart = document.querySelector("svg[data-lines]");
  chart.scrollIntoView({ behavior: "instant" });
  const box = chart.getBoundingClientRect();
  const where = { bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  chart.dispatchEvent(new PointerEvent("pointermove", where));
  seen.tip = document.getElementById("tip").innerText.replace(/\\s+/g, " ");
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_renders_without_errors_and_answers_the_pointer(
    run_dir: Path, tmp_path: Path, width: int
) -> None:
    probed = write_report(run_dir).read_text(encoding="utf-8").replace("</body>", PROBE)
    page = tmp_path / "frame.html"
    # a window cannot be as narrow as a phone, a frame can
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(probed)}"></iframe>'
    page.write_text(f"<!doctype html><html><body>{frame}</body></html>", encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=1400,1000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    seen = dict(re.findall(r'data-(rows|wide|tip)="([^"]*)"', done.stdout[:3000]))
    assert seen["rows"] == "4", "parent and three submodels must be visible"
    assert int(seen["wide"]) <= 0, "the page scrolls sideways"
    assert re.fullmatch(r"training tokens: .+ full [\d.]+ medium [\d.]+ small [\d.]+", seen["tip"])
