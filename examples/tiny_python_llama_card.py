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
training by name: {held_out}.
Weights were quantized and dequantized, everything else was computed in fp32, in windows of 512 tokens every 256
(`ds_fp6/bench/perplexity.py` has the formula):

    ds-fp6 eval perplexity examples/tiny-python-llama --engine transformers

Without `--engine`, the text goes through FastGen as it serves, with fp16 activations: the perplexities agree to
three decimals.

| mode | weights of the layers | perplexity | to fp16 | bits per byte | bytes of all parameters |
|---|---|---|---|---|---|
{perplexities}

Embedding and LM head, a third of the parameters, stay in 16 bits in every mode.
The later phases' settings were chosen, among about ten tries, by their figures on this text; no weight was trained on it.

## Training

`examples/train_tiny_python_llama.py`, in {phase_count} phases:

| | device | steps × windows × tokens | seconds | peak rate | loss against | weights, step by step | fp16 | wf6af16 |
|---|---|---|---|---|---|---|---|---|
{phases}

The last columns are held-out perplexities after the phase, in windows of 1024 tokens every 512. In all, the model saw
{tokens:,} tokens, of corpora of {corpora} tokens (the standard library counted three times).{teacher}


**The weights know about rounding.** After the first phase, rounding to 6 bits cost
{cost_before}: so small a model, trained on {ratio:.0f} tokens a
parameter, has no bits to spare. The later phases take the modes of the table's column in turn: a step computes its
gradient at the weights as that mode rounds them and applies it to the weights themselves. So the perplexities above
show what FP6 costs a model that was prepared for it, and do not carry over to others.

## Corpus

Source installed with Python{where}, without tests, generated files and duplicates;
licence headers removed.

| licence | packages |
|---|---|
{packages}

`held_out.txt` is Copyright © 2001 Python Software Foundation; All Rights Reserved; under the PSF License Version 2,
which `held_out.LICENSE` holds. Changes: trailing blanks and leading comments removed, modules joined, a line naming
each.

## Samples

Greedy, {new_tokens} tokens, fp16.

{samples}
"""
TEACHER = "\nThe teacher is the model after the first phase, in fp16; its predictions replace the text's next token."
NEW_TOKENS = 96


def perplexity_row(result) -> str:
    mode = None if result.mode == "fp16" else Mode.parse(result.mode)
    scales = f"{mode.group_size} weights" if mode and mode.group_size else "row"
    weights = f"{mode.format}, {mode.format.bits} bits, a scale per {scales}" if mode else "fp16"
    return (
        f"| {result.mode} | {weights} | {result.perplexity:.3f} | {100 * (result.ratio - 1):+.2f} % | "
        f"{result.bits_per_byte:.4f} | {result.weight_bytes:,} |"
    )


def package_rows(packages: dict[str, dict]) -> str:
    by_licence = defaultdict(list)
    for name, taken in packages.items():
        by_licence[taken["licence"]].append(f"{name.lstrip('_')} {taken['version']}".strip())
    return "\n".join(f"| {licence} | {', '.join(names)} |" for licence, names in by_licence.items())


def phase_row(number: int, phase: dict) -> str:
    held_out = phase["held_out"]
    return (
        f"| {number} | {phase['device']}, torch {phase['torch']} | {phase['steps']:,} × {phase['batch']} × "
        f"{phase['context']} | {phase['seconds']:.0f} | {phase['peak_lr']} | {phase['loss']} | "
        f"{phase['rounding'].replace('none', 'as they are').replace(',', ', ')} | {held_out['none']:.3f} | "
        f"{held_out['wf6af16']:.3f} |"
    )


def write_card(directory: Path, held_out: tuple[str, ...], prompts: tuple[str, ...]) -> None:
    """Measures the model in ``directory`` and writes its README.md."""
    text = (directory / "held_out.txt").read_text(encoding="utf-8")
    facts = json.loads((directory / "training.json").read_text())
    results = evaluate(directory, text, MODES, "transformers", report=lambda result, _: print(perplexity_row(result)))
    written = continue_greedily(directory, prompts, NEW_TOKENS)
    phases, tokens = facts["phases"], sum(phase["tokens"] for phase in facts["phases"])
    before, rounded = (phases[0]["held_out"][mode] for mode in ("none", "wf6af16"))
    card = CARD.format(
        **json.loads((directory / "config.json").read_text()), parameters=facts["parameters"],
        megabytes=(directory / "model.safetensors").stat().st_size / 1e6, held_out_bytes=len(text.encode()),
        held_out=", ".join(f"`{name}`" for name in held_out), perplexities="\n".join(map(perplexity_row, results)),
        phase_count=len(phases), phases="\n".join(phase_row(i, phase) for i, phase in enumerate(phases, 1)),
        tokens=tokens, ratio=phases[0]["tokens"] / facts["parameters"],
        corpora=" and ".join(f"{n:,}" for n in dict.fromkeys(phase["corpus_tokens"] for phase in phases)),
        cost_before=f"{100 * (rounded / before - 1):.1f} % of perplexity ({before:.3f} to {rounded:.3f})",
        teacher=TEACHER if any("teacher" in phase["loss"] for phase in phases) else "",
        where=" on the machines that trained it" if len({phase["device"] for phase in phases}) > 1 else "",
        packages=package_rows(facts["packages"]), new_tokens=NEW_TOKENS,
        samples="\n\n".join(f"```python\n{prompt}{more}\n```" for prompt, more in zip(prompts, written, strict=True)),
    )  # fmt: skip
    (directory / "README.md").write_text(card, encoding="utf-8")
