"""Owns the proofs about messages: which conversations pass, and the reason each of the others gets."""

from typing import Any

import pytest

from data_recipes.schema.sample import MAX_CHARACTERS, Message, Reason, Reject, Sample, assemble, check

ASK, ANSWER = ("human", "Why?"), ("gpt", "Because.")


def judged(turns: list[tuple[Any, Any]], *pictures: bytes) -> Sample | Reject:
    """What becomes of a raw conversation."""
    result = assemble("a", turns, pictures, "file.json, record 1")
    return check(result) or result if isinstance(result, Sample) else result


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
def test_bad_conversations_get_their_reason(turns: list[tuple[Any, Any]], reason: Reason) -> None:
    """Each rule has its own reason, and a reject says where the record is."""
    result = judged(turns)
    assert isinstance(result, Reject)
    assert (result.reason, result.id, result.place) == (reason, "a", "file.json, record 1")
    assert result.detail


@pytest.mark.parametrize("num_pictures", [0, 1, 3])
def test_placeholders_equal_pictures(num_pictures: int) -> None:
    """Fewer and more pictures than placeholders are both refused, with both numbers."""
    result = judged([("human", "<image><image>\nCompare."), ANSWER], *[b"x"] * num_pictures)
    assert isinstance(result, Reject)
    assert result.detail == f"2 <image> for {num_pictures} pictures"


def test_whole_conversations_pass_unchanged() -> None:
    """System, user and assistant under any known name keep their text to the letter."""
    result = judged([("system", "Be brief."), ("user", " <image>\n Why? "), ("chatgpt", "So.\n")], b"x")
    assert isinstance(result, Sample)
    assert [m.role for m in result.messages] == ["system", "user", "assistant"]
    assert [m.text for m in result.messages] == ["Be brief.", " <image>\n Why? ", "So.\n"]
    assert result.repairs == ()


def test_dropped_turns_are_noted() -> None:
    """An answer that nobody asked for, and a last question that nobody answers, go, and it is noted."""
    result = judged([ANSWER, ASK, ANSWER, ASK])
    assert isinstance(result, Sample)
    assert [m.role for m in result.messages] == ["user", "assistant"]
    assert result.repairs == ("first_turn_dropped", "last_turn_dropped")


def test_a_reader_that_breaks_its_promise_is_caught() -> None:
    """A reader of one's own may put anything into a Message; the store's check does not crash on it."""
    sample = Sample("a", (Message("user", "Why?"), Message("assistant", 3)))  # type: ignore[arg-type]
    result = check(sample)
    assert result is not None
    assert result.reason is Reason.NOT_A_STRING
