"""Turns to token ids and a label mask of the replies, in one pass through a chat template.

The template is rendered with a mark in the place of each message. Only text of the template itself
may become control tokens; user text is encoded with control tokens disabled, so that `<|im_end|>`
or `<image>` typed by a user stays plain text. The text between two control tokens is encoded as one
piece, which gives the same ids as the tokenizer gives for the rendered string.

A control token of a reply (`[SEG]`) is a part of ids. It is learned as the words around it are.

A template may end a reply with text that the tokenizer has no token for (Phi-3's `<|end|>` around
Qwen). The text is then learned as the end, in one piece with the words before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from medm.errors import DataError, RecipeError
from medm.llms.template_bounds import TemplateLimitError, bounded, check_operations
from medm.llms.template_clock import fix_clock
from medm.types import Role

Part: TypeAlias = "str | list[int]"
"""Text, or token ids: the placeholders of an image, or a control token of a reply."""

# Private-use characters: templates neither test for them nor trim them.
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn as the chat format takes it."""

    role: Role
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the conversation: text of the template, or parts of one message."""

    parts: Sequence[Part]
    from_template: bool
    from_assistant: bool = False


class ChatFormat:
    """Encodes conversations for one tokenizer and one template.

    Args:
        tokenizer: any fast tokenizer.
        template: Jinja chat template; its clock is stopped, see `fix_clock`.
        template_kwargs: fixed variables of the template.
        reply_tokens: special tokens that parts of a reply alone stand for; in the template they are
            letters.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        template_kwargs: Mapping[str, Any] | None = None,
        reply_tokens: Collection[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        check_operations(template)
        self.template = fix_clock(template)
        self.template_kwargs = dict(template_kwargs or {})
        self._control = {
            str(token): (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and str(token) not in reply_tokens
        }
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(
        self, messages: Sequence[Message], *, generation: bool = False, continue_final: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and the label mask: True for a reply and the end token after it.

        Args:
            messages: the conversation.
            generation: end with the template's opening of the assistant's reply.
            continue_final: end with the last message, without what the template writes after it.

        Raises:
            DataError: the template refuses this conversation (no system turn, roles that do not
                alternate).
            RecipeError: the template loses a message, or writes nothing that ends a reply.
        """
        ids: list[int] = []
        learned: list[bool] = []
        buffer = ""

        def flush(*, is_target: bool = False) -> None:
            nonlocal buffer
            piece = self._encode_text(buffer)
            ids.extend(piece)
            learned.extend([is_target] * len(piece))
            buffer = ""

        reply_is_open = False  # a reply was written, and its end token has not come yet
        for piece in self._pieces(messages, generation, continue_final):
            if piece.from_assistant:
                flush()
            parts = piece.parts
            if piece.from_template and reply_is_open and self.end_text:
                end, parts = self._split_end(str(parts[0]))
                buffer += end
                flush(is_target=True)
                reply_is_open = False
            for part in parts:
                if not isinstance(part, str):
                    flush(is_target=piece.from_assistant)
                    ids.extend(part)
                    learned.extend([piece.from_assistant] * len(part))
                elif not piece.from_template:
                    buffer += part
                else:
                    for text, control in self._split_control(part):
                        buffer += text
                        if control is not None:
                            # White space that a template puts before the end token belongs to the
                            # reply's end.
                            flush(is_target=reply_is_open and not text.strip())
                            ids.append(control)
                            learned.append(reply_is_open)
                            reply_is_open = False
            if piece.from_template and reply_is_open:
                raise RecipeError(
                    "the chat template writes no end token after a reply, so a model could not "
                    "learn to stop; set model.llm.chat_template to a template that ends replies "
                    "with a special token"
                )
            if piece.from_assistant:
                if not self.end_text:
                    flush(is_target=True)
                reply_is_open = True
        flush(is_target=reply_is_open)
        return ids, learned

    def to_text(
        self, messages: Sequence[Message], *, generation: bool = False, continue_final: bool = False
    ) -> str:
        """Return the conversation as rendered by the template, for display. All parts are text."""
        pieces = self._pieces(messages, generation, continue_final)
        return "".join(str(part) for piece in pieces for part in piece.parts)

    @cached_property
    def end_text(self) -> str:
        """Text that the template writes after a reply where it writes no end token; else empty."""
        messages = [Message("user", [""]), Message("assistant", [""])]
        after = _MARKS.split(self._render(messages, False))[-1]
        return "" if self._control_pattern.search(after) else after.strip()

    @cached_property
    def end_sequence(self) -> tuple[int, ...]:
        """Token ids that a reply ends with where the template ends it with text; else empty.

        A tokenizer may merge the beginning of the text with the last word: these are the ids that
        stay the same.
        """
        if not self.end_text:
            return ()
        common = self._encode_text(self.end_text)[::-1]
        for word in ("a", " a", "1", ".", ")", "%", "\n"):
            found = self._encode_text(word + self.end_text)[::-1]
            same = (one == other for one, other in zip(common, found, strict=False))
            common = common[: sum(itertools.takewhile(bool, same))]
        return tuple(common[::-1])

    @property
    def stop_ids(self) -> set[int]:
        """Ids of which each ends a reply: the end token; none where text ends it."""
        return set() if self.end_text else {self.end_of_reply()}

    def end_of_reply(self) -> int:
        """Return the token that the template writes after a reply: where generation stops."""
        ids, learned = self.encode([Message("user", ["?"]), Message("assistant", ["!"])])
        return [token for token, is_target in zip(ids, learned, strict=True) if is_target][-1]

    def _pieces(
        self, messages: Sequence[Message], generation: bool, continue_final: bool
    ) -> Iterator[_Piece]:
        rendered = self._render(messages, generation)
        found = [int(match) for match in _MARKS.findall(rendered)]
        if found != list(range(len(messages))):
            raise RecipeError(
                f"the chat template wrote messages {found} of a conversation of {len(messages)}; "
                "expected each once and in order. Set model.llm.chat_template to a template that "
                "does"
            )
        texts = _MARKS.split(rendered)  # template, index, template, index, ..., template
        before = texts[0]
        for index, after in zip(found, texts[2::2], strict=True):
            message = messages[index]
            parts, from_assistant = message.parts, message.role == "assistant"
            if from_assistant and self._lead and before.endswith(self._lead):
                before, parts = before.removesuffix(self._lead), [self._lead, *parts]
            yield _Piece([before], from_template=True)
            yield _Piece(parts, from_template=False, from_assistant=from_assistant)
            before = after
        if not continue_final:
            yield _Piece([before], from_template=True)

    @cached_property
    def _lead(self) -> str:
        """White space that the template writes between its opening of a reply and the reply.

        A prompt ends before it, so the model has to write it: it is learned with the reply.
        """
        question, reply = Message("user", [""]), Message("assistant", [""])
        opened = _MARKS.split(self._render([question], True))[-1]
        written = _MARKS.split(self._render([question, reply], False))[2]
        lead = written.removeprefix(opened)
        return lead if written.startswith(opened) and lead.isspace() else ""

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        try:
            return self._apply(messages, generation)
        except TemplateLimitError:
            raise
        except Exception as error:  # noqa: BLE001 (a template is somebody's program, and may raise anything)
            raise self._fault(error, messages) from None

    def _apply(self, messages: Sequence[Message], generation: bool) -> str:
        marked = [
            {"role": message.role, "content": _MARK.format(i)} for i, message in enumerate(messages)
        ]
        with bounded():
            return str(
                self.tokenizer.apply_chat_template(
                    marked,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self.template_kwargs,
                )
            )

    def _fault(self, error: Exception, messages: Sequence[Message]) -> DataError | RecipeError:
        """Return an error about the conversation or the template.

        The conversation is named if the template refuses it or works for a plain question, else the
        template.
        """
        refused = type(error) is TemplateError  # `raise_exception`, which templates call on purpose
        if refused or self._renders_a_question:
            roles = ", ".join(message.role for message in messages)
            verb = "refuses" if refused else "fails on"
            return DataError(f"the model's chat template {verb} turns of roles [{roles}]: {error}")
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        return RecipeError(
            f"the model's chat template has an error ({type(error).__name__}{line}: {error}); "
            "correct chat_template.jinja in the model folder, or set model.llm.chat_template to "
            "a template that works"
        )

    @cached_property
    def _renders_a_question(self) -> bool:
        try:
            self._apply([Message("user", ["?"])], True)
        except Exception as error:  # noqa: BLE001 (as in `_render`)
            return type(error) is TemplateError
        return True

    def _split_end(self, text: str) -> tuple[str, list[Part]]:
        """Split what the template writes after a reply behind the text that ends the reply."""
        before, end, rest = text.partition(self.end_text)
        if not end or before.strip():
            raise RecipeError(
                f"the chat template ends the last reply with {self.end_text!r} and an earlier one "
                f"with {text[:20]!r}, so a model could not learn to stop; set "
                "model.llm.chat_template to a template that ends every reply alike"
            )
        return before + end, [rest]

    def _split_control(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Split a text into (text, following control token) pairs; the last has no token.

        A token that strips its sides does so here.
        """
        start, strip_left = 0, False
        for match in self._control_pattern.finditer(text):
            index, token = self._control[match.group()]
            before = text[start : match.start()]
            before = before.lstrip() if strip_left else before
            yield (before.rstrip() if token.lstrip else before), index
            start, strip_left = match.end(), token.rstrip
        rest = text[start:]
        yield (rest.lstrip() if strip_left else rest), None

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
