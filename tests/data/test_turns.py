from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.data.turns import parse_record
from medm.errors import DataError
from medm.types import (
    KIND_OF_PLACEHOLDER,
    MASK_TOKEN,
    PHRASE_TOKENS,
    ControlToken,
    MaskSource,
    Media,
    Turn,
)
from tests.data.tiny import gpt, human, record


def bad(value: Any, field: str | None, reason: str, *, inference: bool = False) -> None:
    """The record is refused at this field for this reason, and the message says where."""
    with pytest.raises(DataError, match=reason) as caught:
        parse_record(value, inference=inference, file="f.json", index=3)
    assert (caught.value.field, caught.value.file, caught.value.index) == (field, "f.json", 3)
    assert str(caught.value).startswith("f.json, record 3")


def test_the_record_of_the_documentation() -> None:
    sample = parse_record(
        {
            "id": 7, "task": "vqa", "image": ["a.png"], "volume": ["ct.nii.gz"], "question_type": "closed",
            "conversations": [human("<image>\n<volume>\nIs there an effusion?"), gpt("Yes.")],
        },
        file="f.json", index=0,
    )  # fmt: skip
    assert sample.turns == (
        Turn(
            "user",
            (
                Media("image", "a.png"),
                "\n",
                Media("volume", "ct.nii.gz"),
                "\nIs there an effusion?",
            ),
        ),
        Turn("assistant", ("Yes.",)),
    )
    assert (sample.id, sample.task, sample.answer, sample.file, sample.index) == (
        "7",
        "vqa",
        None,
        "f.json",
        0,
    )
    assert sample.extra == {"question_type": "closed"}


LLAVA = record("<image>\nWhat?", "A.", image="a.png")


@pytest.mark.parametrize(
    "same",
    [
        LLAVA,
        {**LLAVA, "image": ["a.png"]},
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A."}]},
        {"images": "a.png", "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                         {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A."}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A."}]},
        {"image": "a.png", "conversations": [
            {"role": "user", "content": "<image>\nWhat?"}, {"from": "assistant", "value": "A."}]},
    ],
)  # fmt: skip
def test_every_format_gives_the_same_sample(same: dict[str, Any]) -> None:
    assert parse_record(same).turns == parse_record(LLAVA).turns


def test_system_prompt_of_the_record_or_as_first_turn() -> None:
    turns = parse_record({"system": "Be brief.", **record()}).turns
    as_turn = parse_record(
        {"conversations": [{"from": "system", "value": "Be brief."}, *record()["conversations"]]}
    )
    assert turns == as_turn.turns
    assert turns[0] == Turn("system", ("Be brief.",))
    assert parse_record({"system": "", **record()}).turns == parse_record(record()).turns
    with_image = parse_record(record("q", system="Atlas: <image>", image="a.png"))
    assert with_image.turns[0].content == ("Atlas: ", Media("image", "a.png"))


def test_several_images_turns_and_branches_are_matched_by_order() -> None:
    sample = parse_record(
        {
            "image": ["a", "b", "c"],
            "image3d": "v",
            "conversations": [
                human("<image><image3d> and <image>?"),
                gpt("One <image>."),
                human("And <image>"),
                gpt("Two."),
            ],
        }
    )
    assert sample.media == (
        Media("image", "a"),
        Media("volume", "v"),
        Media("image", "b"),
        Media("image", "c"),
    )
    assert sample.turns[1].content == ("One <image>.",)


def test_a_placeholder_in_a_reply_is_text() -> None:
    sample = parse_record(record("Which mark stands for an image?", "It is <image>, or <volume>."))
    assert sample.media == ()
    assert sample.turns[1].content == ("It is <image>, or <volume>.",)


def test_typed_parts_hold_no_placeholders() -> None:
    content = [{"type": "text", "text": "The mark <image>: "}, {"type": "image"}]
    sample = parse_record(
        {"image": "a", "messages": [{"role": "user", "content": content}, gpt("x")]}
    )
    assert sample.turns[0].content == ("The mark <image>: ", Media("image", "a"))


def test_text_of_any_script_is_kept_to_the_letter() -> None:
    text = "أين\u200f \u200b 中文 👩🏽‍⚕️ \u202eabc\u202c"
    assert parse_record(record(text, text)).turns[0].content == (text,)


IMAGE = {"image": "i.png"}


