"""Train the small Llama that ships in tq_mcp/demo_model, from scratch and reproducibly.

    python examples/train_demo_model.py lm_mix.txt.xz --output out --minutes 6

The text is split at blank lines into documents. An eighth of the rows also state made-up facts ("The
secret code of Oslo is 4 8 2 1 3.") and ask for them later, so that damage to a key-value cache shows as
forgotten facts; answers weigh more than other tokens, since they are too few to be learned otherwise.
Needs torch, tokenizers, numpy and safetensors; a GPU is used where there is one. The output folder is a
Hugging Face checkpoint, rewritten as training goes, plus training.json, which records the measurements
and the number of steps: pass that as --steps to repeat a run.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch_llama import Llama, Loss, Shape
from training_text import END, END_ID, Batches, Facts, encode, read_documents, train_tokenizer


@torch.no_grad()
def held_out_loss(loss: Loss, stream: np.ndarray, length: int, rows: int, device: str) -> float:
    """Mean loss in nats a token over non-overlapping windows of held-out text."""
    count = min((len(stream) - 1) // length, 256)
    windows = np.stack([stream[i * length : i * length + length + 1] for i in range(count)]).astype(np.int64)
    batches = torch.from_numpy(windows).to(device).split(rows)
    return sum(float(loss(batch)) * len(batch) for batch in batches) / count


@torch.no_grad()
def recall(model: Llama, facts: Facts, length: int, questions: int, device: str) -> float:
    """The share of facts answered exactly, greedily, in prompts of `length` tokens."""
    prompts, answers = zip(*(facts.question(length) for _ in range(questions)), strict=True)
    tokens = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)
    for _ in range(max(map(len, answers))):
        window = tokens[:, -model.shape.max_position_embeddings :]
        tokens = torch.cat((tokens, model(window)[:, -1:].argmax(-1)), dim=1)
    said = tokens[:, length:].tolist()
    return sum(said[i][: len(answer)] == answer for i, answer in enumerate(answers)) / questions


@dataclass
class Record:
    """What training.json holds."""

    parameters: int
    data_sha256: str
    train_tokens: int
    seed: int
    rows: int
    length: int
    fact_share: float
    answer_weight: float
    learning_rate: float
    warm_up: int
    device: str
    torch: str
    steps: int = 0
    steps_planned: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    held_out_loss: float = 0.0
    held_out_perplexity: float = 0.0
    held_out_bits_per_byte: float = 0.0
    recall: dict[str, float] = field(default_factory=dict)


def save(folder: Path, model: Llama, tokenizer: Tokenizer, record: Record) -> None:
    """Write a complete checkpoint: bfloat16 weights, config, tokenizer and the record of training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in {
        "config.json": config,
        "generation_config.json": {"bos_token_id": END_ID, "eos_token_id": END_ID},
        "tokenizer_config.json": tokenizer_config,
        "training.json": asdict(record),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@dataclass
class Data:
    """The tokenizer, the training and held-out streams, and the rows of facts."""

    tokenizer: Tokenizer
    stream: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    facts: tuple[np.ndarray, np.ndarray]
    asker: Facts

    @classmethod
    def prepare(cls, args: argparse.Namespace, vocab_size: int) -> "Data":
        began = time.perf_counter()
        documents = read_documents(args.text, int(args.limit_mb * 1e6) if args.limit_mb else None)
        held, documents = documents[::200], [d for i, d in enumerate(documents) if i % 200]
        tokenizer = train_tokenizer(documents, vocab_size, sample_bytes=20_000_000)
        stream, held_out = encode(tokenizer, documents), encode(tokenizer, held)
        facts = Facts(tokenizer, documents, stream, args.seed)
        fact_rows = facts.rows(args.fact_pool, args.length + 1)
        print(f"{len(documents)} documents, {len(stream):,} tokens, {len(facts.names)} names; "
              f"data ready in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        bytes_per_token = (sum(len(d.encode()) for d in held) + len(held)) / len(held_out)
        asker = Facts(tokenizer, documents, held_out, args.seed + 1)
        return cls(tokenizer, stream, held_out, bytes_per_token, fact_rows, asker)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.model = Llama(Shape()).to(self.device)
        self.data = Data.prepare(args, self.model.shape.vocab_size)
        self.plain_loss = Loss(self.model)
        compiled = self.device == "cuda" and not args.no_compile
        self.loss = torch.compile(self.plain_loss, dynamic=False) if compiled else self.plain_loss
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.learning_rate, betas=(0.9, 0.95), fused=self.device == "cuda",
        )  # fmt: skip
        fact_rows = round(args.rows * args.fact_share)
        self.batches = Batches(
            self.data.stream,
            self.data.facts,
            args.rows - fact_rows,
            fact_rows,
            args.answer_weight,
            args.seed,
            self.device,
        )
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
        self.record = Record(
            parameters=sum(p.numel() for p in self.model.parameters()),
            data_sha256=hashlib.sha256(args.text.read_bytes()).hexdigest(),
            train_tokens=len(self.data.stream),
            seed=args.seed,
            rows=args.rows,
            length=args.length,
            fact_share=args.fact_share,
            answer_weight=args.answer_weight,
            learning_rate=args.learning_rate,
            warm_up=args.warm_up,
            device=torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            torch=torch.__version__,
        )

    def rate(self, step: int, steps: int | None) -> float:
        """A linear warm-up, then a cosine down to zero at `steps`."""
        warm = self.args.warm_up
        if steps is None or step < warm:
            return self.args.learning_rate * min(1.0, (step + 1) / warm)
        done = (step - warm) / max(1, steps - warm)
        return self.args.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def update(self, step: int, steps: int | None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step, steps)
        with self.autocast:
            value = self.loss(*self.batches.next())
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def probe(self, first: int, count: int) -> float:
        """Seconds a step, measured over real updates first to first + count."""
        began = self.clock()
        for step in range(first, first + count):
            self.update(step, None)
        return (self.clock() - began) / count

    def measure_and_save(self, step: int, seconds: float) -> None:
        args, record = self.args, self.record
        record.steps, record.seconds, record.tokens_seen = step, seconds, step * args.rows * args.length
        with self.autocast:
            loss = held_out_loss(self.plain_loss, self.data.held_out, args.length, args.rows, self.device)
            record.recall = {
                str(length): recall(self.model, self.data.asker, length, 20, self.device)
                for length in (256, 512, 1000)
                if length <= args.length
            }
        record.held_out_loss, record.held_out_perplexity = loss, math.exp(loss)
        record.held_out_bits_per_byte = loss / math.log(2) / self.data.bytes_per_token
        save(args.output, self.model, self.data.tokenizer, record)
        print(f"step {step}: held-out loss {loss:.4f}, perplexity {record.held_out_perplexity:.2f}, "
              f"recall {record.recall}", flush=True)  # fmt: skip

    def run(self) -> None:
        args, began = self.args, self.clock()
        # Compiling happens in the first steps; the next ones tell the speed, hence how many fit. They
        # are within the warm-up, so a run is repeated by passing the number it chose as --steps.
        warm, probe = (5, 20) if self.device == "cuda" else (1, 2)
        self.probe(0, warm)
        per_step = self.probe(warm, probe)
        steps = args.steps or warm + probe + int((args.minutes * 60 - self.clock() + began) / per_step)
        self.record.tokens_per_s, self.record.steps_planned = args.rows * args.length / per_step, steps
        print(f"{per_step * 1e3:.1f} ms a step, {self.record.tokens_per_s:,.0f} tokens/s, {steps} steps, "
              f"{steps * args.rows * args.length / 1e9:.3f} B tokens", flush=True)  # fmt: skip
        for step in range(warm + probe, steps):
            value = self.update(step, steps)
            if step % 100 == 0:
                print(f"step {step}: loss {float(value):.4f}, {self.clock() - began:.0f} s", flush=True)
            if step % args.save_every == 0:
                self.measure_and_save(step, self.clock() - began)
        self.measure_and_save(steps, self.clock() - began)
        print(json.dumps(asdict(self.record), indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, help="training text, plain or .xz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, help="number of updates; repeats a run")
    parser.add_argument("--minutes", type=float, default=6.0, help="without --steps: train about this long")
    parser.add_argument("--rows", type=int, default=128, help="rows in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--fact-share", type=float, default=0.125, help="share of rows with facts")
    parser.add_argument("--answer-weight", type=float, default=10.0, help="what an answer's token counts")
    parser.add_argument("--fact-pool", type=int, default=32768, help="how many rows with facts to make")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--warm-up", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-mb", type=float, help="read only so much text, for a quick try")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between measurements and saves")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    Trainer(parse_arguments()).run()
