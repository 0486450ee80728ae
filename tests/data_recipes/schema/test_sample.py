"""Tests of the rules for conversations and of the reasons for rejecting them."""

from typing import Any

import pytest

from data_recipes.schema.sample import MAX_CHARACTERS, Message, Reason, Reject, Sample, assemble, check_sample

ASK, ANSWER = ("human", "Why?"), ("gpt", "Because.")


def assemble_and_check(turns: list[tuple[Any, Any]], *images: bytes) -> Sample | Reject:
    """Assemble and check a raw conversation."""
    result = assemble("a", turns, images, "file.json, record 1")
    return check_sample(result) or result if isinstance(result, Sample) else result


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([ASK, ("gpt", 7)], Reason.NOT_A_STRING),
        ([ASK, ("gpt", None)], Reason.NOT_A_STRING),
        ([(None, "Why?"), ANSWER], Reason.NOT_A_STRING),
        ([ASK, ("gpt", " \n")], Reason.EMPTY_ANSWER),
        ([ASK, ASK, ANSWER], Reason.ROLES_DO_NOT_ALTERNATE),
        ([ASK, ("narrator", "Because.")], Reason.ROLES_DO_NOT_ALTERNATE),
        ([ASK, ANSWER, ("system", "Be brief."), ANSWER], Reason.ROLES_DO_NOT_ALTERNATE),
        ([ANSWER, ANSWER], Reason.FIRST_TURN_NOT_USER),
        ([ASK], Reason.NO_ANSWER),
        ([], Reason.NO_ANSWER),
        ([ANSWER], Reason.NO_ANSWER),
        ([("human", "<image>\nWhy?"), ANSWER], Reason.PLACEHOLDER_MISMATCH),
        ([ASK, ("gpt", "See <image>.")], Reason.PLACEHOLDER_MISMATCH),
        ([ASK, ("gpt", "a" * MAX_CHARACTERS)], Reason.TOO_LONG),
        ([ASK, ("gpt", "half a pair: \ud83d")], Reason.WRONG_ENCODING),
    ],
)
def test_invalid_conversations_have_reasons(turns: list[tuple[Any, Any]], reason: Reason) -> None:
    """Each rule has its own reason, and a reject has the location of the record."""
    result = assemble_and_check(turns)
    assert isinstance(result, Reject)
    assert (result.reason, result.id, result.location) == (reason, "a", "file.json, record 1")
    assert result.detail


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_number_of_placeholders(num_images: int) -> None:
    """Fewer and more images than placeholders are rejected with both numbers."""
    result = assemble_and_check([("human", "<image><image>\nCompare."), ANSWER], *[b"x"] * num_images)
    assert isinstance(result, Reject)
    assert result.detail == f"2 <image> for {num_images} images"


def test_valid_conversation() -> None:
    """Texts of system, user and assistant turns are unchanged, with any known speaker name."""
    result = assemble_and_check([("system", "Be brief."), ("user", " <image>\n Why? "), ("chatgpt", "So.\n")], b"x")
    assert isinstance(result, Sample)
    assert [m.role for m in result.messages] == ["system", "user", "assistant"]
    assert [m.text for m in result.messages] == ["Be brief.", " <image>\n Why? ", "So.\n"]
    assert result.repairs == ()


def test_dropped_turns() -> None:
    """A leading answer and a trailing question are dropped and listed in `repairs`."""
    result = assemble_and_check([ANSWER, ASK, ANSWER, ASK])
    assert isinstance(result, Sample)
    assert [m.role for m in result.messages] == ["user", "assistant"]
    assert result.repairs == ("first_turn_dropped", "last_turn_dropped")


def test_wrong_types_of_custom_reader() -> None:
    """Values of wrong types from a custom reader are rejected."""
    sample = Sample("a", (Message("user", "Why?"), Message("assistant", 3)))  # type: ignore[arg-type]
    result = check_sample(sample)
    assert result is not None
    assert result.reason is Reason.NOT_A_STRING
