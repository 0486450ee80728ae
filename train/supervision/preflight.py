"""Pre-flight: what would end a run on many nodes later is looked for at its start, on all of them at once.

Owns: what each rank looks at, the collective that is tried, the verdict, and the one step of `preflight=only`. Every
rank learns what every other found, so all come to one verdict and leave together, with one sentence.
Leaves: the comparison and the table to `preflight_checks.py`, meeting the ranks to `world.py`.

    preflight=auto   at every start, a second or two: versions, configuration, GPUs, data, run folder, clocks, network
    preflight=only   these; then one step of the built engine on the fullest row of the data; the table; the end
    preflight=off    nothing
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
from train.data.loader import Rows
from train.distributed.versions import versions
from train.distributed.world import World, all_gather_objects, barrier, is_out_of_memory
from train.supervision.preflight_checks import Check, Findings, Gpu, compare, format_table

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long the others wait for a rank that looks at what it has."""
_OURS = ("llava_next", "data_recipes", "train")
_TOKEN_PATIENCE_S = 10.0  # a network file system may show a new file to other nodes a little later
_NUMBERS = 2**22  # of the collective: 16 MiB


class PreflightError(ConfigError):
    """What a rank has, or lacks, would end the run; names rank, host, what differs and the way out."""


def check(config: RunConfig, world: World) -> None:
    """Looks, compares, and tries one collective. Every rank must call it, and all come to the same end.

    Raises:
        PreflightError: with the first problem that was found.
        RuntimeError: a rank did not come back within `PATIENCE_S`.
    """
    started = time.monotonic()
    token = _shared_token(world)
    own = look(config, world, token)
    _wait_for_all(world)
    _token_file(config.run_dir / "log", token, world.rank).unlink(missing_ok=True)
    checks = compare(all_gather_objects(world, replace(own, clock=time.time())))
    if not any(one.problem for one in checks):
        checks.append(_try_network(world))
    _tell(checks, config, world)
    logger.info("pre-flight took %.1f s", time.monotonic() - started)


def look(config: RunConfig, world: World, token: str) -> Findings:
    """What this rank has. What it finds wrong is not raised: the others are to hear of it.

    Args:
        token: a word that all ranks share, for the files by which they see that their folder is one.
    """
    stores: dict[str, str] = {}
    troubles: list[tuple[str, str]] = []

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, it is this rank's news
            troubles.append((name, f"{type(error).__name__}: {' '.join(str(error).split())}"))

    attempt("run folder", lambda: _meet_in(config.run_dir / "log", token, world))
    attempt("data", lambda: stores.update(_read_stores(config)))
    gpu = _gpu(world.device) if world.device.type == "cuda" else None
    found = versions() | {"code": code_hash()}  # of the files: a commit's name says nothing of what was changed since
    host = socket.gethostname()
    return Findings(world.rank, host, found, to_yaml(config), gpu, stores, troubles=tuple(troubles))


def code_hash() -> str:
    """A hash of this checkout's Python files: two nodes may have two checkouts, or one an uncommitted change."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for folder in _OURS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def fullest_row(table: LengthTable, packing: PackingConfig) -> np.ndarray:
    """Positions of samples that fill a row's budgets as far as they go, the longest first."""
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


def rehearse(
    config: RunConfig,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    mixture: Mixture,
    table: LengthTable,
    processor: Processor,
) -> None:
    """One step on the fullest row, the same on every rank. It changes the engine's weights: nothing may follow it.

    Raises:
        PreflightError: its loss is NaN or Inf.
        RuntimeError: it does not fit. Others are those of reading and encoding.
    """
    positions = fullest_row(table, config.packing)
    rows = table.rows[positions]
    dataset = Rows(mixture, table, processor, config.stage.loss_weighting == "sample", config.data.read_retries)
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
            f"the fullest row of this data ({row}) does not fit into {world.device} of {socket.gethostname()}: "
            "lower packing.max_tokens or packing.max_tiles, name parts in recompute=[...], or choose engine=zero3"
        ) from error
    value = loss.item()
    barrier(world)
    found = f"{row} a rank, {time.monotonic() - started:.1f} s, loss {value:.3f}{_peak(world)}"
    problem = None if np.isfinite(value) else f"the loss of {row} is {value}; look at the weights that it starts from"
    _tell([Check("one step", found, problem)], config, world)
    if world.is_main:
        print(
            "pre-flight: nothing was trained; the same command without preflight=only starts the run", file=sys.stderr
        )