def test_a_mask_stands_behind_each_control_token_of_the_replies() -> None:
    """In order over the turns; what others say, and a record without masks, holds letters."""
    turns = [
        human("<image>Write [SEG] for the liver."),
        gpt("It is [SEG]."),
        {"role": "user", "content": "[SEG]?"},
        {"role": "assistant", "content": [{"type": "text", "text": "[SEG][SEG]"}]},
    ]
    sample = parse_record(
        {"masks": ["a.png", "b.png", "c.png"], "conversations": turns, "system": "[SEG]", **IMAGE}
    )
    first, second, third = (ControlToken(MASK_TOKEN, mask=number) for number in range(3))
    assert [turn.content for turn in sample.turns] == [
        ("[SEG]",), (Media("image", "i.png"), "Write [SEG] for the liver."), ("It is ", first, "."), ("[SEG]?",), (second, third),
    ]  # fmt: skip
    assert [mask.path for mask in sample.masks] == ["a.png", "b.png", "c.png"]
    assert sample.turns[2].text == "It is ."
    assert sample.turns[2].as_written == "It is [SEG]."
    assert "masks" not in sample.extra
    for without in ({}, {"masks": None}, {"masks": []}):
        letters = parse_record({"conversations": turns, **without, **IMAGE})
        assert [turn.text for turn in letters.turns] == [
            "Write [SEG] for the liver.",
            "It is [SEG].",
            "[SEG]?",
            "[SEG][SEG]",
        ]
        assert letters.masks == ()


def test_masks_of_a_reply_that_is_asked_for() -> None:
    earlier = [human("<image>Liver?"), gpt("[SEG]"), human("Kidney?")]
    asked = {"masks": ["a.png", "b.png"], "conversations": earlier, **IMAGE}
    sample = parse_record(asked, inference=True)
    assert sample.turns[1].content == (ControlToken(MASK_TOKEN, mask=0),)
    assert [mask.path for mask in sample.masks] == ["a.png", "b.png"]
    with_reply = {**asked, "conversations": [*earlier, gpt("Here: [SEG]")]}
    assert parse_record(with_reply, inference=True).masks == sample.masks
    short = {**with_reply, "masks": "a.png"}
    bad(short, "masks", r"1 mask\(s\), but 2 \[SEG\] in the replies", inference=True)
    bad({**asked, "masks": ["a.png"] * 3}, "masks", "3 mask.*but 1")


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        (
            record("q", "It is [SEG].", masks=["a.png", "b.png"]),
            "masks",
            r"2 mask\(s\), but 1 \[SEG\] in the replies",
        ),
        (record("q", "[SEG][SEG]", masks="a.png"), "masks", r"1 mask\(s\), but 2 \[SEG\]"),
        (record("[SEG]", "A", masks="a.png"), "masks", r"1 mask\(s\), but 0 \[SEG\]"),
        (record("q", "[SEG]", masks=["  "]), "masks.0", "expected a path, found empty text"),
        (
            record("q", "[SEG]", masks={"a": 1}),
            "masks",
            r"expected a path, or a list with one entry for each \[SEG\], found an object",
        ),
        (
            record("q", "[SEG]", masks=[3]),
            "masks.0",
            "expected a path, an object .*or null .*found a number",
        ),
    ],
)
def test_masks_and_control_tokens_agree_in_number(value: Any, field: str, reason: str) -> None:
    bad(value, field, reason)


SQUARE = {"polygons": [[0, 0, 4, 0, 4, 4, 0, 4]]}


def masks_of(entries: Any, reply: str, **fields: Any) -> tuple[MaskSource, ...]:
    question = "<volume><image><image>Where?"
    paths = {"image": ["a.png", "b.png"], "volume": "c.nii"}
    return parse_record(record(question, reply, masks=entries, **paths, **fields)).masks


def test_every_form_of_a_mask_and_the_file_that_it_belongs_to() -> None:
    """The last file before the [SEG] unless the entry names one, by kind and position."""
    rle = {"size": [4, 5], "counts": [3, 2, 15]}
    first, second, third, fourth, fifth = masks_of(
        [
            "m.png",
            {"file": "labels.nii.gz", "value": 3, "volume": 0, "phrase": "left lung"},
            {"rle": rle, "image": 0},
            {**SQUARE, "image": 1},
            None,
        ],
        "[SEG][SEG][SEG][SEG][SEG]",
    )
    assert first == MaskSource(token=0, media=2, field="masks.0", path="m.png")
    assert second == MaskSource(
        token=1, media=0, field="masks.1", path="labels.nii.gz", value=3, phrase="left lung"
    )
    assert third == MaskSource(token=2, media=1, field="masks.2", rle=rle)
    assert fourth.polygons == ((0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0),) and fourth.media == 2
    assert (fifth.absent, fifth.media) == (True, 2)
    assert not any(mask.absent for mask in (first, second, third, fourth))


