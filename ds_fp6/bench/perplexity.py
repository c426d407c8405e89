"""``ds-fp6 eval perplexity``: what each quantization mode costs a checkpoint on held-out text.

    PPL = exp(-(1 / (n - 1)) · Σ_{i=1}^{n-1} ln p(t_i | t_{b(i)} … t_{i-1}))

over the n tokens t of the text, no special tokens added. The text is predicted in runs of ``stride`` tokens, each
token once; b(i) lies ``context`` tokens before the end of i's run, or at the text's start. Each token thus has at
least ``context - stride`` tokens before it, where the text has as many. Bits per byte,

    log2(PPL) · (n - 1) / bytes of the text in UTF-8,

compare models with different tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ds_fp6.formats import Mode

#: fp16 first: the others are compared with the first one.
MODES = ("fp16", "wf6af16", "wf5af16", "wf6af16g128", "wf4e2m1af16")
DENSE = ("fp16", "bf16", "none")
ENGINES = ("fastgen", "transformers")
#: Windows that are read together.
SEQUENCES = 128


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are read; those of [scored, end) are predicted here. 0 <= begin < scored < end."""

    begin: int
    scored: int
    end: int


@dataclass(frozen=True)
class Result:
    """Figures of one mode; ``ratio`` is to the first mode's perplexity, ``weight_bytes`` is of all parameters."""

    mode: str
    perplexity: float
    ratio: float
    bits_per_byte: float
    weight_bytes: int


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """The windows in which tokens 1 … ``tokens`` - 1 are each predicted once.

    Raises ``ValueError`` for a stride outside 1 … context - 1, or fewer than 2 tokens.
    """
    if not 1 <= stride < context:
        raise ValueError(f"stride must lie in 1..context - 1, got stride {stride} and context {context}")
    if tokens < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {tokens}")
    for start in range(0, tokens, stride):
        end = min(start + stride, tokens)
        if end > 1:
            yield Window(max(0, start + stride - context), max(1, start), end)


def negative_log_likelihood(
    logits_of: Callable[[list[Window]], list[torch.Tensor]], ids: torch.Tensor, context: int, stride: int
) -> float:
    """``-Σ ln p(t_i)`` over tokens 1 … n - 1 of ``ids`` (int64 [n]), in fp64 from fp32 log-probabilities.

    ``logits_of`` predicts the scored tokens of each window that it is given: [scored tokens, vocabulary] each.
    """
    total = 0.0
    every = list(windows(len(ids), context, stride))
    for i in range(0, len(every), SEQUENCES):
        batch = every[i : i + SEQUENCES]
        for window, logits in zip(batch, logits_of(batch), strict=True):
            targets = ids[window.scored : window.end].to(logits.device)
            log_probabilities = logits.float().log_softmax(dim=-1).gather(-1, targets[:, None])
            total -= log_probabilities.double().sum().item()
    return total


class Transformers:
    """The transformers model with weights that went through the mode, computing in fp32 on a CPU, else in fp16."""

    def __init__(self, model: str, mode: str | None, ids: torch.Tensor, context: int) -> None:
        from ds_fp6.integrations.transformers import load_rounded

        cuda = torch.cuda.is_available()
        dtype = torch.float16 if cuda else torch.float32
        self._ids = ids
        self._model, self.weight_bytes = load_rounded(model, mode, dtype, "cuda" if cuda else "cpu")
        self.computes = "transformers, activations in " + ("fp16" if cuda else "fp32, for fp16 is slow on a CPU")

    @torch.inference_mode()
    def logits(self, batch: list[Window]) -> list[torch.Tensor]:
        found = []
        for i in tqdm(range(0, len(batch), 8), desc="reading windows", leave=False, disable=None):
            part = batch[i : i + 8]
            # Padding goes to the right, where causal attention never looks.
            rows = torch.nn.utils.rnn.pad_sequence([self._ids[w.begin : w.end - 1] for w in part], batch_first=True)
            logits = self._model(rows.to(self._model.device), use_cache=False).logits
            found += [row[w.scored - w.begin - 1 : w.end - w.begin - 1] for w, row in zip(part, logits, strict=True)]
        return found


