"""Trains examples/tiny-python-llama: a Llama of 3.3 M parameters that writes Python-like text.

    python examples/train_tiny_python_llama.py --output examples/tiny-python-llama

A first phase trains as usual. So small a model uses every bit of its weights, and rounding them to 6 bits would cost
6 % of perplexity; in a second, short phase every second step therefore sees rounded weights. The defaults are those
the shipped model was made with, four minutes and one on an H200; on a CPU, give ``--minutes 10 --rounding-minutes 3
--batch 16 --context 256`` and expect much less. The first phase's model lies beside the output, as "-first-phase".

The shipped model then imitated its first phase on a CPU, for the same text would have told so small batches little:

    python examples/train_tiny_python_llama.py --device cpu --output examples/tiny-python-llama \\
        --resume examples/tiny-python-llama --teacher examples/tiny-python-llama-first-phase --steps STEPS \\
        --batch 8 --context 512 --package-mb 3 --rounding-lr RATE --rounding none,wf6af16,wf6af16g128,wf6af16
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from array import array
from pathlib import Path

import torch
from tiny_python_llama_corpus import HELD_OUT, collect
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_fp6.bench.perplexity import Window, negative_log_likelihood
from ds_fp6.formats import Mode
from ds_fp6.quantize import dequantize_reference, quantize_reference

END_OF_TEXT = "<|endoftext|>"
#: A newline takes the indentation after it along; words take one space, dot or underscore before them.
PRETOKEN = r"\s*\n *|[ ._]?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+"
PROMPTS = ("def main(", "class Stack:\n    def __init__(self", "import os\n\ndef read_lines(path):")


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over pieces of ``PRETOKEN``, so that every text can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKEN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one stream of token ids, each followed by the end-of-text token."""
    ids = array("i")
    for start in tqdm(range(0, len(documents), 1024), desc="tokenizing", unit="batch"):
        for encoding in tokenizer.backend_tokenizer.encode_batch(documents[start : start + 1024]):
            ids.extend(encoding.ids)
            ids.append(tokenizer.eos_token_id)
    return torch.frombuffer(ids, dtype=torch.int32)


def new_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Untied embeddings, epsilon 1e-5 and no rope scaling: what FastGen reads without repairs."""
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, LM head and norms, at the same update size."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [p for p in model.parameters() if p.dim() == 1]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True,
    )
    return [muon, adamw]


@torch.no_grad()
def round_trip(weight: torch.Tensor, mode: str) -> torch.Tensor:
    """The weight as ``mode`` will hold it, or itself where that is ``none``."""
    if mode == "none":
        return weight
    parsed = Mode.parse(mode)
    codes, scales = quantize_reference(weight, parsed.format, parsed.group_size)
    return dequantize_reference(codes, scales, parsed.format, parsed.group_size)


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace, minutes: float, lr: float,
    rounding: list[str], teacher: LlamaForCausalLM | None = None,
) -> dict:  # fmt: skip
    """Trains on random windows of the stream; warm-up, then linear decay to zero at the end of the budget.

    Each step takes the next mode of ``rounding``, computes loss and gradient at the weights as that mode rounds
    them, and applies the gradient to the weights themselves (straight-through). The loss is cross-entropy, or the
    divergence from what ``teacher`` predicts, which has far less noise in small batches.
    """
    device = next(model.parameters()).device
    stream = stream.to(device)
    span = torch.arange(args.context + 1, device=device)
    generator = torch.Generator(device=device).manual_seed(args.seed + args.phase)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).float()
        if teacher is None:
            return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        with torch.no_grad():
            wanted = teacher(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")

    def backward() -> torch.Tensor:
        starts = torch.randint(len(stream) - args.context, (args.batch, 1), device=device, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(stream[starts + span].long())
        loss.backward()
        return loss.detach()

    def backward_at(mode: str) -> torch.Tensor:
        exact = [p.detach().clone() for p in matrices]
        with torch.no_grad():
            torch._foreach_copy_(matrices, [round_trip(w, mode) for w in exact])
        loss = backward()
        with torch.no_grad():
            torch._foreach_copy_(matrices, exact)
        return loss

    compiled = torch.compile(loss_of, dynamic=False) if device.type == "cuda" else loss_of
    backward()
    model.zero_grad(set_to_none=True)
    steppers = optimizers(model, lr, args.weight_decay)
    started, step, progress, losses = time.monotonic(), 0, 0.0, []
    bar = tqdm(total=100, desc="training", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while progress < 1:
        factor = min(progress / args.warmup, (1 - progress) / (1 - args.warmup)) if step else 0.0
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = lr * factor
        loss = backward_at(rounding[step % len(rounding)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or args.steps:  # reading the loss waits for the device, so the clock below is honest
            losses.append(loss.item())
        elapsed = time.monotonic() - started
        progress = step / args.steps if args.steps else min(elapsed / (60 * minutes), 1.0)
        if int(100 * progress) > bar.n and losses:
            speed = step * args.batch * args.context / elapsed
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, step {step}, {speed / 1e6:.2f} M tokens/s")
            bar.update(int(100 * progress) - bar.n)
    bar.close()
    tail = losses[-max(1, len(losses) // 100) :]
    return {
        "rounding": ",".join(rounding), "loss": "divergence from a teacher" if teacher else "text", "peak_lr": lr,
        "batch": args.batch, "context": args.context, "steps": step, "tokens": step * args.batch * args.context,
        "seconds": round(elapsed, 1), "training_loss": round(sum(tail) / len(tail), 4),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__,
    }


@torch.inference_mode()
def held_out_perplexity(model: LlamaForCausalLM, ids: torch.Tensor, mode: str) -> float:
    """Of the held-out text, in windows of 1024 tokens every 512, with the layers' weights as ``mode`` rounds them."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    exact = [p.detach().clone() for p in matrices]
    for parameter, weight in zip(matrices, exact, strict=True):
        parameter.copy_(round_trip(weight, mode))

    def logits_of(batch: list[Window]) -> list[torch.Tensor]:
        rows = [(w, model(ids[None, w.begin : w.end - 1].to(model.device), use_cache=False).logits[0]) for w in batch]
        return [row[w.scored - w.begin - 1 :] for w, row in rows]

    total = negative_log_likelihood(logits_of, ids, 1024, 512)
    torch._foreach_copy_(matrices, exact)
    return math.exp(total / (len(ids) - 1))


