"""Tests of the flight recorder's variables and of the record that a rank leaves."""

from pathlib import Path

import pytest

from train.supervision import flight_recorder

READER = "torch._C._distributed_c10d._dump_nccl_trace"


def test_variables_are_set_unless_the_user_has(tmp_path: Path) -> None:
    """The record goes into the run's log folder; what the user has set stays, under the new name or the old one."""
    environment: dict[str, str] = {}
    flight_recorder.configure(environment, tmp_path / "log")
    prefix = str(tmp_path / "log" / "nccl_rank_")
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    chosen = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_FR_DUMP_TEMP_FILE": "/x/", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    environment = dict(chosen)
    flight_recorder.configure(environment, tmp_path / "log")
    assert environment == chosen


def test_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is written next to the logs; a build of torch without NCCL, and a dump that fails, leave none."""
    log = (tmp_path / "rank_003.log").open("a")
    monkeypatch.delattr(READER, raising=False)
    flight_recorder.dump(tmp_path, 3, log)

    def fail() -> bytes:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(READER, fail, raising=False)
    flight_recorder.dump(tmp_path, 3, log)
    assert not (tmp_path / "nccl_rank_3").exists()
    monkeypatch.setattr(READER, lambda: b"record", raising=False)
    flight_recorder.dump(tmp_path, 3, log)
    assert (tmp_path / "nccl_rank_3").read_bytes() == b"record"
    log.close()
