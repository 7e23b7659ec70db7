"""What a model wrote becomes turns, or is rejected with a reason that names what is wrong."""

import re

import pytest
from llm_server import TALK

from mmit.data.generate.answers import RejectedError, read_answer
from mmit.data.generate.prompts import Kind, load_prompts

PROSE = "A dog lies on the grass in front of a red house. Behind it, two children play with a ball."


def test_marks_open_questions_and_answers() -> None:
    turns = [("What is there?", "There is a dog."), ("Where is it?", "It is on the left.")]
    assert read_answer(TALK, "conversation") == turns
    marked = (
        "**Question 1:** What is there?\n\n**Answer 1:** There is a dog.\n\nq: Where is it?\na: It is on the left.\n"
    )
    assert read_answer(marked, "conversation") == turns


def test_an_answer_may_have_several_lines_and_a_colon() -> None:
    text = "Q: Why hurry?\nA: Two reasons: rain\nand the A: line ends soon."
    assert read_answer(text, "reasoning") == [("Why hurry?", "Two reasons: rain\nand the A: line ends soon.")]


def test_a_description_answers_the_question_it_was_written_for() -> None:
    assert read_answer(f"\n{PROSE}\n", "description", question="Describe it.") == [("Describe it.", PROSE)]


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("A dog on the grass.", "conversation", 'no "Q:" and "A:"'),
        (f"Sure! Here it is.\n{TALK}", "conversation", "text before the first question: 'Sure! Here it is.'"),
        ("Q: One?\nQ: Two?\nA: Both.", "conversation", "do not alternate: QQA"),
        (f"{TALK}\nQ: And then?", "conversation", "do not alternate: QAQAQ"),
        ("A: It.\nQ: What?", "conversation", "do not alternate: AQ"),
        ("Q: One?\nA:\nQ: Two?\nA: Yes.", "conversation", "answer 1 is empty"),
        ("Q:\nA: Yes.", "reasoning", "question 1 is empty"),
        ("Q: One?\nA: Yes.", "conversation", "a conversation of 1 exchanges"),
        ("Q: One?\nA: Yes.\n" * 13, "conversation", "a conversation of 13 exchanges"),
        ("Q: One?\nA: Yes.\nQ: one?\nA: No.", "conversation", "a question is asked twice"),
        (TALK, "reasoning", "2 questions where one was asked for"),
        (f"Q: {'why ' * 200}?\nA: So.", "reasoning", "turn 1 has 801 and 3 characters"),
        (f"Q: Why?\nA: {'so ' * 2001}", "reasoning", "turn 1 has 4 and 6002 characters"),
        ("Q: Why?\nA: " + "The dog is waiting for its owner. " * 3, "reasoning", "turn 1 repeats itself: 'the dog"),
        ("Short.", "description", "a description of 6 characters"),
        (f"Here is a description: {PROSE}", "description", "does not begin with the description"),
        (f"{PROSE} <|im_end|>", "description", "control token '<|im_end|>'"),
        (f"{PROSE}\nUSER: more", "description", "control token 'USER:'"),
        (f"<image> {PROSE}", "description", "control token '<image>'"),
        (f"{PROSE} \x00", "description", "control token"),
        (
            f"{PROSE} The caption mentions a car.",
            "description",
            "betrays what it was written from: 'The caption mentions'",
        ),
        (f"{PROSE} As one of the captions suggests.", "description", "betrays"),
        (f"{PROSE} Based on the bounding boxes, it is near.", "description", "betrays"),
        (f"{PROSE} Judging from the given coordinates, it is near.", "description", "betrays"),
        (f"{PROSE} According to the description, it rains.", "description", "betrays"),
        (f"{PROSE} The provided information does not tell more.", "description", "betrays"),
        (f"{PROSE} I cannot see the image itself.", "description", "betrays"),
        (f"{PROSE} As an AI, I have no opinion.", "description", "betrays"),
        (f"{PROSE} The dog is at [0.12, 0.3, 0.44, 1.0].", "description", "betrays"),
    ],
)
def test_what_is_no_good_is_rejected(text: str, kind: Kind, reason: str) -> None:
    with pytest.raises(RejectedError, match=re.escape(reason)):
        read_answer(text, kind, question="Describe it.")


@pytest.mark.parametrize(
    "sentence",
    [
        "Musical notes are printed on the page.",
        "The text on the sign says stop.",
        "The boxes are stacked beside the door.",
        "She gave the dog the ball (1, 2, 3, 4 throws).",
        "They do not look at this camera.",
    ],
)
def test_innocent_sentences_are_taken(sentence: str) -> None:
    assert read_answer(f"{PROSE} {sentence}", "description", question="?")[0][1].endswith(sentence)


def test_the_examples_in_the_prompts_pass_the_checks() -> None:
    prompts = load_prompts(None)
    for kind in ("conversation", "description", "reasoning"):
        prompt = getattr(prompts, kind)
        assert prompt.examples
        for example in prompt.examples:
            assert read_answer(example.answer, kind, question="?")
        assert "{given}" in prompt.system
    for question in prompts.description.questions:
        assert read_answer(PROSE, "description", question=question) == [(question, PROSE)]
