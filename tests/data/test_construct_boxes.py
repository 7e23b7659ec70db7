"""A box is the same box in every convention, and one that is not in its picture is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.construct.boxes import CONVENTIONS, Box, Convention, padding, read_box, write_box
from mmit.data.faults import SampleError

SIZE = (640, 427)  # padded by floor(213 / 2) = 106 rows at the top, as LLaVA's expand2square does
BOX = Box(64.0, 106.75, 320.0, 213.5)  # a tenth to a half of the width, a quarter to a half of the height


@pytest.mark.parametrize(
    ("convention", "text"),
    [
        ("xyxy_px", "[64, 107, 320, 214]"),  # floor(106.75 + 0.5), floor(213.5 + 0.5)
        ("xywh_px", "[64, 107, 256, 107]"),  # from the rounded corners
        ("xyxy01", "[0.100, 0.250, 0.500, 0.500]"),
        ("cxcywh01", "[0.300, 0.375, 0.400, 0.250]"),
        ("xyxy01_padded", "[0.100, 0.332, 0.500, 0.499]"),  # (106.75 + 106) / 640, (213.5 + 106) / 640
        ("xyxy_bins1000", "[100, 250, 500, 500]"),
    ],
)
def test_a_box_is_written_as_its_formula_says(convention: Convention, text: str) -> None:
    assert write_box(BOX, convention, SIZE) == text


def test_padding_is_that_of_the_square_in_whole_pixels() -> None:
    assert padding((640, 427)) == (0, 106, 640)
    assert padding((425, 640)) == (107, 0, 640)
    assert padding((5, 5)) == (0, 0, 5)


def test_the_last_bin_holds_the_far_edge() -> None:
    assert write_box(Box(0, 0, 640, 427), "xyxy_bins1000", SIZE) == "[0, 0, 999, 999]"


def test_decimals_are_those_asked_for() -> None:
    assert write_box(BOX, "xyxy01", SIZE, decimals=2) == "[0.10, 0.25, 0.50, 0.50]"


@settings(max_examples=60, deadline=None)
@given(
    convention=st.sampled_from(CONVENTIONS),
    width=st.integers(40, 5000),
    height=st.integers(40, 5000),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.6, 1), st.floats(0.6, 1)),
)
def test_what_is_written_is_read_back_within_half_a_step(
    convention: Convention, width: int, height: int, shares: tuple[float, float, float, float]
) -> None:
    size = (width, height)
    box = Box(shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height)
    numbers = [float(n) for n in write_box(box, convention, size, decimals=5).strip("[]").split(", ")]
    again = read_box(numbers, convention, size)
    step = 1.0 if convention.endswith("_px") else max(size) * (1e-3 if "bins" in convention else 3e-5)
    for before, after in zip(vars(box).values(), vars(again).values(), strict=True):
        assert abs(before - after) <= step


@pytest.mark.parametrize(
    ("values", "convention", "reason"),
    [
        (
            [10, 10, 700, 20],
            "xyxy_px",
            "reaches from 10 to 700 pixels in a picture of 640: is it of another convention",
        ),
        ([0.1, 0.2, 0.5, 0.9], "xyxy_px", "stated as xyxy_px and looks like fractions"),
        ([10, 20, 300, 200], "xyxy01", "is it of another convention"),
        ([30, 20, 30, 200], "xyxy_px", "has no area"),
        ([100, 20, 50, 200], "xyxy_px", "has no area"),
        ([1, 2, 3], "xyxy_px", "is not four numbers"),
        ([1, 2, float("nan"), 4], "xyxy_px", "is not four numbers"),
        ([0.1, 0.0, 0.2, 0.1], "xyxy01_padded", "reaches from -106 to -42 pixels in a picture of 427"),  # padding only
    ],
)
def test_a_box_that_cannot_be_meant_is_refused(values: list[float], convention: Convention, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read_box(values, convention, SIZE)


def test_a_box_that_is_a_little_too_large_is_cut_at_the_edge() -> None:
    # 2 % of 640 is 12.8 pixels
    assert read_box([-1.5, 0, 652, 427], "xyxy_px", SIZE) == Box(0, 0, 640, 427)
