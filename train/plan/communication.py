"""Lists the collectives of a step and computes their seconds and bytes, inside a node and across nodes.

What DeepSpeed 0.19.8 issues was recorded on real ranks (tests/train/plan/test_communication.py). In formulas, R is the
number of ranks, T the trained parameters, P all parameters, s the bytes of a weight and g those of a reduced gradient.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from train.plan.execution_settings import ExecutionSettings
from train.plan.hardware import Hardware
from train.plan.model_facts import TensorSizes

LINK_SHARE = 0.8
"""Fraction of a link's rate that a collective with large messages reaches.

All-reduces of 17 GB reached 0.78 on eight A100 (stas00/ml-engineering, network/README.md).
"""
OVERLAP = 0.7
"""Fraction of a step's computation that overlapped communication can be hidden behind. Assumed; plans print 0 too."""
SMALL_ALL_REDUCE = 500_000_000
"""Elements of an all-reduce without ZeRO (DeepSpeed's deepspeed.py, MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class Collectives:
    """Equal collectives of a step.

    Attributes:
        kind: what they carry.
        count: number per step.
        num_bytes: whole messages of all of them: gathered weights, or gradients before their reduction.
        across: whether they connect the ranks of all nodes, and not those of one node.
        overlaps: whether they are issued while the ranks compute.
    """

    kind: str
    count: float
    num_bytes: float
    across: bool
    overlaps: bool


@dataclass(frozen=True)
class Communication:
    """The communication of a step.

    Attributes:
        exposed_s: seconds that ranks wait for it, if computation hides `OVERLAP` of its own duration.
        hidden_s: further seconds that computation is assumed to hide.
        across_bytes: bytes that a node sends to others.
        inside_bytes: bytes that a rank sends in collectives of its own node.
    """

    exposed_s: float
    hidden_s: float
    across_bytes: float
    inside_bytes: float

    @property
    def total_s(self) -> float:
        """Seconds of all collectives, one after the other."""
        return self.exposed_s + self.hidden_s


def estimate_ring(num_bytes: float, hardware: Hardware, nodes: int) -> float:
    """Returns the seconds of one all-gather or reduce-scatter of that many bytes (an all-reduce takes twice as long).

    A ring of R ranks takes R - 1 hops and moves (R - 1) / R of the bytes through every link (Thakur, Rabenseifner,
    Gropp 2005). Between nodes, every node uses all of its ports together, as NCCL's parallel rings do. NCCL has trees
    for all-reduces only (src/graph/tuning.cc), so the latency grows with the number of ranks.
    """
    num_ranks = nodes * hardware.gpus_per_node
    if num_ranks == 1:
        return 0.0
    rate = min(hardware.link_gb_s, hardware.network_gb_s) if nodes > 1 else hardware.link_gb_s
    node_hops = nodes if nodes > 1 else 0
    latency = (num_ranks - 1 - node_hops) * hardware.link_latency_us + node_hops * hardware.network_latency_us
    return (num_ranks - 1) / num_ranks * num_bytes / (rate * 1e9 * LINK_SHARE) + max(0.0, latency) * 1e-6


def estimate_communication(
    collectives: Sequence[Collectives], hardware: Hardware, nodes: int, compute_s: float, *, overlap: float = OVERLAP
) -> Communication:
    """Returns the communication of a step.

    Args:
        collectives: of the step.
        compute_s: seconds that the step computes.
        overlap: fraction of them that can hide communication.
    """
    seconds = {True: 0.0, False: 0.0}
    for each in collectives:
        ring_s = estimate_ring(each.num_bytes / max(1.0, each.count), hardware, nodes if each.across else 1)
        seconds[each.overlaps] += each.count * ring_s
    hidden_s = min(seconds[True], overlap * compute_s)
    across, inside = count_bytes(collectives, nodes, hardware.gpus_per_node)
    return Communication(sum(seconds.values()) - hidden_s, hidden_s, across, inside)


def count_bytes(collectives: Iterable[Collectives], nodes: int, gpus_per_node: int) -> tuple[float, float]:
    """Returns the bytes that a node sends to other nodes, and those that a rank sends in collectives of its own node.

    A ring over R ranks sends (R - 1) / R of a message through every link, and so once out of every node.
    """
    num_ranks = nodes * gpus_per_node
    across = sum(each.num_bytes for each in collectives if each.across) * (num_ranks - 1) / num_ranks
    inside = sum(each.num_bytes for each in collectives if not each.across) * (gpus_per_node - 1) / gpus_per_node
    return (across, inside) if nodes > 1 else (0.0, across + inside)


def list_collectives(
    tensors: TensorSizes, settings: ExecutionSettings, gpus_per_node: int, micro_steps: float, *, half: bool
) -> Iterator[Collectives]:
    """Yields the collectives of a step. An all-reduce is one reduce-scatter and one all-gather of its bytes.

    Stages 0 and 1 all-reduce the gradients once per step, stage 2 in every micro-step (where DeepSpeed all-reduces its
    buckets too), stage 3 reduce-scatters them in every micro-step. Stages 1 and 2 gather the trained weights after the
    update, with one collective per optimizer group. See `_list_gathers` for stage 3.
    """
    stage, trained = settings.zero_stage, sum(tensors.trained)
    bucket = SMALL_ALL_REDUCE if stage == 0 else settings.reduce_bucket
    buckets = count_groups(tensors.trained, bucket)
    repeats = micro_steps if stage >= 2 else 1.0
    directions = 1 if stage == 3 else 2
    yield Collectives(
        "gradients",
        directions * buckets * repeats,
        directions * float(settings.gradient_bytes * trained) * repeats,
        across=True,
        overlaps=settings.overlaps and stage >= 2,
    )
    s = 2 if half else 4
    if stage in (1, 2):
        yield Collectives("updated weights", tensors.num_groups, float(s * trained), across=True, overlaps=False)
    if stage == 3:
        yield from _list_gathers(tensors, settings, gpus_per_node, micro_steps, s)


def _list_gathers(
    tensors: TensorSizes, settings: ExecutionSettings, gpus_per_node: int, micro_steps: float, s: int
) -> Iterator[Collectives]:
    """Yields what ZeRO-3 gathers in a step: weights in every micro-step, and small ones once after the update.

    Weights of at most `stage3_param_persistence_threshold` elements stay whole; the update gathers them one by one.
    With hpZ (ZeRO++, Wang et al. 2023) only the first gather of a trained weight after an update crosses the nodes.
    """
    threshold = settings.persistence_threshold
    order = list_gathered(tensors, settings)
    every = micro_steps * sum(order)
    updated = float(sum(size for size in tensors.trained if size > threshold))
    across = min(every, updated) if settings.ranks_per_copy(settings.nodes * gpus_per_node) > 1 else every
    for kind, elements, crosses in (("weights", across, True), ("weights inside a node", every - across, False)):
        count = count_gathers(order, settings) * elements / max(1, sum(order))
        yield Collectives(kind, count, s * elements, across=crosses, overlaps=settings.overlaps)
    persistent = [size for size in tensors.sizes if size <= threshold]
    yield Collectives("small weights", len(persistent), float(s * sum(persistent)), across=True, overlaps=False)


def list_gathered(tensors: TensorSizes, settings: ExecutionSettings) -> list[int]:
    """Returns the elements of the tensors that ZeRO-3 gathers in a micro-step, in their order.

    The forward pass gathers all, and the backward pass does so again, except for the last ones that are still there: up
    to `stage3_max_live_parameters` elements, or those that are used again within `stage3_max_reuse_distance`. Recompute
    adds none: if a block fits into that distance, its weights stay from its second forward pass to its backward pass.
    """
    passes = 3 if "language_model" in settings.recompute else 2
    kept = max(settings.live_parameters, settings.reuse_distance / passes)
    forward, backward = (
        [size for size in sizes if size > settings.persistence_threshold] for sizes in (tensors.sizes, tensors.backward)
    )
    for size in reversed(backward):
        kept -= size
        if kept < 0:
            break
        backward = backward[:-1]
    return forward + backward[::-1]


def count_gathers(order: Sequence[int], settings: ExecutionSettings) -> int:
    """Returns the number of all-gathers in which ZeRO-3 gathers tensors of these sizes.

    The first one is gathered alone. The others are gathered ahead of their use, in groups that end when they have
    `stage3_prefetch_bucket_size` elements, or as many as `stage3_max_live_parameters` has room for. Then a group waits
    until tensors before it have been released.
    """
    waiting, released = deque(order), iter(order)
    room, limit, count = float(settings.live_parameters), 1.0, 0
    while waiting:
        if room <= 0:
            room += next(released)
            continue
        gathered = 0
        while waiting and gathered < min(room, limit):
            gathered += waiting.popleft()
        room, limit, count = room - gathered, settings.prefetch_bucket, count + 1
    return count


def count_groups(sizes: Iterable[int], limit: int) -> int:
    """Returns the number of groups of consecutive tensors that hold at most `limit` elements, or one larger tensor."""
    groups, filled = 0, limit + 1
    for size in sizes:
        if filled + size > limit:
            groups, filled = groups + 1, 0
        filled += size
    return groups
