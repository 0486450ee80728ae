"""A report in Chromium: it fits a phone, nothing is cut off, nothing is fetched, light and dark differ."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny import tiny_samples, tiny_store
from train.report.__main__ import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# A page beside the report shows it in a frame of a given width, and measures its layout.
PROBE = """<!doctype html><body>
<iframe id="frame" src="report.html" style="border:0;width:WIDTHpx;height:900px"></iframe>
<pre id="measured"></pre><script>
document.getElementById("frame").onload = () => {
  const view = document.getElementById("frame").contentWindow, page = view.document, root = page.documentElement;
  const box = (node) => node.getBoundingClientRect(), all = (name) => [...page.querySelectorAll(name)];
  const cut = [];
  for (const svg of all(".chart > svg")) {
    const outer = box(svg);
    for (const text of svg.querySelectorAll("text")) {
      const inner = box(text);
      if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1)
        cut.push(svg.getAttribute("aria-label") + ": " + text.textContent);
    }
  }
  for (const node of all("h1, h2, h3, p, figcaption, label, dd, pre, img, svg"))
    if (!node.closest(".scroll") && box(node).right > root.clientWidth + 1) cut.push(node.outerHTML.slice(0, 80));
  const line = page.querySelector('.chart path.line.run0');
  const seen = () => view.getComputedStyle(line.closest(".run0")).display;
  const before = seen(), color = view.getComputedStyle(line).stroke;
  const show = page.getElementById("show0");
  if (show) show.click();
  document.getElementById("measured").textContent = JSON.stringify({
    wide: root.scrollWidth - root.clientWidth, cut: cut, charts: all(".chart > svg").length, line: color,
    paper: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
    shown: [before, seen()], heights: all(".chart > svg").map((svg) => box(svg).height),
    images: all("img").map((image) => image.complete && image.naturalWidth),
    fetched: view.performance.getEntriesByType("resource").map((one) => one.name).filter((one) => !/^data:/.test(one)),
  });
};
</script>"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of one run and of two, each in a folder of its own, with long names and long texts."""
    folder = tmp_path_factory.mktemp("report")
    tiny_store(folder / "stores", "pictures", tiny_samples(4))
    runs = [
        _run(folder, name, seed) for seed, name in enumerate(("first", "second_with_a_rather_long_name_of_its_own"))
    ]
    pages = {"one": folder / "one" / "report.html", "two": folder / "two" / "report.html"}
    assert main([str(runs[0]), "--out", str(pages["one"])]) == 0
    assert main([*map(str, runs), "--out", str(pages["two"])]) == 0
    return pages


def _run(folder: Path, name: str, seed: int) -> Path:
    run = folder / "outputs" / name / "finetune"
    run.mkdir(parents=True)
    config = {"name": name, "stage": {"name": "finetune", "rate": seed}, "data": {"store_root": str(folder / "stores")}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    noise = np.random.default_rng(seed).gamma(2.0, 0.1, 600)
    lines = [
        {
            "step": step,
            "train/loss": 9.0 / (1 + step / 20) + noise[step],
            "train/loss/a_source_with_a_long_name": 3.0 + noise[step],
            "train/loss/pictures": 5.0 + noise[step],
            "lr/projector": 2e-5 * step / 600,
            "lr/language_model": 1.25e-6,
            "train/grad_norm": 1e4 / (1 + step) + noise[step],
            "perf/step_s": 2.0 + (90.0 if step == 0 else noise[step]),
            "perf/data_wait_s": 0.1,
            "perf/forward_backward_s": 1.5,
            "perf/tokens_per_s": 1.25e6,
            "perf/max_memory_gib": 61.5,
        }
        for step in range(600)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "starts.jsonl").write_text(json.dumps({"step": 300, "origin": "resumed", "versions": {"torch": "2"}}) + "\n")
    answer = {"source": "pictures", "id": "000001", "text": "W" * 90, "truth": "5", "answer": "4 " * 200, "score": None}
    (run / "evaluation.answers.jsonl").write_text(json.dumps(answer) + "\n")
    return run


def measure(page: Path, width: int, *options: str) -> dict[str, Any]:
    """What the browser measures of the page in a window of this many CSS pixels."""
    probe = page.with_name("probe.html")
    probe.write_text(PROBE.replace("WIDTH", str(width)))
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", profile, "--allow-file-access-from-files"]
    completed = subprocess.run(
        [*command, *options, "--virtual-time-budget=20000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    match = re.search(r'<pre id="measured">(.+?)</pre>', completed.stdout, re.DOTALL)
    assert match, completed.stderr[-2000:]
    assert "Content Security Policy" not in completed.stderr
    return dict(json.loads(unescape(match[1])))


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_fetches_nothing(reports: dict[str, Path], name: str, width: int) -> None:
    """On a phone and a desktop no text is cut, the page is no wider than its window, every chart and image is
    there, and nothing was fetched. A checkbox hides its run."""
    page = measure(reports[name], width)
    assert page["wide"] <= 0
    assert page["cut"] == []
    assert page["fetched"] == []
    assert page["charts"] >= 7
    assert min(page["heights"]) > 100
    assert page["images"]
    assert all(page["images"])
    assert page["shown"] == (["inline", "none"] if name == "two" else ["inline", "inline"])


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt-get install chromium")
def test_light_and_dark(reports: dict[str, Path]) -> None:
    """Lines, text and background follow the reader's colour scheme."""
    light = measure(reports["one"], 800, "--blink-settings=preferredColorScheme=1")
    dark = measure(reports["one"], 800, "--blink-settings=preferredColorScheme=0")
    for key in ("paper", "ink", "line"):
        assert light[key] != dark[key]
    assert _brightness(light["paper"]) > 200 > 80 > _brightness(light["ink"])
    assert _brightness(dark["paper"]) < 60 < 180 < _brightness(dark["ink"])


def _brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3