class FastGen:
    """FastGen's engine as it serves: each window's start as a prompt, then one token of all windows a step.

    FastGen returns the logits of a sequence's last token only, so it takes ``stride`` steps for ``SEQUENCES`` windows.
    """

    def __init__(self, model: str, mode: str | None, ids: torch.Tensor, context: int) -> None:
        from ds_fp6.integrations.engine import build_engine, parameter_bytes

        self._ids = ids
        self._engine = build_engine(
            model, mode, max_context=context, max_ragged_batch_size=max(768, context),
            max_ragged_sequence_count=SEQUENCES, max_tracked_sequences=SEQUENCES,
            memory_config={"mode": "allocate", "size": SEQUENCES * (context // 64 + 2)},
        )  # fmt: skip
        self.weight_bytes = parameter_bytes(self._engine)
        dtype = str(self._engine.model().activation_dtype.value).removeprefix("torch.")
        self.computes = f"FastGen, activations in {dtype}"

    @torch.inference_mode()
    def logits(self, batch: list[Window]) -> list[torch.Tensor]:
        from ds_fp6.integrations.engine import step

        # The engine reuses the memory of its logits; copying them also frees its pinned batch buffers on a GPU.
        found = [[step(self._engine, {u: self._ids[w.begin : w.scored]})[0].cpu().clone()] for u, w in enumerate(batch)]
        longest = max(w.end - w.scored for w in batch)
        for offset in tqdm(range(longest - 1), desc="reading tokens", leave=False, disable=None):
            going = [(u, w.scored + offset) for u, w in enumerate(batch) if w.scored + offset + 1 < w.end]
            tokens = {u: self._ids[i, None] for u, i in going}
            for uid, logits in zip(tokens, step(self._engine, tokens).cpu().clone(), strict=True):
                found[uid].append(logits)
        for uid in range(len(batch)):
            self._engine.flush(uid)
        return [torch.stack(rows) for rows in found]


def evaluate(
    model: str | Path,
    text: str,
    modes: Sequence[str] = MODES,
    engine: str = "fastgen",
    context: int = 512,
    stride: int = 256,
    report: Callable[[Result, str], None] | None = None,
) -> list[Result]:
    """The perplexity of ``text`` in each mode, see the module's formula.

    Args:
        model: a checkpoint's directory, with its tokenizer.
        modes: quantization modes; ``"fp16"``, ``"bf16"`` and ``"none"`` all mean the checkpoint's own weights.
        engine: ``"fastgen"``, or ``"transformers"`` with weights quantized and dequantized again.
        report: called with each result, and with how it was computed, as it comes.

    Raises ``ValueError`` for an unknown mode or engine, or a text of fewer than 2 tokens.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    for mode in modes:
        if mode not in DENSE:
            Mode.parse(mode)
    from ds_fp6.integrations.transformers import encode

    ids = encode(model, text)
    list(windows(len(ids), context, stride))
    runner = {"fastgen": FastGen, "transformers": Transformers}[engine]
    results: list[Result] = []
    for mode in modes:
        running = runner(str(model), None if mode in DENSE else mode, ids, context)
        mean = negative_log_likelihood(running.logits, ids, context, stride) / (len(ids) - 1)
        perplexity = math.exp(mean)
        first = results[0].perplexity if results else perplexity
        bits = mean / math.log(2) * (len(ids) - 1) / len(text.encode())
        results.append(Result(mode, perplexity, perplexity / first, bits, running.weight_bytes))
        if report:
            report(results[-1], running.computes)
        del running
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory")
    parser.add_argument("--text", type=Path, help="UTF-8 text to score; default MODEL/held_out.txt")
    parser.add_argument("--characters", type=int, metavar="N", help="score only the text's first N characters")
    modes = "comma-separated; the others are compared with the first. Default %(default)s"
    parser.add_argument("--modes", default=",".join(MODES), help=modes)
    parser.add_argument("--engine", choices=ENGINES, default="fastgen", help="default %(default)s")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window, default %(default)s")
    parser.add_argument("--stride", type=int, help="tokens between windows' starts; default half of --context")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    path = args.text or Path(args.model) / "held_out.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no text to score: {path} is missing; name one with --text")
    text = path.read_text(encoding="utf-8")[: args.characters]
    stride = args.stride or args.context // 2

    def report(result: Result, computes: str) -> None:
        if not rows:
            print(f"{path}, {len(text.encode()):,} bytes; windows of {args.context} tokens every {stride}; {computes}")
            print(f"{'mode':<14} {'perplexity':>10} {'ratio':>8} {'bits/byte':>10} {'weight bytes':>13}")
        rows.append(result)
        print(
            f"{result.mode:<14} {result.perplexity:>10.4f} {result.ratio:>8.4f} {result.bits_per_byte:>10.4f} "
            f"{result.weight_bytes:>13,}", flush=True,
        )  # fmt: skip

    rows: list[Result] = []
    evaluate(args.model, text, args.modes.split(","), args.engine, args.context, stride, report)
    if args.json:
        figures = {
            "model": args.model, "text": str(path), "engine": args.engine, "context": args.context, "stride": stride,
            "modes": [asdict(row) for row in rows],
        }  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
