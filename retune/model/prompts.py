"""Instructions around texts: text in, text out.  The model never knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retune.runtime import log


@dataclass(frozen=True)
class Prompt:
    """An instruction and the template that joins it (first place) to a text (second place)."""

    instruction: str | None = None
    template: str = "{}{}"
    before: str | None = None
    """What stands before every text, where a checkpoint gives it ready made; the instruction then is unknown."""

    def apply(self, texts: Sequence[str], instructions: Sequence[str | None] | None = None) -> list[str]:
        """The texts as the model reads them; a text's own instruction comes before the common one."""
        if instructions is None:
            instructions = [None] * len(texts)
        return [self._one(text, own) for text, own in zip(texts, instructions, strict=True)]

    def _one(self, text: str, own: str | None) -> str:
        if own or self.instruction:
            return self.template.format(own or self.instruction, text)
        return self.before + text if self.before else text

    def prefix(self) -> str:
        """What stands before every text, as sentence-transformers' prompts have it."""
        if self.before is not None:
            return self.before
        if not self.instruction:
            return ""
        before, after = self.template.format(self.instruction, "\0").split("\0")
        if after:
            log.warning("the instruction format %r ends after the text: it cannot be saved as a prompt", self.template)
        return before
