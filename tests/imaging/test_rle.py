"""Run-length codes against hand-computed masks and strings that other readers of COCO agree on."""

import numpy as np
import pytest

from medm.errors import MediaError
from medm.imaging import rle

# From the COCO API's own description: M = [0 0 1 1 1 0 1] is [2 3 1 1], M = [1 1 1 1 1 1 0] is
# [0 6 1].
SPEC = [([0, 0, 1, 1, 1, 0, 1], [2, 3, 1, 1]), ([1, 1, 1, 1, 1, 1, 0], [0, 6, 1])]

# Text of run lengths: from the fourth number on, the difference from the number two before.
# 1 - 3 = -2 has the 5 bits 11110, "N"; 3 - 6 = -3 has 11101, "M"; 1024 has groups 0, 0, 1, the
# first two with the bit of continuation.
TEXTS = [
    ([0, 6, 1, 3], "061M"),
    ([0, 6, 1], "061"),
    ([0, 6, 1, 1], "061K"),
    ([0, 6, 1, 6], "0610"),
    ([2, 3, 1, 1], "231N"),
    ([0, 1, 1, 2, 1, 3, 1, 4, 1], "011101010"),
    ([0, 1024], "0PP1"),
]

# A mask of 50 x 70 in the text that pycocotools wrote for it.
PYCOCOTOOLS = (
    "0g05b08J4M2N2NA^O1`0OCO=0E090H080IO68DH;>@C>a0_O_O`0j0OWOF<:CM72I24NL43JM92FN;1ENKO72L0LO91J0"
    "MO92INO0NO122OO0M031O000NO31OO11MO40N011MO41MO21L06OL021L06OL021L06OL021L060J040L060J040L060J"
    "040L060J040L060J040L060J040L060KO31L060KO31L06OL021L06OL021L06OL021MO41MO21MO40N100NO310O00M0"
    "310O00NO1220NO92IONO91KOMO72M0<1EO:2GN63KM34OLM73JF<;=1G_O_Ob0=AC`07EH=1IO71H090F0:1DO>1_O1b0"
    ">2N2N3L6H]O"
)


@pytest.mark.parametrize(("flat", "counts"), SPEC)
def test_runs_of_the_specification(flat, counts):
    mask = np.array(flat, bool).reshape(7, 1)
    assert rle.encode(mask, compressed=False) == {"size": [7, 1], "counts": counts}
    np.testing.assert_array_equal(rle.decode({"size": [7, 1], "counts": counts}), mask)


def test_runs_go_down_the_columns():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)  # columns 00, 10, 11
    assert rle.encode(mask, compressed=False)["counts"] == [2, 1, 1, 2]
    np.testing.assert_array_equal(rle.decode({"size": [2, 3], "counts": [2, 1, 1, 2]}), mask)


@pytest.mark.parametrize(("counts", "text"), TEXTS)
def test_known_texts(counts, text):
    size = [sum(counts), 1]
    mask = rle.decode({"size": size, "counts": text})
    np.testing.assert_array_equal(mask, rle.decode({"size": size, "counts": counts}))
    assert rle.encode(mask) == {"size": size, "counts": text}


def test_a_code_of_pycocotools_is_read_and_written_alike():
    mask = rle.decode({"size": [50, 70], "counts": PYCOCOTOOLS})
    assert mask.shape == (50, 70)
    assert rle.encode(mask) == {"size": [50, 70], "counts": PYCOCOTOOLS}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 1), (64, 64), (4, 5, 6)])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("compressed", [False, True])
def test_decode_reverses_encode(shape, part, compressed):
    mask = np.random.default_rng(1).random(shape) < part
    code = rle.encode(mask, compressed=compressed)
    assert isinstance(code["counts"], str) == compressed
    decoded = rle.decode(code)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
    ("code", "field", "message"),
    [
        ({"counts": [4]}, "size", r"\[rows, columns\]"),
        ({"size": [2, 2.0], "counts": [4]}, "size", "whole numbers"),
        ({"size": [2, 0], "counts": []}, "size", "from 1 on"),
        ({"size": [1 << 20, 1 << 20], "counts": [1 << 40]}, "size", "allowed"),
        ({"size": [2, 2]}, "counts", "NoneType"),
        ({"size": [2, 2], "counts": [1, 2]}, "counts", "3 voxels in all, .* 2 x 2 has 4"),
        ({"size": [2, 2], "counts": [5, -1]}, "counts", "run of -1"),
        ({"size": [2, 2], "counts": [1, True, 2]}, "counts", "number 1"),
        ({"size": [2, 2], "counts": [1 << 70]}, "counts", "number 0"),
        ({"size": [2, 2], "counts": "~"}, "counts", "character"),
        ({"size": [2, 2], "counts": "é"}, "counts", "character"),
        ({"size": [2, 2], "counts": "0P"}, "counts", "cut off"),
        ({"size": [2, 2], "counts": "P" * 7 + "0"}, "counts", "8 characters"),
        ({"size": [2, 2], "counts": ""}, "counts", "0 voxels in all"),
    ],
)
def test_damaged_codes_are_refused_with_their_field(code, field, message):
    with pytest.raises(MediaError, match=message) as caught:
        rle.decode(code)
    assert caught.value.field == field


def test_encode_refuses_what_is_no_mask():
    with pytest.raises(ValueError, match="2 or 3 axes"):
        rle.encode(np.zeros(4, bool))
