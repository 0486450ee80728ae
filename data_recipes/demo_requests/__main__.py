"""Program that makes training data from the requests of a demo's users, in two steps.

    python -m data_recipes.demo_requests collect --logs DIR --out DIR --model NAME
    python -m data_recipes.demo_requests answer --out DIR --answers FILE...

`collect` filters the requests in a demo's logs. It writes batch requests for a stronger model to
OUT/requests/requests_NNN.jsonl, the images to OUT/images, and the list of requests to OUT/kept.jsonl. A person should
review this list; removed lines are not used. The requests are answered with a batch service of the user's choice.
`answer` then writes OUT/demo_requests.json, LLaVA's conversation JSON, for configs/source/demo_requests.yaml. Neither
step uses the network.

Exit codes: 0 success; 1 I/O error; 2 user error.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import indent

from tabulate import tabulate

from data_recipes.demo_requests.duplicates import SeenRequests
from data_recipes.demo_requests.logs import DroppedRequest, DropReason, Request, read_requests
from data_recipes.demo_requests.request_files import BatchOptions, BatchWriter, KeptRequest, read_answers
from data_recipes.demo_requests.screen import find_personal_data, has_unsafe_term, read_unsafe_terms, strip_metadata
from data_recipes.raw.image_files import ImageError, load_image
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.arguments import (
    ArgumentParser,
    count_argument,
    path_argument,
    positive_argument,
    text_argument,
)
from data_recipes.schema.console import run_program
from data_recipes.schema.denied_files import describe_error
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, DataError


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; argparse exits with code 2 on invalid arguments."""
    parser = ArgumentParser(
        prog="python -m data_recipes.demo_requests", description="Make training data from a demo's logs."
    )
    steps = parser.add_subparsers(dest="step", required=True)
    collect_step = steps.add_parser("collect", help="write requests for a stronger model")
    collect_step.add_argument("--logs", type=path_argument, required=True, help="folder with the demo's logs")
    collect_step.add_argument("--out", type=path_argument, required=True, help="output folder")
    collect_step.add_argument(
        "--model", type=text_argument, required=True, help="name of the answering model, as used by the service"
    )
    collect_step.add_argument(
        "--max-tokens", type=positive_argument, default=1024, help="maximum length of an answer (%(default)s)"
    )
    collect_step.add_argument(
        "--pictures", choices=("inline", "path"), default="inline", help="how requests contain images"
    )
    collect_step.add_argument(
        "--unsafe-terms", type=path_argument, help="text file with one term per line; requests with any are dropped"
    )
    collect_step.add_argument("--limit", type=positive_argument, help="maximum number of requests, selected by hash")
    collect_step.add_argument(
        "--max-mib", type=count_argument, default=190, help="maximum size of a request file (%(default)s)"
    )
    collect_step.add_argument(
        "--max-requests", type=positive_argument, default=50_000, help="maximum requests per file (%(default)s)"
    )
    answer_step = steps.add_parser("answer", help="convert the answers to LLaVA JSON")
    answer_step.add_argument("--out", type=path_argument, required=True, help="output folder of `collect`")
    answer_step.add_argument(
        "--answers", type=path_argument, nargs="+", required=True, help="answer files of the service"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    options = parse_arguments(argv)
    try:
        if options.step == "collect":
            collect_requests(options)
        else:
            write_answers(options.out, options.answers)
    except DataError as error:
        print(f"demo_requests: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"demo_requests: {describe_error(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"demo_requests: {error}", file=sys.stderr)
        return 1
    return 0


def collect_requests(options: argparse.Namespace) -> None:
    """Read and filter the logs, and write the requests.

    Raises:
        DataError: there are no logs, the file of unsafe terms is missing, or `--out` has an earlier collection.
    """
    out: Path = options.out
    for name in ("kept.jsonl", "requests", "images"):
        if (out / name).exists():
            raise DataError(f"{out / name} already exists; choose another --out, or remove the earlier collection.")
    accepted, dropped = _select_requests(options)
    (out / "images").mkdir(parents=True)
    inline = options.pictures == "inline"
    batch = BatchOptions(options.model, options.max_tokens, inline, options.max_mib, options.max_requests)
    writer = BatchWriter(out / "requests", batch)
    with (out / "kept.jsonl").open("w", encoding="utf-8") as kept_file:
        for request_id, request in accepted:
            data = strip_metadata(request.image.read_bytes())
            image = f"images/{hashlib.sha256(data).hexdigest()[:32]}.jpg"
            (out / image).write_bytes(data)
            entry = KeptRequest(request_id, request.text, image)
            writer.write(entry, data)
            kept_file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
    _write_dropped(out / "left_out.jsonl", dropped, f"{len(accepted):,} requests in {out / 'requests'}")


def write_answers(out: Path, answers: Sequence[Path]) -> None:
    """Join the answers with the kept requests, and write LLaVA's conversation JSON.

    Args:
        out: the output folder of `collect`.
        answers: the answer files of the service.

    Raises:
        DataError: `out` has no collection, or an answer file does not exist.
    """
    accepted = _read_kept(out / "kept.jsonl")
    answer_texts: dict[str, str] = {}
    dropped: list[DroppedRequest] = []
    for location, request_id, result in read_answers(answers):
        if isinstance(result, DropReason):
            dropped.append(DroppedRequest(result, location))
        elif request_id not in accepted:
            dropped.append(DroppedRequest(DropReason.UNKNOWN_ID, location))
        elif request_id in answer_texts:
            dropped.append(DroppedRequest(DropReason.ANSWER_REPEATED, location))
        else:
            answer_texts[request_id] = result
    dropped += [
        DroppedRequest(DropReason.UNANSWERED, request_id) for request_id in accepted if request_id not in answer_texts
    ]
    records = [
        _make_record(request, answer_texts[request_id])
        for request_id, request in accepted.items()
        if request_id in answer_texts
    ]
    path = out / "demo_requests.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _write_dropped(out / "answers_left_out.jsonl", dropped, f"{len(records):,} conversations in {path}")


def _select_requests(options: argparse.Namespace) -> tuple[list[tuple[str, Request]], list[DroppedRequest]]:
    """Return the accepted (id, request) pairs sorted by id, and the dropped requests in the order of the logs."""
    terms = read_unsafe_terms(options.unsafe_terms) if options.unsafe_terms else None
    seen = SeenRequests()
    accepted: dict[str, Request] = {}
    dropped: list[DroppedRequest] = []
    for item in read_requests(options.logs):
        reason = item.reason if isinstance(item, DroppedRequest) else None
        if isinstance(item, Request):
            if item.flagged:
                reason = DropReason.FLAGGED
            elif item.moderated or has_unsafe_term(item.text, terms):
                reason = DropReason.UNSAFE
            else:
                reason = find_personal_data(item.text) or _check_image(item, seen)
        if reason is None:
            assert isinstance(item, Request)
            accepted[_request_id(item)] = item
        else:
            dropped.append(DroppedRequest(reason, item.location))
    ids = sorted(accepted)[: options.limit] if options.limit else sorted(accepted)
    return [(request_id, accepted[request_id]) for request_id in ids], dropped


def _read_kept(path: Path) -> dict[str, KeptRequest]:
    """Read the kept requests by id. Requests whose lines were removed in review are not used."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `collect` with this --out first.")
    accepted = {}
    for location, record in iter_records(path):
        try:
            accepted[record["id"]] = KeptRequest(record["id"], record["text"], record["image"])
        except (TypeError, KeyError) as error:
            raise DataError(f"{location}: not a line written by `collect`; correct it or remove the line.") from error
    return accepted


def _check_image(request: Request, seen: SeenRequests) -> DropReason | None:
    try:
        data = load_image(request.image).data
    except ImageError:
        return DropReason.IMAGE_UNUSABLE
    return None if seen.add_if_new(request.text, data) else DropReason.NEAR_DUPLICATE


def _request_id(request: Request) -> str:
    """Derive the id from text and image only, so that it reveals neither the user nor the time."""
    digest = hashlib.sha256(request.text.encode("utf-8", "replace") + b"\0" + request.image.read_bytes())
    return f"demo_{digest.hexdigest()[:24]}"


def _make_record(request: KeptRequest, text: str) -> dict[str, object]:
    turns = [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{request.text}"},
        {"from": "gpt", "value": text},
    ]
    return {"id": request.id, "image": Path(request.image).name, "conversations": turns}


def _write_dropped(path: Path, dropped: Sequence[DroppedRequest], summary: str) -> None:
    """Write the dropped requests to `path`, and print the number per reason."""
    lines = [json.dumps({"reason": item.reason, "place": item.location}) + "\n" for item in dropped]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"kept: {summary}")
    print(f"dropped: {len(dropped):,}, listed in {path}")
    rows = [(reason.value, f"{n:,}") for reason, n in Counter(item.reason for item in dropped).most_common()]
    if rows:
        print(indent(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=("left", "right")), "  "))


if __name__ == "__main__":
    sys.exit(run_program(main))
