"""A prompt is the same on every day, for every family and every way in which a template asks for
the time."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from transformers.utils import chat_template_utils

import medm.models
from medm.config import validate
from medm.errors import RecipeError
from medm.llms import LLMS
from medm.llms.chat import ChatFormat, Message
from medm.llms.template_clock import DATE, fix_clock
from medm.models.lvlm.options import LVLMOptions
from tests import tiny

WITH_DATE = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + ' at ' + "
    "strftime_now('%H:%M:%S') + '<|im_end|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role "
    "+ '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
GUARDED = (
    "{% if strftime_now is defined %}{% set date = strftime_now('%Y-%m-%d') %}{% endif %}{{ date }}"
    + WITH_DATE
)


@pytest.fixture(
    params=[datetime.datetime(2031, 1, 2, 3, 4, 5), datetime.datetime(2040, 12, 24, 22, 0, 0)]
)
def another_day(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return request.param

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    yield


def prompt(family: str, template: str, kwargs: Any) -> str:
    tokenizer = tiny.make_tokenizer(family)
    chat = ChatFormat(tokenizer, template=template, template_kwargs=kwargs)
    return tokenizer.decode(chat.encode([Message("user", ["Which side?"])], generation=True)[0])


@pytest.mark.usefixtures("another_day")
@pytest.mark.parametrize("template", [WITH_DATE, GUARDED])
@pytest.mark.parametrize("family", ["smollm2", "qwen2.5", "qwen3"])
def test_the_clock_of_a_template_is_stopped(family: str, template: str) -> None:
    text = prompt(family, template, LLMS.get(family).template_kwargs)
    assert f"Today: {DATE} at 00:00:00" in text
    assert "2031" not in text
    assert "2040" not in text
    if template is GUARDED:
        assert "2024-07-26" in text


@pytest.mark.usefixtures("another_day")
def test_a_saved_processor_gives_the_same_prompt_also_through_transformers(tmp_path: Path) -> None:
    section = tiny.lvlm_section(tiny.save_llm("smollm2", tmp_path / "llm"), family="auto")
    (tmp_path / "template.jinja").write_text(WITH_DATE)
    section["llm"]["chat_template"] = str(tmp_path / "template.jinja")
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    _, again = medm.models.load(str(tmp_path / "model"))
    assert again.chat.template == processor.chat.template, (
        "the clock is stopped once, however often it is saved"
    )
    stock = AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], chat_template=again.chat_template, tokenize=False
    )
    assert f"Today: {DATE}" in stock


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("%d %b %Y", "26 Jul 2024"),
        ("%Y-%m-%d", "2024-07-26"),
        ("%A, %B %-d", "Friday, July 26"),
        ("%-m/%-d/%y %I:%M %p", "7/26/24 12:00 AM"),
        ("100%% on %j", "100% on 208"),
        ("%%d", "%d"),
    ],
)
def test_every_field_shows_the_fixed_day(form: str, expected: str) -> None:
    template = fix_clock("{{ strftime_now('" + form + "') }}")
    rendered, _ = chat_template_utils.render_jinja_template([[]], chat_template=template)
    assert rendered == [expected]
    day = datetime.datetime(2024, 7, 26)
    assert day.strftime(form) == expected, "as Python's own strftime"


@pytest.mark.parametrize("start", ["\n\nA", "  A", "{%- if true %}A{% endif %}", "{{ 'A' }}"])
def test_the_rest_of_the_template_is_not_changed(start: str) -> None:
    tail = "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    plain, _ = chat_template_utils.render_jinja_template([[]], chat_template=start)
    fixed, _ = chat_template_utils.render_jinja_template(
        [[]], chat_template=fix_clock(start + tail)
    )
    assert fixed == plain


def test_a_template_without_a_clock_is_left_alone() -> None:
    assert fix_clock("{{ messages[0].content }}") == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "source", ["{{ ['a', 'b'] | random }}", "{{ ['a', 'b']|random }}", "{{ lipsum(n=1) }}"]
)
def test_a_template_that_draws_at_random_is_refused(source: str) -> None:
    with pytest.raises(RecipeError, match="draws at random"):
        fix_clock(source)