def test_several_images_share_a_control_token() -> None:
    shared = [{"file": "m.png", "image": 0}, {"file": None, "image": 1, "phrase": "cyst"}]
    masks = masks_of([shared, "n.png"], "cyst [SEG], stone [SEG]")
    assert [(mask.token, mask.media, mask.field, mask.absent) for mask in masks] == [
        (0, 1, "masks.0.0", False),
        (0, 2, "masks.0.1", True),
        (1, 2, "masks.1", False),
    ]


def test_phrases_stand_between_marks_that_are_control_tokens_beside_masks() -> None:
    reply = "A <p>left kidney</p> [SEG], [SEG] and <p> two <p>cysts </p>[SEG] <p>end</p>"
    sample = parse_record(
        record("<image><p>", reply, masks=[None, {"file": "b", "phrase": "own"}, "c"], **IMAGE)
    )
    opening, closing = (ControlToken(mark) for mark in PHRASE_TOKENS)
    assert sample.turns[0].content == (Media("image", "i.png"), "<p>")
    assert sample.turns[1].content[:5] == (
        "A ", opening, "left kidney", closing, " ",
    )  # fmt: skip
    assert sample.turns[1].as_written == reply
    assert [mask.phrase for mask in sample.masks] == ["left kidney", "own", "cysts"]
    alone = parse_record(record("q", reply))
    assert alone.turns[1].content == (reply,), "text in a record without masks"


def test_an_image_of_a_later_turn_is_the_default_of_what_follows_it() -> None:
    turns = [human("<image>?"), gpt("[SEG]"), human("<image>?"), gpt("[SEG] [SEG]")]
    fields = {"image": ["a", "b"], "conversations": turns}
    sample = parse_record({**fields, "masks": ["x", "y", {"file": "z", "image": 0}]})
    assert [mask.media for mask in sample.masks] == [0, 1, 0]
    bad(
        {**fields, "masks": [{"file": "x", "image": 1}, "y", "z"]},
        "masks.0.image",
        r"stands behind the \[SEG\]",
    )


