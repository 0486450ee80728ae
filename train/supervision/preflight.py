"""Pre-flight checks: finds problems of the nodes at the start of a run, on all ranks at once.

Every rank collects its findings and gathers those of the others, so that all ranks reach the same result.

    preflight=auto   at every start, about 2 seconds: versions, configuration, GPUs, data, run folder, clocks, network;
                     and, when the engine is there, space and time for checkpoints
    preflight=only   the same, then one step of the engine on the fullest row of the data; prints the table and exits
    preflight=off    no checks
"""

import hashlib
import logging
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from data_recipes.mixture.mixture import Mixture
from data_recipes.store.reader import Store
from llava_next.inputs.processor import Processor
from llava_next.model.llava_next import LossSums
from train.config.compose import to_yaml
from train.config.schema import ConfigError, PackingConfig, RunConfig
from train.data.length_table import LengthTable
from train.data.loader import RowDataset
from train.distributed.host_limits import read_host_limits
from train.distributed.versions import versions
from train.distributed.world import World, all_gather_objects, barrier, is_out_of_memory
from train.engine.node_sharding import KEY
from train.supervision.preflight_checks import Check, Findings, Gpu, compare_findings, format_table
from train.supervision.preflight_saves import check_saves

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""Longest time in seconds that a rank may take to collect its findings, and that the first collective may take."""
_PACKAGES = ("llava_next", "data_recipes", "train")
_TOKEN_TIMEOUT_S = 10.0  # a network file system may show a new file to other nodes a little later
_NUM_ELEMENTS = 2**22  # of the collective, in fp32: 16 MiB


class PreflightError(ConfigError):
    """A check has failed; the message names rank, host, the difference and the fix."""


def run_checks(config: RunConfig, world: World) -> None:
    """Collects and compares the findings of all ranks and tries one collective. Every rank must call it.

    Raises:
        PreflightError: on every rank, with the first problem.
        RuntimeError: a rank did not return within `TIMEOUT_S`.
    """
    started = time.monotonic()
    token = _shared_token(world)
    findings = collect_findings(config, world, token)
    _wait_for_all(world)
    _token_file(config.run_dir / "log", token, world.rank).unlink(missing_ok=True)
    checks = compare_findings(all_gather_objects(world, replace(findings, clock=time.time())))
    if not any(check.problem for check in checks):
        checks.append(_check_network(world))
    _report_checks(checks, config, world)
    logger.info("pre-flight took %.1f s", time.monotonic() - started)


def check_saves_fit(config: RunConfig, world: World, engine: deepspeed.DeepSpeedEngine, last_step: int) -> None:
    """Checks that the checkpoints up to `last_step` fit on the disk and can be written in time.

    Every rank must call it.

    Raises:
        PreflightError: on every rank, if they do not.
    """
    if config.preflight != "off" and config.save.every:
        _report_checks([check_saves(config, world, engine, last_step)], config, world)


def collect_findings(config: RunConfig, world: World, token: str) -> Findings:
    """Returns the findings of this rank. Errors are returned instead of raised, so that all ranks learn of them.

    Args:
        token: a random string that all ranks share; it names the files that show that the run folder is shared.
    """
    stores: dict[str, str] = {}
    errors: list[tuple[str, str]] = []

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # any error is a finding
            errors.append((name, f"{type(error).__name__}: {' '.join(str(error).split())}"))

    attempt("run folder", lambda: _check_shared_folder(config.run_dir / "log", token, world))
    attempt("data", lambda: stores.update(_read_stores(config)))
    gpu = _gpu(world.device) if world.device.type == "cuda" else None
    all_versions = versions() | {"code": hash_code()}  # a hash of the files covers uncommitted changes too
    host = socket.gethostname()
    return Findings(
        rank=world.rank,
        host=host,
        versions=all_versions,
        config=to_yaml(config),
        gpu=gpu,
        stores=stores,
        errors=tuple(errors),
        limits=read_host_limits(config),
        local_rank=world.local_rank,
        ranks_per_node=world.ranks_per_node,
        ranks_per_copy=config.engine.get("zero_optimization", {}).get(KEY, 1),
    )


def hash_code() -> str:
    """Returns a hash of this checkout's Python files, by which different checkouts and local changes are detected."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for folder in _PACKAGES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def select_fullest_row(table: LengthTable, packing: PackingConfig) -> np.ndarray:
    """Returns positions of samples in the table that fill a row's budgets greedily, the longest first: int64 [n]."""
    tokens, tiles = table.rows["tokens"].astype(np.int64), table.rows["tiles"].astype(np.int64)
    free = np.ones(len(tokens), dtype=bool)
    left_tokens, left_tiles = packing.max_tokens, packing.max_tiles
    chosen: list[int] = []
    while True:
        fitting = np.flatnonzero(free & (tokens <= left_tokens) & (tiles <= left_tiles))
        if not len(fitting):
            return np.array(chosen, dtype=np.int64)
        longest = int(fitting[np.argmax(tokens[fitting])])
        chosen.append(longest)
        free[longest] = False
        left_tokens, left_tiles = left_tokens - tokens[longest], left_tiles - tiles[longest]


