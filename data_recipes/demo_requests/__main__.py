"""The program that makes training data of what a demo's users asked, in two steps with a stronger model between them.

    python -m data_recipes.demo_requests collect --logs DIR --out DIR --model NAME
    python -m data_recipes.demo_requests answer --out DIR --answers FILE...

Owns: the command line, the output folder, the tables of what was left out and why, exit codes. Leaves: the logs to
`logs.py`, what may not go on to `screen.py` and `duplicates.py`, the batch files to `request_files.py`.

`collect` writes OUT/requests/requests_NNN.jsonl, which you hand to a batch service of your choice; OUT/images; and
OUT/kept.jsonl, which a person should look through: lines taken out of it are not used. `answer` writes
OUT/demo_requests.json, LLaVA's conversation JSON, for configs/source/demo_requests.yaml. Neither uses the network.

Exit codes: 0 done; 1 the disk failed; 2 the user's mistake, in one sentence.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.demo_requests.duplicates import SeenRequests
from data_recipes.demo_requests.logs import Drop, LeftOut, Request, read_requests
from data_recipes.demo_requests.request_files import BatchOptions, BatchWriter, Kept, read_answers
from data_recipes.demo_requests.screen import has_term, only_pixels, private, read_terms
from data_recipes.raw.image_files import PictureError, load
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, DataError


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; argparse itself leaves with 2 on what it does not understand."""
    parser = argparse.ArgumentParser(prog="python -m data_recipes.demo_requests", description="a demo's logs → data")
    steps = parser.add_subparsers(dest="step", required=True)
    collect_step = steps.add_parser("collect", help="logs → requests for a stronger model")
    collect_step.add_argument("--logs", type=Path, required=True, help="the folder that the demo logs to")
    collect_step.add_argument("--out", type=Path, required=True, help="where requests and pictures go")
    collect_step.add_argument("--model", required=True, help="the model that shall answer, as its service names it")
    collect_step.add_argument("--max-tokens", type=int, default=1024, help="of an answer (%(default)s)")
    collect_step.add_argument("--pictures", choices=("inline", "path"), default="inline", help="in the requests")
    collect_step.add_argument("--unsafe-terms", type=Path, help="a text file of terms, one a line, to leave out")
    collect_step.add_argument("--limit", type=int, help="at most so many requests, those with the smallest hashes")
    collect_step.add_argument("--max-mib", type=int, default=190, help="of one file of requests (%(default)s)")
    collect_step.add_argument("--max-requests", type=int, default=50_000, help="in one file (%(default)s)")
    answer_step = steps.add_parser("answer", help="answers → LLaVA JSON")
    answer_step.add_argument("--out", type=Path, required=True, help="the folder that `collect` made")
    answer_step.add_argument("--answers", type=Path, nargs="+", required=True, help="the service's files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    options = parse(argv)
    try:
        if options.step == "collect":
            collect(options)
        else:
            answer(options.out, options.answers)
    except DataError as error:
        print(f"demo_requests: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"demo_requests: {error}", file=sys.stderr)
        return 1
    return 0


def collect(options: argparse.Namespace) -> None:
    """Read the logs, leave out what may not go on, and write the requests.

    Raises:
        DataError: no logs, no such file of terms, or `--out` holds an earlier collection.
    """
    out: Path = options.out
    for name in ("kept.jsonl", "requests", "images"):
        if (out / name).exists():
            raise DataError(f"{out / name} is there already: choose another --out, or remove the earlier collection.")
    kept, left_out = _choose(options)
    (out / "images").mkdir(parents=True)
    inline = options.pictures == "inline"
    batch = BatchOptions(options.model, options.max_tokens, inline, options.max_mib, options.max_requests)
    writer = BatchWriter(out / "requests", batch)
    with (out / "kept.jsonl").open("w", encoding="utf-8") as list_of_kept:
        for request_id, request in kept:
            picture = only_pixels(request.picture.read_bytes())
            image = f"images/{hashlib.sha256(picture).hexdigest()[:32]}.jpg"
            (out / image).write_bytes(picture)
            line = Kept(request_id, request.text, image)
            writer.write(line, picture)
            list_of_kept.write(json.dumps(line.__dict__, ensure_ascii=False) + "\n")
    _report(out / "left_out.jsonl", left_out, f"{len(kept):,} requests in {out / 'requests'}")


def answer(out: Path, answers: Sequence[Path]) -> None:
    """Join answers with the kept requests, and write LLaVA's conversation JSON.

    Raises:
        DataError: `out` holds no collection, or there is no such file of answers.
    """
    kept = _read_kept(out / "kept.jsonl")
    found: dict[str, str] = {}
    left_out: list[LeftOut] = []
    for place, request_id, result in read_answers(answers):
        if isinstance(result, Drop):
            left_out.append(LeftOut(result, place))
        elif request_id not in kept:
            left_out.append(LeftOut(Drop.UNKNOWN_ID, place))
        elif request_id in found:
            left_out.append(LeftOut(Drop.ANSWER_REPEATED, place))
        else:
            found[request_id] = result
    left_out += [LeftOut(Drop.UNANSWERED, request_id) for request_id in kept if request_id not in found]
    records = [_record(kept[request_id], found[request_id]) for request_id in kept if request_id in found]
    path = out / "demo_requests.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _report(out / "answers_left_out.jsonl", left_out, f"{len(records):,} conversations in {path}")


def _choose(options: argparse.Namespace) -> tuple[list[tuple[str, Request]], list[LeftOut]]:
    """(kept requests by id, what was left out), in the order of the logs."""
    terms = read_terms(options.unsafe_terms) if options.unsafe_terms else None
    seen = SeenRequests()
    kept: dict[str, Request] = {}
    left_out: list[LeftOut] = []
    for item in read_requests(options.logs):
        reason = item.reason if isinstance(item, LeftOut) else None
        if isinstance(item, Request):
            if item.flagged:
                reason = Drop.FLAGGED
            elif item.moderated or has_term(item.text, terms):
                reason = Drop.UNSAFE
            else:
                reason = private(item.text) or _judge_picture(item, seen)
        if reason is None:
            assert isinstance(item, Request)
            kept[_request_id(item)] = item
        else:
            left_out.append(LeftOut(reason, item.place))
    ids = sorted(kept)[: options.limit] if options.limit else sorted(kept)
    return [(request_id, kept[request_id]) for request_id in ids], left_out


def _read_kept(path: Path) -> dict[str, Kept]:
    """The kept requests by id; a line that a person took out, or broke, asks for nothing."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; run `collect` first, with this --out.")
    kept = {}
    for place, record in iter_records(path):
        try:
            kept[record["id"]] = Kept(record["id"], record["text"], record["image"])
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{place}: not a line that `collect` wrote; mend it, or take the whole line out."
            ) from error
    return kept


def _judge_picture(request: Request, seen: SeenRequests) -> Drop | None:
    try:
        picture = load(request.picture).data
    except PictureError:
        return Drop.PICTURE_UNUSABLE
    return None if seen.is_new(request.text, picture) else Drop.NEAR_DUPLICATE


def _request_id(request: Request) -> str:
    """A hash of what was asked: it says nothing about who asked, or when."""
    digest = hashlib.sha256(request.text.encode("utf-8", "replace") + b"\0" + request.picture.read_bytes())
    return f"demo_{digest.hexdigest()[:24]}"


def _record(kept: Kept, text: str) -> dict[str, object]:
    turns = [
        {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{kept.text}"},
        {"from": "gpt", "value": text},
    ]
    return {"id": kept.id, "image": Path(kept.image).name, "conversations": turns}


def _report(path: Path, left_out: Sequence[LeftOut], kept: str) -> None:
    """Write what was left out, and print how much of it for each reason."""
    path.write_text("".join(_lines(left_out)), encoding="utf-8")
    print(f"kept: {kept}")
    print(f"left out: {len(left_out):,}, listed in {path}")
    for reason, count in Counter(item.reason for item in left_out).most_common():
        print(f"  {reason.value:24} {count:>8,}")


def _lines(left_out: Sequence[LeftOut]) -> Iterator[str]:
    for item in left_out:
        yield json.dumps({"reason": item.reason, "place": item.place}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
