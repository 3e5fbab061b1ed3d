import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.scorer.answers import AnswerCheck, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        (r"thus \boxed{\frac{1}{2}} or \boxed{12}", "12"),
        ("The answer is 12. Or 13.", "12"),
        ("first 3, then 1,200 apples", "1,200"),
        ("it costs $5.50", "$5.50"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_answers_are_found(text, answer):
    assert AnswerCheck().extract(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,200", "1200.0", True),
        ("1/2", "0.5", True),
        ("$5", "5.", True),
        ("-3", "3", False),
        ("Paris.", "paris", True),
    ],
)
def test_numbers_are_compared_by_value(one, other, same):
    assert same_answer(one, other) is same


def test_a_reference_may_be_a_whole_solution():
    check = AnswerCheck()

    assert check.is_correct("so the answer is 18", "9 * 2 = 18\n#### 18") is True
    assert check.is_correct("so the answer is 17", "9 * 2 = 18\n#### 18") is False
    assert check.is_correct("I do not know", "18") is None


def test_a_pattern_of_the_users_own():
    check = AnswerCheck(r"result=(\w+)")

    assert check.extract("result=a and result=b; 5") == "b"
    assert check.extract("5") is None
    with pytest.raises(ConfigError, match="needs a group"):
        AnswerCheck("result=.*")
    with pytest.raises(ConfigError, match="no regular expression"):
        AnswerCheck("(")
