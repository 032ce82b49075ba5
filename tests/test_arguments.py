"""What the flags' types read, at their limits."""

import pytest

from trainer.arguments import Problem, number, one_of, switch


@pytest.mark.parametrize("kind", [int, float])
def test_a_number_is_read_from_its_lower_to_its_upper_limit(kind):
    read = number(kind, 2, 5)
    assert [read(text) for text in ("2", "5")] == [2, 5]
    assert all(type(read(text)) is kind for text in ("2", "5"))
    for text in ("1", "6", "", "x", "nan", "inf", "-inf", "9" * 5000):
        problem = read(text)
        assert isinstance(problem, Problem) and "from 2 to 5" in problem and len(problem) < 99


def test_a_number_without_an_upper_limit_is_finite():
    assert number(float, 0)("1e12") == 1e12 and number(int, 0)("4294967296") == 2**32
    assert isinstance(number(float, 0)("inf"), Problem)
    assert isinstance(number(int, 0)("9" * 20), Problem)


def test_words_and_switches_are_read_exactly():
    assert switch("1") is True and switch("0") is False
    assert one_of("a", "b")("b") == "b"
    for read in (switch, one_of("a", "b")):
        assert all(isinstance(read(text), Problem) for text in ("", "2", "True", "B"))
