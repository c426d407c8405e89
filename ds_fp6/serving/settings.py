"""What the server is told on its command line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """The flags of ``ds-fp6 serve``; see its ``--help``. ``max_model_len`` None takes what the model has."""

    model: str
    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    quantization_mode: str | None = "wf6af16"
    load_format: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    device: str = "auto"
    tensor_parallel: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_kv_blocks: int | None = None
    max_request_bytes: int = 4 << 20
    max_concurrent_requests: int = 256
    drain_seconds: float = 30.0