def run_trial_step(
    config: RunConfig,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    mixture: Mixture,
    table: LengthTable,
    processor: Processor,
) -> None:
    """Runs one training step on the fullest row, which is the same on every rank, and prints the result.

    It changes the engine's weights, so the engine must not be used afterwards.

    Raises:
        PreflightError: the loss is NaN or Inf.
        RuntimeError: the row does not fit into memory.
        SampleError: a sample of the row cannot be read or encoded.
    """
    positions = select_fullest_row(table, config.packing)
    rows = table.rows[positions]
    dataset = RowDataset(mixture, table, processor, config.stage.loss_weighting == "sample", config.data.read_retries)
    row = f"{len(rows)} sample(s), {rows['tokens'].sum():,} tokens, {rows['tiles'].sum():,} tiles"
    started = time.monotonic()
    try:
        loss = LossSums(*engine(dataset[positions].to(world.device))).total / int(rows["supervised"].sum())
        engine.backward(loss)
        engine.step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"the fullest row of this data ({row}) does not fit into the memory of {world.device} on "
            f"{socket.gethostname()}: lower packing.max_tokens or packing.max_tiles, name parts in recompute=[...], or "
            "choose engine=zero3"
        ) from error
    value = loss.item()
    barrier(world)
    result = f"{row} a rank, {time.monotonic() - started:.1f} s, loss {value:.3f}{_describe_peak_memory(world)}"
    problem = None if np.isfinite(value) else f"the loss of {row} is {value}; check the initial weights"
    _report_checks([Check("one step", result, problem)], config, world)
    if world.is_main:
        print(
            "pre-flight: nothing was saved; run the same command without preflight=only to start training",
            file=sys.stderr,
        )


def _describe_peak_memory(world: World) -> str:
    if world.device.type != "cuda":
        return ""
    peak, total = torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
    return f", peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"


def _report_checks(checks: Sequence[Check], config: RunConfig, world: World) -> None:
    """Logs the checks on every rank, with preflight=only in the terminal too. Raises the first problem."""
    for check in checks:
        logger.info("pre-flight: %s: %s", check.name, check.problem or check.result)
    if config.preflight == "only" and world.is_main:
        print(format_table(checks), file=sys.stderr)
    for check in checks:
        if check.problem:
            raise PreflightError(f"pre-flight, {check.name}: {check.problem}")


# ------------------------------------------------------------------------------------------- findings of one rank


def _check_shared_folder(folder: Path, token: str, world: World) -> None:
    """Writes a file and waits for rank 0's. Raises OSError if the folder is not writable or not shared with rank 0."""
    _token_file(folder, token, world.rank).write_text(token)
    main_file, deadline = _token_file(folder, token, 0), time.monotonic() + _TOKEN_TIMEOUT_S
    while not main_file.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{folder} is not shared with rank 0: its file {main_file.name} does not appear here")
        time.sleep(0.05)


def _token_file(folder: Path, token: str, rank: int) -> Path:
    return folder / f"preflight_{token}.{rank:03d}"


def _read_stores(config: RunConfig) -> dict[str, str]:
    """Reads one sample, with its images, of each source's store; returns the stores' fingerprints by name."""
    fingerprints = {}
    for name in sorted({*config.mixture.sources, *config.mixture.exclude}):
        store = Store.open(Path(config.data.store_root) / name)
        if len(store):
            store.sample(0)
        fingerprints[name] = store.fingerprint
    return fingerprints


def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(properties.name, str(properties.uuid), free, total)


# ------------------------------------------------------------------------------------------ checks between ranks


def _shared_token(world: World) -> str:
    """Returns a random string of rank 0, the same on all ranks."""
    token = [secrets.token_hex(8)]
    if world.size > 1:
        dist.broadcast_object_list(token, src=0, group=world.host_group)
    return token[0]


def _wait_for_all(world: World) -> None:
    if world.size == 1:
        return
    try:
        dist.monitored_barrier(world.host_group, timedelta(seconds=TIMEOUT_S), wait_all_ranks=True)
    except RuntimeError as error:  # rank 0's message names the missing ranks
        raise RuntimeError(
            f"pre-flight: a rank did not finish reading its data and the run folder within {TIMEOUT_S:.0f} s; check "
            f"the file systems of its node ({error})"
        ) from error


def _check_network(world: World) -> Check:
    """Checks an all-reduce over all ranks on the devices of the run. The second of two is timed."""
    if world.size == 1:
        return Check("network", "one rank: not used")
    seconds: list[float] = []
    wrong_sums: list[float] = []

    def all_reduce() -> None:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # the current device is set per thread
        for _ in range(2):
            numbers = torch.full((_NUM_ELEMENTS,), world.rank + 1.0, device=world.device)
            barrier(world)
            started = time.monotonic()
            dist.all_reduce(numbers)
            least, most = float(numbers.min()), float(numbers.max())
            seconds.append(time.monotonic() - started)
            wrong_sums.extend(value for value in (least, most) if value != world.size * (world.size + 1) / 2)

    _run_with_timeout(all_reduce)
    result = f"{4 * _NUM_ELEMENTS / 2**20:.0f} MiB all-reduced over {world.size} ranks in {1000 * seconds[-1]:.0f} ms"
    for rank, values in enumerate(all_gather_objects(world, wrong_sums)):
        if values:
            expected = world.size * (world.size + 1) / 2
            return Check(
                "network",
                result,
                f"an all-reduce gave {values[0]:g} instead of {expected:g} on rank {rank}; check that node's network "
                "card, driver and NCCL settings, or exclude the node",
            )
    return Check("network", result)


def _run_with_timeout(action: Callable[[], None]) -> None:
    """Runs the action in a thread, because NCCL has no timeout while it connects."""
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True, name="preflight")
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        raise RuntimeError(
            f"pre-flight: the first collective did not finish within {TIMEOUT_S:.0f} s: the nodes cannot reach each "
            "other; set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the right interface, NCCL_DEBUG=INFO for details"
        )
    if errors:
        raise errors[0]
