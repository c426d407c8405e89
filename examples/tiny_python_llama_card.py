"""Writes the model card of examples/tiny-python-llama: figures of its training, perplexities, samples."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from ds_fp6.bench.perplexity import MODES, evaluate
from ds_fp6.formats import Mode
from ds_fp6.integrations.transformers import continue_greedily

CARD = """\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---
# tiny-python-llama

A Llama of {parameters:,} parameters that continues Python source. It is small enough to ship with the code that
quantizes it, and exists to show what quantization does to a trained model. What it writes looks like Python;
it is not meant to work.

| | |
|---|---|
| architecture | Llama, {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} query and \
{num_key_value_heads} KV heads of {head_dim}, intermediate {intermediate_size}, untied embeddings |
| tokenizer | byte-level BPE of {vocab_size:,} tokens; a newline and the indentation after it are one token |
| context | {max_position_embeddings} tokens |
| weights | fp16, {megabytes:.2f} MB |

## Perplexity

Of `held_out.txt`, {held_out_bytes:,} bytes: whole modules of CPython's standard library that were excluded from
training by name ({held_out}). Weights were quantized and dequantized, everything else was computed in fp32, in
windows of 512 tokens every 256 (`ds_fp6/bench/perplexity.py` has the formula):

    ds-fp6 eval perplexity examples/tiny-python-llama --engine transformers

| mode | weights of the layers | perplexity | to fp16 | bits per byte | bytes of all parameters |
|---|---|---|---|---|---|
{perplexities}

Embedding and LM head, a third of the parameters, stay in 16 bits in every mode.

## Training

`python examples/train_tiny_python_llama.py`, {phases}, on {device}, torch {torch}: {tokens:,} tokens seen of a
corpus of {corpus_tokens:,} ({corpus_files:,} files, {corpus_bytes:,} bytes, the standard library counted three times).

**The weights know about rounding.** After the first phase, rounding to 6 bits cost {cost_before}: so small a model,
trained on {ratio:.0f} tokens a parameter, has no bits to spare. In the second phase every second step saw weights
rounded as `wf6af16` rounds them, the gradient going to the weights themselves; the other steps saw them as they are.
The perplexity in fp16 was {ppl_before} before that phase. So the table shows what FP6 costs a model that was prepared
for one scale a row, and does not carry over to models that were not; `wf6af16g128`, which rounds to another grid,
gains less from the preparation.

## Corpus

Source installed with Python, without tests, generated files and duplicates; licence headers removed.

| licence | packages |
|---|---|
{packages}

`held_out.txt` is Copyright © 2001 Python Software Foundation; All Rights Reserved; under the PSF License Version 2,
which `held_out.LICENSE` holds. Changes: trailing blanks and leading comments removed, modules joined, a line naming each.

## Samples

Greedy, {new_tokens} tokens, fp16.

{samples}
"""
#: Held-out perplexity after the first phase, in fp16 and in wf6af16, measured with windows of 1024 tokens every 512.
BEFORE_ROUNDING = (6.305, 6.713)
NEW_TOKENS = 96


def perplexity_row(result) -> str:
    mode = None if result.mode == "fp16" else Mode.parse(result.mode)
    scales = f", a scale per {mode.group_size} weights" if mode and mode.group_size else ", a scale per row" if mode else ""
    weights = f"{mode.format}, {mode.format.bits} bits{scales}" if mode else "fp16"
    return (
        f"| {result.mode} | {weights} | {result.perplexity:.3f} | {100 * (result.ratio - 1):+.2f} % | "
        f"{result.bits_per_byte:.4f} | {result.weight_bytes:,} |"
    )


def package_rows(packages: dict[str, dict]) -> str:
    by_licence = defaultdict(list)
    for name, taken in packages.items():
        by_licence[taken["licence"]].append(f"{name.lstrip('_')} {taken['version']}".strip())
    return "\n".join(f"| {licence} | {', '.join(names)} |" for licence, names in by_licence.items())


def phase_text(phase: dict) -> str:
    rounded = "rounded weights in every second step" if phase["rounded_weights"] != "no" else "plain"
    return (
        f"{phase['seconds']:.0f} s {rounded} ({phase['steps']:,} steps of {phase['batch']} × {phase['context']} tokens, "
        f"peak learning rate {phase['peak_lr']})"
    )


def write_card(directory: Path, held_out: tuple[str, ...], prompts: tuple[str, ...]) -> None:
    """Measures the model in ``directory`` and writes its README.md."""
    text = (directory / "held_out.txt").read_text(encoding="utf-8")
    facts = json.loads((directory / "training.json").read_text())
    results = evaluate(directory, text, MODES, "transformers", report=lambda result, _: print(perplexity_row(result)))
    written = continue_greedily(directory, prompts, NEW_TOKENS)
    phases, tokens = facts["phases"], sum(phase["tokens"] for phase in facts["phases"])
    before, rounded = BEFORE_ROUNDING
    card = CARD.format(
        **json.loads((directory / "config.json").read_text()),
        **{k: v for k, v in facts.items() if k not in ("packages", "phases")},
        megabytes=(directory / "model.safetensors").stat().st_size / 1e6, held_out_bytes=len(text.encode()),
        held_out=", ".join(f"`{name}`" for name in held_out), perplexities="\n".join(map(perplexity_row, results)),
        phases=" and then ".join(map(phase_text, phases)), device=phases[0]["device"], torch=phases[0]["torch"],
        tokens=tokens, ratio=tokens / facts["parameters"], ppl_before=f"{before:.3f}",
        cost_before=f"{100 * (rounded / before - 1):.1f} % of perplexity ({before:.3f} to {rounded:.3f})",
        packages=package_rows(facts["packages"]), new_tokens=NEW_TOKENS,
        samples="\n\n".join(f"```python\n{prompt}{more}\n```" for prompt, more in zip(prompts, written, strict=True)),
    )  # fmt: skip
    (directory / "README.md").write_text(card, encoding="utf-8")
