"""Tests of a mixture's manifest and its data section for papers."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_recipes.mixture.mixture import Mixture
from data_recipes.prepare.manifest import describe_mixture, to_bibtex, to_latex, write_manifest
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Reason, Reject, Sample
from data_recipes.store.reader import Store
from tests.data_recipes.raw_folders import make_image, make_sample, make_store

ENTRY = {"key": "masry2022chartqa", "type": "inproceedings", "title": "Charts & {QA}: 100%", "url": "https://a/b_c"}
REJECT = Reject("r", Reason.IMAGE_MISSING, "gone", "f, 9")


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """`chart_qa` with 20 samples and a reject, `chats` with 10, and a benchmark with three of the charts."""
    shown = [make_image(n) for n in range(20)]
    samples: list[Sample | Reject] = [*(make_sample(str(n), shown[n]) for n in range(20)), REJECT]
    samples[1] = replace(make_sample("1", shown[1]), notes=(("unknown_key:score", "0.5"),))
    about: dict[str, Any] = {"licence": "GPL-3.0 & more", "publisher": "A. Masry", "citation": ENTRY}
    make_store(tmp_path / "chart_qa", samples, max_reject_share=1.0, expected_count=99, **about)
    make_store(
        tmp_path / "chats", [make_sample(str(n)) for n in range(10)], expected_count=10, citation="V. Zhou, 2019."
    )
    make_store(tmp_path / "bench", [make_sample(str(n), shown[n]) for n in range(3)], licence="MIT")
    return tmp_path


def mixture(stores: Path) -> Mixture:
    """A mixture of 12 charts that are not in the benchmark, and all chats."""
    shares = {"chart_qa": SourceShare(12, holdout=4), "chats": SourceShare()}
    return Mixture.open(MixtureConfig("my_mix", 3, shares, exclude=("bench",)), stores)


def test_json(stores: Path) -> None:
    """The JSON has counts, shares, fingerprints, licences and reasons of each source and of the excluded datasets."""
    ours = mixture(stores)
    folder = write_manifest(ours, stores)
    assert folder == stores / "mixtures" / "my_mix"
    content = json.loads((folder / "manifest.json").read_text())
    assert content == describe_mixture(ours, stores)
    assert (content["name"], content["fingerprint"], content["num_samples"]) == ("my_mix", ours.fingerprint, 22)
    charts, chats = content["sources"]
    expected = {
        "source": "chart_qa",
        "wanted": 12,
        "found": 20,
        "held_out": 4,
        "used": 12,
        "share": 0.545455,
        "rejects": {"picture_missing": 1},
        "notes": {"unknown_key:score": {"records": 1, "example": "0.5"}},
        "num_records": 21,
        "expected_count": 99,
        "licence": "GPL-3.0 & more",
        "fingerprint": ours.store("chart_qa").fingerprint,
    }
    assert {key: charts[key] for key in expected} == expected
    held = {h for j in ours.heldout("chart_qa") for h in ours.heldout_sample("chart_qa", j).image_hashes}
    shown = {letters.decode() for letters in Store.open(stores / "bench").all_image_hashes()}
    assert charts["excluded"] == 3 - len(held & shown)
    assert (chats["wanted"], chats["used"], chats["citation"]) == (None, 10, "V. Zhou, 2019.")
    assert [store["source"] for store in content["excluded_sets"]] == ["bench"]


def test_data_section(stores: Path) -> None:
    """The Markdown and LaTeX tables have all licences, citations have BibTeX entries, and special characters are
    escaped."""
    folder = write_manifest(mixture(stores), stores)
    markdown = re.sub(" +", " ", (folder / "manifest.md").read_text())  # columns are padded
    assert re.search(r"\| chart_qa \| 99 \| 20 \(-79\) \| 4 \| \d \| 12 \| 54.5% \| GPL-3.0 & more \|", markdown)
    assert "| chats | 10 | 10 | 0 | 0 | 10 | 45.5% | not stated |" in markdown
    assert "They contain no image of bench." in markdown
    assert "A. Masry; store " in markdown
    assert "; 21 records, 20 images; rejected: picture_missing 1; noted: unknown_key:score 1" in markdown
    latex = (folder / "manifest.tex").read_text()
    row = r"chart\\_qa~\\cite\{masry2022chartqa\} & 99 & 20 \(-79\) & 4 & \d & 12 & 54.5\\% & GPL-3.0 \\& more \\\\"
    assert re.search(row, latex)
    bibtex = (folder / "manifest.bib").read_text()
    values = "  title = {{Charts \\& {QA}: 100\\%}},\n  url = {https://a/b_c},\n"
    assert f"@inproceedings{{masry2022chartqa,\n{values}}}" in bibtex
    assert "@misc{chats,\n  note = {V. Zhou, 2019.},\n}" in bibtex
    assert set(re.findall(r"\\cite\{(\w+)\}", latex)) == set(re.findall(r"@\w+\{(\w+),", bibtex))


def test_stores_of_earlier_versions(stores: Path) -> None:
    """A store whose manifest has no notes gives a mixture's manifest without notes."""
    path = stores / "chart_qa" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["notes"]
    path.write_text(json.dumps(manifest))
    folder = write_manifest(mixture(stores), stores)
    assert json.loads((folder / "manifest.json").read_text())["sources"][0]["notes"] == {}
    assert "noted" not in (folder / "manifest.md").read_text()


def test_manifest_does_not_depend_on_path(stores: Path, tmp_path: Path) -> None:
    """The same stores at another path give the same files, without any path."""
    shutil.copytree(stores, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    one, other = (write_manifest(mixture(root), root) for root in (stores, tmp_path / "elsewhere"))
    for path in one.iterdir():
        text = path.read_text()
        assert text == (other / path.name).read_text()
        assert str(tmp_path) not in text
    assert len(list(one.iterdir())) == 4


@pytest.mark.full
def test_latex_compiles(stores: Path, tmp_path: Path) -> None:
    """pdflatex and bibtex accept the files, where they are installed."""
    if not shutil.which("pdflatex") or not shutil.which("bibtex"):
        pytest.skip("pdflatex or bibtex is not installed: apt-get install texlive-latex-base texlive-binaries")
    content = describe_mixture(mixture(stores), stores)
    (tmp_path / "manifest.bib").write_text(to_bibtex(content))
    page = "\\documentclass{article}\\begin{document}" + to_latex(content)
    (tmp_path / "a.tex").write_text(page + "\\bibliographystyle{plain}\\bibliography{manifest}\\end{document}")
    for command in (["pdflatex", "-halt-on-error", "a"], ["bibtex", "a"], ["pdflatex", "-halt-on-error", "a"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
