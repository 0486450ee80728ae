"""Hosts that lose their connection both end within the timeout and report it: two network namespaces with one rank
each, and a link between them that is cut.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ranks import run_to_the_end
from tests.train import fault_runs
from tests.train.cases import with_stage, zero
from train.config.schema import RunConfig

TIMEOUT_S = 10
ADDRESSES = ("10.123.45.1", "10.123.45.2")


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces with a link between them: their names, and those of the link's ends."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespace can be made here: apt-get install iproute2")
    spaces = [f"llava_next_{os.getpid()}_{number}" for number in (0, 1)]
    links = [f"ln{os.getpid()}_{number}" for number in (0, 1)]
    commands = [
        *(["netns", "add", space] for space in spaces),
        ["link", "add", links[0], "netns", spaces[0], "type", "veth", "peer", "name", links[1], "netns", spaces[1]],
    ]
    for space, link, address in zip(spaces, links, ADDRESSES, strict=True):
        inside = ["-n", space]
        commands += [[*inside, "address", "add", f"{address}/24", "dev", link], [*inside, "link", "set", link, "up"]]
        commands += [[*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {' '.join(command)}: {done.stderr.strip()} (run as root)")
        yield spaces, links
    finally:
        for space in spaces:  # and the link with them
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        assert not [space for space in spaces if Path("/run/netns", space).exists()]


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_hosts_that_lose_each_other(
    run_config: RunConfig, tmp_path: Path, hosts: tuple[list[str], list[str]], stage: int
) -> None:
    """Both ranks end within the timeout after the cut, and each reports which rank waits, in which step, and that it
    gave up; without a cut the same two hosts finish the run. A run that was cut off is resumed."""
    config = replace(run_config, engine=zero(stage), timeout_s=TIMEOUT_S, save=replace(run_config.save, every=1))
    config = with_stage(config, epochs=3.0)  # 10 steps
    args = (config, *hosts, ADDRESSES[0])
    ended = run_to_the_end(2, fault_runs.run_on_hosts, *args, 4, folder=tmp_path, timeout_s=240)
    took_s = time.time() - float((config.run_dir / "cut").read_text())
    assert [each.exit_code for each in ended] == [1, 1], ended
    assert took_s < TIMEOUT_S + 15
    reported = fault_runs.read_exit_report(config)
    wait = r"ranks wait for one another in step \d+.* \(the network between them, or a collective .*\)"
    late = r"rank \d \(node\d\) has been in step \d+.* for \d+ s.*"
    assert re.match(rf"({wait}|{late}); rank \d \(node\d\) gave up", reported["reason"]), reported
    for rank, each in enumerate(ended):  # on the terminal or in its log, each side has its own
        log = each.output + (config.run_dir / "log" / f"rank_00{rank}.log").read_text()
        assert re.search(rf"rank {rank} \(node{rank}\) gave up", log), log
    subprocess.run(["ip", "-n", hosts[0][0], "link", "set", hosts[1][0], "up"], check=True)
    ended = run_to_the_end(2, fault_runs.run_on_hosts, *args, None, folder=tmp_path, timeout_s=240)
    assert [each.exit_code for each in ended] == [0, 0], ended
    assert len(fault_runs.metrics(config)) == 10
