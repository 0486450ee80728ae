"""docs/from_nothing_to_7b.md runs as printed, in its order, with eight ranks and a Slurm cluster of four nodes on this
machine. A hub on loopback serves a tiny model and small files under the published names and in the published layouts,
and the copies of the sources state the counts of these files.
"""

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.data_recipes.archive_files import files_of, pack
from tests.data_recipes.merged_records import MERGED, SHORT, record
from tests.data_recipes.raw_folders import write_file, write_records
from tests.house.pages import DOCS, FENCE, Command, commands_of
from tests.house.test_pages_run import QUICKSTART, Checkout
from tests.hub_server import TOKEN, Hub, client_environment
from tests.llava_next.models import pretrained
from tests.scripts.test_slurm import Cluster, missing, running_cluster
from tests.scripts.test_suite_tasks import ENVIRONMENT, pope_files
from tests.tiny import SIZES_HW, encoded_picture

PAGE = DOCS / "from_nothing_to_7b.md"
NUM_CAPTIONS, NUM_REPEATS, NUM_CHARTS, NUM_HELD_OUT = 300, 8, 210, 200
RAW_FORM, TEXT_ONLY = "llava_next_779k", "mix665k"
"""Tables of data_recipes/raw/components.py: of the published data, and of the file with its text-only records."""

pytestmark = pytest.mark.full


def repeated(table: str) -> list[tuple[str, dict[str, Any]]]:
    """The records of each component under several ids, those of ChartQA with an image each, so that they can be held
    out."""
    records = [
        (component, {**values, "id": f"{values['id']}_{number}"})
        for number in range(NUM_REPEATS)
        for component, values in MERGED[table]
    ]
    for number in range(NUM_CHARTS if table == RAW_FORM else 0):
        turns = [(f"What is bar {number}?\n{SHORT}", str(number))]
        records.append(("chartqa", record(f"chart_qa_{number}", f"chartqa/train/png/{number}.png", turns)))
    return records


def caption(number: int) -> dict[str, Any]:
    """A record of stage 1."""
    name = f"{number:09d}"
    return record(name, f"{name[:5]}/{name}.jpg", [("Provide a brief description.", f"It is number {number}.")])


def packed_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder after each of its folders became a zip archive."""
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        pack(folder / f"{path.name}.zip", {f"{path.name}/{name}": data for name, data in files_of(path).items()})
        shutil.rmtree(path)
    return files_of(folder)


def torch_weights(folder: Path) -> dict[str, bytes]:
    """The files of a model's directory with the weights as both publishers have them, in torch's format."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    saved = io.BytesIO()
    torch.save(load_file(folder / "model.safetensors"), saved)
    del files["model.safetensors"]
    return {**files, "pytorch_model.bin": saved.getvalue()}


def publish(hub: Hub, folder: Path) -> dict[str, int]:
    """Adds what the page fetches to the hub; returns the number of records of each source."""
    captions = [caption(number) for number in range(NUM_CAPTIONS)]
    write_records(folder / "pretrain", "blip_laion_cc_sbu_558k.json", captions, "images")
    images = files_of(folder / "pretrain" / "images")
    shutil.rmtree(folder / "pretrain" / "images")
    pack(folder / "pretrain" / "images.zip", images)
    hub.add("datasets/liuhaotian/LLaVA-Pretrain", files_of(folder / "pretrain"))
    raw_form, text_only = repeated(RAW_FORM), repeated(TEXT_ONLY)
    write_records(folder / "next", "llava_next_raw_format_processed.json", [each for _, each in raw_form])
    published = {f"llava_next_raw_format/{name}": data for name, data in packed_files(folder / "next").items()}
    hub.add("datasets/lmms-lab/LLaVA-NeXT-Data", published)
    merged = json.dumps([each for _, each in text_only]).encode()
    hub.add("datasets/liuhaotian/LLaVA-Instruct-150K", {"llava_v1_5_mix665k.json": merged})
    hub.add("datasets/lmms-lab-encoder/POPE", pope_files([pope_row(number) for number in range(4)]), licence="mit")
    config = pretrained(folder / "models", template="vicuna_v1", kind="metaspace")
    hub.add("models/lmsys/vicuna-7b-v1.5", torch_weights(Path(config.language_model.path)))
    hub.add("models/openai/clip-vit-large-patch14-336", torch_weights(Path(config.vision_tower.path)))
    counts = Counter(f"next_779k_{component}" for component, _ in raw_form)
    counts.update(f"mix665k_{component}" for component, _ in text_only)
    return {**counts, "lcs_558k": NUM_CAPTIONS}