@pytest.mark.parametrize(
    ("entry", "field", "reason"),
    [
        ({"path": "a.png"}, "masks.1.path", "unknown key.*a mask has file, rle, polygons"),
        ({"image": 0}, "masks.1", "expected one of file, rle, polygons, found none.*write null"),
        ({"file": "a", "rle": None}, "masks.1", "found file and rle"),
        ({"file": ["a"]}, "masks.1.file", "expected text, found a list"),
        ({"file": "a", "value": -1}, "masks.1.value", "whole number from 0 on"),
        ({"file": "a", "value": "3"}, "masks.1.value", "found text"),
        ({"file": None, "value": 3}, "masks.1.value", "a label in a 'file'"),
        ({**SQUARE, "value": 3}, "masks.1.value", "a label in a 'file'"),
        ({"file": "a", "phrase": " "}, "masks.1.phrase", "empty text"),
        ({"file": "a", "phrase": ["x"]}, "masks.1.phrase", "expected text, found a list"),
        ({"file": "a", "image": 2}, "masks.1.image", r"2, and the record has 2 image\(s\)"),
        ({"file": "a", "volume": 1}, "masks.1.volume", r"1, and the record has 1 volume\(s\)"),
        ({"file": "a", "image": True}, "masks.1.image", "found a boolean"),
        ({"file": "a", "image": 0, "volume": 0}, "masks.1", "both given"),
        ({"rle": [1, 2]}, "masks.1.rle", "'size' and 'counts', found a list"),
        ({"rle": {"size": [2, 2]}}, "masks.1.rle", "found an object with size"),
        ({"rle": {"size": [4], "counts": []}}, "masks.1.rle.size", r"\[rows, columns\]"),
        ({"rle": {"size": [4, 4], "counts": 3}}, "masks.1.rle.counts", "found a number"),
        (
            {"rle": {"size": [2, 4, 4], "counts": [32]}},
            "masks.1.rle.size",
            "3 numbers; the mask is of the kind image",
        ),
        (
            {"rle": {"size": [4, 4], "counts": [16]}, "volume": 0},
            "masks.1.rle.size",
            r"2 numbers; the mask is of the kind volume, whose size is \[slices, rows, columns\]",
        ),
        ({**SQUARE, "volume": 0}, "masks.1.polygons", "outlines are for images"),
        ({"polygons": []}, "masks.1.polygons", "list of outlines"),
        ({"polygons": [3]}, "masks.1.polygons.0", "an outline"),
        ({"polygons": [[0, 0, 1, 1]]}, "masks.1.polygons.0", "4 numbers"),
        ({"polygons": [[0, 0, 1, 1, 2]]}, "masks.1.polygons.0", "5 numbers"),
        (
            {"polygons": [[0, 0, 1, 1, 2, "3"]]},
            "masks.1.polygons.0.5",
            "expected a number, found text",
        ),
        ({"polygons": [[0, 0, 1, 1, 2, 1e999]]}, "masks.1.polygons.0.5", "expected a number"),
        ([], "masks.1", "empty list"),
        ([["a"]], "masks.1.0", "found a list"),
        (["a", "b"], "masks.1.1", "a second mask of one image, after 'masks.1.0'"),
    ],
)
def test_a_mask_that_is_not_understood_is_refused_with_its_field(
    entry: Any, field: str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        masks_of(["a.png", entry], "[SEG] [SEG]")
    assert caught.value.field == field


def test_a_mask_needs_an_image_or_volume() -> None:
    bad(record("q", "[SEG]", masks="a.png"), "masks", "no image or volume stands before its")


def test_inference_records() -> None:
    open_ended = {"conversations": [human("q")]}
    assert parse_record(open_ended, inference=True).answer is None
    taken = parse_record(record("q", "Yes."), inference=True)
    assert (len(taken.turns), taken.answer) == (1, "Yes.")
    kept = parse_record(record("q", "Yes.", answer="No."), inference=True)
    assert (len(kept.turns), kept.answer) == (1, "No.")
    assert parse_record(record("q", ""), inference=True).answer is None
    dialogue = parse_record({"conversations": [human("a"), gpt("b"), human("c")]}, inference=True)
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant", "user"]
    bad(open_ended, "conversations", "the last turn is the user's; training needs a reply")
    bad(
        {"conversations": [gpt("a")]},
        "conversations",
        "there is no turn of the user",
        inference=True,
    )


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        # more placeholders than files, and fewer
        (record("<image><image>", image="a"), "image", r"1 file\(s\), but 2 placeholder\(s\) <image> in"),
        (record("<image>", image=["a", "b"]), "image", r"2 file\(s\), but 1 placeholder"),
        (record("q", image="a"), "image", r"1 file\(s\), but 0 placeholder.*write one where each file belongs"),
        (record("q", "<image>", image="a"), "image", "but 0 placeholder"),
        (record("<image>"), "conversations.0.value", "<image> stands in the text, and the record has no field 'image'"),
        (record("<volume>", image="a"), "conversations.0.value", "no field 'image3d' or 'volume' or 'volumes'"),
        (record("<image>", image=[]), "image", r"0 file\(s\), but 1 placeholder"),
        (record("<image>", image="a", volume="v"), "volume", r"but 0 placeholder\(s\) <image3d> or <volume>"),
        # the fields that name files
        (record("<image>", image="a", images="a"), "images", "'image' is given as well"),
        (record("<volume>", image3d="a", volume="a"), "volume", "'image3d' is given as well"),
        (record("<image>", image=3), "image", "expected a path or a list of paths, found a number"),
        (record("<image>", image=[{"path": "a"}]), "image.0", "expected text, found an object"),
        (record("<image><image>", image=["a", None]), "image.1", "expected text, found null"),
        (record("<image>", image=" "), "image", "expected a path, found empty text"),
        # the turns
        ([], None, "expected an object with 'conversations' or 'messages', found a list"),
        ("text", None, "found text"),
        ({"id": "1"}, "conversations", "the record has neither"),
        ({"conversations": []}, "conversations", "the conversation is empty"),
        ({"conversations": {"from": "human"}}, "conversations", "expected a list of turns, found an object"),
        ({"conversations": ["hello"]}, "conversations.0", "expected a turn, .*found text"),
        ({"conversations": [{"value": "a"}]}, "conversations.0", "'from' is missing"),
        ({"conversations": [{"from": "human"}]}, "conversations.0", "'value' is missing"),
        ({"conversations": [human("q"), {"from": "bot", "value": "a"}]}, "conversations.1.from",
         "unknown role 'bot'; expected one of human, user, gpt"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "conversations.0.from", "expected text, found a number"),
        ({"conversations": [human(True), gpt("a")]}, "conversations.0.value", "expected text, found a boolean"),
        ({"conversations": [human("q"), gpt(None)]}, "conversations.1.value", "expected text, found null"),
        ({"conversations": [human("q"), gpt("  \n")]}, "conversations.1", "the assistant's turn is empty"),
        ({"conversations": [human(""), gpt("a")]}, "conversations.0", "the user's turn is empty"),
        ({"conversations": [gpt("Hello"), human("q"), gpt("a")]}, "conversations.0", "expected the user, found"),
        ({"conversations": [human("q"), human("q"), gpt("a")]}, "conversations.1", "expected the assistant, found"),
        ({"conversations": [human("q"), gpt("a"), {"from": "system", "value": "s"}]}, "conversations.2",
         "a system turn is not allowed here: it can only be the first"),
        ({"system": "s", "conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]}, "conversations.0",
         "the record's field 'system' is one already"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "conversations", "there is no turn of the user"),
        ({**record(), "messages": []}, "messages", "'conversations' is given as well"),
        # content parts
        ({"messages": [{"role": "user", "content": ["q"]}]}, "messages.0.content.0", "expected a content part"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0.type",
         "unknown content part 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text",
         "expected text, found null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0",
         "the part names no path, and the record has no field 'image' or 'images'"),
        ({"image": "a", "messages": [{"role": "user", "content": "q"},
                                     {"role": "assistant", "content": [{"type": "image"}]}]}, "messages.1",
         "an image or volume in a reply"),
        # the rest
        (record(id=1.5), "id", "expected text or a whole number, found a number"),
        (record(id=True), "id", "found a boolean"),
        (record(task=["vqa"]), "task", "expected text, found a list"),
        (record(answer=3), "answer", "expected text, found a number"),
        (record(system=["s"]), "system", "expected text, found a list"),
        (record("a\ud800b"), "conversations.0.value", "half of a surrogate pair at character 1"),
    ],
)  # fmt: skip
def test_bad_records_are_named_by_file_index_field_and_reason(
    value: Any, field: str | None, reason: str
) -> None:
    bad(value, field, reason)


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        # media that no model reads
        (record("<video>\nq", videos=["a.mp4"]), "conversations.0.value", "<video> stands in the text, .* reads no video"),
        (record("q", videos=["a.mp4"]), "videos", "names video, which medm does not read"),
        (record("<image>\nq", image="a.png", video="a.mp4"), "video", "names video"),
        (record("q", audio="a.wav"), "audio", "names audio"),
        (record("q", audios=[{"path": "a.wav"}]), "audios", "names audio"),
        (record("<audio>q"), "conversations.0.value", "<audio> stands in the text, .* reads no audio"),
        (record("q", point_cloud="a.ply"), "point_cloud", "names point clouds"),
        # placeholders of other programs
        (record("<|image_pad|>q"), "conversations.0.value", r"<\|image_pad\|> stands in the text.* write <image>"),
        (record("<|vision_start|>q"), "conversations.0.value", "no placeholder of medm"),
        (record("<image_1>q", image="a.png"), "conversations.0.value", "<image_1> .* no placeholder of medm"),
        (record("<image 2>q"), "conversations.0.value", "<image 2> .* no placeholder of medm"),
        (record("<Image>q", image="a.png"), "conversations.0.value", "<Image> .* no placeholder of medm"),
        (record("<ImageHere>q"), "conversations.0.value", "<ImageHere> .* no placeholder of medm"),
        (record("<image>" + "<im_patch>" * 9, image="a.png"), "conversations.0.value", "<im_patch> .* no placeholder"),
        (record("<img>a.png</img>q"), "conversations.0.value", "<img> .* no placeholder"),
        (record("q", system="<video>"), "system", "reads no video"),
        # fields of other programs that name files
        (record("q", image_path="a.png"), "image_path", "looks like it names images.* rename it to 'image'"),
        (record("q", Image="a.png"), "Image", "rename it to 'image'"),
        (record("q", imgUrl=["a.png"]), "imgUrl", "rename it to 'image'"),
        (record("q", VolumeName="a.nii.gz"), "VolumeName", "rename it to 'volume'"),
        (record("q", images=[], image_file="a.png"), "image_file", "rename it to 'image'"),
        (record("<image>", image={"bytes": "x", "path": None}), "image", "write it to a file"),
        (record("<image>", images=[{"bytes": "x", "path": None}]), "images", "write it to a file"),
        # other formats
        ({"instruction": "q", "input": "", "output": "a"}, None, "the Alpaca format.*'value': instruction and input}"),
        ({"query": "q", "response": "a", "images": ["a"]}, None, "query/response format .*'value': query}.* response}"),
        ({"prompt": "q", "completion": "a"}, None, "prompt/completion"),
        ({"image": "a.png", "caption": "a"}, None, "an image and its caption.*'<image>' and a request"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rejected", "preference data"),
        ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, "rejected", "preference data"),
        (record(rejected_response="b"), "rejected_response", "preference data"),
        (record(kto_tag=False), "kto_tag", "preference data"),
        ({"train": {"file_name": "a.json"}, "file_name": "a.json"}, None, "name the annotation file that it lists"),
    ],
)  # fmt: skip
def test_what_other_programs_write_is_refused_with_what_to_write(
    value: Any, field: str | None, reason: str
) -> None:
    bad(value, field, reason)