def make_model(args: argparse.Namespace) -> None:
    """Corpus, tokenizer, both phases of training; writes everything but the card."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    documents, held_out, taken = collect(int(args.package_mb * 1e6), args.stdlib_repeats, args.seed)
    if args.resume:
        tokenizer = AutoTokenizer.from_pretrained(args.resume)
        model = load(args.resume, args.device)
        held_out = (args.resume / "held_out.txt").read_text(encoding="utf-8")
        facts = json.loads((args.resume / "training.json").read_text())
    else:
        tokenizer = train_tokenizer(documents[: args.tokenizer_files], args.vocabulary, args.context)
        model = new_model(args).to(args.device)
        facts = {"parameters": sum(p.numel() for p in model.parameters()), "phases": [], "packages": {}}
    teacher = load(args.teacher, args.device) if args.teacher else None
    stream = encode(tokenizer, documents)
    size = sum(len(d.encode()) for d in documents)
    corpus = {"corpus_files": len(documents), "corpus_bytes": size, "corpus_tokens": len(stream)}
    print(corpus, flush=True)
    facts["packages"] = taken | facts["packages"]
    schedule = [] if args.resume else [(args.minutes, args.lr, ["none"])]
    if args.rounding_minutes:
        schedule.append((args.rounding_minutes, args.rounding_lr, args.rounding.split(",")))
    ids = torch.tensor(tokenizer(held_out, verbose=False).input_ids)
    for minutes, lr, rounding in schedule:
        args.phase = len(facts["phases"])
        phase = train(model, stream, args, minutes, lr, rounding, teacher) | corpus
        phase["held_out"] = {mode: held_out_perplexity(model, ids, mode) for mode in ("none", "wf6af16")}
        facts["phases"].append(phase)
        last = rounding is schedule[-1][-1]
        save(model, tokenizer, held_out, facts, args.output if last else Path(f"{args.output}-first-phase"))


def load(directory: Path, device: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: str, facts: dict, output: Path
) -> None:
    print(facts["phases"][-1], flush=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    copy.deepcopy(model).to(torch.float16).save_pretrained(output)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(output)
    (output / "held_out.txt").write_text(held_out, encoding="utf-8")
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-python-llama")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time, without corpus and compilation")
    parser.add_argument("--rounding-minutes", type=float, default=1.0, help="time of the second phase; 0 for none")
    parser.add_argument("--rounding", default="none,wf6af16", help="modes that its steps take in turn")
    parser.add_argument("--steps", type=int, default=0, help="this many steps in each phase, whatever the time")
    parser.add_argument("--resume", type=Path, help="a trained model, for another second phase")
    parser.add_argument("--teacher", type=Path, help="a trained model to imitate instead of the text")
    parser.add_argument("--batch", type=int, default=96, help="windows a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of the first phase")
    parser.add_argument("--rounding-lr", type=float, default=3e-3, help="peak learning rate of the second phase")
    parser.add_argument("--warmup", type=float, default=0.02, help="fraction of the training")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=320)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--package-mb", type=float, default=10.0, help="at most this much of one package")
    parser.add_argument("--stdlib-repeats", type=int, default=3)
    parser.add_argument("--tokenizer-files", type=int, default=6000, help="files that the tokenizer is trained on")
    parser.add_argument("--card-only", action="store_true", help="only write the card of a trained model")
    parser.add_argument("--skip-card", action="store_true", help="only train")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not args.card_only:
        make_model(args)
    if not args.skip_card:
        from tiny_python_llama_card import write_card

        write_card(args.output, HELD_OUT, PROMPTS)


if __name__ == "__main__":
    main()
