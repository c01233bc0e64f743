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

    def apply(self, texts: Sequence[str], instructions: Sequence[str | None] | None = None) -> list[str]:
        """The texts as the model reads them; a text's own instruction comes before the common one."""
        if instructions is None and not self.instruction:
            return list(texts)
        if instructions is None:
            return [self.template.format(self.instruction, text) for text in texts]
        own = (one or self.instruction for one in instructions)
        return [self.template.format(one, text) if one else text for one, text in zip(own, texts, strict=True)]

    def prefix(self) -> str:
        """What stands before every text, as sentence-transformers' prompts have it."""
        if not self.instruction:
            return ""
        before, after = self.template.format(self.instruction, "\0").split("\0")
        if after:
            log.warning("the instruction format %r ends after the text: it cannot be saved as a prompt", self.template)
        return before