@pytest.mark.parametrize(
    ("value", "question"),
    [
        (record("q", "<video> and <image_1> are text in a reply"), "q"),
        (record("Is 3 < 5 and 7 > 6? <b>Yes</b> <image-guided> <imaging>"), None),
        (record("q", videos=[], audio=None, image_id=7, volume_ml=4.5, image_quality="good"), "q"),
        (
            record(
                "<image>q", image="a.png", image_path="/original/a.png", video_name="from film 3"
            ),
            "q",
        ),
        (record("q", chosen="B"), "q"),
        (record("<|im_start|>system"), "<|im_start|>system"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "What is <video>?"}]},
                    gpt("a"),
                ]
            },
            "What is <video>?",
        ),
    ],
)
def test_what_only_looks_alike_is_kept(value: Any, question: str | None) -> None:
    wanted = question or value["conversations"][0]["value"]
    assert parse_record(value).turns[0].text == wanted


def test_the_table_of_the_documentation_becomes_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports.csv").write_text(
        '\ufeffid;file;report\n1;a.nii.gz;"Müller;\nno effusion"\n'
    )
    exec(compile(code, "data-format.md", "exec"), {})
    (sample,) = Records([SourceOptions(path="train.jsonl")], Conversations())
    assert (sample.id, sample.media[0].path, sample.turns[-1].text) == (
        "1",
        "a.nii.gz",
        "Müller;\nno effusion",
    )


