"""How a question and its answer become one text, and the beginning of it that a policy is asked to go on from."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError


class Dialogue(Protocol):
    """A text begins with its prompt, in characters and, tokenized as a whole, in tokens."""

    def prompt(self, question: str) -> str:
        """What the policy is asked."""

    def text(self, question: str, answer: str) -> str:
        """The prompt and the answer, without the end-of-text token."""


class QuestionAnswer:
    """``Question: …\\n\\nAnswer: …`` as in StackLLaMA.

    The space after the colon belongs to the answer: most tokenizers join it with the answer's first word, and a prompt
    that ended in a space of its own would be none of the beginnings that the model was trained on.
    """

    def prompt(self, question: str) -> str:
        return f"Question: {question}\n\nAnswer:"

    def text(self, question: str, answer: str) -> str:
        return f"{self.prompt(question)} {answer}"


class ChatTemplate:
    """A conversation of one turn in the tokenizer's own chat template.

    Raises:
        UserError: the tokenizer has no template, or one whose conversations do not begin with the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template: give the tokenizer of a chat model, or data's "
                "prompt_format: question_answer"
            )
        self.tokenizer = tokenizer

    def prompt(self, question: str) -> str:
        return self._apply([{"role": "user", "content": question}], add_generation_prompt=True)

    def text(self, question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole, prompt = self._apply(turns, add_generation_prompt=False), self.prompt(question)
        if not whole.startswith(prompt):
            raise UserError(
                "the chat template's conversations do not begin with its generation prompt: use another one"
            )
        return whole.rstrip().removesuffix(self.tokenizer.eos_token or "").rstrip()

    def _apply(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template fails: {error}") from error


class AsRewardsRead:
    """A dialogue as a reward gets it from a policy's tokens: without the special ones that mark the turns, or with
    `special_tokens`, up to the answer's end."""

    def __init__(self, dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False) -> None:
        self.dialogue, self.tokenizer, self.special_tokens = dialogue, tokenizer, special_tokens

    def prompt(self, question: str) -> str:
        return self._read(self.dialogue.prompt(question))

    def text(self, question: str, answer: str) -> str:
        whole, answer = self.dialogue.text(question, answer), answer.strip()
        end = whole.rfind(answer) + len(answer) if answer in whole else len(whole)  # behind it a mark ends the turn
        return self._read(whole[:end] if self.special_tokens else whole)

    def _read(self, text: str) -> str:
        if self.special_tokens:
            return text
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.tokenizer.decode(ids, skip_special_tokens=True)