def pope_row(number: int) -> dict[str, Any]:
    """A question of the benchmark of the page's last step."""
    image = {"bytes": encoded_picture(number, SIZES_HW[number]), "path": f"{number}.png"}
    named = {"id": str(number), "question_id": str(number), "image_source": f"COCO_{number}", "category": "random"}
    return {**named, "question": "Is there a cat in the image?", "answer": ("yes", "no")[number % 2], "image": image}


def state_counts(configs: Path, counts: Mapping[str, int]) -> None:
    """Replaces the published counts in the copies of the sources."""
    for name, count in counts.items():
        file = configs / "source" / f"{name}.yaml"
        if file.exists():
            file.write_text(re.sub(r"(?<=^expected_count: )\d+", str(count), file.read_text(), flags=re.MULTILINE))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on loopback."""
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A Slurm cluster of as many nodes as the page's command asks for."""
    with running_cluster(tmp_path / "lab", LAB_NODES="4") as started:
        yield started


def page_commands() -> list[Command]:
    """The commands of the page. The quickstart has tests of its own."""
    blocks = [block for language, block in FENCE.findall(PAGE.read_text()) if language == "bash"]
    return [each for block in blocks for each in commands_of(block) if each.text != QUICKSTART]


def check_runs(folder: Path, counts: Mapping[str, int]) -> None:
    """Both launches have trained both stages on every sample that is not held out, and their losses are the same."""
    num_samples = {
        "align": NUM_CAPTIONS,
        "finetune": sum(counts[name] for name in mixture_sources(folder)) - NUM_HELD_OUT,
    }
    for stage, expected in num_samples.items():
        runs = [folder / root / "llava_7b" / stage for root in ("outputs_of_one_machine", "outputs")]
        for run in runs:
            assert json.loads((run / "data.json").read_text())["num_samples"] == expected
        one_machine, four_nodes = (
            [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in runs
        )
        assert four_nodes == pytest.approx(one_machine, rel=1e-5)


def mixture_sources(folder: Path) -> set[str]:
    """The sources of the mixture of stage 2."""
    return set(yaml.safe_load((folder / "configs" / "mixture" / "llava_next_779k.yaml").read_text())["sources"])


@pytest.mark.skipif(bool(missing), reason=f"needs Slurm: no {', '.join(missing)} (apt-get install slurm-wlm munge)")
def test_page_runs_as_printed(hub: Hub, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in the order of the page. Both launches train both stages on everything that was published, with
    equal losses."""
    if not (ENVIRONMENT / ".ready").is_file():
        pytest.skip("the environment of lmms-eval is absent: scripts/lmms_eval.sh makes it at its first start")
    for name, value in client_environment(hub, tmp_path / "home").items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    checkout = Checkout(tmp_path / "checkout")
    counts = publish(hub, tmp_path / "published")
    state_counts(checkout.folder / "configs", counts)
    write_file(checkout.folder / "photograph.jpg", encoded_picture(1, SIZES_HW[1]))
    for command in page_commands():
        if "two_stage.sh" in command.text:
            (checkout.folder / "outputs").rename(checkout.folder / "outputs_of_one_machine")
        code, output = checkout.run(["bash", "-euo", "pipefail", "-c", command.text])
        assert code == 0, f"{command.text}\n{output}"
        if "two_stage.sh" in command.text:
            for line in output.splitlines():
                job = line.split()[1]
                assert cluster.ended(job)["JobState"] == "COMPLETED", (checkout.folder / f"slurm-{job}.out").read_text()
    check_runs(checkout.folder, counts)