def test_preference_fields_pass_through_inference() -> None:
    assert parse_record(record(rejected="b"), inference=True).extra == {"rejected": "b"}


def test_many_placeholders_take_time_by_their_number_only() -> None:
    count = 100_000
    start = time.process_time()
    sample = parse_record(record("<image>x" * count, image=["a"] * count))
    assert len(sample.media) == count
    assert time.process_time() - start < 5  # by its square: minutes


def test_messages_never_repeat_what_a_record_says() -> None:
    secret = "Jane Doe, born 1970"
    for value in (
        {"conversations": [human(secret), human(secret)]},
        {"conversations": [human([secret]), gpt(secret)]},
        {"conversations": [human(f"<image> {secret}"), gpt(secret)]},
        {"conversations": secret},
        record(secret, " "),
    ):
        with pytest.raises(DataError) as caught:
            parse_record(value)
        assert secret not in str(caught.value)


@given(
    st.lists(
        st.sampled_from([*KIND_OF_PLACEHOLDER, "<image", "image>", "text", "<<image>>", "\n"]),
        max_size=12,
    )
)
def test_splitting_keeps_every_character(pieces: list[str]) -> None:
    """Media put back as their placeholders give the text, in the order of the files."""
    text = "".join(pieces) + "end"
    names = {
        "image": text.count("<image>"),
        "volume": text.count("<image3d>") + text.count("<volume>"),
    }
    files = {
        branch: [f"{branch}{i}" for i in range(count)] for branch, count in names.items() if count
    }
    sample = parse_record(record(text, **files))
    rebuilt = "".join(
        part if isinstance(part, str) else f"<{part.branch}>" for part in sample.turns[0].content
    )
    assert rebuilt == text.replace("<image3d>", "<volume>")
    for branch, count in names.items():
        assert [m.path for m in sample.media if m.branch == branch] == [
            f"{branch}{i}" for i in range(count)
        ]