def _peak(world: World) -> str:
    if world.device.type != "cuda":
        return ""
    peak, total = torch.cuda.max_memory_allocated(world.device), torch.cuda.mem_get_info(world.device)[1]
    return f", peak {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"


def _tell(checks: Sequence[Check], config: RunConfig, world: World) -> None:
    """Into every rank's log; under preflight=only onto the terminal too. Raises the first problem."""
    for one in checks:
        logger.info("pre-flight: %s: %s", one.name, one.problem or one.found)
    if config.preflight == "only" and world.is_main:
        print(format_table(checks), file=sys.stderr)
    for one in checks:
        if one.problem:
            raise PreflightError(f"pre-flight, {one.name}: {one.problem}")


# ----------------------------------------------------------------------------------------- what a rank finds itself


def _meet_in(folder: Path, token: str, world: World) -> None:
    """Each rank writes there, and must see a file of rank 0: a folder on each node's own disk would be many runs'."""
    _token_file(folder, token, world.rank).write_text(token)
    of_main, deadline = _token_file(folder, token, 0), time.monotonic() + _TOKEN_PATIENCE_S
    while not of_main.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{folder} is not the folder that rank 0 has under this name: {of_main.name} is not in it")
        time.sleep(0.05)


def _token_file(folder: Path, token: str, rank: int) -> Path:
    return folder / f"preflight_{token}.{rank:03d}"


def _read_stores(config: RunConfig) -> dict[str, str]:
    """The fingerprint of each source's store; one sample of each is read, pictures too."""
    found = {}
    for name in sorted({*config.mixture.sources, *config.mixture.exclude}):
        store = Store.open(Path(config.data.store_root) / name)
        if len(store):
            store.sample(0)
        found[name] = store.fingerprint
    return found


def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(properties.name, str(properties.uuid), free, total)


# ------------------------------------------------------------------------------------------------ between the ranks


def _shared_token(world: World) -> str:
    """A word that rank 0 has made up, the same on all ranks."""
    words = [secrets.token_hex(8)]
    if world.size > 1:
        dist.broadcast_object_list(words, src=0, group=world.host_group)
    return words[0]


def _wait_for_all(world: World) -> None:
    if world.size == 1:
        return
    try:
        dist.monitored_barrier(world.host_group, timedelta(seconds=PATIENCE_S), wait_all_ranks=True)
    except RuntimeError as error:  # rank 0's names those that did not come
        raise RuntimeError(
            f"pre-flight: a rank did not come back within {PATIENCE_S:.0f} s from looking at its data and the run's "
            f"folder; look at the file systems of its node ({error})"
        ) from error


def _try_network(world: World) -> Check:
    """A sum over all ranks, on the devices that the run computes on; its time is the second one's."""
    if world.size == 1:
        return Check("network", "one rank: none is needed")
    took: list[float] = []
    wrong: list[float] = []

    def add_up() -> None:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # it is a thread's own
        for _ in range(2):
            numbers = torch.full((_NUMBERS,), world.rank + 1.0, device=world.device)
            barrier(world)
            started = time.monotonic()
            dist.all_reduce(numbers)
            least, most = float(numbers.min()), float(numbers.max())
            took.append(time.monotonic() - started)
            wrong.extend(value for value in (least, most) if value != world.size * (world.size + 1) / 2)

    _within_patience(add_up)
    found = f"{4 * _NUMBERS / 2**20:.0f} MiB added up over {world.size} ranks in {1000 * took[-1]:.0f} ms"
    for rank, values in enumerate(all_gather_objects(world, wrong)):
        if values:
            right = world.size * (world.size + 1) / 2
            return Check(
                "network",
                found,
                f"a sum that is {right:g} came out as {values[0]:g} on rank {rank}; look at that node's network card, "
                "driver and NCCL's settings, or leave the node out",
            )
    return Check("network", found)


def _within_patience(action: Callable[[], None]) -> None:
    """Does it in a thread: making NCCL's connections can hang where nothing times out."""
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True, name="preflight")
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        raise RuntimeError(
            f"pre-flight: the first collective did not end within {PATIENCE_S:.0f} s: the nodes do not reach each "
            "other; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network, NCCL_DEBUG=INFO tells more"
        )
    if errors:
        raise errors[0]
