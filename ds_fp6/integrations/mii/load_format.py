"""``mii.pipeline`` and ``mii.serve`` take ``load_format``; a model without a tokenizer reads and writes token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_fp6.integrations import load_format as formats
from ds_fp6.integrations.patching import Hook, wrap

#: A directory with one of these has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether ``directory`` holds a tokenizer. What is no directory is a name on the hub, and counts as having one."""
    path = Path(directory)
    return not path.is_dir() or any((path / name).is_file() for name in TOKENIZER_FILES)


def _token_ids_class() -> type:
    import torch
    from mii.modeling.tokenizers import MIITokenizerWrapper

    class TokenIds(MIITokenizerWrapper):
        """Text is token ids in decimal with spaces between them, so prompts have exactly the wanted lengths."""

        def __init__(self, config: Any) -> None:
            super().__init__(self)
            self._vocabulary = config.vocab_size
            eos = getattr(config, "eos_token_id", None)
            eos = eos[0] if isinstance(eos, (list, tuple)) else eos
            self._eos = self._vocabulary - 1 if eos is None else eos

        @property
        def vocab_size(self) -> int:
            return self._vocabulary

        @property
        def eos_token_id(self) -> int:
            return self._eos

        def __len__(self) -> int:
            return self._vocabulary

        def encode(self, text: str, **_options: Any) -> torch.Tensor:
            return torch.tensor([self.convert_tokens_to_ids(word) for word in text.split()], dtype=torch.int64)

        def convert_tokens_to_ids(self, word: str) -> int:
            if not word.isdecimal() or int(word) >= self._vocabulary:
                raise ValueError(
                    f"this model has no tokenizer: give token ids below {self._vocabulary} in decimal, got {word!r}"
                )
            return int(word)

        def decode(self, tokens: Any, **_options: Any) -> str:
            return " ".join(str(int(token)) for token in tokens)

    return TokenIds


def _load_tokenizer(original, model_config):
    source = model_config.tokenizer
    if formats.current() != "dummy" or not isinstance(source, str) or has_tokenizer(source):
        return original(model_config)
    from transformers import AutoConfig

    return _token_ids_class()(AutoConfig.from_pretrained(source))


def _with_load_format(original, *args, load_format: str | None = None, **kwargs):
    with formats.selected(load_format):
        return original(*args, **kwargs)


def _wrap_api() -> None:
    from mii import api
    from mii.modeling import tokenizers

    wrap(api, "pipeline", _with_load_format)
    wrap(api, "serve", _with_load_format)
    wrap(tokenizers, "load_tokenizer", _load_tokenizer)


HOOKS = (Hook("mii.{pipeline,serve}", "they take load_format; dummy weights need no tokenizer", _wrap_api),)
